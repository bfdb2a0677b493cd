"""Which layers are compared, and how far apart two feature maps are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from memopt.errors import UsageError
from memopt_models.features import distance, pair_up, pupil
from memopt_models.networks import build

EXAMPLE = torch.zeros(2, 1, 28, 28)


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(784, 10)
        self.tokens = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.tokens(x.flatten(2)).flatten(1))


@pytest.fixture(scope="module")
def student() -> nn.Module:
    return build("ds_cnn", {"width": 2, "depth": 2})


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return build("simple_cnn", {"hidden": 16})


def test_last_feature_maps_before_pooling_are_chosen(student: nn.Module, teacher: nn.Module) -> None:
    assert pair_up(student, teacher, ["auto"], EXAMPLE) == [("block2", "pool2")]


def test_projection_leads_from_channels_of_one_to_those_of_the_other(student: nn.Module, teacher: nn.Module) -> None:
    pairs = pair_up(student, teacher, ["block1=conv1", "fc=fc1"], EXAMPLE)
    made = pupil(student, teacher, pairs, EXAMPLE, seed=0)
    assert [tuple(each.weight.shape) for each in made.projections] == [(16, 4, 1, 1), (16, 10)]
    assert torch.equal(made.eval()(EXAMPLE), student.eval()(EXAMPLE))
    again = pupil(student, teacher, pairs, EXAMPLE, seed=0)
    assert torch.equal(made.projections[0].weight, again.projections[0].weight)


def test_modes_stay_as_they_were(student: nn.Module, teacher: nn.Module) -> None:
    student.train()
    pair_up(student, teacher, ["auto"], EXAMPLE)
    assert student.training
    assert not any(module._forward_hooks for module in student.modules())


def test_distance_is_a_share_of_what_is_wanted() -> None:
    wanted = torch.randn(3, 5, 4, 4)
    assert float(distance(wanted, wanted)) == 0
    assert float(distance(torch.zeros_like(wanted), wanted)) == pytest.approx(1)
    assert float(distance(torch.zeros_like(wanted), 100 * wanted)) == pytest.approx(1)


def test_larger_map_is_pooled() -> None:
    small = torch.randn(3, 5, 2, 2)
    large = small.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert float(distance(large, small)) == pytest.approx(0, abs=1e-6)
    assert float(distance(small, large)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("odd=conv1", "the student has no layer 'odd'; hint: its last ones: block2, pool, flatten, fc"),
        ("block1=odd", "the teacher has no layer 'odd'; hint: its last ones: flatten, fc1, relu3, fc2"),
        (
            "block1=fc1",
            "'block1' gives (2, 4, 14, 14), 'fc1' gives (2, 16): one is a map and the other is not; "
            "hint: --features auto",
        ),
    ],
)
def test_layers_that_cannot_be_compared_are_refused(
    student: nn.Module, teacher: nn.Module, asked: str, message: str
) -> None:
    with pytest.raises(UsageError) as raised:
        pair_up(student, teacher, [asked], EXAMPLE)
    assert str(raised.value) == message


def test_network_without_feature_maps_is_refused(teacher: nn.Module) -> None:
    with pytest.raises(UsageError, match="the student has no layer with a feature map; hint: --features STUDENT=TEACH"):
        pair_up(Flat(), teacher, ["auto"], EXAMPLE)
    with pytest.raises(
        UsageError, match=r"layer 'tokens' of the student gives \(2, 1, 784\), neither a map nor features"
    ):
        pair_up(Flat(), teacher, ["tokens=conv1"], EXAMPLE)
