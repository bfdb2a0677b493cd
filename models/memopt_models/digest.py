"""The identity of arrays: equal digests, equal values."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import numpy as np

from memopt.tensors import Array
from memopt_models.selection import Selection

_BLOCK = 1024  # rows


def digest_arrays(arrays: Mapping[str, Array | Selection]) -> str:
    """sha256 over names, dtypes, shapes and bytes, names in order, as 64 hex digits; never is a whole array copied.

    >>> digest_arrays({"a": np.zeros(2), "b": np.ones(3)}) == digest_arrays({"b": np.ones(3), "a": np.zeros(2)})
    True
    """
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.name} {array.shape}\n".encode())
        for block in _blocks(array):
            digest.update(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _blocks(array: Array | Selection) -> Iterator[Array]:
    if isinstance(array, Selection) or (array.ndim and not array.flags.c_contiguous):
        yield from (array[start : start + _BLOCK] for start in range(0, len(array), _BLOCK))
    else:
        yield array
