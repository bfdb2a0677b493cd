"""The memory that ONNX Runtime computes in: one region a pool, touched as far as it is used, within a limit.

A region is reserved, not filled: the kernel gives pages to what is touched. In one large region an arena can join what
is freed beside each other, so the memory really taken stays near what is alive at once; in regions as large as each
request, which is the library's other choice, it cannot. Measured on the optimized graphs, activations at batch 8, MiB:

    graph           alive   one region   kSameAsRequested, pattern, shrunk   the library's default
    resnet50         50.7         53.1                                58.1                   112.5
    mobilenet_v2     47.2         56.1                                67.6                    82.5
    vit_b_16         60.5         73.6                                78.4                   365.7

The arena's own books are in these figures: a thirty-second of the region, 8 bytes for each piece of 256. The library
has one arena for the whole process at a time, and each session keeps the one that was registered when it was opened;
this module registers a pool's arena around that.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from memopt.device_arena import DeviceArena
from memopt.errors import BackendError, UsageError, first_line
from memopt.output_buffers import OutputBuffers
from memopt.sizes import parse_size

if TYPE_CHECKING:
    import onnxruntime

    from memopt.cuda_driver import Driver

SMALLEST_REGION_BYTES, LARGEST_REGION_BYTES = 2**20, 128 * 2**20
_LARGEST_LIMITED_REGION_BYTES = 2**30
_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES = -3, 128 * 2**10  # mallopt(3), and the value glibc starts with
_NEXT_POWER_OF_TWO = 0  # a further region, where one is needed, is twice as large
_LOCK = threading.RLock()  # around whose arena is registered, and the sessions being opened in it


class MemoryPool:
    """One arena for several models: what one has freed another uses, and all of them together keep the limit.

    Models run in turn in the same memory when they run one after the other; run at once, they share the limit.

    Args:
        limit: of what the models' activations may take together, such as "64MiB"; None sets none. Outputs lie outside.
        region_bytes: what is reserved at first; by default all of a limit.
    """

    def __init__(self, limit: str | int | None = None, *, region_bytes: int | None = None) -> None:
        self.limit_bytes = parse_size(limit) if limit is not None else None
        if self.limit_bytes is not None and self.limit_bytes < SMALLEST_REGION_BYTES:
            raise UsageError(f"a pool of {limit} holds no model", hint="MemoryPool('1MiB') or more")
        wanted = region_bytes or min(self.limit_bytes or LARGEST_REGION_BYTES, _LARGEST_LIMITED_REGION_BYTES)
        self.region_bytes = min(wanted, self.limit_bytes or wanted)
        self.outputs = OutputBuffers(largest_bytes=self.limit_bytes)
        self._members: weakref.WeakSet[Any] = weakref.WeakSet()  # sessions, awake or not
        self._awake = 0  # library's sessions that hold the arena
        self._opening = 0
        self._device_arenas: dict[str, DeviceArena] = {}  # by the device's UUID

    def trim(self) -> None:
        """All of its sessions give their memory back, and so does the arena; the next run of each opens it again."""
        for member in list(self._members):
            member.trim()

    def device_arena(self, driver: Driver) -> DeviceArena:
        """The memory that the pool's engines compute in on this device, within the pool's limit."""
        with _LOCK:
            return self._device_arenas.setdefault(driver.uuid, DeviceArena(driver, self.limit_bytes))

    @contextmanager
    def opening(self, member: Any, options: onnxruntime.SessionOptions) -> Iterator[None]:
        """Around the making of a library's session for `member`: it gets this pool's arena.

        Where another pool's arena has been registered meanwhile, this one's sessions move to a new arena together.

        Raises:
            BackendError: this onnxruntime cannot give the pool an arena of its own.
        """
        with _LOCK:
            self._opening += 1
            try:
                if _registered() is not self:
                    self.trim()
                    _register(self)
                self._members.add(member)
                options.add_session_config_entry("session.use_env_allocators", "1")
                yield
            finally:
                self._opening -= 1

    def hold(self, holder: object) -> None:
        """Counts a library's session while `holder` lives; with the last one the arena goes."""
        self._awake += 1
        weakref.finalize(holder, _released, self).atexit = False


def region_for(size_bytes: int) -> int:
    """What is reserved for a model of this size: eight times that, for its activations are not known, and some batches.

    A region that is full gets a neighbour, and what lies across the two cannot be joined; one that is far too large
    costs its books.

    >>> region_for(800_000), region_for(400 * 2**20)
    (8388608, 134217728)
    """
    wanted = 1 << (8 * size_bytes - 1).bit_length()
    return min(max(wanted, SMALLEST_REGION_BYTES), LARGEST_REGION_BYTES)


def keep_malloc() -> None:
    """Leaves glibc's threshold for large blocks as it is, if called before the first model is loaded.

    By default memopt sets it once to 128 KiB, where glibc itself starts but does not stay: blocks from there on are
    given back to the system when they are freed. Loading ResNet-50's plain .onnx then leaves 101 MiB instead of 244. It
    holds for the whole process, whose own large blocks are mapped anew each time; an application that frees and takes
    many of those may want them kept.
    """
    _malloc_once.cancel()


def return_large_blocks() -> None:
    """Has glibc give large blocks back to the system when they are freed; once, and elsewhere nothing."""
    _malloc_once.call()


class _Once:
    """A function that is called at most once, or never when that was asked for first."""

    def __init__(self, function: Callable[[], object]) -> None:
        self._function: Callable[[], object] | None = function

    def call(self) -> None:
        function, self._function = self._function, None
        if function is not None:
            function()

    def cancel(self) -> None:
        self._function = None


def _set_mmap_threshold() -> None:
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES)


_malloc_once = _Once(_set_mmap_threshold)
_current: weakref.ref[MemoryPool] | None = None  # whose arena sessions get that are opened now


def _registered() -> MemoryPool | None:
    return _current() if _current is not None else None


def _register(pool: MemoryPool | None) -> None:
    """Has sessions opened from now on use an arena of this pool; None: a new one of nobody's, which is empty.

    The arena that was registered before lives on with the sessions that were opened in it.
    """
    global _current  # noqa: PLW0603  # the library's arena is the process's
    import onnxruntime

    from memopt.ort_runtime import library_errors

    limit_bytes = pool.limit_bytes if pool is not None else None
    region_bytes = pool.region_bytes if pool is not None else SMALLEST_REGION_BYTES
    config = {
        "max_mem": limit_bytes or 0,  # 0: none
        "arena_extend_strategy": _NEXT_POWER_OF_TWO,
        "initial_chunk_size_bytes": region_bytes,
    }
    place = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    try:
        onnxruntime.create_and_register_allocator(place, onnxruntime.OrtArenaCfg(config))
    except library_errors() as error:
        raise BackendError(
            f"onnxruntime {onnxruntime.__version__} takes no second arena: {first_line(error)}",
            hint="pip install -U onnxruntime, or profile='minimum'",
        ) from error
    _current = weakref.ref(pool) if pool is not None else None


def _released(pool: MemoryPool) -> None:
    """A library's session of this pool is gone; after the last one the library lets go of the arena too."""
    with _LOCK:
        pool._awake -= 1
        if pool._awake == 0 and pool._opening == 0 and _registered() is pool:
            _register(None)
