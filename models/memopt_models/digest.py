"""The identity of arrays: equal digests, equal values."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np

from memopt.tensors import Array


def digest_arrays(arrays: Mapping[str, Array]) -> str:
    """sha256 over names, dtypes, shapes and bytes, names in order, as 64 hex digits; a mapped file is not copied.

    >>> digest_arrays({"a": np.zeros(2), "b": np.ones(3)}) == digest_arrays({"b": np.ones(3), "a": np.zeros(2)})
    True
    """
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.name} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
