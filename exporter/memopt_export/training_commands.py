"""What the commands that make checkpoints do: each reads its files, makes one call, writes one checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memopt.errors import UsageError
from memopt.files import refuse_to_overwrite

if TYPE_CHECKING:
    from memopt_models.checkpoint import Checkpoint
    from memopt_models.dataset import DataSet
    from memopt_models.distill import DistillSettings
    from memopt_models.layer_costs import Shrunk
    from memopt_models.prune import PruneSettings
    from memopt_models.qat import QatSettings
    from memopt_models.resume import Keep
    from memopt_models.sparsity import SparsitySettings
    from memopt_models.team import Team
    from memopt_models.train import OnStep, TrainSettings


@dataclass(frozen=True)
class Means:
    """How a command trains, beside what it trains: who watches, what is kept on the way, and who works with it."""

    on_step: OnStep
    keep: Keep
    team: Team


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint on disk."""

    path: str
    network: str
    parameters: int
    size_bytes: int
    sha256: str
    metrics: dict[str, float]
    pruned: Pruned | None = None  # where that is what was done
    warning: str | None = None  # what its maker has to say, such as that a teacher taught what is wrong
    fresh: tuple[str, ...] = ()  # weights that those it started from did not have, or had for other channels


@dataclass(frozen=True)
class Pruned:
    """What a pruning did."""

    note: dict[str, Any]  # the settings of its stage in the lineage
    parts: tuple[Shrunk, ...]


@dataclass(frozen=True)
class Origin:
    """What a training starts from, and what is expected of its data."""

    start: Path | None = None  # a checkpoint
    weights: str | None = None  # "imagenet", or a file
    classes: int | None = None
    in_channels: int | None = None

    def __post_init__(self) -> None:
        if self.start is not None and self.weights is not None:
            raise UsageError("--start brings weights of its own", hint="either --start or --weights")

    def expected(self, data: DataSet) -> dict[str, int]:
        """Settings of the network that were said; UsageError where the data has others."""
        shape = data.input_spec.at_batch(1)
        has = {"classes": len(data.classes), "in_channels": shape[1]}
        for name, what in (("classes", "classes"), ("in_channels", "channels")):
            said = getattr(self, name)
            if said not in (None, has[name]):
                option = f"--{name.replace('_', '-')} {has[name]}"
                raise UsageError(f"data {data.name!r} has {has[name]} {what}, not {said}", hint=option)
        return {name: has[name] for name in has if getattr(self, name) is not None}


def train(
    network: str, settings: Mapping[str, Any], data: str, how: TrainSettings, output: Path, *,
    origin: Origin, data_root: Path | None = None, force: bool = False, means: Means,
) -> SavedCheckpoint | None:  # fmt: skip
    """A trained checkpoint."""
    from memopt_models import train as training
    from memopt_models.checkpoint import load_checkpoint
    from memopt_models.weights import begin_with

    refuse_to_overwrite(output, force=force)
    begin = load_checkpoint(origin.start, network=network) if origin.start is not None else None
    opened = _open_data(data, data_root, means)
    settings = {**settings, **origin.expected(opened)}
    if origin.weights is not None:
        begin = begin_with(origin.weights, network, settings, opened, how)
    made = training.train(network, settings, opened, how, start=begin, **vars(means))
    return _save_checkpoint(made, output, force, means)


def prune(
    checkpoint: Path, data: str, how: PruneSettings | SparsitySettings, output: Path, *, network: str | None = None,
    data_root: Path | None = None, force: bool = False, means: Means,
) -> SavedCheckpoint | None:  # fmt: skip
    """A pruned and fine-tuned checkpoint, and what became of its layers."""
    from memopt_export.planned_memory import planner
    from memopt_models import prune as pruning
    from memopt_models import sparsity
    from memopt_models.checkpoint import load_checkpoint
    from memopt_models.layer_costs import compare_parts

    refuse_to_overwrite(output, force=force)
    begin, opened = load_checkpoint(checkpoint, network=network), _open_data(data, data_root, means)
    if isinstance(how, pruning.PruneSettings):
        made = pruning.prune(begin, opened, how, price=planner(), **vars(means))
    else:
        made = sparsity.sparsify(begin, opened, how, **vars(means))
    saved = _save_checkpoint(made, output, force, means)
    return saved and replace(saved, pruned=Pruned(made.lineage[-1].settings, compare_parts(begin, made)))


def pruning_settings(
    *, ratio: float | None, target_macs: float | None, target_params: float | None, target_memory: float | None,
    batch: int, sparsity: float | None, pattern: str | None, method: str, scope: str, steps: int, round_to: int,
    protect: Sequence[str], ways: Sequence[str], analysis_memory: int, analysis_seconds: float, **training: Any,
) -> PruneSettings | SparsitySettings:  # fmt: skip
    """What the options of `prune` ask for.

    Raises:
        UsageError: two of them contradict each other.
    """
    from memopt_models.prune import PruneSettings
    from memopt_models.prune_apart import Limits
    from memopt_models.sparsity import Magnitude, SparsitySettings, parse_pattern
    from memopt_models.targets import Target
    from memopt_models.train import TrainSettings

    targets = {"macs": target_macs, "params": target_params, "memory": target_memory}
    asked = {"ratio": ratio, "sparsity": sparsity, "pattern": pattern}
    asked |= {f"target-{name}": amount for name, amount in targets.items()}
    given = [f"--{name}" for name, value in asked.items() if value is not None]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} say how much goes, one of them is enough")
    finetune = TrainSettings(**training) if training["epochs"] else None
    if sparsity is not None or pattern is not None:
        kind = Magnitude(sparsity, scope) if sparsity is not None else parse_pattern(pattern or "")
        return SparsitySettings(kind, tuple(protect), finetune)
    target = next((Target(name, amount, batch) for name, amount in targets.items() if amount is not None), None)
    settings = PruneSettings(
        target=target, method=method, scope=scope, round_to=round_to, protect=tuple(protect), steps=steps,
        limits=Limits(analysis_memory, analysis_seconds), finetune=finetune,
    )  # fmt: skip
    settings = replace(settings, ratio=ratio) if ratio is not None else settings
    return replace(settings, ways=tuple(ways)) if ways else settings


def distill(
    teacher: Path, student: str, settings: Mapping[str, Any], data: str, how: DistillSettings, output: Path, *,
    network: str | None = None, data_root: Path | None = None, force: bool = False, means: Means,
) -> SavedCheckpoint | None:  # fmt: skip
    """A distilled checkpoint. The student is a network's name, or a checkpoint to go on from.

    `network` allows a teacher or student whose network is the user's own code.
    """
    from memopt_models import distill as distilling
    from memopt_models.checkpoint import load_checkpoint

    refuse_to_overwrite(output, force=force)
    start = load_checkpoint(Path(student), network=network) if student.endswith(".safetensors") else None
    name = start.network if start is not None else student
    opened, teaching = _open_data(data, data_root, means), load_checkpoint(teacher, network=network)
    made = distilling.distill(teaching, name, settings, opened, how, start=start, **vars(means))
    return _save_checkpoint(made, output, force, means)


def qat(
    checkpoint: Path, data: str, how: QatSettings, output: Path, *, network: str | None = None,
    data_root: Path | None = None, force: bool = False, means: Means,
) -> SavedCheckpoint | None:  # fmt: skip
    """A checkpoint whose weights are trained to be rounded."""
    from memopt_models import qat as rounding
    from memopt_models.checkpoint import load_checkpoint

    refuse_to_overwrite(output, force=force)
    begin = load_checkpoint(checkpoint, network=network)
    made = rounding.train_rounded(begin, _open_data(data, data_root, means), how, **vars(means))
    return _save_checkpoint(made, output, force, means)


def _open_data(spec: str, root: Path | None, means: Means) -> DataSet:
    """The data; what has to be downloaded or prepared, one process of the team does for all."""
    from memopt_models.data import open_data

    with means.team.first():
        return open_data(spec, root=root)


def _save_checkpoint(checkpoint: Checkpoint, output: Path, force: bool, means: Means) -> SavedCheckpoint | None:
    """What was written; None where another process of the team has done that."""
    from memopt_models.checkpoint import save_checkpoint
    from memopt_models.weights import fresh_weights

    if not means.team.is_first:
        return None
    save_checkpoint(checkpoint, output, force=force)
    means.keep.forget()
    return SavedCheckpoint(
        str(output), checkpoint.network, checkpoint.parameters, output.stat().st_size, checkpoint.sha256,
        checkpoint.metrics, fresh=fresh_weights(checkpoint), warning=checkpoint.lineage[-1].settings.get("warning"),
    )  # fmt: skip
