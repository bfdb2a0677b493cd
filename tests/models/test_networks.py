from __future__ import annotations

import pytest
import torch
from torch import nn

from memopt.errors import UsageError
from memopt_models.networks import build, complete


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def own_factory(classes: int, width: int = 2) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(width, classes))


def not_a_network() -> int:
    return 1


def test_simple_cnn_is_the_network_of_the_design() -> None:
    module = build("simple_cnn", {})
    assert parameters(module) == 206_922
    assert module.fc1.in_features == 1568
    assert module(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize("size", [20, [12, 16], [13, 9]])
def test_simple_cnn_fits_any_size(size: int | list[int]) -> None:
    height, width = (size, size) if isinstance(size, int) else size
    module = build("simple_cnn", {"size": size, "in_channels": 3, "classes": 4, "channels": [2, 3], "hidden": 5})
    assert module(torch.zeros(1, 3, height, width)).shape == (1, 4)


def test_ds_cnn_has_a_few_thousand_parameters_and_shrinks_with_its_width() -> None:
    default, narrow, shallow = (build("ds_cnn", s) for s in ({}, {"width": 4}, {"depth": 1}))
    assert 2000 < parameters(default) < 3000
    assert parameters(narrow) < parameters(default) > parameters(shallow)
    assert default.eval()(torch.zeros(1, 1, 28, 28)).shape == (1, 10)


def test_ds_cnn_is_depthwise_separable() -> None:
    module = build("ds_cnn", {})
    assert module.block2.depthwise.conv.groups == module.block2.depthwise.conv.in_channels == 16
    assert module.block2.pointwise.conv.kernel_size == (1, 1)


@pytest.mark.parametrize("in_channels", [1, 3])
def test_torchvision_model_takes_the_channels_of_the_data(in_channels: int) -> None:
    module = build("resnet18", {"classes": 7, "in_channels": in_channels}).eval()
    assert module(torch.zeros(1, in_channels, 32, 32)).shape == (1, 7)


def test_googlenet_answers_with_one_tensor_while_training() -> None:
    module = build("googlenet", {"classes": 3}).train()
    assert module(torch.zeros(2, 3, 64, 64)).shape == (2, 3)


def test_own_factory_is_called_with_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    give_module_a_name(monkeypatch)
    assert build("mynets:own_factory", {"classes": 3, "width": 8})[1].in_features == 8


def test_settings_of_the_data_are_filled_in_where_the_factory_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    give_module_a_name(monkeypatch)
    known = {"classes": 5, "shape": (3, 8, 9)}
    assert complete("simple_cnn", {"hidden": 4}, **known) == {
        "classes": 5, "in_channels": 3, "size": [8, 9], "hidden": 4,
    }  # fmt: skip
    assert complete("ds_cnn", {"in_channels": 1}, **known) == {"classes": 5, "in_channels": 1}
    assert complete("resnet18", {}, **known) == {"classes": 5, "in_channels": 3}
    assert complete("mynets:own_factory", {}, **known) == {"classes": 5}


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ("simple_cn", "network 'simple_cn' is not known; hint: did you mean simple_cnn"),
        ("resnet19", "did you mean resnet"),
        (
            "qqq",
            "network 'qqq' is not known; hint: simple_cnn, ds_cnn, tiny_cnn, a torchvision model or pkg.mod:factory",
        ),
        ("nowhere:net", "'nowhere:net' cannot be imported: No module named 'nowhere'"),
        (":net", "cannot be imported"),
        ("math:nothing", "module 'math' has no 'nothing'"),
        ("math:pi", "'math:pi' is a float, not a function"),
    ],
)
def test_unknown_network_is_refused_with_a_hint(network: str, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        build(network, {})
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("network", "settings", "message"),
    [
        ("simple_cnn", {"depth": 3}, "network 'simple_cnn' cannot be built with {'depth': 3}: got an unexpected"),
        ("resnet18", {}, "missing a required argument: 'classes'"),
        ("resnet18", {"classes": 2, "zeal": 1}, "network 'resnet18' cannot be built with {'zeal': 1}"),
        ("resnet18", {"classes": "a"}, "classes is 'a', a positive number is needed"),
        ("resnet18", {"classes": 2, "in_channels": "a"}, "in_channels is 'a', a positive number is needed"),
        ("mobilenet_v2", {"classes": 2, "width_mult": float("inf")}, "network 'mobilenet_v2' cannot be built with"),
        ("simple_cnn", {"channels": [8]}, "channels is [8], two numbers are needed; hint: channels = [16, 32]"),
        ("simple_cnn", {"channels": 5}, "channels is 5, two numbers are needed; hint: channels = [16, 32]"),
        ("simple_cnn", {"channels": "ab"}, "channels is 'ab', two numbers are needed"),
        ("simple_cnn", {"channels": [8, 0]}, "channels is 0, a positive number is needed"),
        ("simple_cnn", {"channels": [8, "a"]}, "channels is 'a', a positive number is needed"),
        ("simple_cnn", {"channels": [8, [8]]}, "channels is [8], a positive number is needed"),
        ("simple_cnn", {"size": 0.5}, "size is 0.5, two numbers are needed; hint: size = [28, 28]"),
        ("simple_cnn", {"size": None}, "size is None, two numbers are needed"),
        ("simple_cnn", {"size": [28, 28, 1]}, "size is [28, 28, 1], two numbers are needed"),
        ("simple_cnn", {"size": 0}, "size is 0, a positive number is needed"),
        ("simple_cnn", {"size": [28, 3]}, "size is [28, 3], two poolings leave nothing of it"),
        ("simple_cnn", {"hidden": True}, "hidden is True, a positive number is needed"),
        ("ds_cnn", {"width": "wide"}, "width is 'wide', a positive number is needed"),
        ("ds_cnn", {"width": 2.0}, "width is 2.0, a positive number is needed"),
        ("ds_cnn", {"depth": None}, "depth is None, a positive number is needed"),
    ],
)
def test_impossible_settings_are_refused(network: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        build(network, settings)
    assert message in str(raised.value)


def test_factory_that_returns_no_network_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    give_module_a_name(monkeypatch)
    with pytest.raises(UsageError, match=r"'mynets:not_a_network' returned a int, not a torch\.nn\.Module"):
        build("mynets:not_a_network", {})


def give_module_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes this file importable as `mynets`."""
    import sys

    monkeypatch.setitem(sys.modules, "mynets", sys.modules[__name__])
