"""Weights trained to stand on a grid of 2, 4 or 8 bits, so that rounding them for the file changes nothing."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from memopt.errors import AnswerIsNo, UsageError
from memopt_models.checkpoint import Checkpoint, snapshot
from memopt_models.integer_kernels import PASS_THROUGH, argument, is_layer, is_stored, operation
from memopt_models.pt2e import folded

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.fx import GraphModule, Node

METHOD = "ste"
BITS = (2, 4, 8)  # of integers that ONNX can store
FLOAT = 32  # bits of a layer that is left alone
STEPS = ("layer", "channel", "network")  # who has a step of its own
_BIAS_BITS = 8
# Steps that are tried for the first grid, as shares of the one that reaches the widest weight.
_SHARES = tuple(percent / 100 for percent in range(10, 101, 2))
# Operations that let a positive factor through: f(c x) = c f(x).
_HOMOGENEOUS = PASS_THROUGH | {"relu", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "mean", "dropout"}


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


def gridded(checkpoint: Checkpoint, bits: int, *, layers: Mapping[str, int], steps: str, biases: bool) -> Gridded:
    """The checkpoint's network with grids before the weights of its convolutions and linear layers.

    Args:
        checkpoint: what to train.
        bits: one of BITS.
        layers: other bits by patterns of layers' names, the first that fits; FLOAT for none.
        steps: one of STEPS: who has a step of its own for its weights. One for the network is for layers in a row,
            which are brought to the same scale first, see `_equalize`.
        biases: whether biases are rounded to 8 bits, in steps that the whole network shares.

    Raises:
        UsageError: a pattern of `layers` fits none, or the network cannot have one step.
        InputRefused: torch cannot trace the network.
        AnswerIsNo: there is no weight to round.
    """
    from torch.nn.utils import parametrize

    module = folded(checkpoint)
    chosen = _bits(module, bits, layers, biases=biases)
    log_steps = dict(_first_steps(module, chosen, steps))
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
    nodes = {_place(str(argument(node, 1).target))[0]: node for node in module.graph.nodes if is_layer(node)}
    for pattern in layers:
        if not fnmatch.filter(nodes, pattern):
            raise UsageError(f"no layer {pattern!r} has weights to round", hint=", ".join(nodes))
    chosen: dict[str, int] = {}
    for name, node in nodes.items():
        number = next((layers[pattern] for pattern in layers if fnmatch.fnmatchcase(name, pattern)), bits)
        bias = argument(node, 2)
        if number != FLOAT:
            chosen[str(argument(node, 1).target)] = number
            chosen |= {str(bias.target): _BIAS_BITS} if biases and bias is not None else {}
    if not chosen:
        raise AnswerIsNo("no layer has weights to round: only convolutions and linear layers do")
    return chosen


def _first_steps(module: GraphModule, bits: Mapping[str, int], steps: str) -> Iterator[tuple[str, nn.Parameter]]:
    import torch
    from torch import nn

    of_network = nn.Parameter(_equalize(module, bits).log()) if steps == "network" else None
    tensors = {name: module.get_parameter(name).detach() for name in bits}
    biases = [name for name in bits if tensors[name].ndim == 1]
    for name in bits.keys() - set(biases):
        weight = tensors[name]
        if of_network is not None:
            yield name, of_network
        elif steps == "channel":
            log_step = best_steps(weight.flatten(1), bits[name]).log()
            yield name, nn.Parameter(log_step.reshape(-1, *[1] * (weight.ndim - 1)))
        else:
            yield name, nn.Parameter(best_steps(weight.reshape(1, -1), bits[name]).log().reshape(()))
    if biases:
        every = torch.cat([tensors[name] for name in biases])[None]
        shared = nn.Parameter(best_steps(every, _BIAS_BITS).log().reshape(()))
        yield from ((name, shared) for name in biases)


def _equalize(module: GraphModule, bits: Mapping[str, int]) -> torch.Tensor:
    """Gives the weights of all layers the same best step, and returns it; what the network computes stays the same.

    A positive factor goes through a ReLU, so one layer's weights can be larger if another's are smaller (Nagel et al.
    2019, section 4.1, https://arxiv.org/abs/1906.04721). The step is the geometric mean of the layers' own ones, so
    that the factors cancel out.
    """
    import torch

    layers = [(str(argument(node, 1).target), argument(node, 2)) for node in _in_a_row(module)]
    weights = {name: module.get_parameter(name).detach() for name, _ in layers}
    own = {name: best_steps(weights[name].reshape(1, -1), bits[name]) for name in weights if name in bits}
    shared = torch.cat([*own.values()]).log().mean().exp()
    factor = torch.ones(())
    for name, bias in layers:
        ratio = shared / own[name].squeeze() if name in own else 1.0
        factor = factor * ratio
        weights[name].mul_(ratio)
        if bias is not None:
            module.get_parameter(str(bias.target)).detach().mul_(factor)
    return shared


def _in_a_row(module: GraphModule) -> Iterator[Node]:
    """The layers, each of which reads what the one before it wrote; UsageError if anything else is between them."""
    before: Node | None = None
    read: set[str] = set()
    for node in module.graph.nodes:
        if node.op == "placeholder" and before is None:
            before = node
        elif node.op == "call_function" and operation(node) != "sym_size":
            given = [each for each in node.all_input_nodes if not is_stored(each) and operation(each) != "sym_size"]
            weight = str(argument(node, 1).target) if is_layer(node) else None
            if given != [before] or weight in read or (weight is None and operation(node) not in _HOMOGENEOUS):
                raise UsageError(
                    f"one step is for layers in a row with ReLU or pooling between them, not around {node.name}",
                    hint="--steps layer",
                )
            before = node
            if weight is not None:
                read.add(weight)
                yield node
