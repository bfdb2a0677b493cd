"""Folding, ranges and their limits, on small networks whose BatchNorms have seen data."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from memopt.errors import AnswerIsNo, InputRefused
from memopt.tensors import TensorSpec
from memopt_models import pt2e
from memopt_models.checkpoint import QUANTIZATION, Checkpoint, snapshot
from memopt_models.networks import build


def fresh(network: str, settings: dict, *shape: int) -> Checkpoint:
    """Weights drawn with seed 0, BatchNorms after three batches, with gains that are not all one."""
    torch.manual_seed(0)
    module = build(network, settings).train()
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight.uniform_(0.5, 2)
                layer.bias.normal_()
        for _ in range(3):
            module(torch.randn(8, *shape))
    spec = TensorSpec("input", "float32", ("batch", *shape))
    return Checkpoint(network, settings, snapshot(module), (spec,), ("a", "b"), (), (), {}, 0)


def observed(checkpoint: Checkpoint, target: str = "cpu") -> Checkpoint:
    """The checkpoint with ranges of two batches."""
    made = pt2e.rounded(checkpoint, target)
    made.module.train()
    with torch.no_grad():
        for seed in range(2):
            made.module(torch.randn(8, *checkpoint.inputs[0].shape[1:], generator=torch.Generator().manual_seed(seed)))
    scales = {f"{QUANTIZATION}{name}": tensor for name, tensor in made.ranges().items()}
    return replace(checkpoint, state=made.state() | scales, quantization={"method": "pt2e", "target": target})


@pytest.fixture(scope="module")
def plain() -> Checkpoint:
    return fresh("ds_cnn", {"classes": 2, "width": 4, "depth": 2}, 1, 12, 12)


@pytest.fixture(scope="module")
def ranged(plain: Checkpoint) -> Checkpoint:
    return observed(plain)


@pytest.mark.parametrize(
    ("network", "settings", "shape"),
    [
        ("ds_cnn", {"classes": 2, "width": 4, "depth": 2}, (1, 12, 12)),
        ("mobilenet_v3_small", {"classes": 2}, (3, 32, 32)),  # its BatchNorms have an epsilon of 1e-3
    ],
)
def test_folded_network_computes_the_same_under_the_same_names(network: str, settings: dict, shape: tuple) -> None:
    checkpoint = fresh(network, settings, *shape)
    module = pt2e.folded(checkpoint)
    folded = replace(checkpoint, state=checkpoint.module().state_dict() | snapshot(module))
    inputs = torch.randn(4, *shape)
    expected = checkpoint.module()(inputs)
    torch.testing.assert_close(module(inputs), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(folded.module()(inputs), expected, atol=1e-4, rtol=1e-4)
    assert not any("batch_norm" in node.name for node in module.graph.nodes)


def test_folding_what_is_folded_changes_no_bit(ranged: Checkpoint) -> None:
    again = snapshot(pt2e.folded(ranged))
    assert all(torch.equal(tensor, ranged.state[name]) for name, tensor in again.items())


def test_ranges_follow_the_training_and_rest_in_evaluation(plain: Checkpoint) -> None:
    made = pt2e.rounded(plain, "cpu")
    inputs = torch.randn(8, 1, 12, 12)
    made.module.train()(inputs)
    before = made.ranges()
    made.module.eval()(10 * inputs)
    assert all(torch.equal(before[name], found) for name, found in made.ranges().items())
    made.module.train()(10 * inputs)
    assert made.ranges()["input"][1] > before["input"][1]


def test_activations_are_unsigned_for_the_cpu_and_symmetric_for_tensorrt(ranged: Checkpoint, plain: Checkpoint) -> None:
    for checkpoint, dtype, centered in ((ranged, torch.uint8, False), (observed(plain, "tensorrt"), torch.int8, True)):
        fakes = pt2e.restored(checkpoint).activations.values()
        assert {fake.dtype for fake in fakes} == {dtype}
        assert all(int(fake.zero_point) == 0 for fake in fakes) == centered


def test_converted_network_answers_as_the_rounded_one_does(ranged: Checkpoint) -> None:
    inputs = torch.randn(16, 1, 12, 12)
    expected = pt2e.restored(ranged).module(inputs)
    torch.testing.assert_close(
        pt2e.converted(ranged)(inputs), expected, atol=1e-2 * float(expected.detach().abs().max()), rtol=0
    )


def test_converted_network_holds_no_float_weights(ranged: Checkpoint) -> None:
    module = pt2e.converted(ranged)
    assert not list(module.parameters())
    widest = {tensor.dtype: tensor.numel() for tensor in sorted(module.buffers(), key=lambda each: each.numel())}
    assert widest[torch.int8] > widest[torch.float32]


def test_bias_of_a_channel_without_weights_fits_into_int32(plain: Checkpoint) -> None:
    """Steps of a silent channel would be so small that its bias, counted in them, leaves int32."""
    state = {name: tensor.clone() for name, tensor in plain.state.items()}
    state["stem.norm.weight"][0], state["stem.norm.bias"][0] = 0.0, 3.0
    checkpoint = observed(replace(plain, state=state))
    inputs = torch.randn(4, 1, 12, 12)
    torch.testing.assert_close(
        pt2e.converted(checkpoint)(inputs), pt2e.restored(checkpoint).module(inputs), atol=0.02, rtol=0.05
    )


@pytest.mark.parametrize("change", ["missing", "unknown", "shape", "infinite"])
def test_ranges_of_another_network_are_refused(ranged: Checkpoint, change: str) -> None:
    state = dict(ranged.state)
    name = f"{QUANTIZATION}relu.1"
    taken = state.pop(name)
    state |= {
        "missing": {},
        "unknown": {name: taken, f"{QUANTIZATION}odd.7": taken},
        "shape": {name: taken[:1]},
        "infinite": {name: torch.tensor([0.0, torch.inf])},
    }[change]
    with pytest.raises(
        InputRefused, match=r"ranges do not fit its network: 1 of them differ \((relu.1|odd.7)\)"
    ) as told:
        pt2e.restored(replace(ranged, state=state))
    assert told.value.hint == "memopt-export qat CKPT makes them anew"


def test_network_without_layers_is_refused() -> None:
    checkpoint = fresh(f"{__name__}:Idle", {}, 1, 4, 4)
    with pytest.raises(AnswerIsNo, match="no convolution or linear layer that int8 could serve"):
        pt2e.rounded(checkpoint, "cpu")


class Idle(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1).relu()
