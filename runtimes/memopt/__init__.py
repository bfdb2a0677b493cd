"""memopt: run exported models within a memory limit. numpy and one inference library; never torch, unless asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memopt.arena import MemoryPool, keep_malloc
    from memopt.bundle import open_bundle
    from memopt.model import Model, Prediction, load

__version__ = "0.1.0"
__all__ = ["MemoryPool", "Model", "Prediction", "__version__", "keep_malloc", "load", "open_bundle"]

_HOMES = {
    "load": "model", "Model": "model", "Prediction": "model", "open_bundle": "bundle", "MemoryPool": "arena",
    "keep_malloc": "arena",
}  # fmt: skip


def __dir__() -> list[str]:
    """What completion offers."""
    return __all__


def __getattr__(name: str) -> object:
    """The public names, imported when they are first used, so that `import memopt` itself costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'memopt' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"memopt.{_HOMES[name]}"), name)
