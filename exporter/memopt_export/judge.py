"""A quantized graph held against the float one: outputs on held-out samples, size, latency, the memory bill of both."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import tee
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from memopt.accuracy import agreement, finite, kl_divergence, ratio_db, top1
from memopt.compare import save_arrays
from memopt.errors import MemoptError, first_line
from memopt.ort_runtime import NAME as ORT
from memopt.probe import Measurement, Request
from memopt.probe import measure as measure_file
from memopt.sizes import show_size
from memopt.tensors import Array
from memopt_export.calibrate import batches_for
from memopt_export.graph import Graph, label, run_batches, save_graph
from memopt_export.means import UNLIMITED, Means
from memopt_export.quantize import half

if TYPE_CHECKING:
    from memopt_export.quantize import Quantized
    from memopt_export.recipe import Recipe
    from memopt_models.data import Pictures, Samples

LEAST_SQNR_DB = 10.0
LEAST_FUSED = 0.95
_HALVES = ("fp16", "bf16")
# What two measurements of one and the same model may lie apart, read on an idle machine.
_SAME_TIME = 1.1
_SAME_MEMORY = 1.02
_SAME_MEMORY_BYTES = 256 * 2**10


@dataclass(frozen=True)
class Verdict:
    """A quantized graph held against the float one. A number is None where it cannot be had; `reasons` say why.

    Attributes:
        source: of the samples, such as "digits/validation".
        samples: how many were run.
        sqnr_db: of the first output.
        kl_divergence: of the softmax of the first output, in nats, mean over samples.
        agreement: share of samples with the same top class; for an output of integers, share of equal ones.
        top1: share of samples whose top class is the label; `float_top1` is the float graph's.
        float_bytes: size of the float graph's file; `size_bytes` is the quantized one's.
        fused: how many layers ONNX Runtime computes in integers, of how many.
        latency_ratio: median time of the quantized graph, in times of the float one's.
        measured: time and memory bill in a fresh process at `batch`; `float_measured` is the float graph's.
        batch: samples in one measured run.
        reasons: why a number is None.
        flags: what is worse than the float graph, or broken.
    """

    source: str | None
    samples: int
    sqnr_db: float | None
    kl_divergence: float | None
    agreement: float | None
    top1: float | None
    float_top1: float | None
    float_bytes: int
    size_bytes: int
    fused: tuple[int, int] | None
    latency_ratio: float | None = None
    measured: Measurement | None = None
    float_measured: Measurement | None = None
    batch: int | None = None
    reasons: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()


def judge(
    graph: Graph, quantized: Quantized, recipe: Recipe, samples: Samples | Pictures | None, means: Means = UNLIMITED
) -> Verdict:
    """The verdict without what takes a process of its own, see `measured`.

    Args:
        graph: the float graph.
        quantized: what was made of it.
        recipe: by which.
        samples: that calibrated nothing; None: there are none.
        means: how many samples run at once, and who is told.
    """
    if samples is None:
        outputs = _Outputs(reasons=("outputs are not compared: there are no samples; --data SPEC names some",))
    else:
        outputs = _compare(graph, quantized.graph, samples, means)
    with tempfile.TemporaryDirectory(prefix="memopt-judge-") as folder:
        before, after = _save(graph, Path(folder) / "float"), _save(quantized.graph, Path(folder) / "quantized")
        float_bytes, size_bytes, broken = _file_bytes(before), _file_bytes(after), _checker_says(after)
    larger = f"not smaller on disk: {show_size(float_bytes)} -> {show_size(size_bytes)}"
    return Verdict(
        source=None if samples is None else samples.source,
        samples=outputs.samples,
        sqnr_db=None if outputs.sqnr_db is None else finite(outputs.sqnr_db),
        kl_divergence=outputs.kl_divergence,
        agreement=outputs.agreement,
        top1=outputs.top1,
        float_top1=outputs.float_top1,
        float_bytes=float_bytes,
        size_bytes=size_bytes,
        fused=quantized.fused,
        reasons=outputs.reasons,
        flags=(*broken, *outputs.flags, *_unfused(quantized, recipe), *([larger] if size_bytes >= float_bytes else [])),
    )


def measured(
    verdict: Verdict, graph: Graph, quantized: Graph, recipe: Recipe, samples: Samples | Pictures | None
) -> Verdict:
    """The verdict with time and memory bill of both graphs, each in a fresh process of ONNX Runtime on this CPU."""
    if recipe.target != "cpu":
        return unmeasured(verdict, f"it is made for {recipe.target}, and would run otherwise on this CPU")
    if samples is None:
        return unmeasured(verdict, "there are no samples to run")
    batch = graph.fixed_batch or 1
    try:
        before, after = _measure(graph, samples, batch), _measure(quantized, samples, batch)
    except MemoptError as error:
        return unmeasured(verdict, error.problem)
    ratio = after.p50_ms / before.p50_ms
    flags = (*verdict.flags, *_slower(ratio, before, after), *_larger(before, after))
    return replace(verdict, latency_ratio=ratio, measured=after, float_measured=before, batch=batch, flags=flags)


def unmeasured(verdict: Verdict, why: str) -> Verdict:
    """The verdict with the reason why time and memory are not known."""
    return replace(verdict, reasons=(*verdict.reasons, f"latency and memory are not measured: {why}"))


# --- outputs


@dataclass(frozen=True)
class _Outputs:
    """How far the outputs are apart; the fields are those of a Verdict, but that the SQNR may be infinite."""

    samples: int = 0
    sqnr_db: float | None = None
    kl_divergence: float | None = None
    agreement: float | None = None
    top1: float | None = None
    float_top1: float | None = None
    reasons: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()


@dataclass
class _Tally:
    """Sums over batches, so that the outputs of no more than one batch are held."""

    samples: int = 0
    values: int = 0
    equal: int = 0
    signal: float = 0.0
    noise: float = 0.0
    numbers: bool = True  # whether all outputs were of floating point
    classes: bool = True  # whether they were (samples, classes) too
    same_class: int = 0
    right: int = 0
    float_right: int = 0
    kl: float = 0.0

    def add(self, got: Array, expected: Array, labels: Array | None, count: int) -> None:
        """Counts one batch of `count` samples; outputs have equal shapes."""
        self.samples += count
        self.values += got.size
        self.equal += int((got == expected).sum())
        self.numbers &= got.dtype.kind == "f"
        if not self.numbers:
            return
        reference = expected.astype(np.float64)
        self.signal += float((reference**2).sum())
        self.noise += float(((got.astype(np.float64) - reference) ** 2).sum())
        self.classes &= got.ndim == 2 and len(got) == count and got.shape[1] > 1
        if not self.classes:
            return
        self.same_class += round(agreement(got, expected) * count)
        self.kl += kl_divergence(got, expected) * count
        if labels is not None:
            self.right += round(top1(got, labels) * count)
            self.float_right += round(top1(expected, labels) * count)

    def outputs(self, *, labelled: bool) -> _Outputs:
        """The shares and means."""
        n, reasons, flags = self.samples, [], []
        if not self.numbers:
            same = self.equal / self.values if self.values else None
            return _Outputs(n, agreement=same, reasons=("the first output is not of floating point: no SQNR",))
        noise = ratio_db(self.signal, self.noise)
        if np.isposinf(noise):
            reasons.append("outputs are equal: no SQNR")
        if np.isneginf(noise):
            reasons.append("the float graph's outputs are all 0: no SQNR")
        if noise < LEAST_SQNR_DB:
            flags.append(f"below {LEAST_SQNR_DB:g} dB: the SQNR is {noise:.1f} dB")
        found = _Outputs(n, noise, reasons=tuple(reasons), flags=tuple(flags))
        if not self.classes:
            return found
        found = replace(found, kl_divergence=self.kl / n, agreement=self.same_class / n)
        return replace(found, top1=self.right / n, float_top1=self.float_right / n) if labelled else found


def _compare(graph: Graph, quantized: Graph, samples: Samples | Pictures, means: Means) -> _Outputs:
    """Both graphs on all samples, batch by batch; the first output counts."""
    tally, name = _Tally(), graph.outputs[0].name
    batches, labels = batches_for(graph, samples, means), samples.labels
    total = len(batches.samples)
    if not total:
        return _Outputs(reasons=(f"outputs are not compared: {samples.source} is less than one batch",))
    try:
        for got, expected in _pairs(graph, quantized, batches):
            start, stop = tally.samples, min(tally.samples + batches.size, total)
            incomparable = _incomparable(name, got, expected)
            if incomparable is not None:
                return replace(incomparable, samples=stop)
            tally.add(got, expected, None if labels is None else labels[start:stop], stop - start)
            means.tell("compare", stop, total)
    except MemoptError as error:
        return _Outputs(reasons=(f"outputs are not compared: {error.problem}",))
    return tally.outputs(labelled=labels is not None)


def _pairs(graph: Graph, quantized: Graph, batches: Iterable[Mapping[str, Array]]) -> Iterator[tuple[Array, Array]]:
    """The first output of the quantized graph and of the float one, for each batch.

    Halves are emulated: on a CPU, ONNX Runtime computes fp16 in float32, which hides overflow, and bf16 not at all.
    """
    halves = quantized.precision in _HALVES
    run = half.emulated(quantized) if halves else quantized
    first, second = tee(batches)
    dtypes = {spec.name: spec.dtype for spec in run.inputs}  # a recipe may convert them
    fed = ({name: array.astype(dtypes.get(name, array.dtype)) for name, array in feeds.items()} for feeds in second)
    runs = run_batches(graph, first), run_batches(run, fed, optimized=not halves)
    for expected, got in zip(*runs, strict=True):
        yield got[0], expected[0]


def _incomparable(name: str, got: Array, expected: Array) -> _Outputs | None:
    """Why these outputs cannot be set side by side; None when they can."""
    if got.shape != expected.shape:
        return _Outputs(reasons=(f"outputs are not compared: the shape of {name!r} follows its values",))
    if expected.dtype.kind == "f" and not np.isfinite(expected).all():
        return _Outputs(reasons=(f"outputs are not compared: {name!r} of the float graph is not finite",))
    if got.dtype.kind == "f" and not np.isfinite(got).all():
        flag = f"output {name!r} is not finite, where the float graph's is"
        return _Outputs(reasons=(f"outputs are not compared: {flag}",), flags=(flag,))
    return None


# --- the file, and how it runs


def _save(graph: Graph, folder: Path) -> Path:
    folder.mkdir()
    save_graph(graph, folder / "graph.onnx")
    return folder / "graph.onnx"


def _file_bytes(path: Path) -> int:
    """Of the graph and what lies beside it."""
    return sum(file.stat().st_size for file in path.parent.iterdir())


def _checker_says(path: Path) -> tuple[str, ...]:
    from onnx import checker

    try:
        checker.check_model(str(path))
    except checker.ValidationError as error:
        return (f"ONNX's checker refuses it: {first_line(error)}",)
    return ()


def _measure(graph: Graph, samples: Samples | Pictures, batch: int) -> Measurement:
    dtypes = {spec.name: spec.dtype for spec in graph.inputs}
    feeds = {name: array.astype(dtypes[name]) for name, array in samples.pick(slice(batch)).feeds.items()}
    with tempfile.TemporaryDirectory(prefix="memopt-judge-") as folder:
        path = _save(graph, Path(folder) / "graph")
        return measure_file(Request(str(path), ORT, "cpu", batch, save_arrays(feeds, Path(folder))))


# --- what is worse than the float graph


def _unfused(quantized: Quantized, recipe: Recipe) -> list[str]:
    """Whether ONNX Runtime leaves too many layers in float, besides those that the recipe leaves."""
    if quantized.fused is None or recipe.target != "cpu":
        return []
    operators = {label(node): node.op_type for node in quantized.graph.model.graph.node}
    asked = sum(
        recipe.excludes(name, operators.get(name, "")) or not recipe.includes(name, operators.get(name, ""))
        for name in quantized.kept_float
    )
    fused, layers = quantized.fused[0], quantized.fused[1] - asked
    return [f"only {fused} of {layers} layers fused by ONNX Runtime"] if fused < LEAST_FUSED * layers else []


def _slower(ratio: float, before: Measurement, after: Measurement) -> list[str]:
    said = f"slower than float: {ratio:.2f}x ({before.p50_ms:.3g} ms -> {after.p50_ms:.3g} ms)"
    return [said] if ratio > _SAME_TIME else []


def _larger(before: Measurement, after: Measurement) -> list[str]:
    was, now = (found.bill.phases["steady"].private_bytes for found in (before, after))
    if was is None or now is None or now <= max(was * _SAME_MEMORY, was + _SAME_MEMORY_BYTES):
        return []
    return [f"larger in private memory than float: {show_size(was)} -> {show_size(now)}"]
