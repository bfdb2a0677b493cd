from __future__ import annotations

from dataclasses import replace

import pytest
from torch import nn

from memopt.tensors import TensorSpec
from memopt_models.checkpoint import Checkpoint, snapshot
from memopt_models.layer_costs import Cost, compare_layers, count_macs, layer_costs
from memopt_models.networks import build


@pytest.mark.parametrize(
    ("module", "shape", "macs"),
    [
        (nn.Conv2d(3, 8, 3, padding=1), (1, 3, 10, 10), 8 * 3 * 9 * 100),
        (nn.Conv2d(8, 8, 3, padding=1, groups=8), (1, 8, 10, 10), 8 * 9 * 100),
        (nn.Conv2d(8, 8, 1, groups=2), (1, 8, 10, 10), 8 * 4 * 100),
        (nn.Linear(6, 5), (1, 6), 30),
        (nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)), (1, 6), 40),
    ],
)
def test_multiply_accumulates_are_those_counted_by_hand(module: nn.Module, shape: tuple[int, ...], macs: int) -> None:
    assert count_macs(module, shape) == macs


def test_layers_cost_what_they_do(dense: Checkpoint) -> None:
    assert layer_costs(dense) == {
        "conv1": Cost(16, 160, 16 * 9 * 784),
        "conv2": Cost(32, 4640, 32 * 16 * 9 * 196),
        "fc1": Cost(32, 50208, 1568 * 32),
        "fc2": Cost(10, 330, 320),
    }


def test_layers_of_a_network_add_up_to_the_whole() -> None:
    settings = {"classes": 10, "image_size": 32}
    module = build("vit_b_16", settings)
    inputs = (TensorSpec("input", "float32", ("batch", 3, 32, 32)),)
    checkpoint = Checkpoint("vit_b_16", settings, snapshot(module), inputs, tuple("0123456789"), (), (), {}, 0)
    costs = layer_costs(checkpoint).values()
    norms = sum(p.numel() for name, p in module.named_parameters() if "ln" in name)
    beside = module.class_token.numel() + module.encoder.pos_embedding.numel()
    assert sum(cost.parameters for cost in costs) + norms + beside == checkpoint.parameters
    assert sum(cost.macs for cost in costs) == count_macs(module, (1, 3, 32, 32))


def test_parts_are_layers_whose_names_begin_alike(dense: Checkpoint, pruned: Checkpoint) -> None:
    parts = compare_layers(dense, pruned)
    assert [part.name for part in parts] == ["conv1", "conv2", "fc1", "fc2"]
    assert [part.after.outputs for part in parts] == [8, 16, 16, 10]
    assert sum(part.after.parameters for part in parts) == pruned.parameters


def test_parts_of_a_deep_network_are_few_and_complete() -> None:
    inputs = (TensorSpec("input", "float32", ("batch", 3, 32, 32)),)
    state = snapshot(build("resnet18", {"classes": 10}))
    whole = Checkpoint("resnet18", {"classes": 10}, state, inputs, tuple("0123456789"), (), (), {}, 0)
    parts = compare_layers(whole, replace(whole))
    assert 4 <= len(parts) <= 16
    assert sum(part.layers for part in parts) == 21
    assert all(part.before == part.after for part in parts)
