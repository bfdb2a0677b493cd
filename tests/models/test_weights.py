from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn

from memopt.errors import InputRefused, UsageError
from memopt_models import weights
from memopt_models.dataset import DataSet, Split, make_data
from memopt_models.networks import build
from memopt_models.train import TrainSettings, train
from memopt_models.weights import Weights, begin_with, fresh_weights, load_into, read_state

SMALL = {"channels": [2, 4], "hidden": 8}
HOW = TrainSettings(epochs=1)


@pytest.fixture(scope="module")
def trained(few: DataSet) -> nn.Module:
    return train("simple_cnn", SMALL, few, HOW).module()


def picture_set(channels: int, classes: int) -> DataSet:
    images = np.random.default_rng(0).integers(0, 256, (20, 32, 32, channels), np.uint8)
    return make_data("own", [Split(images, np.arange(20) % classes)] * 3, tuple("abcdefghij"[:classes]))


def wrap_in_parallel(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"module.{name}": tensor for name, tensor in state.items()}


SAVED: dict[str, Callable[[dict[str, torch.Tensor], Path], None]] = {
    "plain.pt": torch.save,
    "inside.pth": lambda state, path: torch.save({"epoch": 3, "state_dict": state}, path),
    "model.pt": lambda state, path: torch.save({"model": state, "optimizer": {"lr": 0.1}}, path),
    "parallel.pt": lambda state, path: torch.save({"state_dict": wrap_in_parallel(state)}, path),
    "compiled.pt": lambda state, path: torch.save({f"_orig_mod.{name}": each for name, each in state.items()}, path),
    "old.pt": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    "plain.safetensors": safetensors.torch.save_file,
}


@pytest.mark.parametrize("name", SAVED)
def test_a_state_dict_is_started_from_however_it_was_saved(
    name: str, trained: nn.Module, few: DataSet, tmp_path: Path
) -> None:
    path = tmp_path / name
    SAVED[name](trained.state_dict(), path)
    first = begin_with(str(path), "simple_cnn", SMALL, few, HOW)
    for key, tensor in trained.state_dict().items():
        assert torch.equal(first.state[key], tensor)
    (stage,) = first.lineage
    assert (stage.stage, stage.output_sha256, fresh_weights(first)) == ("weights", first.sha256, ())
    assert stage.settings == {
        "weights": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "fresh": []
    }  # fmt: skip
    done = train("simple_cnn", SMALL, few, HOW, start=first)
    assert [stage.stage for stage in done.lineage] == ["weights", "train"]


class Program:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("made by a pickle",)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "does not exist; hint: --weights FILE, or --weights imagenet"),
        (lambda path: torch.save(Program(), path),
         "holds more than weights, and code is not run; hint: torch.save(model.state_dict(), FILE)"),
        (lambda path: torch.save(nn.Linear(2, 2), path), "holds more than weights, and code is not run"),
        (lambda path: torch.save([1, 2], path), "holds a list, no state dict; hint: torch.save(model.state_dict()"),
        (lambda path: torch.save({"epoch": 1, "lr": 2}, path), "holds epoch, lr, no state dict"),
        (lambda path: torch.save({}, path), "holds nothing, no state dict"),
        (lambda path: path.write_bytes(b""), "x.pt cannot be read by torch: "),
        (lambda path: path.write_bytes(b"PK\3\4" + bytes(100)), "x.pt cannot be read by torch: "),
    ],
)  # fmt: skip
def test_what_is_no_state_dict_is_refused_in_one_line(
    write: Callable[[Path], object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "x.pt")
    with pytest.raises(InputRefused) as raised:
        read_state(tmp_path / "x.pt")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "made by a pickle").exists()


def test_a_damaged_safetensors_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"none")
    with pytest.raises(InputRefused, match=r"x\.safetensors is not a safetensors file"):
        read_state(tmp_path / "x.safetensors")


def test_weights_of_another_network_are_refused_with_the_first_three_names(trained: nn.Module) -> None:
    wrong = {**trained.state_dict(), "conv1.weight": torch.zeros(5, 1, 3, 3), "extra": torch.zeros(1)}
    del wrong["conv2.bias"], wrong["fc1.bias"]
    with pytest.raises(InputRefused) as raised:
        load_into(build("simple_cnn", SMALL), Weights(wrong, "x.pt"), network="simple_cnn")
    assert str(raised.value) == (
        "x.pt has not the weights of simple_cnn: 4 names differ: conv1.weight is [5, 1, 3, 3], not [2, 1, 3, 3], "
        "conv2.bias is missing, extra is not known, …; hint: the network and settings that they were trained with"
    )


def test_weights_that_are_no_numbers_are_refused(trained: nn.Module) -> None:
    broken = {**trained.state_dict(), "fc1.bias": torch.full((8,), float("nan"))}
    with pytest.raises(InputRefused, match=r"x\.pt has NaN in 'fc1\.bias'"):
        load_into(build("simple_cnn", SMALL), Weights(broken, "x.pt"), network="simple_cnn")


def test_a_classifier_of_other_classes_stays_fresh_and_the_rest_is_taken(trained: nn.Module) -> None:
    module = build("simple_cnn", {**SMALL, "classes": 3})
    before = module.fc2.weight.detach().clone()
    changed = load_into(module, Weights(trained.state_dict(), "x.pt"), network="simple_cnn")
    assert changed == ("fc2.weight", "fc2.bias")
    assert torch.equal(module.fc2.weight, before)
    assert torch.equal(module.fc1.weight, trained.fc1.weight)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_other_channels_get_the_mean_of_the_known_ones(channels: int) -> None:
    rgb = build("simple_cnn", {**SMALL, "in_channels": 3}).eval()
    other = build("simple_cnn", {**SMALL, "in_channels": channels}).eval()
    changed = load_into(other, Weights(rgb.state_dict(), "x.pt"), network="simple_cnn")
    assert changed == ("conv1.weight",)
    gray = torch.rand(2, 1, 28, 28)  # as it answers to gray in RGB
    expected = rgb(gray.expand(-1, 3, -1, -1))
    torch.testing.assert_close(other(gray.expand(-1, channels, -1, -1)), expected)


# --- torchvision's


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a file is that is downloaded whatever the address; torchvision loads it as it would any other."""
    source = tmp_path / "downloaded.pth"
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))

    def download(url: str, place: str, hash_prefix: str | None = None, progress: bool = True) -> None:
        if not source.exists():
            raise OSError(f"no network to {url}")
        shutil.copy(source, place)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    return source


@pytest.mark.parametrize(("channels", "classes"), [(3, 4), (1, 4)])
def test_imagenet_weights_come_through_torchvision(
    channels: int, classes: int, offline: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    theirs = torchvision.models.squeezenet1_1()
    torch.save(theirs.state_dict(), offline)
    first = begin_with("imagenet", "squeezenet1_1", {}, picture_set(channels, classes), HOW)
    assert capsys.readouterr().out == ""  # stdout is for results
    kernels = theirs.features[0].weight
    wanted = kernels if channels == 3 else kernels.sum(dim=1, keepdim=True)
    assert torch.equal(first.state["features.0.weight"], wanted)
    assert torch.equal(first.state["features.12.expand3x3.weight"], theirs.features[12].expand3x3.weight)
    assert first.state["classifier.1.weight"].shape[0] == classes
    assert fresh_weights(first) == (
        *(("features.0.weight",) if channels == 1 else ()), "classifier.1.weight", "classifier.1.bias",
    )  # fmt: skip
    assert first.lineage[0].settings["weights"] == "imagenet, SqueezeNet1_1_Weights.IMAGENET1K_V1"
    mean = first.preprocess[3]["mean"]
    assert mean == pytest.approx([0.485, 0.456, 0.406] if channels == 3 else [0.449], abs=1e-3)


def test_a_network_that_prepares_its_inputs_itself_needs_not_to(offline: Path) -> None:
    """googlenet brings ImageNet's mean to 0.5: here the preprocessing does, and the network computes the same."""
    theirs = torchvision.models.googlenet(init_weights=False)
    torch.save(theirs.state_dict(), offline)
    data = picture_set(3, 10)
    first = begin_with("imagenet", "googlenet", {}, data, HOW)
    assert first.preprocess[3] == {"op": "normalize", "mean": [0.5] * 3, "std": [0.5] * 3}
    mean, std = (torch.tensor(each)[:, None, None] for each in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    raw = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        kernels = first.module().conv1.conv(raw * 2 - 1)
        expected = theirs.conv1.conv(torchvision.models.GoogLeNet._transform_input(
            type("On", (), {"transform_input": True})(), (raw - mean) / std
        ))  # fmt: skip
    torch.testing.assert_close(kernels, expected, atol=1e-5, rtol=1e-4)


def test_what_cannot_be_downloaded_is_refused_with_the_address(offline: Path) -> None:
    with pytest.raises(InputRefused) as raised:
        begin_with("imagenet", "squeezenet1_1", {}, picture_set(3, 4), HOW)
    assert "the ImageNet weights of squeezenet1_1 cannot be had: no network to https://" in str(raised.value)
    assert "; hint: --weights FILE, from https://download.pytorch.org/models/squeezenet1_1" in str(raised.value)


def test_networks_of_ours_have_no_imagenet_weights(few: DataSet) -> None:
    with pytest.raises(UsageError, match="network 'ds_cnn' has no ImageNet weights; hint: --network resnet18, or --we"):
        begin_with("imagenet", "ds_cnn", {}, few, HOW)


FAMILIES = (
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3",
    "maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "resnet18", "resnext50_32x4d",
    "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11", "vit_b_16", "wide_resnet50_2",
)  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_of_a_torchvision_classifier_the_last_layer_alone_depends_on_the_classes(name: str) -> None:
    with torch.device("meta"):
        own, theirs = (build(name, {"classes": classes}) for classes in (3, 1000))
    state, wanted = dict(theirs.state_dict()), own.state_dict()
    changed = weights._leave_classifier(state, wanted)
    assert len(changed) == (1 if name == "maxvit_t" else 2)  # that one has no bias there
    assert all(weights._misfit(each, wanted, state) is None for each in {*wanted, *state})
