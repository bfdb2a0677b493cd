"""Activation checkpointing: of a block only its input is held, and the rest is computed again on the way back."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from memopt.errors import InputRefused, UsageError

if TYPE_CHECKING:
    import torch
    from torch import nn

Forward = Callable[..., Any]


@contextmanager
def recomputed(module: nn.Module) -> Iterator[None]:
    """Inside, a training step of the module holds less and computes longer; its gradients are the same.

    With L layers a block has at most sqrt(L) of them, which balances what is held between blocks against what is held
    while one is computed again (Chen et al. 2016, https://arxiv.org/abs/1604.06174, section 4). Blocks are:

    1. a module of several layers that is small enough: a residual block, an encoder layer;
    2. neighbours in a Sequential, as many as are small enough together: a stretch of vgg, or of simple_cnn.

    What is larger is divided; a layer alone stays. Random numbers, such as those of dropout, are drawn again as they
    were. Buffers, such as the running statistics of BatchNorm, change once: a block that is computed again sees those
    that it saw before, and what it makes of them is dropped. Nothing but `forward` of some modules is replaced, so that
    names and weights stay as they are; without gradients, as in evaluation, all is as ever.

    Raises:
        UsageError: the module has no blocks.
        InputRefused: (from a training step) a block writes into its own input, and cannot be computed again.
    """
    replaced = dict(_replacements(module, limit=max(2, math.isqrt(len(_layers(module))))))
    if not replaced:
        raise UsageError("the network has no blocks that could be computed again", hint="--checkpointing off")
    for each, forward in replaced.items():
        each.forward = forward
    try:
        yield
    finally:
        for each in replaced:
            del each.forward  # that of the class is there again


def _replacements(module: nn.Module, *, limit: int) -> Iterator[tuple[nn.Module, Forward]]:
    """Modules with what takes the place of their `forward`."""
    from torch import nn

    for child in [module] if type(module).forward is nn.Sequential.forward else module.children():
        if 2 <= len(_layers(child)) <= limit:
            yield child, _again(child.forward, [child])  # 1
        elif type(child).forward is nn.Sequential.forward:
            runs = _runs([each for each in child._modules.values() if each is not None], limit)
            yield child, _in_order(runs, limit)  # 2
            for large in (each for run in runs for each in run if len(_layers(each)) > limit):
                yield from _replacements(large, limit=limit)
        else:
            yield from _replacements(child, limit=limit)


def _runs(children: Sequence[nn.Module], limit: int) -> list[list[nn.Module]]:
    """Neighbours that have at most `limit` layers together.

    What writes into its input (a ReLU in place) follows what made that input: at the head of a block it would spoil
    what the block is computed from again.
    """
    runs: list[list[nn.Module]] = []
    room = 0
    for child in children:
        writes, layers = bool(getattr(child, "inplace", False)), len(_layers(child))
        if runs and (layers <= room or writes):
            runs[-1].append(child)
            room -= layers
        else:
            runs.append([child])
            room = 0 if writes else limit - layers
    return runs


def _in_order(runs: Sequence[Sequence[nn.Module]], limit: int) -> Forward:
    """The `forward` of a Sequential that computes each run again which has several layers, and none too large."""

    def through(run: Sequence[nn.Module], x: Any) -> Any:
        for each in run:
            x = each(x)
        return x

    steps: list[Forward] = []
    for run in runs:
        layers = [len(_layers(each)) for each in run]
        step = functools.partial(through, run)
        steps.append(_again(step, run) if sum(layers) > 1 and max(layers) <= limit else step)

    def forward(x: Any) -> Any:
        for step in steps:
            x = step(x)
        return x

    return forward


def _again(function: Forward, modules: Sequence[nn.Module]) -> Forward:
    """The same function, of which autograd holds the arguments alone."""
    import torch
    from torch.utils.checkpoint import checkpoint

    def forward(*arguments: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return function(*arguments, **named)
        own = [list(each) if isinstance(each, list) else each for each in arguments]  # a list may grow until then
        before = _marks(own)
        outputs = checkpoint(function, *own, use_reentrant=False, context_fn=lambda: _same_buffers(modules), **named)
        if _marks(own) != before:
            name = type(modules[0]).__name__
            raise InputRefused(
                f"a {name} of the network writes into its input and cannot be computed again",
                hint="--checkpointing off",
            )
        return outputs

    return forward


def _marks(arguments: Sequence[Any]) -> list[tuple[int, int]]:
    """What becomes different when somebody writes into a tensor, or into a list, of the arguments."""
    import torch

    flat = [part for each in arguments for part in (each if isinstance(each, list) else [each])]
    return [(id(each), each._version if isinstance(each, torch.Tensor) else 0) for each in flat]


def _same_buffers(modules: Sequence[nn.Module]) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Around the first computation and the second one: both see the same buffers, only the first one changes them."""
    owners = [owner for module in modules for owner in module.modules() if owner._buffers]
    before: list[dict[str, torch.Tensor | None]] = []

    @contextmanager
    def first() -> Iterator[None]:
        for owner in owners:
            copies = {name: None if each is None else each.clone() for name, each in owner._buffers.items()}
            before.append(copies)
        yield

    @contextmanager
    def second() -> Iterator[None]:
        present = [dict(owner._buffers) for owner in owners]
        for owner, copies in zip(owners, before, strict=True):
            owner._buffers.update(copies)
        try:
            yield
        finally:
            for owner, buffers in zip(owners, present, strict=True):
                owner._buffers.update(buffers)

    return first(), second()


def _layers(module: nn.Module) -> list[nn.Module]:
    """The modules in it that have no others inside; itself, if it has none."""
    return [each for each in module.modules() if next(each.children(), None) is None]
