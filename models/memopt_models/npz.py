"""A data set in one .npz file: arrays stored in it are mapped, compressed ones are unpacked into the store."""

from __future__ import annotations

import math
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from memopt.artifact import map_file
from memopt.errors import InputRefused, first_line
from memopt.npy import read_npy
from memopt.tensors import Array, TensorSpec, show_shape
from memopt_models.dataset import DataSet, Split, make_data, split_by_class
from memopt_models.selection import Selection
from memopt_models.store import Content, Store, describe_files

INPUTS = ("images", "input")  # what the array of samples may be called
_BLOCK_BYTES = 2**20
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip entry: signature, then lengths of name and extra field
_MOST_CLASSES = 2**16
_UNREADABLE = (OSError, ValueError, EOFError, struct.error, zlib.error, zipfile.BadZipFile, NotImplementedError)


def read_npz(path: Path, store: Store) -> DataSet:
    """The samples in the file, divided 60/20/20 class by class.

    Args:
        path: an archive as `numpy.savez` or `numpy.savez_compressed` writes it. "images", or "input", is either uint8
            pictures, (n, height, width) or (n, height, width, 1 or 3), or float32 (n, channels, height, width), which
            the network gets as they are. "labels" are integers (n,) from 0 on; "classes" may name them.
        store: where compressed samples go.

    Raises:
        InputRefused: no such file, another kind of file, arrays of other kinds, or too few samples.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            arrays = {name.removesuffix(".npy"): _Member.find(archive, name) for name in archive.namelist()}
            found = next((name for name in INPUTS if name in arrays), None)
            if found is None or "labels" not in arrays:
                shown = ", ".join(sorted(arrays)[:5]) or "nothing"
                raise InputRefused(f"{path} holds {shown}", hint="numpy.savez(FILE, images=..., labels=...)")
            _check_inputs(path, found, arrays[found])
            labels = _read_labels(path, archive, arrays)
            classes = _read_classes(path, archive, arrays, labels)
            images = _read_inputs(path, archive, arrays[found], store)
    except _UNREADABLE as error:
        raise InputRefused(f"{path} cannot be read as .npz: {first_line(error)}") from error
    parts = split_by_class(labels)
    if not all(len(rows) for rows in parts):
        raise InputRefused(f"{path} has {len(labels)} samples, too few to divide into train, validation and test")
    return make_data(path.name, [Split(Selection(images, rows), labels[rows]) for rows in parts], classes)


def is_data_set(path: Path, inputs: Sequence[TensorSpec]) -> bool:
    """Whether the file holds samples with labels, in another form than what a model with these inputs takes."""
    try:
        with zipfile.ZipFile(path) as archive:
            held = {name.removesuffix(".npy"): name for name in archive.namelist()}
            found = next((name for name in INPUTS if name in held), None)
            if found is None or "labels" not in held:
                return False
            dtype = _Member.find(archive, held[found]).dtype.name
    except _UNREADABLE:
        return False  # whoever reads it says why
    return (found, dtype) not in [(tensor.name, tensor.dtype) for tensor in inputs]


@dataclass(frozen=True)
class _Member:
    """One array in the archive, as its own header describes it."""

    info: zipfile.ZipInfo
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    by_columns: bool
    header_bytes: int

    @classmethod
    def find(cls, archive: zipfile.ZipFile, name: str) -> _Member:
        """Raises ValueError for what is no array of plain values, or has another size than its header says."""
        info = archive.getinfo(name)
        with archive.open(info) as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, by_columns, dtype = read(file)
            member = cls(info, shape, dtype, by_columns, file.tell())
        if dtype.hasobject:
            raise ValueError(f"{name} holds Python objects")
        if info.file_size != member.header_bytes + math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} has {info.file_size} bytes, its header {show_shape(shape)} speaks of others")
        return member

    def read(self, archive: zipfile.ZipFile) -> Array:
        """The whole array; for small ones."""
        with archive.open(self.info) as file:
            return np.lib.format.read_array(file, allow_pickle=False)


def _check_inputs(path: Path, name: str, member: _Member) -> None:
    """Raises InputRefused for what no network here is trained on."""
    kind = f"{path} has {name} {member.dtype} {show_shape(member.shape)}"
    pictures = member.dtype == np.uint8 and (len(member.shape) == 3 or member.shape[3:] in ((1,), (3,)))
    if not pictures and not (member.dtype == np.float32 and len(member.shape) == 4):
        raise InputRefused(kind, hint="uint8 (n, h, w[, 1 or 3]), or float32 (n, channels, h, w)")
    if member.by_columns:
        raise InputRefused(f"{kind} stored by columns", hint="numpy.ascontiguousarray(images)")


def _read_labels(path: Path, archive: zipfile.ZipFile, arrays: dict[str, _Member]) -> Array:
    member, count = arrays["labels"], next(arrays[name].shape[0] for name in INPUTS if name in arrays)
    if member.shape != (count,) or member.dtype.kind not in "iu":
        raise InputRefused(
            f"{path} has labels {member.dtype} {show_shape(member.shape)} for {count} samples",
            hint="integers, (samples,)",
        )
    return member.read(archive).astype(np.int64)


def _read_classes(path: Path, archive: zipfile.ZipFile, arrays: dict[str, _Member], labels: Array) -> tuple[str, ...]:
    """The names in the file, or else the labels themselves."""
    if "classes" not in arrays:
        count = int(labels.max(initial=0)) + 1
        if count > _MOST_CLASSES:
            raise InputRefused(f"{path} has a label {count - 1}", hint="labels count from 0")
        return tuple(map(str, range(count)))
    member = arrays["classes"]
    if len(member.shape) != 1 or member.dtype.kind != "U":
        kind = f"{member.dtype} {show_shape(member.shape)}"
        raise InputRefused(f"{path} has classes {kind}", hint='numpy.array(["cat", "dog"])')
    return tuple(map(str, member.read(archive)))


def _read_inputs(path: Path, archive: zipfile.ZipFile, member: _Member, store: Store) -> Array:
    """The samples, mapped from the file itself or from the store; pictures have an axis for their channels."""
    if member.info.compress_type == zipfile.ZIP_STORED:
        images = _map(path, archive, member)
    else:
        made_from = {"npz": describe_files([path.resolve()]), "member": member.info.filename}
        shape, dtype = member.shape, member.dtype.name
        images = store.get(made_from, lambda: Content(shape, _blocks(archive, member), dtype))
    return images[..., None] if images.ndim == 3 else images


def _map(path: Path, archive: zipfile.ZipFile, member: _Member) -> Array:
    """A view of the file: its entry begins with a header of its own, whose extra field the directory does not tell."""
    data = map_file(path)
    at = member.info.header_offset
    signature, name_bytes, extra_bytes = _LOCAL_HEADER.unpack_from(data, at)
    start = at + 30 + name_bytes + extra_bytes
    if signature != b"PK\3\4" or start + member.info.file_size > len(data):
        raise ValueError(f"{member.info.filename} lies outside the file")
    for _ in _blocks(archive, member):  # reads it to its end, where its checksum is compared
        pass
    return read_npy(data[start : start + member.info.file_size])


def _blocks(archive: zipfile.ZipFile, member: _Member) -> Iterator[Array]:
    """The values after the header, some at a time; BadZipFile at the end where the checksum is another one."""
    with archive.open(member.info) as file:
        file.read(member.header_bytes)
        while block := _read_exactly(file, _BLOCK_BYTES):
            yield np.frombuffer(block, member.dtype)


def _read_exactly(file: IO[bytes], size_bytes: int) -> bytes:
    """So many bytes, or what is left."""
    parts = []
    while size_bytes and (part := file.read(size_bytes)):
        parts.append(part)
        size_bytes -= len(part)
    return b"".join(parts)
