"""Did it take? What an ONNX model costs that it need not cost: each thing with its bytes, its place and a remedy."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from memopt.sizes import show_size
from memopt.tensors import Array
from memopt_export.bodies import bodies, captured, node_label
from memopt_export.execution import Execution, Left
from memopt_export.graph import METADATA_KEY, Graph, Wiring, wire
from memopt_export.placement import WEIGHTED
from memopt_export.tensor_rules import Place, check_tensor, plain_name, size_bytes

if TYPE_CHECKING:
    import onnx

# Where a tensor is stored, in words; "inner" is inside If, Loop, Scan or a function.
_KINDS = {
    "initializer": "initializers", "constant": "Constant nodes", "attribute": "other nodes",
    "inner": "subgraphs and functions",
}  # fmt: skip
# What costs less is not worth a line.
LEAST_BYTES = 1024
# Shares of zeros that no training leaves behind by chance.
LEAST_ZEROS = 0.3
LEAST_CHANNELS = 0.05
# Calibration on fewer samples gives ranges that the next sample may leave.
FEW_SAMPLES = 32
# Before this IR version every initializer had to be among the inputs, and is constant all the same.
_IR_OF_OVERRIDES = 4
_NARROW = ("float16", "bfloat16", "int8", "uint8", "int4", "uint4")
# Whose zeros are zeros: unsigned integers have a zero point.
_PLAIN = ("float16", "float32", "float64", "int8")
_STACK = re.compile(r'File ".*", line \d|\w\.py:\d|\w\.py\(\d')
_SHOWN = 5  # names in one finding
_CHUNK = 2**20  # elements looked at together
_LEVELS = 255  # steps of an 8-bit grid
_LEAST_ROW, _PROBED = 16, 4096  # elements: fewer fit any grid; so many tell mostly
_ROUNDING = 1e-3  # of a step: what float32 loses of 255 of them is far less
_PRUNE = "memopt-export prune CHECKPOINT --ratio 0.5 -o PRUNED.safetensors"


@dataclass(frozen=True)
class Finding:
    """One thing that costs memory or disk and need not, or that makes a number doubtful.

    Attributes:
        check: which one found it, in few words that stay.
        what: it is, in words.
        where: names of tensors or nodes, the first of `count`.
        count: of the places.
        file_bytes: what the file would lose.
        memory_bytes: what a session would hold less; None: not known.
        remedy: what to type.
        variant: of a bundle; None: the file itself.
    """

    check: str
    what: str
    where: tuple[str, ...]
    count: int
    file_bytes: int
    memory_bytes: int | None
    remedy: str
    variant: str | None = None

    @property
    def cost_bytes(self) -> int:
        """By which findings are sorted: the larger of the two costs."""
        return max(self.file_bytes, self.memory_bytes or 0)

    @property
    def costs_nothing(self) -> bool:
        """Whether it is about trust, not about bytes."""
        return self.check == "calibration"


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor that a model stores.

    Attributes:
        name: its own, or that of the node that carries it.
        tensor: with its data, external data as well when that is loaded.
        kind: a key of _KINDS.
        place: of external data, which may have been loaded since; None for what lies in the file itself.
    """

    name: str
    tensor: onnx.TensorProto
    kind: str
    place: Place | None

    @property
    def size_bytes(self) -> int:
        """Of its values, packed."""
        if self.dtype == "string":
            return sum(len(text) for text in self.tensor.string_data)
        return size_bytes(self.tensor.data_type, self.tensor.dims)

    @property
    def dtype(self) -> str:
        """Such as "float32"."""
        return plain_name(self.tensor.data_type)

    @property
    def bytes_beside(self) -> int:
        """What the file spends on its values beyond their own size."""
        from onnx import TensorProto

        head = TensorProto(name=self.tensor.name, data_type=self.tensor.data_type, dims=self.tensor.dims)
        return max(int(self.tensor.ByteSize()) - int(head.ByteSize()) - self.size_bytes, 0)

    @property
    def values(self) -> Array:
        """A copy of its values; those that numpy does not know as the extension types of ml_dtypes."""
        from onnx import numpy_helper

        return numpy_helper.to_array(self.tensor)

    @cached_property
    def digest(self) -> bytes:
        """Of dtype, dims and values, however they are stored."""
        head = f"{self.tensor.data_type} {tuple(self.tensor.dims)} ".encode()
        same = self.tensor.raw_data if self.tensor.HasField("raw_data") else self.values.tobytes()
        return hashlib.sha256(head + same).digest()


@dataclass(frozen=True, eq=False)
class Model:
    """What the checks look at.

    Attributes:
        graph: external data loaded.
        stored: all its tensors, see `stored_in`.
        execution: what ONNX Runtime executes; None: not known.
        path: by which remedies call it.
        source: by which remedies call the float graph that it was quantized from.
    """

    graph: Graph
    stored: tuple[Stored, ...]
    execution: Execution | None
    path: Path
    source: Path = Path("FLOAT.onnx")

    @cached_property
    def wiring(self) -> Wiring:
        """Of the main graph."""
        return wire(self.graph.model)

    @cached_property
    def weights(self) -> tuple[Stored, ...]:
        """The matrices and kernels of the main graph's layers, plain or behind a DequantizeLinear."""
        read = {node.input[1] for node in self.wiring.nodes if node.op_type in WEIGHTED and len(node.input) > 1}
        for node in self.wiring.nodes:
            if node.op_type == "DequantizeLinear" and not read.isdisjoint(node.output):
                read.update(node.input[:1])
        return tuple(one for one in self.own if one.name in read and len(one.tensor.dims) > 1)

    @cached_property
    def own(self) -> tuple[Stored, ...]:
        """What the main graph stores for its nodes to read."""
        return tuple(one for one in self.stored if one.kind in ("initializer", "constant"))

    @cached_property
    def comparable(self) -> tuple[Stored, ...]:
        """The weights whose zeros are told from the numbers themselves, and that are worth a look."""
        return tuple(one for one in self.weights if one.dtype in _PLAIN and one.size_bytes >= LEAST_BYTES)

    @property
    def simplified(self) -> str:
        """What makes a file of it that is stored as it should be."""
        return self.command("simplify {}", "simple")

    @property
    def served(self) -> str:
        """What brings it to where its Q/DQ are computed in integers."""
        told = self.graph.quantization
        if told is not None and told.recipe.target == "tensorrt":
            return f"memopt-export engine {self.path} -o {self.path.stem}.engine"
        return self.calibrated

    @property
    def calibrated(self) -> str:
        """What makes of its source a graph that this CPU computes in integers, on samples that are known."""
        return f"memopt-export quantize {self.source} --precision int8 --target cpu --data SPEC -o INT8.onnx"

    def command(self, words: str, ending: str) -> str:
        """What makes a new file of this one, which stands for {}."""
        return f"memopt-export {words.format(self.path)} -o {self.path.stem}-{ending}.onnx"


def stored_in(model: onnx.ModelProto, folder: Path) -> tuple[Stored, ...]:
    """All tensors that a model stores; external data, which need not be loaded, lies in `folder`."""
    initializers = {tensor.name for tensor in model.graph.initializer}
    constants = {name for node in model.graph.node if node.op_type == "Constant" for name in node.output}
    found: list[Stored] = []
    for index, body in enumerate(bodies(model)):
        for name, tensor in body.tensors():
            main = "initializer" if name in initializers else "constant" if name in constants else "attribute"
            found.append(Stored(name, tensor, "inner" if index else main, check_tensor(tensor, folder)))
    return tuple(found)


def bytes_by_dtype(stored: Sequence[Stored]) -> dict[str, int]:
    """Bytes of these tensors by dtype, 4-bit integers packed, the most first."""
    return _sum((one.dtype, one.size_bytes) for one in stored)


def bytes_by_place(stored: Sequence[Stored]) -> dict[str, int]:
    """Bytes of these tensors by where they lie, the most first; what several share counts for each."""
    return _sum((_KINDS[one.kind] if one.place is None else "external data", one.size_bytes) for one in stored)


def _sum(sizes: Iterable[tuple[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for name, size in sizes:
        total[name] += size
    return dict(total.most_common())


def find(model: Model) -> tuple[Finding, ...]:
    """All that the checks find, the most expensive first."""
    found = [each for check in CHECKS for each in check(model)]
    worth = [
        each for each in found if each.memory_bytes is None or each.costs_nothing or each.cost_bytes >= LEAST_BYTES
    ]
    return tuple(sorted(worth, key=lambda each: (-each.cost_bytes, each.check)))


# --- how it is stored


def _stored_one_by_one(model: Model) -> Iterator[Finding]:
    """Numbers in typed fields: a negative int8 takes ten bytes, and none of them can lie in a mapped file."""
    odd = [one for one in model.own if one.place is None and not one.tensor.HasField("raw_data")]
    odd = [one for one in odd if one.size_bytes and one.dtype != "string"]
    beside = sum(one.bytes_beside for one in odd)
    mappable = [one for one in odd if one.kind == "initializer" and one.size_bytes >= LEAST_BYTES]
    what = (
        f"numbers in typed fields instead of raw_data: {show_size(_bytes(odd))} take {show_size(_bytes(odd) + beside)} "
        "of the file, and cannot be mapped"
    )
    yield from _finding("stored one by one", what, odd, beside, _bytes(mappable), model.simplified)


def _stored_twice(model: Model) -> Iterator[Finding]:
    first: dict[bytes, Stored] = {}
    large = [one for one in model.own if one.size_bytes >= LEAST_BYTES]
    again = [one for one in large if first.setdefault(one.digest, one) is not one]
    in_file = [one for one in again if one.place is None or one.place != first[one.digest].place]
    what = "the same values under several names, each held by a session"
    yield from _finding("stored twice", what, again, _bytes(in_file), _bytes(again), model.simplified)


def _never_read(model: Model) -> Iterator[Finding]:
    read = {name for node in model.wiring.nodes for name in (*node.input, *captured(node))} | model.wiring.outputs
    idle = [one for one in model.own if one.name not in read]
    yield from _finding("never read", "tensors that no node reads", idle, _bytes(idle), 0, model.simplified)


def _constant_nodes(model: Model) -> Iterator[Finding]:
    large = [one for one in model.own if one.kind == "constant" and one.size_bytes >= LEAST_BYTES]
    what = "weights in Constant nodes, which cannot be mapped: every process has its own copy"
    yield from _finding("constant nodes", what, large, 0, _bytes(large), model.simplified)


def _weights_as_inputs(model: Model) -> Iterator[Finding]:
    """ONNX Runtime folds and fuses constants, and before IR version 4 an initializer among the inputs is one.

    https://onnxruntime.ai/docs/performance/model-optimizations/graph-optimizations.html
    """
    inputs = {value.name: value for value in model.graph.model.graph.input}
    both = [one for one in model.own if one.kind == "initializer" and one.name in inputs]
    if model.graph.model.ir_version >= _IR_OF_OVERRIDES:
        what = "weights among the inputs, so a caller may replace them: ONNX Runtime folds and fuses none of them"
        size = sum(inputs[one.name].ByteSize() for one in both)
        yield from _finding("weights as inputs", what, both, size, None, model.simplified)


def _notes(model: Model) -> Iterator[Finding]:
    """Doc strings, metadata and intermediate shapes; torch writes the Python stack of each node."""
    proto = model.graph.model
    size = len(proto.doc_string.encode())
    size += sum(entry.ByteSize() for entry in proto.metadata_props if entry.key != METADATA_KEY)
    places, traces = [], 0
    for body in bodies(proto):
        size += sum(value.ByteSize() for value in body.graph.value_info)
        parts = [(body.graph.name, body.graph), *((node_label(node), node) for node in body.graph.node)]
        parts += [(tensor.name, tensor) for tensor in getattr(body.graph, "initializer", ())]
        for name, part in parts:
            own = len(part.doc_string.encode()) + sum(entry.ByteSize() for entry in part.metadata_props)
            size += own
            places += [name] if own else []
            traces += any(map(_STACK.search, (part.doc_string, *(entry.value for entry in part.metadata_props))))
    said = f"; {traces} of them name the source files of whoever exported it" if traces else ""
    if size:
        what = f"doc strings, metadata and shapes that nothing needs to run{said}"
        shown = tuple(places[:_SHOWN])
        yield Finding("notes", what, shown, len(places), size, 0, model.simplified)


# --- which numbers it stores


def _doubles(model: Model) -> Iterator[Finding]:
    wide = [one for one in model.stored if one.dtype == "float64"]
    what, half = "constants of 64 bits; what they meet is computed in 64 bits too", _bytes(wide) // 2
    yield from _finding("float64", what, wide, half, half, "memopt-export export CHECKPOINT -o MODEL.onnx")


def _fits_less(model: Model) -> Iterator[Finding]:
    """float32 weights that lose nothing in 8 bits or in 16: they were stored so once, and have been converted."""
    singles = [one for one in model.weights if one.dtype == "float32" and one.size_bytes >= LEAST_BYTES]
    fits = {one.name: 8 if _is_grid(one.values) else 16 if _is_half(one.values) else 32 for one in singles}
    for bits, precision in ((8, "int8-weights"), (16, "fp16")):
        found = [one for one in singles if fits[one.name] == bits]
        what, saved = (
            f"float32 weights of which every value fits {bits} bits exactly",
            _bytes(found) * (32 - bits) // 32,
        )
        remedy = model.command(f"quantize {{}} --precision {precision}", precision)
        if 2 * _bytes(found) < _bytes(singles):
            continue  # a few by chance, or a table
        yield from _finding(f"fits {bits} bits", what, found, saved, saved, remedy)


def _zero_channels(model: Model) -> Iterator[Finding]:
    """Pruned, and not shrunk. What a layer reads from a channel that is zero is not counted."""
    sizes = {one.name: _bytes_of_zero_channels(one.values) for one in model.comparable}
    found = [one for one in model.comparable if sizes[one.name] >= LEAST_CHANNELS * one.size_bytes]
    what = "channels that are all zero, stored and computed all the same: at least this goes when they are taken out"
    size = sum(sizes[one.name] for one in found)
    yield from _finding("zero channels", what, found, size, size, _PRUNE)


def _scattered_zeros(model: Model) -> Iterator[Finding]:
    """Pruned one by one or N:M: a zero takes as many bytes as any other number."""
    sizes = {
        one.name: (one.values.size - int(np.count_nonzero(one.values))) * one.values.itemsize
        - _bytes_of_zero_channels(one.values)
        for one in model.comparable
    }
    found = [one for one in model.comparable if sizes[one.name] >= LEAST_ZEROS * one.size_bytes]
    two_of_four = bool(found) and all(_is_two_of_four(one.values) for one in found)
    how = "two of each four, which TensorRT computes faster" if two_of_four else "scattered"
    what = f"zeros, {how}: they save no bytes, in the file or in memory, as channels would"
    size = sum(sizes[one.name] for one in found)
    yield from _finding("scattered zeros", what, found, size, size, _PRUNE)


# --- what ONNX Runtime makes of it


def _unfused(model: Model) -> Iterator[Finding]:
    if model.execution is not None:
        what = "between integers and floats that are quantized again"
        yield from _left("unfused Q/DQ", what, model.execution.activations, model.served)


def _unpacked_in_each_run(model: Model) -> Iterator[Finding]:
    if model.execution is not None:
        what = "behind stored weights, which become floats in every run beside the integers"
        yield from _left("unpacked in each run", what, model.execution.weights, model.served)


def _unpacked_at_load(model: Model) -> Iterator[Finding]:
    """Weights of few bits that a session holds in float32, because this CPU has no kernel for them."""
    if model.execution is None:
        return
    stored, held = bytes_by_dtype(model.stored), model.execution.held_bytes
    lost = sum(max(stored.get(dtype, 0) - held.get(dtype, 0), 0) for dtype in _NARROW)
    gained = held.get("float32", 0) - stored.get("float32", 0)
    if lost >= LEAST_BYTES and gained > lost:
        narrow = [one for one in model.stored if one.dtype in _NARROW and one.size_bytes >= LEAST_BYTES]
        what = f"{show_size(lost)} of weights become {show_size(gained)} of float32 in ONNX Runtime on this CPU"
        remedy = model.calibrated
        yield from _finding("unpacked at load", what, narrow, 0, gained - lost, remedy)


def _calibration(model: Model) -> Iterator[Finding]:
    """Ranges of activations that nobody can vouch for, or that few samples gave."""
    told = model.graph.quantization
    static = [node for node in model.wiring.nodes if _has_static_range(node, model.wiring)]
    if told is None or told.source is None:
        what = "ranges of activations from nobody knows where: the file does not say what it was calibrated on"
    else:
        what = f"ranges of activations from {told.samples} samples of {told.source}, fewer than {FEW_SAMPLES}"
    trained = told is not None and told.trained
    if static and not trained and (told is None or told.source is None or told.samples < FEW_SAMPLES):
        names = tuple(map(node_label, static[:_SHOWN]))
        yield Finding("calibration", what, names, len(static), 0, 0, model.calibrated)


# What is looked for.
CHECKS: tuple[Callable[[Model], Iterator[Finding]], ...] = (
    _stored_one_by_one, _stored_twice, _never_read, _constant_nodes, _weights_as_inputs, _notes, _doubles, _fits_less,
    _zero_channels, _scattered_zeros, _unfused, _unpacked_in_each_run, _unpacked_at_load, _calibration,
)  # fmt: skip


# --- in the order of use


def _finding(
    check: str, what: str, found: Sequence[Stored], file_bytes: int, memory_bytes: int | None, remedy: str
) -> Iterator[Finding]:
    """A finding about these tensors, the largest named first; none where there are none."""
    if found:
        names = [one.name for one in sorted(found, key=lambda one: -one.size_bytes)]
        yield Finding(check, what, tuple(names[:_SHOWN]), len(names), file_bytes, memory_bytes, remedy)


def _left(check: str, what: str, left: Left, remedy: str) -> Iterator[Finding]:
    """A finding about what ONNX Runtime leaves as it stands; none where it leaves nothing."""
    if left.count:
        unknown = f" ({left.unsized} of unknown size are not counted)" if left.unsized else ""
        said = f"{left.count} DequantizeLinear left by ONNX Runtime on this CPU {what}{unknown}"
        yield Finding(check, said, left.nodes[:_SHOWN], left.readers, 0, left.float_bytes, remedy)


def _bytes(found: Iterable[Stored]) -> int:
    return sum(one.size_bytes for one in found)


def _is_half(values: Array) -> bool:
    """Whether float16 holds every value exactly."""
    flat = values.reshape(-1)
    with np.errstate(over="ignore"):
        pieces = (flat[start : start + _CHUNK] for start in range(0, flat.size, _CHUNK))
        return all(bool((piece.astype(np.float16) == piece).all()) for piece in pieces)


def _is_grid(values: Array) -> bool:
    """Whether 256 even steps hold every value, of the whole tensor or of each channel along either of its axes."""
    forms = (values.reshape(1, -1), *(np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1) for axis in (0, 1)))
    return any(rows.shape[1] >= _LEAST_ROW and all(map(_is_on_grid, _probe_first(rows))) for rows in forms)


def _probe_first(rows: Array) -> Iterator[Array]:
    """The beginning of the first row, which tells mostly, then all rows."""
    yield rows[0, :_PROBED]
    yield from rows


def _is_on_grid(row: Array) -> bool:
    levels = np.unique(row).astype(np.float64)
    if len(levels) > _LEVELS + 1:
        return False
    gaps = np.diff(np.unique(np.append(levels, 0.0)))
    if not len(gaps):
        return True  # all zero
    largest = np.abs(levels).max()
    steps = levels / largest * np.rint(largest / gaps.min())  # a gap alone has lost digits
    return bool(np.abs(steps - np.rint(steps)).max() < _ROUNDING and np.ptp(np.append(steps, 0.0)) <= _LEVELS)


def _bytes_of_zero_channels(values: Array) -> int:
    """Of what lies in a channel of outputs or of inputs that is all zero; the first two axes count channels."""
    rows, columns = (values.any(axis=tuple(a for a in range(values.ndim) if a != axis)) for axis in (0, 1))
    left = int(rows.sum()) * int(columns.sum()) * math.prod(values.shape[2:])
    return (values.size - left) * values.itemsize


def _is_two_of_four(values: Array) -> bool:
    """Whether at least two of each four neighbours along one of the first two axes are zero."""
    forms = (np.moveaxis(values, axis, -1) for axis in (0, 1) if values.shape[axis] % 4 == 0)
    return any(bool(((form.reshape(-1, 4) == 0).sum(axis=1) >= 2).all()) for form in forms)


def _has_static_range(node: onnx.NodeProto, wiring: Wiring) -> bool:
    """Whether the node quantizes an activation with a scale that was found beforehand."""
    source, scale = [*node.input, "", ""][:2]
    quantizes = node.op_type == "QuantizeLinear" and source not in wiring.initializers
    return (quantizes or node.op_type.startswith("QLinear")) and scale in wiring.initializers
