"""Structured pruning: whole channels leave the tensors, then the rest is trained to do their work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from memopt.errors import AnswerIsNo, UsageError
from memopt_models.checkpoint import Checkpoint, snapshot
from memopt_models.dataset import DataSet
from memopt_models.evaluate import measure
from memopt_models.feed import Feeder
from memopt_models.hidden import cut_hidden
from memopt_models.layer_costs import count_macs
from memopt_models.prune_apart import Cutter, Limits, cutter_apart
from memopt_models.ranking import Cut, NotThisWay
from memopt_models.resume import Keep
from memopt_models.targets import Price, Target, Trial, measure_cost, search
from memopt_models.team import ALONE, Team
from memopt_models.train import OnStep, TrainSettings, cross_entropy, data_for, describe, fit_module, identify
from memopt_models.training_memory import Ledger, settle
from memopt_models.training_probe import Subject

if TYPE_CHECKING:
    import torch

_GRADIENT_SAMPLES, _GRADIENT_BATCH = 512, 64  # of the train split, for the method "taylor"


@dataclass(frozen=True)
class PruneSettings:
    """What to take away, and how to train afterwards."""

    ratio: float = 0.5  # share of the channels that goes, unless there is a target
    target: Target | None = None
    method: str = "l2"  # see ranking.METHODS
    scope: str = "layer"  # see ranking.SCOPES
    round_to: int = 1  # channel numbers are rounded down to multiples of this
    protect: tuple[str, ...] = ()  # patterns of names of layers that stay as they are
    steps: int = 1  # the same amount goes in each, and each is followed by its part of the fine-tuning
    ways: tuple[str, ...] = ("channels", "hidden")  # see WAYS; the next one where one does not work
    limits: Limits = field(default_factory=Limits)  # of the child that follows the dependency graph
    finetune: TrainSettings | None = None  # None: not at all

    def __post_init__(self) -> None:
        self.cut(self.ratio)
        if self.steps < 1:
            raise UsageError(f"steps is {self.steps}, at least 1 is needed", hint="--steps 3")
        if self.finetune is not None and self.finetune.epochs < self.steps:
            problem = f"{self.finetune.epochs} epochs of fine-tuning cannot be divided between {self.steps} steps"
            raise UsageError(problem, hint=f"--epochs {self.steps}")
        unknown = [way for way in self.ways if way not in WAYS]
        if unknown or not self.ways:
            raise UsageError(f"ways of pruning are {list(self.ways)}", hint=", ".join(WAYS))

    @property
    def seed(self) -> int:
        """Of pictures drawn for gradients, and of channels drawn at random: that of the fine-tuning, or 0."""
        return self.finetune.seed if self.finetune is not None else 0

    def cut(self, ratio: float) -> Cut:
        """What a cutter is asked for, at this ratio."""
        return Cut(ratio, self.method, self.scope, self.round_to, self.protect, self.seed)


def prune(
    checkpoint: Checkpoint,
    data: DataSet,
    how: PruneSettings,
    *,
    price: Price | None = None,
    on_step: OnStep | None = None,
    keep: Keep | None = None,
    team: Team = ALONE,
) -> Checkpoint:
    """The checkpoint with fewer channels in every layer but the classifier, fine-tuned; its tensors are smaller.

    The last stage of its lineage says "way", which of WAYS was gone; "instead", why others were not; "ratios", the
    share of channels that went in each step; and with a target "before", "limit" and "after".

    Args:
        checkpoint: what to prune; stays as it is.
        data: to fine-tune and to measure on; its train split gives the gradients for the method "taylor".
        how: ratio or target, method, fine-tuning.
        price: plans the memory of a checkpoint at a batch, for a target of memory.
        on_step: called after every step of the fine-tuning.
        keep: of the fine-tuning, see `train`.
        team: of the fine-tuning, see `train`.

    Raises:
        InputRefused: the data does not fit the checkpoint.
        UsageError: a pattern of protected layers matches nothing, or a target of memory has no price.
        AnswerIsNo: the network cannot be pruned, nothing is left to take away, or the target cannot be reached.
        OutOfResource: the fine-tuning does not fit into its limits.
    """
    data, ledger = data_for(checkpoint, data), Ledger(on_step)
    instead: dict[str, str] = {}
    for way in how.ways:
        try:
            with WAYS[way](how.limits) as cutter:
                pruned, note = _Pruning(data, how, cutter, price, ledger, keep, team).run(checkpoint)
            break
        except NotThisWay as error:
            instead[way] = error.problem
    else:
        raise AnswerIsNo("the network cannot be pruned: " + "; ".join(f"{way}: {why}" for way, why in instead.items()))
    used = {**asdict(how), **describe(data), **note, "way": way, "instead": instead, "memory": ledger.memory}
    module = pruned.module()
    metrics = measure(module, data) if team.is_first else {}
    metrics["macs"] = float(count_macs(pruned.module(), checkpoint.inputs[0].at_batch(1)))
    return checkpoint.advance("prune", module, settings=used, metrics=metrics, parents=(checkpoint.sha256,))


@contextmanager
def _channels_here(limits: Limits) -> Iterator[Cutter]:
    from memopt_models.channels import cut_channels

    yield cut_channels


def _hidden(limits: Limits) -> AbstractContextManager[Cutter]:
    return nullcontext(cut_hidden)


# How channels are found: those that depend on each other, by the dependency graph of the whole network, in a child
# process with limits or in this one without; or those hidden between two layers.
WAYS: dict[str, Callable[[Limits], AbstractContextManager[Cutter]]] = {
    "channels": cutter_apart,
    "channels-here": _channels_here,
    "hidden": _hidden,
}


@dataclass(frozen=True, eq=False)
class _Pruning:
    """One way through all steps."""

    data: DataSet
    how: PruneSettings
    cutter: Cutter
    price: Price | None
    ledger: Ledger
    keep: Keep | None
    team: Team

    def run(self, checkpoint: Checkpoint) -> tuple[Checkpoint, dict[str, Any]]:
        """The pruned and fine-tuned network, and what the lineage has to say of it."""
        how, target = self.how, self.how.target
        before = measure_cost(target, checkpoint, self.price) if target is not None else 0
        limit = target.limit(before) if target is not None else 0
        if target is not None and before <= limit:
            raise AnswerIsNo(f"nothing has to go: it is {target.show(before)}, {target.show(limit)} are allowed")
        current, ratios, epochs = checkpoint, [], _divide(how)
        for step in range(1, how.steps + 1):
            gone, wanted = (how.ratio * each / how.steps for each in (step - 1, step))
            if target is None:
                trial = self._attempt(current, (1 - wanted) / (1 - gone), self._gradients(current))
            else:
                trial = self._reach(current, target, limit=before - (before - limit) * step // how.steps)
            ratios.append(round(1 - trial.kept, 6))
            current = self._finetune(trial.checkpoint, epochs[step - 1], "prune" if how.steps == 1 else f"prune {step}")
        _refuse_unchanged(checkpoint, current, how)
        note: dict[str, Any] = {"ratios": ratios}
        if target is not None:
            note |= {"before": before, "limit": limit, "after": trial.cost}
        return current, note

    def _reach(self, checkpoint: Checkpoint, target: Target, *, limit: int) -> Trial:
        cost = measure_cost(target, checkpoint, self.price)
        if cost <= limit:
            return Trial(1.0, cost, checkpoint)
        gradients = self._gradients(checkpoint)  # once: every trial starts from the same weights

        def attempt(kept: float) -> Trial:
            return self._attempt(checkpoint, kept, gradients, target)

        return search(attempt, before=cost, limit=limit, target=target)

    def _gradients(self, checkpoint: Checkpoint) -> dict[str, torch.Tensor] | None:
        """What the method needs of them."""
        return _gradients(checkpoint, self.data, self.how.seed) if self.how.method == "taylor" else None

    def _attempt(
        self, checkpoint: Checkpoint, kept: float, gradients: dict[str, torch.Tensor] | None,
        target: Target | None = None,
    ) -> Trial:  # fmt: skip
        pruned = replace(checkpoint, state=self.cutter(checkpoint, self.how.cut(1 - kept), gradients))
        return Trial(kept, measure_cost(target, pruned, self.price) if target is not None else 0, pruned)

    def _finetune(self, checkpoint: Checkpoint, epochs: int, stage: str) -> Checkpoint:
        if self.how.finetune is None:
            return checkpoint
        settings = replace(self.how.finetune, epochs=epochs)
        settings = settle(
            Subject(checkpoint), self.data, settings, self.ledger, stage=stage, keep=self.keep, team=self.team
        )
        module = checkpoint.module()
        fit_module(
            module, self.data, settings, cross_entropy, self.ledger,
            stage=stage, keep=self.keep, made_from=identify(checkpoint), team=self.team,
        )  # fmt: skip
        return replace(checkpoint, state=snapshot(module))


def _divide(how: PruneSettings) -> list[int]:
    """The epochs after each step; the last one gets what is left over."""
    epochs = how.finetune.epochs if how.finetune is not None else 0
    each = epochs // how.steps
    return [each] * (how.steps - 1) + [epochs - each * (how.steps - 1)]


def _gradients(checkpoint: Checkpoint, data: DataSet, seed: int) -> dict[str, torch.Tensor]:
    """The gradient of the loss by each weight, summed over batches of the train split drawn with the seed."""
    import torch

    module = checkpoint.module()
    drawn = np.random.default_rng(seed).permutation(len(data.train))[:_GRADIENT_SAMPLES]
    feeder = Feeder(data.train, data.preprocess, batch_size=_GRADIENT_BATCH)
    for start in range(0, len(drawn), _GRADIENT_BATCH):
        inputs, labels = feeder.batch(np.sort(drawn[start : start + _GRADIENT_BATCH]))
        cross_entropy(module(inputs), labels, inputs).backward()  # type: ignore[no-untyped-call]
    return {
        name: torch.zeros_like(weight) if weight.grad is None else weight.grad
        for name, weight in module.named_parameters()
    }


def _refuse_unchanged(before: Checkpoint, after: Checkpoint, how: PruneSettings) -> None:
    if before.parameters == after.parameters:
        problem = f"no channel could be removed at ratio {how.ratio} by {how.method}, rounded to {how.round_to}"
        raise AnswerIsNo(problem, hint="a larger --ratio, a smaller --round-to, or --method l2")
