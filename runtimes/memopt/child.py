"""A child process of the same Python, and work that is done beside."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Made = TypeVar("Made")


def main_of(module: str) -> str:
    """What a child executes to run the `main` of this module, see `command`.

    It finds modules where this process does, but not in the current folder: a user's statistics.py is not ours.
    """
    return f"import sys; sys.path = sys.argv[1:]; from {module} import main; sys.exit(main())"


def command(code: str) -> list[str]:
    """The command line of a child that executes this Python."""
    return [sys.executable, "-c", code, *filter(None, sys.path)]


def beside(make: Callable[[], Made], *, name: str) -> Future[Made]:
    """What `make` returns or raises, from a thread of this name; a process that ends does not wait for it."""
    made: Future[Made] = Future()

    def work() -> None:
        try:
            made.set_result(make())
        except Exception as error:  # noqa: BLE001  # whoever asks for the result gets it
            made.set_exception(error)

    threading.Thread(target=work, name=name, daemon=True).start()
    return made
