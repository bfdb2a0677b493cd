"""What the commands that make checkpoints do: each reads its files, makes one call, writes one checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memopt.files import refuse_to_overwrite

if TYPE_CHECKING:
    from memopt_models.checkpoint import Checkpoint
    from memopt_models.dataset import DataSet
    from memopt_models.distill import DistillSettings
    from memopt_models.prune import PruneSettings
    from memopt_models.resume import Keep
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


def train(
    network: str, settings: Mapping[str, Any], data: str, how: TrainSettings, output: Path, *,
    start: Path | None = None, data_root: Path | None = None, force: bool = False, means: Means,
) -> SavedCheckpoint | None:  # fmt: skip
    """A trained checkpoint."""
    from memopt_models import train as training
    from memopt_models.checkpoint import load_checkpoint

    refuse_to_overwrite(output, force=force)
    begin = load_checkpoint(start, network=network) if start is not None else None
    made = training.train(network, settings, _open_data(data, data_root, means), how, start=begin, **vars(means))
    return _save_checkpoint(made, output, force, means)


def prune(
    checkpoint: Path, data: str, how: PruneSettings, output: Path, *, network: str | None = None,
    data_root: Path | None = None, force: bool = False, means: Means,
) -> SavedCheckpoint | None:  # fmt: skip
    """A pruned and fine-tuned checkpoint."""
    from memopt_models import prune as pruning
    from memopt_models.checkpoint import load_checkpoint

    refuse_to_overwrite(output, force=force)
    begin = load_checkpoint(checkpoint, network=network)
    made = pruning.prune(begin, _open_data(data, data_root, means), how, **vars(means))
    return _save_checkpoint(made, output, force, means)


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


def _open_data(spec: str, root: Path | None, means: Means) -> DataSet:
    """The data; what has to be downloaded or prepared, one process of the team does for all."""
    from memopt_models.data import open_data

    with means.team.first():
        return open_data(spec, root=root)


def _save_checkpoint(checkpoint: Checkpoint, output: Path, force: bool, means: Means) -> SavedCheckpoint | None:
    """What was written; None where another process of the team has done that."""
    from memopt_models.checkpoint import save_checkpoint

    if not means.team.is_first:
        return None
    save_checkpoint(checkpoint, output, force=force)
    means.keep.forget()
    return SavedCheckpoint(
        str(output), checkpoint.network, checkpoint.parameters, output.stat().st_size, checkpoint.sha256,
        checkpoint.metrics,
    )  # fmt: skip
