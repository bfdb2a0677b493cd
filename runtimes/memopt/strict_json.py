"""Frozen values to JSON and back, strictly: nothing guessed, nothing unknown, nothing twice."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from pathlib import PurePath
from typing import Any, TypeVar

from memopt.errors import IntegrityError

T = TypeVar("T")


def to_json(value: Any) -> str:
    """Deterministic JSON of a dataclass; fields that are None are left out."""
    return json.dumps(to_plain(value), indent=1, sort_keys=True, allow_nan=False)


def to_plain(value: Any) -> Any:
    """The value as dicts, lists and scalars; None fields of dataclasses are left out, paths are text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {name: to_plain(item) for name, item in fields.items() if item is not None}
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return str(value) if isinstance(value, PurePath) else value


def from_json(cls: type[T], data: bytes, *, where: str) -> T:
    """A dataclass read strictly from JSON bytes; `where` names the place in error messages."""
    return from_plain(cls, _load_strictly(data, where), where=where)


def from_plain(cls: type[T], value: Any, *, where: str) -> T:
    """A value of type `cls` (a dataclass, tuple, dict, optional or scalar) from plain JSON values, nothing guessed.

    >>> from_plain(tuple[int | str, ...], ["batch", 10], where="shape")
    ('batch', 10)
    """
    return typing.cast(T, _read(cls, value, where))


def nearest_field(problem: str, *kinds: type) -> str | None:
    """For a problem of `from_plain` with an unknown field, a hint at the field of these dataclasses most like it.

    >>> from memopt.tensors import TensorSpec
    >>> nearest_field("input: unknown field 'shap'", TensorSpec)
    "did you mean 'shape'?"
    """
    import difflib

    if "unknown field" not in problem:
        return None
    word = problem.rpartition("unknown field ")[2].strip("'\"")
    known = sorted({field.name for kind in kinds for field in dataclasses.fields(kind)})
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else None


def refuse_duplicates(what: str, names: list[str]) -> None:
    """Raises IntegrityError when a name stands twice."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise IntegrityError(f"{what} {name!r} stands twice")
        seen.add(name)


def _read(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, value, where)
    if origin in (typing.Union, types.UnionType):
        return _read_union(arguments, value, where)
    if origin is tuple:
        items = _expect(list, value, where)
        kinds = arguments[:1] * len(items) if arguments[-1] is Ellipsis else arguments
        if len(items) != len(kinds):
            raise IntegrityError(f"{where}: expected {len(kinds)} values, got {len(items)}")
        return tuple(
            _read(each, item, f"{where}[{i}]") for i, (each, item) in enumerate(zip(kinds, items, strict=True))
        )
    if origin is dict:
        entries = _expect(dict, value, where)
        return {key: _read(arguments[1], item, f"{where}.{key}") for key, item in entries.items()}
    if kind is Any:
        return value
    if kind is float and type(value) is int:
        return float(value)
    return _expect(kind, value, where)


def _read_dataclass(kind: Any, value: Any, where: str) -> Any:
    entries = _expect(dict, value, where)
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(entries) - set(hints))
    if unknown:
        raise IntegrityError(f"{where}: unknown field {unknown[0]!r}")
    for field_ in dataclasses.fields(kind):
        required = field_.default is dataclasses.MISSING and field_.default_factory is dataclasses.MISSING
        if required and field_.name not in entries and type(None) not in typing.get_args(hints[field_.name]):
            raise IntegrityError(f"{where}: field {field_.name!r} is missing")
    values = {name: _read(hints[name], item, f"{where}.{name}") for name, item in entries.items()}
    optional = {f.name: None for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING
                and f.default_factory is dataclasses.MISSING and f.name not in values}  # fmt: skip
    return kind(**values, **optional)


def _read_union(arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in arguments:
        return None
    kinds = [kind for kind in arguments if kind is not type(None)]
    for kind in kinds:
        if kind is type(value) or (len(kinds) == 1):
            return _read(kind, value, where)
    raise IntegrityError(f"{where}: {value!r} is none of {', '.join(kind.__name__ for kind in kinds)}")


def _expect(kind: Any, value: Any, where: str) -> Any:
    if type(value) is not kind:
        raise IntegrityError(f"{where}: expected {kind.__name__}, got {type(value).__name__}")
    return value


def _load_strictly(data: bytes, where: str) -> Any:
    """JSON without duplicate keys, NaN, infinities, halves of characters or absurd depth."""

    def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        refuse_duplicates(f"{where}: key", [key for key, _ in pairs])
        return dict(pairs)

    def no_constant(name: str) -> Any:
        raise IntegrityError(f"{where}: {name} is not a number in JSON")

    def finite(text: str) -> float:
        number = float(text)
        return number if abs(number) != float("inf") else no_constant(text)

    if max(data.count(b"["), data.count(b"{")) > 100_000:
        raise IntegrityError(f"{where}: too many nested values")
    try:
        value = json.loads(data.decode(), object_pairs_hook=unique_keys, parse_constant=no_constant, parse_float=finite)
        json.dumps(value, ensure_ascii=False).encode()  # refuses one half of a surrogate pair
        return value
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{where} is not valid JSON: {error}") from error
