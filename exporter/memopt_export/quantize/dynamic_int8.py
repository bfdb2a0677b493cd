"""int8 weights, and activations that are quantized in each run by their own range: no data is needed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from memopt.errors import AnswerIsNo
from memopt.sizes import show_size
from memopt.tensors import Array
from memopt_export.affine import SMALLEST_SCALE
from memopt_export.execution import fused_counts
from memopt_export.graph import Graph, Wiring, attribute, inner_layers, label, wire
from memopt_export.means import UNLIMITED, Means
from memopt_export.opset import at_least_opset, import_domain
from memopt_export.quantize.quantized import Quantized
from memopt_export.recipe import Recipe
from memopt_export.simplify import drop_unused_initializers

if TYPE_CHECKING:
    import onnx

    from memopt_models.data import Samples

_OPSET = 11  # the first with DynamicQuantizeLinear
_MICROSOFT = "com.microsoft"
# Operators with weights, and the input slots of these.
_WEIGHTS = {
    "Conv": (1,), "ConvTranspose": (1,), "Gemm": (1,), "MatMul": (1,), "LSTM": (1, 2), "GRU": (1, 2), "RNN": (1, 2),
}  # fmt: skip
# What the nodes of a layer and their names add to the file. A weight that saves less stays float.
_NODES_BYTES = 640


def quantize(graph: Graph, recipe: Recipe, samples: Samples | None = None, means: Means = UNLIMITED) -> Quantized:
    """The graph with int8 weights and a form that ONNX Runtime computes in integers, one scale for each channel.

    1. MatMul and plain Gemm: DynamicQuantizeLinear, MatMulInteger, and the scales behind; ONNX Runtime makes one node
       of these. Layers that read the same tensor share its DynamicQuantizeLinear.
    2. LSTM: DynamicQuantizeLSTM.
    Convolutions, GRU and RNN have no such kernel that would gain anything, and stay float.

    Raises:
        AnswerIsNo: nothing can be quantized.
        InputRefused: the graph's opset is too old and cannot be raised.
    """
    raised = at_least_opset(graph, _OPSET)
    model = raised.copy_model()
    wiring = wire(model)
    layers = {
        index
        for index, node in enumerate(wiring.nodes)
        if not recipe.excludes(label(node), node.op_type)
        and recipe.includes(label(node), node.op_type)
        and _has_kernel(node, wiring)
    }
    if not layers:
        inner = inner_layers(model, _WEIGHTS)
        inside = f": {len(inner)} layers lie inside If, Loop or Scan, where all stays float" if inner else ""
        raise AnswerIsNo(
            f"the graph has no MatMul, Gemm or LSTM that int8-dynamic could serve{inside}, so it stays float",
            hint="--precision int8 --data SPEC",
        )
    weighted = [index for index, node in enumerate(wiring.nodes) if _has_weights(node, wiring)]
    inner = inner_layers(model, _WEIGHTS)
    kept = tuple(label(wiring.nodes[index]) for index in weighted if index not in layers) + inner
    _Conversion(model, wiring, 2 ** (recipe.weight_bits - 1) - 1).run(layers, means)
    result = raised.with_model(model, precision=recipe.name)
    fused = fused_counts(result.data)[0], len(weighted) + len(inner)
    return Quantized(result, None, fused, kept, _notes(graph, result))


def _notes(before: Graph, after: Graph) -> tuple[str, ...]:
    small, large = (show_size(sum(graph.weights_bytes().values())) for graph in (after, before))
    return (
        f"the file's weights take {small} instead of {large}; onnxruntime holds integers, and packs a copy of them",
        "activations are quantized by the range of the whole batch in each run: what shares a batch shares its steps",
    )


def _has_weights(node: onnx.NodeProto, wiring: Wiring) -> bool:
    """Whether the node multiplies an activation with constant float32 weights."""
    from onnx import TensorProto

    slots = _WEIGHTS.get(node.op_type, ())
    if not slots or node.domain not in ("", "ai.onnx") or wiring.is_constant(node.input[0]):
        return False
    weights = [wiring.initializers.get(node.input[slot]) for slot in slots]
    return all(weight is not None and weight.data_type == TensorProto.FLOAT for weight in weights)


def _has_kernel(node: onnx.NodeProto, wiring: Wiring) -> bool:
    """Cases 1 and 2, where the weights are large enough to gain anything."""
    if not _has_weights(node, wiring):
        return False
    dims = [list(wiring.initializers[node.input[slot]].dims) for slot in _WEIGHTS[node.op_type]]
    if 3 * sum(int(np.prod(shape)) for shape in dims) <= _NODES_BYTES + 4 * max(dims[0], default=0):
        return False
    if node.op_type == "LSTM":
        return bool(attribute(node, "layout", 0) == 0)
    if node.op_type == "Gemm":
        factors = [attribute(node, name, default) for name, default in (("transA", 0), ("alpha", 1.0), ("beta", 1.0))]
        return factors == [0, 1, 1]
    return node.op_type == "MatMul" and len(dims[0]) == 2


@dataclass(frozen=True, eq=False)
class _Conversion:
    """One pass over the nodes of `model`, which is changed in place. `largest` is the weights' largest integer."""

    model: onnx.ModelProto
    wiring: Wiring  # of the model as it was
    largest: int
    arrays: dict[str, Array] = field(default_factory=dict)
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    quantized: set[str] = field(default_factory=set)

    def run(self, layers: set[int], means: Means) -> None:
        """Rewrites nodes and initializers."""
        from onnx import numpy_helper

        done = 0
        for index, node in enumerate(self.wiring.nodes):
            if index not in layers:
                self.nodes.append(node)
                continue
            (self._lstm if node.op_type == "LSTM" else self._product)(node)
            done += 1
            means.tell("weights", done, len(layers))
        del self.model.graph.node[:]
        self.model.graph.node.extend(self.nodes)
        self.model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in self.arrays.items())
        drop_unused_initializers(self.model)
        if any(node.domain == _MICROSOFT for node in self.nodes):
            import_domain(self.model, _MICROSOFT)

    def _product(self, node: onnx.NodeProto) -> None:
        """Case 1, with the scales multiplied in the order that ONNX Runtime knows as one node."""
        name, read, output = label(node), node.input[0], node.output[0]
        bias = node.input[2] if len(node.input) > 2 else ""
        transposed = node.op_type == "Gemm" and attribute(node, "transB", 0)
        weight, scale = self._store(node.input[1], rows_first=bool(transposed))
        if read not in self.quantized:
            self.quantized.add(read)
            outputs = [f"{read}.{part}" for part in ("quantized", "scale", "zero_point")]
            self._add("DynamicQuantizeLinear", [read], outputs, f"{read}.DynamicQuantizeLinear")
        self._add("MatMulInteger", [f"{read}.quantized", weight, f"{read}.zero_point"], [f"{output}.integer"], name)
        self._add("Cast", [f"{output}.integer"], [f"{output}.steps"], f"{name}.Cast", to=1)  # FLOAT
        self._add("Mul", [f"{read}.scale", scale], [f"{output}.rescale"], f"{name}.rescale")
        product = f"{output}.product" if bias else output
        self._add("Mul", [f"{output}.steps", f"{output}.rescale"], [product], f"{name}.Mul")
        if bias:
            self._add("Add", [product, bias], [output], f"{name}.bias")

    def _lstm(self, node: onnx.NodeProto) -> None:
        """Case 2: the same inputs and attributes, with the weights' scales and zero points behind them."""
        parts = [self._store_gates(node.input[slot]) for slot in (1, 2)]
        inputs = [*node.input, *[""] * (8 - len(node.input))]
        inputs[1:3] = [integers for integers, _, _ in parts]
        node.op_type, node.domain = "DynamicQuantizeLSTM", _MICROSOFT
        del node.input[:]
        node.input.extend([*inputs, *(name for _, scale, zero_point in parts for name in (scale, zero_point))])
        kept = [part for part in node.attribute if part.name != "layout"]
        del node.attribute[:]
        node.attribute.extend(kept)
        self.nodes.append(node)

    def _store(self, name: str, *, rows_first: bool) -> tuple[str, str]:
        """The names of a weight's integers, (inputs, outputs), and of its scales, (outputs,)."""
        stored = f"{name}.transposed.quantized" if rows_first else f"{name}.quantized"
        if stored not in self.arrays:
            weight = self._float(name).T if rows_first else self._float(name)
            self.arrays[stored], self.arrays[f"{stored}.scale"] = self._integers(weight, inputs=0)
        return stored, f"{stored}.scale"

    def _store_gates(self, name: str) -> tuple[str, str, str]:
        """The names of integers, (directions, inputs, gates), of scales and zero points, (directions, gates)."""
        stored = f"{name}.gates.quantized"
        if stored not in self.arrays:
            integers, scale = self._integers(self._float(name), inputs=2)
            self.arrays[stored] = np.ascontiguousarray(integers.transpose(0, 2, 1))
            self.arrays[f"{stored}.scale"] = scale
            self.arrays[f"{stored}.zero_point"] = np.zeros(scale.shape, np.int8)
        return stored, f"{stored}.scale", f"{stored}.zero_point"

    def _integers(self, weight: Array, *, inputs: int) -> tuple[Array, Array]:
        """int8 steps up to `largest`, and their scales: one for all values along the axis of inputs."""
        reach = np.abs(weight).max(axis=inputs, keepdims=True)
        scale = np.maximum(reach / np.float32(self.largest), SMALLEST_SCALE)
        integers = np.rint(weight / scale).clip(-self.largest, self.largest).astype(np.int8)
        return np.ascontiguousarray(integers), scale.squeeze(inputs)

    def _float(self, name: str) -> Array:
        from onnx import numpy_helper

        return numpy_helper.to_array(self.wiring.initializers[name])

    def _add(self, kind: str, inputs: list[str], outputs: list[str], name: str, **attributes: int) -> None:
        from onnx import helper

        node = helper.make_node(kind, inputs, outputs, name=name)
        node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
        self.nodes.append(node)
