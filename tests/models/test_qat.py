"""INT8 training on few digits; what weights alone do differently is told in test_ste.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from memopt.errors import InputRefused, UsageError
from memopt_models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from memopt_models.data import DataSet
from memopt_models.evaluate import measure
from memopt_models.qat import QatSettings, deployed, train_rounded, trainee, views_of
from memopt_models.train import Progress, TrainSettings, train

ONE = TrainSettings(epochs=1, learning_rate=1e-4)


@pytest.fixture(scope="module")
def rounded(dense: Checkpoint, few: DataSet) -> Checkpoint:
    return train_rounded(dense, few, QatSettings(ONE))


def test_metrics_are_those_of_the_deployed_network_beside_those_of_the_float_one(
    rounded: Checkpoint, dense: Checkpoint, few: DataSet
) -> None:
    assert {name: rounded.metrics[name] for name in ("validation_top1", "test_top1")} == measure(deployed(rounded), few)
    assert rounded.metrics["test_top1_float"] == dense.metrics["test_top1"]
    assert rounded.metrics["test_top1"] >= dense.metrics["test_top1"] - 0.05


def test_rounded_checkpoint_is_a_float_network_with_ranges(rounded: Checkpoint, dense: Checkpoint) -> None:
    assert rounded.quantization == {"method": "pt2e", "precision": "int8", "target": "cpu", "views": 1}
    assert rounded.module().state_dict().keys() == dense.state.keys()
    assert set(rounded.scales) == {"input", "relu.0", "relu.1", "relu.2"}
    assert rounded.parameters == dense.parameters


def test_loaded_checkpoint_answers_as_the_saved_one(rounded: Checkpoint, few: DataSet, tmp_path: Path) -> None:
    save_checkpoint(rounded, tmp_path / "q.safetensors")
    loaded = load_checkpoint(tmp_path / "q.safetensors")
    inputs = torch.randn(8, 1, 28, 28)
    assert torch.equal(deployed(loaded)(inputs), deployed(rounded)(inputs))


def test_same_arguments_give_the_same_bytes(rounded: Checkpoint, dense: Checkpoint, few: DataSet) -> None:
    assert train_rounded(dense, few, QatSettings(ONE)).sha256 == rounded.sha256


def test_lineage_says_how_it_was_trained(rounded: Checkpoint, dense: Checkpoint) -> None:
    stage = rounded.lineage[-1]
    assert (stage.stage, stage.parents) == ("qat", (dense.sha256,))
    assert (stage.settings["precision"], stage.settings["target"]) == ("int8", "cpu")
    assert list(stage.settings["memory"]["peak_bytes"]) == ["qat"]


def test_pruned_network_is_rounded_as_it_is(pruned: Checkpoint, few: DataSet) -> None:
    seen: list[Progress] = []
    rounded = train_rounded(pruned, few, QatSettings(ONE, target="tensorrt"), on_step=seen.append)
    assert rounded.state["fc1.weight"].shape == pruned.state["fc1.weight"].shape
    assert {progress.stage for progress in seen} == {"qat"}
    assert deployed(rounded)(torch.randn(2, 1, 28, 28)).shape == (2, 10)


def test_training_on_makes_a_float_checkpoint_again(rounded: Checkpoint, few: DataSet) -> None:
    again = train("simple_cnn", {}, few, ONE, start=rounded)
    assert again.quantization == again.scales == {}


def test_probe_of_memory_trains_what_is_trained(dense: Checkpoint) -> None:
    module, loss = trainee(dense, precision="int8", target="cpu")
    logits = module.train()(torch.randn(4, 1, 28, 28))
    assert loss(logits, torch.tensor([1, 2, 3, 4]), logits).isfinite()
    assert any("activation_post_process" in name for name, _ in module.named_modules())


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"precision": "int3"}, "precision 'int3' is not known"),
        ({"target": "npu"}, "target 'npu' is not known"),
        ({"train": replace(ONE, precision="bf16")}, "precision is 'bf16', a rounded network trains with 'fp32'"),
    ],
)
def test_impossible_settings_are_refused(asked: dict, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        QatSettings(**{"train": ONE, **asked})


@pytest.mark.parametrize("views", [5, "4", [4], True, None])
def test_views_that_a_file_cannot_mean_are_refused(rounded: Checkpoint, views: object) -> None:
    with pytest.raises(InputRefused, match=r"trained for .* views, this memopt knows 1, 4, 9"):
        views_of(replace(rounded, quantization=rounded.quantization | {"views": views}))


def test_unknown_rounding_is_refused(rounded: Checkpoint) -> None:
    with pytest.raises(InputRefused, match="trained for rounding by 'magic', this memopt knows pt2e, ste"):
        deployed(replace(rounded, quantization={"method": "magic"}))
