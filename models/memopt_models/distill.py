"""Distillation: a student learns from the labels, and from its teacher: what it says of every wrong class, and sees."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from memopt.errors import InputRefused, UsageError
from memopt_models.checkpoint import Checkpoint
from memopt_models.dataset import DataSet
from memopt_models.evaluate import measure, score
from memopt_models.features import AUTO, distance, pair_up, pupil, watch
from memopt_models.feed import draw_moves
from memopt_models.resume import Keep
from memopt_models.team import ALONE, Team
from memopt_models.train import (
    Loss,
    OnStep,
    Progress,
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
    features: tuple[str, ...] = ()  # "STUDENT=TEACHER": layers to be like each other, or "auto"
    beta: float = 1.0  # weight of these, on top

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise UsageError(f"temperature is {self.temperature}, a positive number is needed", hint="--temperature 4")
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"alpha is {self.alpha}, it lies between 0 and 1", hint="--alpha 0.5")
        if not 0 < self.beta < float("inf"):
            raise UsageError(f"beta is {self.beta}, a positive number is needed", hint="--beta 1")
        for text in self.features:
            if text != AUTO and not all(text.partition("=")):
                raise UsageError(f"features {text!r} name no two layers", hint=f"STUDENT=TEACHER, or {AUTO}")


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
    has. The metrics keep both, "validation_top1_distilled" and "validation_top1_plain"; and how teacher and plain
    student do on validation pictures that are moved as the student's are, "augmented_top1_teacher" and
    "augmented_top1_plain": a teacher that is worse there teaches what is wrong, which the progress and the lineage say.

    Args:
        teacher: stays as it is; its preprocessing becomes the student's.
        network: of the student, see `networks.build`.
        settings: of the student.
        data: what to learn.
        how: temperature, weights of the teacher, features, training.
        start: the student's weights to go on from.
        on_step: called after every step of both trainings.
        keep: of both trainings, see `train`.
        team: of both trainings, see `train`.

    Raises:
        UsageError: no such network, `start` is another one, or no such features.
        InputRefused: teacher, start and data do not fit each other.
        AnswerIsNo: a training diverged.
        OutOfResource: it does not fit into the limits.
    """
    from memopt_models.training_memory import Ledger, settle
    from memopt_models.training_probe import Subject

    data, ledger = data_for(teacher, data), Ledger(on_step)
    first = begin(network, settings, data, how.train, start=start)
    if first.preprocess != teacher.preprocess:
        raise InputRefused("start and teacher prepare their inputs differently", hint="train both on the same data")
    taught(first.module(), teacher.module(), how, first.inputs[0].at_batch(2))  # refused now, not after hours
    asked = {name: value for name, value in vars(how).items() if name != "train"}
    given = {**identify(first), **asked, "teacher": teacher.sha256}
    subject = Subject(first, f"{__name__}:{trainee.__name__}", {"teacher": teacher}, {**asked, "seed": how.train.seed})
    how = replace(how, train=settle(subject, data, how.train, ledger, stage="distilled", keep=keep, team=team))
    plain, teaching = first.module(), teacher.module()
    fit = partial(fit_module, data=data, how=how.train, on_step=ledger, keep=keep, made_from=given, team=team)
    top1 = {"plain": fit(plain, loss_function=cross_entropy, stage="plain")}
    augmented = {"teacher": _augmented(teaching, data, how), "plain": _augmented(plain, data, how)}
    warning = _warn(augmented, how)
    if warning:
        ledger(Progress("distilled", 0, how.train.epochs, 0, 0, math.nan, note=warning))
    module, loss = taught(first.module(), teaching, how, first.inputs[0].at_batch(2))
    top1["distilled"] = fit(module, loss_function=loss, stage="distilled")
    kept = "distilled" if top1["distilled"] >= top1["plain"] else "plain"
    student = module.network if kept == "distilled" else plain
    used = {
        "network": network, "settings": first.settings, **asdict(how), **describe(data), "kept": kept,
        "memory": ledger.memory, **({"warning": warning} if warning else {}),
    }  # fmt: skip
    metrics = measure(student, data) if team.is_first else {}
    metrics |= {f"validation_top1_{name}": value for name, value in top1.items()}
    metrics |= {f"augmented_top1_{name}": value for name, value in augmented.items()}
    parents = (teacher.sha256,) if start is None else (teacher.sha256, start.sha256)
    lineage = (*teacher.lineage, *(stage for stage in first.lineage if stage not in teacher.lineage))
    return replace(first, lineage=lineage).advance("distill", student, settings=used, metrics=metrics, parents=parents)


def taught(
    student: nn.Module, teacher: nn.Module, how: DistillSettings, shape: tuple[int, ...]
) -> tuple[Any, Loss]:  # fmt: skip
    """What is trained, whose `network` is the student, and its loss.

    Args:
        student: whose layers are watched from here on, where there are features.
        teacher: watched too; it follows the inputs to their device, and its features come of the pass of its answer.
        how: temperature, weights, features.
        shape: of an input.

    Raises:
        UsageError: no such features.
    """
    import torch

    example = torch.zeros(shape)
    pairs = pair_up(student, teacher, how.features, example) if how.features else []
    module, answer = pupil(student, teacher, pairs, example, seed=how.train.seed), soft_target_loss(teacher, how)
    seen, shown = watch(student, [own for own, _ in pairs]), watch(teacher, [other for _, other in pairs])

    def loss(logits: torch.Tensor, labels: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        total = answer(logits, labels, inputs)
        for projection, (own, other) in zip(module.projections, pairs, strict=True):
            wanted = shown[other].clone()  # out of inference mode, which nothing may go back through
            total = total + how.beta * distance(projection(seen[own]).float(), wanted.float())
        return total

    return module, loss


def trainee(first: Checkpoint, *, teacher: Checkpoint, seed: int, **asked: Any) -> tuple[nn.Module, Loss]:
    """What is trained and its loss, for a probe of memory; `asked` are fields of DistillSettings."""
    how = DistillSettings(TrainSettings(epochs=1, seed=seed), **{**asked, "features": tuple(asked["features"])})
    return taught(first.module(), teacher.module(), how, first.inputs[0].at_batch(2))


def _augmented(module: nn.Module, data: DataSet, how: DistillSettings) -> float:
    """Top-1 on validation pictures that are moved as those of the train split are."""
    moves = draw_moves(len(data.validation), how.train.shift, np.random.default_rng(how.train.seed))
    return score(module, data.validation, data.preprocess, moves=moves)


def _warn(augmented: Mapping[str, float], how: DistillSettings) -> str:
    """What to say of a teacher that is worse than the plain student on what the student sees; "" of another one."""
    if augmented["teacher"] >= augmented["plain"]:
        return ""
    where = f"pictures moved by up to {how.train.shift} pixels" if how.train.shift else "validation"
    shares = f"{100 * augmented['teacher']:.2f}% on {where}, the student without it {100 * augmented['plain']:.2f}%"
    return f"warning: the teacher is right for {shares}; train the teacher on with --shift {how.train.shift} first"


def soft_target_loss(teacher: nn.Module, how: DistillSettings) -> Loss:
    """The loss alpha T² KL(teacher at T || student at T) + (1 - alpha) cross entropy, where T is the temperature.

    Hinton, Vinyals, Dean 2015, https://arxiv.org/abs/1503.02531, section 2; T² keeps the share of both terms when T
    changes. The teacher answers to the very inputs the student sees, augmentation included (Beyer et al. 2021,
    https://arxiv.org/abs/2106.05237): answers kept from the plain pictures would be wrong for the moved ones.
    """
    import torch
    from torch.nn import functional

    def loss(logits: torch.Tensor, labels: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            answer = teacher.to(inputs.device)(inputs)
        target = functional.log_softmax(answer.float().clone() / how.temperature, dim=1)
        own = functional.log_softmax(logits / how.temperature, dim=1)
        soft = functional.kl_div(own, target, reduction="batchmean", log_target=True) * how.temperature**2
        return how.alpha * soft + (1 - how.alpha) * functional.cross_entropy(logits, labels)

    return loss
