"""What ONNX Runtime allocates at its peak in one run, to the byte: by tracing malloc in a process of its own.

Arena and reuse are off, as in the profile "minimum": what is allocated is what is alive. Real weights, real inputs.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Run:
    """A model to run once at a batch, optimized or as it is, with that many threads."""

    path: str
    batch: int = 1
    optimize: bool = True
    threads: int = 1


def tracer(folder: Path) -> Path | None:
    """The library that traces, compiled into `folder`; None without gcc."""
    if shutil.which("gcc") is None:
        return None
    library = folder / "allocations.so"
    source = HERE / "allocations.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O2", source, "-o", library, "-ldl", "-pthread"], check=True)
    return library


def peaks(library: Path, runs: Sequence[Run]) -> list[int]:
    """Bytes at the peak of the second run of each, without its input, all in one fresh process."""
    child = subprocess.run(
        [sys.executable, __file__, str(library)],
        input=json.dumps([asdict(run) for run in runs]),
        env={**os.environ, "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        check=True,
    )
    return list(json.loads(child.stdout.splitlines()[-1]))


def _peak(library: ctypes.CDLL, run: Run) -> int:
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.enable_cpu_mem_arena = options.enable_mem_pattern = options.enable_mem_reuse = False
    options.intra_op_num_threads, options.log_severity_level = run.threads, 4
    if not run.optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(run.path, options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    kinds = {
        "tensor(float)": np.float32,
        "tensor(int64)": np.int64,
        "tensor(bool)": np.bool_,
        "tensor(uint8)": np.uint8,
    }
    feeds = {
        each.name: rng.uniform(0, 2, [dim if isinstance(dim, int) else run.batch for dim in each.shape]).astype(
            kinds[each.type]
        )
        for each in session.get_inputs()
    }
    session.run(None, feeds)
    library.trace_start()
    session.run(None, feeds)
    return int(library.trace_stop())


def main() -> None:
    """Runs on standard input, their peaks on standard output."""
    library = ctypes.CDLL(sys.argv[1])
    library.trace_stop.restype = ctypes.c_size_t
    print(json.dumps([_peak(library, Run(**run)) for run in json.load(sys.stdin)]))


if __name__ == "__main__":
    main()
