"""A graph without what it does not need: the exporter's notes, unused and repeated weights, leftover BatchNorms."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Set
from typing import TYPE_CHECKING, Any

import numpy as np

from memopt.tensors import Array
from memopt_export.bodies import captured, rename_captured
from memopt_export.graph import FREE_DIMENSION, Graph, Wiring, attribute, wire

if TYPE_CHECKING:
    import onnx

# What torch calls a dimension that it was told to leave free.
_RANDOM_SYMBOL = re.compile(r"s\d+")


def simplify(graph: Graph) -> Graph:
    """The same function in a smaller file; inputs, outputs and node names are kept.

    1. Notes go: metadata, doc strings, intermediate shapes. Local functions are written out.
    2. The free first dimension is called "batch", where the exporter called it s31 or the like.
    3. Constant nodes become initializers, Identity and idle Dropout nodes vanish.
    4. A BatchNorm right behind a convolution is folded into it (the only step that rounds).
    5. Weights are stored raw and once; unused ones are dropped.

    What happens inside If, Loop and Scan only loses its notes; what is read there from around them stays.
    """
    model = _inline_functions(graph.copy_model())
    _strip_notes(model)
    _name_the_batch(model)
    constants_to_initializers(model)
    _drop_idle_nodes(model)
    _fold_batch_norms(model)
    drop_unused_initializers(model)
    _store_raw(model)
    merge_equal_initializers(model)
    return graph.with_model(model)


def constants_to_initializers(model: onnx.ModelProto) -> None:
    """Case 3: the values of Constant nodes under the names of their outputs. In place."""
    constants = {node.output[0]: _constant(node) for node in model.graph.node if node.op_type == "Constant"}
    model.graph.initializer.extend(tensor for tensor in constants.values() if tensor is not None)
    _keep(model.graph.node, lambda node: constants.get(node.output[0]) is None)


def drop_unused_initializers(model: onnx.ModelProto) -> None:
    """Deletes the initializers that no node reads, within itself or not, and no output returns. In place."""
    used = {name for node in model.graph.node for name in (*node.input, *captured(node))}
    used |= {value.name for value in model.graph.output}
    _keep(model.graph.initializer, lambda tensor: tensor.name in used)


def merge_equal_initializers(model: onnx.ModelProto) -> None:
    """Stores equal initializers once, under the first one's name; an output of the graph keeps its own. In place."""
    outputs = {value.name for value in model.graph.output}
    first: dict[tuple[int, tuple[int, ...], bytes], str] = {}
    renamed: dict[str, str] = {}
    for tensor in model.graph.initializer:
        if tensor.HasField("raw_data") and tensor.name not in outputs:
            content = (tensor.data_type, tuple(tensor.dims), hashlib.sha256(tensor.raw_data).digest())
            if first.setdefault(content, tensor.name) != tensor.name:
                renamed[tensor.name] = first[content]
    _keep(model.graph.initializer, lambda tensor: tensor.name not in renamed)
    rename_reads(model, renamed)


def _inline_functions(model: onnx.ModelProto) -> onnx.ModelProto:
    from onnx import inliner

    return inliner.inline_local_functions(model) if model.functions else model


def _strip_notes(model: onnx.ModelProto) -> None:
    """Case 1. Initializers listed among the inputs, as before IR version 4, are constants from here on."""
    model.ir_version = max(model.ir_version, 4)
    del model.metadata_props[:]
    model.ClearField("doc_string")
    _strip_graph(model.graph)
    initialized = {tensor.name for tensor in model.graph.initializer}
    _keep(model.graph.input, lambda value: value.name not in initialized)


def _strip_graph(graph: onnx.GraphProto) -> None:
    graph.ClearField("doc_string")
    del graph.metadata_props[:]
    del graph.value_info[:]
    for part in (*graph.node, *graph.initializer, *graph.input, *graph.output):
        part.ClearField("doc_string")
        del part.metadata_props[:]
    for node in graph.node:
        for part in node.attribute:
            part.ClearField("doc_string")
            for subgraph in (*([part.g] if part.HasField("g") else []), *part.graphs):
                _strip_graph(subgraph)


def _name_the_batch(model: onnx.ModelProto) -> None:
    """Case 2: every place that bears the symbol, in inputs and outputs, is renamed with it."""
    values = (*model.graph.input, *model.graph.output)
    shapes = [value.type.tensor_type.shape for value in values if value.type.HasField("tensor_type")]
    random = {
        shape.dim[0].dim_param for shape in shapes if shape.dim and _RANDOM_SYMBOL.fullmatch(shape.dim[0].dim_param)
    }
    for shape in shapes:
        for position, dim in enumerate(shape.dim):
            if dim.dim_param in random or (position == 0 and not dim.WhichOneof("value")):
                dim.dim_param = FREE_DIMENSION


def _constant(node: onnx.NodeProto) -> onnx.TensorProto | None:
    """The value of a Constant node under its output's name; None for strings and sparse values."""
    from onnx import TensorProto, numpy_helper

    form = node.attribute[0]
    if form.name == "value":
        tensor = TensorProto()
        tensor.CopyFrom(form.t)
        tensor.ClearField("doc_string")
        tensor.name = node.output[0]
        return tensor
    read: dict[str, Callable[[Any], Array]] = {
        "value_float": lambda a: np.asarray(a.f, np.float32),
        "value_floats": lambda a: np.asarray(a.floats, np.float32),
        "value_int": lambda a: np.asarray(a.i, np.int64),
        "value_ints": lambda a: np.asarray(a.ints, np.int64),
    }
    value = read.get(form.name)
    return numpy_helper.from_array(value(form), node.output[0]) if value else None


def _drop_idle_nodes(model: onnx.ModelProto) -> None:
    """Reads behind an Identity, or a Dropout that drops nothing, go to what stands before it."""
    outputs = {value.name for value in model.graph.output}
    renamed: dict[str, str] = {}
    for node in model.graph.node:
        if _is_idle(node) and node.output[0] not in outputs:
            renamed[node.output[0]] = renamed.get(node.input[0], node.input[0])
    _keep(model.graph.node, lambda node: node.output[0] not in renamed)
    rename_reads(model, renamed)


def _is_idle(node: onnx.NodeProto) -> bool:
    """Identity, or a Dropout for inference whose mask nobody asked for."""
    idle_dropout = node.op_type == "Dropout" and len(node.output) == 1 and (len(node.input) < 3 or not node.input[2])
    return node.op_type == "Identity" or idle_dropout


def _fold_batch_norms(model: onnx.ModelProto) -> None:
    """Case 4: y = (conv(x) + b - mean) * gain + shift becomes one convolution with scaled weights and a new bias."""
    wiring = wire(model)
    folded = set()
    for index, norm in enumerate(model.graph.node):
        conv = _conv_before(model, wiring, index) if norm.op_type == "BatchNormalization" else None
        if conv is not None:
            _fold(norm, conv, wiring, model)
            folded.add(index)
    _delete(model.graph.node, folded)


def _conv_before(model: onnx.ModelProto, wiring: Wiring, index: int) -> onnx.NodeProto | None:
    """The convolution whose output this BatchNorm alone reads, where all their weights are float32 initializers."""
    from onnx import TensorProto

    norm = model.graph.node[index]
    writer = wiring.writer.get(norm.input[0])
    if writer is None or wiring.sole_reader(norm.input[0]) != index or attribute(norm, "training_mode", 0):
        return None
    conv = model.graph.node[writer]
    weights = [name for name in (*conv.input[1:], *norm.input[1:]) if name]
    constant = all(
        name in wiring.initializers and wiring.initializers[name].data_type == TensorProto.FLOAT for name in weights
    )
    return conv if conv.op_type == "Conv" and constant and len(norm.output) == 1 else None


def _fold(norm: onnx.NodeProto, conv: onnx.NodeProto, wiring: Wiring, model: onnx.ModelProto) -> None:
    """Gives the convolution weights and a bias of its own, and the BatchNorm's output; computed in float64."""
    from onnx import numpy_helper

    def read(name: str) -> Array:
        return numpy_helper.to_array(wiring.initializers[name]).astype(np.float64)

    gamma, beta, mean, variance = map(read, norm.input[1:5])
    gain = gamma / np.sqrt(variance + attribute(norm, "epsilon", 1e-5))
    bias = read(conv.input[2]) if len(conv.input) > 2 and conv.input[2] else 0.0
    weight = read(conv.input[1])
    folded = {
        f"{norm.output[0]}.weight": weight * gain.reshape(-1, *[1] * (weight.ndim - 1)),
        f"{norm.output[0]}.bias": (bias - mean) * gain + beta,
    }
    model.graph.initializer.extend(numpy_helper.from_array(v.astype(np.float32), name) for name, v in folded.items())
    del conv.input[1:]
    conv.input.extend(folded)
    conv.output[0] = norm.output[0]


def _store_raw(model: onnx.ModelProto) -> None:
    """Numbers kept one by one in typed fields take up to ten bytes each; raw ones take their size."""
    from onnx import TensorProto, numpy_helper

    for tensor in model.graph.initializer:
        if not tensor.HasField("raw_data") and tensor.data_type != TensorProto.STRING:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))


def rename_reads(model: onnx.ModelProto, renamed: dict[str, str]) -> None:
    """Lets all nodes, those in bodies too, read other tensors: old name -> new name."""
    for node in model.graph.node:
        for slot, name in enumerate(node.input):
            node.input[slot] = renamed.get(name, name)
        rename_captured(node, renamed)


def _keep(field: Any, wanted: Callable[[Any], bool]) -> None:
    """Drops the elements of a repeated field that are not wanted; the others are not copied."""
    _delete(field, {index for index, element in enumerate(field) if not wanted(element)})


def _delete(field: Any, indices: Set[int]) -> None:
    for index in sorted(indices, reverse=True):
        del field[index]
