from __future__ import annotations

import gc
import sys
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn

from memopt_models.channels import cut_channels, remove_channels
from memopt_models.checkpoint import Checkpoint, snapshot
from memopt_models.networks import build
from memopt_models.ranking import Cut, NotThisWay

HALF = Cut(0.5)


class Scaled(nn.Module):
    """A network that keeps weights beside its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)
        self.scale = nn.Parameter(torch.arange(1.0, 7.0).reshape(6, 1, 1))
        self.fc = nn.Linear(6, 10)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.conv(inputs) * self.scale
        return self.fc(features.mean((2, 3)))


class Counted(Scaled):
    """A network that knows how many channels it has, and cannot be told that there are fewer."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        logits = super().forward(inputs)
        return logits * (1 if self.fc.in_features == 6 or self.training else len(self._parameters) / 2 + torch.rand(1))


def scaled() -> nn.Module:
    return Scaled()


def counted() -> nn.Module:
    return Counted()


def line(*weights: float) -> nn.Sequential:
    """One convolution whose channels have these weights, and a classifier that hears all alike."""
    n = len(weights)
    module = nn.Sequential(nn.Conv2d(1, n, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n, 3))
    with torch.no_grad():
        module[0].weight[:] = torch.tensor(weights).reshape(n, 1, 1, 1)
        module[3].weight.fill_(1)
    return module.eval()


def of(checkpoint: Checkpoint, network: str, module: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    monkeypatch.setitem(sys.modules, "mynets", sys.modules[__name__])
    return replace(checkpoint, network=network, settings={}, state=snapshot(module))


@pytest.mark.parametrize("method", ["l1", "l2"])
def test_channels_of_smallest_norm_go(method: str) -> None:
    module = line(3.0, 0.1, 2.0, 0.2)
    remove_channels(module, (1, 1, 2, 2), replace(HALF, method=method), classes=3)
    assert module[0].weight.flatten().tolist() == [3.0, 2.0]
    assert module[3].in_features == 2


def test_channels_that_the_loss_does_not_feel_go_by_taylor() -> None:
    module = line(3.0, 0.1, 2.0, 0.2)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    module[0].weight.grad[:] = torch.tensor([0.0, 9.0, 0.0, 9.0]).reshape(4, 1, 1, 1)
    remove_channels(module, (1, 1, 2, 2), replace(HALF, method="taylor"), classes=3)
    assert module[0].weight.flatten().tolist() == pytest.approx([0.1, 0.2])


def test_channels_of_smallest_batch_norm_scale_go() -> None:
    module = nn.Sequential(*line(3.0, 0.1, 2.0, 0.2))
    module.insert(1, nn.BatchNorm2d(4).eval())
    with torch.no_grad():
        module[1].weight[:] = torch.tensor([0.1, 2.0, 0.2, 3.0])
    remove_channels(module, (1, 1, 2, 2), replace(HALF, method="bn-scale"), classes=3)
    assert module[0].weight.flatten().tolist() == pytest.approx([0.1, 0.2])


def test_random_channels_follow_the_seed() -> None:
    def kept(seed: int) -> list[float]:
        module = line(*map(float, range(1, 17)))
        remove_channels(module, (1, 1, 2, 2), replace(HALF, method="random", seed=seed), classes=3)
        weights: list[float] = module[0].weight.flatten().tolist()
        return weights

    assert kept(1) == kept(1)
    assert len({tuple(kept(seed)) for seed in range(4)}) > 1


def test_global_scope_takes_from_the_layer_that_matters_least() -> None:
    module = build("simple_cnn", {"channels": [8, 8], "hidden": 8}).eval()
    with torch.no_grad():
        module.conv1.weight[:6] *= 1e-3
        module.conv2.weight[:, :6] *= 1e-3
    remove_channels(module, (1, 1, 28, 28), Cut(0.25, scope="global"), classes=10)
    assert (module.conv1.out_channels, module.conv2.out_channels, module.fc1.out_features) == (2, 8, 8)


def test_protected_layer_stays_as_it_is(dense: Checkpoint) -> None:
    state = cut_channels(dense, replace(HALF, protect=("conv2",)))
    assert torch.equal(state["conv2.weight"], dense.state["conv2.weight"])
    assert state["conv1.weight"].shape[0] == 16  # which conv2 reads
    assert state["fc1.weight"].shape[0] == dense.state["fc1.weight"].shape[0] // 2


def test_attention_keeps_its_heads_and_each_loses_the_same_positions() -> None:
    module = build("vit_b_16", {"classes": 10, "image_size": 32, "num_classes": 10}).eval()
    del module.encoder.layers[1:]
    remove_channels(module, (1, 3, 32, 32), HALF, classes=10)
    attention = module.encoder.layers[0].self_attention
    assert (attention.num_heads, attention.embed_dim, attention.head_dim) == (12, 384, 32)
    assert module.hidden_dim == module.class_token.shape[-1] == 384


def test_weights_beside_layers_shrink_with_them(dense: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    state = cut_channels(of(dense, "mynets:scaled", Scaled(), monkeypatch), HALF)
    assert {name: tuple(t.shape) for name, t in state.items()} == {
        "scale": (3, 1, 1), "conv.weight": (3, 1, 3, 3), "conv.bias": (3,), "fc.weight": (10, 3), "fc.bias": (10,),
    }  # fmt: skip


def test_network_that_answers_differently_when_rebuilt_is_refused(
    dense: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NotThisWay, match=r"^what is left, rebuilt from its weights, answers differently$"):
        cut_channels(of(dense, "mynets:counted", Counted(), monkeypatch), HALF)


def test_network_without_a_classifier_is_refused() -> None:
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(NotThisWay, match=r"^no layer has 10 outputs$"):
        remove_channels(module, (1, 1, 8, 8), HALF, classes=10)


def test_pruned_modules_are_not_kept_alive(dense: Checkpoint) -> None:
    module = dense.module()
    remove_channels(module, (1, 1, 28, 28), HALF, classes=10)
    watch = weakref.ref(module)
    del module
    gc.collect()
    assert watch() is None
