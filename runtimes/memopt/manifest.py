"""The manifest of a bundle: frozen values, read strictly from JSON and written deterministically.

`memopt.json` says what a bundle holds: the model's inputs and outputs, how a picture becomes an input, every variant
with its engine and its memory, the golden samples, the lineage back to the weights, and the digest of every file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from memopt.cpu import CpuTarget
from memopt.errors import IntegrityError, UsageError
from memopt.strict_json import from_json, refuse_duplicates, to_json
from memopt.tensors import TensorSpec

FORMAT = "memopt.bundle"
SCHEMA = "1.3"  # 1.1 added license_file and sbom, 1.2 cpu, 1.3 golden pictures and what is planned at other batches
MAX_MANIFEST_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Profile:
    """The shapes one optimization profile of an engine covers, and the activation memory it needs."""

    min: dict[str, tuple[int, ...]]
    opt: dict[str, tuple[int, ...]]
    max: dict[str, tuple[int, ...]]
    activation_bytes: int | None = None

    def __post_init__(self) -> None:
        shapes = [shape for each in (self.min, self.opt, self.max) for shape in each.values()]
        alike = self.min.keys() == self.opt.keys() == self.max.keys()
        if not any(self.min.values()) or not alike or any(dim < 0 for shape in shapes for dim in shape):
            raise IntegrityError(f"a profile has no shapes, or unlike ones: {self.min}, {self.opt}, {self.max}")

    @property
    def batches(self) -> tuple[int, int]:
        """Smallest and largest batch, read off the first input that is no scalar."""
        name = next(name for name, shape in self.min.items() if shape)
        return self.min[name][0], self.max[name][0]


@dataclass(frozen=True)
class EngineInfo:
    """Everything needed to refuse or to rebuild an engine before its bytes reach TensorRT."""

    flavor: str  # "tensorrt" or "tensorrt-rtx"
    version: str  # of the library that built it, four parts
    targets: tuple[str, ...]  # "sm86", ...
    os: str
    arch: str
    profiles: tuple[Profile, ...]
    weights_bytes: int | None
    onnx_sha256: str  # of the graph it was built from
    upper_bound: bool = True  # activation_bytes hold for any data (REQUIRE_USER_ALLOCATION)
    build_seconds: float | None = None
    build_peak_bytes: int | None = None


@dataclass(frozen=True)
class MemoryPoint:
    """The measured bill of one variant at one batch, above the runtime's own baseline, in bytes."""

    batch: int
    private_bytes: int | None
    file_backed_bytes: int | None
    peak_bytes: int | None
    method: str
    runtime: str
    device: str = "cpu"


@dataclass(frozen=True)
class PlannedPoint:
    """The planned peak of activations at one batch."""

    batch: int
    activation_bytes: int


def planned_at(points: Sequence[PlannedPoint], batch: int) -> int | None:
    """The planned peak at this batch: straight between points, in proportion beyond them; None without any.

    >>> points = PlannedPoint(1, 100), PlannedPoint(8, 450)
    >>> planned_at(points, 8), planned_at(points, 2), planned_at(points, 16)
    (450, 150, 900)
    """
    if not points:
        return None
    ordered = sorted(points, key=lambda point: point.batch)
    last = ordered[-1]
    if batch >= last.batch:
        return math.ceil(last.activation_bytes * batch / last.batch)
    batches, sizes = zip(*((point.batch, point.activation_bytes) for point in ordered), strict=True)
    return math.ceil(float(np.interp(batch, batches, sizes)))


@dataclass(frozen=True)
class VariantMemory:
    """Static numbers of a variant and the points measured when it was built."""

    file_bytes: int
    weights_bytes: int | None
    activation_bytes: int | None  # planned peak at batch 1
    measured: tuple[MemoryPoint, ...] = ()
    planned: tuple[PlannedPoint, ...] = ()  # the same at other batches

    @property
    def plan(self) -> tuple[PlannedPoint, ...]:
        """All that is planned; bundles before schema 1.3 know of batch 1 only."""
        first = (PlannedPoint(1, self.activation_bytes),) if self.activation_bytes is not None else ()
        return self.planned or first


@dataclass(frozen=True)
class Variant:
    """One way to run the model: a portable ONNX graph, or what was made from one for some machines only."""

    id: str
    network: str  # "dense", "pruned", "student"
    precision: str  # "fp32", "fp16", "int8"
    runtime: str  # which runtime's artifact it is: "onnxruntime", "tensorrt", "tensorrt-rtx"
    model: str  # path in the bundle
    weights_sha256: str  # of the checkpoint the variant comes from
    memory: VariantMemory
    weights: str | None = None  # path of external initializers
    engine: EngineInfo | None = None
    source: str | None = None  # id of the portable variant that an engine or an optimized graph was made from
    metrics: dict[str, float] = field(default_factory=dict)
    cpu: CpuTarget | None = None  # the only processors on which an optimized graph runs

    def __post_init__(self) -> None:
        if self.cpu is not None and (self.engine is not None or self.source is None):
            raise IntegrityError(f"variant {self.id!r} is optimized for a processor, but is no graph with a source")

    @property
    def is_portable(self) -> bool:
        """Whether it runs wherever its runtime does, so that others can be made from it."""
        return self.engine is None and self.cpu is None


@dataclass(frozen=True)
class Golden:
    """Samples with every variant's outputs on the machine that packed, as .npy files: the proof of a device."""

    inputs: dict[str, str]  # tensor name -> path
    outputs: dict[str, dict[str, str]]  # variant id -> tensor name -> path
    atol: dict[str, float]  # variant id -> largest difference that another machine's arithmetic explains
    pictures: str | None = None  # path of uint8 pictures of which the preprocessing makes the first input, to the bit


@dataclass(frozen=True)
class Stage:
    """One step of the lineage."""

    stage: str
    output_sha256: str
    parents: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class File:
    """One entry of the bundle."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The whole description of a bundle."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    variants: tuple[Variant, ...]
    files: tuple[File, ...]
    format: str = FORMAT
    schema: str = SCHEMA
    task: str = "image-classification"
    labels: str | None = None  # path in the bundle, one label a line
    preprocess: tuple[dict[str, Any], ...] = ()
    golden: Golden | None = None
    lineage: tuple[Stage, ...] = ()
    producer: dict[str, str] = field(default_factory=dict)  # tool -> version
    license: str | None = None  # SPDX
    license_file: str | None = None  # path in the bundle
    sbom: str | None = None  # path in the bundle, CycloneDX

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise IntegrityError(f"format is {self.format!r}, expected {FORMAT!r}")
        if self.schema.partition(".")[0] != SCHEMA.partition(".")[0]:
            raise IntegrityError(
                f"manifest schema is {self.schema}, this memopt reads {SCHEMA}", hint="pip install -U memopt"
            )
        refuse_duplicates("variant id", [variant.id for variant in self.variants])
        refuse_duplicates("file", [file.path.lower() for file in self.files])  # some file systems ignore case
        paths = {file.path for file in self.files}
        for path in self._references():
            if path not in paths:
                raise IntegrityError(f"the manifest speaks of {path!r}, which is not among its files")
        for file in self.files:
            if not re.fullmatch(r"[0-9a-f]{64}", file.sha256) or file.size_bytes < 0:
                raise IntegrityError(f"file {file.path!r} has no valid size and sha256")
        if self.golden is not None:
            self._check_golden(self.golden, {variant.id for variant in self.variants})
        portable = {variant.id for variant in self.variants if variant.is_portable}
        for variant in self.variants:
            if variant.source is not None and variant.source not in portable:
                raise IntegrityError(
                    f"variant {variant.id!r} comes from {variant.source!r}, which is no portable variant of the bundle"
                )

    def variant(self, variant_id: str) -> Variant:
        """The variant with this id; UsageError names the ids there are."""
        for variant in self.variants:
            if variant.id == variant_id:
                return variant
        raise UsageError(f"no variant {variant_id!r}", hint="one of " + ", ".join(v.id for v in self.variants))

    def _check_golden(self, golden: Golden, ids: set[str]) -> None:
        """Golden samples speak of every variant and every tensor, and of nothing else."""
        inputs, outputs = ({spec.name for spec in specs} for specs in (self.inputs, self.outputs))
        complete = all(set(paths) == outputs for paths in golden.outputs.values()) and set(golden.inputs) == inputs
        if not ids == set(golden.outputs) == set(golden.atol) or not complete:
            raise IntegrityError("the golden outputs are not those of the variants")

    def _references(self) -> list[str]:
        named = [self.labels, self.license_file, self.sbom]
        if self.golden is not None:
            named += self.golden.inputs.values()
            named.append(self.golden.pictures)
            named += [path for outputs in self.golden.outputs.values() for path in outputs.values()]
        for variant in self.variants:
            named += [variant.model, variant.weights]
        return [path for path in named if path is not None]


def encode(manifest: Manifest) -> bytes:
    """UTF-8 JSON with sorted keys: equal manifests give equal bytes."""
    return to_json(manifest).encode() + b"\n"


def decode(data: bytes) -> Manifest:
    """The manifest in these bytes; the inverse of `encode`.

    Raises:
        IntegrityError: not JSON, too large, too deep, a duplicate or unknown key, a wrong type, an impossible value.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise IntegrityError(f"the manifest has {len(data)} bytes, at most {MAX_MANIFEST_BYTES} are read")
    return from_json(Manifest, data, where="memopt.json")
