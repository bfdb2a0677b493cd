"""int8 or int4 weights under float32 activations: no data is needed, and none is invented."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from memopt.errors import AnswerIsNo
from memopt.sizes import show_size
from memopt.tensors import Array
from memopt_export.blocks import Grid, fit, pack4, round_to_nearest
from memopt_export.calibrate import batches_for
from memopt_export.gptq import round_in_order
from memopt_export.graph import Graph, Wiring, attribute, inner_layers, label, wire
from memopt_export.means import UNLIMITED, Means
from memopt_export.opset import BLOCKWISE, PER_CHANNEL, at_least_opset, import_domain, raise_ir_version
from memopt_export.quantize.quantized import Quantized
from memopt_export.recipe import Recipe
from memopt_export.simplify import drop_unused_initializers
from memopt_export.walk import Walk

if TYPE_CHECKING:
    import onnx

    from memopt_models.data import Samples

BITS = {"int8-weights": 8, "int4-weights": 4}
# Whole channels are more than ONNX Runtime's MatMulNBits takes (256), and more than TensorRT keeps as 4 bits in an
# engine (128); blocks of this size are closer to the weights, and cost 4 bytes of scale each.
_LARGEST_BLOCK = 128
_SMALLEST_BLOCK = 16
# What a node and the names of its tensors add to the file. A weight that saves less stays float.
_NODE_BYTES = 256
# MatMulNBits rounds its input to int8 in blocks too, and multiplies integers. At the other levels ONNX Runtime makes
# 8-bit weights float again: it takes longer and holds as much as for float weights.
_INTEGER_PRODUCTS = 4
_MICROSOFT = "com.microsoft"
# Longer rows are rounded to nearest: the cost of their moments is the third power.
_MOST_INPUTS = 4096


@dataclass(frozen=True)
class Place:
    """Where an operator has a weight: its input slot, and the weight's axes of output channels and of inputs."""

    slot: int
    channels: int
    inputs: int


def quantize(graph: Graph, recipe: Recipe, samples: Samples | None = None, means: Means = UNLIMITED) -> Quantized:
    """The graph with weights of 8 or 4 bits in its file, each with the form that its target keeps small.

    1. "cpu", a MatMul or plain Gemm: MatMulNBits, in blocks of `recipe.group_size`.
    2. "cpu", a table of embeddings: GatherBlockQuantized.
    3. All else: DequantizeLinear before the node, one scale for each block along the inputs, or for each channel.
       On "tensorrt" zero points are 0, and a bias is added behind its Gemm: within it, the engine keeps weights float.

    Channels with fewer inputs than a block get one scale each, and so do for TensorRT all of 8 bits, whose blocks it
    would keep in float32, and those of convolutions, where it knows none; 4 bits are too few for a whole channel and
    become 8, unless `recipe.group_size` is 0, which asks for it. A weight that would save nothing stays float.

    Scales follow not from the widest value of a block, but from its least squared error. With samples, and where
    `recipe.correction` is "gptq", weights of MatMul and Gemm are rounded for what these read; else to nearest.

    Raises:
        AnswerIsNo: nothing can be quantized.
        InputRefused: the graph's opset is too old and cannot be raised, or the samples do not
            fit the graph.
    """
    layers = _layers(graph, recipe)
    if not layers:
        inner = inner_layers(graph.model, PLACES)
        inside = f": {len(inner)} layers lie inside If, Loop or Scan, where all stays float" if inner else ""
        raise AnswerIsNo(
            f"the graph has no weights that {recipe.precision} could make smaller{inside}, so it stays float"
        )
    raised = at_least_opset(graph, max(layer.form.opset for layer in layers))
    layers = _layers(raised, recipe)
    model = raised.copy_model()
    conversion = _Conversion(model, wire(model))
    if samples is not None and recipe.correction == "gptq":
        conversion.rounded.update(_round_in_order(raised, layers, samples, means))
    conversion.run(layers, means)
    result = raised.with_model(model, precision=recipe.name)
    notes = _notes(graph, result, Counter(layer.form.writes for layer in layers), recipe)
    return Quantized(result, None, None, _kept_float(raised, layers), notes)


# --- which weights, in which form


def _conv(node: onnx.NodeProto, rank: int) -> tuple[Place, ...]:
    return (Place(1, 0, 1) if node.op_type == "Conv" else Place(1, 1, 0),) if rank > 2 else ()


def _gemm(node: onnx.NodeProto, _rank: int) -> tuple[Place, ...]:
    return (Place(1, 0, 1) if attribute(node, "transB", 0) else Place(1, 1, 0),)


def _matmul(_node: onnx.NodeProto, rank: int) -> tuple[Place, ...]:
    return (Place(1, rank - 1, rank - 2),) if rank > 1 else ()


def _gather(node: onnx.NodeProto, rank: int) -> tuple[Place, ...]:
    return (Place(0, 0, 1),) if rank == 2 and attribute(node, "axis", 0) in (0, -2) else ()


def _recurrent(_node: onnx.NodeProto, _rank: int) -> tuple[Place, ...]:
    return (Place(1, 1, 2), Place(2, 1, 2))


PLACES: dict[str, Callable[[onnx.NodeProto, int], tuple[Place, ...]]] = {
    "Conv": _conv, "ConvTranspose": _conv, "Gemm": _gemm, "MatMul": _matmul, "Gather": _gather,
    "LSTM": _recurrent, "GRU": _recurrent, "RNN": _recurrent,
}  # fmt: skip


@dataclass(frozen=True)
class Form:
    """How a weight is written. `block` is None where a whole channel shares a scale."""

    writes: str
    bits: int
    block: int | None
    signed: bool

    @property
    def opset(self) -> int:
        """The first that has it."""
        if self.writes != "DequantizeLinear":
            return 0
        return BLOCKWISE if self.bits == 4 or self.block is not None else PER_CHANNEL


@dataclass(frozen=True)
class _Layer:
    index: int
    place: Place
    form: Form


# What is stored once: a weight, as it is looked at, in its form.
_Key = tuple[str, Place, Form]


def _key(node: onnx.NodeProto, layer: _Layer) -> _Key:
    return str(node.input[layer.place.slot]), layer.place, layer.form


def _layers(graph: Graph, recipe: Recipe) -> list[_Layer]:
    """All weights to change, in the graph's order."""
    wiring = wire(graph.model)
    return [
        _Layer(index, place, form)
        for index, node in enumerate(wiring.nodes)
        if not recipe.excludes(label(node), node.op_type) and recipe.includes(label(node), node.op_type)
        for place in _places(node, wiring)
        if (form := _form(node, place, wiring.initializers[node.input[place.slot]], recipe)) is not None
    ]


def _places(node: onnx.NodeProto, wiring: Wiring) -> tuple[Place, ...]:
    """Where the node reads constant float32 weights."""
    from onnx import TensorProto

    if node.op_type not in PLACES or node.domain not in ("", "ai.onnx"):
        return ()
    slots = (0,) if node.op_type == "Gather" else (1,)
    tensors = [wiring.initializers.get(node.input[slot]) for slot in slots if slot < len(node.input)]
    rank = len(tensors[0].dims) if tensors and tensors[0] is not None else 0
    return tuple(
        place
        for place in (PLACES[node.op_type](node, rank) if rank else ())
        if (tensor := wiring.initializers.get(node.input[place.slot])) is not None
        and tensor.data_type == TensorProto.FLOAT
    )


def _form(node: onnx.NodeProto, place: Place, weight: onnx.TensorProto, recipe: Recipe) -> Form | None:
    """How this weight is written for the target; None where that would not be smaller."""
    bits, columns = BITS[recipe.precision], weight.dims[place.inputs]
    group = min(recipe.group_size or _LARGEST_BLOCK, 2 * _LARGEST_BLOCK)
    if recipe.target == "cpu" and len(weight.dims) == 2 and _has_kernel(node):
        writes = "GatherBlockQuantized" if node.op_type == "Gather" else "MatMulNBits"
        form = Form(writes, bits, min(group, _power_of_two(columns)), signed=False)
    else:
        form = _dequantized(node, weight, columns, recipe)
    return form if _saves(form, weight, place) else None


def _has_kernel(node: onnx.NodeProto) -> bool:
    """Cases 1 and 2; factors and a transposed input are beyond MatMulNBits."""
    return node.op_type in ("MatMul", "Gather") or (node.op_type == "Gemm" and _is_plain(node))


def _is_plain(gemm: onnx.NodeProto) -> bool:
    """Whether it is a product and a sum, without factors or a transposed input."""
    factors = [attribute(gemm, name, default) for name, default in (("transA", 0), ("alpha", 1.0), ("beta", 1.0))]
    return factors == [0, 1, 1]


def _power_of_two(columns: int) -> int:
    """The smallest block that holds a whole row: a larger one would be filled up with nothing."""
    return max(_SMALLEST_BLOCK, 1 << (columns - 1).bit_length())


def _dequantized(node: onnx.NodeProto, weight: onnx.TensorProto, columns: int, recipe: Recipe) -> Form:
    """Case 3."""
    bits, signed = BITS[recipe.precision], recipe.target == "tensorrt"
    block: int | None = recipe.group_size or None
    if signed and bits == 4:
        block = min(block or _LARGEST_BLOCK, _LARGEST_BLOCK)
    knows_blocks = bits == 4 and node.op_type in ("MatMul", "Gemm", "Gather")  # an engine has blocks of 8 bits in float
    if signed and not knows_blocks:
        block = None
    if block is not None and signed:
        block = min(block, columns & -columns)  # TensorRT's have to divide the row
    if block is not None and not _SMALLEST_BLOCK <= block <= columns:
        block = None
    if block is None and (recipe.group_size or (signed and knows_blocks)):
        bits = 8
    if signed and np.prod(weight.dims) % 2:  # TensorRT: "4-bit quantization requires an even number of elements"
        bits = 8
    return Form("DequantizeLinear", bits, block, signed)


def _saves(form: Form, weight: onnx.TensorProto, place: Place) -> bool:
    elements, columns = int(np.prod(weight.dims)), weight.dims[place.inputs]
    if not elements:
        return False
    blocks = weight.dims[place.channels] if form.block is None else elements // columns * -(-columns // form.block)
    return bool(elements * form.bits // 8 + blocks * 5 + _NODE_BYTES < elements * 4)


def _kept_float(graph: Graph, layers: list[_Layer]) -> tuple[str, ...]:
    """The nodes with weights that none of the layers changes."""
    wiring, changed = wire(graph.model), {layer.index for layer in layers}
    kept = [label(node) for index, node in enumerate(wiring.nodes) if index not in changed and _places(node, wiring)]
    return (*kept, *inner_layers(graph.model, PLACES.keys() - {"Gather"}))


# --- rounding


def _round_in_order(
    graph: Graph, layers: list[_Layer], samples: Samples, means: Means
) -> dict[_Key, tuple[Array, Grid]]:
    """Integers and grid of the weights whose layers tell what they read; of a shared weight, by its first layer."""
    from onnx import numpy_helper

    wiring, found = wire(graph.model), dict[_Key, tuple[Array, Grid]]()
    batches = batches_for(graph, samples, means)
    with tempfile.TemporaryDirectory(prefix="memopt-") as folder:
        walk = Walk(graph.model, batches, Path(folder))
        for layer in layers:
            node, key = wiring.nodes[layer.index], _key(wiring.nodes[layer.index], layer)
            if key in found or not _tells_inputs(node, wiring.initializers[key[0]], layer.place):
                continue
            walk.pass_to(layer.index)
            weight = numpy_helper.to_array(wiring.initializers[key[0]])
            moments = _moments(walk.read(node.input[0]), weight.shape[layer.place.inputs])
            found[key] = _integers(weight, layer.place, layer.form, moments)
    return found


def _tells_inputs(node: onnx.NodeProto, weight: onnx.TensorProto, place: Place) -> bool:
    """Whether each row of what the node reads meets each row of the weight, and these are not too long."""
    product = node.op_type == "MatMul" or (node.op_type == "Gemm" and _is_plain(node))
    return product and len(weight.dims) == 2 and weight.dims[place.inputs] <= _MOST_INPUTS


def _moments(reads: Iterable[list[Array]], columns: int) -> Array:
    """x^T x over all rows, (columns, columns)."""
    moments: Array = np.zeros((columns, columns), np.float64)
    for (read,) in reads:
        rows = read.reshape(-1, columns)
        moments += rows.T @ rows
    return moments


# --- rewriting


@dataclass(frozen=True, eq=False)
class _Conversion:
    """One pass over the nodes of `model`, which is changed in place.

    DequantizeLinear of weights stand before all other nodes. ONNX Runtime visits what a node reads in the order of the
    file and runs it in the opposite one, so each is computed right before the node that reads it, and its buffer is
    free behind it. Anywhere else, all weights are dequantized before the first layer runs, and held in float32.
    """

    model: onnx.ModelProto
    wiring: Wiring  # of the model as it was
    arrays: dict[str, Array] = field(default_factory=dict)
    dequantizers: dict[str, onnx.NodeProto] = field(default_factory=dict)
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    stored: dict[_Key, str] = field(default_factory=dict)
    rounded: dict[_Key, tuple[Array, Grid]] = field(default_factory=dict)  # those that are not rounded to nearest

    def run(self, layers: list[_Layer], means: Means) -> None:
        """Rewrites nodes and initializers."""
        from onnx import numpy_helper

        of_node: dict[int, list[_Layer]] = {}
        for layer in layers:
            of_node.setdefault(layer.index, []).append(layer)
        done = 0
        for index, node in enumerate(self.wiring.nodes):
            add = _take_bias(node) if index in of_node else None
            for layer in of_node.get(index, ()):
                self._quantize(node, layer)
                done += 1
                means.tell("weights", done, len(layers))
            self.nodes.extend([node] if add is None else [node, add])
        del self.model.graph.node[:]
        self.model.graph.node.extend([*self.dequantizers.values(), *self.nodes])
        self.model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in self.arrays.items())
        drop_unused_initializers(self.model)
        raise_ir_version(self.model)  # an old one may go with an opset that has 4-bit integers
        if any(node.domain == _MICROSOFT for node in self.nodes):
            import_domain(self.model, _MICROSOFT)

    def _quantize(self, node: onnx.NodeProto, layer: _Layer) -> None:
        """Stores the weight and makes the node read it."""
        from onnx import helper

        name, form, place = node.input[layer.place.slot], layer.form, layer.place
        dims = self.wiring.initializers[name].dims
        stored = self._store(name, layer)
        parts = [part for part in (stored, f"{stored}.scale", f"{stored}.zero_point") if part in self.arrays]
        if form.writes == "MatMulNBits":
            settings = {"K": dims[place.inputs], "N": dims[place.channels], "accuracy_level": _INTEGER_PRODUCTS}
            _become(node, form, [node.input[0], *parts], settings)
        elif form.writes == "GatherBlockQuantized":
            _become(node, form, [parts[0], node.input[1], *parts[1:]], {"gather_axis": 0, "quantize_axis": 1})
        else:
            output = f"{stored}.dequantized"
            node.input[place.slot] = output
            read = helper.make_node("DequantizeLinear", parts, [output], name=f"{stored}.DequantizeLinear")
            settings = {"axis": place.channels if form.block is None else place.inputs}
            _set(read, settings if form.block is None else {**settings, "block_size": form.block})
            self.dequantizers[stored] = read

    def _store(self, name: str, layer: _Layer) -> str:
        """The name of the stored integers; a weight that two layers read in the same form is stored once."""
        from onnx import numpy_helper

        key: _Key = (name, layer.place, layer.form)
        if key not in self.stored:
            twins = sum(name == other for other, _, _ in self.stored)
            self.stored[key] = f"{name}.quantized" + (f".{twins}" if twins else "")
            weight = numpy_helper.to_array(self.wiring.initializers[name])
            integers, grid = self.rounded.get(key) or _integers(weight, layer.place, layer.form)
            arrays = _ARRAYS[layer.form.writes](integers, grid, weight.shape, layer)
            for suffix, array in arrays.items():
                self.arrays[self.stored[key] + suffix] = array
        return self.stored[key]


def _take_bias(node: onnx.NodeProto) -> onnx.NodeProto | None:
    """The bias of a plain Gemm as an Add of its own, to stand behind it."""
    from onnx import helper

    if node.op_type != "Gemm" or not _is_plain(node) or len(node.input) < 3 or not node.input[2]:
        return None
    bias, output = node.input[2], node.output[0]
    del node.input[2:]
    node.output[0] = f"{output}.product"
    return helper.make_node("Add", [node.output[0], bias], [output], name=f"{label(node)}.bias")


def _become(node: onnx.NodeProto, form: Form, inputs: list[str], settings: dict[str, int]) -> None:
    """Turns the node into an operator of ONNX Runtime's own, under its name."""
    del node.input[:], node.attribute[:]
    node.op_type, node.domain = form.writes, _MICROSOFT
    node.input.extend(inputs)
    _set(node, {**settings, "bits": form.bits, "block_size": form.block or 0})


def _set(node: onnx.NodeProto, settings: dict[str, int]) -> None:
    from onnx import helper

    node.attribute.extend(helper.make_attribute(key, value) for key, value in sorted(settings.items()))


# --- what is stored, by suffix of its name, from a weight of `shape`

Shape = tuple[int, ...]


def _matmul_arrays(integers: Array, grid: Grid, _shape: Shape, _layer: _Layer) -> dict[str, Array]:
    """Integers (N, blocks, bytes), scales (N, blocks), zero points (N, bytes) where any is not in the middle."""
    missing = grid.scale.shape[1] * grid.block - integers.shape[1]
    packed = np.pad(integers, ((0, 0), (0, missing))).reshape(len(integers), -1, grid.block)
    arrays = {"": packed, ".scale": grid.scale, ".zero_point": grid.zero_point}
    if grid.bits == 4:
        arrays |= {"": pack4(packed), ".zero_point": pack4(grid.zero_point)}
    return _without_middle(arrays, grid)


def _gather_arrays(integers: Array, grid: Grid, _shape: Shape, _layer: _Layer) -> dict[str, Array]:
    """Integers (rows, columns), uint8 or uint4; scales and zero points (rows, blocks)."""
    return {"": _typed(integers, grid), ".scale": grid.scale, ".zero_point": _typed(grid.zero_point, grid)}


def _dequantize_arrays(integers: Array, grid: Grid, shape: Shape, layer: _Layer) -> dict[str, Array]:
    """Integers shaped like the weight; scales and zero points (channels,), or shaped like it with blocks for inputs."""
    form = layer.form
    axis = layer.place.channels if form.block is None else layer.place.inputs
    others = np.delete(shape, axis)

    def back(array: Array) -> Array:
        """From rows to the weight's axes."""
        if form.block is None:
            return np.moveaxis(array.reshape(-1, *others), 0, axis)
        return np.moveaxis(array.reshape(*others, -1), -1, axis)

    scale, zero_point = (p[:, 0] if form.block is None else back(p) for p in (grid.scale, grid.zero_point))
    arrays = {"": back(integers), ".scale": scale, ".zero_point": zero_point}
    if grid.is_symmetric:
        arrays = {"": _signed(arrays[""], grid), ".scale": scale}
    else:
        arrays |= {name: _typed(arrays[name], grid) for name in ("", ".zero_point")}
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


_ARRAYS: dict[str, Callable[[Array, Grid, Shape, _Layer], dict[str, Array]]] = {
    "MatMulNBits": _matmul_arrays,
    "GatherBlockQuantized": _gather_arrays,
    "DequantizeLinear": _dequantize_arrays,
}


def _integers(weight: Array, place: Place, form: Form, moments: Array | None = None) -> tuple[Array, Grid]:
    """The weight's rows, (rows, columns), rounded: one row for each channel, or for all that shares no block.

    `moments` are those of what the layer reads, (columns, columns); None rounds to nearest.
    """
    if form.block is None:
        rows = np.moveaxis(weight, place.channels, 0).reshape(weight.shape[place.channels], -1)
    else:
        rows = np.moveaxis(weight, place.inputs, -1).reshape(-1, weight.shape[place.inputs])
    rows = np.ascontiguousarray(rows)
    grid = fit(rows, bits=form.bits, block=form.block or rows.shape[1], symmetric=True if form.signed else None)
    if moments is not None:
        chosen = round_in_order(rows[None], moments[None], lambda part, at: grid.nearest(part[0], at[0])[None])
        rows = chosen[0].astype(np.float32)
    return round_to_nearest(rows, grid), grid


def _typed(integers: Array, grid: Grid) -> Array:
    """In the dtype that says how many bits they have."""
    import ml_dtypes

    return integers if grid.bits == 8 else integers.astype(ml_dtypes.uint4)


def _signed(integers: Array, grid: Grid) -> Array:
    """The same around zero, where the zero point needs no telling."""
    import ml_dtypes

    around_zero = integers.astype(np.int16) - 2 ** (grid.bits - 1)
    signed: Array = around_zero.astype(np.int8 if grid.bits == 8 else ml_dtypes.int4)
    return signed


def _without_middle(arrays: dict[str, Array], grid: Grid) -> dict[str, Array]:
    """Zero points in the middle are what MatMulNBits takes when told none."""
    return {name: array for name, array in arrays.items() if name != ".zero_point" or not grid.is_symmetric}


# --- what it saves


def _notes(before: Graph, after: Graph, forms: Counter[str], recipe: Recipe) -> tuple[str, ...]:
    small, large = (show_size(sum(graph.weights_bytes().values())) for graph in (after, before))
    notes = [f"the file's weights take {small} instead of {large}"]
    if recipe.target == "tensorrt":
        return (*notes, "an engine keeps the integers, so its weights shrink as much; activations stay float32")
    kept, opened = forms["MatMulNBits"] + forms["GatherBlockQuantized"], forms["DequantizeLinear"]
    if kept:
        notes.append(
            f"{kept} of {kept + opened} weights stay integers in onnxruntime's private memory too; "
            "products with them round what they read to 8 bits, block by block"
        )
    if opened:
        notes.append(
            f"{opened} of {kept + opened} weights are dequantized one by one in each run: private memory shrinks too, "
            "but the run takes longer than in fp32"
        )
    return tuple(notes)
