from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memopt.errors import AnswerIsNo, UsageError
from memopt_models import ste
from memopt_models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from memopt_models.data import DataSet
from memopt_models.evaluate import measure
from memopt_models.networks import build
from memopt_models.qat import QatSettings, deployed, train_rounded
from memopt_models.train import TrainSettings, train

ONE = TrainSettings(epochs=1, learning_rate=1e-3)


@pytest.fixture(scope="module")
def normed(few: DataSet) -> Checkpoint:
    """With BatchNorm layers that have seen data."""
    return train("tiny_cnn", {"channels": [4, 4, 4]}, few, TrainSettings(epochs=2, learning_rate=1e-2))


@pytest.fixture(scope="module")
def rounded(normed: Checkpoint, few: DataSet) -> Checkpoint:
    return train_rounded(normed, few, QatSettings(ONE, precision="int4-weights", layer_bits={"fc": 8, "stem.conv": 2}))


def integers(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """The tensor of the deployed network, counted in steps."""
    step = checkpoint.scales[name]
    tensor = deployed(checkpoint).get_parameter(name).detach()
    return tensor / (step.reshape(-1, *[1] * (tensor.ndim - 1)) if step.ndim else step)


def test_every_weight_and_bias_stands_on_its_grid(rounded: Checkpoint) -> None:
    bits = rounded.quantization["bits"]
    assert {bits["fc.weight"], bits["stem.conv.weight"], bits["block1.pointwise.conv.weight"]} == {8, 2, 4}
    assert {number for name, number in bits.items() if name.endswith(".bias")} == {8}
    assert len(bits) == 9  # depthwise convolutions and the last layer have no bias
    for name, number in bits.items():
        counted = integers(rounded, name)
        assert torch.allclose(counted, counted.round(), atol=1e-4)
        assert -(2 ** (number - 1)) <= counted.round().min() <= counted.round().max() < 2 ** (number - 1)


def test_biases_share_one_step(rounded: Checkpoint) -> None:
    assert len({float(step) for name, step in rounded.scales.items() if name.endswith(".bias")}) == 1


def test_checkpoint_is_a_plain_network_with_the_rounded_weights(rounded: Checkpoint, few: DataSet, tmp_path) -> None:
    save_checkpoint(rounded, tmp_path / "r.safetensors")
    loaded = load_checkpoint(tmp_path / "r.safetensors")
    assert loaded.quantization == rounded.quantization
    assert {name: rounded.metrics[name] for name in ("validation_top1", "test_top1")} == measure(loaded.module(), few)
    inputs = torch.randn(5, 1, 28, 28)
    torch.testing.assert_close(loaded.module()(inputs), deployed(loaded)(inputs))


def test_what_it_was_before_is_told(rounded: Checkpoint, normed: Checkpoint) -> None:
    assert rounded.metrics["validation_top1_float"] == normed.metrics["validation_top1"]
    assert rounded.lineage[-1].parents == (normed.sha256,)
    assert rounded.lineage[-1].settings["layer_bits"] == {"fc": 8, "stem.conv": 2}


def test_channels_have_steps_of_their_own_where_asked(dense: Checkpoint, few: DataSet) -> None:
    made = train_rounded(dense, few, QatSettings(ONE, precision="int2-weights", steps="channel", round_biases=False))
    assert {name: tuple(step.shape) for name, step in made.scales.items()} == {
        "conv1.weight": (16,), "conv2.weight": (32,), "fc1.weight": (32,), "fc2.weight": (10,),
    }  # fmt: skip
    counted = integers(made, "fc1.weight")
    assert set(counted.round().unique().tolist()) == {-2.0, -1.0, 0.0, 1.0}


@pytest.mark.parametrize("layers", [{}, {"fc*": 32}])
@pytest.mark.parametrize("kind", ["normed", "dense"])
def test_one_step_for_all_changes_nothing_but_scales(kind: str, layers: dict[str, int], request) -> None:
    checkpoint = request.getfixturevalue(kind)
    x = torch.randn(checkpoint.inputs[0].at_batch(16), generator=torch.Generator().manual_seed(0))
    made = ste.gridded(checkpoint, 4, layers=layers, steps="network", biases=False)
    assert len({float(step) for step in made.steps().values()}) == 1
    for name, step in made.steps().items():
        free = made.module.get_parameter(f"{name.rpartition('.')[0]}.parametrizations.weight.original")
        torch.testing.assert_close(ste.best_steps(free.detach().reshape(1, -1), 4)[0], step)
    module = ste.folded(checkpoint)
    before = module(x)
    ste._equalize(module, made.bits)
    torch.testing.assert_close(module(x), before, rtol=1e-4, atol=1e-4)


def test_one_step_is_for_layers_in_a_row(few: DataSet) -> None:
    residual = train("resnet18", {}, replace(few, train=few.train.pick(slice(16))), ONE)
    with pytest.raises(UsageError, match=r"^one step is for layers in a row .*, not around \w+; hint: --steps layer$"):
        ste.gridded(residual, 4, layers={}, steps="network", biases=False)


def test_a_layer_of_32_bits_stays_float(dense: Checkpoint, few: DataSet) -> None:
    made = train_rounded(dense, few, QatSettings(ONE, precision="int4-weights", layer_bits={"conv1": 32}))
    assert not {"conv1.weight", "conv1.bias"} & made.scales.keys()


def test_training_makes_up_for_rounding(dense: Checkpoint, few: DataSet) -> None:
    module = ste.gridded(dense, 2, layers={}, steps="layer", biases=True).module
    made = train_rounded(dense, few, QatSettings(TrainSettings(epochs=4), precision="int2-weights"))
    assert made.metrics["validation_top1"] > measure(module, few)["validation_top1"]


def test_same_seed_gives_the_same_weights(dense: Checkpoint, few: DataSet) -> None:
    one, same = (train_rounded(dense, few, QatSettings(ONE, precision="int4-weights")) for _ in range(2))
    assert one.sha256 == same.sha256


@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=30), st.sampled_from(ste.BITS))
def test_grid_is_idempotent_and_near(values: list[float], bits: int) -> None:
    weight = torch.tensor(values)
    step = ste.best_steps(weight[None], bits)
    grid = ste.grid(torch.nn.Parameter(step.log().reshape(())), bits)
    once = grid(weight)
    torch.testing.assert_close(grid(once), once)
    inside = (weight >= -(2 ** (bits - 1)) * step) & (weight <= (2 ** (bits - 1) - 1) * step)
    assert bool(((once - weight).abs()[inside] <= step * 0.5001).all())


def test_first_steps_are_those_with_the_least_error() -> None:
    rows = torch.tensor([[1.0, 1.0, 1.0, -1.0, 0.0, 7.0], [7.0, 6.0, 5.0, 4.0, 3.0, 2.0]])
    steps = ste.best_steps(rows, 4)
    assert steps[1] == 1.0  # all of them are integers
    widest = ((rows / 1.0).round().clamp(-8, 7) - rows).square().sum(1)
    chosen = ((rows / steps[:, None]).round().clamp(-8, 7) * steps[:, None] - rows).square().sum(1)
    assert bool((chosen <= widest).all())


def test_gradients_are_those_of_the_paper() -> None:
    """Esser et al., eq. 3, times the step, for its logarithm is learned; by hand for step 1 and three values."""
    log_step = torch.nn.Parameter(torch.zeros(()))
    weight = torch.tensor([0.3, -9.0, 20.0], requires_grad=True)
    ste.grid(log_step, 4)(weight).sum().backward()
    assert weight.grad is not None and log_step.grad is not None
    assert weight.grad.tolist() == [1.0, 0.0, 0.0]
    assert float(log_step.grad) == pytest.approx((0 - 0.3) - 8 + 7)


def test_bits_go_by_patterns_of_which_the_first_counts(normed: Checkpoint) -> None:
    layers = {"block1.*": 2, "*.depthwise": 8}
    bits = ste.gridded(normed, 4, layers=layers, steps="layer", biases=False).bits
    assert {name.removesuffix(".weight"): number for name, number in bits.items()} == {
        "stem.conv": 4, "block1.depthwise": 2, "block1.pointwise.conv": 2, "block2.depthwise": 8,
        "block2.pointwise.conv": 4, "fc": 4,
    }  # fmt: skip


def test_unknown_layer_is_refused_with_those_there_are(dense: Checkpoint, few: DataSet) -> None:
    with pytest.raises(UsageError, match="no layer 'fc9' has weights to round") as caught:
        train_rounded(dense, few, QatSettings(ONE, precision="int4-weights", layer_bits={"fc9": 8}))
    assert caught.value.hint == "conv1, conv2, fc1, fc2"


def test_bits_that_no_file_can_hold_are_refused() -> None:
    with pytest.raises(UsageError, match="layer 'fc' shall have 3 bits") as caught:
        QatSettings(ONE, precision="int4-weights", layer_bits={"fc": 3})
    assert caught.value.hint == "one of 2, 4, 8, 32"
    with pytest.raises(UsageError, match="bits and steps are chosen for weights alone"):
        QatSettings(ONE, steps="channel")


def test_network_without_weights_to_round_is_refused(dense: Checkpoint, few: DataSet) -> None:
    every = dict.fromkeys(("conv1", "conv2", "fc1", "fc2"), 32)
    with pytest.raises(AnswerIsNo, match="no layer has weights to round"):
        train_rounded(dense, few, QatSettings(ONE, precision="int4-weights", layer_bits=every))


def test_tiny_blocks_are_alike_and_pooling_stands_before_and_amid_them() -> None:
    module = build("tiny_cnn", {"channels": [6, 6, 6, 6]})
    assert [name for name, _ in module.named_children()] == [
        "stem", "pool1", "block1", "block2", "pool2", "block3", "mean", "flatten", "fc",
    ]  # fmt: skip
    shapes = [[tuple(p.shape) for p in block.parameters()] for name, block in module.named_children() if "bl" in name]
    assert shapes[0] == shapes[1] == shapes[2]
    assert module(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
