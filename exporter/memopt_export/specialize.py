"""Specializes graphs: ONNX Runtime optimizes once, for the processor at hand, what it would optimize at every load.

At load the result is opened as it is, out of the mapped bundle: no copies of weights in another layout, no optimizer.
It runs on machines with the same key only, so the portable graph travels beside it.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from memopt import ort_runtime
from memopt.cpu import CpuTarget, this_cpu
from memopt.errors import BackendError, InputRefused, first_line
from memopt_export import preflight
from memopt_export.graph import Graph
from memopt_export.order import in_least_order

if TYPE_CHECKING:
    from memopt_export.pack import OnnxPart


def specialize(part: OnnxPart) -> OnnxPart:
    """The variant that stands beside `part` in a bundle: the same model, optimized for this machine.

    Raises:
        BackendError: the features of this processor cannot be read.
        InputRefused: ONNX Runtime cannot optimize the graph.
    """
    cpu = _this_machine()
    graph = optimize(part.graph)
    return replace(part, id=f"{part.id}-{cpu.key}", graph=graph, measured=(), cpu=cpu, source=part.id)


def optimize(graph: Graph) -> Graph:
    """The graph with every optimization of ONNX Runtime for this processor, weights laid out for it.

    Its nodes stand in the order with the lowest peak that was found: where there is no arena, it is executed so.
    """
    import onnxruntime

    with tempfile.TemporaryDirectory(prefix="memopt-specialize-") as name:
        written = Path(name) / "optimized.onnx"
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.optimized_model_filepath = str(written)
        options.log_severity_level = 4  # it warns that the result is for this machine: it is meant to be
        try:
            onnxruntime.InferenceSession(graph.data, options, providers=["CPUExecutionProvider"])
        except ort_runtime.library_errors() as error:
            raise InputRefused(f"onnxruntime cannot optimize the graph: {first_line(error)}") from error
        model = preflight.parse(written)
    for side in ("input", "output"):  # what it has inferred of their shapes is no part of the promise
        values = getattr(graph.copy_model().graph, side)
        del getattr(model.graph, side)[:]
        getattr(model.graph, side).extend(values)
    return in_least_order(graph.with_model(model))


def _this_machine() -> CpuTarget:
    cpu = this_cpu(ort_runtime.version() or "")
    if cpu is None:
        raise BackendError("the features of this processor cannot be read", hint="pack without --specialize")
    return cpu
