"""float16 or bfloat16 weights and activations; what either would lose stays float32, and so do inputs and outputs."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from memopt.errors import InputRefused
from memopt.sizes import show_size
from memopt.tensors import Array
from memopt_export.calibrate import Ranges, calibrate
from memopt_export.graph import Graph, Wiring, label, refuse_subgraphs, wire
from memopt_export.means import UNLIMITED, Means
from memopt_export.opset import at_least_opset
from memopt_export.quantize.quantized import Quantized
from memopt_export.recipe import Recipe

if TYPE_CHECKING:
    import onnx
    from numpy.typing import DTypeLike

    from memopt_models.data import Samples

_FP16 = Recipe("fp16")
# Larger whole numbers are no counts: float32 itself skips some of them.
_LARGEST_COUNT = 2**24


@dataclass(frozen=True)
class Format:
    """A 16-bit float.

    Attributes:
        dtype: its name in ONNX, `float16` or `bfloat16`.
        largest: beyond it lies infinity.
        smallest: the smallest with all its bits; what is nearer to zero loses bits first, and then all.
        opset: the first in which convolutions and pooling know it.
        onnxruntime_cpu: what ONNX Runtime does with it on a CPU.
    """

    dtype: str
    largest: float
    smallest: float
    opset: int
    onnxruntime_cpu: str

    @property
    def safe(self) -> float:
        """What values on samples may reach.

        Samples are a few of all the inputs there will be, and the largest values are the rarest. A factor of 2, one
        exponent, is the head room for those that no sample has shown; a node kept in float32 for nothing costs two
        Casts.
        """
        return self.largest / 2

    def rounded(self, array: Array) -> Array:
        """The array in this format."""
        with np.errstate(over="ignore"):
            return array.astype(self._numpy())

    def loses(self, array: Array) -> bool:
        """Whether a float32 constant comes out as something else, which no rounding of single values explains.

        1. A finite value becomes infinite.
        2. Together, the values are off by more than 2^-8 of themselves: they lie below `smallest`, as an epsilon does.
        3. Whole numbers become other whole numbers: positions and sizes are told by their last digit.
        """
        array = array[np.isfinite(array)].astype(np.float64)
        with np.errstate(over="ignore"):
            rounded = array.astype(np.float32).astype(self._numpy()).astype(np.float64)
        if not np.isfinite(rounded).all():
            return True
        if bool((array == np.rint(array)).all()) and float(np.abs(array).max(initial=0)) < _LARGEST_COUNT:
            return bool((array != rounded).any())
        return bool(np.linalg.norm(array - rounded) > 2.0**-8 * np.linalg.norm(array))

    def _numpy(self) -> DTypeLike:
        import ml_dtypes

        return np.float16 if self.dtype == "float16" else ml_dtypes.bfloat16


FORMATS = {
    "fp16": Format(
        "float16", float(np.finfo(np.float16).max), float(np.finfo(np.float16).smallest_normal), 1,
        "onnxruntime computes most of it in float32 on a CPU: private memory and time stay as they are, or grow",
    ),
    "bf16": Format(
        "bfloat16", 255 * 2.0**120, float(np.finfo(np.float32).smallest_normal), 22,
        "onnxruntime has no bfloat16 operators for a CPU and does not open it there",
    ),
}  # fmt: skip
# What turns a little into a lot, or the other way: behind an epsilon, they decide what it was there for.
_SENSITIVE = frozenset({"Sqrt", "Pow", "Max", "Clip", "Abs", "Reciprocal", "Div", "Log"})
_LAST_SENSITIVE = frozenset({"Reciprocal", "Div", "Log"})
# What moves values from one to the other.
_MOVING = frozenset({"Expand", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "Identity"})
# Their type is an attribute, with float32 where it is absent, and no runtime has them in float16.
_FLOAT_SOURCES = frozenset(
    {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "EyeLike"}
)


def convert(
    graph: Graph, recipe: Recipe = _FP16, samples: Samples | None = None, means: Means = UNLIMITED
) -> Quantized:
    """The graph in the recipe's format, with Casts behind its inputs and before its outputs.

    A node computes in float32, between Casts, where
    1. the recipe keeps it float,
    2. it reads a constant that the format loses, see `Format.loses`; and, where that was an epsilon, with all up to
       the division that it is there for,
    3. its operator does not know the format (Range), or takes its type from an attribute (RandomNormal),
    4. it reads or writes a tensor that on the samples goes beyond `Format.safe`, or never rises to `Format.smallest`.
       Without samples nobody knows (ranges is None), and ONNX Runtime on a CPU does not show it either: it computes
       fp16 in float32 there, where a GPU gets infinity or zero; see `emulated`.
    A single input whose type is fixed, such as the scales of a Resize, stays float32 by itself. Sums inside a node are
    not seen. With `recipe.convert_io` there are no Casts at the ends: inputs and outputs change their type.

    Raises:
        InputRefused: an operator is not ONNX's own, so nobody knows which types it takes; the graph has subgraphs; or
            the samples do not fit it or make NaN in it.
    """
    refuse_subgraphs(graph, "quantize")
    form = FORMATS[recipe.precision]
    original, graph = graph, at_least_opset(graph, form.opset)
    model = graph.copy_model()
    wiring = wire(model)
    floats = _float_tensors(model)
    allowed = [_Allowed.of(node, model, form) for node in wiring.nodes]
    ranges = None
    if samples is not None:
        tensors = [name for name in (*(spec.name for spec in graph.inputs), *wiring.writer) if name in floats]
        ranges = calibrate(graph, tensors, samples, means, allow_infinity=True)
    unsafe = _unsafe(ranges, form)
    lossy = {index for index, node in enumerate(wiring.nodes) if _reads_lost(node, wiring, form)}
    kept = (
        lossy
        | _behind_epsilons(lossy, wiring, form)
        | {
            index
            for index, node in enumerate(wiring.nodes)
            if recipe.excludes(label(node), node.op_type)
            or not recipe.includes(label(node), node.op_type)
            or allowed[index].never_half(node, floats)
            or not unsafe.isdisjoint((*node.input, *node.output))
        }
    )
    _Conversion(model, wiring, floats, allowed, kept, form, recipe.convert_io).run()
    result = graph.with_model(model, precision=recipe.name)
    names = tuple(label(wiring.nodes[index]) for index in sorted(kept))
    return Quantized(result, ranges, None, names, _notes(original, result, form))


def _notes(before: Graph, after: Graph, form: Format) -> tuple[str, ...]:
    small, large = (show_size(sum(graph.weights_bytes().values())) for graph in (after, before))
    return (
        f"the file's weights take {small} instead of {large}, an engine's weights and activations about half",
        form.onnxruntime_cpu,
    )


def _float_tensors(model: onnx.ModelProto) -> frozenset[str]:
    """The names of all float32 tensors."""
    from onnx import TensorProto, shape_inference

    graph = shape_inference.infer_shapes(model).graph
    values = [value for part in (graph.input, graph.output, graph.value_info) for value in part]
    return frozenset(value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT) | {
        tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT
    }


def _unsafe(ranges: Ranges | None, form: Format) -> frozenset[str]:
    """Case 4: the tensors that may leave what a half can hold, at either end; all zeros are safe."""
    largest = {} if ranges is None else {name: max(-low, high) for name, (low, high) in ranges.bounds.items()}
    return frozenset(name for name, value in largest.items() if value > form.safe or 0 < value < form.smallest)


@dataclass(frozen=True)
class _Allowed:
    """Which inputs and outputs of a node its operator allows as halves; the last entry stands for all that follow."""

    inputs: tuple[bool, ...]
    outputs: tuple[bool, ...]

    @classmethod
    def of(cls, node: onnx.NodeProto, model: onnx.ModelProto, form: Format) -> _Allowed:
        """Read from ONNX's own schema of the operator, in the model's opset."""
        from onnx import defs

        version = next((entry.version for entry in model.opset_import if entry.domain == node.domain), 1)
        try:
            schema = defs.get_schema(node.op_type, version, node.domain)
        except defs.SchemaError as error:
            raise InputRefused(
                f"{label(node)!r} is a {node.domain or 'ai.onnx'}.{node.op_type}, whose types are not known"
            ) from error
        half = {c.type_param_str for c in schema.type_constraints if f"tensor({form.dtype})" in c.allowed_type_strs}
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


def _reads_lost(node: onnx.NodeProto, wiring: Wiring, form: Format) -> bool:
    """Case 2, for initializers and for Constant nodes."""
    return any(form.loses(array) for array in _constants(node, wiring))


def _constants(node: onnx.NodeProto, wiring: Wiring) -> list[Array]:
    """The float32 constants that the node reads or carries."""
    from onnx import TensorProto, numpy_helper

    tensors = [wiring.initializers[name] for name in node.input if name in wiring.initializers]
    tensors += [part.t for part in node.attribute if part.HasField("t")]
    return [numpy_helper.to_array(tensor) for tensor in tensors if tensor.data_type == TensorProto.FLOAT]


def _behind_epsilons(lossy: Collection[int], wiring: Wiring, form: Format) -> set[int]:
    """Case 2: the nodes from one that adds an epsilon, or clips at one, to the division whose denominator it saves.

    A zero that the epsilon made 1e-12 would be zero again in the format.
    """
    found: set[int] = set()
    todo = [index for index in lossy if any(_is_tiny(array, form) for array in _constants(wiring.nodes[index], wiring))]
    while todo:
        index = todo.pop()
        if wiring.nodes[index].op_type in _LAST_SENSITIVE:
            continue
        for output in wiring.nodes[index].output:
            for reader, _ in wiring.readers.get(output, ()):
                if wiring.nodes[reader].op_type in _SENSITIVE | _MOVING and reader not in found:
                    found.add(reader)
                    todo.append(reader)
    return found


def _is_tiny(array: Array, form: Format) -> bool:
    return bool(array.size) and 0 < float(np.abs(array).max()) < form.smallest


@dataclass(frozen=True, eq=False)
class _Conversion:
    """One pass over the nodes of `model`, which is changed in place.

    A float tensor T is written in one precision and read in one or both. The form that was written is called T; the
    other is `T.half` or `T.float`, made where it is first read. Outputs of the graph are called T in float32, or
    as halves where they are to be converted.
    """

    model: onnx.ModelProto
    wiring: Wiring  # of the model as it was
    floats: frozenset[str]
    allowed: list[_Allowed]
    kept: Collection[int]
    form: Format
    convert_io: bool
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
        if self.convert_io:
            self._convert_ends()
        for index, node in enumerate(self.wiring.nodes):
            self._convert(index, node)
        for value in self.model.graph.output:
            if value.name in self.floats:
                self._read(value.name, half=self.convert_io)

    def _convert_ends(self) -> None:
        ends = [value for value in self.model.graph.input if value.name not in self.wiring.initializers]
        self.written_half.update(value.name for value in ends if value.name in self.floats)
        for value in (*ends, *self.model.graph.output):
            if value.name in self.floats:
                value.type.tensor_type.elem_type = self._onnx_type()

    def _convert(self, index: int, node: onnx.NodeProto) -> None:
        float_only = index in self.kept
        for slot, name in enumerate(node.input):
            if name in self.floats:
                node.input[slot] = self._read(name, half=not float_only and self.allowed[index].input(slot))
        for slot, name in enumerate(node.output):
            if name not in self.floats:
                continue
            half = not float_only and self.allowed[index].output(slot)
            if half:
                self.written_half.add(name)
                self._write_half(node)
            node.output[slot] = self._name(name, half=half)
        self.model.graph.node.append(node)

    def _name(self, tensor: str, *, half: bool) -> str:
        is_output = tensor in self.wiring.outputs
        plain_is_half = self.convert_io if is_output else tensor in self.written_half
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
        array = self.form.rounded(array) if half else array
        self.model.graph.initializer.append(numpy_helper.from_array(array, name))

    def _cast(self, source: str, name: str, *, half: bool) -> None:
        from onnx import TensorProto, helper

        to = self._onnx_type() if half else TensorProto.FLOAT
        self.model.graph.node.append(helper.make_node("Cast", [source], [name], name=f"{name}.Cast", to=to))

    def _write_half(self, node: onnx.NodeProto) -> None:
        """Turns the attribute by which Cast, Constant and ConstantOfShape are told to write float32."""
        from onnx import TensorProto, helper, numpy_helper

        if node.op_type == "Cast":
            next(part for part in node.attribute if part.name == "to").i = self._onnx_type()
        elif node.op_type in ("Constant", "ConstantOfShape"):
            value = helper.get_attribute_value(node.attribute[0]) if node.attribute else np.zeros(1)
            array = numpy_helper.to_array(value) if isinstance(value, TensorProto) else np.asarray(value)
            del node.attribute[:]
            node.attribute.append(helper.make_attribute("value", numpy_helper.from_array(self.form.rounded(array))))

    def _onnx_type(self) -> int:
        from onnx import TensorProto

        return int(TensorProto.DataType.Value(self.form.dtype.upper()))


def emulated(graph: Graph) -> Graph:
    """A float32 graph that rounds wherever this one, of fp16 or bf16, holds a half: what a GPU gets, on any CPU.

    Run it unoptimized: two Casts that only round may be optimized away. Sums inside a node are exact.
    """
    from onnx import TensorProto, helper, numpy_helper, shape_inference

    halves = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
    model = shape_inference.infer_shapes(graph.model)
    values = (*model.graph.input, *model.graph.output, *model.graph.value_info)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    for tensor in model.graph.initializer:
        if tensor.data_type in halves:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type in halves:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    nodes = list(model.graph.node)
    del model.graph.node[:], model.graph.value_info[:]
    for node in nodes:
        _compute_in_float(node)
        half = {name: types[name] for name in node.output if types.get(name) in halves}
        exact = {name: f"{name}.exact" for name in half}
        for slot, name in enumerate(node.output):
            node.output[slot] = exact.get(name, name)
        model.graph.node.append(node)
        for name, kind in half.items():
            model.graph.node.append(helper.make_node("Cast", [exact[name]], [f"{name}.rounded"], to=kind))
            model.graph.node.append(helper.make_node("Cast", [f"{name}.rounded"], [name], to=TensorProto.FLOAT))
    return graph.with_model(model)


def _compute_in_float(node: onnx.NodeProto) -> None:
    """Turns the attribute by which a node is told to write halves."""
    from onnx import TensorProto, numpy_helper

    halves = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
    for part in node.attribute:
        if part.name == "to" and part.i in halves:
            part.i = TensorProto.FLOAT
        elif part.HasField("t") and part.t.data_type in halves:
            part.t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(part.t).astype(np.float32)))
