from __future__ import annotations

import gc
import sys
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn

from memopt.errors import AnswerIsNo, InputRefused, UsageError
from memopt_models.checkpoint import Checkpoint, snapshot
from memopt_models.data import DataSet
from memopt_models.prune import PruneSettings, prune, remove_channels
from memopt_models.train import Progress, TrainSettings

HALF = PruneSettings(ratio=0.5)


class Shuffled(nn.Module):
    """A network that torch-pruning does not understand."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)
        self.scale = nn.Parameter(torch.ones(6, 1, 1))
        self.fc = nn.Linear(6, 10)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.conv(inputs) * self.scale
        return self.fc(features.mean((2, 3)))


def shuffled() -> nn.Module:
    return Shuffled()


def test_tensors_really_shrink_and_the_classifier_stays(dense: Checkpoint, few: DataSet) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in prune(dense, few, HALF).state.items()}
    assert shapes == {
        "conv1.weight": (8, 1, 3, 3),
        "conv1.bias": (8,),
        "conv2.weight": (16, 8, 3, 3),
        "conv2.bias": (16,),
        "fc1.weight": (16, 16 * 49),
        "fc1.bias": (16,),
        "fc2.weight": (10, 16),
        "fc2.bias": (10,),
    }


@pytest.mark.parametrize("method", ["l1", "l2"])
def test_channels_of_smallest_norm_go(method: str) -> None:
    module = nn.Sequential(nn.Conv2d(1, 4, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    with torch.no_grad():
        module[0].weight[:] = torch.tensor([3.0, 0.1, 2.0, 0.2]).reshape(4, 1, 1, 1)
        module[3].weight.fill_(1)
    remove_channels(module, (1, 1, 2, 2), PruneSettings(ratio=0.5, method=method), classes=3)
    assert module[0].weight.flatten().tolist() == [3.0, 2.0]
    assert module[3].in_features == 2


def test_higher_ratio_leaves_less(dense: Checkpoint, few: DataSet) -> None:
    sizes = [prune(dense, few, PruneSettings(ratio=ratio)).parameters for ratio in (0.1, 0.5, 0.9)]
    assert dense.parameters > sizes[0] > sizes[1] > sizes[2]


def test_channels_are_rounded_to_a_multiple(dense: Checkpoint, few: DataSet) -> None:
    pruned = prune(dense, few, PruneSettings(ratio=0.3, round_to=4))
    assert [pruned.state[name].shape[0] for name in ("conv1.weight", "conv2.weight", "fc1.weight")] == [8, 20, 20]


def test_fine_tuning_brings_back_what_pruning_costs(dense: Checkpoint, few: DataSet) -> None:
    finetune = TrainSettings(epochs=4, learning_rate=3e-3)
    alone, tuned = (prune(dense, few, replace(HALF, finetune=how)) for how in (None, finetune))
    assert tuned.metrics["validation_top1"] > alone.metrics["validation_top1"]
    assert tuned.parameters == alone.parameters


def test_pruning_is_the_same_every_time_and_leaves_the_original_alone(dense: Checkpoint, few: DataSet) -> None:
    before = snapshot(dense.module())
    how = replace(HALF, finetune=TrainSettings(epochs=1))
    assert prune(dense, few, how).sha256 == prune(dense, few, how).sha256
    assert all(torch.equal(dense.state[name], before[name]) for name in before)


def test_lineage_leads_back_to_the_dense_weights(dense: Checkpoint, pruned: Checkpoint, few: DataSet) -> None:
    stage = pruned.lineage[-1]
    assert pruned.lineage[:-1] == dense.lineage
    assert (stage.stage, stage.parents, stage.output_sha256) == ("prune", (dense.sha256,), pruned.sha256)
    assert stage.settings["ratio"] == 0.5
    assert stage.settings["finetune"]["epochs"] == 1
    assert stage.settings["data_fingerprint"] == few.fingerprint
    assert pruned.metrics["parameters"] == pruned.parameters


def test_depthwise_student_can_be_pruned_and_rebuilt(student: Checkpoint, few: DataSet) -> None:
    pruned = prune(student, few, HALF)
    assert pruned.parameters < student.parameters
    assert pruned.module().block2.depthwise.conv.groups == 4


def test_pruned_checkpoint_can_be_pruned_again(pruned: Checkpoint, few: DataSet) -> None:
    assert prune(pruned, few, HALF).parameters < pruned.parameters / 2


def test_progress_is_that_of_fine_tuning(dense: Checkpoint, few: DataSet) -> None:
    seen: list[Progress] = []
    prune(dense, few, replace(HALF, finetune=TrainSettings(epochs=1, batch_size=256)), on_step=seen.append)
    assert [progress.stage for progress in seen] == ["prune"]


def test_pruned_modules_are_not_kept_alive(dense: Checkpoint) -> None:
    module = dense.module()
    remove_channels(module, (1, 1, 28, 28), HALF, classes=10)
    watch = weakref.ref(module)
    del module
    gc.collect()
    assert watch() is None


def test_network_without_a_classifier_is_not_pruned() -> None:
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(AnswerIsNo, match="the network cannot be pruned: LookupError: no layer has 10 outputs"):
        remove_channels(module, (1, 1, 8, 8), HALF, classes=10)


def test_network_that_the_library_fails_on_is_refused_in_one_line() -> None:
    from memopt_models.networks import build

    module = build("shufflenet_v2_x0_5", {"classes": 10}).eval()
    with pytest.raises(AnswerIsNo, match=r"^the network cannot be pruned: ZeroDivisionError: [^\n]*$"):
        remove_channels(module, (1, 3, 32, 32), HALF, classes=10)


def test_network_that_could_not_be_reloaded_is_refused(
    dense: Checkpoint, few: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mynets", sys.modules[__name__])
    checkpoint = replace(dense, network="mynets:shuffled", settings={}, state=snapshot(Shuffled()))
    with pytest.raises(AnswerIsNo) as raised:
        prune(checkpoint, few, HALF)
    assert str(raised.value) == (
        "the pruned network cannot be rebuilt from its weights: "
        "the weights do not fit network 'mynets:shuffled': 1 of them differ (scale)"
    )


def test_nothing_left_to_remove_is_an_answer(dense: Checkpoint, few: DataSet) -> None:
    with pytest.raises(AnswerIsNo) as raised:
        prune(dense, few, PruneSettings(ratio=0.1, round_to=64))
    assert str(raised.value) == (
        "no channel could be removed at ratio 0.1, rounded to 64; hint: a larger --ratio or a smaller --round-to"
    )


def test_data_of_other_classes_is_refused(dense: Checkpoint, few: DataSet) -> None:
    with pytest.raises(InputRefused, match="the checkpoint knows the classes 0, 1, "):
        prune(dense, replace(few, classes=tuple("abcdefghij")), HALF)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 0.0}, "ratio is 0.0, it lies between 0 and 1; hint: --ratio 0.5"),
        ({"ratio": 1.0}, "ratio is 1.0, it lies between 0 and 1; hint: --ratio 0.5"),
        ({"ratio": float("nan")}, "ratio is nan, it lies between 0 and 1; hint: --ratio 0.5"),
        ({"method": "l3"}, "pruning method 'l3' is not known; hint: l1, l2"),
        ({"round_to": 0}, "round_to is 0, at least 1 is needed"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        PruneSettings(**settings)
    assert str(raised.value) == message
