from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from memopt.errors import UsageError
from memopt.preprocess import prepare
from memopt_models.dataset import DataSet, Split, make_data
from memopt_models.feed import Feeder, Staging, draw_moves, shift_pictures

CPU = torch.device("cpu")


def pictures(n: int, channels: int, *, size: tuple[int, int] = (6, 5), seed: int = 0) -> DataSet:
    images = np.random.default_rng(seed).integers(0, 256, (n, *size, channels), np.uint8)
    return make_data("own", [Split(images, np.arange(n) % 3)] * 3, ("a", "b", "c"))


STEPS = {
    "all": lambda steps: steps,
    "no layout": lambda steps: steps[:-1],
    "no normalize": lambda steps: (*steps[:3], steps[4]),
    "no scale": lambda steps: (*steps[:2], *steps[3:]),
    "no numbers": lambda steps: (*steps[:2], steps[4]),
    "nothing": lambda steps: (),
    "smaller": lambda steps: (steps[0], {"op": "resize", "size": [4, 3]}, *steps[2:]),
    "cropped": lambda steps: (*steps[:2], {"op": "crop", "size": [2, 4]}, *steps[2:]),
    "larger, then cropped to what it was": lambda steps: (
        steps[0], {"op": "resize", "size": [12, 10]}, {"op": "crop", "size": [6, 5]}, *steps[2:]
    ),
    "gray": lambda steps: ({"op": "decode", "color": "gray"}, steps[1], steps[2], steps[4]),
}  # fmt: skip


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("which", STEPS)
def test_inputs_are_those_of_the_preprocessing_to_the_bit(which: str, channels: int) -> None:
    data = pictures(40, channels)
    steps = STEPS[which](data.preprocess)
    expected = prepare(data.train.images, steps)
    feeder = Feeder(data.train, steps, batch_size=16)
    for rows in (np.array([3, 5, 39]), np.array([7, 0]), slice(10, 26), np.arange(16)):
        inputs, labels = feeder.batch(rows)
        assert inputs.is_contiguous()
        assert inputs.numpy().dtype == expected.dtype
        np.testing.assert_array_equal(inputs.numpy(), expected[rows])
        np.testing.assert_array_equal(labels.numpy(), data.train.labels[rows])


@given(st.floats(1e-6, 1e6), st.floats(-300, 300), st.floats(1e-3, 1e3))
def test_any_factor_mean_and_deviation_round_as_in_numpy(factor: float, mean: float, std: float) -> None:
    data = pictures(4, 1)
    scale, normalize = {"op": "scale", "factor": factor}, {"op": "normalize", "mean": [mean], "std": [std]}
    steps = (*data.preprocess[:2], scale, normalize, data.preprocess[4])
    inputs, _ = Feeder(data.train, steps, batch_size=4).batch(slice(0, 4))
    np.testing.assert_array_equal(inputs.numpy(), prepare(data.train.images, steps))


@pytest.mark.parametrize("batch_size", [1, 7, 40, 100])
def test_in_order_every_sample_comes_once(batch_size: int) -> None:
    data = pictures(40, 3)
    fed = [(inputs.clone(), labels.clone()) for inputs, labels in Feeder(
        data.train, data.preprocess, batch_size=batch_size
    ).in_order()]  # fmt: skip
    assert [len(labels) for _, labels in fed[:-1]] == [min(batch_size, 40)] * (len(fed) - 1)
    np.testing.assert_array_equal(torch.cat([labels for _, labels in fed]), data.train.labels)
    np.testing.assert_array_equal(
        torch.cat([inputs for inputs, _ in fed]).numpy(), prepare(data.train.images, data.preprocess)
    )


def test_pictures_that_do_not_lie_one_after_another_are_fed_the_same() -> None:
    data = pictures(20, 1)
    halves = Split(data.train.images[:, ::2, ::2], data.train.labels)
    rows = np.array([1, 4, 19])
    inputs, _ = Feeder(halves, data.preprocess[2:], batch_size=4).batch(rows)
    np.testing.assert_array_equal(inputs.numpy(), prepare(halves.images[rows], data.preprocess[2:]))


@pytest.mark.parametrize("rows", [np.array([0, 20]), np.array([-21, 3])])
def test_a_row_that_is_not_there_is_no_other_row(rows: np.ndarray) -> None:
    data = pictures(20, 1)
    with pytest.raises(IndexError):
        Feeder(data.train, data.preprocess, batch_size=4).batch(rows)


def test_batches_lie_in_the_same_memory() -> None:
    data = pictures(300, 3, size=(32, 32))
    feeder = Feeder(data.train, data.preprocess, batch_size=64)
    rng = np.random.default_rng(0)
    rows = [np.sort(rng.choice(300, 64, replace=False)) for _ in range(8)]
    places = {(inputs.data_ptr(), labels.data_ptr()) for inputs, labels in map(feeder.batch, rows)}
    assert len(places) == 1
    tracemalloc.start()
    for each in rows:
        feeder.batch(each)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 64 * 32 * 32 * 3 / 10  # a tenth of one batch of uint8


def test_fed_inputs_can_be_trained_on_though_the_feeder_was_made_for_evaluation() -> None:
    data = pictures(8, 1)
    with torch.inference_mode():
        feeder = Feeder(data.train, data.preprocess, batch_size=8)
    network = nn.Conv2d(1, 2, 3)
    network(feeder.batch(slice(0, 8))[0]).sum().backward()
    assert network.weight.grad is not None


@pytest.mark.parametrize("device", [CPU, pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)])
def test_staged_samples_arrive_however_many_and_one_after_the_other(device: torch.device) -> None:
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    staging = Staging((5, 3), torch.uint8, device)
    for k, count in enumerate((5, 2, 5, 1, 4)):
        staging.to_fill(count)[...] = k
        sent = staging.send(count)
        assert sent.device.type == device.type
        np.testing.assert_array_equal(sent.cpu(), np.full((count, 3), k))


@pytest.mark.gpu
def test_a_gpu_is_fed_what_the_cpu_is() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    data = pictures(300, 3, size=(32, 32))
    feeder = Feeder(data.train, data.preprocess, batch_size=64, device=torch.device("cuda"))
    fed = [(inputs.clone(), labels.clone()) for inputs, labels in feeder.in_order()]
    np.testing.assert_array_equal(
        torch.cat([inputs for inputs, _ in fed]).cpu().numpy(), prepare(data.train.images, data.preprocess)
    )
    np.testing.assert_array_equal(torch.cat([labels for _, labels in fed]).cpu(), data.train.labels)
    assert all(host.is_pinned() for host in feeder._images._hosts)


# --- moved pictures


@given(st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_shifted_pictures_are_windows_of_the_padded_ones(distance: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (5, 4, 6, 2), np.uint8)
    moves, moved = draw_moves(5, distance, rng), images.copy()
    shift_pictures(moved, moves)
    for before, after, (down, right) in zip(images, moved, moves + distance, strict=True):
        padded = np.pad(before, ((distance,) * 2, (distance,) * 2, (0, 0)), mode="edge")
        np.testing.assert_array_equal(after, padded[down : down + 4, right : right + 6])


def test_pictures_are_shifted_in_every_direction_and_not_at_all() -> None:
    images = np.zeros((400, 5, 5, 1), np.uint8)
    images[:, 2, 2] = 255
    shift_pictures(images, draw_moves(400, 1, np.random.default_rng(0)))
    places = set(zip(*np.nonzero(images.squeeze())[1:], strict=True))
    assert places == {(y, x) for y in (1, 2, 3) for x in (1, 2, 3)}


def test_pictures_that_are_not_to_be_shifted_cost_no_draw() -> None:
    rng = np.random.default_rng(5)
    assert not draw_moves(3, 0, rng).any()
    assert rng.integers(1000) == np.random.default_rng(5).integers(1000)


def test_fed_pictures_are_moved_and_the_split_is_not() -> None:
    data = pictures(40, 1)
    before = data.train.images.copy()
    moves = draw_moves(40, 2, np.random.default_rng(3))
    moved, _ = Feeder(data.train, data.preprocess, batch_size=40).batch(np.arange(40), moves)
    expected = before.copy()
    shift_pictures(expected, moves)
    np.testing.assert_array_equal(moved.numpy(), prepare(expected, data.preprocess))
    np.testing.assert_array_equal(data.train.images, before)


def test_what_is_no_picture_cannot_be_moved() -> None:
    split = Split(np.ones((4, 2, 5, 3), np.float32), np.zeros(4, np.int64))
    feeder = Feeder(split, (), batch_size=4)
    feeder.batch(slice(0, 4), np.zeros((4, 2), np.int64))
    with pytest.raises(UsageError, match="samples of float32 are no pictures that could be shifted; hint: --shift 0"):
        feeder.batch(slice(0, 4), np.ones((4, 2), np.int64))


def test_inputs_lie_in_memory_as_asked_for() -> None:
    data = pictures(40, 3)
    feeder = Feeder(data.train, data.preprocess, batch_size=16, layout=torch.channels_last)
    inputs, _ = feeder.batch(slice(0, 9))
    assert inputs.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_array_equal(inputs.numpy(), prepare(data.train.images[:9], data.preprocess))
