"""float16 weights and activations; inputs and outputs of the graph stay float32."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from memopt.errors import InputRefused
from memopt.tensors import Array
from memopt_export.calibrate import Ranges, calibrate
from memopt_export.graph import Graph, Wiring, label, refuse_subgraphs, wire
from memopt_export.means import UNLIMITED, Means
from memopt_export.quantize.quantized import Quantized
from memopt_export.recipe import Recipe

if TYPE_CHECKING:
    import onnx

    from memopt_models.data import Samples

_RECIPE = Recipe("fp16")
LARGEST = float(np.finfo(np.float16).max)
# Samples are a few of all the inputs there will be, and the largest values are the rarest. A factor of 2, one exponent,
# is the head room for those that no sample has shown; a node kept in float32 for nothing costs two Casts.
SAFE = LARGEST / 2
# Their type is an attribute, with float32 where it is absent, and no runtime has them in float16.
_FLOAT_SOURCES = frozenset(
    {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "EyeLike"}
)


def convert(
    graph: Graph, recipe: Recipe = _RECIPE, samples: Samples | None = None, means: Means = UNLIMITED
) -> Quantized:
    """The graph in float16, with Casts behind its inputs and before its outputs.

    A node computes in float32, between Casts, where
    1. the recipe keeps it float,
    2. it reads a finite weight beyond 65504, the largest half,
    3. its operator knows no float16 (Range), or takes its type from an attribute (RandomNormal),
    4. it reads or writes a tensor that goes beyond SAFE on the samples. Without samples nobody knows (ranges is None),
       and ONNX Runtime on a CPU does not show it either: it computes in float32 there, where a GPU gets infinity.
    A single input whose type is fixed, such as the scales of a Resize, stays float32 by itself. Sums inside a node are
    not seen.

    Raises:
        InputRefused: an operator is not ONNX's own, so nobody knows which types it takes; the graph has subgraphs; or
            the samples do not fit it or make NaN in it.
    """
    refuse_subgraphs(graph, "quantize")
    model = graph.copy_model()
    wiring = wire(model)
    floats = _float_tensors(model)
    allowed = [_Allowed.of(node, model) for node in wiring.nodes]
    ranges = None
    if samples is not None:
        tensors = [name for name in (*(spec.name for spec in graph.inputs), *wiring.writer) if name in floats]
        ranges = calibrate(graph, tensors, samples, means, allow_infinity=True)
    unsafe = _unsafe(ranges)
    kept = {
        index
        for index, node in enumerate(wiring.nodes)
        if recipe.excludes(label(node), node.op_type)
        or not recipe.includes(label(node), node.op_type)
        or _is_too_large(node, wiring)
        or allowed[index].never_half(node, floats)
        or not unsafe.isdisjoint((*node.input, *node.output))
    }
    _Conversion(model, wiring, floats, allowed, kept).run()
    names = tuple(label(wiring.nodes[index]) for index in sorted(kept))
    return Quantized(graph.with_model(model, precision=recipe.name), ranges, None, names)


def _float_tensors(model: onnx.ModelProto) -> frozenset[str]:
    """The names of all float32 tensors."""
    from onnx import TensorProto, shape_inference

    graph = shape_inference.infer_shapes(model).graph
    values = [value for part in (graph.input, graph.output, graph.value_info) for value in part]
    return frozenset(value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT) | {
        tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT
    }


def _unsafe(ranges: Ranges | None) -> frozenset[str]:
    """Case 4: the tensors that may leave what a half can hold."""
    bounds = {} if ranges is None else ranges.bounds
    return frozenset(name for name, (low, high) in bounds.items() if max(-low, high) > SAFE)


@dataclass(frozen=True)
class _Allowed:
    """Which inputs and outputs of a node its operator allows in float16; the last entry stands for all that follow."""

    inputs: tuple[bool, ...]
    outputs: tuple[bool, ...]

    @classmethod
    def of(cls, node: onnx.NodeProto, model: onnx.ModelProto) -> _Allowed:
        """Read from ONNX's own schema of the operator, in the model's opset."""
        from onnx import defs

        version = next((entry.version for entry in model.opset_import if entry.domain == node.domain), 1)
        try:
            schema = defs.get_schema(node.op_type, version, node.domain)
        except defs.SchemaError as error:
            raise InputRefused(
                f"{label(node)!r} is a {node.domain or 'ai.onnx'}.{node.op_type}, whose types are not known"
            ) from error
        half = {c.type_param_str for c in schema.type_constraints if "tensor(float16)" in c.allowed_type_strs}
        if node.op_type in _FLOAT_SOURCES:
            half = set()
        return cls(
            tuple(parameter.type_str in half for parameter in schema.inputs),
            tuple(parameter.type_str in half for parameter in schema.outputs),
        )

    def input(self, slot: int) -> bool:
        """Whether this input may be a half."""
        return self.inputs[min(slot, len(self.inputs) - 1)]

    def output(self, slot: int) -> bool:
        """Whether this output may be a half."""
        return self.outputs[min(slot, len(self.outputs) - 1)]

    def never_half(self, node: onnx.NodeProto, floats: Collection[str]) -> bool:
        """Whether the node has float tensors, and none of them may be a half (case 3)."""
        inputs = [self.input(slot) for slot, name in enumerate(node.input) if name in floats]
        outputs = [self.output(slot) for slot, name in enumerate(node.output) if name in floats]
        return bool(inputs + outputs) and not any(inputs + outputs)


def _is_too_large(node: onnx.NodeProto, wiring: Wiring) -> bool:
    """Case 2, for initializers and for Constant nodes."""
    from onnx import TensorProto, numpy_helper

    tensors = [wiring.initializers[name] for name in node.input if name in wiring.initializers]
    tensors += [part.t for part in node.attribute if part.HasField("t")]
    arrays = [numpy_helper.to_array(tensor) for tensor in tensors if tensor.data_type == TensorProto.FLOAT]
    return any(bool((np.isfinite(array) & (np.abs(array) > LARGEST)).any()) for array in arrays)


@dataclass(frozen=True, eq=False)
class _Conversion:
    """One pass over the nodes of `model`, which is changed in place.

    A float tensor T is written in one precision and read in one or both. The form that was written is called T; the
    other is `T.half` or `T.float`, made where it is first read. Outputs of the graph are called T in float32.
    """

    model: onnx.ModelProto
    wiring: Wiring  # of the model as it was
    floats: frozenset[str]
    allowed: list[_Allowed]
    kept: Collection[int]
    written_half: set[str] = field(default_factory=set)
    made: set[str] = field(default_factory=set)

    def run(self) -> None:
        """Rewrites nodes and initializers."""
        from onnx import TensorProto

        weights = [tensor for tensor in self.model.graph.initializer if tensor.data_type == TensorProto.FLOAT]
        self.written_half.update(tensor.name for tensor in weights)
        others = [tensor for tensor in self.model.graph.initializer if tensor.data_type != TensorProto.FLOAT]
        del self.model.graph.node[:], self.model.graph.initializer[:]
        self.model.graph.initializer.extend(others)
        for index, node in enumerate(self.wiring.nodes):
            self._convert(index, node)
        for value in self.model.graph.output:
            if value.name in self.floats:
                self._read(value.name, half=False)

    def _convert(self, index: int, node: onnx.NodeProto) -> None:
        float_only = index in self.kept
        for slot, name in enumerate(node.input):
            if name in self.floats:
                node.input[slot] = self._read(name, half=not float_only and self.allowed[index].input(slot))
        for slot, name in enumerate(node.output):
            if name in self.floats and not float_only and self.allowed[index].output(slot):
                self.written_half.add(name)
                node.output[slot] = self._name(name, half=True)
                _write_half(node)
        self.model.graph.node.append(node)

    def _name(self, tensor: str, *, half: bool) -> str:
        plain_is_half = tensor in self.written_half and tensor not in self.wiring.outputs
        return tensor if half == plain_is_half else f"{tensor}.half" if half else f"{tensor}.float"

    def _read(self, tensor: str, *, half: bool) -> str:
        """The name of the tensor in the wanted precision, after seeing to it that it exists."""
        name = self._name(tensor, half=half)
        if name not in self.made and (tensor in self.wiring.initializers or half != (tensor in self.written_half)):
            self.made.add(name)
            if tensor in self.wiring.initializers:
                self._store(tensor, name, half=half)
            else:
                self._cast(self._name(tensor, half=not half), name, half=half)
        return name

    def _store(self, tensor: str, name: str, *, half: bool) -> None:
        from onnx import numpy_helper

        array: Array = numpy_helper.to_array(self.wiring.initializers[tensor])
        array = array.astype(np.float16) if half else array
        self.model.graph.initializer.append(numpy_helper.from_array(array, name))

    def _cast(self, source: str, name: str, *, half: bool) -> None:
        from onnx import TensorProto, helper

        to = TensorProto.FLOAT16 if half else TensorProto.FLOAT
        self.model.graph.node.append(helper.make_node("Cast", [source], [name], name=f"{name}.Cast", to=to))


def _write_half(node: onnx.NodeProto) -> None:
    """Turns the attribute by which Cast, Constant and ConstantOfShape are told to write float32."""
    from onnx import TensorProto, helper, numpy_helper

    if node.op_type == "Cast":
        next(part for part in node.attribute if part.name == "to").i = TensorProto.FLOAT16
    elif node.op_type in ("Constant", "ConstantOfShape"):
        value = helper.get_attribute_value(node.attribute[0]) if node.attribute else np.zeros(1)
        array = numpy_helper.to_array(value) if isinstance(value, TensorProto) else np.asarray(value)
        del node.attribute[:]
        node.attribute.append(helper.make_attribute("value", numpy_helper.from_array(array.astype(np.float16))))
