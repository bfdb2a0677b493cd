"""ONNX Runtime, on the CPU or through its CUDA provider.

The external initializers of a bundle's graph are handed to the session as our own read-only mapping: they are neither
extracted nor copied, and processes share their pages. A graph that is optimized already for this very processor opens
as it is, which leaves almost no private memory. A named device is required: the library's silent fallback to the CPU is
found out and refused.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from memopt.artifact import Artifact, release_pages
from memopt.errors import BackendError, InputRefused, OutOfResource, first_line
from memopt.tensors import Array, TensorSpec, check_feeds

if TYPE_CHECKING:
    import onnxruntime

NAME = "onnxruntime"
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
DEVICES = tuple(PROVIDERS)
_DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu")
_DTYPES = {"tensor(float)": "float32", "tensor(double)": "float64"}  # the others are "tensor(int8)" -> "int8"
_ERRORS_ONLY = 3
# Precisions whose kernels read weights as they lie in the file; the others are several times slower unless packed anew.
READ_IN_PLACE = ("fp32", "fp16", "bf16")


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
    return driver_missing() if device == "cuda" else None


def refuses(artifact: Artifact) -> str | None:
    """Why ONNX Runtime cannot open this artifact; None when it can."""
    if artifact.kind != "onnx":
        return f"onnxruntime opens .onnx, not .{artifact.kind}"
    return artifact.cpu.refusal(version()) if artifact.cpu is not None else None


def open(  # noqa: A001  # the arrow's name
    artifact: Artifact, *, device: str = "cpu", threads: int = 0, profile: Path | None = None
) -> OrtSession:
    """A session on exactly this device; see `memopt.session.Runtime.open`. Runs are recorded at `profile`."""
    reason = refuses(artifact) or unavailable(device)
    if reason is None and not artifact.runs_on(device):
        reason = f"{artifact.name} is optimized for a processor and does not run on {device}"
    if reason:
        raise BackendError(reason)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.intra_op_num_threads = threads
    if artifact.cpu is not None:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        if artifact.precision in READ_IN_PLACE:
            options.add_session_config_entry("session.disable_prepacking", "1")
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    try:
        with _source(options, artifact) as model:
            session = onnxruntime.InferenceSession(model, options, providers=[PROVIDERS[device]])
    except library_errors() as error:
        raise _as_ours(error, f"onnxruntime cannot open {artifact.name}") from error
    if session.get_providers()[0] != PROVIDERS[device]:
        raise BackendError(f"onnxruntime fell back to {session.get_providers()[0]}, {PROVIDERS[device]} was asked for")
    return OrtSession(session, artifact)


class OrtSession:
    """An open ONNX graph. Threads may share it."""

    def __init__(self, session: onnxruntime.InferenceSession, artifact: Artifact) -> None:
        self._session: onnxruntime.InferenceSession | None = session
        self._artifact = artifact  # the mapped weights live as long as the session
        self.inputs = tuple(_spec(value) for value in session.get_inputs())
        self.outputs = tuple(_spec(value) for value in session.get_outputs())
        self._output_names = [spec.name for spec in self.outputs]
        self.placement: str = session.get_providers()[0]
        self.device_bytes: int | None = None
        self.device_method = "unknown: ONNX Runtime's Python API does not tell what its allocators hold"

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        """The outputs, in order; see `memopt.session.Session.run`."""
        session = self._session
        if session is None:
            raise BackendError(f"{self._artifact.name} is closed")
        check_feeds(self.inputs, feeds)
        try:
            return [np.asarray(output) for output in session.run(self._output_names, dict(feeds))]
        except library_errors() as error:
            raise _as_ours(error, f"onnxruntime failed in {self._artifact.name}") from error

    def end_profile(self) -> Path:
        """Where the runs so far were recorded; only of a session that was opened with `profile`."""
        if self._session is None:
            raise BackendError(f"{self._artifact.name} is closed")
        return Path(self._session.end_profiling())

    def trim(self) -> None:
        """Lets the kernel drop the resident pages of the mapped weights."""
        if self._artifact.weights is not None:
            release_pages(self._artifact.weights)

    def close(self) -> None:
        """Frees the session."""
        self._session = None


@contextmanager
def _source(options: onnxruntime.SessionOptions, artifact: Artifact) -> Iterator[str | bytes]:
    """What the session is made from, with the external initializers where it finds them.

    1. A file: its path.
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


def _spec(value: Any) -> TensorSpec:
    dtype = _DTYPES.get(value.type, value.type.removeprefix("tensor(").removesuffix(")"))
    shape = tuple(dim if isinstance(dim, int) else (dim or "batch") for dim in value.shape)
    return TensorSpec(value.name, dtype, shape)


@cache
def library_errors() -> tuple[type[Exception], ...]:
    """The library's exceptions, which share no base class but Exception."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return tuple(kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception))


def _as_ours(error: Exception, what: str) -> Exception:
    text = first_line(error)
    if "alloc" in text.lower() and "fail" in text.lower():
        return OutOfResource(f"{what}: out of memory: {text}")
    return (
        InputRefused(f"{what}: {text}")
        if "InvalidArgument" in type(error).__name__
        else BackendError(f"{what}: {text}")
    )
