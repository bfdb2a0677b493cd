from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memopt.batching import MemoryLine, largest_batch, memory_line
from memopt.errors import OutOfResource
from memopt.manifest import MemoryPoint, VariantMemory


def measured(*points: tuple[int, int | None]) -> VariantMemory:
    made = tuple(MemoryPoint(batch, private, 0, 0, "by hand", "onnxruntime") for batch, private in points)
    return VariantMemory(100, 1000, 10, made)


def test_two_points_give_the_line() -> None:
    line = memory_line(measured((1, 110), (11, 210)), runtime="onnxruntime")
    assert (line.fixed_bytes, line.per_sample_bytes) == (100, 10)


@pytest.mark.parametrize("points", [(), ((1, 110),), ((1, 110), (32, None))])
def test_without_two_points_the_plan_stands_in(points: tuple[tuple[int, int | None], ...]) -> None:
    line = memory_line(measured(*points), runtime="onnxruntime")
    assert (line.fixed_bytes, line.per_sample_bytes) == (1000, 10)
    assert line.method.startswith("planned")


def test_points_of_another_runtime_do_not_count() -> None:
    assert memory_line(measured((1, 1), (2, 2)), runtime="tensorrt").method.startswith("planned")


def test_a_slope_within_the_noise_becomes_the_planned_one() -> None:
    line = memory_line(measured((1, 5000), (32, 4000)), runtime="onnxruntime")
    assert (line.at(1), line.per_sample_bytes) == (5000, 10)


@given(st.integers(0, 10**9), st.integers(0, 10**7), st.integers(1, 10**10))
def test_the_largest_batch_fits_and_the_next_does_not(fixed: int, per_sample: int, limit: int) -> None:
    line = MemoryLine(fixed, per_sample, "by hand")
    if line.at(1) > limit:
        with pytest.raises(OutOfResource, match="at batch 1"):
            largest_batch(line, limit)
        return
    fit = largest_batch(line, limit, most=500)
    assert line.at(fit.batch) == fit.need_bytes <= limit
    assert fit.batch == 500 or line.at(fit.batch + 1) > limit
    assert all(line.at(batch) == need for batch, need in fit.curve)
