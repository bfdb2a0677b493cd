"""The single-file form of a bundle: a subset of zip in which every byte is accounted for.

Entries are stored, never compressed, so that a reader maps them; data starts at a multiple of the entry's alignment;
dates are constant, there are no comments and no flags: equal entries give equal bytes. `unzip -l` shows it to a person.

    local header, padding, data | … | central directory | end record

The reader walks the file from the first byte to the last and refuses everything that it would not have written itself.
Layout: PKWARE APPNOTE 6.3, sections 4.3.7, 4.3.12 and 4.3.16; the padding is Android zipalign's extra field.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO

from memopt.errors import InputRefused, IntegrityError

_LOCAL, _CENTRAL, _END = struct.Struct("<4s5H3I2H"), struct.Struct("<4s6H3I5H2I"), struct.Struct("<4s4H2IH")
_LOCAL_MAGIC, _CENTRAL_MAGIC, _END_MAGIC = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
_VERSION, _DATE, _PADDING_ID = 20, 0x21, 0xD935  # zip 2.0; 1980-01-01
_MADE_BY, _MODE = 3 << 8 | _VERSION, 0o100644 << 16  # Unix, a plain file
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*){0,7}")

PAGE = 4096  # alignment of what is mapped
MIN_ALIGN = 64  # alignment of everything else
MAX_ENTRIES = 4096
MAX_BYTES = 2**32 - 1  # the subset has no zip64


@dataclass(frozen=True)
class Entry:
    """One file to write: its name, its content, and the multiple at which its data starts."""

    name: str
    data: bytes
    align: int = MIN_ALIGN


@dataclass(frozen=True)
class Span:
    """Where an entry's data stands in the archive."""

    offset: int
    size_bytes: int
    crc32: int


def is_safe_name(name: str) -> bool:
    """Whether an entry may have this name: ASCII letters, digits, dot, dash, underscore; relative; nothing hidden.

    >>> is_safe_name("variants/dense-int8/graph.onnx"), is_safe_name("../x"), is_safe_name("/x"), is_safe_name("a//b")
    (True, False, False, False)
    """
    return len(name) <= 200 and _NAME.fullmatch(name) is not None


def write_archive(file: BinaryIO, entries: Sequence[Entry]) -> None:
    """Writes the entries in the given order to `file`, which must be empty."""
    directory = bytearray()
    for entry in entries:
        if not is_safe_name(entry.name):
            raise InputRefused(
                f"{entry.name!r} cannot be a name in a bundle", hint="ASCII letters, digits, . _ - and /"
            )
        directory += _write_entry(file, entry)
    start = file.tell()
    if start + len(directory) > MAX_BYTES:
        raise InputRefused(f"the bundle would have {start + len(directory)} bytes, at most {MAX_BYTES} can be written")
    file.write(directory)
    file.write(_END.pack(_END_MAGIC, 0, 0, len(entries), len(entries), len(directory), start, 0))


def read_archive(data: memoryview) -> dict[str, Span]:
    """Where each entry's data stands, by name.

    Raises:
        IntegrityError: anything that `write_archive` would not have written: cut, prefixed, appended, compressed,
            encrypted, overlapping, duplicated, disagreeing headers, unsafe names.
    """
    try:
        return _read(data)
    except struct.error as error:
        raise IntegrityError(f"the bundle is cut or damaged: {error}") from error


def _write_entry(file: BinaryIO, entry: Entry) -> bytes:
    """Writes header and data; returns the entry of the central directory."""
    offset, name = file.tell(), entry.name.encode()
    unpadded = offset + _LOCAL.size + len(name) + 6
    padding = struct.pack("<3H", _PADDING_ID, 2 + -unpadded % entry.align, entry.align) + bytes(-unpadded % entry.align)
    size = len(entry.data)
    head = (0, 0, 0, _DATE, zlib.crc32(entry.data), size, size, len(name))
    file.write(_LOCAL.pack(_LOCAL_MAGIC, _VERSION, *head, len(padding)) + name + padding)
    file.write(entry.data)
    return _CENTRAL.pack(_CENTRAL_MAGIC, _MADE_BY, _VERSION, *head, 0, 0, 0, 0, _MODE, offset) + name


def _read(data: memoryview) -> dict[str, Span]:
    end = len(data) - _END.size
    if end < 0 or data[end : end + 4] != _END_MAGIC:
        raise IntegrityError("not a bundle, or its end is missing")
    _, disk, start_disk, count_here, count, length, position, comment = _END.unpack_from(data, end)
    if (disk, start_disk, comment) != (0, 0, 0) or count_here != count or position + length != end:
        raise IntegrityError("the bundle's end record does not fit the file")
    if count > MAX_ENTRIES:
        raise IntegrityError(f"the bundle has {count} entries, at most {MAX_ENTRIES} are read")
    directory, spans, folded, expected = position, {}, set(), 0
    for _ in range(count):
        name, head, offset, position = _read_central(data, position, end)
        if name.lower() in folded:
            raise IntegrityError(f"entry {name!r} stands twice")
        if offset != expected:
            raise IntegrityError(f"entry {name!r} does not start where the one before ends")
        span = _read_local(data, offset, name, head)
        expected = span.offset + span.size_bytes
        if expected > directory:
            raise IntegrityError(f"entry {name!r} reaches beyond the data")
        spans[name] = span
        folded.add(name.lower())
    if position != end or expected != directory:
        raise IntegrityError("the bundle holds bytes that belong to no entry")
    return spans


def _read_central(data: memoryview, position: int, end: int) -> tuple[str, tuple[int, ...], int, int]:
    magic, made_by, version, *head, extra, comment, disk, internal, mode, offset = _CENTRAL.unpack_from(data, position)
    stop = position + _CENTRAL.size + head[-1]
    name = _name(data[position + _CENTRAL.size : min(stop, end)])
    constant = (magic, made_by, version, extra, comment, disk, internal, mode)
    if constant != (_CENTRAL_MAGIC, _MADE_BY, _VERSION, 0, 0, 0, 0, _MODE) or stop > end:
        raise IntegrityError(f"the directory's entry {name!r} is not one of ours")
    flags, method, time, date, _, packed, size, _ = head
    if (flags, method, time, date) != (0, 0, 0, _DATE) or packed != size:
        raise IntegrityError(f"entry {name!r} is compressed, encrypted or otherwise not stored as it is")
    return name, tuple(head), offset, stop


def _read_local(data: memoryview, offset: int, name: str, head: tuple[int, ...]) -> Span:
    magic, version, *local, extra = _LOCAL.unpack_from(data, offset)
    names_end = offset + _LOCAL.size + head[-1]
    if magic != _LOCAL_MAGIC or version != _VERSION or tuple(local) != head:
        raise IntegrityError(f"entry {name!r}: header and directory disagree")
    if bytes(data[offset + _LOCAL.size : names_end]) != name.encode():
        raise IntegrityError(f"entry {name!r}: header and directory disagree")
    padding = bytes(data[names_end : names_end + extra])
    kind, length, align = struct.unpack_from("<3H", padding)
    start = names_end + extra
    minimal = align >= MIN_ALIGN and align.bit_count() == 1 and extra - 6 == -(names_end + 6) % align
    if kind != _PADDING_ID or length != extra - 4 or not minimal or any(padding[6:]):
        raise IntegrityError(f"entry {name!r} carries padding that is not ours")
    return Span(start, head[-2], head[4])


def _name(raw: memoryview) -> str:
    name = bytes(raw).decode("ascii", "backslashreplace")
    if not is_safe_name(name):
        raise IntegrityError(f"entry name {name!r} is not safe")
    return name
