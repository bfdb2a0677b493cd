"""ONNX Runtime, on the CPU or through its CUDA and TensorRT providers.

The external initializers of a bundle's graph are handed to the session as our own read-only mapping: they are neither
extracted nor copied, and processes share their pages. A graph that is optimized already for this very processor opens
as it is, which leaves almost no private memory. Activations lie in the arena of a `MemoryPool`. A session can sleep: it
lets go of all it holds, and the next run opens it again. A named device is required: the library's silent fallback to
the CPU is found out and refused.
"""

from __future__ import annotations

import tempfile
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from memopt.arena import MemoryPool, region_for, return_large_blocks
from memopt.artifact import Artifact, release_pages
from memopt.errors import BackendError, InputRefused, OutOfResource, first_line
from memopt.ort_options import PROVIDERS, Profile, profile_named, provider_options, session_entries
from memopt.output_buffers import POOLED_BYTES, can_hold
from memopt.tensors import Array, TensorSpec, check_feeds

if TYPE_CHECKING:
    import onnxruntime

NAME = "onnxruntime"
DEVICES = ("cpu", "cuda")
_DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu")
_DTYPES = {"tensor(float)": "float32", "tensor(double)": "float64"}  # the others are "tensor(int8)" -> "int8"
_FATAL_ONLY = 4  # errors are raised; the library would print them as well
_SMALLEST_EXTERNAL_BYTES = 1024
_OTHER_SHAPE = "shape verification failed"
_NO_MEMORY = ("is smaller than requested bytes", "Failed to allocate", "bad_alloc", "out of memory", "CUDA failure 2:")


def version() -> str | None:
    """The installed version; None without one."""
    for name in _DISTRIBUTIONS:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def load_library() -> None:
    """Imports onnxruntime.

    Raises:
        BackendError: not installed, or broken.
    """
    try:
        import onnxruntime  # noqa: F401  # the import is the point
    except ImportError as error:
        raise BackendError(
            f"onnxruntime cannot be imported: {error}", hint="pip install 'memopt[onnxruntime]'"
        ) from error


def unavailable(device: str) -> str | None:
    """Why ONNX Runtime cannot run on `device`; None when it can."""
    try:
        load_library()
    except BackendError as error:
        return str(error)
    import onnxruntime

    from memopt.cuda_driver import driver_missing

    if PROVIDERS[device] not in onnxruntime.get_available_providers():
        return f"this onnxruntime was built without {PROVIDERS[device]}; hint: pip install 'memopt[gpu]'"
    return driver_missing() if device != "cpu" else None


def refuses(artifact: Artifact) -> str | None:
    """Why ONNX Runtime cannot open this artifact; None when it can."""
    if artifact.kind != "onnx":
        return f"onnxruntime opens .onnx, not .{artifact.kind}"
    return artifact.cpu.refusal(version()) if artifact.cpu is not None else None


def open(  # noqa: A001  # the arrow's name
    artifact: Artifact, *, device: str = "cpu", threads: int = 0, profile: str = "balanced",
    pool: MemoryPool | None = None, record: Path | None = None,
) -> OrtSession:  # fmt: skip
    """A session on exactly this device; see `memopt.session.Runtime.open`. Without a pool it has one to itself.

    Runs are recorded at `record`, by the library's profiler.
    """
    costs = profile_named(profile)
    reason = refuses(artifact) or unavailable(device)
    if reason is None and not artifact.runs_on(device):
        reason = f"{artifact.name} is optimized for a processor and does not run on {device}"
    if reason:
        raise BackendError(reason)
    return_large_blocks()
    if pool is None:
        pool = MemoryPool(region_bytes=region_for(artifact.size_bytes))
    return OrtSession(artifact, device=device, threads=threads, profile=costs, pool=pool, record=record)


def write_optimized(artifact: Artifact, path: Path, *, weights_name: str) -> None:
    """Writes the graph as the library has optimized it for this processor, and its weights to a file beside it.

    Products' weights are written packed as well, so that they can be mapped in that form too.

    Raises:
        BackendError, OutOfResource: the library cannot.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL_ONLY
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(path)
    for key, value in (
        ("optimized_model_external_initializers_file_name", weights_name),
        ("optimized_model_external_initializers_min_size_in_bytes", str(_SMALLEST_EXTERNAL_BYTES)),
        ("save_external_prepacked_constant_initializers", "1"),
    ):
        options.add_session_config_entry(f"session.{key}", value)
    try:
        with _source(options, artifact) as model:
            onnxruntime.InferenceSession(model, options, providers=[PROVIDERS["cpu"]])
    except library_errors() as error:
        raise _as_ours(error, f"onnxruntime cannot optimize {artifact.name}") from error


class OrtSession:
    """An open ONNX graph. Threads may share it."""

    def __init__(
        self, artifact: Artifact, *, device: str, threads: int, profile: Profile, pool: MemoryPool,
        record: Path | None = None,
    ) -> None:  # fmt: skip
        self._artifact = artifact  # the mapped weights live as long as the session
        self._device, self._threads, self._profile, self._pool = device, threads, profile, pool
        self._record = record
        self._waking = threading.Lock()
        self._closed = False
        self._opened: _Opened | None = None
        opened = self._wake()
        self.inputs = tuple(_spec(value) for value in opened.session.get_inputs())
        self.outputs = tuple(_spec(value) for value in opened.session.get_outputs())
        # What is recorded shows outputs too, which is why the library allocates them then.
        bindable = profile.arena and device == "cpu" and record is None
        self._binds = bindable and can_hold(self.inputs, self.outputs, named=opened.named)
        self._sample_bytes = sum(spec.nbytes(1) for spec in self.outputs)
        self.placement: str = opened.placement
        self.device_bytes: int | None = None
        self.device_method = "unknown: ONNX Runtime's Python API does not tell what its allocators hold"

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        """The outputs, in order; see `memopt.session.Session.run`."""
        check_feeds(self.inputs, feeds)
        opened = self._opened or self._wake()
        try:
            if self._binds and self._sample_bytes * _samples(self.inputs, feeds) >= POOLED_BYTES:
                return opened.run_bound(feeds, self._pool.outputs.take(self.inputs, self.outputs, feeds))
            return [np.array(output) for output in opened.session.run(opened.output_names, dict(feeds))]
        except library_errors() as error:
            if self._binds and _OTHER_SHAPE in str(error):  # the graph lies about its outputs, which is its right
                self._binds = False
                return self.run(feeds)
            raise _as_ours(error, f"onnxruntime failed in {self._artifact.name}") from error

    def end_record(self) -> Path:
        """Where the runs so far were recorded; only of a session that was opened with `record`."""
        return Path(self._wake().session.end_profiling())

    def trim(self) -> None:
        """Goes to sleep: weights, arena and the library's session are let go, and the next run opens it again.

        Runs under way end in the memory they have.
        """
        self._opened = None
        self._pool.outputs.clear()
        for view in (self._artifact.data, self._artifact.weights):
            if view is not None:
                release_pages(view)

    def close(self) -> None:
        """Frees the session."""
        self._closed = True
        self.trim()

    def _wake(self) -> _Opened:
        """The library's session, made when there is none."""
        with self._waking:
            if self._closed:
                raise BackendError(f"{self._artifact.name} is closed")
            opened = self._opened
            if opened is None:
                opened = self._opened = self._make()
        return opened

    def _make(self) -> _Opened:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = _FATAL_ONLY
        options.intra_op_num_threads = self._threads
        options.enable_mem_reuse = options.enable_mem_pattern = False
        options.enable_cpu_mem_arena = self._profile.arena
        artifact = self._artifact
        optimized = artifact.cpu is not None
        if optimized:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            if not self._profile.arena:
                # The file's order, in which least is alive at once. In an arena it is placing that counts: ResNet-50 at
                # batch 8 has 41 MiB alive instead of 49, and takes 59 instead of 53.
                options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
        if self._record is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(self._record)
        entries = session_entries(
            self._profile, device=self._device, optimized=optimized, packed=artifact.packed,
            precision=artifact.precision,
        )  # fmt: skip
        for key, value in entries.items():
            options.add_session_config_entry(key, value)
        asked = provider_options(self._profile, device=self._device, limit_bytes=self._pool.limit_bytes)
        arena = self._pool.opening(self, options) if self._profile.arena and self._device == "cpu" else nullcontext()
        try:
            with arena, _source(options, artifact) as model:
                session = onnxruntime.InferenceSession(model, options, providers=asked)
                opened = _Opened(session)
                if self._profile.arena and self._device == "cpu":
                    self._pool.hold(opened)
        except library_errors() as error:
            raise _as_ours(error, f"onnxruntime cannot open {artifact.name}") from error
        if opened.provider != PROVIDERS[self._device]:
            raise BackendError(f"onnxruntime fell back to {opened.provider}, {PROVIDERS[self._device]} was asked for")
        return opened


class _Opened:
    """The library's session with what is kept for its runs."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        session.disable_fallback()  # or an error in a run has it print, and go on with another provider
        self.session = session
        self.provider: str = session.get_providers()[0]
        self.output_names = [value.name for value in session.get_outputs()]
        self._bindings: deque[Any] = deque()

    @property
    def named(self) -> bool:
        """Whether every free dimension has a name, so that equal names mean equal sizes."""
        values = (*self.session.get_inputs(), *self.session.get_outputs())
        return all(dim is not None for value in values for dim in value.shape)

    @property
    def placement(self) -> str:
        """The provider that runs the graph, or the number of nodes that each runs."""
        if self.provider == PROVIDERS["cpu"]:
            return self.provider
        assigned = self.session.get_provider_graph_assignment_info()
        return placement_of((part.ep_name, len(part.get_nodes())) for part in assigned) or self.provider

    def run_bound(self, feeds: Mapping[str, Array], outputs: dict[str, Array]) -> list[Array]:
        """Runs into these outputs; a binding serves one run at a time, and is used again by the next one."""
        try:
            binding = self._bindings.pop()
        except IndexError:
            binding = self.session.io_binding()
        inputs = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
        for name, array in inputs.items():  # by address, for what `bind_cpu_input` is given it keeps alive
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for name, array in outputs.items():
            binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        self.session.run_with_iobinding(binding)
        self._bindings.append(binding)
        return list(outputs.values())


def placement_of(assigned: Iterable[tuple[str, int]]) -> str:
    """Where a graph's nodes run, as text, from pairs of provider and number of nodes; the most first.

    >>> placement_of([("CPUExecutionProvider", 1), ("CUDAExecutionProvider", 7), ("CPUExecutionProvider", 2)])
    'CUDAExecutionProvider 7 nodes, CPUExecutionProvider 3 nodes'
    """
    nodes: Counter[str] = Counter()
    for provider, count in assigned:
        nodes[provider] += count
    if len(nodes) == 1:
        return next(iter(nodes))
    return ", ".join(f"{provider} {count} nodes" for provider, count in nodes.most_common())


@contextmanager
def _source(options: onnxruntime.SessionOptions, artifact: Artifact) -> Iterator[str | bytes]:
    """What the session is made from, with the external initializers where it finds them.

    1. A file: its path, beside which the library finds and maps external weights, packed ones among them.
    2. A graph with its weights inside: its bytes.
    3. A graph with mapped weights: its bytes, the mapping being used where it lies.
    4. The same for an onnxruntime that cannot (before 1.24, the last for Python 3.10 among them): two files in a
       temporary folder, which the library maps while it loads.
    """
    if artifact.path is not None:  # 1
        yield str(artifact.path)
    elif artifact.weights is None:  # 2
        yield bytes(artifact.data)
    elif hasattr(options, "add_external_initializers_from_files_in_memory"):  # 3
        weights = np.frombuffer(artifact.weights, np.uint8)
        options.add_external_initializers_from_files_in_memory([artifact.weights_location], [weights], [weights.nbytes])
        options.add_session_config_entry("session.use_external_initializer_file_buffers_directly", "1")
        yield bytes(artifact.data)
    else:  # 4
        with tempfile.TemporaryDirectory(prefix="memopt-weights-") as name:
            folder = Path(name)
            (folder / "graph.onnx").write_bytes(artifact.data)
            (folder / str(artifact.weights_location)).write_bytes(artifact.weights)
            yield str(folder / "graph.onnx")


def _samples(inputs: tuple[TensorSpec, ...], feeds: Mapping[str, Array]) -> int:
    """The batch, as far as it can be told from the first input."""
    shape = feeds[inputs[0].name].shape if inputs else ()
    return shape[0] if shape else 1


def _spec(value: Any) -> TensorSpec:
    dtype = _DTYPES.get(value.type, value.type.removeprefix("tensor(").removesuffix(")"))
    sizes = (
        None if isinstance(dim, int) and dim < 0 else dim for dim in value.shape
    )  # -1, as Paddle writes it, is free
    shape = tuple(dim if isinstance(dim, int) else (dim or "batch") for dim in sizes)
    return TensorSpec(value.name, dtype, shape)


@cache
def library_errors() -> tuple[type[Exception], ...]:
    """The library's exceptions, which share no base class but Exception; a bound run raises RuntimeError for all."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    kinds = (kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception))
    return (*kinds, RuntimeError)


def _as_ours(error: Exception, what: str) -> Exception:
    text = first_line(error)
    if any(words in str(error) for words in _NO_MEMORY):
        return OutOfResource(f"{what}: out of memory: {text}")
    return (
        InputRefused(f"{what}: {text}")
        if "InvalidArgument" in type(error).__name__
        else BackendError(f"{what}: {text}")
    )
