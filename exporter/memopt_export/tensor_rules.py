"""What a tensor stored in an ONNX file has to be: a known dtype, as many bytes as its dims say, at a place inside the
model's folder, and numbers that compute.
"""

from __future__ import annotations

import math
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

import numpy as np

from memopt.errors import InputRefused
from memopt.tensors import Array

if TYPE_CHECKING:
    import onnx

MAX_RANK = 64
MAX_BYTES = 2**63 - 1

# ONNX's dtype -> bits of one element, and the field that holds elements one by one.
_STORED = {
    "FLOAT": (32, "float_data"), "DOUBLE": (64, "double_data"), "COMPLEX64": (64, "float_data"),
    "COMPLEX128": (128, "double_data"), "INT64": (64, "int64_data"), "UINT64": (64, "uint64_data"),
    "UINT32": (32, "uint64_data"), "INT32": (32, "int32_data"), "STRING": (8, "string_data"),
    **dict.fromkeys(("FLOAT16", "BFLOAT16", "INT16", "UINT16"), (16, "int32_data")),
    **dict.fromkeys(("BOOL", "INT8", "UINT8", "FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ",
                     "FLOAT8E8M0"), (8, "int32_data")),
    **dict.fromkeys(("INT4", "UINT4", "FLOAT4E2M1"), (4, "int32_data")),
    **dict.fromkeys(("INT2", "UINT2"), (2, "int32_data")),
}  # fmt: skip
_PLAIN_NAMES = {"float": "float32", "double": "float64"}
_FIELDS = ("raw_data", *sorted({name for _, name in _STORED.values()}))
_FLOATS: dict[str, np.dtype[Any]] = {
    "FLOAT": np.dtype("<f4"),
    "DOUBLE": np.dtype("<f8"),
    "FLOAT16": np.dtype("<f2"),
    "BFLOAT16": np.dtype("<u2"),
}
_CHUNK = 2**20  # elements looked at together
_EXTERNAL_KEYS = frozenset({"location", "offset", "length", "checksum"})
_NUMBER = re.compile(r"[0-9]{1,18}")
_MEMORY_MARKER = "_ORT_MEM_ADDR_"  # ONNX Runtime reads what follows as an address in its own memory


@dataclass(frozen=True)
class Place:
    """Where an external tensor lies."""

    file: Path
    offset: int
    size_bytes: int

    def read(self) -> bytes:
        """The bytes there."""
        with self.file.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size_bytes)


def dtype_name(number: int) -> str:
    """ONNX's name of a dtype.

    Raises:
        InputRefused: not one of those that memopt knows.
    """
    import onnx

    names: dict[int, str] = {value: name for name, value in onnx.TensorProto.DataType.items()}
    name = names.get(number, "")
    if name not in _STORED:
        raise InputRefused(f"dtype {name or number} is not known", hint="one of " + ", ".join(_STORED))
    return name


def plain_name(number: int) -> str:
    """The name of ONNX's dtype number that memopt uses everywhere.

    >>> plain_name(1), plain_name(3)
    ('float32', 'int8')
    """
    name = dtype_name(number).lower()
    return _PLAIN_NAMES.get(name, name)


def size_bytes(data_type: int, dims: Iterable[int]) -> int:
    """Bytes of a tensor of ONNX's dtype number, packed."""
    return (math.prod(dims) * _STORED[dtype_name(data_type)][0] + 7) // 8


def is_external(tensor: onnx.TensorProto) -> bool:
    """Whether the tensor's bytes lie in another file."""
    from onnx import TensorProto

    return tensor.data_location == TensorProto.EXTERNAL


def check_tensor(tensor: onnx.TensorProto, folder: Path) -> Place | None:
    """Where an external tensor lies; None where the file itself holds it.

    Raises:
        InputRefused: dtype, dims, stored values or place are not what they have to be.
    """
    dtype = dtype_name(tensor.data_type)
    if len(tensor.dims) > MAX_RANK:
        raise InputRefused(f"{len(tensor.dims)} dims are more than {MAX_RANK}")
    dims = tuple(tensor.dims)
    if min(dims, default=0) < 0 or size_bytes(tensor.data_type, dims) > MAX_BYTES:
        raise InputRefused(f"dims {dims} are no shape")
    if tensor.HasField("segment"):
        raise InputRefused("it is stored in segments")
    if is_external(tensor):
        if dtype == "STRING":
            raise InputRefused("strings cannot be external")
        return _place(tensor, folder)
    _check_stored(tensor, dtype, dims)
    return None


def check_overlaps(places: Iterable[tuple[str, Place]]) -> None:
    """Raises InputRefused where two tensors share some of their bytes; those that share all are tied."""
    ordered = sorted((place.file, place.offset, place.size_bytes, name) for name, place in places if place.size_bytes)
    for (file, start, size, name), (other_file, other_start, other_size, other) in pairwise(ordered):
        tied = (start, size) == (other_start, other_size)
        if file == other_file and not tied and other_start < start + size:
            raise InputRefused(f"tensors {name!r} and {other!r} overlap in {file.name!r}")


def floats(tensor: onnx.TensorProto, place: Place | None) -> Iterator[Array]:
    """The tensor's values in pieces, as floats that numpy knows; nothing for integers."""
    dtype = dtype_name(tensor.data_type)
    if dtype not in _FLOATS:
        return
    values = _stored_floats(tensor, dtype, place)
    for start in range(0, len(values), _CHUNK):
        piece = values[start : start + _CHUNK]
        yield (piece.astype(np.uint32) << 16).view(np.float32) if dtype == "BFLOAT16" else piece


def load(tensor: onnx.TensorProto, place: Place) -> None:
    """Puts the external bytes into the tensor, as onnx.load does. In place."""
    from onnx import TensorProto

    tensor.raw_data = place.read()
    tensor.data_location = TensorProto.DEFAULT
    del tensor.external_data[:]


def _check_stored(tensor: onnx.TensorProto, dtype: str, dims: tuple[int, ...]) -> None:
    bits, own = _STORED[dtype]
    have = {name: len(getattr(tensor, name)) for name in _FIELDS if len(getattr(tensor, name))}
    elements = math.prod(dims)
    wanted = {own: elements * 2 if "COMPLEX" in dtype else (elements * bits + 7) // 8 if bits < 8 else elements}
    if dtype != "STRING" and (tensor.HasField("raw_data") or not have):
        wanted = {"raw_data": size_bytes(tensor.data_type, dims)}
    if have != {name: count for name, count in wanted.items() if count}:
        got = ", ".join(f"{count} in {name}" for name, count in have.items()) or "nothing"
        ((name, count),) = wanted.items()
        raise InputRefused(f"{dtype.lower()} {dims} takes {count} in {name}, the file has {got}")


def _place(tensor: onnx.TensorProto, folder: Path) -> Place:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if len(entries) < len(tensor.external_data) or not entries.keys() <= _EXTERNAL_KEYS or "location" not in entries:
        raise InputRefused(f"its external data is described by {[entry.key for entry in tensor.external_data]}")
    file = _inside(folder, entries["location"])
    for key in ("offset", "length"):
        if not _NUMBER.fullmatch(entries.get(key, "0")):
            raise InputRefused(f"its external {key} is {entries[key][:80]!r}")
    offset, size = int(entries.get("offset", "0")), size_bytes(tensor.data_type, tensor.dims)
    there = file.stat().st_size
    length = int(entries.get("length", str(max(there - offset, 0))))
    if length != size:
        raise InputRefused(f"dims {tuple(tensor.dims)} take {size} bytes, its external data has {length}")
    if offset + length > there:
        raise InputRefused(f"its external data ends at byte {offset + length}, {file.name!r} has {there} bytes")
    return Place(file, offset, length)


def _inside(folder: Path, location: str) -> Path:
    """The plain file at a location, reached without a link and without leaving the folder; hard links are plain."""
    shown, parts = location[:80], PurePosixPath(location).parts
    if _MEMORY_MARKER in location:
        raise InputRefused(f"its external data is an address in memory, {shown!r}")
    absolute = location.startswith("/") or PureWindowsPath(location).drive or "://" in location
    if not parts or not location.isprintable() or "\\" in location or absolute:
        raise InputRefused(f"its external data is at {shown!r}, which is no relative path")
    if ".." in parts:
        raise InputRefused(f"its external data is at {shown!r}, outside the model's folder")
    path = folder
    for part in parts:
        path = path / part
        mode = _mode(path, shown)
        if stat.S_ISLNK(mode):
            raise InputRefused(f"its external data is at {shown!r}, through a link", hint="copy the file to its place")
    if not stat.S_ISREG(mode):
        raise InputRefused(f"its external data is at {shown!r}, which is no file")
    return path


def _mode(path: Path, shown: str) -> int:
    try:
        return path.lstat().st_mode
    except OSError as error:
        raise InputRefused(f"its external data is at {shown!r}: {error.strerror}") from error


def _stored_floats(tensor: onnx.TensorProto, dtype: str, place: Place | None) -> Array:
    kind = _FLOATS[dtype]
    if place is not None:
        count = place.size_bytes // kind.itemsize
        return np.memmap(place.file, kind, "r", place.offset, (count,)) if count else np.empty(0, kind)
    if tensor.HasField("raw_data"):
        return np.frombuffer(tensor.raw_data, kind)
    one_by_one = getattr(tensor, _STORED[dtype][1])
    if dtype in ("FLOAT16", "BFLOAT16"):
        return np.asarray(one_by_one, np.int64).astype(np.uint16).view(kind)
    return np.asarray(one_by_one, kind)
