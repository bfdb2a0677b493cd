from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from memopt.errors import UsageError
from memopt_models.ranking import Candidate, Cut, choose, protected_layers


def candidate(*importance: float, blocks: int = 1) -> Candidate:
    return Candidate(torch.tensor(importance, dtype=torch.float32), blocks)


@pytest.mark.parametrize(
    ("cut", "candidates", "going"),
    [
        (Cut(0.5), [candidate(3, 1, 2, 4), candidate(2, 1)], [[1, 2], [1]]),
        (Cut(0.5, scope="global"), [candidate(3, 1, 2, 4), candidate(0.1, 0.2)], [[1], [0]]),  # one of each stays
        (Cut(0.5, scope="global"), [candidate(9, 8, 7, 6), candidate(1, 2, 3, 4)], [[], [0, 1, 2]]),
        (Cut(0.25, round_to=2), [candidate(4, 3, 2, 1)], [[2, 3]]),  # three would stay: rounded down to two
        (Cut(0.5, round_to=8), [candidate(4, 3, 2, 1)], [[]]),  # too small to be a multiple of eight
        (Cut(0.9, round_to=2), [candidate(4, 3, 2, 1)], [[2, 3]]),  # a multiple, not nothing
        (Cut(0.99), [candidate(2, 1)], [[1]]),  # one stays
        (Cut(0.5), [candidate(1, 1, 1, 1)], [[0, 1]]),  # of equals the first go
        (Cut(0.5), [candidate(4, 1, 2, 3, blocks=2)], [[1, 3]]),  # means 3 and 2: the second of both blocks
        (Cut(0.3, round_to=4), [candidate(*range(12), blocks=2)], [[0, 1, 6, 7]]),
        (Cut(0.5), [], []),
        (Cut(0.5, scope="global"), [], []),
    ],
)
def test_channels_that_go_are_those_computed_by_hand(
    cut: Cut, candidates: list[Candidate], going: list[list[int]]
) -> None:
    assert choose(candidates, cut) == going


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    ratio=st.floats(0.01, 0.99),
    round_to=st.integers(1, 9),
    scope=st.sampled_from(["layer", "global"]),
    seed=st.integers(0, 99),
)
def test_something_stays_everywhere_and_is_a_multiple_where_anything_went(
    sizes: list[int], ratio: float, round_to: int, scope: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    candidates = [Candidate(torch.rand(size, generator=generator)) for size in sizes]
    for size, going in zip(sizes, choose(candidates, Cut(ratio, scope=scope, round_to=round_to)), strict=True):
        assert going == sorted(set(going))
        assert len(going) < size
        assert not going or (size - len(going)) % round_to == 0


@given(size=st.integers(2, 200), ratio=st.floats(0.01, 0.98), more=st.floats(0.001, 0.01))
def test_a_higher_ratio_takes_no_less(size: int, ratio: float, more: float) -> None:
    candidates = [Candidate(torch.arange(float(size)))]
    less, rest = (choose(candidates, Cut(each))[0] for each in (ratio, ratio + more))
    assert set(less) <= set(rest)


def test_protected_layers_are_those_that_match_with_all_inside() -> None:
    module = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, 2))
    assert protected_layers(module, ("0",)) == set(module[0].modules())
    assert protected_layers(module, ("*.0", "1")) == {module[0][0], module[1]}
    assert protected_layers(module, ()) == set()


def test_pattern_that_protects_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^no layer is called 'fc\*'; hint: --protect 0$"):
        protected_layers(nn.Sequential(nn.Linear(2, 2)), ("fc*",))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 0.0}, "ratio is 0.0, it lies between 0 and 1; hint: --ratio 0.5"),
        ({"ratio": 1.0}, "ratio is 1.0, it lies between 0 and 1; hint: --ratio 0.5"),
        ({"ratio": float("nan")}, "ratio is nan, it lies between 0 and 1; hint: --ratio 0.5"),
        ({"method": "l3"}, "pruning method 'l3' is not known; hint: l1, l2, taylor, bn-scale, random"),
        ({"scope": "local"}, "pruning scope 'local' is not known; hint: layer, global"),
        ({"round_to": 0}, "round_to is 0, at least 1 is needed"),
    ],
)
def test_impossible_cuts_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        Cut(**settings)
    assert str(raised.value) == message
