"""The memory bill: what a process holds, read from the kernel, and what a model costs above a baseline.

Private memory is what the device really loses: anonymous pages, which the kernel can only swap. File-backed memory is
mapped and clean: it counts in RSS, is shared with every process that maps the same file, and can be dropped any time.
The peak is that of RSS, reset before it counts where the kernel allows. What cannot be read is None, "unknown", not 0.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
from dataclasses import dataclass, field
from pathlib import Path

STATUS, _ROLLUP, _CLEAR_REFS = (
    Path("/proc/self/status"),
    Path("/proc/self/smaps_rollup"),
    Path("/proc/self/clear_refs"),
)
_RESET_PEAK = "5"  # proc(5): writing 5 to clear_refs sets VmHWM to the present RSS


@dataclass(frozen=True)
class HostMemory:
    """What one process holds at one moment, in bytes."""

    private_bytes: int | None  # anonymous pages
    file_backed_bytes: int | None  # resident pages of mapped files, shared memory included
    proportional_bytes: int | None  # PSS: resident pages, each divided by the processes that map it
    peak_bytes: int | None  # highest RSS since the last reset
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
    """What the model holds on a device, in bytes, each number with the method by which it was read."""

    used_bytes: int | None = None
    allocator_bytes: int | None = None
    method: str = "unknown"


@dataclass(frozen=True)
class Bill:
    """Where the memory of one open model goes: host memory above the runtime's own baseline, phase by phase.

    `phases` maps "import", "load", "first run" and "steady" to HostMemory. "import" is absolute: the process with the
    runtime's library and nothing else; the others are above it.
    """

    phases: dict[str, HostMemory] = field(default_factory=dict)
    device: DeviceMemory = DeviceMemory()


def read_host_memory() -> HostMemory:
    """This process's memory now, from smaps_rollup and VmHWM; without /proc all numbers are unknown."""
    try:
        rollup, status = kib_fields(_ROLLUP), kib_fields(STATUS)
    except OSError:
        return HostMemory(None, None, None, None, "unknown: no /proc/self/smaps_rollup on this system")
    private = rollup.get("Anonymous")
    resident = rollup.get("Rss")
    file_backed = resident - private if resident is not None and private is not None else None
    method = "smaps_rollup (Anonymous, Rss - Anonymous, Pss); VmHWM"
    return HostMemory(private, file_backed, rollup.get("Pss"), status.get("VmHWM"), method)


def give_back() -> None:
    """Returns freed memory to the system, so that room left by what came before cannot hide what comes next.

    Importing a library without compiled bytecode leaves megabytes of free heap, out of which a session would be served
    without growing the process. Only glibc has malloc_trim; elsewhere nothing but Python's own garbage goes.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def reset_peak() -> bool:
    """Lets the peak start anew from the present RSS; False where the kernel does not allow it."""
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def kib_fields(path: Path) -> dict[str, int]:
    """The fields of a file such as STATUS that are given in kB, in bytes."""
    return {name: int(kib) * 1024 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB", path.read_text(), re.MULTILINE)}


def _difference(value: int | None, baseline: int | None) -> int | None:
    return None if value is None or baseline is None else value - baseline
