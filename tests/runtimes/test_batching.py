from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memopt.batching import MemoryCurve, largest_batch, memory_curve, run_in_batches
from memopt.errors import InputRefused, IntegrityError, OutOfResource
from memopt.manifest import EngineInfo, MemoryPoint, Profile, Variant, VariantMemory
from memopt.tensors import Array, TensorSpec


def variant(*points: tuple[int, int | None], engine: EngineInfo | None = None, weights: int | None = 1000) -> Variant:
    made = tuple(MemoryPoint(batch, private, 0, 0, "by hand", "onnxruntime") for batch, private in points)
    return Variant("v", "n", "fp32", "r", "m", "0" * 64, VariantMemory(100, weights, 10, made), engine=engine)


def curve_of(of: Variant, runtime: str = "onnxruntime", device: str = "cpu") -> MemoryCurve:
    curve = memory_curve(of, runtime=runtime, device=device)
    assert curve is not None
    return curve


def profile(low: int, high: int, activation_bytes: int | None) -> Profile:
    return Profile({"x": (low,)}, {"x": (high,)}, {"x": (high,)}, activation_bytes)


ENGINE = EngineInfo(
    "tensorrt", "11", ("sm90",), "linux", "x86_64", (profile(1, 1, 50), profile(2, 32, 150)), 1000, "0" * 64
)


def test_measured_points_give_the_curve_and_nothing_is_known_beyond() -> None:
    curve = curve_of(variant((1, 110), (11, 210), (21, 250)))
    assert [curve.at(batch) for batch in (1, 6, 11, 16, 21)] == [110, 160, 210, 230, 250]
    assert curve.last_batch == 21
    assert largest_batch(curve, 10**9).batch == 21


@pytest.mark.parametrize("points", [(), ((1, None),)])
def test_without_measured_points_the_plan_stands_in(points: tuple[tuple[int, int | None], ...]) -> None:
    curve = curve_of(variant(*points))
    assert (curve.at(1), curve.at(100)) == (1010, 2000)
    assert curve.method.startswith("planned")


@pytest.mark.parametrize(("runtime", "device"), [("tensorrt", "cpu"), ("onnxruntime", "cuda")])
def test_points_of_another_runtime_or_device_do_not_count(runtime: str, device: str) -> None:
    assert curve_of(variant((1, 1), (2, 2)), runtime, device).method.startswith("planned")


def test_an_engine_takes_a_whole_profile_from_its_smallest_batch_on() -> None:
    curve = curve_of(variant(engine=ENGINE))
    assert [curve.at(batch) for batch in (1, 2, 5, 32)] == [1050, 1150, 1150, 1150]
    assert largest_batch(curve, 1100).batch == 1
    assert largest_batch(curve, 1150).batch == 32


def test_what_is_not_known_is_no_curve() -> None:
    unknown = replace(ENGINE, profiles=(profile(1, 1, None),))
    assert memory_curve(variant(engine=unknown), runtime="tensorrt", device="cuda") is None
    assert memory_curve(variant(engine=replace(ENGINE, profiles=())), runtime="tensorrt", device="cuda") is None
    assert memory_curve(variant(engine=ENGINE, weights=None), runtime="tensorrt", device="cuda") is None
    assert memory_curve(variant(weights=None), runtime="onnxruntime", device="cpu") is None


@pytest.mark.parametrize("shapes", [{}, {"x": ()}, {"x": (-1,)}])
def test_a_profile_has_shapes(shapes: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(IntegrityError, match="a profile has no shapes"):
        Profile(shapes, shapes, shapes)
    with pytest.raises(IntegrityError, match="or unlike ones"):
        Profile({"x": (1,)}, {"y": (1,)}, {"x": (1,)})


@given(st.lists(st.integers(1, 10**7), min_size=1, max_size=5), st.integers(1, 10**8))
def test_the_largest_batch_fits_and_no_larger_one_does(steps: list[int], limit: int) -> None:
    sizes = np.cumsum(steps).tolist()
    curve = MemoryCurve(tuple((8 * i + 1, size) for i, size in enumerate(sizes)), "by hand")
    if curve.at(1) > limit:
        with pytest.raises(OutOfResource, match="at batch 1"):
            largest_batch(curve, limit)
        return
    fit = largest_batch(curve, limit)
    assert curve.at(fit.batch) == fit.need_bytes <= limit
    assert fit.batch == curve.last_batch or curve.at(fit.batch + 1) > limit
    assert all(curve.at(batch) == need for batch, need in fit.curve)


class Scaled:
    """Samples times a scale that has no batch dimension."""

    inputs = (TensorSpec("x", "float32", ("batch", 2)), TensorSpec("scale", "float32", (2,)))
    outputs = (TensorSpec("y", "float32", ("batch", 2)),)
    placement, device_bytes = "numpy", None

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        return [feeds["x"] * feeds["scale"]]

    def trim(self) -> None:
        """Nothing to give back."""

    def close(self) -> None:
        """Nothing to free."""


@pytest.mark.parametrize("shape", [("time", 2), (1, 2), ()])
def test_a_model_whose_outputs_have_no_batch_is_never_split(shape: tuple[int | str, ...]) -> None:
    session = Scaled()
    session.outputs = (TensorSpec("y", "float32", shape),)
    feeds = {"x": np.zeros((7, 2), np.float32), "scale": np.ones(2, np.float32)}
    assert len(run_in_batches(session, feeds, batch=7)[0]) == 7
    with pytest.raises(InputRefused, match="7 samples at once, 3 fit, and the model's outputs cannot be put together"):
        run_in_batches(session, feeds, batch=3)


def test_an_input_without_a_batch_dimension_goes_whole_into_every_piece() -> None:
    feeds = {"x": np.arange(14, dtype=np.float32).reshape(7, 2), "scale": np.array([2, 3], np.float32)}
    (got,) = run_in_batches(Scaled(), feeds, batch=3)
    assert np.array_equal(got, feeds["x"] * feeds["scale"])
