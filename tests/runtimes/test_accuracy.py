"""Numbers about outputs: hand-computed cases stand in the docstrings, laws here."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memopt.accuracy import kl_divergence, softmax

ROWS = st.lists(st.lists(st.floats(-30, 30), min_size=3, max_size=3), min_size=1, max_size=5)


@given(ROWS, st.randoms(use_true_random=False))
def test_kl_divergence_is_zero_for_equal_outputs_and_never_below(rows, random) -> None:
    reference = np.array(rows)
    other = np.array([[random.uniform(-30, 30) for _ in row] for row in rows])
    assert kl_divergence(reference, reference) == 0
    assert kl_divergence(other, reference) >= -1e-12


@given(ROWS, st.floats(-1e4, 1e4))
def test_kl_divergence_does_not_see_what_softmax_does_not(rows, shift) -> None:
    reference = np.array(rows)
    assert kl_divergence(reference + shift, reference) == pytest.approx(0, abs=1e-9)


def test_kl_divergence_holds_where_a_probability_is_too_small_for_a_float() -> None:
    logits, reference = np.array([[2000.0, 0.0]], np.float32), np.array([[0.0, 2000.0]], np.float32)
    assert softmax(logits)[0, 1] == 0
    assert kl_divergence(logits, reference) == pytest.approx(2000)
