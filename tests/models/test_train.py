from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from memopt.errors import AnswerIsNo, BackendError, InputRefused, OutOfResource, UsageError
from memopt_models import networks
from memopt_models.checkpoint import Checkpoint, snapshot
from memopt_models.data import DataSet, Split
from memopt_models.train import (
    AUTO,
    OPTIMIZERS,
    Progress,
    TrainSettings,
    cross_entropy,
    fit_module,
    train,
)

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


def _one_step(few: DataSet, how: TrainSettings) -> dict[str, torch.Tensor]:
    """The weights after one step of plain gradient descent, which are those before less the gradient."""
    torch.manual_seed(0)
    module = networks.build("simple_cnn", SMALL)
    data = replace(few, train=few.train.pick(np.arange(50)))
    how = replace(how, epochs=1, batch_size=50, optimizer="sgd", momentum=0.0, learning_rate=1.0)
    fit_module(module, data, how, cross_entropy, stage="x")
    return snapshot(module)


@pytest.mark.parametrize("parts", [2, 7, 50])
def test_gradient_does_not_hang_on_the_parts_of_a_batch(parts: int, few: DataSet) -> None:
    """50 samples in 7 parts are parts of 8 and of 7; pictures are moved alike."""
    whole, cut = (_one_step(few, replace(ONE, shift=2, accumulate=n)) for n in (1, parts))
    for name, value in whole.items():
        torch.testing.assert_close(cut[name], value, rtol=1e-5, atol=1e-6)


def test_parts_are_no_larger_than_the_micro_batch(few: DataSet) -> None:
    sizes: list[int] = []

    def loss(logits: torch.Tensor, labels: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        sizes.append(len(labels))
        return cross_entropy(logits, labels, inputs)

    how = replace(ONE, batch_size=100, accumulate=3)
    fit_module(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), few, how, loss, stage="x")
    assert how.micro_batch == 34
    assert sum(sizes) == 256
    assert {28, 29} == set(sizes)  # three batches of 85 or 86


@pytest.mark.parametrize("network", ["simple_cnn", "ds_cnn"])
def test_blocks_that_are_computed_again_give_the_same_weights(network: str, few: DataSet) -> None:
    off, blocks = (train(network, {}, few, replace(ONE, checkpointing=how)).sha256 for how in ("off", "blocks"))
    assert off == blocks


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "bf16"}, {"precision": "fp16"}, {"channels_last": True}, {"device": "auto"},
        {"optimizer": "adamw", "weight_decay": 0.01}, {"optimizer": "sgd", "learning_rate": 0.05},
    ],
    ids=str,
)  # fmt: skip
def test_every_way_to_train_learns_and_gives_float32_weights(settings: dict[str, Any], few: DataSet) -> None:
    made = train("simple_cnn", {}, few, TrainSettings(**{"epochs": 6, "batch_size": 32, **settings}))
    assert made.metrics["validation_top1"] > 0.75
    assert {tensor.dtype for tensor in made.state.values()} == {torch.float32}
    assert all(tensor.is_contiguous() for tensor in made.state.values())


def test_layers_compute_in_the_precision_asked_for(few: DataSet) -> None:
    seen: list[torch.dtype] = []
    module = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    module[1].register_forward_hook(lambda layer, inputs, outputs: seen.append(outputs.dtype))
    fit_module(module, few, replace(ONE, precision="bf16", batch_size=256), cross_entropy, stage="x")
    assert seen == [torch.bfloat16, torch.float32]  # a step, then the validation, which is that of the weights


def test_weight_decay_and_momentum_reach_the_optimizer() -> None:
    for name, decay in (("adam", 0.0), ("adamw", 0.02), ("sgd", 0.03)):
        how = TrainSettings(epochs=1, optimizer=name, weight_decay=decay, momentum=0.7)
        (group,) = OPTIMIZERS[name](nn.Linear(1, 1), how).param_groups
        assert group["weight_decay"] == decay
        assert group.get("momentum", 0.7) == 0.7


def test_automatic_batches_leave_steps_in_an_epoch(few: DataSet) -> None:
    assert TrainSettings(1, batch_size=AUTO).settled(len(few.train)) == TrainSettings(1, batch_size=32, accumulate=1)


def test_module_is_left_without_gradients(few: DataSet) -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    fit_module(module, few, ONE, cross_entropy, stage="x")
    assert all(parameter.grad is None for parameter in module.parameters())
    assert not module.training


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused(few: DataSet) -> None:
    with pytest.raises(BackendError, match=r"torch .* sees no CUDA device; hint: --device cpu"):
        train("simple_cnn", SMALL, few, replace(ONE, device="cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_gpu_learns_and_tells_its_peak(few: DataSet) -> None:
    seen: list[Progress] = []
    how = TrainSettings(
        epochs=6, batch_size=32, device="cuda", precision="fp16", accumulate=2, max_device_memory_bytes=2**30
    )
    made = train("simple_cnn", {}, few, how, on_step=seen.append)
    assert made.metrics["validation_top1"] > 0.75
    assert all(2**20 < p.peak_device_bytes < 2**30 for p in seen if p.peak_device_bytes is not None)
    assert any(p.peak_device_bytes is not None for p in seen)


def test_a_training_that_needs_more_than_its_limit_ends_with_an_error_and_no_crash(few: DataSet) -> None:
    """The gradient of 1568 x 20000 weights is 120 MiB, and there are 32 MiB."""
    how = replace(ONE, accumulate=64, max_memory_bytes=1)
    with pytest.raises(OutOfResource, match=r"the training ran out of memory within 1 B of the host: "):
        train("simple_cnn", {"hidden": 20000}, few, how)


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
        ({"max_memory_bytes": 0}, "max_memory_bytes is 0, a positive number is needed"),
        (
            {"max_device_memory_bytes": 1},
            "max_device_memory_bytes limits a GPU, and device is cpu; hint: --device cuda",
        ),
        ({"checkpointing": "all"}, "checkpointing 'all' is not known; hint: off, blocks"),
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
