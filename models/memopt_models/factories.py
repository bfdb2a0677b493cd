"""What a user names as `pkg.mod:name`: a network factory or a data function of their own."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memopt.errors import InputRefused, MemoptError, UsageError, first_line
from memopt.files import sha256_file


def load_factory(name: str) -> Callable[..., Any]:
    """The callable that `pkg.mod:name` stands for. Importing runs the user's code: never take the name from a file.

    What the callable raises becomes InputRefused, with the user's code as the culprit.

    Raises:
        UsageError: no such module, no such name in it, or not a callable.
    """
    module_name, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, TypeError, ValueError) as error:
        raise _not_importable(name, error) from error
    except AttributeError as error:
        raise UsageError(f"module {module_name!r} has no {attribute!r}") from error
    if not callable(found):
        raise UsageError(f"{name!r} is a {type(found).__name__}, not a function")
    return _guarded(name, found)


def source_digest(name: str) -> str:
    """sha256 of the file with the module of `pkg.mod:name`, as 64 hex digits: other code, other digest.

    That file alone: what it imports is not looked at. "" for what lies in no file of the user's: a name without a
    colon, such as a built-in network, or a module that is part of the interpreter. The module is not imported, the
    packages around it are.

    Raises:
        UsageError: no such module.
    """
    module_name, colon, _ = name.partition(":")
    if not colon:
        return ""
    try:
        source = _source_of(module_name)
    except (ImportError, TypeError, ValueError) as error:
        raise _not_importable(name, error) from error
    return sha256_file(source) if source is not None and source.is_file() else ""


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*arguments: Any, **settings: Any) -> Any:
        try:
            return function(*arguments, **settings)
        except MemoptError:
            raise
        except Exception as error:  # the user's code may raise anything
            raise InputRefused(f"{name} raised {type(error).__name__}: {first_line(error)}") from error

    return call


def _source_of(module_name: str) -> Path | None:
    """Where the module's code lies; None for a module that is no file."""
    loaded = sys.modules.get(module_name)
    if loaded is not None:  # a script that runs as __main__ has a file, though nobody could find it by that name
        file = getattr(loaded, "__file__", None)
        return Path(file) if file else None
    spec = importlib.util.find_spec(module_name)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {module_name!r}")
    return Path(spec.origin) if spec.has_location and spec.origin else None


def _not_importable(name: str, error: Exception) -> UsageError:
    return UsageError(f"{name!r} cannot be imported: {error}", hint="pkg.mod:function, with pkg on PYTHONPATH")
