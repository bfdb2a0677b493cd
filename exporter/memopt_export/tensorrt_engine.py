"""An Engine: an ONNX graph compiled by TensorRT or TensorRT-RTX, with all that is needed to refuse or to rebuild it.

The compiler runs in a fresh process, `python -m memopt_export.tensorrt_engine`, so that its crash, its hang and its
memory stay there. Precision is the graph's: there is no option for it. TensorRT-RTX builds for GPUs that are elsewhere,
TensorRT for the one of this machine.
"""

from __future__ import annotations

import hashlib
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from memopt.cuda_driver import driver_missing, open_driver
from memopt.errors import BackendError, InputRefused, MemoptError, OutOfResource, UsageError
from memopt.files import sha256_file, write_atomically, write_together
from memopt.manifest import EngineInfo, Profile
from memopt.memory import read_host_memory
from memopt.strict_json import from_json, to_json
from memopt.tensors import TensorSpec, show_shape
from memopt.trt_library import TITLES, import_library, library_log, not_installed
from memopt.trt_runtime import TARGETS, TENSORRT, TENSORRT_RTX, this_platform
from memopt_export.graph import Graph

if TYPE_CHECKING:
    import onnx

Batches = tuple[int, int, int]  # smallest, the one to optimize for, largest

# The first SM whose arithmetic knows the dtype (ONNX's name for it).
_FIRST_SM = {"BFLOAT16": 80, "INT4": 80, "FLOAT8E4M3FN": 89}
# Operators that multiply matrices: TensorRT-RTX has no float32 ones for SM75, whether Q/DQ stand around them or not.
_GEMMS = frozenset({"Gemm", "MatMul", "Einsum", "LSTM", "GRU", "RNN", "Attention"})
_COMPILER = (sys.executable, "-P", "-m", "memopt_export.tensorrt_engine")
_KILLED = -9  # what the kernel does to a process when memory runs out
_HEADER_BYTES = 64
_HEADER_FORMAT = 2
_HEADER_TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121", "later")  # by bit


@dataclass(frozen=True)
class EngineSettings:
    """What to build: for which library, for which GPUs, with one optimization profile for each triple of batches.

    A profile of batch 1 adds 0.3 MB to the file, and lets a runtime work with the activation memory of batch 1.
    """

    flavor: str  # "tensorrt" or "tensorrt-rtx"
    targets: tuple[str, ...]  # of TARGETS[flavor]; "local" is the GPU of this machine
    batches: tuple[Batches, ...] = ((1, 1, 1), (2, 8, 32))
    weight_streaming: bool = False  # lets a runtime keep weights in host memory and bring each layer's when it runs

    def __post_init__(self) -> None:
        if self.flavor not in TARGETS:
            raise UsageError(f"flavor {self.flavor!r} is not known", hint="one of " + ", ".join(TARGETS))
        known = TARGETS[self.flavor]
        for target in self.targets:
            if target not in known:
                raise UsageError(f"{TITLES[self.flavor]} cannot target {target!r}", hint="one of " + ", ".join(known))
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise UsageError("an engine needs targets, each named once", hint="--target " + known[0])
        if "local" in self.targets and len(self.targets) > 1:
            raise UsageError("local is a target of its own", hint="--target local")
        if not self.batches:
            raise UsageError("an engine needs a profile", hint="--batch 1,8,32")
        for low, best, high in self.batches:
            if not 1 <= low <= best <= high:
                raise UsageError(f"batches {low},{best},{high} are no profile", hint="MIN,OPT,MAX, from small to large")


@dataclass(frozen=True)
class Engine:
    """A compiled graph."""

    data: bytes
    info: EngineInfo


@dataclass(frozen=True)
class EngineHeader:
    """What a TensorRT-RTX engine says in its first bytes. Not documented, so the manifest stays the authority."""

    version: str
    size_bytes: int  # of the whole engine
    complete: bool  # as many bytes are there
    targets: tuple[str, ...]  # "sm86", ...; "later" for GPUs yet to come
    weights_bytes: int


def build(
    onnx: bytes | Path, how: EngineSettings, *, on_step: Callable[[str], None] | None = None, timeout_s: float = 600
) -> Engine:
    """The engine of an ONNX model.

    Args:
        onnx: the model, or its file, which may have external data beside it.
        how: flavor, targets and profiles.
        on_step: is told what begins.
        timeout_s: seconds after which the compiler is stopped.

    Raises:
        BackendError: the library or a driver is missing, or the compiler crashed.
        InputRefused: the model cannot become such an engine, and which operator, dtype or shape it is.
        OutOfResource: time or memory ran out.
    """
    step = on_step or (lambda _: None)
    if reason := flavors_available()[how.flavor]:
        raise BackendError(reason)
    step("read the model")
    model = _read_model(onnx)
    targets = tuple(_sm_of(target, how.flavor) for target in how.targets)
    _, refused = split_targets(model, targets, flavor=how.flavor)
    if refused:
        raise InputRefused("; ".join(f"no engine for {target}: {reason}" for target, reason in refused.items()))
    profiles = _profiles(Graph(model, weights_sha256="").inputs, how.batches)
    with TemporaryDirectory(prefix="memopt-engine-") as folder:
        request = _Request(
            how.flavor,
            _model_file(onnx, folder),
            _sha256(onnx),
            folder,
            targets,
            profiles,
            _operators(model),
            how.weight_streaming,
        )
        step(f"compile for {', '.join(targets)}")
        info = _compile_apart(request, timeout_s)
        return Engine(request.engine.read_bytes(), info)


def split_targets(
    model: onnx.ModelProto, targets: Sequence[str], *, flavor: str = "tensorrt-rtx"
) -> tuple[tuple[str, ...], dict[str, str]]:
    """The targets that an engine of `model` can be built for, and for each of the others why it cannot.

    One impossible target spoils an engine for all, so they are told apart before.

    Args:
        model: external data need not be loaded.
        targets: "sm86", ...; "local" stands for the SM of this machine's GPU.
        flavor: "tensorrt" or "tensorrt-rtx".

    Raises:
        BackendError: "local" without a driver, or on a GPU that the flavor does not build for.
    """
    dtypes = _dtypes(model)
    reasons = {target: _refusal(model, dtypes, _sm_of(target, flavor), flavor) for target in targets}
    accepted = tuple(target for target, reason in reasons.items() if reason is None)
    return accepted, {target: reason for target, reason in reasons.items() if reason is not None}


def save_engine(engine: Engine, path: Path, *, force: bool = False) -> None:
    """Writes `X.engine`, and beside it `X.engine.json` with its EngineInfo.

    Raises:
        UsageError: another ending, or a file that exists without `force`.
    """
    if path.suffix != ".engine":
        raise UsageError(f"{path} does not end in .engine", hint=f"-o {path.with_suffix('.engine')}")
    sidecar = path.with_name(path.name + ".json")
    info = to_json(engine.info).encode() + b"\n"
    write_together({path: (engine.data, 0o644), sidecar: (info, 0o644)}, force=force)


def read_header(data: bytes | memoryview) -> EngineHeader:
    """The header of a TensorRT-RTX engine.

    Raises:
        InputRefused: anything else.
    """
    head = bytes(data[:_HEADER_BYTES])
    if len(head) < _HEADER_BYTES or head[:4] != b"vtrt" or head[28:32] != b"vtrt":
        raise InputRefused("this is no TensorRT-RTX engine")
    layout, size_bytes = struct.unpack_from("<QQ", head, 8)
    if layout != _HEADER_FORMAT:
        raise InputRefused(f"this TensorRT-RTX engine has format {layout}, {_HEADER_FORMAT} is known")
    mask, weights_bytes = struct.unpack_from("<I", head, 32)[0], struct.unpack_from("<Q", head, 56)[0]
    targets = tuple(target for bit, target in enumerate(_HEADER_TARGETS) if mask >> bit & 1)
    return EngineHeader(".".join(map(str, head[24:28])), size_bytes, size_bytes == len(data), targets, weights_bytes)


def flavors_available() -> dict[str, str | None]:
    """Why no engine of a flavor can be built on this machine; None where it can."""
    reasons = {runtime.NAME: None if runtime.version() else not_installed(runtime.NAME)
               for runtime in (TENSORRT, TENSORRT_RTX)}  # fmt: skip
    return {**reasons, "tensorrt": reasons["tensorrt"] or driver_missing()}


@dataclass(frozen=True)
class _Request:
    """What the compiler is asked, on its standard input."""

    flavor: str
    model: str  # path
    onnx_sha256: str
    folder: str  # where it leaves the engine and its answer
    targets: tuple[str, ...]
    profiles: tuple[Profile, ...]
    operators: dict[str, str]  # operator -> a node that has it
    weight_streaming: bool = False

    @property
    def engine(self) -> Path:
        return Path(self.folder, "model.engine")

    @property
    def answer(self) -> Path:
        return Path(self.folder, "answer.json")


@dataclass(frozen=True)
class _Answer:
    """What became of it: an engine's description, or an error of ours."""

    info: EngineInfo | None = None
    error: str | None = None  # a key of _ERRORS
    problem: str = ""


_ERRORS: dict[str, type[MemoptError]] = {kind.__name__: kind for kind in (BackendError, InputRefused, OutOfResource)}


def _read_model(source: bytes | Path) -> onnx.ModelProto:
    """The checked model; external data stay where they are."""
    import onnx
    from google.protobuf.message import DecodeError

    name = str(source) if isinstance(source, Path) else "the model"
    if isinstance(source, Path) and not source.is_file():
        raise InputRefused(f"{name} is not a file" if source.exists() else f"{name} does not exist")
    try:
        onnx.checker.check_model(source)
        if isinstance(source, Path):
            return onnx.load(source, load_external_data=False)
        return onnx.load_model_from_string(source)
    except (DecodeError, onnx.checker.ValidationError, ValueError, OSError) as error:
        raise InputRefused(f"{name} is not a valid ONNX model: {str(error).splitlines()[0]}") from error


def _model_file(source: bytes | Path, folder: str) -> str:
    if isinstance(source, Path):
        return str(source.resolve())
    file = Path(folder, "model.onnx")
    write_atomically(file, source)
    return str(file)


def _sha256(source: bytes | Path) -> str:
    return sha256_file(source) if isinstance(source, Path) else hashlib.sha256(source).hexdigest()


def _profiles(inputs: Sequence[TensorSpec], batches: Sequence[Batches]) -> tuple[Profile, ...]:
    """A profile for each triple. The first dimension of an input may be free, and is the batch then."""
    if not inputs:
        raise InputRefused("the model has no inputs")
    for spec in inputs:
        if any(isinstance(dim, str) for dim in spec.shape[1:]):
            raise InputRefused(f"input {spec.name!r} has shape {show_shape(spec.shape)}, only its batch may be free")
    if all(isinstance(dim, int) for spec in inputs for dim in spec.shape):
        fixed, *_ = inputs[0].at_batch(1) or (1,)
        if any(set(triple) != {fixed} for triple in batches):
            raise InputRefused(
                f"the model's batch is fixed at {fixed}", hint=f"--batch {fixed}, or export it with a free batch"
            )
    return tuple(
        Profile(_shapes(inputs, low), _shapes(inputs, best), _shapes(inputs, high)) for low, best, high in batches
    )


def _shapes(inputs: Sequence[TensorSpec], batch: int) -> dict[str, tuple[int, ...]]:
    return {spec.name: spec.at_batch(batch) for spec in inputs}


def _operators(model: onnx.ModelProto) -> dict[str, str]:
    """Every operator with the name of the first node that has it, the model's own functions resolved."""
    nodes = [node for part in (model.graph, *model.functions) for node in _nodes(part)]
    operators: dict[str, str] = {}
    for node in nodes:
        operators.setdefault(node.op_type, node.name)
    return {name: node for name, node in operators.items() if name not in {f.name for f in model.functions}}


def _nodes(graph: Any) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph or function, those of branches and loop bodies too."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                yield from _nodes(body)


def _sm_of(target: str, flavor: str) -> str:
    if target != "local":
        return target
    driver = open_driver()
    if flavor == "tensorrt-rtx" and driver.sm not in TARGETS[flavor]:
        raise BackendError(
            f"{TITLES[flavor]} cannot target {driver.sm} ({driver.name})", hint="--flavor tensorrt --target local"
        )
    return driver.sm


def _refusal(model: onnx.ModelProto, dtypes: dict[str, str], sm_name: str, flavor: str) -> str | None:
    sm = int(sm_name.removeprefix("sm"))
    for dtype in sorted(set(dtypes.values()) & set(_FIRST_SM)):
        if sm < _FIRST_SM[dtype]:
            return f"{dtype.lower()} needs sm{_FIRST_SM[dtype]} or newer"
    if sm == 75 and flavor == "tensorrt-rtx":
        for node in _nodes(model.graph):
            if node.op_type in _GEMMS and "FLOAT" in [dtypes.get(name) for name in node.input[:1]]:
                return f"{node.op_type} {node.name!r} multiplies in float32, which {TITLES[flavor]} cannot on sm75"
    return None


def _dtypes(model: onnx.ModelProto) -> dict[str, str]:
    """ONNX's name for the dtype of every tensor that can be known, by inference on a copy without weights."""
    import onnx
    from onnx import helper, shape_inference

    initializers = [helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in model.graph.initializer]
    named = {value.name for value in initializers}
    inputs = [value for value in model.graph.input if value.name not in named]
    light = helper.make_graph(model.graph.node, "light", inputs + initializers, model.graph.output)
    copy = helper.make_model(light, opset_imports=model.opset_import, functions=model.functions)
    graph = shape_inference.infer_shapes(copy).graph
    return {
        value.name: onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type)
        for value in (*graph.input, *graph.value_info, *graph.output)
    }


def _compile_apart(request: _Request, timeout_s: float) -> EngineInfo:
    """What `_compile` returns or raises, from a process of its own."""
    title = TITLES[request.flavor]
    try:
        done = subprocess.run(
            _COMPILER, input=to_json(request).encode(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            timeout=timeout_s, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise OutOfResource(f"{title} was not done after {timeout_s:g} seconds and was stopped") from error
    if done.returncode != 0 or not request.answer.is_file():
        raise _crash(title, done.returncode, done.stderr.decode(errors="replace"))
    answer = from_json(_Answer, request.answer.read_bytes(), where="the compiler's answer")
    if answer.info is None:
        raise _ERRORS[answer.error or "BackendError"](answer.problem)
    return answer.info


def _crash(title: str, code: int, stderr: str) -> MemoptError:
    last = stderr.strip().splitlines()[-1] if stderr.strip() else "it left no message"
    how = f"with {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
    if code == _KILLED or "bad_alloc" in stderr or "MemoryError" in last:
        return OutOfResource(f"{title} ended {how} while it compiled, most likely for want of memory: {last}")
    return BackendError(f"{title} crashed {how} while it compiled: {last}")


def _answer_request() -> None:
    """The other process: a request on standard input, the answer in its folder."""
    request = from_json(_Request, sys.stdin.buffer.read(), where="the request")
    try:
        answer = _Answer(info=_compile(request))
    except tuple(_ERRORS.values()) as error:
        answer = _Answer(error=type(error).__name__, problem=str(error))
    request.answer.write_text(to_json(answer))


def _compile(request: _Request) -> EngineInfo:
    trt = import_library(request.flavor)
    log = library_log(trt)
    started = time.perf_counter()
    builder = trt.Builder(log)
    network, _parser = _parse(trt, builder, request)
    config = _configure(trt, builder, request)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise _build_failure(log, request)
    with request.engine.open("wb") as file:
        file.write(plan)  # the library's own buffer: no copy of it in Python
    os, arch = this_platform()
    return EngineInfo(
        request.flavor, trt.__version__, request.targets, os, arch,
        profiles=_with_activations(request.profiles, _logged_bytes(log, "Total Activation Memory")),
        weights_bytes=max(_logged_bytes(log, "Total Weights Memory"), default=None),
        onnx_sha256=request.onnx_sha256,
        upper_bound=_all_is_ours(trt, request),
        build_seconds=round(time.perf_counter() - started, 3),
        build_peak_bytes=read_host_memory().peak_bytes,
    )  # fmt: skip


def _parse(trt: Any, builder: Any, request: _Request) -> tuple[Any, Any]:
    """The network, and the parser, which owns weights of it and must outlive the build."""
    title = f"{TITLES[request.flavor]} {trt.__version__}"
    strongly_typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)  # a must on 10, without effect later
    network = builder.create_network(strongly_typed)
    parser = trt.OnnxParser(network, library_log(trt))
    unknown = [f"{name} (node {node!r})" for name, node in request.operators.items()
               if not parser.supports_operator(name)]  # fmt: skip
    if unknown:
        raise InputRefused(f"{title} has no operator {', '.join(unknown)}")
    if not parser.parse_from_file(request.model):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        raise InputRefused(f"{title} cannot read the model: " + "; ".join(map(_show_parser_error, errors)))
    return network, parser


def _configure(trt: Any, builder: Any, request: _Request) -> Any:
    config = builder.create_builder_config()
    if request.flavor == "tensorrt-rtx":
        config.num_compute_capabilities = len(request.targets)
        for index, target in enumerate(request.targets):
            config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), index)
    if _all_is_ours(trt, request):
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # else large tensors are left out of the logged bytes
    if request.weight_streaming:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)  # the pattern 2:4, where weights have it
    for profile in request.profiles:
        shapes = builder.create_optimization_profile()
        for name in profile.min:
            shapes.set_shape(name, profile.min[name], profile.opt[name], profile.max[name])
        if config.add_optimization_profile(shapes) < 0:
            raise _build_failure(library_log(trt), request)
    return config


def _all_is_ours(trt: Any, request: _Request) -> bool:
    """Whether all device memory is the user's to give; weights that are streamed want some that the library takes."""
    return hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION") and not request.weight_streaming


def _show_parser_error(error: Any) -> str:
    return f"{error.node_operator()} (node {error.node_name()!r}): {error.desc()}"


def _build_failure(log: Any, request: _Request) -> MemoptError:
    """The error in the library's words, without the line that it adds on every machine that has no driver."""
    reason = "; ".join(text for text in log.errors() if "catchCudaError" not in text) or "it does not say why"
    kind = OutOfResource if "OutOfMemory" in reason else BackendError if "cudaError" in reason else InputRefused
    return kind(f"{TITLES[request.flavor]} cannot compile the model for {', '.join(request.targets)}: {reason}")


def _logged_bytes(log: Any, what: str) -> list[int]:
    """The sizes that the library logs under this name, one for each profile."""
    found = [re.search(rf"{what}: (\d+) bytes", text) for _, text in log.lines]
    return [int(match[1]) for match in found if match]


def _with_activations(profiles: Sequence[Profile], sizes: Sequence[int]) -> tuple[Profile, ...]:
    """The profiles with their activation bytes, which stay unknown where the library logs another number of them."""
    if len(sizes) != len(profiles):
        return tuple(profiles)
    return tuple(replace(profile, activation_bytes=size) for profile, size in zip(profiles, sizes, strict=True))


if __name__ == "__main__":
    _answer_request()
