"""A bundle's graphs as a model package of ONNX Runtime, which chooses a variant by execution provider and device.

    PACKAGE/manifest.json
    PACKAGE/NAME/component.json, LICENSE
    PACKAGE/NAME/VARIANT/model.onnx and weights.data

https://github.com/microsoft/onnxruntime/blob/main/model_package/README.md. Of several variants for one provider, ONNX
Runtime takes the first; labels and preprocessing travel as metadata, which it does not read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memopt.archive import is_safe_name
from memopt.errors import InputRefused, IntegrityError
from memopt.files import write_folder
from memopt.strict_json import from_json, from_plain, to_plain
from memopt_export.external_weights import split
from memopt_export.pack import WEIGHTS, Contents, OnnxPart, Written

MANIFEST = "manifest.json"
COMPONENT = "component.json"
MODEL = "model.onnx"
SCHEMA = "1.0"
MAX_JSON_BYTES = 2**20
# Where a portable graph runs: the end of the variant's name, provider, device.
_PROVIDERS = (("", "CPUExecutionProvider", "cpu"), ("-cuda", "CUDAExecutionProvider", "gpu"))


@dataclass(frozen=True)
class OrtVariant:
    """One folder of files for one execution provider."""

    variant_directory: str | None = None
    ep: str | None = None
    device: str | None = None
    compatibility_string: str | None = None
    executor_info: dict[str, Any] = field(default_factory=dict)
    additional_metadata: Any = None


@dataclass(frozen=True)
class Component:
    """The variants of one model."""

    variants: dict[str, OrtVariant]
    component_name: str | None = None
    additional_metadata: Any = None


@dataclass(frozen=True)
class Package:
    """The manifest: which components there are, each by its folder or written out."""

    schema_version: str
    components: dict[str, Any]
    package_name: str | None = None
    package_version: str | None = None
    description: str | None = None
    layout: str | None = None
    shared_assets: dict[str, str] = field(default_factory=dict)
    additional_metadata: Any = None


def write_package(contents: Contents, output: Path, *, force: bool) -> Written:
    """Writes the package. Engines, and graphs for one processor, are left out with the reason."""
    name, taken = contents.name, [part for part in contents.graphs if part.cpu is None]
    if not is_safe_name(name) or "/" in name:
        raise InputRefused(
            f"{name!r} cannot name a folder of the package", hint="--name NAME of letters, digits, . _ -"
        )
    variants = {f"{part.id}{ending}": _variant(part, ep, device) for ending, ep, device in _PROVIDERS for part in taken}
    metadata = {"labels": contents.labels, "preprocess": contents.preprocess, "license": contents.license}
    component = Component(variants, name, {key: value for key, value in metadata.items() if value})
    package = Package(SCHEMA, {name: name}, package_name=name, layout="portable")
    files = {MANIFEST: _json(package), f"{name}/{COMPONENT}": _json(component)}
    for part in taken:
        model, weights = split(part.graph, WEIGHTS)
        files |= {f"{name}/{part.id}/{MODEL}": model} | ({f"{name}/{part.id}/{WEIGHTS}": weights} if weights else {})
    if contents.license_file is not None:
        files[f"{name}/LICENSE"] = contents.license_file
    write_folder(files, output, force=force, is_ours=is_package)
    left_out = {part.id: "left out, a model package holds no TensorRT engines" for part in contents.engines}
    left_out |= {
        part.id: "left out, ONNX Runtime would take it on any CPU" for part in contents.graphs if part.cpu is not None
    }
    return Written(tuple(variants), len(files), left_out)


def is_package(folder: Path) -> bool:
    """Whether the folder is a model package: its manifest names components."""
    if not (folder / MANIFEST).is_file():
        return False
    try:
        return bool(read_package(folder))
    except InputRefused:
        return False


def read_package(folder: Path) -> dict[str, Component]:
    """The components, by their names; InputRefused for what is no model package of a major schema that we know."""
    try:
        package = from_json(Package, _read(folder / MANIFEST), where=MANIFEST)
        if package.schema_version.partition(".")[0] != SCHEMA.partition(".")[0]:
            raise InputRefused(f"{folder}: schema {package.schema_version} is not known, {SCHEMA} is")
        return {name: _component(folder, name, value) for name, value in package.components.items()}
    except IntegrityError as error:
        raise InputRefused(f"{folder} is no model package: {error.problem}") from error


def _json(value: Any) -> bytes:
    """In the order of the fields and of the variants, of which the first is preferred."""
    return json.dumps(to_plain(value), indent=1).encode() + b"\n"


def _variant(part: OnnxPart, ep: str, device: str) -> OrtVariant:
    return OrtVariant(part.id, ep, device, executor_info={"ort": {"model_file": MODEL}})


def _component(folder: Path, name: str, value: Any) -> Component:
    """A component that is written out, or that lies in a folder or a file of the package."""
    if not isinstance(value, str):
        return from_plain(Component, value, where=f"{MANIFEST}.components.{name}")
    path = folder / value
    if not is_safe_name(value) or not path.resolve().is_relative_to(folder.resolve()):
        raise InputRefused(f"{folder}: component {name!r} lies at {value!r}, outside the package")
    return from_json(Component, _read(path / COMPONENT if path.is_dir() else path), where=f"{value}/{COMPONENT}")


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise InputRefused(f"{path} cannot be read: {error.strerror or error}") from error
    if len(data) > MAX_JSON_BYTES:
        raise InputRefused(f"{path} has more than {MAX_JSON_BYTES} bytes")
    return data
