"""Where QuantizeLinear and DequantizeLinear stand, for each target.

- "cpu": ONNX Runtime computes a node in integers where Q/DQ stand around it, so they stand around every layer and
  around what lies between layers. What an integer kernel writes exists only as integers: all read it dequantized.
- "tensorrt": the builder fuses a layer with the float operations behind it, so Q/DQ stand before layers, and before one
  side of a residual Add; nowhere else.

In both, a node left in float has no Q/DQ of its own, and the graph's inputs and outputs stay float.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from memopt_export.graph import CAPTURED, Graph, Wiring, attribute, inner_layers, label, wire
from memopt_export.recipe import Recipe

if TYPE_CHECKING:
    import onnx

# (node, input slot)
Read = tuple[int, int]

# Operations with weights.
WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
# Operations that move values without changing them: their output has the range of their first input.
PASS_THROUGH = frozenset({
    "MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Gather", "Expand", "Tile",
})  # fmt: skip
# Operations without weights that ONNX Runtime computes in integers, where all their inputs are activations.
INTEGER_KERNELS = frozenset({"Add", "Mul", "AveragePool", "GlobalAveragePool", "Concat", "LeakyRelu", "Sigmoid"})


@dataclass(frozen=True)
class Layer:
    """A node whose weights become int8, with one scale for each output channel."""

    index: int
    axis: int  # of the weight, counting output channels


@dataclass(frozen=True)
class Placement:
    """Which tensors are quantized, and who reads the dequantized value.

    Attributes:
        form: for whom, and in which numbers: the recipe's.
        layers: in the graph's order.
        ranges_of: each quantized tensor, and the tensor whose range it takes.
        reads: the reads of a quantized tensor that go through Q/DQ; all others get the float value.
        outputs: the graph's outputs that are written in integers, so through Q/DQ too.
        guarded: float nodes with weights that read what was quantized for others.
        kept_float: names of all float nodes with weights.
    """

    form: str
    layers: tuple[Layer, ...]
    ranges_of: dict[str, str]
    reads: frozenset[Read]
    outputs: frozenset[str]
    guarded: frozenset[int]
    kept_float: tuple[str, ...]

    @property
    def tensors(self) -> tuple[str, ...]:
        """The tensors to calibrate."""
        return tuple(dict.fromkeys(self.ranges_of.values()))


def place(graph: Graph, recipe: Recipe) -> Placement:
    """Where Q/DQ go for the recipe's target, with the nodes that it keeps float left alone.

    Nodes inside If, Loop and Scan stay float, and what these read from around them is there under its name.
    """
    wiring = wire(graph.model)
    kept = frozenset(i for i, node in enumerate(wiring.nodes) if recipe.excludes(label(node), node.op_type))
    layers = {
        index: Layer(index, axis)
        for index, node in enumerate(wiring.nodes)
        if index not in kept
        and recipe.includes(label(node), node.op_type)
        and (axis := _channel_axis(node, wiring)) is not None
    }
    reads, outputs = PLACES[recipe.form](wiring, layers, kept)
    quantized = {wiring.nodes[index].input[slot] for index, slot in reads} | outputs
    floats = [i for i, node in enumerate(wiring.nodes) if has_weight(node, wiring) and i not in layers]
    return Placement(
        recipe.form,
        tuple(layers.values()),
        {
            tensor: _origin(tensor, wiring)
            for tensor in sorted(quantized, key=lambda name: (wiring.writer.get(name, -1), name))
        },
        frozenset(reads),
        frozenset(outputs),
        frozenset(index for index in floats if (index, 0) in reads),
        (*(label(wiring.nodes[index]) for index in floats), *inner_layers(graph.model, WEIGHTED)),
    )


def has_weight(node: onnx.NodeProto, wiring: Wiring) -> bool:
    """Whether the node multiplies an activation with a constant weight."""
    if node.op_type not in WEIGHTED:
        return False
    return wiring.is_constant(node.input[1]) and not wiring.is_constant(node.input[0])


def is_plain_gemm(node: onnx.NodeProto) -> bool:
    """Whether a Gemm has no factors and reads its first input as it is."""
    factors = attribute(node, "alpha", 1.0), attribute(node, "beta", 1.0)
    return bool(factors == (1, 1) and not attribute(node, "transA", 0))


# --- layers


def _channel_axis(node: onnx.NodeProto, wiring: Wiring) -> int | None:
    """The weight's axis of output channels; None for what has no integer kernel, which stays in float."""
    if node.op_type not in _CHANNEL_AXES or not has_weight(node, wiring):
        return None
    weight = wiring.initializers.get(node.input[1])
    axis = _CHANNEL_AXES[node.op_type](node, len(weight.dims)) if weight and _is_float32(weight) else None
    if weight is None or axis is None or len(node.input) < 3 or not node.input[2]:
        return axis
    bias = wiring.initializers.get(node.input[2])
    return axis if bias and _is_float32(bias) and list(bias.dims) == [weight.dims[axis]] else None


def _is_float32(tensor: onnx.TensorProto) -> bool:
    from onnx import TensorProto

    return tensor.data_type == TensorProto.FLOAT


def _conv_axis(_node: onnx.NodeProto, _rank: int) -> int:
    return 0


def _gemm_axis(node: onnx.NodeProto, _rank: int) -> int | None:
    """None where factors or a transposed input leave the integer kernel's ground."""
    return (0 if attribute(node, "transB", 0) else 1) if is_plain_gemm(node) else None


def _matmul_axis(_node: onnx.NodeProto, rank: int) -> int | None:
    return 1 if rank == 2 else None


_CHANNEL_AXES: dict[str, Callable[[onnx.NodeProto, int], int | None]] = {
    "Conv": _conv_axis,
    "Gemm": _gemm_axis,
    "MatMul": _matmul_axis,
}


def _origin(tensor: str, wiring: Wiring) -> str:
    """The tensor that pass-through operations made this one from; itself, where another operation wrote it."""
    writer = wiring.writer.get(tensor)
    if writer is None or not _passes_through(wiring.nodes[writer], wiring):
        return tensor
    return _origin(wiring.nodes[writer].input[0], wiring)


def _passes_through(node: onnx.NodeProto, wiring: Wiring) -> bool:
    return node.op_type in PASS_THROUGH and not wiring.is_constant(node.input[0])


# --- ONNX Runtime's CPU kernels


def _place_on_cpu(wiring: Wiring, layers: Collection[int], kept: Collection[int]) -> tuple[set[Read], set[str]]:
    """Around every node computed in integers. Float nodes read dequantized values only of what integer nodes write."""
    integer, wanted = _integer_nodes(wiring, layers, kept)
    written = wanted & {_written_by(index, wiring) for index in integer}
    reads = {
        (index, slot)
        for tensor in wanted
        for index, slot in wiring.readers.get(tensor, ())
        if slot != CAPTURED and (tensor in written or index in integer)
    }
    return reads, written & wiring.outputs


def _integer_nodes(wiring: Wiring, layers: Collection[int], kept: Collection[int]) -> tuple[set[int], set[str]]:
    """The nodes to compute in integers, and the tensors that they want quantized, found from the outputs backwards.

    1. A layer wants its input. A convolution wants its output too: it has no kernel from integers to float.
    2. Other operations take part where somebody wants their output.
    """
    integer: set[int] = set()
    wanted: set[str] = set()
    for index in reversed(range(len(wiring.nodes))):
        node = wiring.nodes[index]
        if index in layers:
            inputs = [node.input[0]]
            wanted.update({_written_by(index, wiring)} if node.op_type == "Conv" else ())
        elif _written_by(index, wiring) in wanted and index not in kept:
            inputs = _activations(node, wiring)
        else:
            continue
        if inputs:
            integer.add(index)
            wanted.update(inputs)
    return integer, wanted


def _activations(node: onnx.NodeProto, wiring: Wiring) -> list[str]:
    """The inputs to quantize for a node without weights; none where it has no integer kernel for what it reads."""
    if _passes_through(node, wiring):
        return [node.input[0]]
    if node.op_type in INTEGER_KERNELS and not any(wiring.is_constant(name) for name in node.input):
        return list(node.input)
    return []


def _written_by(index: int, wiring: Wiring) -> str:
    """The tensor that the node's kernel writes: its output, or that of the Relu or Clip which the kernel absorbs."""
    written: str = wiring.nodes[index].output[0]
    reader = wiring.sole_reader(written)
    if reader is None or wiring.nodes[index].op_type in PASS_THROUGH or not is_absorbed(wiring.nodes[reader], wiring):
        return written
    return str(wiring.nodes[reader].output[0])


def is_absorbed(node: onnx.NodeProto, wiring: Wiring) -> bool:
    """Whether saturation at the integers' ends does what the node does: Relu, or Clip from zero to a constant."""
    if node.op_type == "Relu":
        return True
    if node.op_type != "Clip" or not all(name in wiring.initializers for name in node.input[1:] if name):
        return False
    low, high = (wiring.scalar(name) for name in [*node.input[1:], "", ""][:2])
    return low == 0 and (high is None or high > 0)


# --- TensorRT


def _place_for_tensorrt(wiring: Wiring, layers: Collection[int], kept: Collection[int]) -> tuple[set[Read], set[str]]:
    """Before every layer, and before the other side of an Add whose one side is a convolution."""
    reads = {(index, 0) for index in layers}
    for index, node in enumerate(wiring.nodes):
        side = _residual_side(node, wiring, layers) if node.op_type == "Add" and index not in kept else None
        if side is not None:
            reads.add((index, side))
    return reads, set()


def _residual_side(add: onnx.NodeProto, wiring: Wiring, layers: Collection[int]) -> int | None:
    """The input slot to quantize, so that the Add is fused into the convolution (the later one of two) on the other.

    None where no convolution writes for the Add alone, or where something constant is added.
    """
    convs = {
        wiring.writer[name]: slot
        for slot, name in enumerate(add.input)
        if wiring.writer.get(name) in layers and wiring.sole_reader(name) is not None
    }
    convs = {writer: slot for writer, slot in convs.items() if wiring.nodes[writer].op_type == "Conv"}
    return 1 - convs[max(convs)] if convs and not any(wiring.is_constant(name) for name in add.input) else None


PLACES: dict[str, Callable[[Wiring, Collection[int], Collection[int]], tuple[set[Read], set[str]]]] = {
    "cpu": _place_on_cpu,
    "tensorrt": _place_for_tensorrt,
    "fp8": _place_for_tensorrt,
}
