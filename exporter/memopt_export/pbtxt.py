"""Protobuf's text format, as far as configurations need it: written from plain values, and read back.

https://protobuf.dev/reference/protobuf/textformat-spec/. A message is a dict; read back, each field is a list of its
values. A word that is no string, such as an enum's value or a number, is a `Word`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from memopt.errors import InputRefused

MAX_BYTES = 2**20
_MAX_DEPTH = 32
_TOKEN = re.compile(
    r"""(?P<blank>(?:\s|\#[^\n]*)+)|(?P<string>"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')|(?P<word>[-+\w.]+)|(?P<mark>[{}<>\[\]:,;])"""
)
_CLOSED_BY = {"{": "}", "<": ">"}


class Word(str):
    """A value without quotes: `TYPE_FP32`, `true`, `8`."""

    __slots__ = ()


def write(message: Mapping[str, Any], *, indent: str = "") -> str:
    """The message as text.

    >>> print(write({"name": "tiny", "kind": Word("TYPE_FP32"), "input": [{"dims": [1, -1]}]}), end="")
    name: "tiny"
    kind: TYPE_FP32
    input {
      dims: 1
      dims: -1
    }
    """
    return "".join(
        _write_field(name, each, indent)
        for name, value in message.items()
        for each in (value if isinstance(value, (list, tuple)) else (value,))
    )


def read(text: str) -> dict[str, list[Any]]:
    """The message in a text; InputRefused with the place where it is none. Of escapes, those of quotes are undone.

    >>> read("name: 'tiny' input [{ dims: [1, -1] }, { dims: 2 }]")
    {'name': ['tiny'], 'input': [{'dims': ['1', '-1']}, {'dims': ['2']}]}
    """
    tokens = list(_tokens(text))
    message, position = _read_message(tokens, 0, "", 0)
    if position < len(tokens):
        raise InputRefused(f"{tokens[position]!r} stands where no field can")
    return message


def _write_field(name: str, value: Any, indent: str) -> str:
    if isinstance(value, Mapping):
        return f"{indent}{name} {{\n{write(value, indent=indent + '  ')}{indent}}}\n"
    quoted = isinstance(value, str) and not isinstance(value, Word)
    return f"{indent}{name}: {json.dumps(value, ensure_ascii=False) if quoted else value}\n"


def _tokens(text: str) -> Iterator[str]:
    position = 0
    while position < len(text):
        found = _TOKEN.match(text, position)
        if found is None:
            raise InputRefused(f"line {text.count(chr(10), 0, position) + 1} is no text of protobuf")
        position = found.end()
        if found.lastgroup != "blank":
            yield found.group()


def _read_message(tokens: Sequence[str], position: int, end: str, depth: int) -> tuple[dict[str, list[Any]], int]:
    """The fields up to `end`, and the position behind it."""
    if depth > _MAX_DEPTH:
        raise InputRefused(f"messages are nested deeper than {_MAX_DEPTH}")
    message: dict[str, list[Any]] = {}
    while position < len(tokens) and tokens[position] != end:
        name = tokens[position]
        if not re.fullmatch(r"\w+", name):
            raise InputRefused(f"{name!r} stands where a field's name has to")
        position += 1
        if _at(tokens, position) == ":":
            position += 1
        values, position = _read_values(tokens, position, depth)
        message.setdefault(name, []).extend(values)
        if _at(tokens, position) in (",", ";"):
            position += 1
    if end and _at(tokens, position) != end:
        raise InputRefused(f"it is cut: {end!r} is missing")
    return message, position + bool(end)


def _read_values(tokens: Sequence[str], position: int, depth: int) -> tuple[list[Any], int]:
    """One value, or those of a list."""
    if _at(tokens, position) != "[":
        value, position = _read_value(tokens, position, depth)
        return [value], position
    values, position = [], position + 1
    while _at(tokens, position) != "]":
        value, position = _read_value(tokens, position, depth)
        values.append(value)
        if _at(tokens, position) == ",":
            position += 1
    return values, position + 1


def _read_value(tokens: Sequence[str], position: int, depth: int) -> tuple[Any, int]:
    token = _at(tokens, position)
    if token in _CLOSED_BY:
        return _read_message(tokens, position + 1, _CLOSED_BY[token], depth + 1)
    if token[:1] not in ("'", '"'):
        if not token or not re.fullmatch(r"[-+\w.]+", token):
            raise InputRefused(f"{token!r} stands where a value has to" if token else "it is cut")
        return Word(token), position + 1
    text = ""
    while _at(tokens, position)[:1] in ("'", '"') and _at(tokens, position):
        text += re.sub(r"\\([\\'\"])", r"\1", tokens[position][1:-1])
        position += 1
    return text, position


def _at(tokens: Sequence[str], position: int) -> str:
    """The token there, "" behind the last."""
    return tokens[position] if position < len(tokens) else ""
