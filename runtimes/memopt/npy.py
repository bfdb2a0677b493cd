"""Arrays from the bytes of .npy files: views; on the word of a header nothing is allocated, evaluated or unpickled."""

from __future__ import annotations

import math
import re
import struct
from typing import Any, Literal

import numpy as np

from memopt.errors import first_line
from memopt.tensors import Array

_MAX_HEADER_BYTES = 2**16
_BYTE = np.dtype(np.uint8)
_NPY_MAGIC = b"\x93NUMPY"
# The header that numpy writes for an array without fields: version 1 has two bytes for its length, version 2 four.
_NPY_HEADER = re.compile(
    r"\{'descr': '([<>|=]?\w{1,9})', 'fortran_order': (True|False), 'shape': \(([\d, ]{0,99})\),? *\}\s*", re.ASCII
)


def read_npy(data: bytes | memoryview) -> Array:
    """A view of the bytes as the array that the header describes; `numpy.load` would first allocate what it claims.

    Raises:
        ValueError: it is no .npy file, is cut, or holds Python objects.
        struct.error: it is cut within its header.
    """
    version = bytes(data[6:8])
    if data[:6] != _NPY_MAGIC or version not in (b"\1\0", b"\2\0"):
        raise ValueError("its first bytes are not those of a .npy file")
    start = 10 if version == b"\1\0" else 12
    (length,) = struct.unpack_from("<H" if start == 10 else "<I", data, 8)
    text = bytes(data[start : start + min(length, _MAX_HEADER_BYTES)]).decode("latin-1")
    header = _NPY_HEADER.fullmatch(text)
    if header is None:
        raise ValueError("its header is not that of an array of numbers")
    shape = tuple(int(size) for size in re.findall(r"\d+", header[3]))
    try:
        dtype = np.dtype(header[1])
    except TypeError as error:
        raise ValueError(first_line(error)) from error
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    return view(data, shape, start + length, dtype=dtype, order="F" if header[2] == "True" else "C")


def view(
    data: bytes | memoryview,
    shape: tuple[int, ...],
    offset: int,
    *,
    dtype: np.dtype[Any] = _BYTE,
    order: Literal["C", "F"] = "C",
) -> Array:
    """The bytes from `offset` on as an array, not copied."""
    size_bytes = math.prod(shape) * dtype.itemsize
    if size_bytes > len(data) - offset:
        raise ValueError(f"it has {len(data)} bytes, its header speaks of {size_bytes} for the pixels alone")
    return np.ndarray(shape, dtype, data, offset, order=order)
