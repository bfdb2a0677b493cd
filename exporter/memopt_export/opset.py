"""A graph's opset: the version of ONNX's operators that it is written in, raised where a method needs a newer one."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from memopt.errors import InputRefused, first_line
from memopt_export.graph import Graph, copy_fields, has_subgraph
from memopt_export.simplify import constants_to_initializers

if TYPE_CHECKING:
    import onnx

# The names of ONNX's own domain.
OWN = ("", "ai.onnx")
# The first whose DequantizeLinear knows one scale for each channel.
PER_CHANNEL = 13
# The first whose QuantizeLinear makes floats of 8 bits.
FLOAT8 = 19
# The first whose DequantizeLinear knows blocks, and 4-bit integers.
BLOCKWISE = 21
# Initializers up to this many elements may be shapes, axes or scales, whose values a conversion reads.
_SMALL = 1024


def opset_of(model: onnx.ModelProto) -> int:
    """The version of ONNX's own operators; 0 where the model imports none."""
    return max((entry.version for entry in model.opset_import if entry.domain in OWN), default=0)


def at_least_opset(graph: Graph, opset: int) -> Graph:
    """The graph in that opset, where its own is older. Its weights are not looked at, so they may be of any size.

    Raises:
        InputRefused: onnx cannot convert it.
    """
    import onnx
    from onnx import version_converter

    current = opset_of(graph.model)
    if current >= opset:
        return graph
    light, heavy = without_weights(graph.model)
    try:
        model = version_converter.convert_version(light, opset)
        if any(has_subgraph(node) for node in model.graph.node):
            onnx.checker.check_model(model, full_check=True)  # the converter does not go into subgraphs
    except (version_converter.ConvertError, onnx.checker.ValidationError, RuntimeError, ValueError) as error:
        raise InputRefused(
            f"the graph has opset {current}, {opset} is needed, and onnx cannot convert it: {first_line(error)}",
            hint=f"export it again with opset {opset} or newer",
        ) from error
    raise_ir_version(model)
    del model.graph.value_info[:]  # types as they were, which a method may be about to change
    constants_to_initializers(model)  # the converter writes axes and the like as nodes
    put_back(model, heavy)
    return graph.with_model(model)


def without_weights(model: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, onnx.TensorProto]]:
    """A copy whose large initializers have become inputs, and these initializers by name, which are not copied.

    It is what version conversion and shape inference need, and small enough for them, who serialize a model.
    """
    from onnx import ModelProto, TensorProto, helper

    heavy = {
        tensor.name: tensor
        for tensor in model.graph.initializer
        if math.prod(tensor.dims) > _SMALL and tensor.data_type != TensorProto.STRING
    }
    light = ModelProto()
    copy_fields(model, light, without="graph")
    copy_fields(model.graph, light.graph, without="initializer")
    light.graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name not in heavy)
    inputs = {value.name for value in light.graph.input}
    light.graph.input.extend(
        helper.make_tensor_value_info(name, tensor.data_type, tensor.dims)
        for name, tensor in heavy.items()
        if name not in inputs
    )
    return light, heavy


def put_back(model: onnx.ModelProto, heavy: dict[str, onnx.TensorProto]) -> None:
    """Undoes `without_weights`, of a graph whose initializers are no inputs, as `simplify` leaves it. In place."""
    for index in reversed(range(len(model.graph.input))):
        if model.graph.input[index].name in heavy:
            del model.graph.input[index]
    model.graph.initializer.extend(heavy.values())


def import_domain(model: onnx.ModelProto, domain: str) -> None:
    """Declares the operators of a domain other than ONNX's own, in its first version. In place."""
    from onnx import helper

    if not any(entry.domain == domain for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid(domain, 1))


def raise_ir_version(model: onnx.ModelProto) -> None:
    """The IR version that the opset asks for, where the model's is older. In place."""
    from onnx import helper

    standard = [helper.make_opsetid("", opset_of(model))]
    model.ir_version = max(model.ir_version, helper.find_min_ir_version_for(standard))
