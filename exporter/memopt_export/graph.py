"""A Graph: an ONNX model as a frozen value, with the digest of the weights it comes from."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
import threading
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from memopt.archive import PAGE
from memopt.errors import InputRefused, IntegrityError, OutOfResource, first_line
from memopt.files import atomic_file, refuse_to_overwrite, write_atomically
from memopt.ort_runtime import library_errors
from memopt.preprocess import check_steps
from memopt.strict_json import from_json, from_plain
from memopt.tensors import DTYPE_BITS, Array, TensorSpec, nbytes
from memopt_export.bodies import bodies, captured, inner_nodes
from memopt_export.provenance import Provenance, from_card, to_card
from memopt_export.tensor_rules import plain_name

if TYPE_CHECKING:
    import onnx
    import onnxruntime

# The one metadata entry that a graph of ours carries; everything else is stripped.
METADATA_KEY = "memopt"
FREE_DIMENSION = "batch"
RUN_TIMEOUT_S = 600.0
# Protobuf's limit is 2 GiB; the nodes need room beside the weights.
LARGEST_FILE_BYTES = 2**31 - 2**27
# Initializers smaller than this stay in the graph when the others go to a file of their own.
_SMALLEST_EXTERNAL_BYTES = 1024


@dataclass(frozen=True)
class Graph:
    """An ONNX model. `model` is never changed in place: a transformation copies it first (`Graph.copy_model`)."""

    model: onnx.ModelProto
    weights_sha256: str
    precision: str = "fp32"
    quantization: Provenance | None = None  # what quantized it, where that is known
    has_card: bool = True  # whether the file says the above; it takes some 130 bytes
    preprocess: tuple[dict[str, Any], ...] | None = None  # steps that make its input of a picture, where known

    @cached_property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What the graph expects, initializers left out."""
        initialized = {tensor.name for tensor in self.model.graph.initializer}
        return tuple(tensor_spec(value) for value in self.model.graph.input if value.name not in initialized)

    @cached_property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What the graph returns, in order."""
        return tuple(tensor_spec(value) for value in self.model.graph.output)

    @cached_property
    def data(self) -> bytes:
        """The serialized model, with our metadata entry where it has one; equal graphs give equal bytes."""
        model = self.copy_model()
        self._write_card(model)
        return bytes(model.SerializeToString(deterministic=True))

    @property
    def fits_one_file(self) -> bool:
        """Whether protobuf can serialize the model; one with more weights is saved with external data."""
        return sum(len(tensor.raw_data) for tensor in self.model.graph.initializer) < LARGEST_FILE_BYTES

    def _write_card(self, model: onnx.ModelProto) -> None:
        del model.metadata_props[:]
        if not self.has_card:
            return
        entry = model.metadata_props.add()
        entry.key = METADATA_KEY
        entry.value = json.dumps(self._card(), sort_keys=True)

    def _card(self) -> dict[str, Any]:
        card: dict[str, Any] = {"precision": self.precision, "weights": self.weights_sha256}
        card |= {} if self.preprocess is None else {"preprocess": list(self.preprocess)}
        return card if self.quantization is None else card | {"quantization": to_card(self.quantization)}

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

    def with_seed(self, seed: int) -> Graph:
        """The same graph; where samples made it, its card tells the seed with which they were drawn."""
        told = self.quantization
        if told is None or told.source is None:
            return self
        return replace(self, quantization=replace(told, seed=seed))

    @property
    def fixed_batch(self) -> int | None:
        """How many samples one run takes, where the graph fixes it; None where the batch is free."""
        first = self.inputs[0].shape[:1] if self.inputs else ()
        return first[0] if first and isinstance(first[0], int) else None

    def weights_bytes(self) -> dict[str, int]:
        """Bytes of all that the graph stores by dtype, the largest first: initializers, Constant nodes, subgraphs."""
        return dict(sorted(stored_bytes(self.model).items(), key=lambda each: -each[1]))


def stored_bytes(model: onnx.ModelProto) -> dict[str, int]:
    """Bytes of all tensors that a model stores by dtype, those of its bodies and of Constant nodes included."""
    sizes: dict[str, int] = {}
    for body in bodies(model):
        for _, tensor in body.tensors():
            dtype = plain_name(tensor.data_type)
            size = nbytes(dtype, math.prod(tensor.dims)) if dtype in DTYPE_BITS else tensor.ByteSize()  # strings
            sizes[dtype] = sizes.get(dtype, 0) + size
    return sizes


def load_graph(path: Path, *, checked: bool = False) -> Graph:
    """The graph in an .onnx file, external data included. A foreign one gets the digest of all tensors that it stores.

    Args:
        path: an .onnx file.
        checked: whether its bytes are known to be our own, by their digest; else they pass the pre-flight.

    Raises:
        InputRefused: missing, not ONNX, or refused by the pre-flight.
        OutOfResource: its first session ran out of time or memory.
        BackendError: its first session crashed.
    """
    from memopt_export import preflight

    return read_graph(preflight.parse(path) if checked else preflight.check(path), path.parent)


def read_graph(model: onnx.ModelProto, folder: Path) -> Graph:
    """The graph of a model that has been found sound, whose external data lies in `folder`; see `load_graph`."""
    from memopt_export import preflight

    preflight.load_external(model, folder)
    free_negative_dims(model)
    card = _read_card(model)
    weights, precision = card.weights or _digest_of_tensors(model), card.precision or _guess_precision(model)
    graph = Graph(model, weights, precision, from_card(card.quantization), preprocess=_read_steps(card.preprocess))
    _ = graph.inputs, graph.outputs  # refused here, when they are none that we know
    return graph


def free_negative_dims(model: onnx.ModelProto) -> None:
    """Makes -1, as Paddle and Keras write it, a dimension of which nothing is said, which is the same. In place."""
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim if value.type.HasField("tensor_type") else ():
            if dim.dim_value < 0:
                dim.ClearField("dim_value")


def run_graph(
    graph: Graph, feeds: Mapping[str, Array], *, optimized: bool = True, timeout_s: float = RUN_TIMEOUT_S
) -> list[Array]:
    """The graph's outputs in ONNX Runtime on this CPU; not optimized, every node runs as it stands.

    fp8 is never optimized: the optimizer fails on a Clip or Relu before a QuantizeLinear to floats of 8 bits.

    Raises:
        InputRefused: ONNX Runtime cannot run the graph on these inputs.
        OutOfResource: it was not done after `timeout_s`; a loop may never end.
    """
    return next(run_batches(graph, [feeds], optimized=optimized, timeout_s=timeout_s))


def run_batches(
    graph: Graph, batches: Iterable[Mapping[str, Array]], *, optimized: bool = True, timeout_s: float = RUN_TIMEOUT_S
) -> Iterator[list[Array]]:
    """The outputs for each batch, all in one session; see `run_graph`, whose `timeout_s` is that of a batch here."""
    import onnxruntime

    levels = onnxruntime.GraphOptimizationLevel
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = (
        levels.ORT_ENABLE_ALL if optimized and graph.precision != "fp8" else levels.ORT_DISABLE_ALL
    )
    options.log_severity_level = 3  # errors are raised, warnings are not the user's
    try:
        session = open_session(graph, options)
        for feeds in batches:
            with _time_limit(onnxruntime.RunOptions(), timeout_s) as run_options:
                outputs = [np.asarray(output) for output in session.run(None, dict(feeds), run_options)]
            yield outputs
    except library_errors() as error:
        raise InputRefused(f"onnxruntime cannot run the graph: {first_line(error)}") from error


def open_session(graph: Graph, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    """A session of the graph on this CPU, whatever its size; what does not fit into bytes goes through a folder."""
    import onnxruntime

    if graph.fits_one_file:
        return onnxruntime.InferenceSession(graph.data, options, providers=["CPUExecutionProvider"])
    with tempfile.TemporaryDirectory(prefix="memopt-") as folder:
        path = Path(folder) / "graph.onnx"
        save_graph(graph, path)
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@contextmanager
def _time_limit(options: onnxruntime.RunOptions, timeout_s: float) -> Iterator[onnxruntime.RunOptions]:
    """Run options that end the run, between two nodes, when its time is up."""

    def end() -> None:
        options.terminate = True

    timer = threading.Timer(timeout_s, end)
    timer.daemon = True
    timer.start()
    try:
        yield options
    except library_errors() as error:
        if options.terminate:
            raise OutOfResource(f"the graph was not done after {timeout_s:g} seconds") from error
        raise
    finally:
        timer.cancel()


def save_graph(graph: Graph, path: Path, *, force: bool = False, external: bool = False) -> None:
    """Writes the graph as an .onnx file, atomically.

    Args:
        graph: what to write.
        path: of the .onnx file.
        force: whether existing files may be replaced.
        external: whether large initializers go to a file beside it, called `NAME.onnx.data`, each on a page of its own,
            so that they can be mapped. A graph of 2 GiB or more is written so in any case.

    Raises:
        UsageError: a file exists and `force` is not given.
        OutOfResource: the disk is full.
        InputRefused: the folder cannot be written.
    """
    if graph.fits_one_file and not external:
        write_atomically(path, graph.data, force=force)
        return
    beside = path.with_name(path.name + ".data")
    refuse_to_overwrite(path, force=force)
    # Both are whole before either is renamed, the weights first.
    with atomic_file(path, force=force) as nodes, atomic_file(beside, force=force) as weights:
        nodes.write(_write_apart(graph, weights, beside.name))


def _write_apart(graph: Graph, weights: BinaryIO, location: str) -> bytes:
    """Writes large initializers to `weights`; the serialized model, which finds them in the file called `location`."""
    from onnx import ModelProto, TensorProto

    model = ModelProto()
    copy_fields(graph.model, model, without="graph")
    copy_fields(graph.model.graph, model.graph, without="initializer")
    for tensor in graph.model.graph.initializer:
        if len(tensor.raw_data) < _SMALLEST_EXTERNAL_BYTES:
            model.graph.initializer.append(tensor)
            continue
        weights.write(bytes(-weights.tell() % PAGE))
        moved = model.graph.initializer.add(
            name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, data_location=TensorProto.EXTERNAL
        )
        for key, value in (("location", location), ("offset", weights.tell()), ("length", len(tensor.raw_data))):
            moved.external_data.add(key=key, value=str(value))
        weights.write(tensor.raw_data)
    graph._write_card(model)
    return bytes(model.SerializeToString(deterministic=True))


def copy_fields(
    source: onnx.ModelProto | onnx.GraphProto, target: onnx.ModelProto | onnx.GraphProto, *, without: str
) -> None:
    """Copies all fields but one, which may be too large to have twice. In place."""
    for field, value in source.ListFields():
        if field.name == without:
            continue
        if field.type != field.TYPE_MESSAGE:
            setattr(target, field.name, value)
        elif field.is_repeated:
            getattr(target, field.name).MergeFrom(value)
        else:
            getattr(target, field.name).CopyFrom(value)


def set_nodes(graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto]) -> None:
    """Leaves the graph these nodes, which may be its own, in this order. In place."""
    chosen = type(graph)(node=nodes)  # copies: the graph's own end with its field
    graph.ClearField("node")
    graph.node.extend(chosen.node)


def label(node: onnx.NodeProto) -> str:
    """What a node is called: its name, or its first output where the exporter gave none."""
    return node.name or node.output[0]


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """The value of a node's attribute, `default` where it has none."""
    from onnx import helper

    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


# The slot of a read that happens in a node's subgraphs: the tensor has to be there under its own name.
CAPTURED = -1


@dataclass(frozen=True)
class Wiring:
    """Who writes and who reads each tensor of a model; nodes by their index, reads as (node, input slot).

    What the subgraphs of a node read from around it (If, Loop, Scan) counts as one read by the node, in slot CAPTURED.
    """

    nodes: tuple[onnx.NodeProto, ...]
    writer: dict[str, int]
    readers: dict[str, tuple[tuple[int, int], ...]]
    initializers: dict[str, onnx.TensorProto]
    outputs: frozenset[str]

    def sole_reader(self, tensor: str) -> int | None:
        """The one node that reads the tensor; None where there are more, or where it is an output of the graph."""
        readers = self.readers.get(tensor, ())
        return readers[0][0] if len(readers) == 1 and tensor not in self.outputs else None

    def scalar(self, tensor: str) -> float | None:
        """The one number that an initializer is; None for another tensor, and for the name of none."""
        from onnx import numpy_helper

        return float(numpy_helper.to_array(self.initializers[tensor]).item()) if tensor in self.initializers else None

    def is_constant(self, tensor: str) -> bool:
        """Whether the tensor is an initializer, plain or dequantized."""
        writer = self.writer.get(tensor)
        if writer is not None and self.nodes[writer].op_type == "DequantizeLinear":
            return self.nodes[writer].input[0] in self.initializers
        return tensor in self.initializers


def wire(model: onnx.ModelProto) -> Wiring:
    """The wiring of the main graph; nodes and initializers are the model's own, not copies."""
    writer: dict[str, int] = {}
    readers: dict[str, list[tuple[int, int]]] = {}
    for index, node in enumerate(model.graph.node):
        writer.update({name: index for name in node.output if name})
        for slot, name in enumerate(node.input):
            if name:
                readers.setdefault(name, []).append((index, slot))
        for name in captured(node):
            readers.setdefault(name, []).append((index, CAPTURED))
    return Wiring(
        tuple(model.graph.node),
        writer,
        {name: tuple(reads) for name, reads in readers.items()},
        {tensor.name: tensor for tensor in model.graph.initializer},
        frozenset(value.name for value in model.graph.output),
    )


def has_fixed_shape(value: onnx.ValueInfoProto) -> bool:
    """Whether the value is a tensor with all its dims."""
    tensor = value.type.tensor_type
    return tensor.HasField("shape") and all(dim.HasField("dim_value") for dim in tensor.shape.dim)


_QUANTIZED_OPERATORS = frozenset({
    "QuantizeLinear", "DequantizeLinear", "MatMulNBits", "MatMulInteger", "ConvInteger", "MatMulIntegerToFloat",
    "QGemm", "GatherBlockQuantized", "MatMulBnb4", "QAttention",
})  # fmt: skip
_SMALL_INTEGERS = frozenset({"int2", "int4", "int8", "uint2", "uint4", "uint8"})


def inner_layers(model: onnx.ModelProto, operators: Container[str]) -> tuple[str, ...]:
    """The names of such nodes inside If, Loop and Scan, which no method changes."""
    return tuple(label(node) for node in inner_nodes(model) if node.op_type in operators)


def has_subgraph(node: onnx.NodeProto) -> bool:
    """Whether the node carries graphs of its own (If, Loop, Scan)."""
    return any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute)


def is_quantized(model: onnx.ModelProto) -> bool:
    """Whether any node already works on quantized values, subgraphs and functions included."""
    return bool(_quantizers(model))


def _quantizers(model: onnx.ModelProto) -> set[str]:
    """The operators that work on quantized values."""
    operators = {node.op_type for body in bodies(model) for node in body.graph.node}
    return {
        name for name in operators if name in _QUANTIZED_OPERATORS or name.startswith(("QLinear", "DynamicQuantize"))
    }


def tensor_spec(value: onnx.ValueInfoProto) -> TensorSpec:
    """Name, dtype and shape of an input, an output or a tensor between; a nameless free dimension is called "batch"."""
    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        raise InputRefused(f"{value.name!r} is a {kind or 'value of unknown type'}; only tensors are supported")
    tensor = value.type.tensor_type
    if not tensor.elem_type:
        raise InputRefused(f"{value.name!r} has no dtype")
    shape = tuple(
        dim.dim_value if dim.HasField("dim_value") else (dim.dim_param or FREE_DIMENSION) for dim in tensor.shape.dim
    )
    return TensorSpec(value.name, plain_name(tensor.elem_type), shape)


@dataclass(frozen=True)
class _Card:
    """What our metadata entry says."""

    weights: str | None = None
    precision: str | None = None
    quantization: Any = None  # a part of its own: one that cannot be read takes nothing else with it
    preprocess: Any = None  # the same


def _read_card(model: onnx.ModelProto) -> _Card:
    """Our metadata entry; an entry of that name which is not ours counts for nothing."""
    text = {entry.key: entry.value for entry in model.metadata_props}.get(METADATA_KEY, "{}")
    try:
        return from_json(_Card, text.encode(), where=METADATA_KEY)
    except IntegrityError:
        return _Card()


def _read_steps(plain: Any) -> tuple[dict[str, Any], ...] | None:
    """The steps in a card; None for what are none."""
    try:
        steps = None if plain is None else from_plain(tuple[dict[str, Any], ...], plain, where=METADATA_KEY)
        check_steps(steps or ())
    except IntegrityError:
        return None
    return steps


def _digest_of_tensors(model: onnx.ModelProto) -> str:
    """Of all that the model stores: some exporters write every weight as a Constant node."""
    digest = hashlib.sha256()
    tensors = [named for body in bodies(model) for named in body.tensors()]
    for _, tensor in sorted(tensors, key=lambda named: named[0]):
        digest.update(tensor.SerializeToString(deterministic=True))
    return digest.hexdigest()


def _guess_precision(model: onnx.ModelProto) -> str:
    """The precision of a graph that does not say: by its quantizers, else by its initializers.

    Where nothing but weights is dequantized, it is called after the smallest of them, such as "int4-weights".
    """
    import onnx

    dtypes = {tensor.data_type for tensor in model.graph.initializer}
    quantizers = _quantizers(model)
    if quantizers:
        bits = [DTYPE_BITS[name] for name in map(plain_name, dtypes) if name in _SMALL_INTEGERS]
        return f"int{min(bits)}-weights" if bits and quantizers == {"DequantizeLinear"} else "int8"
    if onnx.TensorProto.FLOAT in dtypes or not dtypes:
        return "fp32"
    return "fp16" if onnx.TensorProto.FLOAT16 in dtypes else "bf16" if onnx.TensorProto.BFLOAT16 in dtypes else "fp32"
