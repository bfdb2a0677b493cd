"""What ONNX Runtime's allocator holds during a run, read from its profiler: its Python API does not tell.

Since 1.31 the profiler writes with each node what the allocator of its outputs has asked for, has in use, and has taken
from the system. A profiled session is slower, so it is one of its own.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

from memopt import ort_runtime
from memopt.artifact import Artifact
from memopt.errors import MemoptError
from memopt.memory import AllocatorUse
from memopt.ort_options import PROVIDERS
from memopt.tensors import Array

_RUNS = 2  # in the first, the allocator still takes memory
_REQUESTED, _ADDED = "mem_bytes_requested_in_use", "mem_requested_in_use_delta"  # after the node; by the node
_METHOD = f"ONNX Runtime's profiler ({_REQUESTED}, mem_bytes_in_use, mem_arena_held), in a session of its own"


def allocator_use(artifact: Artifact, feeds: Mapping[str, Array], *, device: str, threads: int) -> AllocatorUse:
    """What the allocator of this device holds at the peak of a run; unknown, with the reason, where nobody tells."""
    try:
        with tempfile.TemporaryDirectory(prefix="memopt-profile-") as folder:
            session = ort_runtime.open(artifact, device=device, threads=threads, record=Path(folder) / "ort")
            for _ in range(_RUNS):
                session.run(feeds)
            events = json.loads(session.end_record().read_bytes())
            session.close()
    except (MemoptError, OSError, ValueError) as error:
        return AllocatorUse(method=f"unknown: {error}")
    provider = PROVIDERS[device]
    arguments = [event.get("args", {}) for event in events]
    told = [each for each in arguments if each.get("provider") == provider and _REQUESTED in each]
    if not told:
        return AllocatorUse(method="unknown: the profiler of this onnxruntime does not tell")
    between_runs = min(int(each[_REQUESTED]) - int(each[_ADDED]) for each in told)
    requested, in_use, held = (
        max(int(each[name]) for each in told) for name in (_REQUESTED, "mem_bytes_in_use", "mem_arena_held")
    )
    return AllocatorUse(requested - between_runs, requested, in_use, held, _METHOD)
