"""A training that is cut off goes on to the same bits. `cut_off` ends it as a kill does: in the middle of an epoch."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from memopt.errors import OutOfResource, UsageError
from memopt_models.checkpoint import Checkpoint
from memopt_models.data import DataSet
from memopt_models.distill import DistillSettings, distill
from memopt_models.prune import PruneSettings, prune
from memopt_models.qat import QatSettings, train_rounded
from memopt_models.resume import Keep
from memopt_models.train import Progress, TrainSettings, train
from memopt_models.training_memory import Ledger, settle
from memopt_models.training_probe import Subject

TINY = {"channels": (2, 4), "hidden": 8}
LONG = TrainSettings(epochs=4, learning_rate=1e-2, threads=1)


class KilledError(Exception):
    """The training is over in the middle of an epoch."""


def cut_off(stage: str, epoch: int, *, step: int = 2) -> Callable[[Progress], None]:
    """Ends the training after this step."""

    def on_step(progress: Progress) -> None:
        if (progress.stage, progress.epoch, progress.step) == (stage, epoch, step):
            raise KilledError

    return on_step


def dropping(classes: int = 10, **shapes: object) -> nn.Module:
    """A network that draws random numbers while it is trained."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 16), nn.ReLU(), nn.Dropout(0.4), nn.Linear(16, classes))


def facts(checkpoint: Checkpoint) -> tuple[object, ...]:
    """All that a checkpoint holds, but for the memory that was measured."""
    lineage = [
        (stage.stage, stage.output_sha256, stage.parents, {**stage.settings, "memory": None})
        for stage in checkpoint.lineage
    ]
    return checkpoint.sha256, checkpoint.metrics, lineage, checkpoint.settings, checkpoint.preprocess


@pytest.fixture
def keep(tmp_path: Path) -> Keep:
    return Keep(tmp_path / "out.safetensors")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "out.safetensors.train.resume"


@pytest.mark.parametrize("network", ["simple_cnn", "ds_cnn", "test_resume:dropping"])
@pytest.mark.parametrize(
    "how",
    [
        LONG,
        replace(LONG, optimizer="sgd", schedule="onecycle", shift=1, precision="bf16"),
        replace(LONG, optimizer="adamw", schedule="onecycle", accumulate=3, precision="fp16", batch_size=200),
    ],
    ids=["adam", "sgd-bf16", "adamw-fp16"],
)
def test_training_that_was_cut_off_twice_ends_in_the_same_bits(
    network: str, how: TrainSettings, few: DataSet, keep: Keep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    settings = {"simple_cnn": TINY, "ds_cnn": {"width": 2, "depth": 1}}.get(network, {})
    expected = train(network, settings, few, how)
    for epoch in (2, 4):
        with pytest.raises(KilledError):
            train(network, settings, few, how, keep=keep, on_step=cut_off("train", epoch))
    seen: list[Progress] = []
    assert facts(train(network, settings, few, how, keep=keep, on_step=seen.append)) == facts(expected)
    assert [progress.step for progress in seen if progress.epoch < 4 and not progress.note] == [seen[1].steps] * 3
    assert len(expected.lineage[0].settings["memory"]["peak_bytes"]["train"]) == 4


def test_best_epoch_may_lie_before_the_cut(few: DataSet, keep: Keep) -> None:
    how = replace(LONG, epochs=8, learning_rate=0.2)  # so fast that it is soon at its best
    seen: list[float] = []

    def note(progress: Progress) -> None:
        if progress.validation_top1 is not None:
            seen.append(progress.validation_top1)

    expected = train("simple_cnn", TINY, few, how, on_step=note)
    best = max(epoch for epoch, top1 in enumerate(seen, start=1) if top1 == max(seen))
    assert best < 7
    with pytest.raises(KilledError):
        train("simple_cnn", TINY, few, how, keep=keep, on_step=cut_off("train", best + 2))
    assert facts(train("simple_cnn", TINY, few, how, keep=keep)) == facts(expected)


def test_what_goes_on_says_so_and_shows_the_epochs_before(few: DataSet, keep: Keep, file: Path) -> None:
    first: list[Progress] = []

    def on_step(progress: Progress) -> None:
        first.append(progress)
        cut_off("train", 3)(progress)

    with pytest.raises(KilledError):
        train("simple_cnn", TINY, few, LONG, keep=keep, on_step=on_step)
    again: list[Progress] = []
    train("simple_cnn", TINY, few, LONG, keep=keep, on_step=again.append)
    assert again[0].note == f"goes on after epoch 2, kept in {file}"
    assert again[1:3] == [progress for progress in first if progress.validation_top1 is not None]
    assert again[3].epoch == 3


def test_finished_training_is_not_done_again(few: DataSet, keep: Keep, file: Path) -> None:
    expected = train("simple_cnn", TINY, few, LONG, keep=keep)
    before = file.read_bytes()
    assert facts(train("simple_cnn", TINY, few, LONG, keep=keep, on_step=cut_off("train", 4, step=1))) == facts(
        expected
    )
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"how": replace(LONG, learning_rate=0.5)}, "how.learning_rate was 0.01, is 0.5"),
        ({"how": replace(LONG, seed=1)}, "how.seed was 0, is 1"),
        ({"settings": {**TINY, "hidden": 4}}, "settings.hidden was 8, is 4"),
        ({"network": "ds_cnn", "settings": {}}, "network was simple_cnn, is ds_cnn"),
    ],
)
def test_what_another_training_has_kept_is_left_alone(
    change: dict[str, object], difference: str, few: DataSet, keep: Keep, file: Path
) -> None:
    asked = {"network": "simple_cnn", "settings": TINY, "how": LONG}

    def run(*, network: str, settings: dict[str, object], how: TrainSettings, epoch: int) -> None:
        with pytest.raises(KilledError):
            train(network, settings, few, how, keep=keep, on_step=cut_off("train", epoch))

    run(**asked, epoch=2)
    before = file.read_bytes()
    with pytest.raises(UsageError) as raised:
        run(**{**asked, **change}, epoch=1)
    assert str(raised.value) == f"{file} keeps epoch 1 of another training: {difference}; hint: --restart drops it"
    assert file.read_bytes() == before
    keep.forget()
    run(**{**asked, **change}, epoch=1)


def test_other_data_is_another_training(few: DataSet, keep: Keep) -> None:
    train("simple_cnn", TINY, few, replace(LONG, epochs=1), keep=keep)
    other = replace(few, train=few.train.pick(slice(0, 200)))
    with pytest.raises(UsageError, match="of another training: data_fingerprint was "):
        train("simple_cnn", TINY, other, replace(LONG, epochs=1), keep=keep)


def test_other_versions_are_another_training(few: DataSet, keep: Keep, monkeypatch: pytest.MonkeyPatch) -> None:
    train("simple_cnn", TINY, few, replace(LONG, epochs=1), keep=keep)
    monkeypatch.setattr("memopt_models.resume.metadata.version", lambda name: "9.9")
    with pytest.raises(UsageError, match=r"tools.memopt was .*, is 9\.9"):
        train("simple_cnn", TINY, few, replace(LONG, epochs=1), keep=keep)


def test_damaged_file_is_told_and_training_starts_anew(few: DataSet, keep: Keep, file: Path) -> None:
    how = replace(LONG, epochs=2)
    expected = train("simple_cnn", TINY, few, how, keep=keep)
    whole = file.read_bytes()
    rng = np.random.default_rng(0)
    header = int.from_bytes(whole[:8], "little")
    places = [*rng.integers(0, 8 + header, 3), *rng.integers(8 + header, len(whole), 3)]
    flipped = [whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :] for at in places]
    for damaged in (b"", whole[: len(whole) // 2], whole + b"x", *flipped):
        file.write_bytes(damaged)
        seen: list[Progress] = []
        assert facts(train("simple_cnn", TINY, few, how, keep=keep, on_step=seen.append)) == facts(expected)
        assert seen[0].note.startswith(f"starts anew: {file} is damaged (")


def test_full_disk_loses_nothing(few: DataSet, keep: Keep, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, sync = train("simple_cnn", TINY, few, LONG), os.fsync

    def full(handle: int) -> None:
        if file.exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OutOfResource, match=r"no space left to write .*\.train\.resume"):
            train("simple_cnn", TINY, few, LONG, keep=keep)
    seen: list[Progress] = []
    assert facts(train("simple_cnn", TINY, few, LONG, keep=keep, on_step=seen.append)) == facts(expected)
    assert "goes on after epoch 1" in seen[0].note
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_both_trainings_of_a_distillation_go_on(dense: Checkpoint, few: DataSet, keep: Keep, tmp_path: Path) -> None:
    how, student = DistillSettings(replace(LONG, epochs=3)), ("ds_cnn", {"width": 2, "depth": 1})
    expected = distill(dense, *student, few, how)
    for stage in ("plain", "distilled"):
        with pytest.raises(KilledError):
            distill(dense, *student, few, how, keep=keep, on_step=cut_off(stage, 2))
    steps: list[Progress] = []
    made = distill(dense, *student, few, how, keep=keep, on_step=steps.append)
    assert facts(made) == facts(expected)
    assert {progress.step for progress in steps if progress.stage == "plain" and not progress.note} == {4}
    assert len(list(tmp_path.glob("out.safetensors.*.resume"))) == 2
    with pytest.raises(UsageError, match=r"another training: temperature was 4\.0, is 2\.0"):
        distill(dense, *student, few, replace(how, temperature=2.0), keep=keep)


def test_fine_tuning_of_a_pruned_network_goes_on(dense: Checkpoint, few: DataSet, keep: Keep) -> None:
    how = PruneSettings(finetune=replace(LONG, epochs=2))
    expected = prune(dense, few, how)
    with pytest.raises(KilledError):
        prune(dense, few, how, keep=keep, on_step=cut_off("prune", 2))
    assert facts(prune(dense, few, how, keep=keep)) == facts(expected)


def test_parts_that_were_chosen_stay_whatever_the_limit_is_now(few: DataSet, keep: Keep) -> None:
    how = replace(LONG, accumulate=4)
    with pytest.raises(KilledError):
        train("simple_cnn", TINY, few, how, keep=keep, on_step=cut_off("train", 2))
    again = replace(how, accumulate=0, max_memory_bytes=2**40)
    first = train("simple_cnn", TINY, few, replace(LONG, epochs=1))
    assert settle(Subject(first), few, again, Ledger(), stage="train", keep=keep).accumulate == 4
    assert train("simple_cnn", TINY, few, again, keep=keep).sha256 == train("simple_cnn", TINY, few, how).sha256


def test_forgetting_leaves_files_of_others(keep: Keep, tmp_path: Path) -> None:
    for name in ("out.safetensors", "other.safetensors.train.resume", "out.safetensors.train.resume", "out.resume"):
        (tmp_path / name).write_bytes(b"")
    keep.forget()
    keep.forget()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "other.safetensors.train.resume", "out.resume", "out.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize("precision", ["int8", "int4-weights"])
def test_training_to_be_rounded_goes_on(precision: str, dense: Checkpoint, few: DataSet, keep: Keep) -> None:
    how = QatSettings(replace(LONG, epochs=3, learning_rate=1e-3), precision=precision)
    expected = train_rounded(dense, few, how)
    with pytest.raises(KilledError):
        train_rounded(dense, few, how, keep=keep, on_step=cut_off("qat", 3))
    seen: list[Progress] = []
    made = train_rounded(dense, few, how, keep=keep, on_step=seen.append)
    assert "goes on after epoch 2" in seen[0].note
    assert facts(made) == facts(expected)
    assert made.quantization == expected.quantization


def test_pruning_in_steps_goes_on(dense: Checkpoint, few: DataSet, keep: Keep) -> None:
    how = PruneSettings(steps=2, finetune=replace(LONG, epochs=4))
    stages: list[Progress] = []
    expected = prune(dense, few, how, on_step=stages.append)
    last = stages[-1].stage
    assert last != stages[0].stage
    with pytest.raises(KilledError):
        prune(dense, few, how, keep=keep, on_step=cut_off(last, 2))
    assert facts(prune(dense, few, how, keep=keep)) == facts(expected)
