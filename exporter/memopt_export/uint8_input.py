"""A graph that takes uint8 pictures: what makes numbers of them is inside, in the first convolution where it can be.

The steps scale and normalize compute (x - shift) * gain for each channel. In the graph, after a Cast:

1. The gain goes into the weights of the convolutions that read the input, where nothing else does.
2. The shift goes into their biases, where they pad nothing. Zeros that are padded stand for the mean, which is no
   integer in the picture: there one Sub stays, ahead of the padding.
3. Where the input goes elsewhere, Sub and Mul stay.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from memopt.errors import AnswerIsNo, InputRefused
from memopt.preprocess import split_steps, without_numbers
from memopt.tensors import Array
from memopt_export import compact as compacting
from memopt_export import from_torch
from memopt_export.from_torch import Exported
from memopt_export.graph import Graph, attribute, set_nodes, wire
from memopt_export.patches import pads
from memopt_export.simplify import drop_unused_initializers, rename_reads
from memopt_models.feed import Arithmetic
from memopt_models.trace import quiet, trace

if TYPE_CHECKING:
    import onnx
    import torch

Step = Mapping[str, Any]


def with_uint8_input(exported: Exported, pictures: Array, samples: Array, *, compact: bool = False) -> Exported:
    """The same network for pictures, its graph and its program; parity with torch is proved anew.

    Args:
        exported: a graph that knows its preprocessing.
        pictures: uint8, what is left of the preprocessing makes them: (n, channels, height, width).
        samples: the same, float32 as the network took them.
        compact: whether the graph is brought to few bytes, see `compact.compact`.

    Raises:
        InputRefused: there is no preprocessing that could be taken in.
        AnswerIsNo: the graph's outputs are not torch's.
    """
    import torch

    graph = take_pictures(exported.graph)
    if compact:
        graph = compacting.compact(graph)
    network = torch.export.load(io.BytesIO(exported.program)).module()
    with torch.inference_mode():
        expected = network(torch.from_numpy(np.ascontiguousarray(samples))).numpy()
    parity = from_torch.prove_parity(graph, pictures, expected, rounded=exported.parity.noise is not None)
    if not parity.holds:
        raise AnswerIsNo(f"with uint8 input the graph differs from torch by {parity.max_difference:.3g}")
    _, numbers = split_steps(exported.graph.preprocess or ())
    with quiet():
        program = trace(_prepared(network, numbers), torch.from_numpy(pictures[:2].copy()), "the network")
    return Exported(graph, parity, from_torch.serialize(program, graph))


def take_pictures(graph: Graph) -> Graph:
    """The graph with uint8 input, and with the preprocessing that is left.

    Raises:
        InputRefused: it has no one float input, or does not know how it is prepared.
    """
    import onnx

    steps = graph.preprocess or ()
    _, numbers = split_steps(steps)
    if not any(step["op"] in ("scale", "normalize") for step in numbers):
        raise InputRefused("nothing makes numbers of this network's pictures", hint="without --uint8-input")
    if [spec.dtype for spec in graph.inputs] != ["float32"]:
        raise InputRefused(f"uint8 input needs one float32 input, the graph has {graph.inputs}")
    model = graph.copy_model()
    value = next(value for value in model.graph.input if value.name == graph.inputs[0].name)
    value.type.tensor_type.elem_type = onnx.TensorProto.UINT8
    axis = 1 if any(step["op"] == "layout" for step in numbers) else len(graph.inputs[0].shape) - 1
    affine = _affine(numbers, channels=_channels(graph.inputs[0].shape[axis]))
    _prepend(model, value.name, affine, axis=axis, rank=len(graph.inputs[0].shape))
    return replace(graph.with_model(model), preprocess=without_numbers(steps))


@dataclass(frozen=True)
class _Affine:
    """(x - shift) * gain, float64 of each channel."""

    shift: Array
    gain: Array


def _channels(size: int | str) -> int:
    if not isinstance(size, int):
        raise InputRefused(f"the number of channels is free, {size!r}")
    return size


def _affine(steps: Sequence[Step], *, channels: int) -> _Affine:
    """What the steps come to.

    >>> _affine([{"op": "scale", "factor": 0.5}, {"op": "normalize", "mean": [2.0], "std": [4.0]}], channels=1)
    _Affine(shift=array([4.]), gain=array([0.125]))
    """
    gain, offset = np.ones(channels), np.zeros(channels)
    for step in steps:
        if step["op"] == "scale":
            gain, offset = gain * step["factor"], offset * step["factor"]
        if step["op"] == "normalize":
            gain, offset = gain / step["std"], (offset - step["mean"]) / np.asarray(step["std"])
    if not gain.all():
        raise InputRefused("the preprocessing multiplies by zero")
    return _Affine(0.0 - offset / gain, gain)


def _prepend(model: onnx.ModelProto, name: str, affine: _Affine, *, axis: int, rank: int) -> None:
    """Puts Cast, and what of the arithmetic cannot be taken in by convolutions, between the input and its readers."""
    from onnx import TensorProto, helper, numpy_helper

    convolutions = _only_readers(model, name) if axis == 1 else []
    gained = bool(convolutions)
    shifted = gained and not any(pads(conv) for conv in convolutions)
    for conv in convolutions:
        _take_in(model, conv, affine, bias=shifted)
    last, nodes = f"{name}.float", [helper.make_node("Cast", [name], [f"{name}.float"], to=TensorProto.FLOAT)]
    left = (("Sub", affine.shift, not shifted and affine.shift.any()), ("Mul", affine.gain, not gained))
    shape = [-1, *[1] * (rank - 1 - axis)]
    for operator, values, stays in left:
        if stays:
            constant, result = f"{name}.{operator.lower()}", f"{name}.after_{operator.lower()}"
            array = values.astype(np.float32).reshape(shape)
            model.graph.initializer.append(numpy_helper.from_array(array, constant))
            nodes.append(helper.make_node(operator, [last, constant], [result]))
            last = result
    rename_reads(model, {name: last})
    set_nodes(model.graph, [*nodes, *model.graph.node])
    drop_unused_initializers(model)


def _only_readers(model: onnx.ModelProto, name: str) -> list[onnx.NodeProto]:
    """The convolutions with float32 weights that read the tensor; none where something else does, too."""
    from onnx import TensorProto

    wiring = wire(model)
    reads = wiring.readers.get(name, ())
    nodes = [wiring.nodes[index] for index, slot in reads if slot == 0]
    weights = [wiring.initializers.get(weight) for node in nodes for weight in node.input[1:] if weight]
    plain = all(weight is not None and weight.data_type == TensorProto.FLOAT for weight in weights)
    alone = len(nodes) == len(reads) and name not in wiring.outputs
    return nodes if plain and alone and all(node.op_type == "Conv" for node in nodes) else []


def _take_in(model: onnx.ModelProto, conv: onnx.NodeProto, affine: _Affine, *, bias: bool) -> None:
    """Gives the convolution weights, and a bias, of its own; computed in float64."""
    from onnx import numpy_helper

    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    weight = numpy_helper.to_array(initializers[conv.input[1]]).astype(np.float64)
    outputs, inputs = weight.shape[:2]
    group = np.arange(outputs) // (outputs // attribute(conv, "group", 1))
    channels = group[:, None] * inputs + np.arange(inputs)  # (outputs, inputs): which channel each weight reads
    ones = [1] * (weight.ndim - 2)
    weight *= affine.gain[channels].reshape(outputs, inputs, *ones)
    made = {f"{conv.output[0]}.uint8_weight": weight}
    if bias:
        old = initializers.get(conv.input[2]) if len(conv.input) > 2 else None
        added = numpy_helper.to_array(old).astype(np.float64) if old is not None else 0.0
        sums = weight.sum(axis=tuple(range(2, weight.ndim)))
        made[f"{conv.output[0]}.uint8_bias"] = added - (sums * affine.shift[channels]).sum(axis=1)
    model.graph.initializer.extend(numpy_helper.from_array(v.astype(np.float32), name) for name, v in made.items())
    kept = conv.input[2:] if not bias else []
    names = [conv.input[0], *made, *kept]
    del conv.input[:]
    conv.input.extend(names)


def _prepared(network: torch.nn.Module, steps: Sequence[Step]) -> torch.nn.Module:
    """The network behind the arithmetic of the steps, for pictures whose channels stand where it expects them."""
    import torch

    class Prepared(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network
            axis = -3 if any(step["op"] == "layout" for step in steps) else -1
            arithmetic = Arithmetic(steps, axis=axis)
            self.names = [name for name, _ in arithmetic.operations]
            for index, (_, operand) in enumerate(arithmetic.operations):
                self.register_buffer(f"operand{index}", operand)

        def forward(self, pictures: torch.Tensor) -> torch.Tensor:
            numbers = pictures.float()
            for index, name in enumerate(self.names):
                numbers = getattr(numbers, name)(self.get_buffer(f"operand{index}"))
            answer: torch.Tensor = self.network(numbers)
            return answer

    return Prepared()
