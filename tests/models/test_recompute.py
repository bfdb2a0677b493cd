from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torchvision.models import VisionTransformer

from memopt.errors import InputRefused, UsageError
from memopt_models import networks
from memopt_models.recompute import recomputed

# Residual, with dropout, flat, dense (a list as input), branches, depthwise separable.
NETWORKS = (
    "resnet18", "mobilenet_v3_small", "vgg11_bn", "densenet121", "googlenet", "shufflenet_v2_x0_5", "ds_cnn",
    "simple_cnn",
)  # fmt: skip


def _step(module: nn.Module, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients, then buffers, after a step that draws random numbers."""
    torch.manual_seed(1)
    module(inputs).square().mean().backward()
    gradients = {f"{name}.grad": each.grad for name, each in module.named_parameters()}
    return {**gradients, **{name: each.clone() for name, each in module.named_buffers()}}


@pytest.mark.parametrize("network", NETWORKS)
def test_gradients_and_running_statistics_are_the_same(network: str) -> None:
    torch.manual_seed(0)
    channels, size = (1, 28) if network in networks.NETWORKS else (3, 33)
    settings = networks.complete(network, {}, classes=5, shape=(channels, size, size))
    _check_same(networks.build(network, settings).train(), torch.rand(2, channels, size, size))


def test_gradients_of_an_encoder_are_the_same() -> None:
    encoder = VisionTransformer(
        image_size=32, patch_size=8, num_layers=4, num_heads=2, hidden_dim=8, mlp_dim=16, dropout=0.1, num_classes=5
    )
    nn.init.normal_(encoder.heads.head.weight)
    _check_same(encoder.train(), torch.rand(2, 3, 32, 32))


def _check_same(module: nn.Module, inputs: torch.Tensor) -> None:
    again = copy.deepcopy(module)
    expected = _step(module, inputs)
    with recomputed(again):
        found = _step(again, inputs)
        assert list(again.state_dict()) == list(module.state_dict())
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert not any("forward" in vars(each) for each in again.modules())


def _held_bytes(module: nn.Module, inputs: torch.Tensor) -> int:
    """Different memory that autograd holds between forward and backward."""
    held: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda each: held.setdefault(each.untyped_storage().data_ptr(), each.untyped_storage().nbytes()) and each,
        lambda each: each,
    ):
        outputs = module(inputs)
    del outputs
    weights = {each.untyped_storage().data_ptr() for each in module.parameters()}
    return sum(size for pointer, size in held.items() if pointer not in weights)


def test_a_block_holds_its_input_alone() -> None:
    def block() -> nn.Module:
        return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.SiLU())

    module = nn.Sequential(*[nn.Sequential(block()) for _ in range(4)]).train()
    inputs = torch.rand(2, 4, 8, 8)
    plain = _held_bytes(module, inputs)
    assert plain >= 4 * 3 * inputs.nbytes  # of each block: the inputs of convolution, norm and activation
    with recomputed(module):
        assert _held_bytes(module, inputs) == 4 * inputs.nbytes


def test_nothing_is_different_without_gradients() -> None:
    module = networks.build("ds_cnn", {}).eval()
    inputs = torch.rand(2, 1, 28, 28)
    expected = module(inputs)
    with recomputed(module), torch.inference_mode():
        assert torch.equal(module(inputs), expected)


class _Spoils(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Hardswish(inplace=True), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def test_a_block_that_writes_into_its_input_is_refused_and_not_computed_wrongly() -> None:
    module = nn.Sequential(nn.Linear(4, 4), _Spoils(), nn.Linear(4, 4))
    with recomputed(module), pytest.raises(InputRefused) as raised:
        module(torch.rand(2, 4))
    assert str(raised.value) == (
        "a _Spoils of the network writes into its input and cannot be computed again; hint: --checkpointing off"
    )


@pytest.mark.parametrize("first", [nn.Hardswish(inplace=True), nn.Linear(4, 4)])
def test_a_layer_that_works_in_place_does_not_head_a_block(first: nn.Module) -> None:
    layers = [first, nn.Linear(4, 4), nn.Hardswish(inplace=True), nn.Linear(4, 4), nn.Hardswish(inplace=True)]
    module = nn.Sequential(*layers)
    again, inputs = copy.deepcopy(module), torch.rand(2, 4)
    expected = _step(module, inputs.clone())
    with recomputed(again):
        found = _step(again, inputs.clone())
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_network_without_blocks_is_refused() -> None:
    with pytest.raises(UsageError) as raised, recomputed(nn.Linear(2, 2)):
        pass
    assert str(raised.value) == ("the network has no blocks that could be computed again; hint: --checkpointing off")
