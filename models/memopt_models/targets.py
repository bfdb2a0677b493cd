"""What a pruned network may cost, and the search for the most of it that costs no more."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from memopt.errors import AnswerIsNo, UsageError
from memopt.sizes import show_size
from memopt_models.checkpoint import Checkpoint, count_parameters
from memopt_models.layer_costs import count_macs

Price = Callable[[Checkpoint, int], int]  # the checkpoint and a batch -> planned bytes: weights, inputs, activations

_LEAST_KEPT = 0.02  # share of the channels; one of each layer stays anyway
_CLOSE = 0.02  # a cost at most so far below what is allowed will do
_NARROW = 1 / 512  # shares of channels this near to each other are not told apart
_MOST_TRIALS = 12


@dataclass(frozen=True)
class Target:
    """What the network may cost afterwards."""

    measure: str  # "macs", "params" or "memory"
    amount: float  # below 1: a share of what it costs now; from 1 on: multiply-accumulates, parameters, bytes
    batch: int = 1  # at which memory is planned

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise UsageError(f"target {self.measure!r} is not known", hint=", ".join(MEASURES))
        if not 0 < self.amount < math.inf:
            raise UsageError(f"the target of {self.measure} is {self.amount}", hint=f"--target-{self.measure} 0.5")
        if self.batch < 1:
            raise UsageError(f"batch is {self.batch}", hint="--batch 1")

    def limit(self, before: int) -> int:
        """What is allowed of a network that costs so much now."""
        return math.floor(self.amount * before) if self.amount < 1 else math.floor(self.amount)

    def show(self, cost: int) -> str:
        """A cost as people read it."""
        what = MEASURES[self.measure]
        return f"{show_size(cost)} of {what} at batch {self.batch}" if self.measure == "memory" else f"{cost} {what}"


# What is measured, in words.
MEASURES = {"macs": "multiply-accumulates", "params": "parameters", "memory": "planned memory"}


@dataclass(frozen=True, eq=False)
class Trial:
    """A network pruned to this share of its channels, and its cost."""

    kept: float
    cost: int
    checkpoint: Checkpoint


def measure_cost(target: Target, checkpoint: Checkpoint, price: Price | None) -> int:
    """What the checkpoint costs, as the target counts.

    Raises:
        UsageError: memory is asked for, and nobody said how to plan it.
    """
    if target.measure == "memory":
        if price is None:
            raise UsageError("planned memory needs a planner", hint="memopt-export prune --target-memory SIZE")
        return price(checkpoint, target.batch)
    module = checkpoint.module()
    return count_parameters(module) if target.measure == "params" else count_macs(module, _one(checkpoint))


def search(attempt: Callable[[float], Trial], *, before: int, limit: int, target: Target) -> Trial:
    """Of the trials made, the one that costs most within the limit.

    Cost is taken to grow with some power of the share that is kept, so that few trials do: the power is that through
    the nearest trials above and below, and every trial comes at least a tenth of the way from either.

    Args:
        attempt: prunes to a share of the channels, 0 to 1, and measures.
        before: cost of the whole network.
        limit: cost that is allowed, less than `before`.
        target: how costs are shown.

    Raises:
        AnswerIsNo: not even the smallest network costs so little.
    """
    above, below = (1.0, before), None
    guess = max(math.sqrt(limit / before), _LEAST_KEPT)
    best: Trial | None = None
    for _ in range(_MOST_TRIALS):
        trial = attempt(guess)
        if trial.cost <= limit:
            best, below = trial, (trial.kept, trial.cost)
            if trial.cost >= limit * (1 - _CLOSE):
                break
        elif guess <= _LEAST_KEPT:
            break
        else:
            above = (trial.kept, trial.cost)
        if below is not None and above[0] - below[0] < _NARROW:
            break
        guess = _next(above, below, limit=limit, before=before)
    if best is None and guess > _LEAST_KEPT:
        trial = attempt(_LEAST_KEPT)
        best = trial if trial.cost <= limit else None
    if best is None:
        least = target.show(trial.cost)
        raise AnswerIsNo(f"the target is {target.show(limit)}; the least that can be reached is {least}")
    return best


def _one(checkpoint: Checkpoint) -> tuple[int, ...]:
    return checkpoint.inputs[0].at_batch(1)


def _next(above: tuple[float, int], below: tuple[float, int] | None, *, limit: int, before: int) -> float:
    """The share to try next, from a trial that costs too much and, where there is one, one that does not."""
    (high, cost), (low, floor) = above, below or (1.0, before)
    power = math.log(cost / floor) / math.log(high / low) if cost != floor and high != low else 2.0
    guess = high * math.pow(limit * (1 - _CLOSE / 2) / cost, 1 / max(power, 0.1))
    if below is None:
        return max(min(guess, 0.9 * high), _LEAST_KEPT)
    margin = (high - low) / 10
    return min(max(guess, low + margin), high - margin)
