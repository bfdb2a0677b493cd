"""QuantizeLinear and DequantizeLinear nodes: put into a graph where a placement says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from memopt.tensors import Array
from memopt_export.affine import (
    Affine,
    asymmetric_uint8,
    bias_scale,
    float8,
    float8_channels,
    quantize_bias,
    symmetric_int8,
    symmetric_int8_channels,
    with_room_for_bias,
)
from memopt_export.calibrate import Ranges
from memopt_export.graph import Graph, Wiring, attribute, wire
from memopt_export.placement import Layer, Placement
from memopt_export.simplify import drop_unused_initializers, merge_equal_initializers

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class Format:
    """The integers, or floats of 8 bits, that a target takes."""

    activations: Callable[[float, float], Affine]
    weights: Callable[..., Affine]
    int32_bias: bool


FORMATS = {
    "cpu": Format(asymmetric_uint8, symmetric_int8_channels, int32_bias=True),
    "tensorrt": Format(symmetric_int8, symmetric_int8_channels, int32_bias=False),
    "fp8": Format(float8, float8_channels, int32_bias=False),
}


@dataclass(frozen=True, eq=False)
class Stored:
    """What a quantized layer holds: 8-bit weights with their affine, and the bias in float32, (channels,) or None."""

    integers: Array
    affine: Affine
    bias: Array | None

    @property
    def weight(self) -> Array:
        """The float32 weights that the integers stand for."""
        return self.affine.dequantize(self.integers)


@dataclass(frozen=True, eq=False)
class Simulation:
    """A graph that computes as the quantized one does, in floats: activations pass Q/DQ, weights are still to be given.

    `positions` are those of the layers' nodes, by the layer's index in the float graph; `weights` and `biases` are the
    names of the initializers that those nodes read, without data.
    """

    graph: Graph
    positions: dict[int, int]
    weights: dict[int, str]
    biases: dict[int, str]


def insert(graph: Graph, placement: Placement, ranges: Ranges, stored: Mapping[int, Stored] | None = None) -> Graph:
    """The graph with int8 weights in its layers and Q/DQ where `placement` says, as wide as `ranges` say.

    `stored` gives each layer's weights by its index; without it they are rounded to nearest.
    """
    if stored is None:
        wiring = wire(graph.model)
        stored = {layer.index: nearest(layer, wiring, placement, ranges) for layer in placement.layers}
    model = graph.copy_model()
    _Insertion(model, wire(model), placement, ranges, stored).run()
    drop_unused_initializers(model)
    merge_equal_initializers(model)
    return graph.with_model(model)


def simulate(graph: Graph, placement: Placement, ranges: Ranges) -> Simulation:
    """The simulation of what `insert` makes."""
    model = graph.copy_model()
    insertion = _Insertion(model, wire(model), placement, ranges, None)
    insertion.run()
    drop_unused_initializers(model)
    return Simulation(graph.with_model(model), insertion.positions, insertion.weights, insertion.biases)


def nearest(layer: Layer, wiring: Wiring, placement: Placement, ranges: Ranges, *, largest: int = 127) -> Stored:
    """The layer's weights rounded to nearest, with steps that leave room for its bias where that is int32."""
    node = wiring.nodes[layer.index]
    weight, bias = float_weights(node, wiring)
    affine = FORMATS[placement.form].weights(weight, axis=layer.axis, largest=largest)
    if bias is not None and FORMATS[placement.form].int32_bias:
        affine = with_room_for_bias(affine, bias, input_affine(layer, wiring, placement, ranges))
    return Stored(affine.quantize(weight), affine, bias)


def float_weights(node: onnx.NodeProto, wiring: Wiring) -> tuple[Array, Array | None]:
    """A layer's weight and bias as they are, float32; None where it has no bias."""
    from onnx import numpy_helper

    weight, bias = (wiring.initializers.get(name) for name in [*node.input[1:], ""][:2])
    assert weight is not None  # the placement saw to it
    return numpy_helper.to_array(weight), None if bias is None else numpy_helper.to_array(bias)


def input_affine(layer: Layer, wiring: Wiring, placement: Placement, ranges: Ranges) -> Affine:
    """How the layer's input is quantized."""
    origin = placement.ranges_of[wiring.nodes[layer.index].input[0]]
    return FORMATS[placement.form].activations(*ranges.bounds[origin])


@dataclass(frozen=True, eq=False)
class _Insertion:
    """One pass over the nodes of `model`, which is changed in place.

    New tensors are named after what they come from: `T.quantized`, `T.dequantized`; a layer's after its output. Without
    `stored` this is a simulation: layers read float initializers without data.
    """

    model: onnx.ModelProto
    wiring: Wiring  # of the model as it was
    placement: Placement
    ranges: Ranges
    stored: Mapping[int, Stored] | None
    arrays: dict[str, Array] = field(default_factory=dict)
    positions: dict[int, int] = field(default_factory=dict)
    weights: dict[int, str] = field(default_factory=dict)
    biases: dict[int, str] = field(default_factory=dict)

    def run(self) -> None:
        """Rewrites the nodes: weights before the layer that reads them, Q/DQ behind the node that writes."""
        from onnx import numpy_helper

        layers = {layer.index: layer for layer in self.placement.layers}
        del self.model.graph.node[:]
        for value in self.model.graph.input:
            self._add_pair(value.name, value.name)
        for index, node in enumerate(self.wiring.nodes):
            if index in layers and self.stored is None:
                self._simulate_layer(index, node)
            elif index in layers:
                self._quantize_layer(index, node)
            elif index in self.placement.guarded:
                self._guard(node)
            self._redirect_reads(index, node)
            self.positions[index] = len(self.model.graph.node)
            self._add_with_pairs(node)
        self.model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in self.arrays.items())

    def _simulate_layer(self, index: int, node: onnx.NodeProto) -> None:
        """Names for what the layer will read; every Conv and Gemm gets a bias."""
        import onnx

        self.weights[index] = node.input[1] = f"{node.output[0]}.weight"
        if node.op_type != "MatMul":
            self.biases[index] = f"{node.output[0]}.bias"
            del node.input[2:]
            node.input.append(self.biases[index])
        names = filter(None, (self.weights[index], self.biases.get(index)))
        self.model.graph.initializer.extend(onnx.TensorProto(name=name, data_type=1) for name in names)

    def _quantize_layer(self, index: int, node: onnx.NodeProto) -> None:
        """int8 weights in the file, and an int32 bias where the target wants one."""
        assert self.stored is not None
        stored, name = self.stored[index], node.output[0]
        if stored.bias is not None:
            if self._format.int32_bias:
                scale = bias_scale(self._affine(node.input[0]), stored.affine)
                bias = self._dequantized(f"{name}.bias", quantize_bias(stored.bias, scale), scale, axis=0)
            else:
                bias = f"{name}.bias"
                self.arrays[bias] = stored.bias
            del node.input[2:]
            node.input.append(bias)
        node.input[1] = self._dequantized(
            f"{name}.weight", stored.integers, stored.affine.scale, axis=stored.affine.axis
        )

    @property
    def _format(self) -> Format:
        return FORMATS[self.placement.form]

    def _guard(self, node: onnx.NodeProto) -> None:
        """Keeps a float layer's weights float: ONNX Runtime's WeightBiasQuantization makes them int8 with one scale.

        It does so to a Conv, ConvTranspose or Gemm between a DequantizeLinear and a QuantizeLinear, unless its bias is
        anything but an initializer. So the bias is stored in int32, in steps finer than float32's own.
        https://github.com/microsoft/onnxruntime/blob/main/onnxruntime/core/optimizer/qdq_transformer/weight_bias_quantization.cc
        """
        given = node.input[2] if len(node.input) > 2 else ""
        if node.op_type == "MatMul" or (given and given not in self.wiring.initializers):
            return
        bias = self._float(given) if given else np.zeros(_output_channels(node, self._float(node.input[1])), np.float32)
        scale = np.asarray(max(np.abs(bias).max() / 2**30, np.finfo(np.float32).tiny), np.float32)
        name = self._dequantized(f"{node.output[0]}.bias", quantize_bias(bias, scale), scale, axis=None)
        del node.input[2:]
        node.input.append(name)

    def _redirect_reads(self, index: int, node: onnx.NodeProto) -> None:
        for slot, name in enumerate(node.input):
            if (index, slot) in self.placement.reads and name not in self.placement.outputs:
                node.input[slot] = f"{name}.dequantized"

    def _add_with_pairs(self, node: onnx.NodeProto) -> None:
        """The node, and Q/DQ of what it writes. An output of the graph keeps its name behind them."""
        written = list(node.output)
        for slot, name in enumerate(written):
            if name in self.placement.outputs:
                node.output[slot] = f"{name}.float"
        self.model.graph.node.append(node)
        for name, source in zip(written, node.output, strict=True):
            self._add_pair(name, source)

    def _add_pair(self, tensor: str, source: str) -> None:
        """Q and DQ of a tensor that `source` brings, if it is to be quantized."""
        from onnx import helper

        if tensor not in self.placement.ranges_of:
            return
        origin, affine = self.placement.ranges_of[tensor], self._affine(tensor)
        parameters = {f"{origin}.quantized.scale": affine.scale, f"{origin}.quantized.zero_point": affine.zero_point}
        self.arrays.update(parameters)
        result = tensor if tensor in self.placement.outputs else f"{tensor}.dequantized"
        for op, read, write in (
            ("QuantizeLinear", source, f"{tensor}.quantized"),
            ("DequantizeLinear", f"{tensor}.quantized", result),
        ):
            self.model.graph.node.append(helper.make_node(op, [read, *parameters], [write], name=f"{tensor}.{op}"))

    def _dequantized(self, name: str, integers: Array, scale: Array, *, axis: int | None) -> str:
        """Stores integers with zero point 0 and adds the DequantizeLinear that reads them; the name of its output."""
        from onnx import helper

        stored = f"{name}.quantized"
        zero_point = np.zeros(scale.shape, integers.dtype)
        new = {stored: integers, f"{stored}.scale": scale, f"{stored}.zero_point": zero_point}
        self.arrays.update(new)
        node = helper.make_node("DequantizeLinear", list(new), [f"{name}.dequantized"], name=f"{name}.DequantizeLinear")
        if axis is not None:
            node.attribute.append(helper.make_attribute("axis", axis))
        self.model.graph.node.append(node)
        return f"{name}.dequantized"

    def _affine(self, tensor: str) -> Affine:
        return self._format.activations(*self.ranges.bounds[self.placement.ranges_of[tensor]])

    def _float(self, name: str) -> Array:
        from onnx import numpy_helper

        return numpy_helper.to_array(self.wiring.initializers[name])


def _output_channels(node: onnx.NodeProto, weight: Array) -> int:
    if node.op_type == "ConvTranspose":
        return int(weight.shape[1]) * int(attribute(node, "group", 1))
    return int(weight.shape[1 if node.op_type == "Gemm" and not attribute(node, "transB", 0) else 0])
