"""TensorRT and TensorRT-RTX, which share one API: a runtime for the engines of each.

An engine belongs to one release of one flavor, one platform and named GPUs. All of that is compared with its EngineInfo
before a byte reaches the library, which cannot say why it refuses an engine and crashes on a machine without a driver.
A session takes the activation memory of the smallest profile and more only when a larger batch comes.
"""

from __future__ import annotations

import logging
import math
import platform
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import ClassVar

import numpy as np

from memopt.arena import MemoryPool
from memopt.artifact import Artifact
from memopt.cuda_driver import LIBRARY, DeviceBuffer, Driver, HostBuffer, Recording, Stream, open_driver
from memopt.device_arena import DeviceArena, Grown
from memopt.errors import BackendError, OutOfResource
from memopt.kernel_file import KernelFile
from memopt.manifest import EngineInfo
from memopt.ort_options import profile_named
from memopt.sizes import show_size
from memopt.tensors import Array, TensorSpec, check_feeds
from memopt.trt_engine import Engine, Shapes
from memopt.trt_library import TITLES, import_library, module_name, not_installed

logger = logging.getLogger(__name__)

# What `--target` may name: TensorRT builds for the GPU it finds, TensorRT-RTX for any of its list.
TARGETS = {
    "tensorrt": ("local",),
    "tensorrt-rtx": ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121", "local"),
}
_MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}  # what others call them -> what Linux calls them


@dataclass(frozen=True)
class TrtRuntime:
    """The runtime of one flavor, "tensorrt" or "tensorrt-rtx".

    Attributes:
        NAME: the flavor.
        cuda_library: the driver's.
        kernels: a folder of this user's, where TensorRT-RTX keeps what it compiles in the first runs; None: nowhere.
    """

    NAME: str
    cuda_library: str = LIBRARY
    kernels: Path | None = None
    DEVICES: ClassVar[tuple[str, ...]] = ("cuda",)

    def version(self) -> str | None:
        """The library's version; None when it is not installed. Nothing is imported for it."""
        loaded = sys.modules.get(module_name(self.NAME))
        if loaded is not None:
            return str(loaded.__version__)
        try:
            return metadata.version(module_name(self.NAME)).partition(".post")[0]  # 10.7.0.post1 calls itself 10.7.0
        except metadata.PackageNotFoundError:
            return None

    def load_library(self) -> None:
        """Imports the library; see `memopt.session.Runtime.load_library`."""
        import_library(self.NAME)

    def unavailable(self, device: str) -> str | None:
        """Why nothing can run here on `device`; None when it can. Makes no context on the device."""
        if device not in self.DEVICES:
            return f"{TITLES[self.NAME]} runs on cuda, not on {device}"
        if self.version() is None:
            return not_installed(self.NAME)
        try:
            open_driver(self.cuda_library)
            self.load_library()
        except BackendError as error:
            return str(error)
        return None

    def refuses(self, artifact: Artifact) -> str | None:
        """Why this artifact cannot be opened here; None when it can.

        Its EngineInfo is compared with the library, the platform and the GPU; the library is not asked.
        """
        info = artifact.engine
        if artifact.kind != "engine" or info is None:
            return f"{TITLES[self.NAME]} opens .engine with its EngineInfo, not .{artifact.kind}"
        checks = (self._other_flavor, self._other_version, self._other_platform, self._other_gpu)
        mismatch = next((text for check in checks if (text := check(info))), None)
        return f"{artifact.name} {mismatch}; hint: {self._rebuild(info)}" if mismatch else None

    def open(
        self, artifact: Artifact, *, device: str = "cuda", threads: int = 0, profile: str = "balanced",
        pool: MemoryPool | None = None,
    ) -> TrtSession:  # fmt: skip
        """A session; see `memopt.session.Runtime.open`. Threads mean nothing here: engines are built.

        Profile "fast" launches runs that repeat as one CUDA graph, which takes some device memory of its own.

        Engines of one pool run in turn in one activation memory, as large as the hungriest of them needs.

        Raises:
            BackendError: not available here, or the engine does not fit library, platform or GPU.
            OutOfResource: the device has not enough free memory.
        """
        reason = self.refuses(artifact) or self.unavailable(device)
        if reason:
            raise BackendError(reason)
        profile_named(profile)
        driver = open_driver(self.cuda_library)
        _refuse_without_memory(artifact, driver)
        trt = import_library(self.NAME)
        release = ".".join(str(trt.__version__).split(".")[:3])
        placement = f"{TITLES[self.NAME]} {release} on {driver.name} ({driver.sm})"
        with driver.current():
            arena = pool.device_arena(driver) if pool is not None else DeviceArena(driver)
            records = profile == "fast" and self.NAME == "tensorrt"  # TensorRT-RTX records by itself
            kept = self._kernel_file(artifact, driver)
            engine = Engine(trt, artifact, profile, compiled=kept.read() if kept else None)
            return TrtSession(engine, driver, arena, placement=placement, records=records, kept=kept)

    def _kernel_file(self, artifact: Artifact, driver: Driver) -> KernelFile | None:
        """Where the compiled kernels of this engine on this GPU and driver are kept."""
        if self.kernels is None or self.NAME != "tensorrt-rtx":
            return None
        return KernelFile.of(self.kernels, artifact.engine, driver.name, driver.uuid, driver.version)

    def _other_flavor(self, info: EngineInfo) -> str | None:
        return f"was built by {info.flavor}, this is {self.NAME}" if info.flavor != self.NAME else None

    def _other_version(self, info: EngineInfo) -> str | None:
        """Both flavors run an engine only with the very release that built it (we build none version-compatible)."""
        have = self.version()
        if have in (None, info.version):
            return None
        return f"was built by {TITLES[self.NAME]} {info.version}, {have} is installed"

    def _other_platform(self, info: EngineInfo) -> str | None:
        """TensorRT-RTX engines move between operating systems; nothing is promised between processors."""
        have_os, have_arch = this_platform()
        if info.arch == have_arch and (info.os == have_os or self.NAME == "tensorrt-rtx"):
            return None
        return f"was built for {info.os} {info.arch}, this machine is {have_os} {have_arch}"

    def _other_gpu(self, info: EngineInfo) -> str | None:
        """Without a driver nothing is said here: `unavailable` does."""
        driver = self._driver()
        if driver is None or driver.sm in info.targets:
            return None
        return f"needs {' or '.join(info.targets)}, this GPU ({driver.name}) is {driver.sm}"

    def local_target(self) -> tuple[str, str, str]:
        """Flavor and target to build for on this machine, and the GPU's name; to be asked where there is a driver."""
        driver = open_driver(self.cuda_library)
        known = driver.sm in TARGETS[self.NAME]
        return (self.NAME, driver.sm, driver.name) if known else ("tensorrt", "local", driver.name)

    def _rebuild(self, info: EngineInfo) -> str:
        """The command that makes an engine for this GPU, or for the same ones where no GPU is known."""
        flavor, target = self.local_target()[:2] if self._driver() else (self.NAME, ",".join(info.targets))
        return f"memopt-export engine MODEL.onnx --flavor {flavor} --target {target}"

    def _driver(self) -> Driver | None:
        try:
            return open_driver(self.cuda_library)
        except BackendError:
            return None


TENSORRT = TrtRuntime("tensorrt")
TENSORRT_RTX = TrtRuntime("tensorrt-rtx")


class TrtSession:
    """An open engine with one execution context. Threads may share it; runs in one arena take turns."""

    def __init__(
        self, engine: Engine, driver: Driver, arena: DeviceArena, *, placement: str, records: bool = False,
        kept: KernelFile | None = None,
    ) -> None:  # fmt: skip
        self.inputs, self.outputs = engine.inputs, engine.outputs
        self.placement = placement
        self._name = engine.name
        self._engine: Engine | None = engine
        self.device_method = "TensorRT's sizes of weights and activations, and the buffers of inputs and outputs"
        self._driver = driver
        self._arena = arena
        self._profile: tuple[int, DeviceBuffer] | None = None  # that the context is set to, and the memory it was given
        self._shapes: Shapes | None = None  # that it is set to
        self._kept = kept
        self._repeated: _Repeated | None = None
        self._held = ExitStack()
        try:
            self._stream = driver.stream()
            self._held.callback(driver.free, self._stream)
            self._held.enter_context(arena.member())
            if records:
                self._repeated = _Repeated(driver, self._stream)
            self._ports = {spec.name: _Port(driver, spec) for spec in self.inputs + self.outputs}
            for port in self._ports.values():
                self._held.callback(port.free)
            self._prepare(engine, next(iter(engine.profiles.values())).min)
        except BaseException:
            self.close()
            raise

    @property
    def device_bytes(self) -> int | None:
        """Device memory that the session holds: weights, activations, inputs and outputs. None: weights unknown.

        Activations that it shares with others of its pool count in each of them.
        """
        engine = self._engine
        if engine is None:
            return 0
        if engine.weights_bytes is None:
            return None
        ports = sum(port.device_bytes for port in self._ports.values())
        return engine.weights_bytes + self._arena.size_bytes + ports

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        """The outputs, in order; see `memopt.session.Session.run`.

        Raises:
            InputRefused: also when the batch lies outside every profile of the engine.
            OutOfResource: the device has no memory for a profile of this size.
        """
        with self._arena.turn(), self._driver.current():
            engine = self._engine
            if engine is None:
                raise BackendError(f"{self._name} is closed")
            check_feeds(self.inputs, feeds)
            self._prepare(engine, {spec.name: feeds[spec.name].shape for spec in self.inputs})
            for spec in self.inputs:
                self._ports[spec.name].send(feeds[spec.name], self._stream)
            self._execute(engine)
            outputs = [self._ports[spec.name] for spec in self.outputs]
            for port in outputs:
                port.fetch(self._stream)
            self._driver.synchronize(self._stream)
            return [port.array() for port in outputs]

    def _keep(self, engine: Engine) -> None:
        compiled = engine.compiled() if self._kept is not None else None
        if self._kept is not None and compiled is not None:
            self._kept.write(compiled)

    def _forget(self) -> None:
        if self._repeated is not None:
            self._repeated.free()

    def _execute(self, engine: Engine) -> None:
        if self._repeated is None:
            engine.execute(self._stream)
            return
        places = tuple(port.place for port in self._ports.values())
        self._repeated.execute((self._profile, places), lambda: engine.execute(self._stream))

    def trim(self) -> None:
        """Frees activations, inputs and outputs; the next run takes them anew."""
        with self._arena.turn():
            self._profile = self._shapes = None
            self._forget()
            self._arena.free()
            if self._engine is not None:
                with self._driver.current():
                    self._keep(self._engine)
            for port in self._ports.values():
                port.free()

    def close(self) -> None:
        """Frees the engine and all buffers; a later run raises BackendError. Closing twice is harmless."""
        with self._arena.turn():
            engine, self._engine = self._engine, None
            try:
                if engine is not None:
                    with self._driver.current():
                        self._forget()
                        self._keep(engine)
                        engine.close()  # before the memory it uses
            finally:
                self._held.close()

    def _prepare(self, engine: Engine, shapes: Shapes) -> None:
        """Sets profile, shapes and addresses, and makes room for them; what is set already stays."""
        before, self._shapes = self._shapes, None  # should anything fail below, the next run starts from here again
        switched = self._use_profile(engine, engine.profile_for(shapes))
        if switched or shapes != before:
            self._set_shapes(engine, shapes)
        self._shapes = shapes

    def _set_shapes(self, engine: Engine, shapes: Shapes) -> None:
        for name, shape in {**shapes, **engine.set_shapes(shapes)}.items():
            engine.set_address(name, self._ports[name].reserve(shape))

    def _use_profile(self, engine: Engine, index: int) -> bool:
        """Whether the context had another profile or memory before."""
        before, self._profile = self._profile, None  # should memory run out, the next run starts from here again
        memory = self._arena.at_least(engine.activation_bytes[index])
        if before != (index, memory):  # another engine of the pool may have grown or freed it
            engine.set_profile(index, memory, self._stream)
        self._profile = index, memory
        return before != self._profile


class _Repeated:
    """Runs that repeat: the first of a kind is the library's own, which it wants before anything is recorded; the
    second is recorded as a CUDA graph, and from then on that is launched. One graph at a time: a context that changes
    its shapes changes memory that older graphs use.
    """

    def __init__(self, driver: Driver, stream: Stream) -> None:
        self._driver = driver
        self._stream = stream
        self._kind: object = None
        self._recording: Recording | None = None
        self._can_record = True

    def execute(self, kind: object, work: Callable[[], None]) -> None:
        """Queues the work; equal kinds are equal work in the same places."""
        if kind != self._kind or not self._can_record:
            self.free()
            work()
            self._kind = kind
            return
        if self._recording is None:
            try:
                self._recording = self._driver.record(self._stream, work)
            except BackendError as error:
                logger.info("runs are not recorded: %s", error)
                self._can_record = False
                work()
                return
        self._driver.launch(self._recording, self._stream)

    def free(self) -> None:
        """Forgets the graph."""
        recording, self._recording, self._kind = self._recording, None, None
        if recording is not None:
            self._driver.free(recording)


class _Port:
    """One input or output: its place on the device and its pinned staging, both grown by need."""

    def __init__(self, driver: Driver, spec: TensorSpec) -> None:
        self._driver = driver
        self._spec = spec
        self._device = Grown(driver, driver.device_buffer)
        self._staging = Grown(driver, driver.host_buffer)
        self._shape: tuple[int, ...] = ()
        self._size_bytes = 0

    @property
    def device_bytes(self) -> int:
        """Bytes held on the device."""
        return self._device.size_bytes

    @property
    def place(self) -> tuple[int, tuple[int, ...]]:
        """Address and shape."""
        return self._buffers()[0].handle, self._shape

    def reserve(self, shape: tuple[int, ...]) -> DeviceBuffer:
        """The place for a tensor of this shape."""
        self._shape = shape
        self._size_bytes = math.prod(shape) * np.dtype(self._spec.dtype).itemsize
        return self._buffers()[0]

    def send(self, array: Array, stream: Stream) -> None:
        """Queues the copy of `array` to the device."""
        device, host = self._buffers()
        self._view(host)[...] = array
        self._driver.copy_to_device(device, host, size_bytes=self._size_bytes, stream=stream)

    def fetch(self, stream: Stream) -> None:
        """Queues the copy from the device; `array` has it once the stream is synchronized."""
        device, host = self._buffers()
        self._driver.copy_to_host(host, device, size_bytes=self._size_bytes, stream=stream)

    def array(self) -> Array:
        """What was fetched, as an array of its own."""
        return self._view(self._buffers()[1]).copy()

    def free(self) -> None:
        """Gives both buffers back."""
        self._device.free()
        self._staging.free()

    def _buffers(self) -> tuple[DeviceBuffer, HostBuffer]:
        return self._device.at_least(self._size_bytes), self._staging.at_least(self._size_bytes)

    def _view(self, host: HostBuffer) -> Array:
        return host.array[: self._size_bytes].view(self._spec.dtype).reshape(self._shape)


def this_platform() -> tuple[str, str]:
    """Operating system and processor as EngineInfo names them, such as ("linux", "x86_64")."""
    machine = platform.machine().lower()
    return platform.system().lower(), _MACHINES.get(machine, machine)


def _refuse_without_memory(artifact: Artifact, driver: Driver) -> None:
    """Raises OutOfResource when what is known of weights and smallest profile does not fit already."""
    assert artifact.engine is not None  # `refuses` saw to it
    sizes = (artifact.engine.weights_bytes, _smallest_activation_bytes(artifact.engine))
    known_bytes = sum(size for size in sizes if size is not None)
    free_bytes, total_bytes = driver.mem_info()
    if known_bytes > free_bytes:
        weights, activations = map(show_size, sizes)
        raise OutOfResource(
            f"{artifact.name} needs {'at least ' if None in sizes else ''}{show_size(known_bytes)} of device memory "
            f"(weights {weights}, activations of its smallest profile {activations}), "
            f"{show_size(free_bytes)} of {show_size(total_bytes)} are free on {driver.name}"
        )


def _smallest_activation_bytes(info: EngineInfo) -> int | None:
    """Of all profiles; None when one of them is not known, which may be the smallest."""
    sizes = [profile.activation_bytes for profile in info.profiles]
    known = [size for size in sizes if size is not None]
    return min(known) if known and len(known) == len(sizes) else None
