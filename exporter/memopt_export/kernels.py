"""What kernels of ONNX Runtime's CPU provider do with memory: where they write, and what they need while they run.

Read off version 1.31.1 by tracing its allocations, one operator at a time (test_kernels.py does so again), with arena,
the reuse of buffers between nodes, and laying out ahead all off. Small things are left out: a kernel's books, and the
frame of a run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from memopt.tensors import TensorSpec
from memopt_export.graph import attribute
from memopt_export.twins import kernel_of

if TYPE_CHECKING:
    import onnx

# Their output is their first input under another shape.
VIEWS = frozenset({"Reshape", "Flatten", "Identity", "Squeeze", "Unsqueeze"})
# They write over this input where nothing else reads it and the output is as large.
_IN_PLACE = {
    **dict.fromkeys(
        ("Relu", "Clip", "Sigmoid", "Tanh", "Elu", "LeakyRelu", "HardSigmoid", "Selu", "Softplus", "Softsign",
         "ThresholdedRelu", "Softmax", "LogSoftmax", "Trilu", "Cast"), 0,
    ),
    "FusedConv": 3,  # the sum that is added to the convolution
    "nchwc.Conv": 3,
}  # fmt: skip
_CONV_BYTES_PER_THREAD = 64 * 2**10  # in which MLAS lays out a piece of the input
_POINTER_BYTES = 8
_PACKED_CHANNELS = 4  # of 8 bits that one lane of a register multiplies together


@dataclass(frozen=True)
class Call:
    """A node with what is known of its tensors when it runs."""

    node: onnx.NodeProto
    specs: Mapping[str, TensorSpec]
    threads: int

    def dims(self, name: str) -> tuple[int, ...]:
        """The tensor's shape; empty where it is not known."""
        spec = self.specs.get(name)
        return tuple(dim for dim in spec.shape if isinstance(dim, int)) if spec is not None else ()

    def size_bytes(self, name: str) -> int:
        """The tensor's bytes; 0 where they are not known."""
        spec = self.specs.get(name)
        return spec.nbytes(1) if spec is not None else 0


def overwritten(node: onnx.NodeProto) -> str | None:
    """The input over which the node writes where it may."""
    slot = _IN_PLACE.get(kernel_of(node))
    return node.input[slot] if slot is not None and slot < len(node.input) and node.input[slot] else None


def scratch_bytes(call: Call) -> int:
    """What the kernel takes beside its output while it runs; 0 for those that take nothing, or are not known."""
    need = _SCRATCH.get(kernel_of(call.node))
    return need(call) if need is not None and call.dims(call.node.output[0]) else 0


def _output(call: Call) -> int:
    return call.size_bytes(call.node.output[0])


def _gelu_of_sum(call: Call) -> int:
    """The sum with the bias, of which the function is taken."""
    return _output(call) if len(call.node.input) > 1 and call.node.input[1] else 0


def _softmax(call: Call) -> int:
    """Along any other axis than the last, the input and the output are transposed."""
    rank = len(call.dims(call.node.input[0]))
    return 0 if attribute(call.node, "axis", -1) in (-1, rank - 1) else 2 * _output(call)


def _lrn(call: Call) -> int:
    """The scale, and the squares of one sample with room around its channels."""
    samples, channels, *_ = call.dims(call.node.input[0])
    size: int = attribute(call.node, "size", 1)
    squares = _output(call) // samples * (channels + size - 1) // channels
    return _output(call) + squares


def _is_pointwise(call: Call, kernel: tuple[int, ...]) -> bool:
    moves = (*attribute(call.node, "strides", [1]), *(1 + pad for pad in attribute(call.node, "pads", [0])))
    return math.prod(kernel) == 1 and set(moves) == {1}


def _conv(call: Call) -> int:
    """Pieces of the input as columns, in each thread; a pointwise convolution is a product of what lies there."""
    pointwise = _is_pointwise(call, call.dims(call.node.input[1])[2:])
    return 0 if pointwise else call.threads * _CONV_BYTES_PER_THREAD


def _conv_transpose(call: Call) -> int:
    """The columns of one sample."""
    _, out_channels, *kernel = call.dims(call.node.input[1])
    return 4 * out_channels * math.prod(kernel) * math.prod(call.dims(call.node.input[0])[2:])


def _qlinear_conv(call: Call) -> int:
    """With channels in front, one sample at a time is transposed and back.

    Beside that it takes
    1. nothing, for a pointwise convolution of as many channels as registers take,
    2. pointers to all that is read, for others of so many, and for one channel a group,
    3. copies of what one sample's outputs read, and their sums in 32 bits.
    """
    out_channels, in_channels, *kernel = call.dims(call.node.input[3])
    groups, last = attribute(call.node, "group", 1), attribute(call.node, "channels_last", 0)
    in_dims, out_dims = call.dims(call.node.input[0]), call.dims(call.node.output[0])
    pixels = math.prod(out_dims[1:-1] if last else out_dims[2:])
    transposed = 0 if last else math.prod(in_dims[1:]) + math.prod(out_dims[1:])
    pointwise, taps = _is_pointwise(call, tuple(kernel)), math.prod(kernel)
    depthwise = groups > 1 and in_channels == 1 and out_channels == groups
    if depthwise or (groups == 1 and in_channels % _PACKED_CHANNELS == 0):
        together = out_dims[0] if last else 1
        return transposed + (0 if pointwise else taps * pixels * together * _POINTER_BYTES)  # 1, 2
    return transposed + 4 * out_channels * pixels + (0 if pointwise else taps * in_channels * pixels)  # 3


def _nhwc_pool(call: Call) -> int:
    """Pointers to what one sample's outputs read."""
    taps: int = math.prod(attribute(call.node, "kernel_shape", [1]))
    return taps * math.prod(call.dims(call.node.output[0])[1:-1]) * _POINTER_BYTES


def _conv_integer(call: Call) -> int:
    """The columns of one sample."""
    _, in_channels, *kernel = call.dims(call.node.input[1])
    if _is_pointwise(call, tuple(kernel)):
        return 0
    return in_channels * math.prod(kernel) * math.prod(call.dims(call.node.output[0])[2:])


def _sums(call: Call) -> int:
    """The product in 32 bits, before it is rounded to 8."""
    return 4 * math.prod(call.dims(call.node.output[0]))


def _quantized_input(call: Call) -> int:
    return math.prod(call.dims(call.node.input[0]))


def _nbits(call: Call) -> int:
    """The input in 8 bits with a scale and a sum for each block, where integers are multiplied."""
    if attribute(call.node, "accuracy_level", 0) != 4:
        return 0
    elements = _quantized_input(call)
    block: int = attribute(call.node, "block_size", 32)
    return elements + 8 * math.ceil(elements / block)


def _recurrent(call: Call) -> int:
    """The gates' products with the input, of all steps at once, in each direction."""
    directions, rows, _ = call.dims(call.node.input[1])
    steps, samples, *_ = call.dims(call.node.input[0])
    return 4 * directions * rows * steps * samples


def _scores(call: Call, heads: str) -> int:
    """Of each head, every query with every key."""
    query, keys = call.dims(call.node.input[0]), call.dims(call.node.input[1])
    length = keys[-2] if len(keys) == len(query) else query[-2]
    count = query[1] if len(query) == 4 else attribute(call.node, heads, 1)
    return 4 * query[0] * count * query[-2] * length


def _attention(call: Call) -> int:
    """ONNX's keeps the scores; ONNX Runtime's makes queries, keys and values first, and transposes the result."""
    if call.node.domain != "com.microsoft":
        return _scores(call, "q_num_heads")
    return 4 * _output(call) + _scores(call, "num_heads")


def _multi_head(call: Call) -> int:
    """Queries, keys and values with the heads in front; scores are made in small pieces."""
    return sum(call.size_bytes(name) for name in call.node.input[:3])


def _inputs(call: Call) -> int:
    return sum(call.size_bytes(name) for name in call.node.input)


_SCRATCH: dict[str, Callable[[Call], int]] = {
    "BiasGelu": _gelu_of_sum,
    "FastGelu": _gelu_of_sum,
    "Softmax": _softmax,
    "LogSoftmax": _softmax,
    "LRN": _lrn,
    "Conv": _conv,
    "FusedConv": _conv,
    "ConvTranspose": _conv_transpose,
    "QLinearConv": _qlinear_conv,
    "NhwcMaxPool": _nhwc_pool,
    "ConvInteger": _conv_integer,
    "QLinearMatMul": _sums,
    "QGemm": _sums,
    "DynamicQuantizeMatMul": _quantized_input,
    "MatMulNBits": _nbits,
    "LSTM": _recurrent,
    "GRU": _recurrent,
    "Attention": _attention,
    "MultiHeadAttention": _multi_head,
    "Einsum": _inputs,
}
