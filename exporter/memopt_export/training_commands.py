"""What the commands that make checkpoints do: each reads its files, makes one call, writes one checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memopt.files import refuse_to_overwrite

if TYPE_CHECKING:
    from memopt_models.checkpoint import Checkpoint
    from memopt_models.distill import DistillSettings
    from memopt_models.prune import PruneSettings
    from memopt_models.qat import QatSettings
    from memopt_models.train import OnStep, TrainSettings


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
    start: Path | None = None, data_root: Path | None = None, force: bool = False, on_step: OnStep | None = None,
) -> SavedCheckpoint:  # fmt: skip
    """A trained checkpoint."""
    from memopt_models import train as training
    from memopt_models.checkpoint import load_checkpoint
    from memopt_models.data import open_data

    refuse_to_overwrite(output, force=force)
    begin = load_checkpoint(start, network=network) if start is not None else None
    made = training.train(network, settings, open_data(data, root=data_root), how, start=begin, on_step=on_step)
    return _save_checkpoint(made, output, force)


def prune(
    checkpoint: Path, data: str, how: PruneSettings, output: Path, *, network: str | None = None,
    data_root: Path | None = None, force: bool = False, on_step: OnStep | None = None,
) -> SavedCheckpoint:  # fmt: skip
    """A pruned and fine-tuned checkpoint."""
    from memopt_models import prune as pruning
    from memopt_models.checkpoint import load_checkpoint
    from memopt_models.data import open_data

    refuse_to_overwrite(output, force=force)
    begin = load_checkpoint(checkpoint, network=network)
    made = pruning.prune(begin, open_data(data, root=data_root), how, on_step=on_step)
    return _save_checkpoint(made, output, force)


def distill(
    teacher: Path, student: str, settings: Mapping[str, Any], data: str, how: DistillSettings, output: Path, *,
    network: str | None = None, data_root: Path | None = None, force: bool = False, on_step: OnStep | None = None,
) -> SavedCheckpoint:  # fmt: skip
    """A distilled checkpoint. The student is a network's name, or a checkpoint to go on from.

    `network` allows a teacher or student whose network is the user's own code.
    """
    from memopt_models import distill as distilling
    from memopt_models.checkpoint import load_checkpoint
    from memopt_models.data import open_data

    refuse_to_overwrite(output, force=force)
    start = load_checkpoint(Path(student), network=network) if student.endswith(".safetensors") else None
    name = start.network if start is not None else student
    opened, teaching = open_data(data, root=data_root), load_checkpoint(teacher, network=network)
    made = distilling.distill(teaching, name, settings, opened, how, start=start, on_step=on_step)
    return _save_checkpoint(made, output, force)


def qat(
    checkpoint: Path, data: str, how: QatSettings, output: Path, *, network: str | None = None,
    data_root: Path | None = None, force: bool = False, on_step: OnStep | None = None,
) -> SavedCheckpoint:  # fmt: skip
    """A checkpoint whose weights are trained to be rounded."""
    from memopt_models import qat as rounding
    from memopt_models.checkpoint import load_checkpoint
    from memopt_models.data import open_data

    refuse_to_overwrite(output, force=force)
    begin = load_checkpoint(checkpoint, network=network)
    made = rounding.train_rounded(begin, open_data(data, root=data_root), how, on_step=on_step)
    return _save_checkpoint(made, output, force)


def _save_checkpoint(checkpoint: Checkpoint, output: Path, force: bool) -> SavedCheckpoint:
    from memopt_models.checkpoint import save_checkpoint

    save_checkpoint(checkpoint, output, force=force)
    return SavedCheckpoint(
        str(output), checkpoint.network, checkpoint.parameters, output.stat().st_size, checkpoint.sha256,
        checkpoint.metrics,
    )  # fmt: skip
