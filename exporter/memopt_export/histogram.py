"""Histograms of a tensor's values, and the range that each calibration method reads out of one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from memopt.errors import InputRefused
from memopt.tensors import Array
from memopt_export.affine import Affine

BINS = 8192  # 32 for each of 256 levels, so that a bin's middle stands for its values
_CHUNK = 2**18  # values counted together
_SMALLEST_STEP = float(np.finfo(np.float32).tiny)  # its inverse is still a float32
# Rounding errs at random and averages out behind a layer; clipping always errs towards zero and adds up. Squares of
# clipping errors weigh this much more. Between 4 and 256 it makes little difference; at 1, the plain mean of squares,
# networks whose last layers are sparse lose 5 dB.
_CLIPPING = 16
_SHRINKING = np.linspace(1.0, 0.2, 81)  # what part of a bound is tried

AffineOf = Callable[[float, float], Affine]


@dataclass(frozen=True, eq=False)
class Histogram:
    """How often values fall near the multiples of `step`: bin i counts those nearest to (i - zero) * step.

    Zero is the middle of a bin, so that the zeros behind a ReLU are counted as what they are.
    """

    step: float
    zero: int
    counts: Array = field(repr=False)  # int64 (BINS,)

    @classmethod
    def between(cls, low: float, high: float) -> Histogram:
        """An empty one over [low, high], widened to hold zero."""
        low, high = min(low, 0.0), max(high, 0.0)
        step = max((high - low) / (BINS - 2), _SMALLEST_STEP) if high > low else 1.0
        return cls(step, math.ceil(-low / step), np.zeros(BINS, np.int64))

    def count(self, values: Array) -> None:
        """Counts values, those beyond the ends at the ends. In place."""
        flat = values.reshape(-1)
        for start in range(0, flat.size, _CHUNK):
            bins = np.rint(flat[start : start + _CHUNK] * np.float32(1 / self.step)).astype(np.int64) + self.zero
            self.counts[:] += np.bincount(bins.clip(0, BINS - 1), minlength=BINS)

    def merged(self, other: Histogram) -> Histogram:
        """The counts of both: what one histogram of all values would hold.

        Raises:
            InputRefused: they have different bins.
        """
        if (self.step, self.zero) != (other.step, other.zero):
            raise InputRefused("histograms with different bins cannot be merged", hint="count both within one range")
        return replace(self, counts=self.counts + other.counts)

    def occupied(self) -> tuple[Array, Array]:
        """The middles of the bins that hold something, float64, and their counts."""
        (bins,) = np.nonzero(self.counts)
        return (bins - self.zero) * self.step, self.counts[bins]


def by_percentile(histogram: Histogram, bounds: tuple[float, float], percentile: float) -> tuple[float, float]:
    """The bounds of the middle `percentile` of all values."""
    middles, counts = histogram.occupied()
    shares = np.cumsum(counts) / counts.sum()
    tail = (1 - percentile / 100) / 2
    low = middles[np.searchsorted(shares, tail, side="right").clip(max=len(middles) - 1)]
    high = middles[np.searchsorted(shares, 1 - tail).clip(max=len(middles) - 1)]
    return max(float(low), bounds[0]), min(float(high), bounds[1])


def by_mse(histogram: Histogram, bounds: tuple[float, float], affine_of: AffineOf) -> tuple[float, float]:
    """The bounds within which quantizing and dequantizing errs least, in the mean of squares, clipping weighted."""
    middles, counts = histogram.occupied()

    def error(low: float, high: float) -> float:
        affine = affine_of(low, high)
        squares = (affine.dequantize(affine.quantize(middles)) - middles) ** 2
        return float(counts @ np.where((middles < low) | (middles > high), _CLIPPING * squares, squares))

    return _best(bounds, error)


def by_entropy(histogram: Histogram, bounds: tuple[float, float], affine_of: AffineOf) -> tuple[float, float]:
    """The bounds that lose the least information: the smallest Kullback-Leibler divergence between the values, those
    beyond counted at the ends, and the levels' counts spread evenly over the values that they stand for.

    After S. Migacz, 8-bit inference with TensorRT, GTC 2017; here for any affine, with bins of the same width.
    """
    middles, counts = histogram.occupied()
    keep = middles != 0  # zeros are exact at any scale, and would outweigh all else
    middles, counts = middles[keep], counts[keep].astype(np.float64)

    def divergence(low: float, high: float) -> float:
        inside = (middles >= low) & (middles <= high)
        if not inside.any():
            return math.inf
        affine = affine_of(low, high)
        levels = affine.quantize(middles[inside]).astype(np.int64)
        levels -= levels.min()
        within = counts[inside]
        spread = (np.bincount(levels, within) / np.maximum(np.bincount(levels), 1))[levels]
        clipped = within.copy()
        below, above = counts[middles < low].sum(), counts[middles > high].sum()
        clipped[0] += below
        clipped[-1] += above
        p, q = clipped / clipped.sum(), spread / spread.sum()
        return float((p * np.log(p / q)).sum())

    return _best(bounds, divergence) if len(middles) else bounds


def _best(bounds: tuple[float, float], cost: Callable[[float, float], float]) -> tuple[float, float]:
    """The bounds of the lowest cost: both shrunk together first, then each alone."""
    low, high = bounds
    found = min((cost(low * part, high * part), -part, (low * part, high * part)) for part in _SHRINKING)
    if low < 0 < high:
        for candidates in (_lows, _highs):
            found = min(found, *((cost(*each), found[1], each) for each in candidates(found[2], bounds)))
    return found[2]


def _lows(best: tuple[float, float], bounds: tuple[float, float]) -> Iterator[tuple[float, float]]:
    return ((bounds[0] * float(part), best[1]) for part in _SHRINKING)


def _highs(best: tuple[float, float], bounds: tuple[float, float]) -> Iterator[tuple[float, float]]:
    return ((best[0], bounds[1] * float(part)) for part in _SHRINKING)
