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
        batch_size: the most samples in one run, where the graph leaves it free.
        run_bytes: what the tensors of one run may take together; fewer samples are run at once where they would more.
        piece_bytes: what the weights of one piece of the graph may take; None: the graph is not cut.
        on_step: told after each run or layer.
    """

    batch_size: int = 32
    run_bytes: int = 128 * 2**20
    piece_bytes: int | None = None
    on_step: OnStep | None = None

    def tell(self, what: str, done: int, total: int) -> None:
        """Passes a step on to whoever listens."""
        if self.on_step is not None:
            self.on_step(Step(what, done, total))


UNLIMITED = Means()
