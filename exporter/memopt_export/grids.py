"""The graph of a network whose weights were trained to stand on grids: it stores them as the integers that they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from memopt.errors import InputRefused
from memopt.tensors import Array
from memopt_export.graph import Graph, set_nodes
from memopt_export.opset import BLOCKWISE, at_least_opset
from memopt_export.simplify import drop_unused_initializers, merge_equal_initializers
from memopt_models.checkpoint import Checkpoint

if TYPE_CHECKING:
    import onnx
    import torch
    from torch import nn

# The first opset with integers of 2 bits.
_TWO_BITS = 25


def store_integers(graph: Graph, checkpoint: Checkpoint, module: nn.Module) -> Graph:
    """The graph with integers of 2, 4 or 8 bits, each behind a DequantizeLinear; it computes the same, up to rounding.

    Args:
        graph: of `module`, in float32.
        checkpoint: trained to be rounded by `memopt_models.ste`.
        module: what `memopt_models.qat.deployed` makes of it.

    Raises:
        InputRefused: a tensor that was rounded is not in the graph.
    """
    bits = checkpoint.quantization["bits"]
    raised = at_least_opset(graph, _TWO_BITS if 2 in bits.values() else BLOCKWISE)
    model = raised.copy_model()
    places = _places(model, {name: _array(module.get_parameter(name)) for name in bits})
    before: dict[str, onnx.NodeProto] = {}
    for name, (tensor, turned) in places.items():
        step = _array(checkpoint.scales[name]).reshape(-1)
        _replace(model, tensor, step, bits[name], axis=int(turned))
        before[tensor] = _dequantize(tensor, per_channel=len(step) > 1, axis=int(turned))
    set_nodes(model.graph, list(_with_dequantizers(model, before)))
    drop_unused_initializers(model)
    merge_equal_initializers(model)
    weights = min(number for name, number in bits.items() if not name.endswith(".bias"))
    return raised.with_model(model, precision=f"int{weights}-weights")


def _places(model: onnx.ModelProto, wanted: dict[str, Array]) -> dict[str, tuple[str, bool]]:
    """For each wanted tensor the initializer that holds it, found by its content, and whether that is transposed.

    Equal tensors share an initializer, and zeros may have none: a bias of zeros adds nothing.
    """
    from onnx import numpy_helper

    held = {}
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        held[array.dtype.str, array.shape, array.tobytes()] = tensor.name
    places: dict[str, tuple[str, bool]] = {}
    for name, array in wanted.items():
        forms = (array, np.ascontiguousarray(array.T)) if array.ndim == 2 else (array,)
        found = [held.get((form.dtype.str, form.shape, form.tobytes())) for form in forms]
        if not any(found) and array.any():
            raise InputRefused(f"the graph does not have {name!r} as it was trained, so it cannot be stored rounded")
        taken = {tensor for tensor, _ in places.values()}
        new = [(tensor, turned) for turned, tensor in enumerate(found) if tensor and tensor not in taken]
        places.update((name, (tensor, bool(turned))) for tensor, turned in new[:1])
    return places


def _replace(model: onnx.ModelProto, name: str, step: Array, bits: int, *, axis: int) -> None:
    """Integers and their steps for the initializer of this name. In place."""
    from onnx import TensorProto, numpy_helper

    index = next(i for i, tensor in enumerate(model.graph.initializer) if tensor.name == name)
    weight = numpy_helper.to_array(model.graph.initializer[index])
    along = step.reshape([-1 if each == axis else 1 for each in range(weight.ndim)]) if len(step) > 1 else step
    integers = np.rint(weight / along).astype(np.int8)
    types = {2: TensorProto.INT2, 4: TensorProto.INT4, 8: TensorProto.INT8}
    stored = TensorProto(name=_integers(name), data_type=types[bits], dims=weight.shape)
    stored.raw_data = _pack(integers.reshape(-1).view(np.uint8), bits).tobytes()
    del model.graph.initializer[index]
    scale = step if len(step) > 1 else step.reshape(())
    model.graph.initializer.extend([stored, numpy_helper.from_array(scale, _step(name))])


def _pack(integers: Array, bits: int) -> Array:
    """Integers side by side in bytes, the first one in the lowest bits.

    >>> _pack(np.uint8([1, 0, 2, 3, 1]), 2).tolist(), _pack(np.uint8([0xFF, 1]), 4).tolist()
    ([225, 1], [31])
    """
    in_a_byte = 8 // bits
    values = np.concatenate([integers, np.zeros(-len(integers) % in_a_byte, np.uint8)]) & (2**bits - 1)
    shifted = values.reshape(-1, in_a_byte) << np.arange(0, 8, bits)
    packed: Array = np.bitwise_or.reduce(shifted, axis=1).astype(np.uint8)
    return packed


def _dequantize(tensor: str, *, per_channel: bool, axis: int) -> onnx.NodeProto:
    from onnx import helper

    node = helper.make_node(
        "DequantizeLinear", [_integers(tensor), _step(tensor)], [tensor], name=f"{tensor}.dequantize"
    )
    if per_channel:
        node.attribute.append(helper.make_attribute("axis", axis))
    return node


def _with_dequantizers(model: onnx.ModelProto, before: dict[str, onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """All nodes, each dequantizer right before the first that reads it."""
    waiting = dict(before)
    for node in model.graph.node:
        for name in node.input:
            if name in waiting:
                yield waiting.pop(name)
        yield node


def _integers(tensor: str) -> str:
    return f"{tensor}.integers"


def _step(tensor: str) -> str:
    return f"{tensor}.step"


def _array(tensor: torch.Tensor) -> Array:
    array: Array = tensor.detach().cpu().numpy()
    return array
