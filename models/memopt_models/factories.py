"""What a user names as `pkg.mod:name`: a network factory or a data function of their own."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from memopt.errors import UsageError


def load_factory(name: str) -> Callable[..., Any]:
    """The callable that `pkg.mod:name` stands for. Importing runs the user's code: never take the name from a file.

    Raises:
        UsageError: no such module, no such name in it, or not a callable.
    """
    module_name, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, TypeError, ValueError) as error:
        raise UsageError(
            f"{name!r} cannot be imported: {error}", hint="pkg.mod:function, with pkg on PYTHONPATH"
        ) from error
    except AttributeError as error:
        raise UsageError(f"module {module_name!r} has no {attribute!r}") from error
    if not callable(found):
        raise UsageError(f"{name!r} is a {type(found).__name__}, not a function")
    return found  # type: ignore[no-any-return]  # callable() does not narrow Any
