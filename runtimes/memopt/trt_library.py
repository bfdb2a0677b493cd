"""TensorRT's Python package: the module of either flavor, and its one log."""

from __future__ import annotations

import logging
from collections import deque
from functools import cache
from importlib import import_module
from typing import Any

from memopt.errors import BackendError, first_line

logger = logging.getLogger(__name__)

TITLES = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}


def import_library(flavor: str) -> Any:
    """The module `tensorrt` or `tensorrt_rtx`.

    Raises:
        BackendError: not installed, or one of its shared libraries is missing.
    """
    try:
        return import_module(module_name(flavor))
    except (ImportError, OSError) as error:  # OSError: libnvinfer.so.N
        if isinstance(error, ModuleNotFoundError) and error.name == module_name(flavor):
            raise BackendError(not_installed(flavor)) from error
        raise BackendError(f"{module_name(flavor)} cannot be imported: {first_line(error)}") from error


def not_installed(flavor: str) -> str:
    """The reason, with what to type."""
    return f"{TITLES[flavor]} is not installed; hint: pip install 'memopt[{flavor}]'"


@cache
def library_log(trt: Any) -> Any:
    """The log of one library in this process: TensorRT writes to the first it is given, whatever comes later."""

    class Log(trt.ILogger):  # type: ignore[misc]  # the library has no types
        def __init__(self) -> None:
            super().__init__()
            self.lines: deque[tuple[str, str]] = deque(maxlen=10_000)  # (severity, message)

        def log(self, severity: Any, message: str) -> None:
            logger.debug("%s: %s", severity.name, message)
            if severity.name != "VERBOSE":
                self.lines.append((severity.name, message))

        def errors(self) -> list[str]:
            """What the library complained about since `lines` were cleared."""
            return [text for severity, text in list(self.lines) if severity in ("ERROR", "INTERNAL_ERROR")]

    return Log()


def module_name(flavor: str) -> str:
    """What the flavor is imported as."""
    return flavor.replace("-", "_")
