"""Batches: how many samples fit into a limit, and large inputs in pieces that do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from memopt.errors import InputRefused, OutOfResource
from memopt.manifest import EngineInfo, Variant, planned_at
from memopt.session import Session
from memopt.sizes import show_size
from memopt.tensors import Array, TensorSpec, check_feeds

LARGEST_BATCH = 4096


@dataclass(frozen=True)
class MemoryCurve:
    """Memory over the batch: straight between its points, unknown beyond the last.

    Nothing is extrapolated: allocators grow in steps, and a line through small batches falls short at large ones.
    """

    points: tuple[tuple[int, int], ...]  # (batch, bytes), in order of the batch
    method: str

    def at(self, batch: int) -> int:
        """Bytes at this batch; the first point's below it."""
        batches, sizes = zip(*self.points, strict=True)
        return math.ceil(float(np.interp(batch, batches, sizes)))

    @property
    def fixed_bytes(self) -> int:
        """What is there without any sample: the line through the first two points, at batch 0; never negative."""
        if len(self.points) < 2:
            return 0
        (first, least), (second, more) = self.points[:2]
        return max(0, round(least - (more - least) * first / (second - first))) if second > first else 0

    @property
    def last_batch(self) -> int:
        """The largest batch that the curve knows of."""
        return self.points[-1][0]


@dataclass(frozen=True)
class BatchFit:
    """The largest batch within a limit, and the curve it was read from."""

    batch: int
    limit_bytes: int
    need_bytes: int
    curve: tuple[tuple[int, int], ...]  # (batch, bytes) for powers of two
    method: str


def memory_curve(variant: Variant, *, runtime: str, device: str) -> MemoryCurve | None:
    """What the variant needs over the batch: host memory for a graph on the CPU, device memory on a GPU.

    1. An engine: TensorRT's own figures. A profile takes its whole activation memory from its smallest batch on.
    2. A graph measured on this runtime and device when the bundle was built: the measured points.
    3. Any other graph: weights and planned activations, which are linear in the batch.

    None when the numbers that this takes are not known.
    """
    memory = variant.memory
    if variant.engine is not None:  # 1
        return engine_curve(variant.engine, memory.weights_bytes)
    measured = tuple(
        (point.batch, point.private_bytes)
        for point in sorted(memory.measured, key=lambda point: point.batch)
        if (point.runtime, point.device) == (runtime, device) and point.private_bytes is not None
    )
    if measured:  # 2
        return MemoryCurve(measured, "private memory, measured when the bundle was built")
    if memory.weights_bytes is None or not memory.plan:
        return None
    batches = sorted({1, LARGEST_BATCH, *(point.batch for point in memory.plan)})
    planned = tuple((batch, memory.weights_bytes + (planned_at(memory.plan, batch) or 0)) for batch in batches)
    return MemoryCurve(planned, "planned: weights + activations")  # 3


def largest_batch(curve: MemoryCurve, limit_bytes: int) -> BatchFit:
    """The largest batch that the curve knows of and whose memory stays within the limit.

    Raises:
        OutOfResource: not even batch 1 fits.

    >>> largest_batch(MemoryCurve(((1, 1100), (9, 1900)), "by hand"), 1550).batch
    5
    """
    if curve.at(1) > limit_bytes:
        raise OutOfResource(f"needs {show_size(curve.at(1))} at batch 1, the limit is {show_size(limit_bytes)}")
    batch = max(batch for batch in range(1, curve.last_batch + 1) if curve.at(batch) <= limit_bytes)
    powers = [1 << i for i in range(batch.bit_length())]
    return BatchFit(batch, limit_bytes, curve.at(batch), tuple((b, curve.at(b)) for b in powers), curve.method)


def engine_curve(engine: EngineInfo, weights_bytes: int | None) -> MemoryCurve | None:
    """What an engine needs over the batch, by TensorRT's own figures; None where some are not known."""
    points: list[tuple[int, int]] = []
    for profile in sorted(engine.profiles, key=lambda profile: profile.batches):
        if weights_bytes is None or profile.activation_bytes is None:
            return None
        points += [(batch, weights_bytes + profile.activation_bytes) for batch in profile.batches]
    return MemoryCurve(tuple(points), "TensorRT's plan: weights + activations of the profile") if points else None


def run_in_batches(session: Session, feeds: Mapping[str, Array], *, batch: int) -> list[Array]:
    """The outputs for `feeds`, computed at most `batch` samples at a time; equal to one run over all of them.

    Only a model whose inputs and outputs share one free first dimension can be split. Inputs whose first dimension is
    fixed are no samples, and go whole into every run.

    Raises:
        InputRefused: more samples than `batch`, and the model cannot be split.
    """
    samples = count_samples(session.inputs, feeds)
    if samples <= batch:
        return session.run(feeds)
    check_feeds(session.inputs, feeds)
    split = {spec.name for spec in session.inputs if _first(spec) is not None}
    batched = [spec for spec in session.inputs if spec.name in split]
    if len({_first(spec) for spec in (*batched, *session.outputs)}) > 1:
        raise InputRefused(f"{samples} samples at once, {batch} fit, and the model's outputs cannot be put together")
    pieces = [
        session.run({name: array[start : start + batch] if name in split else array for name, array in feeds.items()})
        for start in range(0, samples, batch)
    ]
    return [np.concatenate(outputs) for outputs in zip(*pieces, strict=True)]


def count_samples(inputs: Sequence[TensorSpec], feeds: Mapping[str, Array]) -> int:
    """How many samples the largest input has whose first dimension is free; 0 where that cannot be told."""
    counts = (len(feeds[spec.name]) for spec in inputs if _first(spec) and np.ndim(feeds.get(spec.name, 0)))
    return max(counts, default=0)


def _first(spec: TensorSpec) -> str | None:
    """The name of the tensor's first dimension where it is free."""
    return spec.shape[0] if spec.shape and isinstance(spec.shape[0], str) else None
