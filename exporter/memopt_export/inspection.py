"""What a file holds, told without running it."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from memopt.artifact import map_file, open_artifact
from memopt.bundle import Bundle, is_bundle_folder, open_bundle
from memopt.errors import BackendError, InputRefused, MemoptError, OutOfResource
from memopt.manifest import Variant
from memopt.sizes import show_size
from memopt.strict_json import from_plain
from memopt.tensors import TensorSpec, show_shape
from memopt_export import preflight
from memopt_export.bodies import bodies
from memopt_export.execution import Execution
from memopt_export.findings import Finding, Model, bytes_by_dtype, bytes_by_place, find, stored_in
from memopt_export.first_session import look_apart
from memopt_export.graph import Graph, read_graph
from memopt_export.ort_package import is_package, read_package
from memopt_export.provenance import Provenance
from memopt_export.tensorrt_engine import EngineHeader, read_header
from memopt_export.triton import is_repository, read_repository
from memopt_models.checkpoint import read_metadata


@dataclass(frozen=True)
class Inspection:
    """What a file holds, told without running it.

    Attributes:
        bytes_by_dtype: of all that a graph stores, wherever in it.
        parts: of a bundle, a folder.
        findings: what costs bytes and need not, the most expensive first; None: this kind of file is not looked at.
        unseen: what could not be looked at, with the reason.
    """

    path: str
    kind: str
    size_bytes: int
    facts: dict[str, str]
    bytes_by_dtype: dict[str, int] = field(default_factory=dict)
    parts: tuple[dict[str, Any], ...] = ()
    findings: tuple[Finding, ...] | None = None
    unseen: tuple[str, ...] = ()


def inspect(path: Path) -> Inspection:
    """What the file holds, told without running it."""
    if not path.exists():
        raise InputRefused(f"{path} does not exist")
    kind = "folder" if path.is_dir() else path.suffix
    if kind not in INSPECTORS:
        raise InputRefused(
            f"{path} cannot be inspected", hint="one of *" + ", *".join(k for k in INSPECTORS if k[0] == ".")
        )
    return INSPECTORS[kind](path)


def look(path: Path, *, source: Path | None = None) -> tuple[tuple[Finding, ...], tuple[str, ...]]:
    """What costs bytes in an .onnx file and need not, and what could not be looked at, with the reason.

    Args:
        path: of the file, untrusted.
        source: the float graph that it was quantized from, where that is known, for remedies.

    Raises:
        InputRefused: the file is refused by the pre-flight, or by ONNX.
    """
    model, unseen = _look(path, called=path, source=source)
    return find(model), unseen


def _inspect_graph(path: Path) -> Inspection:
    model, unseen = _look(path, called=path)
    graph, execution = model.graph, model.execution
    nodes = Counter(node.op_type for body in bodies(graph.model) for node in body.graph.node)
    facts = {
        "precision": graph.precision,
        "opset": ", ".join(f"{entry.domain or 'ai.onnx'} {entry.version}" for entry in graph.model.opset_import),
        "inputs": _specs(graph.inputs),
        "outputs": _outputs(graph),
        "nodes": _counts(nodes),
        "weights sha256": graph.weights_sha256,
        "stored in": ", ".join(f"{place} {show_size(size)}" for place, size in bytes_by_place(model.stored).items()),
    }
    facts |= {} if execution is None else _execution(execution)
    facts |= {} if graph.quantization is None else _quantization(graph.quantization)
    files = {one.place.file for one in model.stored if one.place is not None}
    size = path.stat().st_size + sum(file.stat().st_size for file in files)
    return Inspection(
        str(path), "ONNX graph", size, facts, bytes_by_dtype(model.stored), findings=find(model), unseen=unseen
    )


def _look(path: Path, *, called: Path, source: Path | None = None) -> tuple[Model, tuple[str, ...]]:
    """What the checks look at in an .onnx file, untrusted, and what of it could not be had.

    ONNX Runtime opens it in a process of its own, with limits.
    """
    proto, size_bytes = preflight.keep_rules(path)
    stored = stored_in(proto, path.parent)
    try:
        execution, reason = look_apart(path, size_bytes)
    except (BackendError, OutOfResource) as error:
        execution, reason = None, error.problem
    model = Model(read_graph(proto, path.parent), stored, execution, called)
    unseen = () if execution is not None else (f"what ONNX Runtime executes: {reason}",)
    return model if source is None else replace(model, source=source), unseen


def _execution(execution: Execution) -> dict[str, str]:
    fused, layers = execution.fused
    facts = {
        "executed": _counts(execution.operators),
        "providers": ", ".join(f"{count} nodes on {name}" for name, count in execution.providers.items()),
        "held": ", ".join(f"{dtype} {show_size(size)}" for dtype, size in execution.held_bytes.items()),
    }
    return facts | ({"fused": f"{fused} of {layers} layers in integers, by ONNX Runtime on this CPU"} if fused else {})


def _counts(nodes: Mapping[str, int]) -> str:
    ordered = sorted(nodes.items(), key=lambda item: -item[1])
    return f"{sum(nodes.values())}: " + ", ".join(f"{count} {name}" for name, count in ordered)


def _inspect_engine(path: Path) -> Inspection:
    if not path.with_name(path.name + ".json").is_file():
        header = read_header(map_file(path))
        return Inspection(
            str(path), "TensorRT-RTX engine, without its sidecar", path.stat().st_size, _header_facts(header)
        )
    artifact = open_artifact(path)
    info = artifact.engine
    assert info is not None  # open_artifact reads the sidecar
    profiles = [
        f"batch {low} to {high}: {show_size(profile.activation_bytes)} activations"
        for profile in info.profiles
        for low, high in (profile.batches,)
    ]
    facts = {
        "built by": f"{info.flavor} {info.version}",
        "targets": ", ".join(info.targets),
        "platform": f"{info.os} {info.arch}",
        "weights": show_size(info.weights_bytes),
        "profiles": "; ".join(profiles),
        "graph sha256": info.onnx_sha256,
    }
    return Inspection(str(path), "TensorRT engine", artifact.size_bytes, facts)


def _header_facts(header: EngineHeader) -> dict[str, str]:
    return {
        "built by": f"tensorrt-rtx {header.version}",
        "targets": ", ".join(header.targets),
        "weights": show_size(header.weights_bytes),
        "complete": "yes" if header.complete else "no, its end is missing",
    }


def _inspect_checkpoint(path: Path) -> Inspection:
    metadata = read_metadata(path)
    lineage = [f"{stage['stage']} {stage['output_sha256'][:12]}" for stage in metadata["lineage"]]
    facts = {
        "network": metadata["network"],
        "settings": ", ".join(f"{name} {value}" for name, value in metadata["settings"].items()),
        "inputs": _specs(from_plain(tuple[TensorSpec, ...], metadata["inputs"], where="inputs")),
        "labels": _labels(metadata["labels"]),
        "preprocess": _steps(metadata["preprocess"]),
        "metrics": ", ".join(f"{name} {value:.6g}" for name, value in metadata["metrics"].items()),
        "lineage": " -> ".join(lineage),
        "seed": str(metadata["seed"]),
    }
    return Inspection(str(path), "checkpoint", path.stat().st_size, facts)


def _inspect_bundle(path: Path) -> Inspection:
    bundle = open_bundle(path)
    manifest = bundle.manifest
    facts = {
        "name": manifest.name,
        "schema": manifest.schema,
        "inputs": _specs(manifest.inputs),
        "outputs": _specs(manifest.outputs),
        "labels": _labels(bundle.labels),
        "preprocess": _steps(manifest.preprocess),
        "golden": "inputs, and every variant's outputs" if manifest.golden else "none",
        "lineage": " -> ".join(dict.fromkeys(stage.stage for stage in manifest.lineage)) or "none",
        "license": (manifest.license or "not stated") + (", text included" if manifest.license_file else ""),
        "bill of materials": manifest.sbom or "none",
        "signed": f"by {', '.join(bundle.signatures)}, not checked" if bundle.signatures else "no",
        "files": f"{len(manifest.files)}, every sha256 holds",
    }
    parts = tuple(
        {
            "variant": variant.id,
            "runtime": variant.runtime,
            "precision": variant.precision,
            "file_bytes": variant.memory.file_bytes,
            "weights_bytes": variant.memory.weights_bytes,
            "activation_bytes": variant.memory.activation_bytes,
            "only_on": _only_on(variant),
            "private_bytes": next((point.private_bytes for point in variant.memory.measured), None),
            "test_top1": variant.metrics.get("test_top1"),
        }
        for variant in manifest.variants
    )
    size = path.stat().st_size if path.is_file() else _folder_bytes(path)
    findings, unseen = _find_in_variants(bundle)
    return Inspection(str(path), "memopt bundle", size, facts, parts=parts, findings=findings, unseen=unseen)


def _find_in_variants(bundle: Bundle) -> tuple[tuple[Finding, ...], tuple[str, ...]]:
    """What the checks find in each variant that is a graph, and which of them could not be looked at."""
    found: list[Finding] = []
    unseen: list[str] = []
    for variant in bundle.manifest.variants:
        if not variant.is_portable:
            continue  # what was made of another variant, for one machine
        with tempfile.TemporaryDirectory(prefix="memopt-inspect-") as name:
            path = Path(name) / "graph.onnx"
            path.write_bytes(bundle.entries[variant.model])
            if variant.weights is not None:
                path.with_name(Path(variant.weights).name).write_bytes(bundle.entries[variant.weights])
            try:
                model, why = _look(path, called=Path(f"{variant.id}.onnx"))
                found += [replace(each, variant=variant.id) for each in find(model)]
            except MemoptError as error:
                why = (error.problem,)
        unseen += [f"{variant.id}: {each.replace(str(path), 'the graph')}" for each in why]
    return tuple(sorted(found, key=lambda each: -each.cost_bytes)), tuple(unseen)


def _quantization(told: Provenance) -> dict[str, str]:
    """What quantized a graph, in words."""
    if told.trained:
        return {"recipe": f"{told.recipe.precision} for {told.recipe.target}, by training"}
    facts = {"recipe": told.recipe.text()}
    if told.source is None:
        return facts | {"calibrated": "on no samples"}
    rows = told.rows
    seed = "" if told.seed is None else f", seed {told.seed}"
    which = "" if rows is None else ": " + (", ".join(map(str, rows[:8])) + (", …" if len(rows) > 8 else ""))
    facts["calibrated"] = f"on {told.samples} samples of {told.source}{seed}{which}"
    return facts | {"data sha256": told.fingerprint or "unknown"}


def _only_on(variant: Variant) -> str | None:
    """The machines outside of which the variant is left alone; None for one that runs wherever its runtime does."""
    if variant.engine is not None:
        return ", ".join(variant.engine.targets)
    return f"{variant.cpu.key}: onnxruntime {variant.cpu.onnxruntime}" if variant.cpu is not None else None


def _inspect_folder(path: Path) -> Inspection:
    if is_bundle_folder(path):
        return _inspect_bundle(path)
    if is_package(path):
        return _inspect_package(path)
    return _inspect_repository(path) if is_repository(path) else _inspect_bundle(path)  # which says why it is none


def _inspect_repository(path: Path) -> Inspection:
    models = read_repository(path)
    parts = tuple(
        {
            "model": name,
            "backend": _first(config, "backend") or _first(config, "platform"),
            "largest batch": _first(config, "max_batch_size") or "0",
            "inputs": _tensors(config, "input"),
            "outputs": _tensors(config, "output"),
        }
        for name, config in models.items()
    )
    facts = {"models": str(len(models)), "digests": "none, so nothing to verify"}
    return Inspection(str(path), "Triton model repository", _folder_bytes(path), facts, parts=parts)


def _first(message: Mapping[str, Sequence[Any]], name: str) -> str | None:
    return next((str(value) for value in message.get(name, ())), None)


def _tensors(config: Mapping[str, Sequence[Any]], name: str) -> str:
    described = [
        f"{_first(tensor, 'name')} {_first(tensor, 'data_type')} ({', '.join(map(str, tensor.get('dims', ())))})"
        for tensor in config.get(name, ())
        if isinstance(tensor, dict)
    ]
    return "; ".join(described)


def _inspect_package(path: Path) -> Inspection:
    components = read_package(path)
    parts = tuple(
        {"variant": name, "component": component_name, "provider": variant.ep, "device": variant.device}
        for component_name, component in components.items()
        for name, variant in component.variants.items()
    )
    facts = {"components": ", ".join(components), "digests": "none, so nothing to verify"}
    return Inspection(str(path), "ONNX Runtime model package", _folder_bytes(path), facts, parts=parts)


def _folder_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


# File ending (or "folder") -> who knows it.
INSPECTORS: dict[str, Callable[[Path], Inspection]] = {
    ".onnx": _inspect_graph,
    ".engine": _inspect_engine,
    ".safetensors": _inspect_checkpoint,
    ".mopt": _inspect_bundle,
    "folder": _inspect_folder,
}


def _outputs(graph: Graph) -> str:
    """The outputs, those of unknown rank too."""
    known = {value.name for value in graph.model.graph.output if value.type.tensor_type.HasField("shape")}
    return ", ".join(
        f"{spec.name} {spec.dtype} {show_shape(spec.shape) if spec.name in known else '(?)'}" for spec in graph.outputs
    )


def _specs(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(f"{spec.name} {spec.dtype} {show_shape(spec.shape)}" for spec in specs)


def _labels(labels: Sequence[str]) -> str:
    return f"{len(labels)}: {', '.join(labels[:10])}{', …' if len(labels) > 10 else ''}" if labels else "none"


def _steps(steps: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(str(step.get("op")) for step in steps) or "none"
