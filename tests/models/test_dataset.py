from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memopt.errors import InputRefused
from memopt.preprocess import prepare
from memopt_models.dataset import DataSet, Split, channel_statistics, make_data, split_by_class
from memopt_models.selection import Selection


def pictures(n: int, channels: int = 3, *, seed: int = 0) -> Split:
    images = np.random.default_rng(seed).integers(0, 256, (n, 6, 5, channels), np.uint8)
    return Split(images, np.arange(n, dtype=np.int64) % 3)


def toy(channels: int = 3) -> DataSet:
    return make_data("toy", [pictures(n, channels, seed=n) for n in (30, 9, 6)], ("a", "b", "c"))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(0, 3))
def test_every_row_is_in_exactly_one_part(labels: list[int], seed: int) -> None:
    parts = split_by_class(np.array(labels), seed=seed)
    assert sorted(np.concatenate(parts)) == list(range(len(labels)))
    assert all((np.diff(part) > 0).all() for part in parts)


@given(st.integers(5, 40), st.integers(5, 40))
def test_every_class_is_divided_by_the_shares(first: int, second: int) -> None:
    labels = np.array([0] * first + [1] * second)
    train, _, _ = split_by_class(labels, shares=(0.6, 0.2, 0.2))
    for label, n in ((0, first), (1, second)):
        assert abs((labels[train] == label).sum() - 0.6 * n) <= 0.5


def test_seed_decides_who_goes_where() -> None:
    labels = np.arange(90) % 3
    one, same, other = (split_by_class(labels, seed=seed)[0] for seed in (0, 0, 1))
    assert (one == same).all()
    assert (one != other).any()


@given(st.integers(1, 3000), st.sampled_from([1, 3]), st.integers(0, 2**32 - 1))
def test_statistics_are_those_of_numpy(n: int, channels: int, seed: int) -> None:
    images = np.random.default_rng(seed).integers(0, 256, (n, 2, 1, channels), np.uint8)
    mean, std = channel_statistics(images)
    np.testing.assert_allclose(mean, (images / 255).mean(axis=(0, 1, 2)), atol=6e-5)
    expected = (images / 255).std(axis=(0, 1, 2))
    np.testing.assert_allclose(std, np.where(expected < 5e-5, 1.0, expected), atol=6e-5)  # flat: see below


def test_pictures_without_contrast_are_not_divided_by_zero() -> None:
    assert channel_statistics(np.full((2, 2, 2, 1), 255, np.uint8)) == ([1.0], [1.0])
    for value in range(256):
        assert channel_statistics(np.full((1, 2, 1, 1), value, np.uint8))[1] == [1.0]


@pytest.mark.parametrize(("channels", "color"), [(1, "gray"), (3, "rgb")])
def test_prepared_train_pictures_have_mean_0_and_deviation_1(channels: int, color: str) -> None:
    data = toy(channels)
    inputs = prepare(data.train.images, data.preprocess)
    data.input_spec.check(inputs)
    np.testing.assert_allclose(inputs.mean(axis=(0, 2, 3)), 0, atol=1e-3)
    np.testing.assert_allclose(inputs.std(axis=(0, 2, 3)), 1, atol=1e-3)
    assert data.preprocess[0] == {"op": "decode", "color": color}
    assert all(number == round(number, 4) for number in (*data.preprocess[3]["mean"], *data.preprocess[3]["std"]))


def test_statistics_are_those_of_train_alone() -> None:
    data = toy()
    darker = make_data("toy", [data.train, data.validation, pictures(6, seed=99)], data.classes)
    assert darker.preprocess == data.preprocess


def test_fingerprint_sees_all_that_a_model_is_made_from_and_nothing_else() -> None:
    data = toy()
    changed = [replace(data, **{name: pictures(9, seed=7)}) for name in data.splits]
    renamed = replace(data, classes=("a", "b", "z"))
    unscaled = replace(data, preprocess=data.preprocess[:2])
    assert len({each.fingerprint for each in (data, *changed, renamed, unscaled)}) == 6
    assert replace(data, name="other", spec="images:other").fingerprint == toy().fingerprint


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 3, 3, 1)), np.zeros(2, np.int64), "pictures are float64 (2, 3, 3, 1); hint: uint8"),
        (
            np.zeros((2, 9), np.float32),
            np.zeros(2, np.int64),
            "float32 (2, 9); hint: uint8 (n, h, w, 1 or 3), or float32",
        ),
        (np.zeros((2, 3, 3), np.uint8), np.zeros(2, np.int64), "pictures are uint8 (2, 3, 3)"),
        (np.zeros((2, 3, 3, 4), np.uint8), np.zeros(2, np.int64), "pictures are uint8 (2, 3, 3, 4)"),
        (np.zeros((2, 3, 3, 1), np.uint8), np.zeros(3, np.int64), "labels are int64 (3,) for 2 pictures"),
        (np.zeros((2, 3, 3, 1), np.uint8), np.zeros(2, np.int32), "labels are int32 (2,) for 2 pictures"),
    ],
)
def test_impossible_split_is_refused(images: np.ndarray, labels: np.ndarray, message: str) -> None:
    with pytest.raises(InputRefused) as raised:
        Split(images, labels)
    assert message in str(raised.value)


def test_impossible_data_set_is_refused() -> None:
    data = toy()
    larger = Split(np.zeros((2, 9, 9, 3), np.uint8), np.zeros(2, np.int64))
    with pytest.raises(InputRefused, match=r"data 'toy' has pictures of \(9, 9, 3\) in test, \(6, 5, 3\) in train"):
        replace(data, test=larger)
    with pytest.raises(InputRefused, match="data 'toy' has no validation samples"):
        replace(data, validation=data.validation.pick(slice(0)))
    with pytest.raises(InputRefused, match="data 'toy' has labels outside its 2 classes in train"):
        replace(data, classes=("a", "b"))


def test_selected_rows_are_the_picked_ones_and_only_copied_by_index() -> None:
    whole = pictures(30)
    rows = np.array([1, 4, 9, 20])
    lazy, eager = Split(Selection(whole.images, rows), whole.labels[rows]), whole.pick(rows)
    for one, other in ((lazy, eager), (lazy.pick(slice(1, 3)), eager.pick(slice(1, 3)))):
        assert isinstance(one.images, Selection)
        assert one.images.array is whole.images
        assert (one.images.shape, one.images.dtype, one.images.ndim) == (other.images.shape, np.uint8, 4)
        np.testing.assert_array_equal(one.images, other.images)
        np.testing.assert_array_equal(one.labels, other.labels)
    assert make_data("x", [lazy] * 3, "abc").fingerprint == make_data("x", [eager] * 3, "abc").fingerprint
    assert make_data("x", [lazy] * 3, "abc").preprocess == make_data("x", [eager] * 3, "abc").preprocess


def test_what_are_no_pictures_is_taken_as_it_is() -> None:
    split = Split(np.ones((4, 2, 5, 3), np.float32), np.zeros(4, np.int64))
    data = make_data("numbers", [split] * 3, ("a",))
    assert data.preprocess == ()
    assert data.input_spec.shape == ("batch", 2, 5, 3)
    with pytest.raises(InputRefused, match="data 'numbers' has pictures"):
        replace(data, test=Split(np.ones((4, 2, 5, 3), np.uint8), np.zeros(4, np.int64)))
