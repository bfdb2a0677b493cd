from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from memopt_models.checkpoint import Checkpoint, snapshot
from memopt_models.hidden import Hidden, cut_hidden, find_hidden
from memopt_models.networks import build
from memopt_models.ranking import Cut, NotThisWay

HALF = Cut(0.5)


class Calls(nn.Module):
    """A network that calls its layers as a function says."""

    def __init__(self, run: Callable[[Calls, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.relu = nn.Linear(4, 8), nn.Linear(8, 4), nn.ReLU()
        self.again = nn.Linear(4, 8)
        self.run = run

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(self, x)


def untraceable(net: Calls, x: torch.Tensor) -> torch.Tensor:
    return net.second(net.first(x)) if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("run", "found"),
    [
        (lambda net, x: net.second(net.relu(net.first(x))), True),
        (lambda net, x: net.second(functional.gelu(net.first(x))), True),
        (lambda net, x: net.second(net.first(x).relu()), True),
        (lambda net, x: net.relu(net.second(net.relu(net.first(x)))), True),  # an activation may be called twice
        (lambda net, x: net.second(functional.softmax(net.first(x), dim=-1)), False),  # which mixes features
        (lambda net, x: net.second(net.first(x) + net.again(x)), False),  # a sum
        (lambda net, x: net.second(net.first(net.second(net.first(x)))), False),  # each is called twice
        (lambda net, x: net.second(net.first(x)) + net.first.weight.sum(), False),  # weights read elsewhere
        (lambda net, x: [net.second(net.first(x)), net.first(x)], False),
        (untraceable, False),
    ],
)
def test_features_are_hidden_where_nobody_else_can_hear_them(
    run: Callable[[Calls, torch.Tensor], torch.Tensor], found: bool
) -> None:
    assert find_hidden(Calls(run)) == ([Hidden("first", (), "second")] if found else [])


def test_layer_that_goes_by_two_names_is_left_alone() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    assert len(find_hidden(module)) == 2
    module[2].weight = module[0].weight
    assert find_hidden(module) == []


def test_parts_of_a_network_that_cannot_be_traced_are_looked_at() -> None:
    whole = Calls(untraceable)
    whole.mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Dropout(), nn.Linear(8, 4))
    assert find_hidden(whole) == [Hidden("mlp.0", (), "mlp.3")]


def test_inner_channels_of_bottlenecks_go_with_their_norms_and_depthwise_convolutions() -> None:
    module = build("mobilenet_v2", {"classes": 10}).eval()
    inner = find_hidden(module)
    assert Hidden("features.2.conv.0.0", ("features.2.conv.0.1", "features.2.conv.1.0", "features.2.conv.1.1"),
                  "features.2.conv.2") in inner  # fmt: skip


@pytest.mark.parametrize("method", ["l1", "l2", "random"])
def test_network_answers_as_if_nobody_listened_to_what_went(dense: Checkpoint, method: str) -> None:
    narrow = replace(dense, state=cut_hidden(dense, Cut(0.5, method)))
    kept = [row for row in range(16) if any(map(dense.state["conv1.weight"][row].equal, narrow.state["conv1.weight"]))]
    muted = dense.module()
    with torch.no_grad():
        muted.conv2.weight[:, sorted(set(range(16)) - set(kept))] = 0
    inputs = torch.randn(3, 1, 28, 28)
    both = {name: narrow.state[name].shape == dense.state[name].shape for name in dense.state}
    assert [name for name, same in both.items() if not same] == [
        "conv1.weight", "conv1.bias", "conv2.weight", "fc1.weight", "fc1.bias", "fc2.weight",
    ]  # fmt: skip
    with torch.no_grad():
        features = narrow.module()[:6](inputs), muted[:6](inputs)
    torch.testing.assert_close(*features)


def test_gradients_decide_by_taylor(dense: Checkpoint) -> None:
    gradients = {name: torch.zeros_like(tensor) for name, tensor in dense.state.items()}
    gradients["conv1.weight"][3:11] = 1
    state = cut_hidden(dense, Cut(0.5, "taylor"), gradients)
    assert torch.equal(state["conv1.weight"], dense.state["conv1.weight"][3:11])


def test_protected_layer_stays_as_it_is(dense: Checkpoint) -> None:
    state = cut_hidden(dense, replace(HALF, protect=("conv*",)))
    assert torch.equal(state["conv1.weight"], dense.state["conv1.weight"])
    assert len(state["fc1.weight"]) == len(dense.state["fc1.weight"]) // 2


def test_network_without_such_features_is_refused(dense: Checkpoint) -> None:
    with pytest.raises(NotThisWay, match=r"^no features are hidden between two layers$"):
        cut_hidden(dense, Cut(0.5, "bn-scale"))


class Eavesdropper(nn.Module):
    """Reads a feature where tracing does not see it."""

    def __init__(self) -> None:
        super().__init__()
        self.flatten, self.first, self.second = nn.Flatten(), nn.Linear(784, 8), nn.Linear(8, 10)
        self.first.register_forward_hook(lambda module, inputs, output: setattr(self, "heard", output.sum()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.second(self.first(self.flatten(x)))
        return logits if isinstance(logits, torch.fx.Proxy) else logits + self.heard


def eavesdropper() -> nn.Module:
    return Eavesdropper()


def test_features_that_are_read_behind_the_back_are_noticed(dense: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mynets", sys.modules[__name__])
    checkpoint = replace(dense, network="mynets:eavesdropper", settings={}, state=snapshot(Eavesdropper()))
    with pytest.raises(NotThisWay, match=r"^hidden features are read elsewhere as well: without them "):
        cut_hidden(checkpoint, HALF)
