"""Weights trained to stand on a grid of 2, 4 or 8 bits, so that rounding them for the file changes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from memopt.errors import AnswerIsNo, UsageError
from memopt_models.checkpoint import Checkpoint, snapshot
from memopt_models.integer_kernels import argument, is_layer
from memopt_models.pt2e import folded

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.fx import GraphModule

METHOD = "ste"
BITS = (2, 4, 8)  # of integers that ONNX can store
FLOAT = 32  # bits of a layer that is left alone
_BIAS_BITS = 8
# Steps that are tried for the first grid, as shares of the one that reaches the widest weight.
_SHARES = tuple(percent / 100 for percent in range(10, 101, 2))


@dataclass(frozen=True, eq=False)
class Gridded:
    """A network whose weights pass a grid whenever they are read.

    Attributes:
        module: see `pt2e.folded`.
        bits: of each rounded tensor, by its name in the network.
        log_steps: the logarithm of its step: () or (channels, 1, ...); all biases share one.
    """

    module: GraphModule
    bits: dict[str, int]
    log_steps: dict[str, nn.Parameter]

    def state(self, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
        """The network's state with the weights as they were rounded; the grids are taken away."""
        from torch.nn.utils import parametrize

        for layer, tensor in map(_place, self.bits):
            parametrize.remove_parametrizations(self.module.get_submodule(layer), tensor, leave_parametrized=True)
        return checkpoint.module().state_dict() | snapshot(self.module)

    def steps(self) -> dict[str, torch.Tensor]:
        """The step of each rounded tensor, float32: () or (channels,)."""
        return {name: log_step.detach().exp().squeeze().clone() for name, log_step in self.log_steps.items()}


def gridded(
    checkpoint: Checkpoint, bits: int, *, layers: Mapping[str, int], per_channel: bool, biases: bool
) -> Gridded:
    """The checkpoint's network with grids before the weights of its convolutions and linear layers.

    Args:
        checkpoint: what to train.
        bits: one of BITS.
        layers: other bits by the layer's name, FLOAT for none.
        per_channel: whether each output channel has a step of its own, rather than the whole layer.
        biases: whether biases are rounded to 8 bits, in steps that the whole network shares.

    Raises:
        UsageError: `layers` names a layer that is not there.
        InputRefused: torch cannot trace the network.
        AnswerIsNo: there is no weight to round.
    """
    from torch.nn.utils import parametrize

    module = folded(checkpoint)
    chosen = _bits(module, bits, layers, biases=biases)
    log_steps = dict(_first_steps(module, chosen, per_channel=per_channel))
    for name in chosen:
        layer, tensor = _place(name)
        made = grid(log_steps[name], chosen[name])
        parametrize.register_parametrization(module.get_submodule(layer), tensor, made)
    return Gridded(module, chosen, log_steps)


def grid(log_step: nn.Parameter, bits: int) -> nn.Module:
    """What brings a tensor to the nearest points of a grid: step * clamp(round(w / step), -2^(b-1), 2^(b-1) - 1).

    Rounding passes the gradient straight through (Bengio et al. 2013, https://arxiv.org/abs/1308.3432); that of the
    step is the one of Esser et al. 2020, eq. 3 (https://arxiv.org/abs/1902.08153), which follows from it. The step is
    learned as its logarithm, not with the paper's gradient scale, which Adam would undo.

    Args:
        log_step: () or (channels, 1, ...).
        bits: of the grid.
    """
    from torch import nn

    low, high = _ends(bits)

    class Grid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.log_step = log_step

        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            step = self.log_step.exp()
            shares = weight / step
            rounded = shares.round() + (shares - shares.detach())  # in this order the integers are exact
            return rounded.clamp(low, high) * step

    return Grid()


def best_steps(rows: torch.Tensor, bits: int) -> torch.Tensor:
    """For each row the step with the least squared error, among shares of the one that reaches its widest value.

    Args:
        rows: (rows, values).
        bits: of the grid.
    """
    import torch

    low, high = _ends(bits)
    widest = rows.abs().amax(1).clamp_min(2.0**-60) / high
    tried = [widest[:, None] * share for share in _SHARES]
    errors = [((rows / step).round().clamp(low, high) * step - rows).square().sum(1) for step in tried]
    return torch.cat(tried, 1).gather(1, torch.stack(errors, 1).argmin(1, keepdim=True)).squeeze(1)


def _ends(bits: int) -> tuple[int, int]:
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def _place(name: str) -> tuple[str, str]:
    """The module that has a tensor, and what it calls it."""
    module, _, tensor = name.rpartition(".")
    return module, tensor


def _bits(module: GraphModule, bits: int, layers: Mapping[str, int], *, biases: bool) -> dict[str, int]:
    """How many bits each tensor gets, by name, as the graph comes to it."""
    nodes = {_place(str(node.args[1].target))[0]: node for node in module.graph.nodes if is_layer(node)}
    for name in layers:
        if name not in nodes:
            raise UsageError(f"no layer {name!r} has weights to round", hint=", ".join(nodes))
    chosen: dict[str, int] = {}
    for name, node in nodes.items():
        number, bias = layers.get(name, bits), argument(node, 2)
        if number != FLOAT:
            chosen[str(node.args[1].target)] = number
            chosen |= {str(bias.target): _BIAS_BITS} if biases and bias is not None else {}
    if not chosen:
        raise AnswerIsNo("no layer has weights to round: only convolutions and linear layers do")
    return chosen


def _first_steps(
    module: GraphModule, bits: Mapping[str, int], *, per_channel: bool
) -> Iterator[tuple[str, nn.Parameter]]:
    import torch
    from torch import nn

    tensors = {name: module.get_parameter(name).detach() for name in bits}
    biases = [name for name in bits if tensors[name].ndim == 1]
    for name in bits.keys() - set(biases):
        weight = tensors[name]
        rows = weight.flatten(1) if per_channel else weight.reshape(1, -1)
        shape = (-1, *[1] * (weight.ndim - 1)) if per_channel else ()
        yield name, nn.Parameter(best_steps(rows, bits[name]).log().reshape(shape))
    if biases:
        every = torch.cat([tensors[name] for name in biases])[None]
        shared = nn.Parameter(best_steps(every, _BIAS_BITS).log().reshape(()))
        yield from ((name, shared) for name in biases)
