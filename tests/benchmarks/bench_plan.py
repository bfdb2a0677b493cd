"""How near the static plan is to what ONNX Runtime takes at its peak, and how long it takes to say so.

Random weights; arena and reuse are off, so that what is taken is what is alive. Two measures: bytes allocated, traced
in the process to the byte, and, where a batch is large enough for pages to tell, how far the resident memory of a fresh
process rises in one run (VmHWM, reset before it). A cell with branches written in their worst order shows what another
order saves.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from exported import exported
from marks import Mark, report

from memopt_export.graph import Graph, load_graph, save_graph
from memopt_export.hollow import as_executed
from memopt_export.order import reorder
from memopt_export.plan import Plan, plan

sys.path.append(str(Path(__file__).parent.parent / "tracing"))
from traced import Run, peaks, tracer

MIB = 2**20
BATCHES = (1, 8, 32)
RESIDENT_BATCHES = (8, 32)  # at which pages are small beside the peak
LIMITS = {
    "resnet50": 0.03, "mobilenet_v2": 0.03, "efficientnet_b0": 0.03, "densenet121": 0.03, "simple_cnn": 0.03,
    "vit_b_16": 0.05, "swin_t": 0.05,
}  # fmt: skip
_RISE = """
import ctypes, sys
ctypes.CDLL(None).mallopt(-3, 2**17)
import numpy, onnxruntime
from memopt.memory import STATUS, give_back, kib_fields, reset_peak
options = onnxruntime.SessionOptions()
options.enable_cpu_mem_arena = options.enable_mem_pattern = options.enable_mem_reuse = False
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
given = session.get_inputs()[0]
x = numpy.random.default_rng(0).normal(size=(int(sys.argv[2]), *given.shape[1:])).astype(numpy.float32)
session.run(None, {given.name: x})
give_back()
reset_peak()
before = kib_fields(STATUS)["VmRSS"]
session.run(None, {given.name: x})
print(kib_fields(STATUS)["VmHWM"] - before)
"""


def main() -> int:
    """Measures everything; returns the exit code."""
    details: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="memopt-bench-") as name:
        library = tracer(Path(name))
        if library is None:
            sys.stderr.write("bench_plan: gcc is not installed, so allocations cannot be traced\n")
            return 5
        marks = [mark for network, limit in LIMITS.items() for mark in _network(network, limit, library, details)]
        marks += _order(Path(name), library, details)
    return report("plan", marks, details)


def _network(network: str, limit: float, library: Path, details: dict[str, Any]) -> list[Mark]:
    path = exported(network)
    graph = load_graph(path, checked=True)
    started = time.perf_counter()
    executed = as_executed(graph)
    planned = {batch: plan(executed, batch=batch, threads=1) for batch in BATCHES}
    seconds = (time.perf_counter() - started) / len(BATCHES)
    traced = dict(zip(BATCHES, peaks(library, [Run(str(path), batch) for batch in BATCHES]), strict=True))
    resident = {batch: _rise(path, batch) for batch in RESIDENT_BATCHES} if network != "simple_cnn" else {}
    details[network] = {
        "planned_mib": {batch: found.activation_bytes / MIB for batch, found in planned.items()},
        "allocated_mib": {batch: size / MIB for batch, size in traced.items()},
        "resident_mib": {batch: size / MIB for batch, size in resident.items()},
        "peak_node": planned[1].peak_node, "plan_s": seconds,
    }  # fmt: skip
    marks = [Mark(f"{network}, plan against bytes allocated", _worst(planned, traced), "share", limit=limit)]
    if resident:
        marks.append(Mark(f"{network}, plan against resident memory", _worst(planned, resident), "share", limit=limit))
    if network == "vit_b_16":
        marks.append(Mark("vit_b_16, time of a plan", seconds, "s", limit=2.0))
    return marks


def _worst(planned: dict[int, Plan], measured: dict[int, int]) -> float:
    """The largest difference over the batches, as a share of what was measured."""
    return max(abs(planned[batch].activation_bytes / size - 1) for batch, size in measured.items())


def _rise(path: Path, batch: int) -> int:
    """Bytes by which one run raises the resident memory of a fresh process."""
    command = [sys.executable, "-c", _RISE, str(path), str(batch)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _order(folder: Path, library: Path, details: dict[str, Any]) -> list[Mark]:
    graph = _branched()
    found = reorder(graph)
    runs = []
    for name, each in (("before", graph), ("after", found.graph)):
        save_graph(each, folder / f"{name}.onnx")
        runs.append(Run(str(folder / f"{name}.onnx"), 8))
    before, after = peaks(library, runs)
    details["order"] = {"before_mib": before / MIB, "after_mib": after / MIB, "planned": found.after_bytes / MIB}
    return [Mark("cells in their worst order, reordered, bytes allocated", after / before, "x", limit=0.9)]


def _branched() -> Graph:
    """Four cells of two branches: the one that leaves much is written first."""
    import onnx
    from onnx import helper, numpy_helper

    nodes, weights, channels, last = [], [], 16, "x"
    rng = np.random.default_rng(0)

    def conv(read: str, inside: int, outside: int, name: str) -> str:
        weights.append(
            numpy_helper.from_array(rng.normal(size=(outside, inside, 3, 3)).astype(np.float32), f"{name}.w")
        )
        nodes.append(
            helper.make_node("Conv", [read, f"{name}.w"], [name], name=name, kernel_shape=[3, 3], pads=[1] * 4)
        )
        return name

    for cell in range(4):
        stem = conv(last, channels, 16, f"stem{cell}")
        ends = []
        for branch, (inner, left) in {"wide": (48, 48), "narrow": (96, 16)}.items():
            ends.append(conv(conv(stem, 16, inner, f"{branch}{cell}.a"), inner, left, f"{branch}{cell}.b"))
        last, channels = f"meet{cell}", 64
        nodes.append(helper.make_node("Concat", ends, [last], name=last, axis=1))
    conv(last, channels, 16, "y")
    ends = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["batch", 16, 48, 48]) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "cells", ends[:1], ends[1:], weights)
    return Graph(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), "0" * 64)


if __name__ == "__main__":
    sys.exit(main())
