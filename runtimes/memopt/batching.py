"""Batches: how many samples fit into a limit, and large inputs in pieces that do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from memopt.errors import OutOfResource
from memopt.manifest import Variant
from memopt.session import Session
from memopt.sizes import show_size
from memopt.tensors import Array

LARGEST_BATCH = 4096


@dataclass(frozen=True)
class MemoryLine:
    """Memory over the batch: `fixed_bytes + batch * per_sample_bytes`.

    The peak is linear in the batch within a fraction of a percent for the libraries measured, so two measured batches
    give the whole line.
    """

    fixed_bytes: int
    per_sample_bytes: int
    method: str

    def at(self, batch: int) -> int:
        """Bytes at this batch."""
        return self.fixed_bytes + batch * self.per_sample_bytes


@dataclass(frozen=True)
class BatchFit:
    """The largest batch within a limit, and the curve it was read from."""

    batch: int
    limit_bytes: int
    need_bytes: int
    curve: tuple[tuple[int, int], ...]  # (batch, bytes) for powers of two
    method: str


def memory_line(variant: Variant, *, runtime: str, device: str) -> MemoryLine:
    """What the variant needs over the batch: host memory for a graph on the CPU, device memory on a GPU.

    1. An engine: TensorRT's own figures, weights and the activations of each profile at its largest batch.
    2. A graph measured at two batches on this runtime and device when the bundle was built: the line through both.
    3. Any other graph: weights and planned activations.
    """
    memory, planned = variant.memory, variant.memory.activation_bytes or 0
    if variant.engine is not None:  # 1
        profiles = [(p.batches[1], memory.weights_bytes + (p.activation_bytes or 0)) for p in variant.engine.profiles]
        return _line(profiles, planned=0, method="TensorRT's plan: weights + activations of the profiles")
    measured = [
        (point.batch, point.private_bytes)
        for point in memory.measured
        if (point.runtime, point.device) == (runtime, device) and point.private_bytes is not None
    ]
    if len(measured) > 1:  # 2
        return _line(measured, planned=planned, method="private memory, measured when the bundle was built")
    return MemoryLine(memory.weights_bytes, planned, "planned: weights + activations")  # 3


def _line(points: Sequence[tuple[int, int]], *, planned: int, method: str) -> MemoryLine:
    """The line through the smallest and the largest batch; a slope within the noise becomes the planned one."""
    (low, at_low), (high, at_high) = min(points), max(points)
    slope = (at_high - at_low) / (high - low) if high > low else 0
    per_sample = round(slope) if slope > 0 else planned
    return MemoryLine(max(at_low - low * per_sample, 0), per_sample, method)


def largest_batch(line: MemoryLine, limit_bytes: int, *, most: int = LARGEST_BATCH) -> BatchFit:
    """The largest batch, up to `most`, whose memory stays within the limit.

    Raises:
        OutOfResource: not even batch 1 fits.

    >>> largest_batch(MemoryLine(1000, 100, "by hand"), 1550).batch
    5
    """
    if line.at(1) > limit_bytes:
        raise OutOfResource(f"needs {show_size(line.at(1))} at batch 1, the limit is {show_size(limit_bytes)}")
    room = limit_bytes - line.fixed_bytes
    batch = min(most, room // line.per_sample_bytes) if line.per_sample_bytes else most
    curve = tuple((1 << i, line.at(1 << i)) for i in range(max(batch, 1).bit_length()))
    return BatchFit(batch, limit_bytes, line.at(batch), curve, line.method)


def run_in_batches(session: Session, feeds: Mapping[str, Array], *, batch: int) -> list[Array]:
    """The outputs for `feeds`, computed at most `batch` samples at a time; equal to one run over all of them."""
    samples = max((len(array) for array in feeds.values() if array.ndim), default=0)
    if samples <= batch:
        return session.run(feeds)
    pieces = [
        session.run({name: array[start : start + batch] for name, array in feeds.items()})
        for start in range(0, samples, batch)
    ]
    return [np.concatenate(outputs) for outputs in zip(*pieces, strict=True)]
