"""This machine, in words: what a report names and what `doctor` shows."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from memopt.runtimes import RUNTIMES


def describe() -> dict[str, str]:
    """Operating system, processor, memory and the versions of the runtimes, as text."""
    facts = {
        "os": f"{platform.system()} {platform.release()}",
        "arch": platform.machine(),
        "cpu": _cpu_model(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "memory_bytes": str(_memory_bytes() or "unknown"),
        "python": platform.python_version(),
    }
    return facts | {name: version for name, runtime in RUNTIMES.items() if (version := runtime.version()) is not None}


def runtimes_here() -> dict[str, dict[str, str | None]]:
    """For each runtime and device, why it is unavailable; None where it works."""
    return {
        name: {device: runtime.unavailable(device) for device in runtime.DEVICES} for name, runtime in RUNTIMES.items()
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _memory_bytes() -> int | None:
    """Physical memory, or the container's limit where that is smaller."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total
