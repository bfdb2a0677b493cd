from __future__ import annotations

import pytest
from torch import nn

from memopt.tensors import TensorSpec
from memopt_models.checkpoint import Checkpoint, snapshot
from memopt_models.layer_costs import Cost, compare_parts, count_macs
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


def test_parts_cost_what_they_do(dense: Checkpoint) -> None:
    parts = {part.name: part.before for part in compare_parts(dense, dense)}
    assert parts == {
        "conv1": Cost(16, 160, 16 * 9 * 784),
        "conv2": Cost(32, 4640, 32 * 16 * 9 * 196),
        "fc1": Cost(32, 50208, 1568 * 32),
        "fc2": Cost(10, 330, 320),
        "all": Cost(90, dense.parameters, 16 * 9 * 784 + 32 * 16 * 9 * 196 + 1568 * 32 + 320),
    }


def test_all_of_it_is_the_last_part_and_has_shrunk(dense: Checkpoint, pruned: Checkpoint) -> None:
    parts = compare_parts(dense, pruned)
    assert [part.name for part in parts] == ["conv1", "conv2", "fc1", "fc2", "all"]
    assert [part.after.outputs for part in parts] == [8, 16, 16, 10, 50]
    assert parts[-1].after.parameters == pruned.parameters
    assert parts[-1].after.macs == pruned.metrics["macs"]


@pytest.mark.parametrize(("network", "layers"), [("resnet18", 21), ("swin_t", 53), ("squeezenet1_1", 26)])
def test_parts_of_a_deep_network_are_few_and_complete(network: str, layers: int) -> None:
    inputs = (TensorSpec("input", "float32", ("batch", 3, 32, 32)),)
    state = snapshot(build(network, {"classes": 10}))
    whole = Checkpoint(network, {"classes": 10}, state, inputs, tuple("0123456789"), (), (), {}, 0)
    *parts, every = compare_parts(whole, whole)
    assert 4 <= len(parts) <= 16
    assert sum(part.layers for part in parts) == every.layers == layers
    assert every.before == every.after
    assert sum(part.before.macs for part in parts) == every.before.macs == count_macs(whole.module(), (1, 3, 32, 32))
