"""How a fuzzer changes bytes: anywhere, and where the headers of zip stand."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator

INTERESTING = (
    0, 1, 2, 22, 63, 64, 65, 0x7F, 0x80, 0xFF, 0x1000, 0x7FFF, 0x8000, 0xFFFF, 2**31, 2**32 - 1, 2**63, 2**64 - 1
)  # fmt: skip
_MAGICS = (b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06", b"PK\x06\x06")


def change_bytes(rng: random.Random, data: bytes) -> bytes:
    """The data with one change, or a few."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if changed:
            rng.choice(_CHANGES)(rng, changed)
    return bytes(changed)


def flip_bit(rng: random.Random, data: bytearray) -> None:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def set_byte(rng: random.Random, data: bytearray) -> None:
    data[rng.randrange(len(data))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))


def set_number(rng: random.Random, data: bytearray) -> None:
    form = rng.choice(("<H", "<I", "<Q"))
    size = struct.calcsize(form)
    if len(data) >= size:
        number = rng.choice((*INTERESTING, len(data), rng.randrange(2**16))) % 2 ** (8 * size)
        struct.pack_into(form, data, rng.randrange(len(data) - size + 1), number)


def set_header_field(rng: random.Random, data: bytearray) -> None:
    """A number somewhere in the first bytes behind a signature of zip's."""
    places = [i for magic in _MAGICS for i in _all(data, magic)]
    if places:
        at = rng.choice(places) + rng.randrange(4, 60)
        form = rng.choice(("<B", "<H", "<I", "<Q"))
        size = struct.calcsize(form)
        if at + size <= len(data):
            struct.pack_into(form, data, at, rng.choice((*INTERESTING, len(data))) % 2 ** (8 * size))


def cut(rng: random.Random, data: bytearray) -> None:
    del data[rng.randrange(len(data)) :]


def remove(rng: random.Random, data: bytearray) -> None:
    start = rng.randrange(len(data))
    del data[start : start + rng.randrange(1, 200)]


def insert(rng: random.Random, data: bytearray) -> None:
    at = rng.randrange(len(data) + 1)
    data[at:at] = rng.choice((rng.randbytes(rng.randrange(1, 80)), bytes(rng.randrange(1, 80)), data[-22:], data[:64]))


def copy(rng: random.Random, data: bytearray) -> None:
    start, length, at = rng.randrange(len(data)), rng.randrange(1, 200), rng.randrange(len(data))
    data[at : at + length] = data[start : start + length]


def _all(data: bytes | bytearray, what: bytes) -> Iterator[int]:
    at = data.find(what)
    while at >= 0:
        yield at
        at = data.find(what, at + 1)


_CHANGES: tuple[Callable[[random.Random, bytearray], None], ...] = (
    flip_bit, flip_bit, set_byte, set_number, set_header_field, set_header_field, cut, remove, insert, copy
)  # fmt: skip
