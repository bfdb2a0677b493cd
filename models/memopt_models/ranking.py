"""Which channels go: how much each of them matters, and how many a layer gives up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from memopt.errors import AnswerIsNo, UsageError

if TYPE_CHECKING:
    import torch
    from torch import nn

# By what a channel is kept or dropped: the norm of its weights; what leaving it out would do to the loss, to first
# order (|weight x gradient|, Molchanov et al. 2019, https://arxiv.org/abs/1906.10771); the scale of its BatchNorm (Liu
# et al. 2017, https://arxiv.org/abs/1708.06519); or chance, the baseline of all others.
METHODS = ("l1", "l2", "taylor", "bn-scale", "random")
# Where channels compete: every layer gives up the same share, or all layers share one order.
SCOPES = ("layer", "global")
_MOST = 0.9  # of a layer goes when all share one order, unless more is asked for


class NotThisWay(AnswerIsNo):
    """One way of taking channels out does not work for a network; another one may."""


@dataclass(frozen=True)
class Cut:
    """What to take away."""

    ratio: float = 0.5  # share of the channels that goes
    method: str = "l2"
    scope: str = "layer"
    round_to: int = 1  # channel numbers are rounded down to multiples of this
    protect: tuple[str, ...] = ()  # layers whose names match these patterns stay as they are
    seed: int = 0  # of the method "random"

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise UsageError(f"ratio is {self.ratio}, it lies between 0 and 1", hint="--ratio 0.5")
        for name, known in (("method", METHODS), ("scope", SCOPES)):
            if getattr(self, name) not in known:
                raise UsageError(f"pruning {name} {getattr(self, name)!r} is not known", hint=", ".join(known))
        if self.round_to < 1:
            raise UsageError(f"round_to is {self.round_to}, at least 1 is needed")


@dataclass(frozen=True, eq=False)
class Candidate:
    """Channels that may go, all of those that depend on each other counting as one."""

    importance: torch.Tensor  # (channels,), the higher, the rather it stays; its mean is 1
    blocks: int = 1  # equal parts, such as attention heads, which all lose the same positions

    @property
    def positions(self) -> torch.Tensor:
        """The importance of each position, the mean over all blocks."""
        return self.importance.reshape(self.blocks, -1).mean(dim=0)


def choose(candidates: Sequence[Candidate], cut: Cut) -> list[list[int]]:
    """The channels of each candidate that go, in ascending order; at least one position of each stays.

    Of equals the first go, so that the same weights always give the same choice.
    """
    import torch

    sizes = [len(candidate.positions) for candidate in candidates]
    wanted = [_share(size, cut.ratio) for size in sizes]
    if cut.scope == "global" and candidates:
        order = torch.cat([candidate.positions for candidate in candidates]).argsort(stable=True)
        owner = torch.repeat_interleave(torch.tensor(sizes))[order[: _share(sum(sizes), cut.ratio)]]
        wanted = torch.bincount(owner, minlength=len(sizes)).tolist()
        wanted = [min(n, _share(size, max(cut.ratio, _MOST))) for n, size in zip(wanted, sizes, strict=True)]
    return [_take(candidate, n, cut.round_to) for candidate, n in zip(candidates, wanted, strict=True)]


def protected_layers(module: nn.Module, patterns: Sequence[str]) -> set[nn.Module]:
    """The layers whose names match one of the patterns, with all inside them.

    Raises:
        UsageError: a pattern that matches nothing.
    """
    named = {name: layer for name, layer in module.named_modules() if name}
    found: set[nn.Module] = set()
    for pattern in patterns:
        matching = [layer for name, layer in named.items() if fnmatchcase(name, pattern)]
        if not matching:
            raise UsageError(f"no layer is called {pattern!r}", hint=f"--protect {next(iter(named), '*')}")
        found.update(inner for layer in matching for inner in layer.modules())
    return found


def _share(size: int, ratio: float) -> int:
    """How many of `size` go so that the share 1 - ratio stays, rounded down, but not by an error of binary fractions.

    >>> _share(10, 0.9), _share(3, 0.5)
    (9, 2)
    """
    return size - math.floor(size * (1 - ratio) + 1e-6)


def _take(candidate: Candidate, number: int, round_to: int) -> list[int]:
    """The `number` least important positions of every block: more to round what stays, fewer where nothing would."""
    if not number:
        return []
    positions = candidate.positions
    size = len(positions)
    multiple = round_to // math.gcd(round_to, candidate.blocks)  # of what stays of a block
    kept = max((size - number) // multiple * multiple, min(multiple, size))
    going = positions.argsort(stable=True)[: size - kept].tolist()
    return sorted(block * size + position for block in range(candidate.blocks) for position in going)
