"""The CUDA driver API through ctypes: memory, streams and copies on the first GPU, with nothing to install.

`libcuda.so.1` comes with every NVIDIA driver, while no wheel brings the `libcudart` that TensorRT links statically.
Opening the driver and asking for name, SM and version makes no context. The first allocation retains the device's
primary context, the one that TensorRT and torch use as well, and it lives as long as the process. It is current in a
thread only while a call lasts: an application's own context is put back.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, TypeVar
from uuid import UUID

import numpy as np

from memopt.errors import BackendError, MemoptError, OutOfResource
from memopt.sizes import show_size
from memopt.tensors import Array

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"

_OUT_OF_MEMORY = 2
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_CAPTURE_OF_THIS_THREAD = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads may allocate meanwhile
_NON_BLOCKING = 1  # a stream that does not wait for the legacy default stream

# Every function that is called; each returns a CUresult. A CUdeviceptr is 64 bits wide on every 64-bit system.
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetUuid_v2": (c_char_p, c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (POINTER(c_void_p),),
    "cuMemGetInfo_v2": (POINTER(c_size_t), POINTER(c_size_t)),
    "cuMemAlloc_v2": (POINTER(c_uint64), c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuMemHostAlloc": (POINTER(c_void_p), c_size_t, c_uint),
    "cuMemFreeHost": (c_void_p,),
    "cuStreamCreate": (POINTER(c_void_p), c_uint),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuStreamSynchronize": (c_void_p,),
    "cuStreamBeginCapture_v2": (c_void_p, c_int),
    "cuStreamEndCapture": (c_void_p, POINTER(c_void_p)),
    "cuGraphInstantiateWithFlags": (POINTER(c_void_p), c_void_p, c_uint64),
    "cuGraphDestroy": (c_void_p,),
    "cuGraphLaunch": (c_void_p, c_void_p),
    "cuGraphExecDestroy": (c_void_p,),
    "cuMemcpyHtoDAsync_v2": (c_uint64, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_uint64, c_size_t, c_void_p),
}


# Handles are equal only to themselves: a freed address may come back as another buffer's.
@dataclass(frozen=True, eq=False)
class DeviceBuffer:
    """Memory on the device, aligned to 256 bytes."""

    handle: int  # its address
    size_bytes: int


@dataclass(frozen=True, eq=False)
class HostBuffer:
    """Pinned host memory. `array` views it as bytes and must not be used once it is freed."""

    handle: int  # its address
    size_bytes: int
    array: Array  # (size_bytes,) uint8


@dataclass(frozen=True, eq=False)
class Stream:
    """A queue of work on the device."""

    handle: int


@dataclass(frozen=True, eq=False)
class Recording:
    """Work that was captured from a stream, to be launched again in one call."""

    handle: int


Held = TypeVar("Held", DeviceBuffer, HostBuffer, Stream, Recording)

_FREE = {
    DeviceBuffer: "cuMemFree_v2", HostBuffer: "cuMemFreeHost", Stream: "cuStreamDestroy_v2",
    Recording: "cuGraphExecDestroy",
}  # fmt: skip


class MemoryInfo(NamedTuple):
    """The device's memory as its driver sees it, all processes together."""

    free_bytes: int
    total_bytes: int


@cache
def open_driver(library: str = LIBRARY) -> Driver:
    """The driver, opened once per process.

    Raises:
        BackendError: no driver, no device, or one that does not start.
    """
    return Driver(library)


def driver_missing(library: str = LIBRARY) -> str | None:
    """Why this process has no NVIDIA driver with a device; None when it has one."""
    try:
        open_driver(library)
    except BackendError as error:
        return str(error)
    return None


class Driver:
    """The NVIDIA driver and its first device. Threads may share it.

    Every call raises BackendError with CUDA's own name and text when it fails, OutOfResource when memory ran out.
    """

    def __init__(self, library: str = LIBRARY) -> None:
        self._library = _load(library)
        self._lock = threading.Lock()
        self._context: int | None = None
        self._live: set[DeviceBuffer | HostBuffer | Stream | Recording] = set()
        self._call("cuInit", 0)
        self._device = self._first_device()
        self.name = self._read_name()
        self.uuid = self._read_uuid()
        self.sm = f"sm{self._attribute(_MAJOR)}{self._attribute(_MINOR)}"
        self.version = self._read_version()

    @contextmanager
    def current(self) -> Iterator[None]:
        """Makes the primary context current in this thread, for libraries that use whichever is.

        Blocks may be nested. What was current before is again after the block, also when it raises.
        """
        self._call("cuCtxPushCurrent_v2", self._primary_context())
        try:
            yield
        except BaseException:
            self._library.cuCtxPopCurrent_v2(byref(c_void_p()))  # what is raised tells more than its code
            raise
        self._call("cuCtxPopCurrent_v2", byref(c_void_p()))

    def mem_info(self) -> MemoryInfo:
        """Free and total memory of the device."""
        free, total = c_size_t(), c_size_t()
        self._call_in_context("cuMemGetInfo_v2", byref(free), byref(total))
        return MemoryInfo(free.value, total.value)

    def device_buffer(self, size_bytes: int) -> DeviceBuffer:
        """New memory on the device."""
        address = c_uint64()
        try:
            self._call_in_context("cuMemAlloc_v2", byref(address), max(size_bytes, 1))  # CUDA refuses 0
        except OutOfResource as error:
            free_bytes, total_bytes = self.mem_info()
            raise OutOfResource(
                f"{show_size(size_bytes)} of device memory are needed, {show_size(free_bytes)} of "
                f"{show_size(total_bytes)} are free on {self.name}"
            ) from error
        return self._keep(DeviceBuffer(address.value, size_bytes))

    def host_buffer(self, size_bytes: int) -> HostBuffer:
        """New pinned host memory, which asynchronous copies need."""
        address = c_void_p()
        try:
            self._call_in_context("cuMemHostAlloc", byref(address), max(size_bytes, 1), 0)
        except OutOfResource as error:
            raise OutOfResource(f"{show_size(size_bytes)} of pinned host memory are needed, and not free") from error
        handle = address.value or 0
        array = np.ctypeslib.as_array((ctypes.c_uint8 * size_bytes).from_address(handle))
        return self._keep(HostBuffer(handle, size_bytes, array))

    def stream(self) -> Stream:
        """A new stream."""
        handle = c_void_p()
        self._call_in_context("cuStreamCreate", byref(handle), _NON_BLOCKING)
        return self._keep(Stream(handle.value or 0))

    def free(self, held: DeviceBuffer | HostBuffer | Stream | Recording) -> None:
        """Gives it back; a second time it does nothing."""
        try:
            self._live.remove(held)
        except KeyError:
            return
        self._call_in_context(_FREE[type(held)], held.handle)

    def copy_to_device(self, target: DeviceBuffer, source: HostBuffer, *, size_bytes: int, stream: Stream) -> None:
        """Queues a copy of the first `size_bytes`; `source` must not change before the stream is synchronized."""
        _refuse_overrun(size_bytes, target, source)
        self._call_in_context("cuMemcpyHtoDAsync_v2", target.handle, source.handle, size_bytes, stream.handle)

    def copy_to_host(self, target: HostBuffer, source: DeviceBuffer, *, size_bytes: int, stream: Stream) -> None:
        """Queues a copy of the first `size_bytes`; `target` holds them once the stream is synchronized."""
        _refuse_overrun(size_bytes, target, source)
        self._call_in_context("cuMemcpyDtoHAsync_v2", target.handle, source.handle, size_bytes, stream.handle)

    def synchronize(self, stream: Stream) -> None:
        """Waits for everything queued on the stream; raises what went wrong in it."""
        self._call_in_context("cuStreamSynchronize", stream.handle)

    def record(self, stream: Stream, work: Callable[[], None]) -> Recording:
        """What `work` queues on the stream, recorded and not done (a CUDA graph).

        Raises:
            BackendError: also when `work` does what cannot be recorded, such as an allocation.
        """
        graph, executable = c_void_p(), c_void_p()
        self._call_in_context("cuStreamBeginCapture_v2", stream.handle, _CAPTURE_OF_THIS_THREAD)
        try:
            work()
        except BaseException:
            with self.current():
                self._library.cuStreamEndCapture(stream.handle, byref(graph))  # what is raised tells more than its code
                self._library.cuGraphDestroy(graph)
            raise
        self._call_in_context("cuStreamEndCapture", stream.handle, byref(graph))
        try:
            self._call_in_context("cuGraphInstantiateWithFlags", byref(executable), graph, 0)
        finally:
            self._call_in_context("cuGraphDestroy", graph)
        return self._keep(Recording(executable.value or 0))

    def launch(self, recording: Recording, stream: Stream) -> None:
        """Queues what was recorded."""
        self._call_in_context("cuGraphLaunch", recording.handle, stream.handle)

    def _first_device(self) -> int:
        count, device = c_int(), c_int()
        self._call("cuDeviceGetCount", byref(count))
        if count.value == 0:
            raise BackendError("the NVIDIA driver sees no GPU")
        self._call("cuDeviceGet", byref(device), 0)
        return device.value

    def _read_name(self) -> str:
        text = ctypes.create_string_buffer(256)
        self._call("cuDeviceGetName", text, len(text), self._device)
        return text.value.decode(errors="replace")

    def _read_uuid(self) -> str:
        """That of the device, or of its slice (MIG): "12345678-1234-..." without "GPU-" before it."""
        raw = ctypes.create_string_buffer(16)
        self._call("cuDeviceGetUuid_v2", raw, self._device)
        return str(UUID(bytes=raw.raw))

    def _attribute(self, number: int) -> int:
        value = c_int()
        self._call("cuDeviceGetAttribute", byref(value), number, self._device)
        return value.value

    def _read_version(self) -> str:
        """The CUDA version that the driver supports, such as "13.0"."""
        version = c_int()
        self._call("cuDriverGetVersion", byref(version))
        return f"{version.value // 1000}.{version.value % 1000 // 10}"

    def _keep(self, held: Held) -> Held:
        self._live.add(held)
        return held

    def _call_in_context(self, function: str, *arguments: Any) -> None:
        with self.current():
            self._call(function, *arguments)

    def _primary_context(self) -> int:
        with self._lock:
            if self._context is None:
                context = c_void_p()
                self._call("cuDevicePrimaryCtxRetain", byref(context), self._device)
                self._context = context.value or 0
            return self._context

    def _call(self, function: str, *arguments: Any) -> None:
        code = getattr(self._library, function)(*arguments)
        if code != 0:
            raise self._error(function, code)

    def _error(self, function: str, code: int) -> MemoptError:
        name, text = c_char_p(), c_char_p()
        self._library.cuGetErrorName(code, byref(name))
        self._library.cuGetErrorString(code, byref(text))
        name_text = (name.value or b"unknown CUDA error").decode(errors="replace")
        reason = f": {text.value.decode(errors='replace')}" if text.value else ""
        kind = OutOfResource if code == _OUT_OF_MEMORY else BackendError
        return kind(f"{function} failed with {name_text} ({code}){reason}")


def _load(library: str) -> ctypes.CDLL:
    try:
        loaded = ctypes.CDLL(library)
        for name, arguments in _SIGNATURES.items():
            function = getattr(loaded, name)
            function.argtypes, function.restype = arguments, c_int
    except OSError as error:
        raise BackendError(f"no NVIDIA driver on this machine ({error})") from error
    except AttributeError as error:
        raise BackendError(f"the NVIDIA driver is too old: {error}") from error
    return loaded


def _refuse_overrun(size_bytes: int, *buffers: DeviceBuffer | HostBuffer) -> None:
    if any(size_bytes > buffer.size_bytes for buffer in buffers):
        raise ValueError(f"{size_bytes} bytes do not fit into {[buffer.size_bytes for buffer in buffers]}")
