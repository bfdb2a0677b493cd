"""A bundle's variants as a model repository of NVIDIA Triton: one model for each variant, ready to be served.

    REPOSITORY/VARIANT/config.pbtxt, labels.txt, LICENSE
    REPOSITORY/VARIANT/1/model.onnx and weights.data, or model.plan

https://github.com/triton-inference-server/server/blob/main/docs/user_guide/model_repository.md. Weights lie beside the
graph, so that the server maps them. Triton does not know preprocessing: the client sends tensors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from memopt.errors import InputRefused
from memopt.files import write_folder
from memopt.manifest import EngineInfo
from memopt.tensors import TensorSpec
from memopt_export import pbtxt
from memopt_export.external_weights import split
from memopt_export.pack import WEIGHTS, Contents, EnginePart, OnnxPart, Written
from memopt_export.pbtxt import Word

CONFIG = "config.pbtxt"
MAX_BATCH = 32  # of a graph, which takes any; an engine takes what its profiles do
_DTYPES = {
    "bool": "TYPE_BOOL", "uint8": "TYPE_UINT8", "uint16": "TYPE_UINT16", "uint32": "TYPE_UINT32",
    "uint64": "TYPE_UINT64", "int8": "TYPE_INT8", "int16": "TYPE_INT16", "int32": "TYPE_INT32", "int64": "TYPE_INT64",
    "float16": "TYPE_FP16", "float32": "TYPE_FP32", "float64": "TYPE_FP64", "bfloat16": "TYPE_BF16",
}  # fmt: skip


def write_repository(contents: Contents, output: Path, *, force: bool) -> Written:
    """Writes the repository. What Triton cannot load, or not everywhere, is left out with its reason."""
    files: dict[str, bytes] = {}
    taken: list[str] = []
    left_out: dict[str, str] = {}
    for part in contents.parts:
        reason = _refusal(part)
        if reason is not None:
            left_out[part.id] = reason
            continue
        taken.append(part.id)
        files |= {f"{part.id}/{name}": data for name, data in _model(part, contents).items()}
    write_folder(files, output, force=force, is_ours=is_repository)
    return Written(tuple(taken), len(files), left_out)


def is_repository(folder: Path) -> bool:
    """Whether the folder holds models of Triton, and nothing else."""
    models = list(folder.iterdir()) if folder.is_dir() else []
    return bool(models) and all((model / CONFIG).is_file() for model in models)


def read_repository(folder: Path) -> dict[str, dict[str, list[Any]]]:
    """The configuration of every model, by its name; InputRefused where one cannot be read."""
    return {model.name: _read_config(model / CONFIG) for model in sorted(folder.iterdir())}


def _refusal(part: OnnxPart | EnginePart) -> str | None:
    if isinstance(part, EnginePart):
        return None if part.info.flavor == "tensorrt" else f"left out, Triton has no backend for {part.info.flavor}"
    return "left out, a server may have another processor" if part.cpu is not None else None


def _model(part: OnnxPart | EnginePart, contents: Contents) -> dict[str, bytes]:
    """The files of one model."""
    first = contents.graphs[0].graph
    config = _config(part, first.inputs, first.outputs, labels=bool(contents.labels))
    files = {CONFIG: pbtxt.write(config).encode()}
    if isinstance(part, EnginePart):
        files["1/model.plan"] = part.data
    else:
        files["1/model.onnx"], weights = split(part.graph, WEIGHTS)
        files |= {f"1/{WEIGHTS}": weights} if weights else {}
    if contents.labels:
        files["labels.txt"] = contents.labels_file
    license_text = contents.license_file
    return files | ({"LICENSE": license_text} if license_text is not None else {})


def _config(
    part: OnnxPart | EnginePart, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], *, labels: bool
) -> dict[str, Any]:
    """The configuration. Where every tensor's first dimension is free, it is the batch, which Triton leaves out of
    `dims` and may put together from several requests.
    """
    specs = (*inputs, *outputs)
    batched = all(spec.shape and isinstance(spec.shape[0], str) for spec in specs)
    largest = 0 if not batched else MAX_BATCH if isinstance(part, OnnxPart) else _largest_batch(part.info)
    config: dict[str, Any] = {
        "name": part.id,
        "backend": "onnxruntime" if isinstance(part, OnnxPart) else "tensorrt",
        "default_model_filename": "model.onnx" if isinstance(part, OnnxPart) else "model.plan",
        "max_batch_size": largest,
        "input": [_tensor(spec, batched=batched) for spec in inputs],
        "output": [_tensor(spec, batched=batched) for spec in outputs],
    }
    if labels:
        config["output"][0]["label_filename"] = "labels.txt"
    return config | ({"dynamic_batching": {}} if largest > 1 else {})


def _largest_batch(engine: EngineInfo) -> int:
    return max(profile.batches[1] for profile in engine.profiles)


def _tensor(spec: TensorSpec, *, batched: bool) -> dict[str, Any]:
    if spec.dtype not in _DTYPES:
        raise InputRefused(f"{spec.name!r} is {spec.dtype}, which Triton does not know")
    dims = [dim if isinstance(dim, int) else -1 for dim in spec.shape[1 if batched else 0 :]]
    return {"name": spec.name, "data_type": Word(_DTYPES[spec.dtype]), "dims": dims}


def _read_config(path: Path) -> dict[str, list[Any]]:
    try:
        with path.open("rb") as file:
            data = file.read(pbtxt.MAX_BYTES + 1)
        if len(data) > pbtxt.MAX_BYTES:
            raise InputRefused(f"it has more than {pbtxt.MAX_BYTES} bytes")
        return pbtxt.read(data.decode())
    except (OSError, UnicodeDecodeError) as error:
        raise InputRefused(f"{path}: it cannot be read as text: {error}") from error
    except InputRefused as error:
        raise InputRefused(f"{path}: {error.problem}") from error
