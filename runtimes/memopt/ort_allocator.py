"""What ONNX Runtime's allocator holds during a run, read from its profiler: its Python API does not tell.

Since 1.31 the profiler writes with each node what the allocator of its outputs has asked for, has in use, and has taken
from the system. A profiled session is slower, so it is one of its own.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from memopt import ort_runtime
from memopt.artifact import Artifact
from memopt.errors import MemoptError
from memopt.memory import AllocatorUse
from memopt.tensors import Array

_RUNS = 2  # in the first, the allocator still takes memory
_METHOD = (
    "ONNX Runtime's profiler (mem_bytes_requested_in_use, mem_bytes_in_use, mem_arena_held), in a session of its own"
)


def allocator_use(artifact: Artifact, feeds: Mapping[str, Array], *, device: str, threads: int) -> AllocatorUse:
    """What the allocator of this device holds at the peak of a run; unknown, with the reason, where nobody tells."""
    try:
        with tempfile.TemporaryDirectory(prefix="memopt-profile-") as folder:
            session = ort_runtime.open(artifact, device=device, threads=threads, profile=Path(folder) / "ort")
            for _ in range(_RUNS):
                session.run(feeds)
            events = json.loads(session.end_profile().read_bytes())
            session.close()
    except (MemoptError, OSError, ValueError) as error:
        return AllocatorUse(method=f"unknown: {error}")
    provider = ort_runtime.PROVIDERS[device]
    told = [event["args"] for event in events if event.get("args", {}).get("provider") == provider]
    found = AllocatorUse(
        _highest(told, "mem_bytes_requested_in_use"),
        _highest(told, "mem_bytes_in_use"),
        _highest(told, "mem_arena_held"),
        _METHOD,
    )
    if found.requested_bytes is None:
        return AllocatorUse(method="unknown: the profiler of this onnxruntime does not tell")
    return found


def _highest(told: Iterable[Mapping[str, str]], name: str) -> int | None:
    return max((int(each[name]) for each in told if name in each), default=None)
