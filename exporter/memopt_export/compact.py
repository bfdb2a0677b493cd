"""A graph in as few bytes as ONNX can be written in; for networks whose weights take less than their nodes do."""

from __future__ import annotations

import itertools
import math
import string
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from memopt_export.bodies import bodies, captured, subgraphs
from memopt_export.graph import FREE_DIMENSION, Graph
from memopt_export.opset import OWN, opset_of
from memopt_export.outline import outline
from memopt_export.simplify import drop_unused_initializers, simplify

if TYPE_CHECKING:
    import onnx

# Attributes that say what would hold without them, for any number of axes. Defaults of ONNX's own schema come on top.
_SAME_WITHOUT: dict[str, Callable[[list[int]], bool]] = {
    "strides": lambda values: all(value == 1 for value in values),
    "dilations": lambda values: all(value == 1 for value in values),
    "pads": lambda values: not any(values),
}
_WINDOWED = frozenset({"Conv", "ConvTranspose", "MaxPool", "AveragePool", "LpPool"})


def compact(graph: Graph) -> Graph:
    """The same function in fewer bytes; names of inputs and outputs are kept, those of nodes and tensors are not.

    1. All that `simplify` does; and our own entry goes, by which a graph knows the weights it comes from.
    2. Attributes that hold without being said go.
    3. A mean over height and width is a GlobalAveragePool, a Reshape to (batch, rest) a Flatten: neither needs a shape.
    4. Tensors have names of one letter, nodes and the batch none.
    5. Nodes that come again and again are written once, as a function.
    6. Whole numbers of 64 bits, mostly those of shapes, take as many bytes as they need.
    """
    model = simplify(graph).copy_model()
    _use_shapeless_operators(model)
    _drop_attributes(model)
    _drop_names(model)
    shorten_names(model)
    outline(model)
    shorten_names(model)
    _pack_integers(model)
    return replace(graph.with_model(model), has_card=False)


def shorten_names(model: onnx.ModelProto) -> None:
    """Case 4: the shortest names, the first ones to what is named most often. In place."""
    ends = {value.name for value in (*model.graph.input, *model.graph.output)}
    fixed = ends | {name for node in model.graph.node for name in captured(node)}
    counts: dict[str, int] = {}
    for name in itertools.chain(
        *((*node.input, *node.output) for node in model.graph.node), (tensor.name for tensor in model.graph.initializer)
    ):
        counts[name] = counts.get(name, 0) + 1
    free = (name for name in _names() if name not in fixed)
    short = {name: next(free) for name in sorted(counts, key=lambda name: -counts[name]) if name and name not in fixed}
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [short.get(name, name) for name in names]
    for tensor in model.graph.initializer:
        tensor.name = short.get(tensor.name, tensor.name)


def _names() -> Iterator[str]:
    """a, b, ..., Z, aa, ab, ..."""
    for length in itertools.count(1):
        yield from map("".join, itertools.product(string.ascii_letters, repeat=length))


def _pack_integers(model: onnx.ModelProto) -> None:
    """Case 6: as varints, of which a small number is one byte and a negative one ten."""
    from onnx import TensorProto, numpy_helper

    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.INT64 and tensor.HasField("raw_data"):
            packed = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
            packed.int64_data.extend(numpy_helper.to_array(tensor).flat)
            if packed.ByteSize() < tensor.ByteSize():
                tensor.CopyFrom(packed)


def _drop_names(model: onnx.ModelProto) -> None:
    for field in ("producer_name", "producer_version", "domain", "model_version"):
        model.ClearField(field)
    model.graph.name = "g"  # the checker wants one
    used = {node.domain for body in bodies(model) for node in body.graph.node}
    for index in reversed(range(len(model.opset_import))):
        if model.opset_import[index].domain not in used.union(OWN):
            del model.opset_import[index]
    for node in model.graph.node:
        node.ClearField("name")
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim[:1] if value.type.HasField("tensor_type") else ():
            if dim.dim_param == FREE_DIMENSION:  # which a nameless one is called; others are told apart by their names
                dim.ClearField("dim_param")


def _drop_attributes(model: onnx.ModelProto) -> None:
    """Case 2. Nodes with bodies keep all of theirs."""
    from onnx import defs

    version = opset_of(model)
    for node in model.graph.node:
        if node.domain or any(subgraphs(node)) or not defs.has(node.op_type, max_inclusive_version=version):
            continue
        known = defs.get_schema(node.op_type, version).attributes
        kept = [each for each in node.attribute if not _is_implied(node, each, known[each.name].default_value)]
        del node.attribute[:]
        node.attribute.extend(kept)


def _is_implied(node: onnx.NodeProto, attribute: onnx.AttributeProto, default: onnx.AttributeProto) -> bool:
    """Whether the node means the same without the attribute."""
    from onnx import helper

    value: Any = helper.get_attribute_value(attribute)
    if default.type == attribute.type and helper.get_attribute_value(default) == value:
        return True
    if node.op_type not in _WINDOWED:
        return False
    if attribute.name == "kernel_shape":
        return node.op_type.startswith("Conv")  # the weight has it
    return attribute.name in _SAME_WITHOUT and _SAME_WITHOUT[attribute.name](value)


def _use_shapeless_operators(model: onnx.ModelProto) -> None:
    """Case 3, where shape inference knows the ranks and sizes that make both the same."""
    from onnx import TensorProto, numpy_helper, shape_inference

    inferred = shape_inference.infer_shapes(model).graph
    shapes = {
        value.name: [dim.dim_value if dim.HasField("dim_value") else None for dim in value.type.tensor_type.shape.dim]
        for value in (*inferred.value_info, *inferred.input, *inferred.output)
    }
    constants = {
        tensor.name: numpy_helper.to_array(tensor).tolist()
        for tensor in model.graph.initializer
        if tensor.data_type == TensorProto.INT64 and len(tensor.dims) == 1
    }
    for node in model.graph.node:
        given = constants.get(node.input[1]) if len(node.input) == 2 else None
        shape, target = shapes.get(node.input[0]), shapes.get(node.output[0])
        if given is None or shape is None or target is None:
            continue
        keeps = all(each.i for each in node.attribute if each.name == "keepdims")
        if node.op_type == "ReduceMean" and len(shape) == 4 and keeps and sorted(axis % 4 for axis in given) == [2, 3]:
            _become(node, "GlobalAveragePool")
        elif node.op_type == "Reshape" and len(given) == 2 and _flattens(shape, target):
            _become(node, "Flatten")
    drop_unused_initializers(model)


def _flattens(shape: list[int | None], target: list[int | None]) -> bool:
    """Whether all but the first dimension become one: sizes are known, so no sample can run into another."""
    return len(shape) > 1 and None not in shape[1:] and target[1] == math.prod(size or 0 for size in shape[1:])


def _become(node: onnx.NodeProto, operator: str) -> None:
    node.op_type = operator
    del node.input[1:], node.attribute[:]
