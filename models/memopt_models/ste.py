"""Weights trained to stand on a grid of 2, 4 or 8 bits, so that rounding them for the file changes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from memopt.errors import AnswerIsNo, UsageError
from memopt_models.checkpoint import Checkpoint, snapshot
from memopt_models.dataset import DataSet
from memopt_models.evaluate import measure
from memopt_models.norms import find_norms, fold_norms, unfold_norms
from memopt_models.train import OnStep, TrainSettings, cross_entropy, data_for, describe, fit_module

if TYPE_CHECKING:
    import torch
    from torch import nn

METHOD = "ste"
FLOAT = 32  # bits of a layer that is left alone
STORED = (2, 4, 8)  # bits of integers that ONNX can store
_BIAS_BITS = 8
# Steps that are tried for the first grid, as shares of the one that reaches the widest weight.
_SHARES = tuple(percent / 100 for percent in range(10, 101, 2))


@dataclass(frozen=True)
class RoundSettings:
    """Which weights are rounded, and how the network is trained meanwhile."""

    train: TrainSettings
    bits: int = 4
    layers: Mapping[str, int] = field(default_factory=dict)  # other bits by the layer's name; 32: it stays float
    per_channel: bool = False  # a step for each output channel, 4 bytes each, instead of one for the layer
    round_biases: bool = True  # to 8 bits, in steps that the whole network shares

    def __post_init__(self) -> None:
        for name, bits in {"bits": self.bits, **self.layers}.items():
            known = STORED if name == "bits" else (*STORED, FLOAT)
            if bits not in known:
                raise UsageError(f"{name} is {bits}", hint=f"one of {', '.join(map(str, known))}")


def round_weights(
    checkpoint: Checkpoint, data: DataSet, how: RoundSettings, *, on_step: OnStep | None = None
) -> Checkpoint:
    """The checkpoint trained on with its weights rounded; what it holds afterwards stands exactly on the grid.

    BatchNorm is folded into the convolutions first: in the result it only adds. The steps stand in the state, under
    QUANTIZATION and the tensor's name, for the exporter.

    Args:
        checkpoint: a trained network; stays as it is.
        data: to train and to measure on.
        how: bits, training.
        on_step: called after every step.

    Raises:
        UsageError: `how.layers` names a layer that is not there.
        InputRefused: the data does not fit the checkpoint, or its BatchNorm layers cannot be folded.
        AnswerIsNo: there is no weight to round, or the training diverged.
    """
    data = data_for(checkpoint, data)
    module = checkpoint.module()
    norms = find_norms(module)
    fold_norms(module, norms)
    bits = bits_of(module, how)
    steps = attach(module, bits, per_channel=how.per_channel)
    fit_module(module, data, how.train, cross_entropy, on_step, stage="qat")
    detach(module, bits)
    whole = checkpoint.module()
    whole.load_state_dict(unfold_norms(snapshot(whole), snapshot(module), norms, module=whole))
    return checkpoint.advance(
        "qat",
        whole,
        settings=asdict(how) | describe(data),
        metrics=measure(whole, data),
        parents=(checkpoint.sha256,),
        quantization={"method": METHOD, "bits": bits, "norms": norms},
        tensors={name: step.detach().exp() for name, step in steps.items()},
    )


def bits_of(module: nn.Module, how: RoundSettings) -> dict[str, int]:
    """How many bits each tensor gets, by name: weights of convolutions and linear layers, and all their biases."""
    layers = {name: layer for name, layer in module.named_modules() if _is_rounded(layer)}
    for name in how.layers:
        if name not in layers:
            raise UsageError(f"no layer {name!r} has weights to round", hint=", ".join(layers))
    bits = {f"{name}.weight": how.layers.get(name, how.bits) for name in layers}
    chosen = {name: number for name, number in bits.items() if number != FLOAT}
    if not chosen:
        raise AnswerIsNo("no layer has weights to round: only convolutions and linear layers do")
    biased = [name for name, layer in layers.items() if layer.bias is not None and how.round_biases]
    return chosen | {f"{name}.bias": _BIAS_BITS for name in biased if f"{name}.weight" in chosen}


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


def attach(module: nn.Module, bits: Mapping[str, int], *, per_channel: bool) -> dict[str, nn.Parameter]:
    """Puts a Grid before each tensor; the logarithms of the steps by the tensor's name, one for all biases."""
    from torch.nn.utils import parametrize

    steps = dict(_first_steps(module, bits, per_channel=per_channel))
    for name, log_step in steps.items():
        layer, _, tensor = name.rpartition(".")
        parametrize.register_parametrization(module.get_submodule(layer), tensor, grid(log_step, bits[name]))
    return steps


def detach(module: nn.Module, bits: Mapping[str, int]) -> None:
    """Takes the grids away; the tensors stay where they were rounded to."""
    from torch.nn.utils import parametrize

    for name in bits:
        layer, _, tensor = name.rpartition(".")
        parametrize.remove_parametrizations(module.get_submodule(layer), tensor, leave_parametrized=True)


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


def _first_steps(
    module: nn.Module, bits: Mapping[str, int], *, per_channel: bool
) -> Iterator[tuple[str, nn.Parameter]]:
    import torch
    from torch import nn

    biases = [name for name in bits if name.endswith(".bias")]
    for name in bits:
        if name not in biases:
            weight = module.get_parameter(name).detach()
            rows = weight.flatten(1) if per_channel else weight.reshape(1, -1)
            shape = (-1, *[1] * (weight.ndim - 1)) if per_channel else ()
            yield name, nn.Parameter(best_steps(rows, bits[name]).log().reshape(shape))
    if biases:
        every = torch.cat([module.get_parameter(name).detach() for name in biases])
        shared = nn.Parameter(best_steps(every[None], _BIAS_BITS).log().reshape(()))
        yield from ((name, shared) for name in biases)


def _is_rounded(layer: nn.Module) -> bool:
    from torch import nn
    from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

    return isinstance(layer, nn.Linear) or (isinstance(layer, _ConvNd) and not isinstance(layer, _ConvTransposeNd))
