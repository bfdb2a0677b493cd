"""Shapes of every tensor of an optimized graph, whose operators ONNX itself does not know.

ONNX infers shapes for its own operators, and follows those that are computed from shapes. So each operator of ONNX
Runtime is replaced by a twin: ONNX's operator with the same shapes, whatever it computes. What has no twin keeps the
shape that ONNX Runtime wrote into the graph, where it wrote one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from memopt.errors import InputRefused, first_line
from memopt.tensors import Array, TensorSpec
from memopt_export.graph import attribute, set_nodes, tensor_spec
from memopt_export.loop_shapes import infer_bodies, keep_state_shapes

if TYPE_CHECKING:
    import onnx

NCHWC = "com.microsoft.nchwc"
_OWN_DOMAINS = ("", "ai.onnx", "ai.onnx.ml")
_SPATIAL = ("auto_pad", "ceil_mode", "count_include_pad", "dilations", "group", "kernel_shape", "pads", "strides")
_TO_FIRST, _TO_LAST = [0, 2, 3, 1], [0, 3, 1, 2]  # what moves the channels of pictures to the end, and back
# What is computed where inference stops; longer vectors are no shapes.
_FOLDED = frozenset({
    "Add", "Cast", "Concat", "Div", "Gather", "Identity", "Mul", "Neg", "Range", "ReduceProd", "Reshape", "Slice",
    "Squeeze", "Sub", "Unsqueeze",
})  # fmt: skip
_FOLDED_ELEMENTS = 1024
_RESIZE_OPSET = 10  # before it there is Upsample, and in it no region of interest

Twin = Callable[["onnx.NodeProto", "_Names"], Iterable["onnx.NodeProto"]]


class _Names:
    """Fresh names, and the initializers that twins need."""

    def __init__(self, opset: int) -> None:
        self.opset = opset  # of ONNX's own operators
        self.constants: list[onnx.TensorProto] = []
        self._count = 0

    def fresh(self) -> str:
        self._count += 1
        return f"twin/{self._count}"

    def bare(self, *dims: int) -> str:
        """The name of a new float initializer without data: shapes are inferred from its dims."""
        import onnx

        name = self.fresh()
        self.constants.append(onnx.TensorProto(name=name, data_type=onnx.TensorProto.FLOAT, dims=dims))
        return name


def infer(model: onnx.ModelProto, *, batch: int | None, dims: Mapping[str, int] | None = None) -> onnx.ModelProto:
    """A model of twins with the shapes of all tensors that have one, bodies of If, Loop and Scan included.

    Args:
        model: a graph, optimized or not; untouched.
        batch: what free dimensions of the inputs are; None leaves them as symbols, and follows no shape arithmetic, as
            ONNX Runtime does when it decides which tensors are of one size.
        dims: free dimensions by name that are something else.

    Raises:
        InputRefused: shapes contradict each other.
    """
    twin = _twin_model(model, batch, dims or {})
    inferred = _inferred(twin, batch)
    if batch is None:
        return inferred
    while _has_unknown(inferred) and (_fold(inferred) or keep_state_shapes(inferred)):
        inferred.graph.ClearField("value_info")
        inferred = _inferred(inferred, batch)
    infer_bodies(inferred, partial(_inferred, batch=batch))
    return inferred


def specs(graph: onnx.GraphProto) -> dict[str, TensorSpec]:
    """The tensors of an inferred graph whose rank is known, by name, inputs and initializers included."""
    values = [*graph.input, *graph.value_info, *graph.output]
    ranked = (
        value for value in values if value.type.tensor_type.HasField("shape") and value.type.tensor_type.elem_type
    )
    known = {value.name: tensor_spec(value) for value in ranked}
    return known | {tensor.name: tensor_spec(_described(tensor)) for tensor in graph.initializer}


def _described(tensor: onnx.TensorProto) -> onnx.ValueInfoProto:
    from onnx import helper

    return helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)


def _inferred(twin: onnx.ModelProto, batch: int | None) -> onnx.ModelProto:
    from onnx import shape_inference

    followed = batch is not None
    try:
        return shape_inference.infer_shapes(twin, data_prop=followed, strict_mode=followed)
    except (shape_inference.InferenceError, RuntimeError) as error:
        raise InputRefused(f"the graph has no shapes at batch {batch}: {first_line(error)}") from error


def _has_unknown(model: onnx.ModelProto) -> bool:
    known = specs(model.graph)
    written = (name for node in model.graph.node for name in node.output if name)
    return any(name not in known or not known[name].is_fixed for name in written)


def _fold(model: onnx.ModelProto) -> bool:
    """Computes what follows from shapes alone, as inference does not follow Range; whether there was any. In place."""
    from onnx import numpy_helper

    known = specs(model.graph)
    values = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in model.graph.initializer
        if math.prod(tensor.dims) <= _FOLDED_ELEMENTS and (tensor.raw_data or not tensor.dims or tensor.int64_data)
    }
    kept = []
    for node in model.graph.node:
        value = _value_of(node, known, values)
        if value is None:
            kept.append(node)
            continue
        values[node.output[0]] = value
        model.graph.initializer.append(numpy_helper.from_array(value, node.output[0]))
    if len(kept) == len(model.graph.node):
        return False
    set_nodes(model.graph, kept)
    return True


def _value_of(node: onnx.NodeProto, known: Mapping[str, TensorSpec], values: Mapping[str, Array]) -> Array | None:
    """What the node computes of known shapes and values; None where it reads others, or fails."""
    from onnx.reference import ReferenceEvaluator

    read = known.get(node.input[0]) if node.op_type == "Shape" else None
    if read is not None and read.is_fixed:
        return np.asarray(read.shape[slice(attribute(node, "start", 0), attribute(node, "end", None))], np.int64)
    reads = [name for name in node.input if name]
    if node.op_type not in _FOLDED or not values.keys() >= set(reads):
        return None
    feeds = {name: values[name] for name in reads}
    try:
        results: Any = ReferenceEvaluator(node).run(None, feeds)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError):  # the graph would fail there
        return None
    return np.asarray(results[0])


def _twin_model(model: onnx.ModelProto, batch: int | None, dims: Mapping[str, int]) -> onnx.ModelProto:
    import onnx

    # Before version 4, only initializers that are inputs too count as known.
    twin = onnx.ModelProto(ir_version=max(model.ir_version, 8))
    twin.functions.extend(model.functions)
    twin.opset_import.extend(entry for entry in model.opset_import if entry.domain != NCHWC)
    opset = next((entry.version for entry in twin.opset_import if entry.domain in ("", "ai.onnx")), 1)
    _fill(model.graph, twin.graph, batch, dims, opset, top=True)
    for value in twin.graph.input:
        _fix(value, batch, dims)
    return twin


def _fill(
    source: onnx.GraphProto, twin: onnx.GraphProto, batch: int | None, dims: Mapping[str, int], opset: int,
    *, top: bool = False,
) -> None:  # fmt: skip
    """Makes `twin` the graph of twins. In place."""
    names = _Names(opset)
    twin.name = source.name or "twin"
    twin.input.extend(source.input)
    twin.initializer.extend(source.initializer)
    known = {value.name: value for value in (*source.value_info, *source.output)}
    for node in source.node:
        if _is_onnx(node):
            copied = twin.node.add()
            copied.CopyFrom(node)
            for part in copied.attribute:
                if part.HasField("g"):
                    inner = type(source)()
                    _fill(part.g, inner, batch, dims, opset)
                    part.g.CopyFrom(inner)
        elif kernel_of(node) in _TWINS:
            twin.node.extend(_TWINS[kernel_of(node)](node, names))
        else:
            stated = [known[name] for name in node.output if name in known]
            twin.input.extend(_fixed(value, batch, dims) for value in stated)
    given = {value.name for value in source.input}
    for value in source.output:
        if value.name in given and top:  # inference gives up on it
            continue
        bare = twin.output.add(name=value.name)
        if value.type.HasField("tensor_type"):
            bare.type.tensor_type.elem_type = value.type.tensor_type.elem_type
        else:
            bare.type.CopyFrom(value.type)
    twin.initializer.extend(names.constants)


def _fixed(value: onnx.ValueInfoProto, batch: int | None, dims: Mapping[str, int]) -> onnx.ValueInfoProto:
    copied = type(value)()
    copied.CopyFrom(value)
    _fix(copied, batch, dims)
    return copied


def _fix(value: onnx.ValueInfoProto, batch: int | None, dims: Mapping[str, int]) -> None:
    """Gives free dimensions their number. In place."""
    if batch is None:
        return
    for dim in value.type.tensor_type.shape.dim:
        if not dim.HasField("dim_value"):
            dim.dim_value = dims.get(dim.dim_param, batch)


def _is_onnx(node: onnx.NodeProto) -> bool:
    """Whether ONNX knows the operator, or a function of the model defines it."""
    from onnx import defs

    return node.domain in _OWN_DOMAINS and (defs.has(node.op_type, node.domain) or node.op_type not in _TWINS)


def kernel_of(node: onnx.NodeProto) -> str:
    """The operator; those of the blocked layout of convolutions begin with "nchwc."."""
    return f"nchwc.{node.op_type}" if node.domain == NCHWC else node.op_type


# --- twins


def _node(op: str, inputs: Iterable[str], outputs: Iterable[str], **attributes: Any) -> onnx.NodeProto:
    from onnx import helper

    return helper.make_node(op, list(inputs), list(outputs), **attributes)


def _copied(node: onnx.NodeProto, op: str, inputs: Iterable[str], keep: Iterable[str] = ()) -> onnx.NodeProto:
    """The operator `op` of ONNX with these inputs, the node's first output, and those of its attributes."""
    twin = _node(op, inputs, node.output[:1])
    twin.attribute.extend(part for part in node.attribute if part.name in keep)
    return twin


def _same(node: onnx.NodeProto, _: _Names) -> Iterator[onnx.NodeProto]:
    """Every output is as its first input."""
    yield from (_node("Identity", node.input[:1], [name]) for name in node.output if name)


def _renamed(node: onnx.NodeProto, _: _Names) -> Iterator[onnx.NodeProto]:
    """ONNX Runtime's own version of an operator that ONNX has by now."""
    twin = _node(node.op_type, node.input, node.output)
    twin.attribute.extend(part for part in node.attribute if part.name in ("axis", "block_size"))
    yield twin


def _skip_norm(node: onnx.NodeProto, names: _Names) -> Iterator[onnx.NodeProto]:
    """The normalized sum, and the sum itself; what stands between is for training."""
    for slot in (0, 3):
        if slot < len(node.output) and node.output[slot]:
            yield _node("Identity", node.input[:1], [node.output[slot]])


def _broadcast(*slots: int) -> Twin:
    return lambda node, _: [_copied(node, "Add", [node.input[slot] for slot in slots])]


def _spatial(op: str, *slots: int, last: str | None = None) -> Twin:
    """A convolution or pooling over the inputs in these slots; its attribute `last` says that channels come last."""

    def twin(node: onnx.NodeProto, names: _Names) -> Iterator[onnx.NodeProto]:
        inputs = [node.input[slot] for slot in slots]
        if last is None or not attribute(node, last, 1):
            yield _copied(node, op, inputs, _SPATIAL)
            return
        before, after = names.fresh(), names.fresh()
        yield _node("Transpose", inputs[:1], [before], perm=_TO_LAST)
        moved = _copied(node, op, [before, *inputs[1:]], _SPATIAL)
        moved.output[0] = after
        yield moved
        yield _node("Transpose", [after], node.output[:1], perm=_TO_FIRST)

    return twin


def _reorder_output(node: onnx.NodeProto, names: _Names) -> Iterator[onnx.NodeProto]:
    """Takes away the channels that fill up a block."""
    to_last = attribute(node, "channels_last", 0)
    plain = names.fresh() if to_last else node.output[0]
    yield _node("Conv", [node.input[0], names.bare(attribute(node, "channels", 1), 1, 1, 1)], [plain])
    if to_last:
        yield _node("Transpose", [plain], node.output[:1], perm=_TO_FIRST)


def _reorder_input(node: onnx.NodeProto, _: _Names) -> Iterator[onnx.NodeProto]:
    """Only channels that fill blocks are laid out anew."""
    perm = _TO_LAST if attribute(node, "channels_last", 0) else [0, 1, 2, 3]
    yield _node("Transpose", node.input[:1], node.output[:1], perm=perm)


def _upsample(node: onnx.NodeProto, names: _Names) -> Iterator[onnx.NodeProto]:
    from onnx import numpy_helper

    scales = names.fresh()
    names.constants.append(numpy_helper.from_array(np.asarray(attribute(node, "scales", [1] * 4), np.float32), scales))
    if names.opset < _RESIZE_OPSET:
        yield _node("Upsample", [node.input[0], scales], node.output[:1], mode="nearest")
    else:
        inputs = [node.input[0], "", scales] if names.opset > _RESIZE_OPSET else [node.input[0], scales]
        yield _node("Resize", inputs, node.output[:1], mode="nearest")


def _matmul(node: onnx.NodeProto, names: _Names) -> Iterator[onnx.NodeProto]:
    """A product whose operands may be transposed, and their batches too."""
    operands = []
    for slot, letter in enumerate("AB"):
        name = node.input[slot]
        if attribute(node, f"transBatch{letter}", 0):
            raise InputRefused(f"{node.name!r} multiplies with transposed batches; its shape is not known")
        if attribute(node, f"trans{letter}", 0):
            flat = names.fresh()
            yield _node("Transpose", [name], [flat])
            name = flat
        operands.append(name)
    yield _copied(node, "MatMul", operands)


def _product(weight: int, *, floats: bool) -> Twin:
    """A product of the first input with the weight in that slot, of integers or to floats."""

    def twin(node: onnx.NodeProto, names: _Names) -> Iterator[onnx.NodeProto]:
        product = names.fresh()
        yield _node("MatMul", [node.input[0], node.input[weight]], [product])
        yield _node("Cast", [product], node.output[:1], to=1) if floats else _node("Identity", [product], node.output)

    return twin


def _nbits(node: onnx.NodeProto, names: _Names) -> Iterator[onnx.NodeProto]:
    yield _copied(node, "MatMul", [node.input[0], names.bare(attribute(node, "K", 1), attribute(node, "N", 1))])


def _qgemm(node: onnx.NodeProto, names: _Names) -> Iterator[onnx.NodeProto]:
    product = names.fresh()
    gemm = _copied(node, "Gemm", [node.input[0], node.input[3]], ("transA", "transB"))
    gemm.output[0] = product
    yield gemm
    quantized = len(node.input) > 7 and node.input[7]
    yield _node("Identity", [product], node.output) if quantized else _node("Cast", [product], node.output, to=1)


def _qlinear_concat(node: onnx.NodeProto, _: _Names) -> Iterator[onnx.NodeProto]:
    yield _copied(node, "Concat", node.input[2::3], ("axis",))


# What `kernel_of` says -> the twin.
_TWINS: dict[str, Twin] = {
    **dict.fromkeys(
        ("Gelu", "FastGelu", "QuickGelu", "BiasGelu", "BiasAdd", "BiasSoftmax", "Attention", "MultiHeadAttention",
         "QAttention",
         "QLinearSigmoid", "QLinearLeakyRelu", "QLinearSoftmax", "RotaryEmbedding"), _same,
    ),
    **dict.fromkeys(("SkipLayerNormalization", "SkipSimplifiedLayerNormalization"), _skip_norm),
    "SimplifiedLayerNormalization": _same,
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), _renamed),
    "nchwc.Conv": _spatial("Conv", 0, 1),
    **{f"nchwc.{op}": _spatial(op, 0) for op in ("MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool")},
    "nchwc.ReorderInput": _reorder_input,
    "nchwc.ReorderOutput": _reorder_output,
    "nchwc.Upsample": _upsample,
    "FusedConv": _spatial("Conv", 0, 1),
    "NhwcFusedConv": _spatial("Conv", 0, 1, last=""),
    "NhwcMaxPool": _spatial("MaxPool", 0, last=""),
    "QLinearConv": _spatial("Conv", 0, 3, last="channels_last"),
    "QLinearAveragePool": _spatial("AveragePool", 0, last="channels_last"),
    "QLinearGlobalAveragePool": _spatial("GlobalAveragePool", 0, last="channels_last"),
    "FusedGemm": lambda node, _: [_copied(node, "Gemm", node.input[:3], ("transA", "transB"))],
    "FusedMatMul": _matmul,
    "MatMulNBits": _nbits,
    "DynamicQuantizeMatMul": _product(1, floats=True),
    "MatMulIntegerToFloat": _product(1, floats=True),
    "QLinearMatMul": _product(3, floats=False),
    "QGemm": _qgemm,
    "QLinearAdd": _broadcast(0, 3),
    "QLinearMul": _broadcast(0, 3),
    "QLinearConcat": _qlinear_concat,
}  # fmt: skip
