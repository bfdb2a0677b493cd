"""A walk over the bytes of an ONNX file before any library parses them: that it is whole, how much it holds, how deep.

The message types are read off ONNX's own descriptors. The walk keeps its own stack, so nesting costs it nothing, and
it stops at the first limit passed.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from memopt.errors import InputRefused

MAX_SUBGRAPHS = 16  # one inside the other
MAX_MESSAGES = 3 * MAX_SUBGRAPHS + 16  # one inside the other: three for each subgraph, and room for types
MAX_FIELDS = 2_000_000  # each costs a file two bytes, and its parser up to a hundred
MAX_COUNTS = {"NodeProto": (200_000, "nodes"), "FunctionProto": (1_000, "functions")}

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED_BYTES = {_FIXED64: 8, _FIXED32: 4}
_LONGEST_VARINT = 10
# Text that is no name: stack traces of exporters and licences have line breaks.
_FREE_TEXT = frozenset({"doc_string", "key", "value"})
# What could steer a terminal, or turn its text around.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True)
class _Text:
    """A field that holds text; a name has no control characters."""

    name: str

    def check(self, data: bytes) -> None:
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            raise InputRefused(f"{self.name} {data[:80]!r} is not UTF-8") from error
        if self.name not in _FREE_TEXT and _CONTROL.search(text):
            raise InputRefused(f"{self.name} {text[:80]!r} has control characters")


@dataclass(frozen=True)
class _Message:
    """A message type, and what its length-delimited fields hold, by number."""

    name: str
    fields: dict[int, _Message | _Text] = field(default_factory=dict)


def walk(data: bytes) -> None:
    """Raises InputRefused, saying what and where, unless `data` is a whole ONNX model within the limits above."""
    message, position, end, depth = _model_type(), 0, len(data), 0
    outer: list[tuple[_Message, int, int]] = []  # the messages around this one: type, end, subgraphs around
    counts: Counter[str] = Counter()
    while position < end or outer:
        if position >= end:
            message, end, depth = outer.pop()
            continue
        counts["fields"] += 1
        tag, position = _varint(data, position, end)
        kind = tag & 7
        if kind == _VARINT:
            position = _varint(data, position, end)[1]
            continue
        start, position = _extent(data, position, end, kind)
        inner = message.fields.get(tag >> 3) if kind == _BYTES else None
        if isinstance(inner, _Text):
            inner.check(data[start:position])
        elif inner is not None:
            outer.append((message, end, depth))
            depth += inner.name == "GraphProto"
            counts[inner.name] += 1
            _check_limits(inner, counts, depth, len(outer))
            message, position, end = inner, start, position
        if counts["fields"] > MAX_FIELDS:
            raise InputRefused(f"it has more than {MAX_FIELDS:,} fields")


def _extent(data: bytes, position: int, end: int, kind: int) -> tuple[int, int]:
    """Where the content of a field begins and ends."""
    if kind == _BYTES:
        size, position = _varint(data, position, end)
    elif kind in _FIXED_BYTES:
        size = _FIXED_BYTES[kind]
    else:
        raise InputRefused(f"byte {position - 1} is no ONNX")
    if position + size > end:
        raise InputRefused(f"it is cut: byte {position} announces {size} bytes, {end - position} are left")
    return position, position + size


def _varint(data: bytes, position: int, end: int) -> tuple[int, int]:
    """A number of up to 64 bits, seven to a byte, and where the next field begins."""
    value = shift = 0
    for at in range(position, min(position + _LONGEST_VARINT, end)):
        byte = data[at]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at + 1
        shift += 7
    raise InputRefused(
        f"it is cut at byte {end}" if end - position < _LONGEST_VARINT else f"byte {position} is no ONNX"
    )


def _check_limits(message: _Message, counts: Counter[str], subgraphs: int, messages: int) -> None:
    if subgraphs > MAX_SUBGRAPHS + 1:  # the main graph is none
        raise InputRefused(f"its subgraphs are nested deeper than {MAX_SUBGRAPHS}")
    if messages > MAX_MESSAGES:
        raise InputRefused(f"its {message.name}s are nested too deep")
    limit, what = MAX_COUNTS.get(message.name, (MAX_FIELDS, "fields"))
    if counts[message.name] > limit:
        raise InputRefused(f"it has more than {limit:,} {what}")


@cache
def _model_type() -> _Message:
    import onnx

    known: dict[str, _Message] = {}

    def read(descriptor: Any) -> _Message:
        if descriptor.full_name not in known:
            known[descriptor.full_name] = message = _Message(descriptor.name)
            for number, part in descriptor.fields_by_number.items():
                if part.message_type is not None:
                    message.fields[number] = read(part.message_type)
                elif part.type == part.TYPE_STRING:
                    message.fields[number] = _Text(part.name)
        return known[descriptor.full_name]

    return read(onnx.ModelProto.DESCRIPTOR)
