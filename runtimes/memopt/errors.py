"""The family of errors: each knows the exit code that the command line answers with."""

from __future__ import annotations

import textwrap
from typing import ClassVar

_LONGEST_LINE = 300  # of a library's message


class MemoptError(Exception):
    """A problem that a person can act on, with the value in it and a hint that can be typed.

    >>> str(InputRefused("batch is 0", hint="--batch 1"))
    'batch is 0; hint: --batch 1'
    """

    exit_code: ClassVar[int] = 70

    def __init__(self, problem: str, *, hint: str | None = None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.problem}; hint: {self.hint}" if self.hint else self.problem


class AnswerIsNo(MemoptError):
    """The work was done and the answer is no: does not fit, drop too large, outputs differ."""

    exit_code = 1


class UsageError(MemoptError):
    """The request contradicts itself or names something that does not exist."""

    exit_code = 2


class InputRefused(MemoptError):
    """A model, a checkpoint, data or an array is not what it has to be."""

    exit_code = 3


class IntegrityError(MemoptError):
    """Bytes are not the bytes that were promised: structure, digest or signature."""

    exit_code = 4


class BackendError(MemoptError):
    """A runtime, a device or a dependency is missing, or it failed."""

    exit_code = 5


class OutOfResource(MemoptError):
    """Memory, disk or time ran out, or a stated limit would be passed."""

    exit_code = 6


def by_name() -> dict[str, type[MemoptError]]:
    """The family by the names of its classes, as which errors cross from one process to another.

    >>> by_name()["OutOfResource"].exit_code
    6
    """
    family: list[type[MemoptError]] = [MemoptError, *MemoptError.__subclasses__()]
    return {kind.__name__: kind for kind in family}


def first_line(error: BaseException) -> str:
    """The first line of a library's message, or the kind of error where there is none.

    >>> first_line(ValueError("bad magic")), first_line(MemoryError())
    ('bad magic', 'MemoryError')
    """
    lines = str(error).strip().splitlines()
    return textwrap.shorten(lines[0], _LONGEST_LINE, placeholder=" …") if lines else type(error).__name__


def printable(text: str) -> str:
    r"""The text with control characters made visible, so that a file's content cannot steer a terminal.

    >>> printable("a\x1b[31mb")
    'a\\x1b[31mb'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
