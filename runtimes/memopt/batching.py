"""Batches: how many samples fit into a limit, and large inputs in pieces that do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from memopt.errors import OutOfResource
from memopt.manifest import VariantMemory
from memopt.session import Session
from memopt.sizes import show_size
from memopt.tensors import Array

LARGEST_BATCH = 4096


@dataclass(frozen=True)
class MemoryLine:
    """Private host memory over the batch: `fixed_bytes + batch * per_sample_bytes`.

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


def memory_line(memory: VariantMemory, *, runtime: str) -> MemoryLine:
    """The line through the points measured on `runtime` at build; without two, weights and planned activations."""
    points = sorted((p for p in memory.measured if p.runtime == runtime), key=lambda point: point.batch)
    planned = memory.activation_bytes or 0
    if len(points) < 2 or points[0].private_bytes is None or points[-1].private_bytes is None:
        return MemoryLine(memory.weights_bytes, planned, "planned: weights + activations")
    low, high = points[0], points[-1]
    slope = (points[-1].private_bytes - points[0].private_bytes) / (high.batch - low.batch)
    per_sample = round(slope) if slope > 0 else planned  # a slope within the noise says nothing
    fixed = max(points[0].private_bytes - low.batch * per_sample, 0)
    return MemoryLine(fixed, per_sample, f"measured at batch {low.batch} and {high.batch} when the bundle was built")


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
