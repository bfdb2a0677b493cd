"""Distillation: a student learns from the labels and from what its teacher says of every wrong class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from memopt.errors import InputRefused, UsageError
from memopt_models.checkpoint import Checkpoint
from memopt_models.dataset import DataSet
from memopt_models.evaluate import measure
from memopt_models.resume import Keep
from memopt_models.team import ALONE, Team
from memopt_models.train import (
    Loss,
    OnStep,
    TrainSettings,
    begin,
    cross_entropy,
    data_for,
    describe,
    fit_module,
    identify,
)

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class DistillSettings:
    """How a student is taught."""

    train: TrainSettings
    temperature: float = 4.0  # the higher, the more the wrong classes count
    alpha: float = 0.5  # weight of the teacher's answer; the label has the rest

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise UsageError(f"temperature is {self.temperature}, a positive number is needed", hint="--temperature 4")
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"alpha is {self.alpha}, it lies between 0 and 1", hint="--alpha 0.5")


def distill(
    teacher: Checkpoint,
    network: str,
    settings: Mapping[str, Any],
    data: DataSet,
    how: DistillSettings,
    *,
    start: Checkpoint | None = None,
    on_step: OnStep | None = None,
    keep: Keep | None = None,
    team: Team = ALONE,
) -> Checkpoint:
    """A student trained twice from the same seed, with and without its teacher: the better one on validation.

    For a student of few parameters the teacher can be a burden, so it has to prove itself; when both are equal, it
    has. The metrics keep both, "validation_top1_distilled" and "validation_top1_plain".

    Args:
        teacher: stays as it is; its preprocessing becomes the student's.
        network: of the student, see `networks.build`.
        settings: of the student.
        data: what to learn.
        how: temperature, weight of the teacher, training.
        start: the student's weights to go on from.
        on_step: called after every step of both trainings.
        keep: of both trainings, see `train`.
        team: of both trainings, see `train`.

    Raises:
        UsageError: no such network, or `start` is another one.
        InputRefused: teacher, start and data do not fit each other.
        AnswerIsNo: a training diverged.
    """
    data = data_for(teacher, data)
    first = begin(network, settings, data, how.train, start=start)
    if first.preprocess != teacher.preprocess:
        raise InputRefused("start and teacher prepare their inputs differently", hint="train both on the same data")
    losses = {"distilled": soft_target_loss(teacher.module(), how), "plain": cross_entropy}
    modules = {name: first.module() for name in losses}
    given = {**identify(first), "teacher": teacher.sha256, "temperature": how.temperature, "alpha": how.alpha}
    top1 = {
        name: fit_module(
            modules[name], data, how.train, loss, on_step, stage=name, keep=keep, made_from=given, team=team
        )
        for name, loss in losses.items()
    }
    kept = max(top1, key=lambda name: top1[name])  # the first of equals
    used = {"network": network, "settings": first.settings, **asdict(how), **describe(data), "kept": kept}
    measured = measure(modules[kept], data) if team.is_first else {}
    metrics = measured | {f"validation_top1_{name}": value for name, value in top1.items()}
    parents = (teacher.sha256,) if start is None else (teacher.sha256, start.sha256)
    lineage = (*teacher.lineage, *(stage for stage in first.lineage if stage not in teacher.lineage))
    return replace(first, lineage=lineage).advance(
        "distill", modules[kept], settings=used, metrics=metrics, parents=parents
    )


def soft_target_loss(teacher: nn.Module, how: DistillSettings) -> Loss:
    """The loss alpha T² KL(teacher at T || student at T) + (1 - alpha) cross entropy, where T is the temperature.

    Hinton, Vinyals, Dean 2015, https://arxiv.org/abs/1503.02531, section 2; T² keeps the share of both terms when T
    changes. The teacher answers to the very inputs the student sees, augmentation included (Beyer et al. 2021,
    https://arxiv.org/abs/2106.05237): answers kept from the plain pictures would be wrong for the moved ones.
    """
    import torch
    from torch.nn import functional

    def loss(logits: torch.Tensor, labels: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            target = functional.log_softmax(teacher(inputs) / how.temperature, dim=1)
        answer = functional.log_softmax(logits / how.temperature, dim=1)
        soft = functional.kl_div(answer, target, reduction="batchmean", log_target=True) * how.temperature**2
        return how.alpha * soft + (1 - how.alpha) * functional.cross_entropy(logits, labels)

    return loss
