"""What feeding a network costs: an epoch of MNIST in batches of 256, ready to train on, beside torchvision's loader.

Each feeder opens the data and runs in a fresh process, once for CPU time and once for memory. CPU time is user and
system of the process and its workers during one shuffled epoch; opening stands apart. Private memory is the highest
`Pss_Anon` of smaps_rollup after any batch, summed over workers, above what the process held when its imports were done
and freed memory was given back. Both run torch with one thread. MNIST lies under MEMOPT_DATA_ROOT.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from marks import Mark, report

from memopt.memory import give_back
from memopt_models.data import default_root

BATCH = 256
MIB = 2**20


def main() -> int:
    """Measures everything; returns the exit code."""
    found = {name: _measured(name, "cpu") | _measured(name, "memory") for name in FEEDERS}
    ours, moved, theirs = (found[name] for name in ("memopt", "memopt, shifted", "torchvision"))
    marks = [
        Mark("private memory of opening and an epoch", ours["private_mib"], "MiB", limit=5),
        Mark("  with pictures shifted by up to 2 pixels", moved["private_mib"], "MiB", limit=5),
        Mark("  of torchvision's", ours["private_mib"] / theirs["private_mib"], "x", limit=0.1),
        Mark(
            "CPU time of an epoch against torchvision's", ours["epoch_cpu_s"] / theirs["epoch_cpu_s"], "x", limit=1 / 50
        ),
        Mark("  with pictures shifted", moved["epoch_cpu_s"] / theirs["epoch_cpu_s"], "x", limit=1 / 25),
        Mark("CPU time of opening and an epoch", _whole(ours) / _whole(theirs), "x", limit=1 / 10),
    ]
    return report("data", marks, {"batch": BATCH, "feeders": found})


def _whole(each: dict[str, Any]) -> float:
    return float(each["open_cpu_s"] + each["epoch_cpu_s"])


def _measured(name: str, what: str) -> dict[str, Any]:
    """What one feeder takes, in a process of its own."""
    done = subprocess.run([sys.executable, __file__, name, what], stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _measure(name: str, what: str) -> dict[str, Any]:
    """The child's part."""
    import torch

    torch.set_num_threads(1)
    open_feeder = FEEDERS[name]()
    give_back()
    highest = base = _private_bytes()
    started = _cpu_s()
    feed = open_feeder()
    opened = _cpu_s()
    samples, total = 0, 0.0
    for inputs, labels in feed:
        samples += len(labels)
        total += float(inputs[0, 0, 0, 0])  # somebody looks at it
        if what == "memory":
            highest = max(highest, _private_bytes())
    assert samples in (55_000, 60_000), samples
    seconds = _cpu_s() - opened
    if what == "memory":
        return {"private_mib": (highest - base) / MIB}
    share = samples / 60_000  # memopt holds a twelfth out for validation
    return {"open_cpu_s": opened - started, "epoch_cpu_s": seconds / share, "samples": samples}


def _memopt(shift: int) -> Callable[[], Iterable[Any]]:
    from memopt_models.data import open_data
    from memopt_models.feed import Feeder, draw_moves

    def opened() -> Iterator[Any]:
        data = open_data("mnist", download=False)
        feeder = Feeder(data.train, data.preprocess, batch_size=BATCH)
        return epoch(feeder, len(data.train))

    def epoch(feeder: Feeder, count: int) -> Iterator[Any]:
        rng = np.random.default_rng(0)
        for rows in np.array_split(rng.permutation(count), -(-count // BATCH)):
            yield feeder.batch(np.sort(rows), draw_moves(len(rows), shift, rng))

    return opened


def _torchvision(workers: int) -> Callable[[], Iterable[Any]]:
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    def opened() -> Iterable[Any]:
        prepare = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
        data = datasets.MNIST(default_root(), train=True, transform=prepare)
        return DataLoader(data, batch_size=BATCH, shuffle=True, num_workers=workers)

    return opened


FEEDERS: dict[str, Callable[[], Callable[[], Iterable[Any]]]] = {
    "memopt": lambda: _memopt(0),
    "memopt, shifted": lambda: _memopt(2),
    "torchvision": lambda: _torchvision(0),
    "torchvision, 2 workers": lambda: _torchvision(2),
}


def _private_bytes() -> int:
    """Anonymous pages of this process and its children; what they share counts once."""
    return sum(_anonymous(process) for process in (os.getpid(), *_children()))


def _children() -> list[int]:
    listed = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    return [int(process) for process in listed.split()]


def _anonymous(process: int) -> int:
    try:
        found = re.search(r"^Pss_Anon:\s+(\d+) kB", Path(f"/proc/{process}/smaps_rollup").read_text(), re.MULTILINE)
    except (FileNotFoundError, ProcessLookupError):
        return 0  # it has just ended
    return int(found[1]) * 1024 if found else 0


def _cpu_s() -> float:
    """User and system time of this process and of its children, those that live included."""
    ticks = 0
    for process in _children():
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    own = os.times()
    return time.process_time() + own.children_user + own.children_system + ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        sys.stdout.write(json.dumps(_measure(sys.argv[1], sys.argv[2])))
    else:
        sys.exit(main())
