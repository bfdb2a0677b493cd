"""The first time that libraries touch a foreign model: in a process of its own, with limits.

`open_apart` starts `python -P -m memopt_export.first_session`, which has ONNX check the model and infer its shapes,
adds up what it would unfold to, and opens it in ONNX Runtime. A crash, a hang or a bomb becomes one line here.
"""

from __future__ import annotations

import math
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from memopt.errors import BackendError, InputRefused, MemoptError, OutOfResource, first_line, printable
from memopt.memory import limit_process, read_host_memory
from memopt.ort_runtime import library_errors
from memopt.sizes import show_size
from memopt.strict_json import from_json, to_json
from memopt_export import execution
from memopt_export.bodies import bodies, node_label, subgraphs
from memopt_export.execution import Execution
from memopt_export.graph import free_negative_dims, has_fixed_shape, set_nodes
from memopt_export.tensor_rules import check_tensor, is_external, load, size_bytes

if TYPE_CHECKING:
    import onnx
    import onnxruntime

T = TypeVar("T")
TIMEOUT_S = 60.0
MEMORY_BYTES = 4 * 2**30  # address space, beside MEMORY_PER_BYTE for each byte of the model
MEMORY_PER_BYTE = 6
UNFOLDED_BYTES = 256 * 2**20  # or UNFOLDED_PER_BYTE of weights, where that is more
UNFOLDED_PER_BYTE = 4

# Operators whose output may be far larger than what they read.
_GROWING = frozenset({
    "ConstantOfShape", "Expand", "EyeLike", "OneHot", "Pad", "RandomNormal", "RandomUniform", "Range", "Resize", "Tile",
    "Upsample",
})  # fmt: skip
_RANDOM = frozenset({
    "Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike",
})  # fmt: skip
# Operators that ONNX Runtime does not compute when it opens a graph, even of constants alone.
_COMPUTED = _RANDOM | {"DequantizeLinear"}
_SHAPE_ELEMENTS = 1024  # initializers up to this many may be shapes, which inference reads
_COMMAND = (sys.executable, "-P", "-m", "memopt_export.first_session")
_KINDS = {kind.__name__: kind for kind in (BackendError, InputRefused, OutOfResource)}


@dataclass(frozen=True)
class _Request:
    path: str
    memory_bytes: int
    cpu_s: int
    look: bool = False


@dataclass(frozen=True)
class _Answer:
    """What the other process found: an error of ours, or nothing, and where it had to look, what is executed."""

    error: str | None = None  # a key of _KINDS
    problem: str = ""
    execution: Execution | None = None
    reason: str = ""  # why that is None


def open_apart(path: Path, size_bytes: int, *, timeout_s: float = TIMEOUT_S) -> None:
    """Checks and opens the model in a process of its own.

    Args:
        path: an .onnx file whose bytes, tensors and nesting have been found sound.
        size_bytes: of the file and its external data.
        timeout_s: wall and CPU seconds after which the process is stopped.

    Raises:
        InputRefused: ONNX or ONNX Runtime refuse the model, or it unfolds to far more than it stores.
        OutOfResource: time or memory ran out.
        BackendError: ONNX or ONNX Runtime crashed.
    """
    _ask(path, size_bytes, timeout_s)


def look_apart(path: Path, size_bytes: int, *, timeout_s: float = TIMEOUT_S) -> tuple[Execution | None, str]:
    """Checks and opens the model as `open_apart` does, and tells what ONNX Runtime executes of it.

    What ONNX Runtime cannot open is not refused here: the second value is the reason, and the first one None.

    Raises:
        InputRefused: ONNX refuses the model, or it unfolds to far more than it stores.
        OutOfResource, BackendError: as by `open_apart`.
    """
    answer = _ask(path, size_bytes, timeout_s, look=True)
    return answer.execution, printable(answer.reason)


def _ask(path: Path, size_bytes: int, timeout_s: float, *, look: bool = False) -> _Answer:
    memory_bytes = MEMORY_BYTES + MEMORY_PER_BYTE * size_bytes
    request = _Request(str(path.absolute()), memory_bytes, math.ceil(timeout_s), look)
    try:
        done = subprocess.run(
            _COMMAND, input=to_json(request).encode(), capture_output=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise OutOfResource(f"{path} was not open after {timeout_s:g} seconds") from error
    if done.returncode != 0:
        raise _crash(path, done.returncode, done.stderr.decode(errors="replace"))
    answer = from_json(_Answer, done.stdout, where="the first session's answer")
    if answer.error is not None:
        raise _KINDS[answer.error](printable(f"{path} {answer.problem}"))
    return answer


def _crash(path: Path, code: int, stderr: str) -> MemoptError:
    last = printable((stderr.strip().splitlines() or ["it left no message"])[-1])
    name = signal.Signals(-code).name if code < 0 else f"code {code}"
    if name == "SIGXCPU":
        return OutOfResource(f"{path} was not open when its time was up")
    if name == "SIGKILL" or "bad_alloc" in stderr or "MemoryError" in last:
        return OutOfResource(f"{path} needs more memory to open than it may have ({name}): {last}")
    return BackendError(f"onnxruntime crashed with {name} when it opened {path}: {last}")


def _answer_request() -> None:
    """The other process: a request on standard input, the answer on standard output."""
    request = from_json(_Request, sys.stdin.buffer.read(), where="the request")
    limit_process(resource.RLIMIT_AS, request.memory_bytes)
    limit_process(resource.RLIMIT_CPU, request.cpu_s)
    limit_process(resource.RLIMIT_CORE, 0)
    try:
        answer = _open(Path(request.path), look=request.look)
    except InputRefused as error:
        answer = _Answer("InputRefused", str(error))
    except MemoryError:
        answer = _Answer("OutOfResource", "needs more memory to open than it may have")
    sys.stdout.write(to_json(answer))


def _open(path: Path, *, look: bool = False) -> _Answer:
    import onnx
    import onnx.inliner

    model = onnx.ModelProto.FromString(path.read_bytes())
    layers = execution.count_layers(model) if look else 0
    weights_bytes = sum(size_bytes(tensor.data_type, tensor.dims) for tensor in model.graph.initializer)
    constants = frozenset(tensor.name for tensor in model.graph.initializer)
    _make_light(model, path.parent)
    free_negative_dims(model)
    allowed_bytes = max(UNFOLDED_BYTES, UNFOLDED_PER_BYTE * weights_bytes)
    try:
        _check(model)
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
        flat = onnx.inliner.inline_local_functions(model) if model.functions else model
        inferred = onnx.shape_inference.infer_shapes(flat)
        _Unfolding(allowed_bytes).add(inferred.graph, constants)
        _hide_long_constants(inferred)  # whose values the next line would follow one by one
        inferred = onnx.shape_inference.infer_shapes(inferred, data_prop=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, RuntimeError, ValueError) as error:
        raise InputRefused(f"is not a valid ONNX model: {first_line(error)}") from error
    _Unfolding(allowed_bytes, complete=True).add(inferred.graph, constants)
    before = read_host_memory()
    answer = _look(path, layers, inferred.graph) if look else _just_open(path)
    taken_bytes = (read_host_memory().peak_bytes or 0) - (before.peak_bytes or 0)
    if taken_bytes > 2 * allowed_bytes + MEMORY_PER_BYTE * (path.stat().st_size + weights_bytes):
        raise InputRefused(f"took {show_size(taken_bytes)} to open, far more than it stores")
    return answer


def _check(model: onnx.ModelProto) -> None:
    """Has ONNX check the model, but not that its outputs have shapes, which many exporters do not know."""
    import onnx

    kinds = [value.type for value in model.graph.output if value.type.HasField("tensor_type")]
    bare = [kind.tensor_type for kind in kinds if not kind.tensor_type.HasField("shape")]
    for tensor in bare:
        tensor.shape.SetInParent()
    onnx.checker.check_model(model)
    for tensor in bare:
        tensor.ClearField("shape")


def _just_open(path: Path) -> _Answer:
    """Refuses what `run_graph` could not open; an operator without a kernel on this CPU may have one elsewhere."""
    import onnxruntime

    def start(options: onnxruntime.SessionOptions) -> None:
        options.log_severity_level = 3  # errors are raised
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    _start_session(start, onnxruntime.SessionOptions)
    return _Answer()


def _look(path: Path, layers: int, inferred: onnx.GraphProto) -> _Answer:
    """What is executed, or the reason why nothing is."""
    try:
        found = _start_session(lambda options: execution.executed(str(path), options), execution.options)
    except InputRefused as error:
        return _Answer(reason=error.problem)
    if isinstance(found, str):
        return _Answer(reason=found)
    values = (*inferred.input, *inferred.value_info, *inferred.output)
    sizes = {value.name: size for value in values if (size := _bytes(value))}
    return _Answer(execution=execution.read(*found, layers=layers, sizes=sizes))


def _make_light(model: onnx.ModelProto, folder: Path) -> None:
    """Turns large initializers into inputs and loads the external ones that are left: ONNX reads shapes, no weights.

    In place.
    """
    from onnx import GraphProto, TensorProto, helper

    inputs = {value.name for value in model.graph.input}
    small = []
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) <= _SHAPE_ELEMENTS or tensor.data_type == TensorProto.STRING:
            small.append(tensor)
        elif tensor.name not in inputs:
            model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    kept = GraphProto(initializer=small)
    model.graph.ClearField("initializer")
    model.graph.initializer.extend(kept.initializer)
    for body in bodies(model):
        for _, tensor in body.tensors():
            place = check_tensor(tensor, folder) if is_external(tensor) else None
            if place is not None:
                load(tensor, place)


def _hide_long_constants(model: onnx.ModelProto) -> None:
    """Makes inputs of long vectors that are computed, and drops what computes them: they are no shapes. In place."""
    lengths = {value.name: value for value in model.graph.value_info if _bytes(value) > 8 * _SHAPE_ELEMENTS}
    kept = []
    for node in model.graph.node:
        if len(node.output) == 1 and node.output[0] in lengths:
            model.graph.input.append(lengths[node.output[0]])
        else:
            kept.append(node)
    set_nodes(model.graph, kept)


class _Unfolding:
    """Adds up what ONNX Runtime computes from constants alone when it opens a graph."""

    def __init__(self, limit_bytes: int, *, complete: bool = False) -> None:
        self._limit_bytes = limit_bytes
        self._complete = complete  # no more will be known of shapes than there is now
        self._total_bytes = 0

    def add(self, graph: onnx.GraphProto, around: Set[str]) -> None:
        """Raises InputRefused, naming the node with which the limit is passed.

        1. What depends on constants alone is computed at once and kept: its bytes add up, and have to be known.
        2. The output of an operator that makes much of little counts by itself, a free dimension as one.
        """
        values = (*graph.value_info, *graph.output)
        sizes = {value.name: _bytes(value) for value in values}
        known = {value.name for value in values if has_fixed_shape(value)}
        constants = set(around) | {tensor.name for tensor in graph.initializer}
        for node in graph.node:
            inner = tuple(subgraphs(node))
            grows = node.op_type in _GROWING
            made = sum(sizes.get(name, 0) for name in node.output)
            if not inner and node.op_type not in _COMPUTED and constants.issuperset(filter(None, node.input)):
                constants.update(node.output)
                self._total_bytes += made if node.op_type != "Constant" else 0
                if self._complete and grows and not known.issuperset(node.output):
                    raise InputRefused(f"unfolds to who knows what in node {node_label(node)!r} ({node.op_type})")
            if self._total_bytes > self._limit_bytes or (grows and made > self._limit_bytes):
                raise InputRefused(
                    f"unfolds to {show_size(max(made, self._total_bytes))} in node {node_label(node)!r} "
                    f"({node.op_type}), {show_size(self._limit_bytes)} are allowed for its weights"
                )
            for body in inner:
                self.add(body, constants)


def _bytes(value: onnx.ValueInfoProto) -> int:
    """Bytes of a tensor with a known rank, free dimensions being one; 0 where that much is not known."""
    tensor = value.type.tensor_type
    if not value.type.HasField("tensor_type") or not tensor.HasField("shape") or not tensor.elem_type:
        return 0
    return size_bytes(tensor.elem_type, (dim.dim_value if dim.HasField("dim_value") else 1 for dim in tensor.shape.dim))


def _start_session(
    start: Callable[[onnxruntime.SessionOptions], T], options_of: Callable[[], onnxruntime.SessionOptions]
) -> T | str:
    """What `start` makes with the options, or the library's words where an operator has no kernel on this CPU.

    Where the optimizer fails on a type that it does not know, as on floats of 8 bits, the model as it stands is opened.
    """
    import onnxruntime
    from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel

    levels = onnxruntime.GraphOptimizationLevel
    for level in (levels.ORT_ENABLE_ALL, levels.ORT_DISABLE_ALL):
        options = options_of()
        options.graph_optimization_level = level
        options.intra_op_num_threads = 1
        try:
            return start(options)
        except NoKernel as error:
            return f"cannot be opened by onnxruntime on this CPU: {first_line(error)}"
        except library_errors() as error:
            text = first_line(error)
            if "alloc" in text.lower():
                raise MemoryError(text) from error
            if level == levels.ORT_DISABLE_ALL or "/optimizer/" not in text:
                raise InputRefused(f"cannot be opened by onnxruntime: {text}") from error
    raise AssertionError("the last level returns or raises")


if __name__ == "__main__":
    _answer_request()
