"""Places on a residual block, worked out by hand, and the rules that decide what is absorbed or constant."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from memopt_models.integer_kernels import PLACES, Places
from memopt_models.trace import quiet, trace


class Residual(nn.Module):
    """conv, relu, conv, and what was before added; then pooled and classified."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = (nn.Conv2d(n, 4, 3, padding=1) for n in (1, 4, 4))
        self.fc = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        x = (self.second(self.first(x).relu()) + x).relu()
        return self.fc(x.mean((2, 3)))


class Clipped(nn.Module):
    def __init__(self, low: float) -> None:
        super().__init__()
        self.conv, self.low = nn.Conv2d(1, 2, 3), low

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).clamp(self.low, 6.0)


class Scaled(nn.Module):
    """What is multiplied with a weight of its own has no integer kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gain, self.fc = nn.Conv2d(1, 2, 3), nn.Parameter(torch.ones(2, 1, 1)), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc((self.conv(x) * self.gain).flatten(1))


def places(module: nn.Module, target: str, *, size: int = 4) -> Places:
    with quiet():
        program = trace(module.eval(), torch.randn(2, 1, size, size), "a network").run_decompositions({})
    return PLACES[target](program.module(check_guards=False).graph)


def names(found: Places) -> tuple[set[str], set[str]]:
    """What is quantized where it is written, and where it is read."""
    reads = {
        f"{tensor.target if tensor.op == 'placeholder' else tensor.name} {node.name}" for tensor, node in found.reads
    }
    return {node.name.split("_")[0] + node.name[-2:] * ("_" in node.name) for node in found.written}, reads


def test_cpu_quantizes_both_sides_of_a_residual_add_and_what_is_absorbed_only_once() -> None:
    written, reads = names(places(Residual(), "cpu"))
    # relu and relu_1 with their convolutions; conv2d_2 on its own, since the Add reads it. The Add is read by a mean
    # alone, which computes in floats.
    assert written == {"relu", "relu_1", "conv2d_2"}
    assert reads == {"x conv2d", "mean linear"}


def test_tensorrt_quantizes_before_layers_and_the_side_of_an_add_that_is_no_convolution() -> None:
    found = places(Residual(), "tensorrt")
    assert not found.written
    assert names(found)[1] == {
        "x conv2d", "relu conv2d_1", "relu_1 conv2d_2", "mean linear", f"relu {add_of(found)}",
    }  # fmt: skip


def add_of(found: Places) -> str:
    return next(node.name for _, node in found.reads if node.name.startswith("add"))


@pytest.mark.parametrize(("low", "written"), [(0.0, "clamp"), (-1.0, "conv2d")])
def test_only_a_clip_that_starts_at_zero_is_absorbed(low: float, written: str) -> None:
    assert names(places(Clipped(low), "cpu"))[0] == {written}


def test_product_with_a_weight_stays_float() -> None:
    found = places(Scaled(), "cpu")
    assert {node.name for node in found.written} == {"conv2d", next(n.name for n in found.origins)}
    assert [str(tensor.name)[:3] for tensor, _ in found.reads] == ["x", "mul"]


def test_what_only_moves_values_takes_the_range_of_what_it_moves() -> None:
    pooled = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3))
    found = places(pooled, "cpu")
    assert {origin.name for origin in found.origins.values()} == {"relu"}
    assert len(found.origins) == 2
