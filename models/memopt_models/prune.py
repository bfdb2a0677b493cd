"""Structured pruning: whole channels leave the tensors, then the rest is trained to do their work."""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from memopt.errors import AnswerIsNo, InputRefused, UsageError
from memopt_models.checkpoint import Checkpoint, count_parameters, snapshot
from memopt_models.dataset import DataSet
from memopt_models.evaluate import measure
from memopt_models.resume import Keep
from memopt_models.team import ALONE, Team
from memopt_models.train import OnStep, TrainSettings, cross_entropy, data_for, describe, fit_module, identify

if TYPE_CHECKING:
    import torch
    from torch import nn

# By which norm of its weights a channel is kept or dropped.
METHODS = {"l1": 1, "l2": 2}


@dataclass(frozen=True)
class PruneSettings:
    """What to take away, and how to train afterwards."""

    ratio: float = 0.5  # share of the channels of every layer that goes
    method: str = "l2"  # or "l1"
    round_to: int = 1  # channel numbers are rounded down to multiples of this
    finetune: TrainSettings | None = None  # None: not at all

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise UsageError(f"ratio is {self.ratio}, it lies between 0 and 1", hint="--ratio 0.5")
        if self.method not in METHODS:
            raise UsageError(f"pruning method {self.method!r} is not known", hint=", ".join(METHODS))
        if self.round_to < 1:
            raise UsageError(f"round_to is {self.round_to}, at least 1 is needed")


def prune(
    checkpoint: Checkpoint,
    data: DataSet,
    how: PruneSettings,
    *,
    on_step: OnStep | None = None,
    keep: Keep | None = None,
    team: Team = ALONE,
) -> Checkpoint:
    """The checkpoint with fewer channels in every layer but the classifier, fine-tuned; its tensors are smaller.

    Args:
        checkpoint: what to prune; stays as it is.
        data: to fine-tune and to measure on.
        how: ratio, norm, fine-tuning.
        on_step: called after every step of the fine-tuning.
        keep: of the fine-tuning, see `train`.
        team: of the fine-tuning, see `train`.

    Raises:
        InputRefused: the data does not fit the checkpoint.
        AnswerIsNo: the network cannot be pruned, or nothing is left to take away.
    """
    data = data_for(checkpoint, data)
    module = checkpoint.module()
    remove_channels(module, checkpoint.inputs[0].at_batch(1), how, classes=len(checkpoint.labels))
    _check_rebuild(checkpoint, module)
    if how.finetune is not None:
        given = identify(checkpoint)
        fit_module(
            module, data, how.finetune, cross_entropy, on_step, stage="prune", keep=keep, made_from=given, team=team
        )
    used = {**asdict(how), **describe(data)}
    metrics = measure(module, data) if team.is_first else {}
    return checkpoint.advance("prune", module, settings=used, metrics=metrics, parents=(checkpoint.sha256,))


def remove_channels(module: nn.Module, shape: tuple[int, ...], how: PruneSettings, *, classes: int) -> None:
    """Takes the channels of smallest norm out of the module, in place, and out of all that reads or writes them.

    Channels that depend on each other go together (DepGraph, Fang et al. 2023, https://arxiv.org/abs/2301.12900); such
    a group counts by the mean norm of its members.

    Args:
        module: in evaluation mode.
        shape: of one input, (1, channels, height, width).
        how: ratio, norm, rounding.
        classes: outputs of the classifier, which is left whole.

    Raises:
        AnswerIsNo: the network's graph is not understood, or nothing can go.
    """
    import torch

    before, example = count_parameters(module), torch.zeros(shape)
    try:
        _run_pruner(module, example, how, classifier=_find_classifier(module, classes))
        outputs = module(example)
    except Exception as error:  # torch-pruning documents no errors; ZeroDivisionError and AssertionError were seen
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise AnswerIsNo(f"the network cannot be pruned: {reason}") from error
    if tuple(outputs.shape) != (1, classes):
        raise AnswerIsNo(f"the network cannot be pruned: its output became {tuple(outputs.shape)}")
    if count_parameters(module) == before:
        hint = "a larger --ratio or a smaller --round-to"
        raise AnswerIsNo(f"no channel could be removed at ratio {how.ratio}, rounded to {how.round_to}", hint=hint)


def _run_pruner(module: nn.Module, example: torch.Tensor, how: PruneSettings, *, classifier: nn.Module) -> None:
    """The one place that knows torch-pruning."""
    import torch_pruning

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unwrapped parameters")  # _check_rebuild sees whether they came out right
        pruner = torch_pruning.pruner.BasePruner(
            module,
            example,
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=METHODS[how.method]),
            pruning_ratio=how.ratio,
            ignored_layers=[classifier],
            round_to=how.round_to,
            # Its defaults are dicts that all calls share, and that keep the modules of earlier ones alive.
            in_channel_groups={},
            out_channel_groups={},
            num_heads={},
        )
        pruner.step()


def _find_classifier(module: nn.Module, classes: int) -> nn.Module:
    """The last layer with one output for each class."""
    from torch import nn

    layers = [layer for layer in module.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    outputs = [layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels for layer in layers]
    matching = [layer for layer, number in zip(layers, outputs, strict=True) if number == classes]
    if not matching:
        raise LookupError(f"no layer has {classes} outputs")
    return matching[-1]


def _check_rebuild(checkpoint: Checkpoint, module: nn.Module) -> None:
    """Raises AnswerIsNo unless the pruned network can be rebuilt from its weights alone and answers the same."""
    import torch

    shape = checkpoint.inputs[0].at_batch(2)
    example = torch.linspace(-1, 1, math.prod(shape)).reshape(shape)
    try:
        rebuilt = replace(checkpoint, state=snapshot(module)).module()
        with torch.inference_mode():
            same = torch.equal(rebuilt(example), module(example))
    except (InputRefused, RuntimeError) as error:
        raise AnswerIsNo(f"the pruned network cannot be rebuilt from its weights: {error}") from error
    if not same:
        raise AnswerIsNo("the pruned network, rebuilt from its weights, answers differently")
