import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memopt_export.gptq import round_in_order

seeds = st.integers(0, 2**16)


def nearest(weights, _inputs=None):
    """A grid of whole numbers without ends."""
    return np.rint(weights)


def draw(seed, *, groups=1, outputs=4, inputs=6, rows=64, rank=None):
    """Weights a few steps large, and moments of correlated rows."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(0, 3, (groups, outputs, inputs))
    read = rng.normal(size=(groups, rows, rank or inputs)) @ rng.normal(size=(groups, rank or inputs, inputs))
    return weight, read.swapaxes(1, 2) @ read


def loss(weight, rounded, moments):
    """The squared error of the layer's outputs over all rows, for each output."""
    error = weight - rounded
    return np.einsum("goi,gij,goj->go", error, moments, error)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, inputs=st.integers(2, 40))
def test_it_errs_less_than_rounding_to_nearest_on_the_rows_it_is_given(seed, inputs):
    weight, moments = draw(seed, outputs=16, inputs=inputs, rows=4 * inputs)
    assert loss(weight, round_in_order(weight, moments, nearest), moments).sum() <= (
        loss(weight, nearest(weight), moments).sum() * 1.001
    )


def test_it_errs_much_less_where_inputs_are_correlated():
    weight, moments = draw(0, outputs=64, inputs=64, rank=8)
    rounded = round_in_order(weight, moments, nearest)
    assert loss(weight, rounded, moments).sum() < loss(weight, nearest(weight), moments).sum() / 4


def test_two_inputs_by_hand():
    """Both inputs are nearly the same number, so only the sum of the weights counts: 0.4 + 0.4 is 1, not 0."""
    moments = np.array([[[100.0, 99.0], [99.0, 99.5]]])
    rounded = round_in_order(np.array([[[0.4, 0.4]]]), moments, nearest)
    assert rounded.tolist() == [[[0.0, 1.0]]]
    assert nearest(np.array([0.4, 0.4])).sum() == 0


def test_the_strongest_input_is_rounded_first_and_to_nearest():
    moments = np.array([[[1.0, 5.0], [5.0, 100.0]]])
    assert round_in_order(np.array([[[2.3, 0.4]]]), moments, nearest)[0, 0, 1] == 0.0


@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_it_is_nearest_where_inputs_have_nothing_in_common(seed):
    rng = np.random.default_rng(seed)
    weight = rng.normal(0, 3, (2, 4, 9))
    moments = np.stack([np.diag(rng.uniform(0.1, 5, 9)) for _ in range(2)])
    np.testing.assert_array_equal(round_in_order(weight, moments, nearest), nearest(weight))


@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_weights_that_can_be_stored_stay(seed):
    weight, moments = draw(seed, groups=2)
    stored = np.rint(weight)
    np.testing.assert_allclose(round_in_order(stored, moments, nearest), stored, atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(seed=seeds, groups=st.integers(2, 5))
def test_groups_together_are_groups_one_by_one(seed, groups):
    weight, moments = draw(seed, groups=groups)
    single = [round_in_order(weight[g : g + 1], moments[g : g + 1], nearest) for g in range(groups)]
    np.testing.assert_allclose(round_in_order(weight, moments, nearest), np.concatenate(single), atol=1e-9)


@settings(max_examples=10, deadline=None)
@given(seed=seeds, inputs=st.sampled_from([127, 128, 129, 300]))
def test_blocks_change_nothing(seed, inputs):
    """Errors pushed forward in blocks are those pushed one by one: outputs rounded alone and together agree."""
    weight, moments = draw(seed, outputs=2, inputs=inputs, rows=400)
    one_by_one = _plainly(weight, moments)
    np.testing.assert_allclose(round_in_order(weight, moments, nearest), one_by_one, atol=1e-6)


def _plainly(weight, moments):
    """Case without blocks: GPTQ as its paper writes it, with the inverse of the damped moments."""
    size = weight.shape[2]
    order = np.argsort(-np.diagonal(moments[0]), kind="stable")
    damped = moments[0][np.ix_(order, order)] + 0.01 * np.trace(moments[0]) / size * np.eye(size)
    inverse = np.linalg.cholesky(np.linalg.inv(damped)).T
    left, rounded = weight[0][:, order].copy(), np.zeros_like(weight[0])
    for k in range(size):
        rounded[:, order[k]] = np.rint(left[:, k])
        error = (left[:, k] - rounded[:, order[k]]) / inverse[k, k]
        left[:, k:] -= np.outer(error, inverse[k, k:])
    return rounded[None]


@pytest.mark.parametrize("dead", [[2], [0, 5], list(range(6))])
def test_inputs_that_are_always_zero_are_rounded_to_nearest(dead):
    weight, moments = draw(3)
    moments[:, dead, :] = 0
    moments[:, :, dead] = 0
    rounded = round_in_order(weight, moments, nearest)
    np.testing.assert_array_equal(rounded[:, :, dead], nearest(weight[:, :, dead]))
    assert np.isfinite(rounded).all()


def test_fewer_rows_than_inputs_still_give_weights_on_the_grid():
    weight, moments = draw(1, inputs=50, rows=3)
    rounded = round_in_order(weight, moments, nearest)
    np.testing.assert_allclose(rounded, np.rint(rounded), atol=1e-9)


def test_quantize_is_told_which_inputs_it_rounds():
    weight, moments = draw(0, groups=2)
    steps = np.linspace(0.5, 1.5, 6)  # one for each input

    def store(weights, inputs):
        scale = steps[inputs][:, None, :]
        return np.rint(weights / scale) * scale

    rounded = round_in_order(weight, moments, store)
    np.testing.assert_allclose(rounded / steps, np.rint(rounded / steps), atol=1e-9)
