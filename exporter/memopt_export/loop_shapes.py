"""Shapes inside Loop and Scan, and of what they return.

ONNX's inference says nothing of a loop's state, which might change its shape from turn to turn. Hardly any does: here a
state keeps the shape with which it begins, so that a body can be planned. What a loop collects turn by turn has no
known size, as the number of turns depends on values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from memopt.errors import InputRefused
from memopt_export.bodies import captured
from memopt_export.graph import attribute, has_fixed_shape

if TYPE_CHECKING:
    import onnx

_LOOP_CONTROL = 2  # the number of turns, and whether to go on, stand before a Loop's states
Infer = Callable[["onnx.ModelProto"], "onnx.ModelProto"]


def keep_state_shapes(model: onnx.ModelProto) -> bool:
    """Gives what loops return the shapes of the states they begin with; whether there was any to give. In place."""
    values = _values(model.graph)
    given = False
    for node in model.graph.node:
        for slot, name in loop_states(node):
            begins = values.get(name)
            returned = values.get(node.output[slot])
            if begins is None or not node.output[slot] or (returned is not None and has_fixed_shape(returned)):
                continue
            if has_fixed_shape(begins):
                returned = model.graph.input.add()
                returned.CopyFrom(begins)
                returned.name, node.output[slot] = node.output[slot], ""
                given = True
    return given


def infer_bodies(model: onnx.ModelProto, infer: Infer) -> None:
    """Infers the body of each loop anew, with the shapes of its states and of what it reads from around. In place."""
    values = _values(model.graph)
    for node in model.graph.node:
        for part in node.attribute:
            if node.op_type in ("Loop", "Scan") and part.HasField("g"):
                _infer_body(node, part.g, values, model, infer)


def loop_states(node: onnx.NodeProto) -> Iterator[tuple[int, str]]:
    """Of each state, the slot in which it comes out and the name with which it begins."""
    if node.op_type == "Loop":
        yield from enumerate(node.input[_LOOP_CONTROL:])
    elif node.op_type == "Scan":
        yield from enumerate(node.input[: len(node.input) - attribute(node, "num_scan_inputs", 0)])


def _infer_body(
    node: onnx.NodeProto, body: onnx.GraphProto, values: dict[str, onnx.ValueInfoProto], model: onnx.ModelProto,
    infer: Infer,
) -> None:  # fmt: skip
    inner = type(model)(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    inner.graph.CopyFrom(body)
    for value, outer, drops_first in _inputs(node, inner.graph):
        if outer in values and not has_fixed_shape(value):
            value.type.CopyFrom(values[outer].type)
            if drops_first:
                del value.type.tensor_type.shape.dim[0]
    read = set(captured(node)) - {value.name for value in inner.graph.input}
    constants = [tensor for tensor in model.graph.initializer if tensor.name in read]
    inner.graph.initializer.extend(constants)
    read -= {tensor.name for tensor in constants}
    inner.graph.input.extend(values[name] for name in sorted(read) if name in values)
    try:
        inferred = infer(inner)
    except InputRefused:  # the state does change its shape
        return
    infer_bodies(inferred, infer)
    body.CopyFrom(inferred.graph)


def _inputs(node: onnx.NodeProto, body: onnx.GraphProto) -> Iterator[tuple[onnx.ValueInfoProto, str, bool]]:
    """Of each input of the body, what it is outside, and whether it is one slice of that."""
    states = len(list(loop_states(node)))
    skipped = _LOOP_CONTROL if node.op_type == "Loop" else 0
    for slot, value in enumerate(body.input[skipped:]):
        if slot + skipped < len(node.input):
            yield value, node.input[slot + skipped], slot >= states


def _values(graph: onnx.GraphProto) -> dict[str, onnx.ValueInfoProto]:
    from onnx import helper

    values = {value.name: value for value in (*graph.output, *graph.value_info, *graph.input)}
    for tensor in graph.initializer:
        values[tensor.name] = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
    return values
