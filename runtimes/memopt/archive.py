"""The single-file form of a bundle: a subset of zip in which every byte is accounted for.

    local header, padding, data | … | central directory | end record

Entries are stored, never compressed, so that a reader maps them; data starts at a multiple of the entry's alignment;
dates are constant, there are no comments and no flags: equal entries give equal bytes. `unzip -l` shows it to a person.

The reader takes nothing from the file but each entry's name, size, checksum and alignment. From these it writes every
other byte anew, with the functions of the writer, and refuses the file unless it finds the very same bytes: whatever
`write_archive` would not have written is no bundle.

Layout: PKWARE APPNOTE 6.3, sections 4.3.7, 4.3.12 and 4.3.14 to 4.3.16; 4.5.3 for what is larger than 32 bits, which is
used where it is needed and nowhere else; the padding is Android zipalign's extra field.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from memopt.errors import InputRefused, IntegrityError

_LOCAL, _CENTRAL, _END = struct.Struct("<4s5H3I2H"), struct.Struct("<4s6H3I5H2I"), struct.Struct("<4s4H2IH")
_END64, _LOCATOR = struct.Struct("<4sQ2H2I4Q"), struct.Struct("<4sIQI")
_LOCAL_MAGIC, _CENTRAL_MAGIC, _END_MAGIC = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
_END64_MAGIC, _LOCATOR_MAGIC = b"PK\x06\x06", b"PK\x06\x07"
_STORED, _TIME, _DATE = 0, 0, 0x21  # 1980-01-01
_UNIX, _MODE = 3 << 8, 0o100644 << 16  # a plain file
_VERSION, _VERSION_64 = 20, 45  # of zip, that a reader needs
_WIDE_ID, _PADDING_ID = 0x0001, 0xD935  # extra fields: numbers of 64 bits; what aligns
_MARK = 2**32 - 1  # stands where a number of 32 bits is kept elsewhere in 64
_WIDE_FROM = _MARK  # the smallest number that is; tests lower it
_BLOCK_BYTES = 2**20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*){0,7}")

PAGE = 4096  # alignment of what is mapped
MIN_ALIGN = 64  # alignment of everything else
MAX_ENTRIES = 4096


@dataclass(frozen=True)
class Entry:
    """One file to write: its name, its content, and the multiple at which its data starts."""

    name: str
    data: bytes | memoryview
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
    if len(entries) > MAX_ENTRIES:
        raise InputRefused(f"the bundle would have {len(entries)} files, at most {MAX_ENTRIES} are read")
    position, directory = 0, bytearray()
    for entry in entries:
        if not is_safe_name(entry.name):
            raise InputRefused(
                f"{entry.name!r} cannot be a name in a bundle", hint="ASCII letters, digits, . _ - and /"
            )
        head = _Head(entry.name, len(entry.data), zlib.crc32(entry.data), entry.align)
        header = head.local(position)
        file.write(header)
        for block in blocks(entry.data):  # Linux stalls now and then in a single write of 100 MB
            file.write(block)
        directory += head.central(position)
        position += len(header) + head.size_bytes
    file.write(directory)
    file.write(_end(len(entries), position, len(directory)))


def blocks(data: bytes | memoryview) -> Iterator[memoryview]:
    """The data piece by piece, not copied."""
    view = memoryview(data)
    for start in range(0, len(view), _BLOCK_BYTES):
        yield view[start : start + _BLOCK_BYTES]


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


@dataclass(frozen=True)
class _Head:
    """All that is said of one entry, and the bytes that say it."""

    name: str
    size_bytes: int
    crc32: int
    align: int

    def local(self, offset: int) -> bytes:
        """The header at this offset, padded so that the data after it is aligned."""
        wide = struct.pack("<2H2Q", _WIDE_ID, 16, self.size_bytes, self.size_bytes) if self._is_wide else b""
        padding = -(offset + _LOCAL.size + len(self.name) + len(wide) + 6) % self.align
        extra = wide + struct.pack("<3H", _PADDING_ID, 2 + padding, self.align) + bytes(padding)
        version = _VERSION_64 if self._is_wide else _VERSION
        return _LOCAL.pack(_LOCAL_MAGIC, version, *self._common(), len(extra)) + self.name.encode() + extra

    def central(self, offset: int) -> bytes:
        """The entry of the central directory."""
        wide = [self.size_bytes] * 2 if self._is_wide else []
        wide += [offset] if offset >= _WIDE_FROM else []
        extra = struct.pack(f"<2H{len(wide)}Q", _WIDE_ID, 8 * len(wide), *wide) if wide else b""
        version = _VERSION_64 if wide else _VERSION
        head = (_CENTRAL_MAGIC, _UNIX | version, version, *self._common(), len(extra), 0, 0, 0, _MODE, _narrow(offset))
        return _CENTRAL.pack(*head) + self.name.encode() + extra

    @property
    def _is_wide(self) -> bool:
        return self.size_bytes >= _WIDE_FROM

    def _common(self) -> tuple[int, ...]:
        size = _narrow(self.size_bytes)
        return 0, _STORED, _TIME, _DATE, self.crc32, size, size, len(self.name)


def _narrow(number: int) -> int:
    return number if number < _WIDE_FROM else _MARK


def _end(count: int, start: int, length: int) -> bytes:
    """The end record of a directory at `start`, behind that of 64 bits where one is needed."""
    end = _END.pack(_END_MAGIC, 0, 0, count, count, _narrow(length), _narrow(start), 0)
    if start < _WIDE_FROM and length < _WIDE_FROM:
        return end
    sizes = (_END64.size - 12, _UNIX | _VERSION_64, _VERSION_64, 0, 0, count, count, length, start)
    return _END64.pack(_END64_MAGIC, *sizes) + _LOCATOR.pack(_LOCATOR_MAGIC, 0, start + length, 1) + end


def _read(data: memoryview) -> dict[str, Span]:
    count, directory = _find_directory(data)
    spans: dict[str, Span] = {}
    folded: set[str] = set()
    position, at, rebuilt = 0, directory, bytearray()  # in the entries, in the directory, and what it should be
    for _ in range(count):
        head, at = _read_head(data, at, position)
        if head.name.lower() in folded:
            raise IntegrityError(f"entry {head.name!r} stands twice")
        header = head.local(position)
        start = position + len(header)
        if data[position:start] != header:
            raise IntegrityError(f"entry {head.name!r} has another header than memopt writes")
        rebuilt += head.central(position)
        position = start + head.size_bytes
        if position > directory:
            raise IntegrityError(f"entry {head.name!r} reaches beyond the data")
        spans[head.name] = Span(start, head.size_bytes, head.crc32)
        folded.add(head.name.lower())
    rebuilt += _end(count, directory, len(rebuilt))
    if position != directory or data[directory:] != rebuilt:
        raise IntegrityError("the bundle's directory is not the one that memopt writes for its entries")
    return spans


def _find_directory(data: memoryview) -> tuple[int, int]:
    """How many entries the file says it has, and where their directory starts."""
    end = len(data) - _END.size
    if end < 0 or data[end : end + 4] != _END_MAGIC:
        raise IntegrityError("not a bundle, or its end is missing")
    *_, count, _, start, _ = _END.unpack_from(data, end)
    wide = end - _LOCATOR.size - _END64.size
    if start == _MARK and wide >= 0:
        *_, start = _END64.unpack_from(data, wide)
    if count > MAX_ENTRIES:
        raise IntegrityError(f"the bundle has {count} entries, at most {MAX_ENTRIES} are read")
    if start > end:
        raise IntegrityError("the bundle's directory is said to lie behind its end")
    return count, start


def _read_head(data: memoryview, at: int, position: int) -> tuple[_Head, int]:
    """What the directory's entry at `at` says, with the alignment in the local header at `position`; the next entry."""
    _, _, _, _, _, _, _, crc32, _, size, name_length, extra_length, *_ = _CENTRAL.unpack_from(data, at)
    extra = at + _CENTRAL.size + name_length
    name = bytes(data[extra - name_length : extra]).decode("ascii", "backslashreplace")
    if not is_safe_name(name):
        raise IntegrityError(f"entry name {name!r} is not safe")
    wide_length = 0
    if size == _MARK:
        _, _, size = struct.unpack_from("<2HQ", data, extra)
        wide_length = 20
    (align,) = struct.unpack_from("<H", data, position + _LOCAL.size + name_length + wide_length + 4)
    if align < MIN_ALIGN or align.bit_count() != 1:
        raise IntegrityError(f"entry {name!r} has the alignment {align}")
    return _Head(name, size, crc32, align), extra + extra_length
