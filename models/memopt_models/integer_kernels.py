"""Where a network computes in integers, on its traced graph: what PT2E's fake quantization stands around.

The places are those of the exporter's own quantizer, so that all that is trained to be rounded is fused:

- "cpu": ONNX Runtime computes a node in integers where Q/DQ stand around it. So both sides of a residual Add are
  quantized, each convolution's output on its own, and what the Add and its Relu write; nothing between a convolution
  and the Relu or ReLU6 that its kernel absorbs.
- "tensorrt": the builder fuses a layer with the float operations behind it, so Q/DQ stand before layers, and before one
  side of a residual Add; nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.fx import Graph, Node

CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})
LAYERS = CONVOLUTIONS | {"linear"}
# Operations that move values without changing them: their output has the range of their input.
PASS_THROUGH = frozenset({
    "max_pool2d", "view", "reshape", "flatten", "permute", "transpose", "squeeze", "unsqueeze", "slice", "select",
    "expand", "clone",
})  # fmt: skip
# Operations without weights that ONNX Runtime computes in integers, where all their inputs are activations; how many
# inputs they have, or that these are a list.
_LIST = -1
_INTEGER_KERNELS = {"add": 2, "mul": 2, "avg_pool2d": 1, "cat": _LIST, "leaky_relu": 1, "sigmoid": 1}


@dataclass(frozen=True)
class Places:
    """What is quantized in a graph.

    Attributes:
        written: nodes whose output exists only in integers; all read it dequantized.
        reads: (node, reader): of other tensors, the reads that are quantized on their own.
        origins: nodes whose output takes the range of another node's output, and that one.
    """

    written: frozenset[Node]
    reads: tuple[tuple[Node, Node], ...]
    origins: dict[Node, Node]


def operation(node: Node) -> str:
    """The name of the operation that a node calls, such as "conv2d"; "" for inputs, weights and the output."""
    if node.op != "call_function":
        return ""
    packet = getattr(node.target, "overloadpacket", node.target)
    return str(getattr(packet, "__name__", packet))


def argument(node: Node, position: int) -> Any:
    """What the node is called with at a position, often a Node; None where it is given nothing."""
    return node.args[position] if position < len(node.args) else None


def is_layer(node: Node) -> bool:
    """Whether the node multiplies an activation with a weight of the network."""
    return operation(node) in LAYERS and is_stored(node.args[1]) and not is_stored(node.args[0])


def is_stored(value: Any) -> bool:
    """Whether an argument is a weight, a buffer or a number, rather than an activation."""
    return getattr(value, "op", "get_attr") == "get_attr"


# --- ONNX Runtime's CPU kernels


def _place_on_cpu(graph: Graph) -> Places:
    """Around every node computed in integers. Float nodes read dequantized values only of what integer nodes write."""
    integer, wanted = _integer_nodes(graph)
    written = wanted & {_written_by(node) for node in integer}
    reads = tuple((tensor, node) for node in integer for tensor in _activations(node) if tensor not in written)
    return Places(frozenset(written), reads, {each: _origin(each) for each in wanted if _passes_through(each)})


def _integer_nodes(graph: Graph) -> tuple[list[Node], set[Node]]:
    """The nodes to compute in integers, and those whose outputs they want quantized, found from the output backwards.

    1. A layer wants its input. A convolution wants its output too: it has no kernel from integers to float.
    2. Other operations take part where somebody wants their output.
    """
    integer: list[Node] = []
    wanted: set[Node] = set()
    for node in reversed(graph.nodes):
        if not _activations(node) or not (is_layer(node) or _written_by(node) in wanted):
            continue
        integer.append(node)
        wanted.update(_activations(node))
        if operation(node) in CONVOLUTIONS:
            wanted.add(_written_by(node))
    return integer[::-1], wanted


def _activations(node: Node) -> list[Node]:
    """The tensors that the node's integer kernel reads; none where it has no kernel for them."""
    if is_layer(node) or _passes_through(node):
        return [argument(node, 0)]
    operands = _INTEGER_KERNELS.get(operation(node))
    read: Any = () if operands is None else argument(node, 0) if operands == _LIST else node.args[:operands]
    return [] if any(is_stored(each) for each in read) else list(dict.fromkeys(read))


def _passes_through(node: Node) -> bool:
    return operation(node) in PASS_THROUGH and not is_stored(node.args[0])


def _origin(node: Node) -> Node:
    """The node whose values operations that pass them through have made this one's from."""
    return _origin(argument(node, 0)) if _passes_through(node) else node


def _written_by(node: Node) -> Node:
    """The node whose output the kernel writes: this one, or the Relu or Clip which the kernel absorbs."""
    readers = list(node.users)
    absorbed = len(readers) == 1 and not _passes_through(node) and _is_absorbed(readers[0])
    return readers[0] if absorbed else node


def _is_absorbed(node: Node) -> bool:
    """Whether saturation at the integers' ends does what the node does: relu, or a clip from zero."""
    if operation(node) in ("hardtanh", "clamp"):
        return bool(argument(node, 1) == 0)
    return operation(node) in ("relu", "relu6")


# --- TensorRT


def _place_for_tensorrt(graph: Graph) -> Places:
    """Before every layer, and before the other side of an Add whose one side is a convolution."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    layers = [(argument(node, 0), node) for node in graph.nodes if is_layer(node)]
    sides = [(_residual_side(node, order), node) for node in graph.nodes if operation(node) == "add"]
    return Places(frozenset(), (*layers, *((side, add) for side, add in sides if side is not None)), {})


def _residual_side(add: Node, order: Mapping[Node, int]) -> Node | None:
    """What to quantize, so that the Add is fused into the convolution (the later one of two) on the other side.

    None where no convolution writes for the Add alone, or where something constant is added.
    """
    sides = [argument(add, 0), argument(add, 1)]
    if any(is_stored(side) for side in sides) or sides[0] is sides[1]:
        return None
    convs = [side for side in sides if operation(side) in CONVOLUTIONS and len(side.users) == 1]
    fused = max(convs, key=lambda conv: order[conv], default=None)
    return None if fused is None else sides[1 - sides.index(fused)]


PLACES: dict[str, Callable[[Graph], Places]] = {"cpu": _place_on_cpu, "tensorrt": _place_for_tensorrt}
