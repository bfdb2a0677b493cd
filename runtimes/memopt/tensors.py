"""What goes into a model and what comes out: name, dtype, shape, and the check of an array against them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memopt.errors import InputRefused

Array = NDArray[Any]

# Bits of one element, by the dtype names that ONNX, TensorRT and numpy share.
DTYPE_BITS = {
    "float64": 64, "float32": 32, "float16": 16, "bfloat16": 16, "float8e4m3fn": 8, "float8e5m2": 8,
    "int64": 64, "int32": 32, "int16": 16, "int8": 8, "int4": 4, "int2": 2,
    "uint64": 64, "uint32": 32, "uint16": 16, "uint8": 8, "uint4": 4, "uint2": 2,
    "bool": 8,
}  # fmt: skip


def nbytes(dtype: str, elements: int) -> int:
    """Bytes that `elements` values of `dtype` take, packed.

    >>> nbytes("float32", 10), nbytes("int4", 3)
    (40, 2)
    """
    return (DTYPE_BITS[dtype] * elements + 7) // 8


@dataclass(frozen=True)
class TensorSpec:
    """One input or output. A dimension is a number, or a name where it is free: `("batch", 1, 28, 28)`."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BITS:
            raise InputRefused(f"tensor {self.name!r} has dtype {self.dtype!r}", hint="one of " + ", ".join(DTYPE_BITS))
        for dim in self.shape:
            if isinstance(dim, int) and dim < 0:
                raise InputRefused(f"tensor {self.name!r} has a negative dimension in {self.shape}")

    @property
    def is_fixed(self) -> bool:
        """Whether no dimension is free."""
        return all(isinstance(dim, int) for dim in self.shape)

    def at_batch(self, batch: int) -> tuple[int, ...]:
        """The shape with every free dimension set to `batch`."""
        return tuple(dim if isinstance(dim, int) else batch for dim in self.shape)

    def nbytes(self, batch: int) -> int:
        """Bytes of the tensor at this batch."""
        return nbytes(self.dtype, int(np.prod(self.at_batch(batch), dtype=np.int64)))

    def check(self, array: Array) -> None:
        """Raises InputRefused, naming expected and got, unless dtype, rank and fixed dimensions agree."""
        if isinstance(array, np.ndarray) and array.dtype is self._numpy_dtype and self._has_shape(array.shape):
            return  # a microsecond in every run
        if not isinstance(array, np.ndarray):
            raise InputRefused(
                f"input {self.name!r} expects an array, got {type(array).__name__}", hint="np.asarray(x)"
            )
        if array.dtype.name != self.dtype:
            raise InputRefused(f"input {self.name!r} expects {self.dtype}, got {array.dtype.name}",
                               hint=f"x.astype({self.dtype!r})")  # fmt: skip
        if not array.dtype.isnative:
            raise InputRefused(
                f"input {self.name!r} has the other byte order, {array.dtype.str}", hint="x.astype(x.dtype.name)"
            )
        if not self._has_shape(array.shape):
            raise InputRefused(
                f"input {self.name!r} expects shape {show_shape(self.shape)}, got {show_shape(array.shape)}"
            )

    @cached_property
    def _numpy_dtype(self) -> np.dtype[Any] | None:
        """The dtype's own object in numpy, in this machine's byte order; None where it has none."""
        return np.dtype(self.dtype) if hasattr(np, self.dtype) else None

    def _has_shape(self, shape: tuple[int, ...]) -> bool:
        """Whether rank and fixed dimensions agree."""
        if len(shape) != len(self.shape):
            return False
        for want, got in zip(self.shape, shape, strict=True):  # noqa: SIM110  # a generator takes three times as long
            if want != got and not isinstance(want, str):
                return False
        return True


def show_shape(shape: Sequence[int | str]) -> str:
    """The shape as text.

    >>> show_shape(("batch", 1, 28, 28))
    '(batch, 1, 28, 28)'
    """
    return "(" + ", ".join(str(dim) for dim in shape) + ("," if len(shape) == 1 else "") + ")"


def check_feeds(specs: Sequence[TensorSpec], feeds: Mapping[str, Array]) -> None:
    """Raises InputRefused unless `feeds` has exactly the arrays that `specs` ask for."""
    if len(feeds) != len(specs) or any(spec.name not in feeds for spec in specs):
        raise InputRefused(f"inputs are {sorted(feeds)}, the model expects {[spec.name for spec in specs]}")
    for spec in specs:
        spec.check(feeds[spec.name])
