from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from memopt.errors import AnswerIsNo, InputRefused, UsageError
from memopt_models.checkpoint import Checkpoint, snapshot
from memopt_models.data import DataSet
from memopt_models.layer_costs import count_macs
from memopt_models.prune import PruneSettings, prune
from memopt_models.targets import Target
from memopt_models.train import Progress, TrainSettings

# In this process: the child is tested by itself.
HALF = PruneSettings(ratio=0.5, ways=("channels-here", "hidden"))


def macs(checkpoint: Checkpoint) -> int:
    return count_macs(checkpoint.module(), (1, 1, 28, 28))


def weights_bytes(checkpoint: Checkpoint, batch: int) -> int:
    """A price that is quick: weights, and as many bytes of activations as channels."""
    return 4 * checkpoint.parameters + batch * 1000 * len(checkpoint.state["conv1.weight"])


class Shuffled(nn.Module):
    """Channels are mixed as ShuffleNet does: torch-pruning fails, and no features are hidden."""

    def __init__(self) -> None:
        super().__init__()
        self.flatten, self.fc = nn.Flatten(), nn.Linear(784, 10)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.fc(self.flatten(inputs))
        return logits.reshape(-1, 2, 5).transpose(1, 2).reshape(-1, 10)


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


def test_higher_ratio_leaves_less(dense: Checkpoint, few: DataSet) -> None:
    sizes = [prune(dense, few, replace(HALF, ratio=ratio)).parameters for ratio in (0.1, 0.5, 0.9)]
    assert dense.parameters > sizes[0] > sizes[1] > sizes[2]


def test_channels_are_rounded_to_a_multiple(dense: Checkpoint, few: DataSet) -> None:
    pruned = prune(dense, few, replace(HALF, ratio=0.3, round_to=4))
    assert [pruned.state[name].shape[0] for name in ("conv1.weight", "conv2.weight", "fc1.weight")] == [8, 20, 20]


def test_fine_tuning_brings_back_what_pruning_costs(dense: Checkpoint, few: DataSet) -> None:
    finetune = TrainSettings(epochs=4, learning_rate=3e-3)
    alone, tuned = (prune(dense, few, replace(HALF, finetune=how)) for how in (None, finetune))
    assert tuned.metrics["validation_top1"] > alone.metrics["validation_top1"]
    assert tuned.parameters == alone.parameters


def test_gradients_keep_more_accuracy_than_chance(dense: Checkpoint, few: DataSet) -> None:
    by = {name: prune(dense, few, replace(HALF, method=name)) for name in ("taylor", "random")}
    assert by["taylor"].metrics["validation_top1"] > by["random"].metrics["validation_top1"]
    assert by["taylor"].parameters == by["random"].parameters


@pytest.mark.parametrize("method", ["l2", "taylor"])
def test_pruning_is_the_same_every_time_and_leaves_the_original_alone(
    dense: Checkpoint, few: DataSet, method: str
) -> None:
    before = snapshot(dense.module())
    how = replace(HALF, method=method, steps=2, finetune=TrainSettings(epochs=2))
    assert prune(dense, few, how).sha256 == prune(dense, few, how).sha256
    assert all(torch.equal(dense.state[name], before[name]) for name in before)


def test_steps_end_where_one_step_does_and_divide_the_epochs(dense: Checkpoint, few: DataSet) -> None:
    seen: list[Progress] = []
    how = replace(HALF, steps=2, finetune=TrainSettings(epochs=3, batch_size=256))
    pruned = prune(dense, few, how, on_step=seen.append)
    assert [(each.stage, each.epoch, each.epochs) for each in seen] == [
        ("prune", 1, 1), ("prune", 1, 2), ("prune", 2, 2),
    ]  # fmt: skip
    assert pruned.parameters == prune(dense, few, HALF).parameters
    assert pruned.lineage[-1].settings["ratios"] == [0.25, 0.333333]


def test_lineage_leads_back_to_the_dense_weights_and_says_the_way(
    dense: Checkpoint, pruned: Checkpoint, few: DataSet
) -> None:
    stage = pruned.lineage[-1]
    assert pruned.lineage[:-1] == dense.lineage
    assert (stage.stage, stage.parents, stage.output_sha256) == ("prune", (dense.sha256,), pruned.sha256)
    assert stage.settings["ratio"] == 0.5
    assert stage.settings["finetune"]["epochs"] == 1
    assert stage.settings["data_fingerprint"] == few.fingerprint
    assert (stage.settings["way"], stage.settings["instead"]) == ("channels-here", {})
    assert pruned.metrics["parameters"] == pruned.parameters
    assert pruned.metrics["macs"] == macs(pruned) < macs(dense) / 3


def test_depthwise_student_can_be_pruned_and_rebuilt(student: Checkpoint, few: DataSet) -> None:
    pruned = prune(student, few, HALF)
    assert pruned.parameters < student.parameters
    assert pruned.module().block2.depthwise.conv.groups == 4


def test_pruned_checkpoint_can_be_pruned_again(pruned: Checkpoint, few: DataSet) -> None:
    assert prune(pruned, few, HALF).parameters < pruned.parameters / 2


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize(
    ("target", "cost"),
    [
        (Target("macs", 0.4), macs),
        (Target("params", 0.2), lambda checkpoint: checkpoint.parameters),
        (Target("params", 30_000), lambda checkpoint: checkpoint.parameters),
        (Target("memory", 0.5, batch=8), lambda checkpoint: weights_bytes(checkpoint, 8)),
    ],
)
def test_target_is_reached_and_not_far_passed(
    dense: Checkpoint, few: DataSet, target: Target, cost: object, scope: str
) -> None:
    assert callable(cost)
    pruned = prune(dense, few, replace(HALF, target=target, scope=scope), price=weights_bytes)
    note = pruned.lineage[-1].settings
    assert (note["before"], note["after"]) == (cost(dense), cost(pruned))
    assert note["limit"] == target.limit(cost(dense))
    assert 0.8 * note["limit"] <= cost(pruned) <= note["limit"]  # a network this small has few sizes


def test_steps_towards_a_target_reach_it(dense: Checkpoint, few: DataSet) -> None:
    how = replace(HALF, target=Target("params", 0.3), steps=3, finetune=TrainSettings(epochs=3))
    assert 0.25 * dense.parameters < prune(dense, few, how).parameters <= 0.3 * dense.parameters


def test_target_out_of_reach_says_how_far_it_goes(dense: Checkpoint, few: DataSet) -> None:
    with pytest.raises(AnswerIsNo) as raised:
        prune(dense, few, replace(HALF, target=Target("params", 50)))
    assert str(raised.value) == "the target is 50 parameters; the least that can be reached is 90 parameters"


def test_target_that_is_met_already_is_an_answer(dense: Checkpoint, few: DataSet) -> None:
    with pytest.raises(AnswerIsNo, match=r"^nothing has to go: it is 55338 parameters, 60000 parameters are allowed$"):
        prune(dense, few, replace(HALF, target=Target("params", 60_000)))


def test_planned_memory_needs_a_planner(dense: Checkpoint, few: DataSet) -> None:
    with pytest.raises(UsageError, match=r"^planned memory needs a planner; hint: memopt-export prune --target"):
        prune(dense, few, replace(HALF, target=Target("memory", 0.5)))


def test_where_one_way_does_not_work_the_next_one_is_gone(
    few: DataSet, dense: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memopt_models.channels.remove_channels", lambda *_, **__: 1 // 0)
    pruned = prune(dense, few, HALF)
    note = pruned.lineage[-1].settings
    why = "torch-pruning: ZeroDivisionError: integer division or modulo by zero"
    assert (note["way"], note["instead"]) == ("hidden", {"channels-here": why})
    assert pruned.state["conv2.weight"].shape == (32, 8, 3, 3)


def test_network_that_no_way_works_for_is_refused_with_all_reasons(
    dense: Checkpoint, few: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mynets", sys.modules[__name__])
    checkpoint = replace(dense, network="mynets:shuffled", settings={}, state=snapshot(Shuffled()))
    monkeypatch.setattr("memopt_models.channels.remove_channels", lambda *_, **__: 1 // 0)
    with pytest.raises(AnswerIsNo) as raised:
        prune(checkpoint, few, HALF)
    assert str(raised.value) == (
        "the network cannot be pruned: channels-here: torch-pruning: ZeroDivisionError: integer division or modulo by "
        "zero; hidden: no features are hidden between two layers"
    )


def test_nothing_left_to_remove_is_an_answer(dense: Checkpoint, few: DataSet) -> None:
    with pytest.raises(AnswerIsNo) as raised:
        prune(dense, few, replace(HALF, ratio=0.1, round_to=64))
    assert str(raised.value) == (
        "no channel could be removed at ratio 0.1 by l2, rounded to 64; "
        "hint: a larger --ratio, a smaller --round-to, or --method l2"
    )


def test_batch_norm_scales_of_a_network_without_batch_norm_remove_nothing(dense: Checkpoint, few: DataSet) -> None:
    with pytest.raises(AnswerIsNo, match=r"^no channel could be removed at ratio 0\.5 by bn-scale"):
        prune(dense, few, replace(HALF, method="bn-scale"))


def test_data_of_other_classes_is_refused(dense: Checkpoint, few: DataSet) -> None:
    with pytest.raises(InputRefused, match="the checkpoint knows the classes 0, 1, "):
        prune(dense, replace(few, classes=tuple("abcdefghij")), HALF)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 0.0}, "ratio is 0.0, it lies between 0 and 1; hint: --ratio 0.5"),
        ({"method": "l3"}, "pruning method 'l3' is not known; hint: l1, l2, taylor, bn-scale, random"),
        ({"steps": 0}, "steps is 0, at least 1 is needed; hint: --steps 3"),
        (
            {"steps": 3, "finetune": TrainSettings(epochs=2)},
            "2 epochs of fine-tuning cannot be divided between 3 steps; hint: --epochs 3",
        ),
        ({"ways": ("graph",)}, "ways of pruning are ['graph']; hint: channels, channels-here, hidden"),
        ({"ways": ()}, "ways of pruning are []; hint: channels, channels-here, hidden"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        PruneSettings(**settings)
    assert str(raised.value) == message
