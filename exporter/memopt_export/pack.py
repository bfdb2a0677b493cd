"""Packs variants into a bundle: one file that is mapped, or a folder with the same tree."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from memopt import __version__
from memopt.accuracy import max_difference
from memopt.archive import PAGE, Entry, is_safe_name, write_archive
from memopt.bundle import MANIFEST, MIMETYPE, MIMETYPE_BYTES, is_bundle_folder
from memopt.cpu import CpuTarget
from memopt.errors import InputRefused, UsageError
from memopt.files import atomic_file, refuse_to_overwrite, refuse_to_replace, write_folder
from memopt.manifest import (
    EngineInfo,
    File,
    Golden,
    Manifest,
    MemoryPoint,
    PlannedPoint,
    Stage,
    Variant,
    VariantMemory,
    encode,
    planned_at,
)
from memopt.preprocess import prepare
from memopt.signature import entry_of
from memopt.tensors import Array
from memopt_export.external_weights import split
from memopt_export.graph import Graph, run_graph
from memopt_export.hollow import as_executed, as_written
from memopt_export.plan import plan
from memopt_export.sbom import PATH as SBOM
from memopt_export.sbom import make_sbom
from memopt_export.signing import SigningKey

WEIGHTS = "weights.data"
LICENSE = "LICENSE"
_KNOWN_LICENSES = ("Apache-2.0",)
GOLDEN_SAMPLES = 8
PLANNED_BATCHES = (1, 8, 32)
ENGINE_SUFFIX = {"tensorrt": "trt", "tensorrt-rtx": "rtx"}
# By how much of the largest output another machine may differ: rounding, and for int8 a few steps of the last layers.
# An engine is held to fp16's at best, because TensorRT multiplies float32 in TF32 where it can.
_GOLDEN_TOLERANCE = {"fp32": 1e-4, "fp16": 1e-2}
_LOOSEST = 5e-2


@dataclass(frozen=True)
class OnnxPart:
    """A graph that goes into the bundle as a variant; one that is optimized for `cpu` stands beside its `source`."""

    id: str
    network: str
    graph: Graph
    metrics: dict[str, float] = field(default_factory=dict)
    measured: tuple[MemoryPoint, ...] = ()
    cpu: CpuTarget | None = None
    source: str | None = None


@dataclass(frozen=True)
class EnginePart:
    """A built engine that goes into the bundle; `source` is the id of the ONNX part it was built from."""

    id: str
    network: str
    precision: str
    data: bytes
    info: EngineInfo
    source: str


def engine_id(source: str, flavor: str) -> str:
    """What the engine built from the variant `source` is called.

    >>> engine_id("dense-fp16", "tensorrt-rtx")
    'dense-fp16-rtx'
    """
    return f"{source}-{ENGINE_SUFFIX[flavor]}"


@dataclass(frozen=True)
class Contents:
    """All that a bundle holds."""

    name: str
    parts: tuple[OnnxPart | EnginePart, ...]
    labels: tuple[str, ...] = ()
    preprocess: tuple[dict[str, Any], ...] = ()
    golden_inputs: Mapping[str, Array] = field(default_factory=dict)
    golden_pictures: Array | None = None  # uint8, of which `preprocess` makes the first golden input
    lineage: tuple[Stage, ...] = ()
    license: str | None = None
    license_text: str | None = None  # None takes that of a licence whose text memopt knows
    tools: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.graphs:
            raise UsageError("a bundle needs at least one ONNX variant, from which engines can be rebuilt")
        first = self.graphs[0].graph
        for part in self.graphs:
            if (part.graph.inputs, part.graph.outputs) != (first.inputs, first.outputs):
                raise InputRefused(f"{part.id} has other inputs or outputs than {self.graphs[0].id}")
        classes = first.outputs[0].shape[-1] if first.outputs[0].shape else None
        if self.labels and isinstance(classes, int) and len(self.labels) != classes:
            raise InputRefused(f"{len(self.labels)} labels for {classes} classes")
        for label in self.labels:
            if "\n" in label:
                raise InputRefused(f"label {label!r} has more than one line")
        portable = {part.id for part in self.graphs if part.cpu is None}
        for part in self.graphs:
            if part.cpu is not None and part.source not in portable:
                raise UsageError(f"{part.id} is packed without {part.source}, which runs where it does not")
        for any_part in self.parts:
            if sum(part.id == any_part.id for part in self.parts) > 1:
                raise UsageError(f"two variants are called {any_part.id!r}", hint="rename one of the files")
            if not is_safe_name(any_part.id) or "/" in any_part.id:
                raise UsageError(f"{any_part.id!r} cannot name a variant", hint="letters, digits, . _ and -")

    @property
    def graphs(self) -> tuple[OnnxPart, ...]:
        """The ONNX parts, the reference first."""
        return tuple(part for part in self.parts if isinstance(part, OnnxPart))

    @property
    def engines(self) -> tuple[EnginePart, ...]:
        """The engines."""
        return tuple(part for part in self.parts if isinstance(part, EnginePart))

    @property
    def labels_file(self) -> bytes:
        """The labels as a text file, one a line."""
        return "".join(f"{label}\n" for label in self.labels).encode()

    @property
    def license_file(self) -> bytes | None:
        """The licence's text where it is given, or known to memopt."""
        if self.license_text is not None or self.license not in _KNOWN_LICENSES:
            return self.license_text.encode() if self.license_text is not None else None
        return resources.files("memopt_export").joinpath("licenses", f"{self.license}.txt").read_bytes()


@dataclass(frozen=True)
class Written:
    """What was written: the ids of the variants, how many files, and why a part was left out."""

    variants: tuple[str, ...]
    files: int
    left_out: dict[str, str] = field(default_factory=dict)


def pack(
    contents: Contents, output: Path, *, form: str = "mopt", sign: SigningKey | None = None, force: bool = False
) -> Manifest:
    """Writes the bundle and returns its manifest; equal contents give equal bytes.

    Args:
        contents: what goes in.
        output: the `.mopt` file, or the folder for form "dir".
        form: one of FORMS.
        sign: the key that vouches for the manifest.
        force: replaces an existing output.

    Raises:
        UsageError: the output exists.
        InputRefused: the parts do not belong together.
    """
    if form == "mopt":
        refuse_to_overwrite(output, force=force)
    else:
        refuse_to_replace(output, force=force, is_ours=is_bundle_folder)
    items: list[Entry] = []
    variants = tuple(_add_variants(contents, items))
    golden = _add_golden(contents, items)
    if contents.labels:
        items.append(Entry("assets/labels.txt", contents.labels_file))
    text = contents.license_file
    if text is not None:
        items.append(Entry(LICENSE, text))
    first, producer = contents.graphs[0].graph, {"memopt": __version__, **contents.tools}
    sbom = make_sbom(contents.name, contents.license, variants, _listed(items), producer)
    items.append(Entry(SBOM, sbom))
    manifest = Manifest(
        name=contents.name,
        inputs=first.inputs,
        outputs=first.outputs,
        variants=variants,
        files=_listed(items),
        labels="assets/labels.txt" if contents.labels else None,
        preprocess=contents.preprocess,
        golden=golden,
        lineage=contents.lineage,
        producer=producer,
        license=contents.license,
        license_file=LICENSE if text is not None else None,
        sbom=SBOM,
    )
    encoded = encode(manifest)
    signatures = [Entry(entry_of(sign.key_id), sign.sign(encoded))] if sign is not None else []
    FORMS[form]([Entry(MIMETYPE, MIMETYPE_BYTES), Entry(MANIFEST, encoded), *signatures, *items], output, force)
    return manifest


def _listed(items: Sequence[Entry]) -> tuple[File, ...]:
    return tuple(File(item.name, len(item.data), hashlib.sha256(item.data).hexdigest()) for item in items)


def _add_variants(contents: Contents, items: list[Entry]) -> Iterator[Variant]:
    """Every part with its files; external weights that more than one graph has are stored once."""
    pieces = {part.id: split(part.graph, WEIGHTS) for part in contents.graphs}
    counts = Counter(weights for _, weights in pieces.values())
    for part in contents.parts:
        if isinstance(part, EnginePart):
            yield _add_engine(part, contents, items)
            continue
        model, weights = pieces[part.id]
        path = f"variants/{part.id}/{WEIGHTS}" if weights else None
        if path is not None and counts[weights] > 1:
            path = f"shared/sha256-{hashlib.sha256(weights).hexdigest()[:16]}.data"
            model, _ = split(part.graph, Path(path).name)  # it calls its weights by the name of their file
        yield _add_graph(part, model, weights, path, items)


def _add_graph(part: OnnxPart, model: bytes, weights: bytes, weights_path: str | None, items: list[Entry]) -> Variant:
    path = f"variants/{part.id}/graph.onnx"
    items.append(Entry(path, model))
    if weights_path is not None and all(item.name != weights_path for item in items):
        items.append(Entry(weights_path, weights, PAGE))
    planned = planned_points(part.graph, as_it_stands=part.cpu is not None)
    memory = VariantMemory(
        file_bytes=len(model) + len(weights),
        weights_bytes=sum(part.graph.weights_bytes().values()),
        activation_bytes=planned_at(planned, 1),
        planned=planned,
        measured=part.measured,
    )
    return Variant(
        id=part.id,
        network=part.network,
        precision=part.graph.precision,
        runtime="onnxruntime",
        model=path,
        weights=weights_path,
        weights_sha256=part.graph.weights_sha256,
        memory=memory,
        metrics=part.metrics,
        cpu=part.cpu,
        source=part.source,
    )


def planned_points(graph: Graph, *, as_it_stands: bool = False) -> tuple[PlannedPoint, ...]:
    """Activations at a few batches, or at the graph's own; none where some depend on values.

    What threads take once, whatever the batch, is left out. An optimized graph is executed `as_it_stands`.
    """
    executed = as_written(graph) if as_it_stands else as_executed(graph)
    batches = PLANNED_BATCHES if graph.fixed_batch is None else (graph.fixed_batch,)
    try:
        plans = [plan(executed, batch=batch, threads=0) for batch in batches]
    except InputRefused:
        return ()
    known = not any(found.unknown for found in plans)
    return tuple(PlannedPoint(found.batch, found.activation_bytes) for found in plans) if known else ()


def _add_engine(part: EnginePart, contents: Contents, items: list[Entry]) -> Variant:
    source = next((p for p in contents.graphs if p.id == part.source), None)
    if source is None:
        raise InputRefused(f"engine {part.id} was built from {part.source}, which is not packed with it")
    if source.graph.sha256 != part.info.onnx_sha256:
        raise InputRefused(f"engine {part.id} was built from another graph than {part.source}")
    path = f"variants/{part.id}/model.engine"
    items.append(Entry(path, part.data, PAGE))
    smallest = min(part.info.profiles, key=lambda profile: profile.batches[1], default=None)
    activation = smallest.activation_bytes if smallest is not None else None
    return Variant(
        id=part.id,
        network=part.network,
        precision=part.precision,
        runtime=part.info.flavor,
        model=path,
        weights_sha256=source.graph.weights_sha256,
        memory=VariantMemory(len(part.data), part.info.weights_bytes, activation),
        engine=part.info,
        source=part.source,
    )


def _add_golden(contents: Contents, items: list[Entry]) -> Golden | None:
    """The golden inputs, and what every variant makes of them; what was made from a graph is held against it.

    Raises:
        InputRefused: an optimized graph computes something else than the one it was made from, or the preprocessing
            makes something else of the pictures than the inputs.
    """
    if not contents.golden_inputs:
        return None
    inputs = {name: f"assets/golden/input-{i}.npy" for i, name in enumerate(contents.golden_inputs)}
    items += [Entry(inputs[name], _npy(array)) for name, array in contents.golden_inputs.items()]
    outputs: dict[str, dict[str, str]] = {}
    atol = {}
    for part in (part for part in contents.graphs if part.cpu is None):
        computed = run_graph(part.graph, contents.golden_inputs)
        names = [spec.name for spec in part.graph.outputs]
        outputs[part.id] = {name: f"assets/golden/{part.id}-{i}.npy" for i, name in enumerate(names)}
        items += [Entry(outputs[part.id][name], _npy(array)) for name, array in zip(names, computed, strict=True)]
        largest = max(float(np.abs(array).max()) for array in computed)
        atol[part.id] = _GOLDEN_TOLERANCE.get(part.graph.precision, _LOOSEST) * max(largest, 1.0)
        for made in contents.parts:
            if made.source != part.id:
                continue
            outputs[made.id], atol[made.id] = outputs[part.id], atol[part.id]
            if isinstance(made, EnginePart):
                atol[made.id] = max(_GOLDEN_TOLERANCE["fp16"] * max(largest, 1.0), atol[part.id])
            else:
                _refuse_unlike(made, computed, contents.golden_inputs, atol[part.id])
    return Golden(inputs, outputs, atol, _add_pictures(contents, items))


def _add_pictures(contents: Contents, items: list[Entry]) -> str | None:
    """The path of the pictures, whose prepared form the bundle has as well: so a device can check its preprocessing."""
    pictures = contents.golden_pictures
    if pictures is None:
        return None
    if not np.array_equal(prepare(pictures, contents.preprocess), next(iter(contents.golden_inputs.values()))):
        raise InputRefused("the preprocessing does not make the golden inputs of the golden pictures")
    items.append(Entry("assets/golden/pictures.npy", _npy(pictures)))
    return items[-1].name


def _refuse_unlike(made: OnnxPart, expected: Sequence[Array], feeds: Mapping[str, Array], atol: float) -> None:
    got = run_graph(made.graph, feeds, optimized=False)
    worst = max(max_difference(one, other) for one, other in zip(got, expected, strict=True))
    if not worst <= atol:
        raise InputRefused(f"{made.id} differs from {made.source} by {worst:.3g}, {atol:.3g} is allowed")


def _npy(array: Array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _write_file(items: Sequence[Entry], output: Path, force: bool) -> None:
    with atomic_file(output, force=force) as file:
        write_archive(file, items)


def _write_folder(items: Sequence[Entry], output: Path, force: bool) -> None:
    write_folder({item.name: item.data for item in items}, output, force=force, is_ours=is_bundle_folder)


FORMS: dict[str, Callable[[Sequence[Entry], Path, bool], None]] = {"mopt": _write_file, "dir": _write_folder}
