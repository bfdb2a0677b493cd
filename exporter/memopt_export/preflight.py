"""Every ONNX file that memopt did not write passes here before anything else touches it.

First our own eyes: the kind of file, a walk over its bytes, then rules on the parsed model. What passes is opened for
the first time in a process of its own (`first_session`), because ONNX's checker and ONNX Runtime may crash or hang.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from memopt.errors import InputRefused, printable
from memopt.sizes import show_size
from memopt_export.bodies import Body, bodies, node_label, subgraphs
from memopt_export.first_session import TIMEOUT_S, open_apart
from memopt_export.protobuf_walk import MAX_COUNTS, walk
from memopt_export.tensor_rules import Place, check_overlaps, check_tensor, dtype_name, floats, load

if TYPE_CHECKING:
    import onnx

MAX_FILE_BYTES = 2**31  # protobuf's own limit
DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})
# Operators that carry programs: compiled engines, Python.
_CARRIERS = frozenset({"EPContext", "PyOp"})

# How files begin that are often mistaken for a model.
_STRANGERS = (
    (b"version https://git-lfs", "a pointer of git-LFS", "git lfs pull"),
    (b"<", "a page of HTML or XML", "download the file itself"),
    (b"PK\x03\x04", "a zip archive", None),
    (b"\x1f\x8b", "a gzip archive", "gunzip it"),
    (b"\x89HDF", "an HDF5 file", None),
    *((bytes([0x80, protocol]), "a Python pickle", "memopt-export export CHECKPOINT") for protocol in range(2, 6)),
)
# Where quantizing operators have their scales.
_SCALES = {
    "QuantizeLinear": (1,), "DequantizeLinear": (1,), "QLinearConv": (1, 4, 6), "QLinearMatMul": (1, 4, 6),
    "QLinearAdd": (1, 4, 6), "QLinearMul": (1, 4, 6), "QGemm": (1, 4, 7), "QLinearSigmoid": (1, 3),
    "QLinearLeakyRelu": (1, 3), "QLinearAveragePool": (1, 3), "QLinearGlobalAveragePool": (1, 3),
}  # fmt: skip
# Operators that multiply by what they store; others may mean an infinity, as masks do.
_WEIGHTED = frozenset({
    "BatchNormalization", "Conv", "ConvTranspose", "Gemm", "GRU", "InstanceNormalization", "LayerNormalization", "LSTM",
    "MatMul", "MatMulNBits", "PRelu", "RNN", *_SCALES,
})  # fmt: skip

_Key = tuple[str, str, str]  # domain, operator, overload


def check(path: Path, *, timeout_s: float = TIMEOUT_S) -> onnx.ModelProto:
    """The model in a foreign file, found sound; its external data stays where it is.

    Args:
        path: an .onnx file, untrusted.
        timeout_s: seconds that the first session, in a process of its own, may take.

    Raises:
        InputRefused: anything that is wrong with the file, in one line that names it.
        OutOfResource: the first session ran out of time or memory.
        BackendError: the first session crashed.
    """
    model, size_bytes = keep_rules(path)
    open_apart(path, size_bytes, timeout_s=timeout_s)
    return model


def keep_rules(path: Path) -> tuple[onnx.ModelProto, int]:
    """The model in a foreign file by all our own rules, and its bytes, external data included; no library saw it yet.

    Raises:
        InputRefused: anything that is wrong with the file, in one line that names it.
    """
    model = parse(path)
    try:
        places = _check_model(model, path.parent)
    except InputRefused as error:
        raise InputRefused(printable(f"{path} is refused: {error.problem}"), hint=error.hint) from error
    return model, path.stat().st_size + sum(place.size_bytes for place in places)


def parse(path: Path) -> onnx.ModelProto:
    """The model in a file, whole and within the limits of the walk; nothing in it has been looked at.

    Raises:
        InputRefused: missing, not readable, not ONNX, cut, or nested too deep.
    """
    import onnx
    from google.protobuf.message import DecodeError

    data = _read(path)
    try:
        walk(data)
        model = onnx.ModelProto()
        model.ParseFromString(data)
    except InputRefused as error:
        raise _invalid(path, error.problem) from error
    except DecodeError as error:
        raise _invalid(path, "its bytes are no ONNX") from error
    return model


def load_external(model: onnx.ModelProto, folder: Path) -> None:
    """Loads the external data of every tensor, as onnx.load does; hard links, which caches make, are plain files."""
    for body in bodies(model):
        for _, tensor in body.tensors():
            place = check_tensor(tensor, folder)
            if place is not None:
                load(tensor, place)


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise InputRefused(printable(f"{path} does not exist" if not path.exists() else f"{path} is not a file"))
    size = path.stat().st_size
    if size >= MAX_FILE_BYTES:
        raise _invalid(path, f"it has {show_size(size)}, 2 GiB is the limit", hint="store the weights as external data")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputRefused(printable(f"{path} cannot be read: {error.strerror}")) from error
    if not data:
        raise _invalid(path, "it is empty")
    for beginning, what, hint in _STRANGERS:
        if data[:64].lstrip().startswith(beginning):
            raise _invalid(path, f"it is {what}", hint=hint)
    return data


def _invalid(path: Path, why: str, *, hint: str | None = None) -> InputRefused:
    return InputRefused(printable(f"{path} is not a valid ONNX model: {why}"), hint=hint)


def _check_model(model: onnx.ModelProto, folder: Path) -> list[Place]:
    """Where the external tensors lie, after all rules."""
    _check_versions(model)
    _check_ends(model.graph)
    _check_functions(model)
    _check_operators(model)
    every = list(bodies(model))
    places = _check_tensors(every, folder)
    for body in every:
        _check_scales(body, folder)
    return places


def _check_versions(model: onnx.ModelProto) -> None:
    import onnx

    if not 1 <= model.ir_version <= onnx.IR_VERSION:
        raise InputRefused(f"IR version {model.ir_version} is not known, up to {onnx.IR_VERSION} are")
    latest = onnx.defs.onnx_opset_version()
    opsets = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    if not model.opset_import:
        raise InputRefused("it names no opset")
    for version in opsets:
        if not 1 <= version <= latest:
            raise InputRefused(f"opset {version} is not known, up to {latest} are")


def _check_ends(graph: onnx.GraphProto) -> None:
    """Inputs and outputs are there, named once, and tensors of numbers."""
    if not graph.output:
        raise InputRefused("it has no outputs")
    for what, values in (("input", graph.input), ("output", graph.output), ("initializer", graph.initializer)):
        for name, count in Counter(value.name for value in values).items():
            if count > 1:
                raise InputRefused(f"{what} {name!r} stands {count} times")
    for value in (*graph.input, *graph.output):
        kind = value.type.WhichOneof("value")
        if kind not in ("tensor_type", None):
            raise InputRefused(f"{value.name!r} is a {kind.removesuffix('_type')}; only tensors are supported")
        number = value.type.tensor_type.elem_type
        if number and dtype_name(number) == "STRING":
            raise InputRefused(f"{value.name!r} holds strings; only numbers are supported")
    initialized = {tensor.name for tensor in graph.initializer}
    for value in graph.input:
        if value.name not in initialized and not value.type.tensor_type.HasField("shape"):
            raise InputRefused(f"input {value.name!r} has no shape, not even a number of dimensions")


def _check_functions(model: onnx.ModelProto) -> None:
    """The model stays small when every call of a local function is written out, counted without writing it out."""
    functions = {_key_of_function(function): function for function in model.functions}
    if len(functions) < len(model.functions):
        raise InputRefused("two of its functions have the same name")
    expanded: dict[_Key, int] = {}
    for key in functions:
        _expand(key, functions, expanded)
    nodes = sum(expanded.get(_key(node), 1) for node in _nodes(model.graph))
    limit, what = MAX_COUNTS["NodeProto"]
    if nodes > limit:
        raise InputRefused(f"its functions unfold to more than {limit:,} {what}")


def _expand(first: _Key, functions: dict[_Key, onnx.FunctionProto], expanded: dict[_Key, int]) -> None:
    """Adds the unfolded node counts of a function and of all that it calls; without recursion, however deep they go."""
    waiting, open_ = [first], set[_Key]()
    while waiting:
        key = waiting[-1]
        if key in expanded:
            waiting.pop()
            continue
        calls = Counter(_key(node) for node in _nodes(functions[key]))
        missing = [called for called in calls if called in functions and called not in expanded]
        if missing and key in open_:
            raise InputRefused(f"its function {key[1]!r} calls itself")
        open_.add(key)
        waiting.extend(missing)
        if not missing:
            expanded[key] = sum(expanded.get(called, 1) * count for called, count in calls.items())


def _check_operators(model: onnx.ModelProto) -> None:
    """Every node is a standard operator, one of ONNX Runtime's, or a call of the model's own function."""
    functions = {_key_of_function(function) for function in model.functions}
    for body in bodies(model):
        for node in body.graph.node:
            if node.op_type in _CARRIERS:
                raise InputRefused(f"node {node_label(node)!r} is a {node.op_type}, which carries a program")
            if node.domain not in DOMAINS and _key(node) not in functions:
                name = f"{node.domain}.{node.op_type}"
                raise InputRefused(f"node {node_label(node)!r} is a {name}, from a domain that memopt does not know")


def _check_tensors(every: list[Body], folder: Path) -> list[Place]:
    weights = {name for body in every for node in body.graph.node if node.op_type in _WEIGHTED for name in node.input}
    places: list[tuple[str, Place]] = []
    for body in every:
        for name, tensor in body.tensors():
            try:
                place = check_tensor(tensor, folder)
                _check_finite(tensor, place, is_weight=name in weights)
            except InputRefused as error:
                raise InputRefused(f"tensor {name!r}: {error.problem}", hint=error.hint) from error
            if place is not None:
                places.append((name, place))
    check_overlaps(places)
    return [place for _, place in places]


def _check_finite(tensor: onnx.TensorProto, place: Place | None, *, is_weight: bool) -> None:
    for values in floats(tensor, place):
        if np.isfinite(values).all():
            continue
        if np.isnan(values).any():
            raise InputRefused("it holds NaN")
        if is_weight:
            raise InputRefused("it is a weight and holds an infinity")


def _check_scales(body: Body, folder: Path) -> None:
    """Constant scales are positive, and as many as the axis that they stand along has steps."""
    for node in body.graph.node:
        for slot in _SCALES.get(node.op_type, ()):
            scale = body.constants.get(node.input[slot]) if slot < len(node.input) else None
            if scale is None:
                continue
            where = f"scale {node.input[slot]!r} of node {node_label(node)!r}"
            if any((values <= 0).any() for values in floats(scale, check_tensor(scale, folder))):
                raise InputRefused(f"{where} is not positive")
            if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                _check_axis(node, scale, body, where)


def _check_axis(node: onnx.NodeProto, scale: onnx.TensorProto, body: Body, where: str) -> None:
    settings = {attribute.name: attribute.i for attribute in node.attribute}
    scaled = body.constants.get(node.input[0])
    zero = body.constants.get(node.input[2]) if len(node.input) > 2 else None
    if zero is not None and list(zero.dims) != list(scale.dims):
        raise InputRefused(f"{where} has dims {tuple(scale.dims)}, its zero point {tuple(zero.dims)}")
    if scaled is None or settings.get("block_size") or list(scale.dims) in ([], [1]):
        return
    axis, rank = settings.get("axis", 1), len(scaled.dims)
    if len(scale.dims) != 1 or not -rank <= axis < rank or scale.dims[0] != scaled.dims[axis]:
        raise InputRefused(
            f"{where} has dims {tuple(scale.dims)}, which do not fit axis {axis} of {tuple(scaled.dims)}"
        )


def _nodes(graph: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for inner in subgraphs(node):
            yield from _nodes(inner)


def _key(node: onnx.NodeProto) -> _Key:
    return _domain(node.domain), node.op_type, node.overload


def _key_of_function(function: onnx.FunctionProto) -> _Key:
    return _domain(function.domain), function.name, function.overload


def _domain(name: str) -> str:
    """ONNX's own domain has two names."""
    return "" if name == "ai.onnx" else name
