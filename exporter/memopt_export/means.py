"""What a quantization may use, and whom it tells how far it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """Where a quantization stands: `done` of `total` samples or layers."""

    what: str
    done: int
    total: int


OnStep = Callable[[Step], None]


@dataclass(frozen=True)
class Means:
    """What a quantization may use.

    Attributes:
        batch_size: samples in one run, where the graph leaves it free.
        memory_bytes: what the process may hold beyond what it holds at the start; None: no limit.
        on_step: told after each run or layer.
    """

    batch_size: int = 8
    memory_bytes: int | None = None
    on_step: OnStep | None = None

    def tell(self, what: str, done: int, total: int) -> None:
        """Passes a step on to whoever listens."""
        if self.on_step is not None:
            self.on_step(Step(what, done, total))


UNLIMITED = Means()
