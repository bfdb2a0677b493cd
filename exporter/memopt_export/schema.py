"""The JSON Schema of the manifest (draft 2020-12), generated from the types that read it.

It is published as `memopt/memopt.schema.json`, for editors and for readers that are not ours. It says all that one
value can say of itself; that paths are among the files, or that ids are unique, is checked by `memopt.manifest` alone.

    python -m memopt_export.schema > runtimes/memopt/memopt.schema.json
"""

from __future__ import annotations

import dataclasses
import json
import sys
import types
import typing
from typing import Any

from memopt.manifest import FORMAT, SCHEMA, File, Manifest, Profile
from memopt.tensors import DTYPE_BITS, TensorSpec

# What `__post_init__` asks of a field beyond its type.
_SHAPES = {
    "minProperties": 1,
    "additionalProperties": {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}},
}
_MAJOR = SCHEMA.partition(".")[0]
RULES: dict[tuple[type, str], dict[str, Any]] = {
    (Manifest, "format"): {"const": FORMAT},
    (Manifest, "schema"): {"pattern": rf"^{_MAJOR}(\.|$)"},
    (File, "sha256"): {"pattern": "^[0-9a-f]{64}$"},
    (File, "size_bytes"): {"minimum": 0},
    **{(Profile, name): _SHAPES for name in ("min", "opt", "max")},
    (TensorSpec, "dtype"): {"enum": list(DTYPE_BITS)},
    (TensorSpec, "shape"): {"items": {"type": ["integer", "string"], "minimum": 0}},
}
_SCALARS = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}


def schema() -> str:
    """The schema as text, deterministic."""
    definitions: dict[str, Any] = {}
    top = _of(Manifest, definitions)
    document = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"Manifest of a memopt bundle, schema {SCHEMA}",
        **top,
        "$defs": dict(sorted(definitions.items())),
    }
    return json.dumps(document, indent=1) + "\n"


def _of(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of a type; the dataclasses that it holds go into `definitions`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if kind.__name__ not in definitions:
            definitions[kind.__name__] = {}  # stands while its fields are read
            definitions[kind.__name__] = _of_dataclass(kind, definitions)
        return {"$ref": f"#/$defs/{kind.__name__}"}
    if origin in (typing.Union, types.UnionType):
        return _of_union([_of(each, definitions) for each in arguments])
    if origin is tuple:
        if arguments[-1] is not Ellipsis:
            raise TypeError(f"{kind} has a fixed length, which no field of the manifest has needed so far")
        return {"type": "array", "items": _of(arguments[0], definitions)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _of(arguments[1], definitions)}
    return {} if kind is Any else {"type": _SCALARS[kind]}


def _of_union(schemas: list[dict[str, Any]]) -> dict[str, Any]:
    if all(set(each) == {"type"} for each in schemas):
        return {"type": [each["type"] for each in schemas]}
    return {"anyOf": schemas}


def _of_dataclass(kind: type, definitions: dict[str, Any]) -> dict[str, Any]:
    hints, properties, required = typing.get_type_hints(kind), {}, []
    for field in dataclasses.fields(kind):
        properties[field.name] = _of(hints[field.name], definitions) | RULES.get((kind, field.name), {})
        has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if not has_default and type(None) not in typing.get_args(hints[field.name]):
            required.append(field.name)
    described = (kind.__doc__ or "").partition("\n")[0]
    return {
        "description": described,
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


if __name__ == "__main__":
    sys.stdout.write(schema())
