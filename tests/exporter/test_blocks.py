import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from memopt_export.affine import SMALLEST_SCALE
from memopt_export.blocks import Grid, fit, pack4, round_to_nearest

ROWS = arrays.arrays(
    np.float32, st.tuples(st.integers(1, 4), st.integers(1, 70)), elements=st.floats(-1e4, 1e4, width=32)
)


def error(rows, grid):
    return float(((grid.dequantize(round_to_nearest(rows, grid)) - rows).astype(np.float64) ** 2).sum())


def widest(rows, bits, block):
    """Steps that just reach both ends of each block, as everybody's first quantizer has them."""
    missing, half = -rows.shape[1] % block, 2 ** (bits - 1)
    blocks = np.pad(rows, ((0, 0), (0, missing))).reshape(len(rows), -1, block)
    reach = np.maximum(blocks.max(axis=2) / np.float32(half - 1), -blocks.min(axis=2) / np.float32(half))
    scale = np.maximum(reach, SMALLEST_SCALE)
    return Grid(scale, np.full(scale.shape, half, np.uint8), bits, block)


@pytest.mark.parametrize(
    ("row", "symmetric", "scale", "zero_point"),
    [
        ([-8.0, 7.0], True, 1.0, 8),  # all 16 steps
        ([-4.0, 3.5], True, 0.5, 8),
        ([0.0, 15.0], False, 1.0, 0),  # one side of zero: twice as fine
        ([-15.0, 0.0], False, 1.0, 15),
        ([-5.0, 10.0], False, 1.0, 5),
        ([3.0, 15.0], False, 1.0, 0),  # zero is always among the steps
    ],
)
def test_four_bits_by_hand(row, symmetric, scale, zero_point):
    grid = fit(np.float32([row]), bits=4, block=2, symmetric=symmetric)
    assert (grid.scale.tolist(), grid.zero_point.tolist()) == ([[scale]], [[zero_point]])
    assert error(np.float32([row]), grid) == 0


def test_eight_bits_by_hand():
    grid = fit(np.float32([[-128.0, 5.0, 127.0]]), bits=8, block=3, symmetric=True)
    assert grid.scale.tolist() == [[1.0]]
    assert round_to_nearest(np.float32([[-128.0, 5.0, 127.0]]), grid).tolist() == [[0, 133, 255]]


def test_a_lone_outlier_does_not_widen_the_steps_of_all_others():
    row = np.float32([[*np.linspace(-1, 1, 200), 4.0]])
    assert fit(row, bits=4, block=201, symmetric=True).scale[0, 0] < 0.8 * 4 / 7


def test_each_block_has_its_own_scale_and_the_last_may_be_short():
    rows = np.float32([[7.0, -8.0, 0.7, -0.8, 70.0]])
    grid = fit(rows, bits=4, block=2, symmetric=True)
    np.testing.assert_allclose(grid.scale, [[1, 0.1, 10]], rtol=1e-6)
    np.testing.assert_allclose(grid.dequantize(round_to_nearest(rows, grid)), rows, rtol=1e-6)


def test_the_closer_grid_is_taken():
    positive = np.abs(np.random.default_rng(0).normal(size=(4, 64))).astype(np.float32)
    assert not fit(positive, bits=4, block=32).is_symmetric
    assert fit(np.float32([[-8.0, 7.0]]), bits=4, block=2).is_symmetric


def test_an_all_zero_block_stays_zero():
    for symmetric in (True, False):
        grid = fit(np.zeros((1, 32), np.float32), bits=4, block=32, symmetric=symmetric)
        assert (grid.scale > 0).all()
        assert not grid.dequantize(round_to_nearest(np.zeros((1, 32), np.float32), grid)).any()


@pytest.mark.parametrize("bits", [4, 8])
@given(rows=ROWS, block=st.sampled_from([16, 32]))
@settings(max_examples=40, deadline=None)
def test_the_search_is_never_worse_than_the_widest_steps(bits, rows, block):
    assert error(rows, fit(rows, bits=bits, block=block)) <= error(rows, widest(rows, bits, block)) * 1.0001 + 1e-6


@pytest.mark.parametrize("symmetric", [True, False])
@given(rows=ROWS)
@settings(max_examples=40, deadline=None)
def test_error_is_at_most_half_a_step_where_nothing_saturates_and_zero_is_exact(symmetric, rows):
    grid = fit(rows, bits=8, block=16, symmetric=symmetric)
    integers = round_to_nearest(rows, grid)
    scale = grid.spread(grid.scale, rows.shape[1])
    inside = (integers > 0) & (integers < 255)
    assert (np.abs(grid.dequantize(integers) - rows) <= scale * 0.5001 + 1e-6)[inside].all()
    assert not grid.dequantize(integers)[rows == 0].any()


@given(integers=arrays.arrays(np.uint8, st.tuples(st.integers(1, 3), st.integers(1, 9)), elements=st.integers(0, 15)))
def test_packing_keeps_every_integer(integers):
    packed = pack4(integers)
    unpacked = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(integers), -1)
    assert packed.shape[1] == -(-integers.shape[1] // 2)
    np.testing.assert_array_equal(unpacked[:, : integers.shape[1]], integers)
