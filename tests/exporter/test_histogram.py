import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memopt.errors import InputRefused
from memopt_export.affine import asymmetric_uint8, symmetric_int8
from memopt_export.histogram import BINS, Histogram, by_entropy, by_mse, by_percentile

seeds = st.integers(0, 2**16)


def counted(values, low=None, high=None):
    """A histogram of values over their own range, or a given one; and that range."""
    values = np.asarray(values, np.float32)
    bounds = float(values.min() if low is None else low), float(values.max() if high is None else high)
    histogram = Histogram.between(*bounds)
    histogram.count(values)
    return histogram, bounds


def normal(seed=0, n=4000):
    return np.random.default_rng(seed).normal(size=n).astype(np.float32)


def heavy(seed=0):
    """Values whose largest are a hundred times what most are."""
    return np.random.default_rng(seed).standard_t(2, 20_000).astype(np.float32)


TENSORS = {
    "normal": normal(),
    "behind a Relu": np.maximum(normal(), 0),
    "all negative": -np.abs(normal()) - 1,
    "heavy tails": heavy(),
    "one outlier": np.append(normal(), np.float32(500)),
    "constant": np.full(100, 3, np.float32),
    "negative constant": np.full(100, -3, np.float32),
    "zeros": np.zeros(100, np.float32),
    "two values": np.repeat(np.float32([0, 6]), 50),
    "tiny": normal() * np.float32(1e-30),
    "huge": normal() * np.float32(1e30),
}
METHODS = {
    "percentile": lambda histogram, bounds, _: by_percentile(histogram, bounds, 99.9),
    "mse": by_mse,
    "entropy": by_entropy,
}
AFFINES = {"uint8": asymmetric_uint8, "int8": symmetric_int8}


# --- counting


def test_bins_by_hand():
    """Over [-1, 8189] a bin is 1 wide, and zero the middle of bin 1."""
    histogram = Histogram.between(-1, BINS - 3)
    assert (histogram.step, histogram.zero) == (1.0, 1)
    histogram.count(np.float32([-1, 0, 0, 0.4, 0.6, 3, 8189]))
    middles, counts = histogram.occupied()
    assert middles.tolist() == [-1, 0, 1, 3, 8189]
    assert counts.tolist() == [1, 3, 1, 1, 1]


def test_values_beyond_the_ends_are_counted_at_the_ends():
    histogram = Histogram.between(-1, BINS - 3)
    histogram.count(np.float32([-1e9, 1e9, 1e9]))
    assert histogram.counts[[0, -1]].tolist() == [1, 2]
    assert histogram.counts.sum() == 3


@settings(max_examples=50, deadline=None)
@given(low=st.floats(-1e6, 1e6), high=st.floats(-1e6, 1e6), zeros=st.integers(1, 9))
def test_zero_has_a_bin_of_its_own(low, high, zeros):
    low, high = sorted((low, high))
    histogram = Histogram.between(low, high)
    histogram.count(np.zeros(zeros, np.float32))
    middles, counts = histogram.occupied()
    assert (middles.tolist(), counts.tolist()) == ([0.0], [zeros])


@pytest.mark.parametrize("scale", [1e-45, 1e-40, 1e-38, 1e38])
def test_values_of_any_size_are_counted(scale):
    """Below the smallest normal number, one over a step is infinite in float32."""
    values = np.float64([0, 1, 2]) * scale
    histogram, _ = counted(values)
    middles, counts = histogram.occupied()
    np.testing.assert_allclose(middles.repeat(counts), values, atol=1.01 * histogram.step)


@settings(max_examples=30, deadline=None)
@given(seed=seeds, low=st.floats(0, 9), high=st.floats(0.01, 9))
def test_the_middle_of_a_value_s_bin_is_half_a_step_away_at_most(seed, low, high):
    values = np.random.default_rng(seed).uniform(-low, high, 50).astype(np.float32)
    for value in values:
        histogram, _ = counted([value], -low, high)
        (middle,), _ = histogram.occupied()
        assert abs(middle - value) <= 0.501 * histogram.step


@settings(max_examples=20, deadline=None)
@given(seed=seeds, cut=st.integers(0, 4000))
def test_merged_shards_equal_the_whole(seed, cut):
    values = normal(seed)
    whole, bounds = counted(values)
    first, second = (counted(part, *bounds)[0] for part in (values[:cut], values[cut:]))
    np.testing.assert_array_equal(first.merged(second).counts, whole.counts)
    assert whole.counts.sum() == len(values)


def test_values_counted_in_several_chunks_are_all_counted():
    values = np.random.default_rng(0).normal(size=(3, 2**18)).astype(np.float32)
    whole, bounds = counted(values)
    parts = Histogram.between(*bounds)
    for row in values:
        parts.count(row)
    np.testing.assert_array_equal(whole.counts, parts.counts)


def test_different_bins_do_not_merge():
    with pytest.raises(InputRefused, match=r"histograms with different bins cannot be merged; hint: count both within"):
        Histogram.between(0, 1).merged(Histogram.between(0, 2))


# --- ranges


@pytest.mark.parametrize("affine", AFFINES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tensor", TENSORS)
def test_ranges_are_finite_and_lie_within_the_bounds(tensor, method, affine):
    histogram, bounds = counted(TENSORS[tensor])
    low, high = METHODS[method](histogram, bounds, AFFINES[affine])
    assert np.isfinite([low, high]).all()
    assert min(bounds[0], 0) <= low <= high <= max(bounds[1], 0)


@pytest.mark.parametrize("affine", AFFINES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tensor", ["constant", "negative constant", "zeros", "two values"])
def test_values_that_fit_the_levels_are_kept_as_they_are(tensor, method, affine):
    values = TENSORS[tensor]
    histogram, bounds = counted(values)
    chosen = AFFINES[affine](*METHODS[method](histogram, bounds, AFFINES[affine]))
    np.testing.assert_allclose(chosen.dequantize(chosen.quantize(values)), values, rtol=1e-6)


@pytest.mark.parametrize("method", ["mse", "entropy"])
def test_scaled_values_have_a_scaled_range(method):
    values = heavy()
    ranges = []
    for factor in (1, 4):
        histogram, bounds = counted(values * np.float32(factor))
        ranges.append(METHODS[method](histogram, bounds, asymmetric_uint8))
    np.testing.assert_allclose(np.multiply(ranges[0], 4), ranges[1], rtol=1e-5)


@pytest.mark.parametrize("method", ["percentile", "entropy"])
def test_heavy_tails_are_cut(method):
    histogram, bounds = counted(heavy())
    low, high = METHODS[method](histogram, bounds, asymmetric_uint8)
    assert high - low < 0.8 * (bounds[1] - bounds[0])


# --- percentile


def whole_numbers(counts):
    """A histogram whose bins are whole numbers from -1: so often each of them."""
    histogram = Histogram.between(-1, BINS - 3)
    histogram.counts[: len(counts)] = counts
    return histogram


@pytest.mark.parametrize(
    ("percentile", "expected"),
    [
        (100, (-1, 5)),
        (98, (0, 4)),  # one of a hundred left out at each end
        (96, (0, 4)),  # two of a hundred: the two at -1 and 0 would go, were 0 not held by 48 others
        (50, (0, 2)),
    ],
)
def test_percentile_by_hand(percentile, expected):
    histogram = whole_numbers([1, 49, 0, 25, 0, 24, 1])  # -1 once, 0 49 times, 2 25 times, 4 24 times, 5 once
    assert by_percentile(histogram, (-1.0, 5.0), percentile) == expected


@settings(max_examples=30, deadline=None)
@given(seed=seeds, percentile=st.floats(50, 100))
def test_percentile_keeps_its_share_of_values_inside(seed, percentile):
    values = normal(seed, 1000)
    histogram, bounds = counted(values)
    low, high = by_percentile(histogram, bounds, percentile)
    half = 0.501 * histogram.step
    inside = ((values >= low - half) & (values <= high + half)).mean()
    assert inside >= percentile / 100 - 2e-3


def test_a_larger_percentile_keeps_more():
    histogram, bounds = counted(heavy())
    ranges = [by_percentile(histogram, bounds, percentile) for percentile in (90, 99, 99.9, 100)]
    assert [low for low, _ in ranges] == sorted((low for low, _ in ranges), reverse=True)
    assert [high for _, high in ranges] == sorted(high for _, high in ranges)
    assert ranges[-1] == pytest.approx(bounds, abs=histogram.step / 2)


# --- mse


def weighted_error(values, low, high, affine_of, clipping):
    affine = affine_of(low, high)
    squares = (affine.dequantize(affine.quantize(values)) - values.astype(np.float64)) ** 2
    return np.where((values < low) | (values > high), clipping * squares, squares).mean()


@pytest.mark.parametrize("affine", AFFINES)
@pytest.mark.parametrize("tensor", TENSORS)
def test_mse_never_errs_more_than_minmax(tensor, affine):
    values, affine_of = TENSORS[tensor], AFFINES[affine]
    histogram, bounds = counted(values)
    middles, counts = histogram.occupied()
    repeated = middles.repeat(counts)
    errors = [weighted_error(repeated, *each, affine_of, 16) for each in (by_mse(histogram, bounds, affine_of), bounds)]
    assert errors[0] <= errors[1]


def test_mse_errs_less_on_the_values_themselves_where_tails_are_heavy():
    values = heavy()
    histogram, bounds = counted(values)
    found = weighted_error(values, *by_mse(histogram, bounds, asymmetric_uint8), asymmetric_uint8, 1)
    assert found < weighted_error(values, *bounds, asymmetric_uint8, 1)


def test_mse_by_hand():
    """100 000 values at odd quarters up to 25, and one at 500.

    Within 500 a step is 1.96, and a value errs by up to 0.98. Within the least that is tried, 100, a step is 0.39; the
    one value beyond errs by 400, which with its weight of 16 is 25.6 for each of the others: so it is not cut.
    Were it a millionth of the values, it would be.
    """
    middles = np.linspace(0.25, 24.75, 50)
    for most, cut in ((10**5, False), (10**8, True)):
        histogram, bounds = counted(middles, 0, 500)
        histogram.counts[:] *= most // 50
        histogram.count(np.float32([500]))
        _, high = by_mse(histogram, bounds, asymmetric_uint8)
        assert bool(high < 400) is cut


# --- entropy


def test_entropy_cuts_tails_that_hold_little():
    histogram, bounds = counted(np.append(normal(n=50_000), np.float32([60, -60])))
    low, high = by_entropy(histogram, bounds, asymmetric_uint8)
    assert bounds == (-60, 60)
    assert -20 < low < -2
    assert 2 < high < 20


def test_entropy_does_not_see_how_many_zeros_there_are():
    values = np.maximum(normal(), 0)
    few, bounds = counted(values)
    many, _ = counted(np.append(values, np.zeros(100_000, np.float32)))
    assert by_entropy(few, bounds, asymmetric_uint8) == by_entropy(many, bounds, asymmetric_uint8)


def test_entropy_keeps_all_where_every_value_has_a_level_of_its_own():
    """Integers from 0 to 255 lose nothing within their bounds, and something within any less."""
    values = np.arange(256).repeat(np.arange(1, 257))
    histogram, bounds = counted(values)
    assert by_entropy(histogram, bounds, asymmetric_uint8) == bounds
