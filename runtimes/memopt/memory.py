"""The memory bill: what a process holds, read from the system, and what a model costs above a baseline.

Private memory is what the device really loses: anonymous pages, which the kernel can only swap. File-backed memory is
mapped and clean: it counts in RSS, is shared with every process that maps the same file, and can be dropped any time.
The peak is that of RSS, reset before it counts where the kernel allows, else the highest of samples. Every number says
how it was read; what cannot be read is None, "unknown", not 0.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

STATUS, _ROLLUP, _STATM, _CLEAR_REFS = (
    Path("/proc/self/status"),
    Path("/proc/self/smaps_rollup"),
    Path("/proc/self/statm"),
    Path("/proc/self/clear_refs"),
)
_RESET_PEAK = "5"  # proc(5): writing 5 to clear_refs sets VmHWM to the present RSS
_SAMPLE_S = 0.001
_M_MMAP_THRESHOLD = -3  # of mallopt(3)
_ASKED_ONLY_BYTES = 32 * 2**20  # of threads' stacks, which the kernel counts as soon as they are asked for

# The phases of a bill in their order. The first two are absolute: the process before and after the runtime's import.
START, IMPORT, LOAD, FIRST_RUN, STEADY, AFTER_TRIM = "start", "import", "load", "first run", "steady", "after trim"
PHASES = (START, IMPORT, LOAD, FIRST_RUN, STEADY, AFTER_TRIM)


@dataclass(frozen=True)
class HostMemory:
    """What one process holds at one moment, in bytes."""

    private_bytes: int | None  # anonymous pages
    file_backed_bytes: int | None  # resident pages of mapped files, shared memory included
    proportional_bytes: int | None  # PSS: resident pages, each divided by the processes that map it
    peak_bytes: int | None  # highest RSS since the last reset; in a bill, during the phase
    method: str

    def above(self, baseline: HostMemory) -> HostMemory:
        """What has come since `baseline`; unknown where either is. Never negative for a peak that was not passed."""
        return HostMemory(
            _difference(self.private_bytes, baseline.private_bytes),
            _difference(self.file_backed_bytes, baseline.file_backed_bytes),
            _difference(self.proportional_bytes, baseline.proportional_bytes),
            _difference(self.peak_bytes, baseline.resident_bytes),
            self.method,
        )

    @property
    def resident_bytes(self) -> int | None:
        """RSS: private and file-backed together."""
        if self.private_bytes is None or self.file_backed_bytes is None:
            return None
        return self.private_bytes + self.file_backed_bytes


@dataclass(frozen=True)
class DeviceMemory:
    """What is held on a device at one moment, in bytes, by three accounts; `methods` says how each was read."""

    process_bytes: int | None = None  # this process by the driver's own account: context and library too
    used_bytes: int | None = None  # the whole device, every process on it
    allocator_bytes: int | None = None  # what the runtime says that it holds for the model
    methods: dict[str, str] = field(default_factory=dict)  # field -> method, or why it is unknown

    def above(self, baseline: DeviceMemory) -> DeviceMemory:
        """What has come since `baseline`; unknown where either is. The runtime's own account starts at the model."""
        return DeviceMemory(
            _difference(self.process_bytes, baseline.process_bytes),
            _difference(self.used_bytes, baseline.used_bytes),
            self.allocator_bytes,
            self.methods,
        )

    @property
    def best(self) -> tuple[int | None, str]:
        """The most exact of what is known, with its method: the process's account, the device's, the runtime's."""
        for name in ("process_bytes", "used_bytes", "allocator_bytes"):
            if getattr(self, name) is not None:
                return getattr(self, name), self.methods.get(name, "")
        return None, "unknown"


@dataclass(frozen=True)
class AllocatorUse:
    """What a runtime's own allocator holds at a run's peak, in bytes. Of weights it has only what it packed anew."""

    activation_bytes: int | None = None  # asked for by the run itself: on top of what is held between runs
    requested_bytes: int | None = None  # asked for and not yet given back
    in_use_bytes: int | None = None  # the same, in the chunks that it was served
    held_bytes: int | None = None  # what the allocator has taken from the system
    method: str = "unknown"


@dataclass(frozen=True)
class Bill:
    """Where the memory of one open model goes, phase by phase.

    "start" and "import" are absolute: the process before it has the runtime's library, and with it. The others, "load",
    "first run", "steady" and "after trim", are above "import". `device` has the same phases from "import" on, which
    is there what context and library take; it is empty for a model that runs on the CPU.
    """

    phases: dict[str, HostMemory] = field(default_factory=dict)
    device: dict[str, DeviceMemory] = field(default_factory=dict)
    allocator: AllocatorUse | None = None  # None where nobody asked, or the runtime has no such account

    @property
    def peak_bytes(self) -> int | None:
        """The highest RSS of all phases above "import"; unknown where that of one phase is."""
        peaks = [memory.peak_bytes for name, memory in self.phases.items() if name not in (START, IMPORT)]
        known = [peak for peak in peaks if peak is not None]
        return max(known) if known and len(known) == len(peaks) else None

    @property
    def library(self) -> HostMemory | None:
        """What the runtime's import costs, before there is a model; None where nothing was read before it."""
        if START not in self.phases or IMPORT not in self.phases:
            return None
        return self.phases[IMPORT].above(self.phases[START])


def read_host_memory() -> HostMemory:
    """This process's memory now, by the first way that this system has; all numbers are unknown where it has none.

    1. smaps_rollup: exact, with the share of pages that others map as well.
    2. /proc/self/status (no smaps_rollup, as in some containers): the kernel's counters, which lag some pages behind.
    3. psutil, where there is no /proc: USS, which takes mapped pages for private that nobody else maps.
    """
    for read in _READERS:
        with contextlib.suppress(OSError, KeyError, ImportError):
            return read()
    why = "unknown: no /proc/self/smaps_rollup on this system, and no psutil; hint: pip install 'memopt[measure]'"
    return HostMemory(None, None, None, None, why)


def limit_process(what: int, value: int) -> None:
    """Sets a limit of this process, one of `resource.RLIMIT_*`, as far as the hard limit allows."""
    import resource

    hard = resource.getrlimit(what)[1]
    resource.setrlimit(what, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


@contextmanager
def capped(limit_bytes: int) -> Iterator[None]:
    """Lets this process have no more private memory than leaves it within the limit: the kernel refuses the rest.

    Who asks for more gets MemoryError, or what a library makes of it. The limit counts what is held already.
    """
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    room = max(limit_bytes - settled_resident(), 0)
    asked = kib_fields(STATUS)["VmData"]  # private memory that the kernel counts, used or only asked for
    limit_process(resource.RLIMIT_DATA, asked + room + _ASKED_ONLY_BYTES)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def settled_resident() -> int:
    """What this process holds now, after giving back what is free; 0 where that cannot be read."""
    give_back()
    return read_host_memory().resident_bytes or 0


def give_back() -> None:
    """Returns freed memory to the system, so that room left by what came before cannot hide what comes next.

    Importing a library without compiled bytecode leaves megabytes of free heap, out of which a session would be served
    without growing the process. Only glibc has malloc_trim; elsewhere nothing but Python's own garbage goes.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def return_blocks_from(size_bytes: int) -> None:
    """From now on glibc gives blocks of this size and more back to the system when they are freed; nothing elsewhere.

    By itself it starts at 128 KiB, and keeps more and more, up to 32 MiB, in a heap full of holes.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, size_bytes)


class PeakMeter:
    """The highest RSS since `restart`. Where the kernel lets VmHWM be reset, it is that; else a thread samples RSS.

    What is held for less than a sample, or while a call keeps the interpreter locked, escapes the thread.
    """

    def __init__(self) -> None:
        self._sampler = None if reset_peak() else _Sampler()

    @property
    def method(self) -> str:
        """How the peak is read."""
        return (
            "VmHWM, reset through clear_refs" if self._sampler is None else f"RSS sampled every {_SAMPLE_S * 1e3:g} ms"
        )

    def restart(self) -> None:
        """Lets the peak start anew from the present RSS."""
        if self._sampler is None:
            reset_peak()
        else:
            self._sampler.restart()

    def read(self) -> int | None:
        """The peak in bytes; None where RSS cannot be read."""
        return kib_fields(STATUS).get("VmHWM") if self._sampler is None else self._sampler.highest()

    def __enter__(self) -> PeakMeter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._sampler is not None:
            self._sampler.stop()


class _Sampler:
    """A thread that reads RSS again and again and keeps the highest."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # else a reading from before `restart` could count after it
        self._over = threading.Event()
        self.restart()
        self._thread = threading.Thread(target=self._sample, name="memopt-peak", daemon=True)
        self._thread.start()

    def restart(self) -> None:
        with self._lock:
            self._highest = read_resident()

    def highest(self) -> int | None:
        self._look()
        return self._highest

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._over.wait(_SAMPLE_S):
            self._look()

    def _look(self) -> None:
        with self._lock:
            now = read_resident()
            if now is not None and now > (self._highest or 0):
                self._highest = now


def reset_peak() -> bool:
    """Lets VmHWM start anew from the present RSS; False where the kernel does not allow it."""
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def read_resident() -> int | None:
    """RSS now, quickly: from statm, or by psutil; None where neither is there."""
    with contextlib.suppress(OSError):
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(ImportError):
        import psutil

        return int(psutil.Process().memory_info().rss)
    return None


def kib_fields(path: Path) -> dict[str, int]:
    """The fields of a file such as STATUS that are given in kB, in bytes."""
    return {name: int(kib) * 1024 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB", path.read_text(), re.MULTILINE)}


def _by_rollup() -> HostMemory:
    """1."""
    rollup, status = kib_fields(_ROLLUP), kib_fields(STATUS)
    private, resident = rollup["Anonymous"], rollup["Rss"]
    method = "smaps_rollup (Anonymous, Rss - Anonymous, Pss); VmHWM"
    return HostMemory(private, resident - private, rollup.get("Pss"), status.get("VmHWM"), method)


def _by_status() -> HostMemory:
    """2."""
    status = kib_fields(STATUS)
    mapped = status["RssFile"] + status["RssShmem"]
    method = "status (RssAnon, RssFile + RssShmem), some pages late; PSS unknown; VmHWM"
    return HostMemory(status["RssAnon"], mapped, None, status.get("VmHWM"), method)


def _by_psutil() -> HostMemory:
    """3. Windows knows a peak of its own."""
    import psutil

    found = psutil.Process().memory_full_info()
    method = "psutil (USS, RSS - USS); cannot tell mapped pages that nobody else maps from private ones; PSS unknown"
    return HostMemory(int(found.uss), int(found.rss - found.uss), None, getattr(found, "peak_wset", None), method)


_READERS: tuple[Callable[[], HostMemory], ...] = (_by_rollup, _by_status, _by_psutil)


def _difference(value: int | None, baseline: int | None) -> int | None:
    return None if value is None or baseline is None else value - baseline
