"""The memory of a training: what each lever saves, all of them together, and whether a limit's promise is kept.

resnet18, 16 pictures of 224x224 that are noise, Adam. Every figure is the peak of a fresh process, above what it held
before there was a network, over steps after the first: Adam's state is there then.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from typing import Any

import numpy as np
from marks import Mark, report

from memopt.memory import PeakMeter, settled_resident
from memopt_models.dataset import DataSet, Split, make_data
from memopt_models.networks import build, find_factory
from memopt_models.out_of_memory import release_at_once
from memopt_models.train import Progress, TrainSettings, cross_entropy, fit_module, train

MIB = 2**20
BATCH, STEPS, SIDE = 16, 3, 224
PLAIN: dict[str, Any] = {"plain": True}  # the loop that every tutorial has, in which nothing is ours
TOGETHER = {"precision": "bf16", "accumulate": 16, "checkpointing": "blocks"}
LEVERS: dict[str, dict[str, Any]] = {
    "plain loop, fp32": PLAIN,
    "ours, fp32": {},
    "freed memory goes back at once": {"release": True},
    "bf16": {"precision": "bf16"},
    "checkpointing": {"checkpointing": "blocks"},
    "accumulate 4": {"accumulate": 4},
    "accumulate 16": {"accumulate": 16},
    "channels last": {"channels_last": True},
    "sgd with momentum": {"optimizer": "sgd"},
    "bf16 + accumulate 4 + checkpointing": TOGETHER | {"accumulate": 4},
    "bf16 + accumulate 16 + checkpointing": TOGETHER,
    "the same, freed at once": TOGETHER | {"release": True},
}
REPEATED = ("plain loop, fp32", "bf16 + accumulate 16 + checkpointing")


def main() -> int:
    """The marks, or with --measure or --promise what one process finds."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--measure", type=json.loads)
    arguments.add_argument("--promise", type=int)
    asked = arguments.parse_args()
    if asked.measure is not None:
        sys.stdout.write(json.dumps(_peak(asked.measure)))
        return 0
    if asked.promise is not None:
        sys.stdout.write(json.dumps(_promise(asked.promise)))
        return 0
    peaks = {
        name: statistics.median(_ask("--measure", json.dumps(how)) for _ in range(3 if name in REPEATED else 1))
        for name, how in LEVERS.items()
    }
    base, best = (peaks[name] for name in REPEATED)
    for name, peak in peaks.items():
        sys.stdout.write(f"  {name:<40} {peak / MIB:>7.1f} MiB  {peak / base:.2f}x\n")
    marks = [Mark("resnet18, batch 16, 224 px: bf16 + accumulation + checkpointing", best / base, "x", limit=0.55)]
    promises = [_ask("--promise", str(room)) for room in (300, 420)]
    for promise in promises:
        sys.stdout.write(f"  {promise['said']}; real peak {promise['peak_bytes'] / MIB:.0f} MiB\n")
        limit, size = promise["limit_bytes"], promise["micro_batch"]
        marks += [
            Mark(
                f"limit {limit / MIB:.0f} MiB: real peak of micro-batch {size}",
                promise["peak_bytes"] / limit,
                "x",
                limit=1.0,
            ),
            Mark(
                f"limit {limit / MIB:.0f} MiB: real peak of twice that", promise["larger_bytes"] / limit, "x", floor=1.0
            ),
        ]
    return report("training", marks, {"peaks_bytes": peaks, "promises": promises})


def _ask(*words: str) -> Any:
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def _noise(samples: int) -> DataSet:
    rng = np.random.default_rng(0)
    whole = Split(rng.integers(0, 256, (samples, SIDE, SIDE, 3), np.uint8), rng.integers(0, 10, samples))
    return make_data("noise", [whole, whole.pick(slice(2)), whole.pick(slice(2))], tuple("0123456789"))


def _peak(how: dict[str, Any]) -> int:
    """Bytes that a training adds to this process at its peak."""
    import torch

    torch.set_num_threads(1)
    data = _noise(BATCH * STEPS)
    find_factory("resnet18")  # imports torchvision
    if how.pop("release", False):
        release_at_once()
    held = settled_resident()
    if how.pop("plain", False):
        return _plain_loop(data) - held
    seen: list[Progress] = []
    module = build("resnet18", {"classes": 10})
    settings = TrainSettings(**{"epochs": 1, "batch_size": BATCH, "accumulate": 1, "threads": 1, **how})
    fit_module(module, data, settings, cross_entropy, seen.append, stage="bench")
    return int(seen[-1].peak_bytes or 0) - held


def _plain_loop(data: DataSet) -> int:
    """The highest RSS of a training as tutorials write it."""
    import torch

    from memopt.preprocess import prepare

    module = build("resnet18", {"classes": 10}).train()
    optimizer = torch.optim.Adam(module.parameters())
    with PeakMeter() as meter:
        for start in range(0, len(data.train), BATCH):
            rows = slice(start, start + BATCH)
            inputs = torch.from_numpy(prepare(data.train.images[rows], data.preprocess))
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(module(inputs), torch.from_numpy(data.train.labels[rows]))
            loss.backward()
            optimizer.step()
        return int(meter.read() or 0)


def _promise(room: int) -> dict[str, Any]:
    """What is chosen within `room` MiB above this process, its real peak, and that of parts twice as large."""
    import torch

    torch.set_num_threads(1)
    data = _noise(BATCH * STEPS)
    find_factory("resnet18")
    limit_bytes = settled_resident() + room * MIB
    how = TrainSettings(epochs=1, batch_size=BATCH, threads=1, max_memory_bytes=limit_bytes)
    seen: list[Progress] = []
    made = train("resnet18", {}, data, how, on_step=seen.append)
    (stage,) = made.lineage
    size = BATCH // stage.settings["accumulate"]
    return {
        "limit_bytes": limit_bytes,
        "micro_batch": size,
        "said": [progress.note for progress in seen if progress.note][-1],
        "probes": stage.settings["memory"]["probes"],
        "peak_bytes": stage.settings["memory"]["peak_bytes"]["train"][0],
        "larger_bytes": limit_bytes
        - room * MIB
        + _ask("--measure", json.dumps({"accumulate": BATCH // (2 * size), "release": True})),
    }


if __name__ == "__main__":
    sys.exit(main())
