"""What the parts of a network cost: outputs, parameters, multiply-accumulates; and what a pruning took of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from memopt_models.checkpoint import Checkpoint

if TYPE_CHECKING:
    from torch import nn

_MOST_ROWS = 16  # of a table that a person reads
_WHOLE = ""  # the name of a network among its modules
# Layers that count, and their number of outputs.
_OUTPUTS = {
    "Conv1d": "out_channels", "Conv2d": "out_channels", "Conv3d": "out_channels", "Linear": "out_features",
    "MultiheadAttention": "embed_dim",
}  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """Of a part of a network."""

    outputs: int  # channels or features that its convolutions, linear layers and attentions write
    parameters: int
    macs: int  # multiply-accumulates for one input


@dataclass(frozen=True)
class Shrunk:
    """A part of a network before and after it was pruned."""

    name: str
    layers: int
    before: Cost
    after: Cost


def count_macs(module: nn.Module, shape: tuple[int, ...]) -> int:
    """Multiply-accumulates of convolutions and matrix products for one input of this shape, (1, ...).

    The module's tensors go to the meta device: it is of no use afterwards, and nothing is computed.
    """
    return _count_macs(module, shape)[_WHOLE]


def compare_parts(before: Checkpoint, after: Checkpoint) -> tuple[Shrunk, ...]:
    """What became of each part of the network, and last of "all" of it.

    A part is all whose names begin alike, and there are so few that a person can read them. What stands beside the
    parts, such as a norm between two of them, counts for "all" alone.
    """
    layers, parts = _layers(before), {}
    for depth in range(max((name.count(".") for name in layers), default=0) + 1, 0, -1):
        parts = dict.fromkeys(".".join(name.split(".")[:depth]) for name in layers)
        if len(parts) <= _MOST_ROWS:
            break
    sides = [_costs(checkpoint, (*parts, _WHOLE)) for checkpoint in (before, after)]
    return tuple(
        Shrunk(part or "all", sum(_is_in(name, part) for name in layers), *(side[part] for side in sides))
        for part in (*parts, _WHOLE)
    )


def _costs(checkpoint: Checkpoint, parts: Sequence[str]) -> dict[str, Cost]:
    module = checkpoint.module()
    outputs = _layers(checkpoint)
    parameters = {name: weight.numel() for name, weight in module.named_parameters()}
    macs = _count_macs(module, checkpoint.inputs[0].at_batch(1))
    return {
        part: Cost(
            sum(number for name, number in outputs.items() if _is_in(name, part)),
            sum(number for name, number in parameters.items() if _is_in(name, part)),
            macs.get(part, 0),
        )
        for part in parts
    }


def _is_in(name: str, part: str) -> bool:
    return part in (_WHOLE, name) or name.startswith(f"{part}.")


def _layers(checkpoint: Checkpoint) -> dict[str, int]:
    """The outputs of each convolution, linear layer and attention by its name, in the order of the network."""
    from torch import nn

    outputs = {}
    for name, layer in checkpoint.module().named_modules():
        for kind, number in _OUTPUTS.items():
            if isinstance(layer, getattr(nn, kind)) and name.rpartition(".")[0] not in outputs:
                outputs[name] = int(vars(layer)[number])  # an attention's own output projection counts with it
    return outputs


def _count_macs(module: nn.Module, shape: tuple[int, ...]) -> dict[str, int]:
    """By the name of each module, _WHOLE for all; an operation counts for every module around it."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module.to("meta").eval()(torch.empty(shape, device="meta"))
    root = type(module).__name__
    flops = {name: sum(each.values()) for name, each in counter.get_flop_counts().items()}
    macs = {name.removeprefix(f"{root}."): number // 2 for name, number in flops.items() if name.startswith(f"{root}.")}
    return {_WHOLE: counter.get_total_flops() // 2, **macs}
