"""Ranges: what values tensors take on real samples. Memory does not grow with their number."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from memopt.errors import InputRefused
from memopt.tensors import Array
from memopt_export.graph import Graph, wire
from memopt_export.histogram import AffineOf, Histogram, by_entropy, by_mse, by_percentile
from memopt_export.means import Means
from memopt_export.plan import tensor_sizes
from memopt_export.recipe import Recipe
from memopt_export.walk import Walk, watch_all

if TYPE_CHECKING:
    import onnx

    from memopt_models.data import Batches, Pictures, Samples

SMALLEST_RUN = 4  # samples run at once, where there are as many, see `_run_size`
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
    graph: Graph, tensors: Sequence[str], samples: Samples | Pictures, means: Means, *, allow_infinity: bool = False
) -> Ranges:
    """The ranges of `tensors` on these samples, see `collect_ranges`.

    A graph of a fixed batch gets batches of that size; samples that do not fill the last one are left out.
    """
    batches = batches_for(graph, samples, means)
    return collect_ranges(
        graph,
        tensors,
        batches,
        source=samples.source,
        fingerprint=samples.fingerprint,
        cuts=cuts(graph, means.piece_bytes),
        allow_infinity=allow_infinity,
        on_step=lambda done: means.tell("calibrate", done, len(batches.samples)),
    )


def batches_for(graph: Graph, samples: Samples | Pictures, means: Means) -> Batches:
    """The samples in batches that the graph takes: of its own size where it is fixed, and then only whole ones."""
    fixed = graph.fixed_batch
    whole = samples if fixed is None else samples.pick(slice(len(samples) // fixed * fixed))
    most = min(means.batch_size, run_size(graph, means.run_bytes))
    return whole.batches(fixed or _run_size(len(samples), most))


def run_size(graph: Graph, run_bytes: int) -> int:
    """The samples whose tensors fit into so many bytes; never fewer than SMALLEST_RUN."""
    return max(SMALLEST_RUN, run_bytes // max(sample_bytes(graph), 1))


def _run_size(samples: int, most: int) -> int:
    """The largest run up to `most` that leaves no sample alone; at least two, and a few more where it must.

    ONNX Runtime divides the work of a convolution on one sample in another way among threads, and its sums differ in
    the last bit: ranges would depend on how many samples run at once.

    >>> _run_size(33, 8), _run_size(33, 1), _run_size(32, 1), _run_size(1, 8)
    (7, 3, 2, 8)
    """
    return next((size for size in (*range(most, 1, -1), *range(2, samples + 1)) if samples % size != 1), most)


def sample_bytes(graph: Graph) -> int:
    """What all tensors of one sample take together; 0 where their shapes are not known."""
    try:
        return sum(tensor_sizes(graph).values())
    except InputRefused:
        return 0


def cuts(graph: Graph, piece_bytes: int | None) -> tuple[int, ...]:
    """Nodes before which to cut the graph, so that the weights of a piece take no more, or are those of one node."""
    found, held = [], 0
    wiring = wire(graph.model)
    for index, node in enumerate(wiring.nodes if piece_bytes is not None else ()):
        size = sum(wiring.initializers[name].ByteSize() for name in node.input if name in wiring.initializers)
        if held and piece_bytes is not None and held + size > piece_bytes:
            found.append(index)
            held = 0
        held += size
    return tuple(found)


def collect_ranges(
    graph: Graph,
    tensors: Sequence[str],
    batches: Sequence[Mapping[str, Array]],
    *,
    source: str,
    fingerprint: str,
    cuts: Sequence[int] = (),
    allow_infinity: bool = False,
    on_step: Callable[[int], None] | None = None,
) -> Ranges:
    """The ranges of `tensors` over all batches; only three numbers a tensor and batch leave the session.

    Args:
        graph: a float32 graph.
        tensors: names of float32 tensors: inputs, outputs or anything between.
        batches: feeds; memory is that of the largest one.
        source: where the samples come from, to be told to people.
        fingerprint: digest of the samples.
        cuts: nodes before which all batches wait in files, so that only the weights of one piece are held.
        allow_infinity: whether a bound may be infinite, as behind a mask of -inf; NaN never is one.
        on_step: told the number of samples seen, after each batch of the last piece.

    Raises:
        InputRefused: no samples, a batch that does not fit the inputs, NaN or infinity in a tensor.
    """
    lows, highs = dict.fromkeys(tensors, np.inf), dict.fromkeys(tensors, -np.inf)
    if not len(batches):
        raise InputRefused(f"{source} gave no samples; calibration data is never invented", hint="--data SPEC")
    model, places = _watched(graph, tensors)
    with tempfile.TemporaryDirectory(prefix="memopt-") as folder:
        walk = Walk(model, batches, Path(folder))
        for stop in (*(places[cut] for cut in cuts), len(model.graph.node)):
            own = [t for t in tensors if walk.position <= walk.writer(f"{t}.{_WATCHES[0]}") < stop]
            samples = 0
            for index, values in enumerate(walk.advance(stop, [f"{t}.{watch}" for t in own for watch in _WATCHES])):
                seen = np.array(values, np.float64).reshape(-1, len(_WATCHES))  # (tensors, 3)
                _refuse_not_finite(own, seen, allow_infinity=allow_infinity)
                for tensor, (low, high, _) in zip(own, seen, strict=True):
                    lows[tensor], highs[tensor] = min(lows[tensor], low), max(highs[tensor], high)
                samples += walk.samples(index)
                if on_step is not None and stop == len(model.graph.node):
                    on_step(samples)
    return Ranges({name: (float(lows[name]), float(highs[name])) for name in tensors}, samples, source, fingerprint)


def count(
    graph: Graph, ranges: Ranges, batches: Sequence[Mapping[str, Array]], *, cuts: Sequence[int] = ()
) -> dict[str, Histogram]:
    """How often each tensor takes which value within its range: the second pass over the batches.

    Shards of one data set are counted within the ranges of the whole (`merge`), and add up (`Histogram.merged`).
    """
    found = {name: Histogram.between(*bounds) for name, bounds in ranges.bounds.items()}
    for name, value in watch_all(graph.model, batches, list(found), cuts=cuts):
        found[name].count(value)
    return found


def narrow(ranges: Ranges, histograms: Mapping[str, Histogram], recipe: Recipe, affine_of: AffineOf) -> Ranges:
    """The ranges that the recipe's calibration chooses within the bounds, for integers by `affine_of`."""
    choose = METHODS[recipe.calibration]
    bounds = {name: choose(histograms[name], ranges.bounds[name], recipe, affine_of) for name in ranges.bounds}
    return replace(ranges, bounds=bounds)


# Calibration -> the range within the bounds, from a histogram.
METHODS: dict[str, Callable[[Histogram, tuple[float, float], Recipe, AffineOf], tuple[float, float]]] = {
    "mse": lambda histogram, bounds, _, affine_of: by_mse(histogram, bounds, affine_of),
    "minmax": lambda _histogram, bounds, _, _affine_of: bounds,
    "percentile": lambda histogram, bounds, recipe, _: by_percentile(histogram, bounds, recipe.percentile),
    "entropy": lambda histogram, bounds, _, affine_of: by_entropy(histogram, bounds, affine_of),
}


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


def _watched(graph: Graph, tensors: Sequence[str]) -> tuple[onnx.ModelProto, list[int]]:
    """The model with each tensor's watches behind the node that writes it, and where its own nodes are now."""
    from onnx import helper

    model = graph.copy_model()
    nodes = list(graph.model.graph.node)
    known = {spec.name for spec in graph.inputs} | {name for node in nodes for name in node.output}
    for tensor in tensors:
        if tensor not in known:
            raise InputRefused(f"the graph has no tensor {tensor!r} to calibrate")
    wanted = set(tensors)

    def watch(names: Iterable[str]) -> None:
        for name in (name for name in names if name in wanted):
            for op in _WATCHES:
                model.graph.node.append(helper.make_node(op, [name], [f"{name}.{op}"], keepdims=0))

    del model.graph.node[:]
    watch(spec.name for spec in graph.inputs)
    places = []
    for node in nodes:
        places.append(len(model.graph.node))
        model.graph.node.append(node)
        watch(node.output)
    return model, places


def _refuse_not_finite(tensors: Sequence[str], seen: Array, *, allow_infinity: bool) -> None:
    """Raises for the first tensor, in the graph's order, whose watches are not all finite, or not all numbers."""
    broken = np.flatnonzero((np.isnan(seen) if allow_infinity else ~np.isfinite(seen)).any(axis=1))
    if len(broken):
        what = "NaN" if np.isnan(seen[broken[0]]).any() else "infinity"
        raise InputRefused(f"tensor {tensors[broken[0]]!r} holds {what} on the calibration data")


def _joined(first: str, second: str) -> str:
    return first if first == second else f"{first}+{second}"
