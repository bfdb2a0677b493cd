from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memopt.errors import AnswerIsNo, UsageError
from memopt_models.checkpoint import Checkpoint
from memopt_models.targets import Target, Trial, search

PARAMS = Target("params", 1.0)


def reach(cost: Callable[[float], int], limit: int, checkpoint: Checkpoint) -> tuple[Trial, list[float]]:
    """What the search finds for a network of this cost, and the shares that it tried."""
    tried: list[float] = []

    def attempt(kept: float) -> Trial:
        tried.append(kept)
        return Trial(kept, cost(kept), checkpoint)

    return search(attempt, before=cost(1.0), limit=limit, target=PARAMS), tried


def parabola(kept: float) -> int:
    return round(1e6 * kept**2)


@given(power=st.floats(0.8, 2.5), floor=st.integers(0, 2000), share=st.floats(0.05, 0.95))
def test_network_within_the_limit_and_near_it_is_found_in_few_trials(
    power: float, floor: int, share: float, dense: Checkpoint
) -> None:
    def cost(kept: float) -> int:
        return floor + round(1e6 * kept**power)

    limit = int(share * cost(1.0))
    found, tried = reach(cost, limit, dense)
    assert 0.97 * limit <= found.cost <= limit
    assert len(tried) <= 6


@given(channels=st.integers(2, 64), share=st.floats(0.05, 0.95))
def test_no_larger_network_of_whole_channels_would_do(channels: int, share: float, dense: Checkpoint) -> None:
    def cost(kept: float) -> int:
        return 1000 * max(int(channels * kept + 1e-6), 1) ** 2

    limit = int(share * cost(1.0))
    if limit < 1000:
        return
    found, _ = reach(cost, limit, dense)
    larger = (int(found.cost / 1000) ** 0.5 + 1) ** 2 * 1000
    assert found.cost <= limit
    assert larger > limit or found.cost >= 0.98 * limit


def test_limit_below_the_smallest_network_is_out_of_reach(dense: Checkpoint) -> None:
    with pytest.raises(AnswerIsNo) as raised:
        reach(lambda kept: 5000 + parabola(kept), 4000, dense)
    assert str(raised.value) == "the target is 4000 parameters; the least that can be reached is 5400 parameters"


def test_costs_are_shown_as_they_are_counted() -> None:
    assert Target("macs", 0.5).show(1200) == "1200 multiply-accumulates"
    assert Target("memory", 0.5, batch=8).show(2**21) == "2.00 MiB of planned memory at batch 8"


@pytest.mark.parametrize(("amount", "limit"), [(0.5, 500), (0.3339, 333), (700.0, 700), (1.0, 1)])
def test_below_one_an_amount_is_a_share(amount: float, limit: int) -> None:
    assert Target("params", amount).limit(1000) == limit


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"measure": "bytes", "amount": 0.5}, "target 'bytes' is not known; hint: macs, params, memory"),
        ({"measure": "macs", "amount": 0.0}, "the target of macs is 0.0; hint: --target-macs 0.5"),
        ({"measure": "macs", "amount": float("nan")}, "the target of macs is nan; hint: --target-macs 0.5"),
        ({"measure": "memory", "amount": 0.5, "batch": 0}, "batch is 0; hint: --batch 1"),
    ],
)
def test_impossible_targets_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        Target(**settings)
    assert str(raised.value) == message
