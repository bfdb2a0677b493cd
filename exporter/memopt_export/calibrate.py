"""Ranges: what values tensors take on real samples. Memory does not grow with their number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from memopt.errors import InputRefused
from memopt.tensors import Array, TensorSpec, check_feeds
from memopt_export.graph import Graph
from memopt_export.means import Means

if TYPE_CHECKING:
    import onnx

    from memopt_models.data import Samples

# One mean tells of any NaN; ONNX Runtime's minimum and maximum skip a NaN that is not the first value they meet.
_WATCHES = ("ReduceMin", "ReduceMax", "ReduceMean")


@dataclass(frozen=True)
class Ranges:
    """The smallest and the largest value of each tensor by name, and the samples that gave them.

    Bounds are finite, unless `collect_ranges` was asked to allow infinity.
    """

    bounds: dict[str, tuple[float, float]]
    samples: int
    source: str
    fingerprint: str


def calibrate(
    graph: Graph,
    tensors: Sequence[str],
    samples: Samples,
    means: Means,
    *,
    allow_infinity: bool = False,
) -> Ranges:
    """The ranges of `tensors` on these samples, see `collect_ranges`.

    A graph of a fixed batch gets batches of that size; samples that do not fill the last one are left out.
    """
    fixed = graph.fixed_batch
    whole = len(samples) if fixed is None else len(samples) // fixed * fixed
    return collect_ranges(
        graph,
        tensors,
        samples.pick(slice(whole)).batches(fixed or means.batch_size),
        source=samples.source,
        fingerprint=samples.fingerprint,
        allow_infinity=allow_infinity,
        on_step=lambda done: means.tell("calibrate", done, whole),
    )


def collect_ranges(
    graph: Graph,
    tensors: Sequence[str],
    batches: Iterable[Mapping[str, Array]],
    *,
    source: str,
    fingerprint: str,
    allow_infinity: bool = False,
    on_step: Callable[[int], None] | None = None,
) -> Ranges:
    """The ranges of `tensors` over all batches; only three numbers a tensor and batch leave the session.

    Args:
        graph: a float32 graph.
        tensors: names of float32 tensors: inputs, outputs or anything between.
        batches: feeds, one batch at a time; memory is that of the largest one.
        source: where the samples come from, to be told to people.
        fingerprint: digest of the samples.
        allow_infinity: whether a bound may be infinite, as behind a mask of -inf; NaN never is one.
        on_step: told the number of samples seen, after each batch.

    Raises:
        InputRefused: no samples, a batch that does not fit the inputs, NaN or infinity in a tensor.
    """
    session = _watching_session(graph, tensors)
    lows, highs = np.full(len(tensors), np.inf), np.full(len(tensors), -np.inf)
    samples = 0
    for batch in batches:
        feeds = share_scalars(graph.inputs, batch)
        check_feeds(graph.inputs, feeds)
        seen = np.array(session.run(None, feeds), np.float64).reshape(-1, len(_WATCHES))  # (tensors, 3)
        _refuse_not_finite(tensors, seen, allow_infinity=allow_infinity)
        lows, highs = np.minimum(lows, seen[:, 0]), np.maximum(highs, seen[:, 1])
        samples += len(batch[graph.inputs[0].name])
        if on_step is not None:
            on_step(samples)
    if samples == 0:
        raise InputRefused(f"{source} gave no samples; calibration data is never invented", hint="--data SPEC")
    bounds = {name: (float(low), float(high)) for name, low, high in zip(tensors, lows, highs, strict=True)}
    return Ranges(bounds, samples, source, fingerprint)


def share_scalars(inputs: Sequence[TensorSpec], batch: Mapping[str, Array]) -> dict[str, Array]:
    """The batch as a graph takes it: a scalar input, which has no place for samples, gets the one value of them all.

    Raises:
        InputRefused: they do not agree on it.
    """
    scalars = {spec.name for spec in inputs if not spec.shape}
    for name in scalars & batch.keys():
        if np.unique(batch[name]).size > 1:
            raise InputRefused(
                f"input {name!r} is one number for all samples of a run, and the samples have several",
                hint="--data with the samples of one value",
            )
    return {name: np.asarray(array.reshape(-1)[0]) if name in scalars else array for name, array in batch.items()}


def merge(first: Ranges, second: Ranges) -> Ranges:
    """The ranges over the samples of both: shards of one data set merge to the ranges of the whole.

    For calibration on several machines or days: each collects the ranges of its shard, and what is merged is what one
    run over all of them would have found. Nothing in the exporter does that by itself.

    Raises:
        InputRefused: they do not speak of the same tensors.
    """
    if first.bounds.keys() != second.bounds.keys():
        odd = sorted(first.bounds.keys() ^ second.bounds.keys())
        raise InputRefused(f"ranges of different graphs: only one side knows {odd[0]!r}")
    bounds = {
        name: (min(low, second.bounds[name][0]), max(high, second.bounds[name][1]))
        for name, (low, high) in first.bounds.items()
    }
    return Ranges(
        bounds,
        first.samples + second.samples,
        _joined(first.source, second.source),
        _joined(first.fingerprint, second.fingerprint),
    )


def _watching_session(graph: Graph, tensors: Sequence[str]) -> Any:
    """A session that returns the watches alone; unoptimized, so that every tensor exists, and no arena keeps any."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    model = _watched(graph, tensors)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _watched(graph: Graph, tensors: Sequence[str]) -> onnx.ModelProto:
    """The model with each tensor's watches as its only outputs, in order."""
    from onnx import TensorProto, helper

    model = graph.copy_model()
    known = {spec.name for spec in graph.inputs} | {name for node in model.graph.node for name in node.output}
    del model.graph.output[:]
    for tensor in tensors:
        if tensor not in known:
            raise InputRefused(f"the graph has no tensor {tensor!r} to calibrate")
        for watch in _WATCHES:
            output = f"{tensor}.{watch}"
            model.graph.node.append(helper.make_node(watch, [tensor], [output], keepdims=0))
            model.graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, []))
    return model


def _refuse_not_finite(tensors: Sequence[str], seen: Array, *, allow_infinity: bool) -> None:
    """Raises for the first tensor, in the graph's order, whose watches are not all finite, or not all numbers."""
    broken = np.flatnonzero((np.isnan(seen) if allow_infinity else ~np.isfinite(seen)).any(axis=1))
    if len(broken):
        what = "NaN" if np.isnan(seen[broken[0]]).any() else "infinity"
        raise InputRefused(f"tensor {tensors[broken[0]]!r} holds {what} on the calibration data")


def _joined(first: str, second: str) -> str:
    return first if first == second else f"{first}+{second}"
