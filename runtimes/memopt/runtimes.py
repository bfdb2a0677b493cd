"""The table of runtimes. To add one, write what satisfies `memopt.session.Runtime` and name it here."""

from __future__ import annotations

from memopt import ort_runtime, torch_runtime
from memopt.errors import UsageError
from memopt.session import Runtime
from memopt.trt_runtime import TENSORRT, TENSORRT_RTX

RUNTIMES: dict[str, Runtime] = {
    "torch": torch_runtime,
    "onnxruntime": ort_runtime,
    "tensorrt": TENSORRT,
    "tensorrt-rtx": TENSORRT_RTX,
}


def runtime(name: str) -> Runtime:
    """The runtime with this name; UsageError names those there are."""
    try:
        return RUNTIMES[name]
    except KeyError as error:
        raise UsageError(f"runtime {name!r} is not known", hint="one of " + ", ".join(RUNTIMES)) from error
