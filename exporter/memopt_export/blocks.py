"""Block quantization of weights: real = (integer - zero_point) * scale, with a scale for each block of a row.

A weight is looked at as rows (rows, columns), its columns counting inputs. Arithmetic only, on numpy arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from memopt.tensors import Array
from memopt_export.affine import SMALLEST_SCALE

# By how much a block's range is narrowed, to be tried in turn: what few values lose at the ends, all others may gain in
# finer steps. 256 steps are fine enough already for blocks whose ends are no outliers.
_FACTORS = {4: tuple(1 - 0.03 * step for step in range(17)), 8: (1.0, 0.95, 0.9, 0.8)}
# Elements worked on at once, so that the search takes a few times 16 MiB beside the weight.
_CHUNK = 2**22


@dataclass(frozen=True, eq=False)
class Grid:
    """The steps of each block.

    Integers are unsigned, from 0 to 2**bits - 1; the last block of a row may be shorter than the others.

    Attributes:
        scale: (rows, blocks), float32 and above zero.
        zero_point: (rows, blocks), uint8: the integer that stands for 0.
        bits: of an integer, 4 or 8.
        block: columns that share a scale.
    """

    scale: Array
    zero_point: Array
    bits: int
    block: int

    @property
    def is_symmetric(self) -> bool:
        """Whether all zero points are in the middle, where signed integers have none."""
        return bool((self.zero_point == 2 ** (self.bits - 1)).all())

    def spread(self, parameter: Array, columns: int) -> Array:
        """A parameter of blocks, (rows, blocks), told for each column: (rows, columns)."""
        return np.repeat(parameter, self.block, axis=1)[:, :columns]

    def dequantize(self, integers: Array) -> Array:
        """The float32 values that these integers, (rows, columns), stand for."""
        columns = integers.shape[1]
        zero_point = self.spread(self.zero_point, columns).astype(np.float32)
        return (integers.astype(np.float32) - zero_point) * self.spread(self.scale, columns)


# How the integers follow from rows and their grid.
Rounding = Callable[[Array, Grid], Array]


def fit(rows: Array, *, bits: int, block: int, symmetric: bool | None = None) -> Grid:
    """The grid with the smallest squared error in each block.

    Args:
        rows: (rows, columns), finite.
        bits: 4 or 8.
        block: columns that share a scale; the last block may be shorter.
        symmetric: whether zero is in the middle; None takes what is closer to the rows in all, asymmetric grids only
            where they gain something.
    """
    if symmetric is not None:
        return _search(rows, bits=bits, block=block, symmetric=symmetric)[0]
    plain, plain_error = _search(rows, bits=bits, block=block, symmetric=True)
    shifted, shifted_error = _search(rows, bits=bits, block=block, symmetric=False)
    return shifted if shifted_error < plain_error else plain


def round_to_nearest(rows: Array, grid: Grid) -> Array:
    """The nearest integers, (rows, columns), uint8; ties go to the even step.

    >>> grid = Grid(np.float32([[0.5]]), np.uint8([[8]]), bits=4, block=3)
    >>> round_to_nearest(np.float32([[-1.0, 0.0, 9.0]]), grid).tolist()
    [[6, 8, 15]]
    """
    integers = np.empty(rows.shape, np.uint8)
    for part in _parts(rows):
        scale, zero_point = (grid.spread(p[part], rows.shape[1]) for p in (grid.scale, grid.zero_point))
        integers[part] = (np.rint(rows[part] / scale) + zero_point).clip(0, 2**grid.bits - 1)
    return integers


def pack4(integers: Array) -> Array:
    """4-bit integers along the last axis, two in a byte, the first one in the lower half; an odd one gets a 0 beside.

    >>> pack4(np.uint8([[1, 2, 3]])).tolist()
    [[33, 3]]
    """
    if integers.shape[-1] % 2:
        integers = np.concatenate([integers, np.zeros((*integers.shape[:-1], 1), np.uint8)], axis=-1)
    packed: Array = integers[..., 0::2] | (integers[..., 1::2] << 4)
    return packed


def _search(rows: Array, *, bits: int, block: int, symmetric: bool) -> tuple[Grid, float]:
    """The best grid and its squared error in all."""
    count = -(-rows.shape[1] // block)
    scale, zero_point = np.empty((len(rows), count), np.float32), np.empty((len(rows), count), np.uint8)
    total = 0.0
    for part in _parts(rows):
        scale[part], zero_point[part], error = _search_part(_blocked(rows[part], block), bits, symmetric=symmetric)
        total += error
    return Grid(scale, zero_point, bits, block), total


def _search_part(blocks: Array, bits: int, *, symmetric: bool) -> tuple[Array, Array, float]:
    """Scale, zero point (rows, blocks) and squared error for values (rows, blocks, block)."""
    steps = 2**bits - 1
    low, high = np.minimum(blocks.min(axis=2), 0), np.maximum(blocks.max(axis=2), 0)
    if symmetric:
        widest = np.maximum(high / (steps // 2), -low / (steps // 2 + 1))
        zero_point = np.full(low.shape, steps // 2 + 1, np.float32)
    else:
        widest = (high - low) / steps
        zero_point = np.rint(-low / np.maximum(widest, SMALLEST_SCALE)).clip(0, steps)
    best, least = np.maximum(widest, SMALLEST_SCALE), np.full(low.shape, np.inf, np.float32)
    for factor in _FACTORS[bits]:
        scale = np.maximum(widest * np.float32(factor), SMALLEST_SCALE)
        error = _error(blocks, scale[:, :, None], zero_point[:, :, None], steps)
        best = np.where(error < least, scale, best)
        least = np.minimum(error, least)
    return best, zero_point, float(least.sum(dtype=np.float64))


def _error(blocks: Array, scale: Array, zero_point: Array, steps: int) -> Array:
    """Squared error of each block."""
    nearest = np.rint(blocks / scale)
    np.clip(nearest, -zero_point, steps - zero_point, out=nearest)
    nearest *= scale
    nearest -= blocks
    error: Array = np.einsum("rbk,rbk->rb", nearest, nearest)
    return error


def _blocked(rows: Array, block: int) -> Array:
    """The rows as (rows, blocks, block); a short last block is filled up with zeros, which cost no error."""
    missing = -rows.shape[1] % block
    return np.pad(rows, ((0, 0), (0, missing))).reshape(len(rows), -1, block)


def _parts(rows: Array) -> Iterator[slice]:
    """Slices of rows, each of a bounded number of elements."""
    step = max(1, _CHUNK // max(1, rows.shape[1]))
    return (slice(start, start + step) for start in range(0, len(rows), step))
