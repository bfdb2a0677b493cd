from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memopt.batching import MemoryLine, largest_batch, memory_line
from memopt.errors import OutOfResource
from memopt.manifest import EngineInfo, MemoryPoint, Profile, Variant, VariantMemory


def measured(*points: tuple[int, int | None], engine: EngineInfo | None = None) -> Variant:
    made = tuple(MemoryPoint(batch, private, 0, 0, "by hand", "onnxruntime") for batch, private in points)
    return Variant("v", "n", "fp32", "r", "m", "0" * 64, VariantMemory(100, 1000, 10, made), engine=engine)


def line_of(variant: Variant, runtime: str = "onnxruntime", device: str = "cpu") -> MemoryLine:
    return memory_line(variant, runtime=runtime, device=device)


def profile(batch: int, activation_bytes: int) -> Profile:
    return Profile({"x": (1,)}, {"x": (batch,)}, {"x": (batch,)}, activation_bytes)


def test_two_points_give_the_line() -> None:
    line = line_of(measured((1, 110), (11, 210)))
    assert (line.fixed_bytes, line.per_sample_bytes) == (100, 10)


@pytest.mark.parametrize("points", [(), ((1, 110),), ((1, 110), (32, None))])
def test_without_two_points_the_plan_stands_in(points: tuple[tuple[int, int | None], ...]) -> None:
    line = line_of(measured(*points))
    assert (line.fixed_bytes, line.per_sample_bytes) == (1000, 10)
    assert line.method.startswith("planned")


@pytest.mark.parametrize(("runtime", "device"), [("tensorrt", "cpu"), ("onnxruntime", "cuda")])
def test_points_of_another_runtime_or_device_do_not_count(runtime: str, device: str) -> None:
    assert line_of(measured((1, 1), (2, 2)), runtime, device).method.startswith("planned")


def test_an_engines_profiles_give_the_line() -> None:
    info = EngineInfo(
        "tensorrt", "11", ("sm90",), "linux", "x86_64", (profile(1, 50), profile(11, 150)), 1000, "0" * 64
    )
    line = line_of(measured(engine=info))
    assert (line.at(1), line.at(11)) == (1050, 1150)
    alone = line_of(measured(engine=replace(info, profiles=(profile(8, 50),))))
    assert (alone.at(1), alone.at(8)) == (1050, 1050)


def test_a_slope_within_the_noise_becomes_the_planned_one() -> None:
    line = line_of(measured((1, 5000), (32, 4000)))
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
