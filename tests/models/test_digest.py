from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from memopt_models.digest import digest_arrays


@given(st.dictionaries(st.text(max_size=3), st.lists(st.integers(0, 255), max_size=4), min_size=1))
def test_order_of_names_does_not_count(values: dict[str, list[int]]) -> None:
    arrays = {name: np.array(numbers, np.uint8) for name, numbers in values.items()}
    assert digest_arrays(arrays) == digest_arrays(dict(reversed(arrays.items())))


def test_name_dtype_shape_and_every_value_count() -> None:
    a = np.arange(6, dtype=np.int32)
    variants = [{"a": a}, {"b": a}, {"a": a.view(np.uint32)}, {"a": a.reshape(2, 3)}, {"a": a + 1}, {"a": a[::-1]}]
    assert len({digest_arrays(variant) for variant in variants}) == len(variants)


def test_strides_do_not_count() -> None:
    a = np.arange(12.0).reshape(3, 4)
    assert digest_arrays({"a": a.T}) == digest_arrays({"a": a.T.copy()})


def test_scalars_and_empty_arrays_have_a_digest() -> None:
    assert digest_arrays({"n": np.array(3)}) != digest_arrays({"n": np.zeros(0)})
