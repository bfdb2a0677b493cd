"""A Graph: an ONNX model as a frozen value, with the digest of the weights it comes from."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from memopt.errors import InputRefused
from memopt.files import write_atomically
from memopt.tensors import TensorSpec, nbytes

if TYPE_CHECKING:
    import onnx

# The one metadata entry that a graph of ours carries; everything else is stripped.
METADATA_KEY = "memopt"
FREE_DIMENSION = "batch"


@dataclass(frozen=True)
class Graph:
    """An ONNX model. `model` is never changed in place: a transformation copies it first (`Graph.copy_model`)."""

    model: onnx.ModelProto
    weights_sha256: str
    precision: str = "fp32"

    @cached_property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What the graph expects, initializers left out."""
        initialized = {tensor.name for tensor in self.model.graph.initializer}
        return tuple(_spec(value) for value in self.model.graph.input if value.name not in initialized)

    @cached_property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What the graph returns, in order."""
        return tuple(_spec(value) for value in self.model.graph.output)

    @cached_property
    def data(self) -> bytes:
        """The serialized model, our metadata entry included; equal graphs give equal bytes."""
        model = self.copy_model()
        del model.metadata_props[:]
        entry = model.metadata_props.add()
        entry.key = METADATA_KEY
        entry.value = json.dumps({"precision": self.precision, "weights": self.weights_sha256}, sort_keys=True)
        return bytes(model.SerializeToString(deterministic=True))

    @property
    def sha256(self) -> str:
        """Digest of the serialized model."""
        return hashlib.sha256(self.data).hexdigest()

    def copy_model(self) -> onnx.ModelProto:
        """A copy that may be changed."""
        import onnx

        copy = onnx.ModelProto()
        copy.CopyFrom(self.model)
        return copy

    def with_model(self, model: onnx.ModelProto, *, precision: str | None = None) -> Graph:
        """The same lineage with another model."""
        return replace(self, model=model, precision=precision or self.precision)

    def weights_bytes(self) -> dict[str, int]:
        """Bytes of initializers by dtype, subgraphs left out."""
        from onnx import helper

        sizes: dict[str, int] = {}
        for tensor in self.model.graph.initializer:
            dtype = helper.tensor_dtype_to_string(tensor.data_type).removeprefix("TensorProto.").lower()
            dtype = _ONNX_NAMES.get(dtype, dtype)
            sizes[dtype] = sizes.get(dtype, 0) + nbytes(dtype, _elements(tensor.dims))
        return sizes


def load_graph(path: Path) -> Graph:
    """The graph in an .onnx file, external data included. A foreign one gets the digest of its initializers.

    Raises:
        InputRefused: missing, not ONNX, or refused by the ONNX checker.
    """
    import onnx
    from google.protobuf.message import DecodeError

    if not path.is_file():
        raise InputRefused(f"{path} does not exist" if not path.exists() else f"{path} is not a file")
    try:
        onnx.checker.check_model(str(path))
        model = onnx.load(path)
    except (DecodeError, onnx.checker.ValidationError, ValueError, OSError) as error:
        raise InputRefused(f"{path} is not a valid ONNX model: {_first_line(error)}") from error
    if not model.graph.output:
        raise InputRefused(f"{path} is not a valid ONNX model: it has no outputs")
    known = {entry.key: entry.value for entry in model.metadata_props}.get(METADATA_KEY)
    lineage = json.loads(known) if known else {}
    weights = lineage.get("weights") or _digest_of_initializers(model)
    return Graph(model, weights, lineage.get("precision", _guess_precision(model)))


def save_graph(graph: Graph, path: Path, *, force: bool = False) -> None:
    """Writes the graph as one .onnx file, atomically."""
    write_atomically(path, graph.data, force=force)


_ONNX_NAMES = {"float": "float32", "double": "float64"}


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    from onnx import helper

    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        raise InputRefused(f"{value.name!r} is a {kind or 'value of unknown type'}; only tensors are supported")
    tensor = value.type.tensor_type
    dtype = helper.tensor_dtype_to_string(tensor.elem_type).removeprefix("TensorProto.").lower()
    shape = tuple(
        dim.dim_value if dim.HasField("dim_value") else (dim.dim_param or FREE_DIMENSION) for dim in tensor.shape.dim
    )
    return TensorSpec(value.name, _ONNX_NAMES.get(dtype, dtype), shape)


def _elements(dims: object) -> int:
    count = 1
    for dim in dims:  # type: ignore[attr-defined]  # protobuf's repeated field has no public type
        count *= dim
    return count


def _digest_of_initializers(model: onnx.ModelProto) -> str:
    digest = hashlib.sha256()
    for tensor in sorted(model.graph.initializer, key=lambda tensor: tensor.name):
        digest.update(tensor.SerializeToString(deterministic=True))
    return digest.hexdigest()


def _guess_precision(model: onnx.ModelProto) -> str:
    """The precision of a graph that does not say: by its quantizers, else by its initializers."""
    import onnx

    if any(node.op_type in ("QuantizeLinear", "QLinearConv", "QLinearMatMul") for node in model.graph.node):
        return "int8"
    dtypes = {tensor.data_type for tensor in model.graph.initializer}
    if onnx.TensorProto.FLOAT in dtypes or not dtypes:
        return "fp32"
    return "fp16" if onnx.TensorProto.FLOAT16 in dtypes else "bf16" if onnx.TensorProto.BFLOAT16 in dtypes else "fp32"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
