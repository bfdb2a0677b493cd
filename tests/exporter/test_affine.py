import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from memopt_export.affine import (
    SMALLEST_SCALE,
    Affine,
    asymmetric_uint8,
    bias_scale,
    quantize_bias,
    symmetric_int8,
    symmetric_int8_channels,
    with_room_for_bias,
)

numbers = st.floats(-1e6, 1e6, width=32)
ranges = st.tuples(numbers, numbers).map(sorted)
weights = npst.arrays(
    np.float32, npst.array_shapes(min_dims=2, max_dims=4, max_side=5), elements=st.floats(-8, 8, width=32)
)
BOTH = pytest.mark.parametrize("affine_of", [asymmetric_uint8, symmetric_int8])


def inside(low, high, share):
    return np.float32(min(max(low + share * (high - low), low), high))


@pytest.mark.parametrize(
    ("low", "high", "scale", "zero_point"),
    [
        (0.0, 255.0, 1.0, 0),
        (-1.0, 4.1, 0.02, 50),
        (-255.0, 0.0, 1.0, 255),
        (2.0, 5.1, 0.02, 0),  # widened to start at zero
        (-5.1, -2.0, 0.02, 255),  # widened to end at zero
        (-1.0, 1.0, 2 / 255, 128),  # 127.5, ties to even
        (0.0, 0.0, float(SMALLEST_SCALE), 0),
    ],
)
def test_asymmetric_uint8_by_hand(low, high, scale, zero_point):
    affine = asymmetric_uint8(low, high)
    assert float(affine.scale) == pytest.approx(scale, rel=1e-6)
    assert (affine.zero_point.dtype, int(affine.zero_point)) == (np.uint8, zero_point)
    assert affine.scale.dtype == np.float32


@pytest.mark.parametrize(
    ("low", "high", "scale"),
    [(-1.27, 1.0, 0.01), (-1.0, 2.54, 0.02), (0.5, 1.27, 0.01), (0.0, 0.0, float(SMALLEST_SCALE))],
)
def test_symmetric_int8_by_hand(low, high, scale):
    affine = symmetric_int8(low, high)
    assert float(affine.scale) == pytest.approx(scale, rel=1e-6)
    assert (affine.zero_point.dtype, int(affine.zero_point)) == (np.int8, 0)


@pytest.mark.parametrize(
    ("value", "steps"),
    [
        (0.5, 10),
        (1.5, 12),
        (2.5, 12),
        (-0.5, 10),
        (-1.5, 8),
        (0.0, 10),
        (244.9, 255),
        (300.0, 255),
        (-10.2, 0),
        (-99.0, 0),
    ],
)
def test_integers_are_the_nearest_with_ties_to_even_and_saturate(value, steps):
    affine = Affine(np.float32(1.0), np.asarray(10, np.uint8))
    assert affine.quantize(np.float32([value])).tolist() == [steps]


def test_channels_by_hand():
    weight = np.float32([[1.27, -0.5], [0.0, 2.54], [0.0, 0.0]])
    affine = symmetric_int8_channels(weight, axis=0)
    np.testing.assert_allclose(affine.scale, [0.01, 0.02, SMALLEST_SCALE], rtol=1e-6)
    assert affine.quantize(weight).tolist() == [[127, -50], [0, 127], [0, 0]]
    assert symmetric_int8_channels(weight, axis=1).scale.shape == (2,)


@BOTH
@given(bounds=ranges, share=st.floats(0, 1))
def test_error_is_at_most_half_a_step_inside_the_range(affine_of, bounds, share):
    affine = affine_of(*bounds)
    value = inside(*bounds, share)
    error = abs(float(affine.dequantize(affine.quantize(value))) - float(value))
    assert error <= float(affine.scale) * (0.5 + 1e-4)


@BOTH
@given(bounds=ranges, first=numbers, second=numbers)
def test_quantization_is_monotone(affine_of, bounds, first, second):
    affine = affine_of(*bounds)
    low, high = affine.quantize(np.float32(sorted((first, second))))
    assert low <= high


@BOTH
@given(bounds=ranges)
def test_zero_stays_exactly_zero(affine_of, bounds):
    affine = affine_of(*bounds)
    assert float(affine.dequantize(affine.quantize(np.float32(0)))) == 0


@BOTH
@given(bounds=ranges)
def test_scales_are_positive_float32(affine_of, bounds):
    scale = affine_of(*bounds).scale
    assert scale.dtype == np.float32
    assert scale >= SMALLEST_SCALE


@example(high=float(np.float32(1.9984815)))  # float32(high / 255) * 255 is larger
@given(high=st.floats(2.0**-40, 1e6, width=32))
def test_steps_of_a_range_from_zero_never_reach_past_it(high):
    assert asymmetric_uint8(0.0, high).scale * np.float32(255) <= np.float32(high)


@given(weight=weights, data=st.data())
def test_each_channel_is_quantized_as_if_alone(weight, data):
    axis = data.draw(st.integers(0, weight.ndim - 1))
    affine = symmetric_int8_channels(weight, axis=axis)
    whole = affine.quantize(weight)
    for channel in range(weight.shape[axis]):
        part = weight.take(channel, axis)
        alone = symmetric_int8(float(part.min()), float(part.max()))
        np.testing.assert_array_equal(whole.take(channel, axis), alone.quantize(part))


@given(weight=weights)
def test_weights_err_by_at_most_half_a_step(weight):
    affine = symmetric_int8_channels(weight, axis=0)
    error = np.abs(affine.dequantize(affine.quantize(weight)) - weight)
    assert (error.reshape(len(weight), -1).max(axis=1) <= affine.scale * (0.5 + 1e-4)).all()


@given(
    bias=npst.arrays(np.float32, 4, elements=st.floats(-100, 100, width=32)), high=st.floats(2.0**-30, 1e3, width=32)
)
def test_bias_fits_int32_and_errs_by_at_most_half_a_step(bias, high):
    inputs = asymmetric_uint8(0.0, high)
    silent = symmetric_int8_channels(np.zeros((4, 3), np.float32), axis=0)
    scale = bias_scale(inputs, with_room_for_bias(silent, bias, inputs))
    integers = quantize_bias(bias, scale)
    assert integers.dtype == np.int32
    assert (np.abs(integers * scale.astype(np.float64) - bias) <= np.maximum(scale * 0.51, np.abs(bias) * 1e-6)).all()


def test_room_for_bias_leaves_ordinary_scales_alone():
    inputs, weight = asymmetric_uint8(0.0, 6.0), symmetric_int8_channels(np.float32([[1.0], [0.5]]), axis=0)
    np.testing.assert_array_equal(with_room_for_bias(weight, np.float32([3.0, -3.0]), inputs).scale, weight.scale)
