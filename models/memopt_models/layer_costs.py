"""What each layer of a network costs: outputs, parameters, multiply-accumulates; and what a pruning took of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from memopt_models.checkpoint import Checkpoint

if TYPE_CHECKING:
    from torch import nn

_MOST_ROWS = 16  # of a table that a person reads


@dataclass(frozen=True)
class Cost:
    """Of one layer, or of several."""

    outputs: int  # channels or features that it writes
    parameters: int
    macs: int  # multiply-accumulates for one input

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.outputs + other.outputs, self.parameters + other.parameters, self.macs + other.macs)


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
    return _count_macs(module, shape)[""]


def layer_costs(checkpoint: Checkpoint) -> dict[str, Cost]:
    """The cost of each convolution, linear layer and attention by its name, in the order of the network."""
    from torch import nn

    module = checkpoint.module()
    counted = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.MultiheadAttention)
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, counted)}
    parameters = {name: sum(p.numel() for p in layer.parameters()) for name, layer in layers.items()}
    outputs = {name: _outputs(layer) for name, layer in layers.items()}
    macs = _count_macs(module, checkpoint.inputs[0].at_batch(1))
    return {
        name: Cost(outputs[name], parameters[name], macs.get(name, 0))
        for name in layers
        if name.rpartition(".")[0] not in layers  # an attention's own output projection is counted with it
    }


def compare_layers(before: Checkpoint, after: Checkpoint) -> tuple[Shrunk, ...]:
    """What became of each part of the network: layers whose names begin alike, so that a person can read them all."""
    costs = [layer_costs(checkpoint) for checkpoint in (before, after)]
    deepest = max((name.count(".") for name in costs[0]), default=0)
    for depth in range(deepest + 1, 0, -1):
        parts: dict[str, list[str]] = defaultdict(list)
        for name in costs[0]:
            parts[".".join(name.split(".")[:depth])].append(name)
        if len(parts) <= _MOST_ROWS:
            break
    return tuple(Shrunk(part, len(names), *(_sum(each, names) for each in costs)) for part, names in parts.items())


def _sum(costs: Mapping[str, Cost], names: list[str]) -> Cost:
    return sum((costs[name] for name in names), Cost(0, 0, 0))


def _outputs(layer: nn.Module) -> int:
    for name in ("out_channels", "out_features", "embed_dim"):
        if name in vars(layer):
            return int(vars(layer)[name])
    raise TypeError(f"{type(layer).__name__} has no number of outputs")


def _count_macs(module: nn.Module, shape: tuple[int, ...]) -> dict[str, int]:
    """By the name of each module, "" for the whole; an operation counts for all modules around it."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module.to("meta").eval()(torch.empty(shape, device="meta"))
    root = type(module).__name__
    flops = {name: sum(each.values()) for name, each in counter.get_flop_counts().items()}
    macs = {name.removeprefix(f"{root}."): number // 2 for name, number in flops.items() if name.startswith(f"{root}.")}
    return {"": counter.get_total_flops() // 2, **macs}
