"""What training makes of MNIST: bytes of runnable files and memory against accuracy, for three seeds.

Every network is trained with the same moved pictures, for the same number of epochs in all, those of the networks that
it comes from included. Epochs are chosen on validation; the test split is looked at once, in ONNX Runtime. Checkpoints
stay in build/bench/train under the digest of what was asked for, so that a run that was ended goes on.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from marks import OUTPUT, Mark, report

from memopt.accuracy import top1
from memopt.charts import Point, scatter
from memopt.compare import save_arrays
from memopt.memory import STEADY
from memopt.probe import Request, measure
from memopt_export.compact import compact
from memopt_export.from_torch import export
from memopt_export.graph import Graph, load_graph, run_batches, save_graph
from memopt_export.plan import plan
from memopt_export.quantize import quantize
from memopt_export.recipe import Recipe
from memopt_models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from memopt_models.data import DataSet, Samples, open_data, open_samples
from memopt_models.prune import PruneSettings, prune
from memopt_models.qat import QatSettings, train_rounded
from memopt_models.train import TrainSettings, train

WORK = OUTPUT / "train"
SEEDS = (0, 1, 2)
AT_ONCE = 2  # processes of one thread
FAST = TrainSettings(
    1, batch_size=256, schedule="onecycle", shift=2, threads=1, precision="bf16", channels_last=True
)  # fmt: skip
EPOCHS = 20  # of every network for MNIST, in all
VIEWS = 4
CHANNELS = (12, 22, 26, 30, 31)  # of the student: with VIEWS the largest that is 250 times smaller than dense
DENSE_SEEN = f"dense fp32, {VIEWS} views"
CALIBRATED = 256  # train pictures for INT8
RESNET = {"classes": 10, "in_channels": 1}

STYLE = (
    "text{font:12px sans-serif;fill:#333;paint-order:stroke;stroke:#fff;stroke-width:4px}.grid{stroke:#ddd}"
    ".frontier{fill:none;stroke:#888;stroke-dasharray:4 3}.best{fill:#0a7}.beaten{fill:#bbb}"
)


@dataclass(frozen=True)
class Row:
    """One network with one seed, as a file that runs."""

    name: str
    seed: int
    size_bytes: int
    weights_bytes: int  # planned, at batch 1
    activation_bytes: int
    private_bytes: int | None  # measured in a fresh process, at batch 1
    peak_bytes: int | None
    validation_top1: float  # of the file, in ONNX Runtime; what is chosen is chosen by this
    test_top1: float  # the same, only ever told


def main() -> int:
    """Trains, exports and measures everything; returns the exit code."""
    WORK.mkdir(parents=True, exist_ok=True)
    jobs: list[tuple[Callable[[int], list[Row]], int]] = [(residual, 0)]
    jobs += [(given, seed) for seed in SEEDS] + [(student, seed) for seed in SEEDS]
    with ProcessPoolExecutor(AT_ONCE, mp_context=multiprocessing.get_context("spawn")) as pool:
        rows = [row for found in pool.map(_call, *zip(*jobs, strict=True)) for row in found]
    means = {row.name: _mean([each for each in rows if each.name == row.name]) for row in rows}
    _show(means)
    _draw({name: mean for name, mean in means.items() if not name.startswith("resnet18")})
    return report("train", list(_marks(means)), {"rows": [asdict(row) for row in rows], "means": means})


def _call(job: Callable[[int], list[Row]], seed: int) -> list[Row]:
    return job(seed)


# --- what is trained


def given(seed: int) -> list[Row]:
    """The given network: dense, INT8, and pruned with weights of 4 bits."""
    data = open_data("mnist")
    half = _how(8, 3e-3, seed)
    base = _made("base", half, lambda: train("simple_cnn", {}, data, half))
    more = _how(EPOCHS - 8, 2e-3, seed)
    dense = _made("dense", [half, more], lambda: train("simple_cnn", {}, data, more, start=base))
    rows = [_row("dense fp32", dense, data, seed), _row(DENSE_SEEN, dense, data, seed, views=VIEWS)]
    int8 = QatSettings(_exact(_how(2, 1e-4, seed)))
    trained = _made("int8", [half, more, int8], lambda: train_rounded(dense, data, int8))
    rows.append(_row("dense int8", trained, data, seed))
    for ratio in (0.5, 0.64):
        cut = PruneSettings(ratio=ratio, finetune=_how(5, 2e-3, seed))
        pruned = _made("pruned", [half, cut], lambda cut=cut: prune(base, data, cut))
        rounding = _rounding(EPOCHS - 8 - 5, 2e-3, seed)
        small = _made("pruned-int4", [half, cut, rounding], lambda p=pruned, r=rounding: train_rounded(p, data, r))
        rows.append(_row(f"pruned {ratio:.0%} int4, {VIEWS} views", small, data, seed))
    return rows


def student(seed: int) -> list[Row]:
    """A network of our own for the smallest file, with weights of 4 bits."""
    data = open_data("mnist")
    how, settings = _how(12, 2e-2, seed), {"channels": list(CHANNELS)}
    free = _made("student", [settings, how], lambda: train("tiny_cnn", settings, data, how))
    rounding = _rounding(EPOCHS - 12, 3e-3, seed)
    small = _made("student-int4", [settings, how, rounding], lambda: train_rounded(free, data, rounding))
    return [_row(f"student int4, {VIEWS} views", small, data, seed)]


def residual(seed: int) -> list[Row]:
    """resnet18 on Fashion-MNIST: dense, and pruned by half and INT8 by `quantize`, ten epochs each.

    Half of all channels are 5 of 8 in the two last stages, which have 94% of the weights and see 2 x 2 places and one.
    The rate of the eight epochs was chosen on validation, of 2e-3 and 4e-3 for both; it is the same.
    """
    data = open_data("fashion-mnist")
    how = replace(_how(2, 2e-3, seed), batch_size=128)
    base = _made("resnet", how, lambda: train("resnet18", RESNET, data, how))
    more = replace(how, epochs=8, learning_rate=4e-3)
    dense = _made("resnet-dense", [how, more], lambda: train("resnet18", RESNET, data, more, start=base))
    cut = PruneSettings(ratio=0.625, round_to=8, protect=("conv1", "layer1.*", "layer2.*"), finetune=more)
    pruned = _made("resnet-pruned", [how, cut], lambda: prune(base, data, cut))
    return [
        _row("resnet18 fp32", dense, data, seed),
        _row("resnet18 pruned 50% int8", pruned, data, seed, recipe=Recipe("int8")),
    ]


def _how(epochs: int, rate: float, seed: int) -> TrainSettings:
    return replace(FAST, epochs=epochs, learning_rate=rate, seed=seed)


def _rounding(epochs: int, rate: float, seed: int) -> QatSettings:
    """4 bits for weights, in one step for the network, trained for VIEWS."""
    return QatSettings(_exact(_how(epochs, rate, seed)), precision="int4-weights", steps="network", views=VIEWS)


def _exact(how: TrainSettings) -> TrainSettings:
    """In float32, in which every point of a grid is what it will be in the file."""
    return replace(how, precision="fp32")


def _made(name: str, asked: Any, make: Callable[[], Checkpoint]) -> Checkpoint:
    """The checkpoint that was made of these settings before, or now."""
    told = json.dumps(asked, default=asdict, sort_keys=True)
    path = WORK / f"{name}-{hashlib.sha256(told.encode()).hexdigest()[:12]}.safetensors"
    if not path.exists():
        save_checkpoint(make(), path)
        checkpoint = load_checkpoint(path)
        sys.stderr.write(f"{path.name}: validation {100 * checkpoint.metrics['validation_top1']:.2f}%\n")
    return load_checkpoint(path)


# --- what is measured


def _row(
    name: str, checkpoint: Checkpoint, data: DataSet, seed: int, *,
    views: int | None = None, recipe: Recipe | None = None,
) -> Row:  # fmt: skip
    """The compact file of the checkpoint, quantized by a recipe, and what it needs.

    Without `views` it has those that it was trained for.
    """
    validation, samples = _samples(checkpoint, data, "validation"), _samples(checkpoint, data, "test")
    (key,) = samples.feeds
    path = WORK / f"{name.replace(' ', '-').replace('%', '').replace(',', '')}-{seed}.onnx"
    graph = export(checkpoint, validation.feeds[key][:64], compact=recipe is None, views=views).graph
    if recipe is not None:
        graph = compact(quantize(graph, recipe, _samples(checkpoint, data, "train").pick(slice(CALIBRATED))).graph)
    save_graph(graph, path, force=True)
    graph = load_graph(path)
    planned = plan(graph, batch=1, threads=1)
    with tempfile.TemporaryDirectory(prefix="memopt-bench-") as folder:
        inputs = save_arrays(samples.pick(slice(8)).feeds, Path(folder))
        bill = measure(Request(str(path), "onnxruntime", "cpu", 1, inputs, runs=10)).bill
    return Row(
        name, seed, path.stat().st_size, planned.weights_bytes, planned.activation_bytes,
        bill.phases[STEADY].private_bytes, bill.peak_bytes,
        _accuracy(graph, validation), _accuracy(graph, samples),
    )  # fmt: skip


def _samples(checkpoint: Checkpoint, data: DataSet, split: str) -> Samples:
    assert data.spec is not None
    return open_samples(data.spec, split=split, inputs=checkpoint.inputs, preprocess=checkpoint.preprocess)


def _accuracy(graph: Graph, samples: Samples) -> float:
    """Top-1 of the file in ONNX Runtime."""
    assert samples.labels is not None
    return top1(np.concatenate([logits for (logits,) in run_batches(graph, samples.batches(250))]), samples.labels)


def _mean(rows: list[Row]) -> dict[str, float]:
    """Means over the seeds, and the spread of what the test split says."""
    means = {
        name: statistics.fmean(getattr(row, name) or float("nan") for row in rows)
        for name in (
            "size_bytes", "weights_bytes", "activation_bytes", "private_bytes", "peak_bytes", "validation_top1",
            "test_top1",
        )
    }  # fmt: skip
    tested = [row.test_top1 for row in rows]
    return means | {"seeds": len(rows), "lowest_top1": min(tested), "highest_top1": max(tested)}


def _marks(means: dict[str, dict[str, float]]) -> Iterator[Mark]:
    """The marks. Of several files the smallest that validation puts within 0.1 points of dense is taken, or the most
    accurate one on validation where none is; dense may be seen from as many places as the others. The distance to
    dense as it is given, seen once, is a mark of its own.
    """
    once = means["dense fp32"]
    dense = max((once, means[DENSE_SEEN]), key=lambda mean: mean["validation_top1"])
    for label, kind, floor in (("given network, pruned and rounded", "pruned", 30), ("student", "student", 250)):
        files = [mean for name, mean in means.items() if name.startswith(kind)]
        near = [mean for mean in files if mean["validation_top1"] >= dense["validation_top1"] - 0.001]
        taken = (
            min(near, key=lambda mean: mean["size_bytes"])
            if near
            else max(files, key=lambda mean: mean["validation_top1"])
        )
        yield Mark(f"{label}, smaller than dense", once["size_bytes"] / taken["size_bytes"], "x", floor=floor)
        yield Mark(f"{label}, top-1 below it", 100 * (dense["test_top1"] - taken["test_top1"]), "points", limit=0.1)
        seen_once = 100 * (once["test_top1"] - taken["test_top1"])
        yield Mark(f"{label}, top-1 below it, seen once", seen_once, "points", limit=0.1)
    gained = 100 * (means["dense int8"]["test_top1"] - once["test_top1"])
    yield Mark("INT8 of the dense network, above it", gained, "points", floor=0)
    full, small = means["resnet18 fp32"], means["resnet18 pruned 50% int8"]
    held = [mean["weights_bytes"] + mean["activation_bytes"] for mean in (small, full)]
    lost = 100 * (full["test_top1"] - small["test_top1"])
    yield Mark("resnet18 pruned 50% int8, bytes", small["size_bytes"] / full["size_bytes"], "x", limit=1 / 10)
    yield Mark("resnet18 pruned 50% int8, planned memory", held[0] / held[1], "x", limit=1 / 3)
    yield Mark("resnet18 pruned 50% int8, top-1 lost", lost, "points", limit=0.5)


def _show(means: dict[str, dict[str, float]]) -> None:
    lines = [
        f"{'':28} {'bytes':>10} {'x':>6} {'planned':>16} {'private':>9} {'peak':>9}  test top-1 (spread), validation"
    ]
    for name, mean in means.items():
        first = means["resnet18 fp32" if name.startswith("resnet18") else "dense fp32"]
        lines.append(
            f"{name:28} {mean['size_bytes']:10.0f} {first['size_bytes'] / mean['size_bytes']:6.1f} "
            f"{mean['weights_bytes'] / 1024:7.1f}+{mean['activation_bytes'] / 1024:.1f} KiB "
            f"{mean['private_bytes'] / 2**20:5.2f} MiB {mean['peak_bytes'] / 2**20:5.2f} MiB  "
            f"{100 * mean['test_top1']:.2f} ({100 * mean['lowest_top1']:.2f} to {100 * mean['highest_top1']:.2f}), "
            f"{100 * mean['validation_top1']:.2f}"
        )
    sys.stdout.write("\n".join([*lines, ""]))


def _draw(means: dict[str, dict[str, float]]) -> None:
    """build/bench/train.svg: bytes against accuracy."""
    points = [
        Point(mean["size_bytes"], mean["test_top1"], name, f"{name}: {mean['size_bytes']:.0f} B", "circle")
        for name, mean in means.items()
    ]
    drawn = scatter(
        points, x_title="file, kB", y_title="top-1 on test", show_x=lambda value: f"{value / 1000:g}",
        show_y=lambda value: f"{100 * value:.4g}%",
    )  # fmt: skip
    head, _, rest = drawn.partition(">")
    alone = head.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    (OUTPUT / "train.svg").write_text(f"{alone}><style>{STYLE}</style>{rest}\n")


if __name__ == "__main__":
    sys.exit(main())
