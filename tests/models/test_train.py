from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from memopt.errors import AnswerIsNo, InputRefused, UsageError
from memopt_models.checkpoint import Checkpoint
from memopt_models.data import DataSet, Split
from memopt_models.train import Progress, TrainSettings, cross_entropy, fit_module, train

ONE = TrainSettings(epochs=1)
SMALL = {"channels": (2, 4), "hidden": 8}


def test_simple_cnn_learns_digits(digits: DataSet) -> None:
    how = TrainSettings(epochs=10, learning_rate=2e-3, schedule="onecycle", shift=1)
    assert train("simple_cnn", {}, digits, how).metrics["test_top1"] >= 0.97


def test_same_seed_gives_the_same_weights_and_another_gives_others(few: DataSet) -> None:
    how = replace(ONE, shift=1)
    one, same, other = (train("simple_cnn", SMALL, few, replace(how, seed=seed)).sha256 for seed in (0, 0, 1))
    assert one == same
    assert one != other


def test_weights_depend_on_the_threads_asked_for_and_not_on_those_there_were(few: DataSet) -> None:
    before = torch.get_num_threads()
    how = replace(ONE, threads=1)
    expected = train("simple_cnn", SMALL, few, how).sha256
    try:
        torch.set_num_threads(2)
        assert train("simple_cnn", SMALL, few, how).sha256 == expected
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_training_leaves_the_global_generators_alone(few: DataSet) -> None:
    torch.manual_seed(1)
    np.random.seed(1)  # the legacy generator is what must not be touched
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(1)
    np.random.seed(1)
    train("ds_cnn", {"width": 2, "depth": 1}, few, ONE)
    assert (torch.rand(1), np.random.rand()) == expected


def test_checkpoint_tells_where_it_comes_from(dense: Checkpoint, few: DataSet) -> None:
    (stage,) = dense.lineage
    assert (stage.stage, stage.output_sha256, stage.parents) == ("train", dense.sha256, ())
    assert stage.settings["network"] == dense.network == "simple_cnn"
    assert stage.settings["data_fingerprint"] == few.fingerprint
    assert stage.settings["spec"] == "digits"
    assert stage.settings["epochs"] == 4
    assert dense.settings == {"classes": 10, "in_channels": 1, "size": [28, 28], "hidden": 32}
    assert dense.inputs == (few.input_spec,)
    assert dense.labels == few.classes
    assert dense.preprocess == few.preprocess
    assert dense.metrics["parameters"] == dense.parameters == 16 * 9 + 16 + 32 * 144 + 32 + 1568 * 32 + 32 + 330


def test_best_epoch_on_validation_is_kept(few: DataSet) -> None:
    seen: list[Progress] = []
    how = TrainSettings(epochs=4, learning_rate=0.02)  # fast enough to go up and down
    done = train("simple_cnn", SMALL, few, how, on_step=seen.append)
    epochs = [progress.validation_top1 for progress in seen if progress.validation_top1 is not None]
    assert len(epochs) == 4
    assert done.metrics["validation_top1"] == max(epochs)


def test_progress_is_told_after_every_step(few: DataSet) -> None:
    seen: list[Progress] = []
    train("simple_cnn", SMALL, few, TrainSettings(epochs=2, batch_size=100), on_step=seen.append)
    assert [(p.stage, p.epoch, p.epochs, p.step, p.steps) for p in seen] == [
        ("train", epoch, 2, step, 3) for epoch in (1, 2) for step in (1, 2, 3)
    ]
    assert [p.validation_top1 is not None for p in seen] == [False, False, True] * 2
    assert all(p.loss > 0 for p in seen)
    assert all((p.peak_bytes or 0) > 2**20 for p in seen if p.validation_top1 is not None)


def test_training_goes_on_from_a_checkpoint(dense: Checkpoint, few: DataSet) -> None:
    longer = train("simple_cnn", {"hidden": 32}, few, replace(ONE, learning_rate=1e-5), start=dense)
    assert [stage.stage for stage in longer.lineage] == ["train", "train"]
    assert longer.lineage[-1].parents == (dense.sha256,)
    assert longer.metrics["validation_top1"] == pytest.approx(dense.metrics["validation_top1"], abs=0.1)


def test_pruned_checkpoint_is_trained_in_its_own_shape(pruned: Checkpoint, few: DataSet) -> None:
    assert train("simple_cnn", {}, few, ONE, start=pruned).parameters == pruned.parameters


def test_start_keeps_its_preprocessing(dense: Checkpoint, few: DataSet) -> None:
    other = replace(few, preprocess=(*few.preprocess[:2], {"op": "scale", "factor": 1.0}, few.preprocess[4]))
    assert train("simple_cnn", {}, other, ONE, start=dense).preprocess == dense.preprocess


def test_start_that_does_not_fit_is_refused(dense: Checkpoint, few: DataSet) -> None:
    with pytest.raises(UsageError, match="the start is a simple_cnn, not a ds_cnn; hint: --network simple_cnn"):
        train("ds_cnn", {}, few, ONE, start=dense)
    with pytest.raises(UsageError, match="the start has hidden 32, not 64"):
        train("simple_cnn", {"hidden": 64}, few, ONE, start=dense)
    with pytest.raises(InputRefused, match=r"the checkpoint knows the classes 0, 1, .*, 9; data 'digits' has a, b, "):
        train("simple_cnn", {}, replace(few, classes=tuple("abcdefghij")), ONE, start=dense)
    halves = {name: Split(split.images[:, ::2, ::2], split.labels) for name, split in few.splits.items()}
    with pytest.raises(InputRefused) as raised:
        train("simple_cnn", {}, replace(few, **halves), ONE, start=dense)
    assert str(raised.value) == ("the checkpoint takes (batch, 1, 28, 28), data 'digits' gives (batch, 1, 14, 14)")


def test_training_that_diverges_says_so(few: DataSet) -> None:
    with pytest.raises(AnswerIsNo) as raised:
        train("simple_cnn", SMALL, few, TrainSettings(epochs=3, learning_rate=1e18))
    assert "train diverged: the loss is " in str(raised.value)
    assert "; hint: a tenth of the learning rate" in str(raised.value)


@pytest.mark.parametrize("schedule", ["constant", "onecycle"])
def test_one_single_step_is_possible(schedule: str, few: DataSet) -> None:
    train("simple_cnn", SMALL, few, TrainSettings(epochs=1, batch_size=9999, schedule=schedule))


def test_no_batch_has_a_single_sample_left_over(few: DataSet) -> None:
    """BatchNorm over 1x1 features cannot learn from one sample, and 257 = 4 * 64 + 1."""
    data = replace(few, train=few.train.pick(np.arange(65)))
    sizes: list[int] = []

    def loss(logits: torch.Tensor, labels: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        sizes.append(len(labels))
        return cross_entropy(logits, labels, inputs)

    fit_module(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), data, ONE, loss, stage="x")
    assert sorted(sizes) == [32, 33]


def test_every_train_sample_is_seen_once_an_epoch_and_no_other(few: DataSet) -> None:
    seen: list[torch.Tensor] = []

    def loss(logits: torch.Tensor, labels: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        seen.append(labels.clone())  # the next batch lies where this one does
        return cross_entropy(logits, labels, inputs)

    fit_module(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), few, ONE, loss, stage="x")
    np.testing.assert_array_equal(np.bincount(torch.cat(seen)), np.bincount(few.train.labels))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs is 0, at least 1 is needed"),
        ({"batch_size": -1}, "batch_size is -1, at least 0 is needed"),
        ({"shift": -1}, "shift is -1, at least 0 is needed"),
        ({"seed": -1}, "seed is -1, at least 0 is needed"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0, a positive number is needed"),
        ({"learning_rate": float("nan")}, "learning_rate is nan, a positive number is needed"),
        ({"optimizer": "eve"}, "optimizer 'eve' is not known; hint: adam, adamw, sgd"),
        ({"schedule": "never"}, "schedule 'never' is not known; hint: constant, onecycle"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0, 0 or a positive number is needed"),
        ({"momentum": 1.0}, "momentum is 1.0, it lies between 0 and 1"),
        ({"precision": "fp8"}, "precision 'fp8' is not known; hint: fp32, bf16, fp16"),
        ({"device": "tpu"}, "device 'tpu' is not known; hint: cpu, cuda, auto"),
        ({"accumulate": 65}, "accumulate is 65, a batch of 64 has not so many parts; hint: --accumulate 64"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        TrainSettings(**{"epochs": 1, **settings})
    assert str(raised.value) == message
