"""Rows of an array that stays where it is, such as a mapped file divided into three splits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from memopt.tensors import Array


@dataclass(frozen=True, eq=False)
class Selection:
    """Some rows of an array, copied only when they are asked for by index.

    >>> few = Selection(np.arange(10) * 2, np.array([1, 4, 9]))
    >>> few.shape, few[1:], few.pick(slice(0, 2))[:]
    ((3,), array([ 8, 18]), array([2, 8]))
    """

    array: Array
    rows: Array  # int64 (n,)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Array | slice) -> Array:
        return self.array[self.rows[index]]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return np.asarray(self[:], dtype)

    def pick(self, rows: Array | slice) -> Selection:
        """Rows of these rows; the array stays where it is."""
        return Selection(self.array, self.rows[rows])

    @property
    def dtype(self) -> np.dtype[Any]:
        """That of the array."""
        return self.array.dtype

    @property
    def ndim(self) -> int:
        """As many as the array has."""
        return self.array.ndim

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the array these rows would make."""
        return (len(self.rows), *self.array.shape[1:])
