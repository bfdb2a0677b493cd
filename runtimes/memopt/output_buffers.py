"""Memory for outputs that is used again once the caller has dropped them, and never before."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np

from memopt.tensors import Array, TensorSpec

POOLED_BYTES = 64 * 2**10  # smaller outputs are made anew, which costs less than keeping account of them
_KEPT = 8  # free buffers of all sizes


def can_hold(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], *, named: bool) -> bool:
    """Whether the shapes of all outputs follow from those of the inputs, and numpy has their dtypes.

    `named` says that free dimensions have the names that the graph gave them.
    """
    known = {dim for spec in inputs for dim in spec.shape if isinstance(dim, str)}
    free = {dim for spec in outputs for dim in spec.shape if isinstance(dim, str)}
    return named and free <= known and all(hasattr(np, spec.dtype) for spec in (*inputs, *outputs))


class OutputBuffers:
    """Outputs of the sizes that runs have: each array is the caller's until nothing refers to it any more.

    An array lies in a buffer that is no array. In numpy every view keeps the array alive that it was made from,
    and that array is the first over its buffer; so when it dies, no view of the buffer is left, and the buffer is free.
    """

    def __init__(self, *, largest_bytes: int | None = None) -> None:
        self._largest_bytes = largest_bytes  # what is larger is not kept; None: anything is
        self._free: deque[bytearray] = deque(maxlen=_KEPT)  # the oldest goes first

    def take(
        self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], feeds: Mapping[str, Array]
    ) -> dict[str, Array]:
        """An array for each output, by name, of the shape that it has for these inputs; filled with anything."""
        sizes = {dim: size for spec in inputs for dim, size in zip(spec.shape, feeds[spec.name].shape, strict=True)}
        shapes = ((spec, [dim if isinstance(dim, int) else sizes[dim] for dim in spec.shape]) for spec in outputs)
        return {spec.name: self._array(shape, np.dtype(spec.dtype)) for spec, shape in shapes}

    def clear(self) -> None:
        """Lets free buffers go; what callers hold stays theirs."""
        self._free.clear()

    def _array(self, shape: list[int], dtype: np.dtype[np.generic]) -> Array:
        size_bytes = dtype.itemsize
        for dim in shape:
            size_bytes *= dim
        if size_bytes < POOLED_BYTES:
            return np.empty(shape, dtype)
        buffer = self._buffer(size_bytes)
        array = np.ndarray(shape, dtype, buffer=buffer)
        if self._largest_bytes is None or size_bytes <= self._largest_bytes:
            weakref.finalize(array, self._free.append, buffer).atexit = False
        return array

    def _buffer(self, size_bytes: int) -> bytearray:
        for _ in range(len(self._free)):
            try:
                buffer = self._free.popleft()
            except IndexError:  # another thread has been faster
                break
            if len(buffer) == size_bytes:
                return buffer
            self._free.append(buffer)
        return bytearray(size_bytes)
