from __future__ import annotations

import functools
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memopt.errors import InputRefused, UsageError
from memopt.preprocess import prepare
from memopt.tensors import TensorSpec
from memopt_models.data import (
    SPLITS,
    DataSet,
    Pictures,
    Samples,
    Split,
    default_root,
    is_known,
    make_data,
    open_data,
    open_samples,
    stream_samples,
)

INPUT = TensorSpec("input", "float32", ("batch", 1, 28, 28))
SAMPLES = Samples({"x": np.arange(20).reshape(10, 2), "y": np.arange(10)}, np.arange(10), "ten")


def own_data() -> DataSet:
    split = Split(np.arange(12, dtype=np.uint8).reshape(3, 2, 2, 1), np.array([0, 1, 0]))
    return make_data("own", [split] * 3, ("a", "b"))


def own_number() -> int:
    return 3


@functools.cache
def large_data() -> DataSet:
    """600 pictures, 1.8 MB; 7.4 MB as inputs."""
    images = np.random.default_rng(0).integers(0, 256, (600, 32, 32, 3), np.uint8)
    return make_data("large", [Split(images, np.arange(600) % 2)] * 3, ("a", "b"))


def peak_bytes(work: Callable[[], object]) -> int:
    """What Python and numpy held at most during the work, above what they held before."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_digits_are_divided_class_by_class(digits: DataSet) -> None:
    sizes = {name: len(split) for name, split in digits.splits.items()}
    assert sizes == {"train": 1078, "validation": 360, "test": 359}
    counts = np.stack([np.bincount(split.labels) for split in digits.splits.values()])  # (splits, classes)
    np.testing.assert_allclose(counts / counts.sum(axis=0), [[0.6], [0.2], [0.2]] * np.ones(10), atol=0.005)


def test_digits_are_pictures_of_28_by_28_with_the_full_range(digits: DataSet) -> None:
    images = digits.train.images
    assert (images.shape[1:], images.min(), images.max()) == ((28, 28, 1), 0, 255)


def test_digits_are_the_same_every_time(digits: DataSet) -> None:
    assert open_data("digits").fingerprint == digits.fingerprint


def test_import_is_light() -> None:
    heavy = "{'torch', 'torchvision', 'sklearn', 'PIL', 'torch_pruning', 'safetensors'}"
    modules = "data, train, prune, distill, evaluate, checkpoint, networks"
    code = f"import sys; from memopt_models import {modules}; print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"set()\n"


def test_root_is_the_argument_then_the_environment_then_the_cache(
    tmp_path: Path, small_mnist: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMOPT_DATA_ROOT", str(small_mnist))
    assert default_root() == small_mnist
    assert open_data("mnist", download=False).name == "mnist"
    with pytest.raises(InputRefused, match=f"mnist is not in {tmp_path / 'empty'}"):
        open_data("mnist", root=tmp_path / "empty", download=False)
    monkeypatch.delenv("MEMOPT_DATA_ROOT")
    monkeypatch.setenv("HOME", "/home/someone")
    assert default_root() == Path("/home/someone/.cache/memopt/data")


def test_data_of_the_user_comes_from_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mydata", sys.modules[__name__])
    assert open_data("mydata:own_data").name == "own"
    with pytest.raises(UsageError, match=r"'mydata:own_number' returned a int, not a memopt_models\.data\.DataSet"):
        open_data("mydata:own_number")


def test_data_know_the_spec_that_opened_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mydata", sys.modules[__name__])
    assert [own_data().spec, *(open_data(spec).spec for spec in ("digits", "mydata:own_data"))] == [
        None, "digits", "mydata:own_data",
    ]  # fmt: skip


@pytest.mark.parametrize("spec", ["mydata:own_data", "images:pets", "x.npz", "", "digits ", "minst"])
def test_only_built_in_data_is_known_and_asking_opens_nothing(spec: str) -> None:
    assert not is_known(spec)
    assert all(is_known(name) for name in ("digits", "mnist", "fashion-mnist", "cifar10"))


def test_class_folders_are_data(tmp_path: Path) -> None:
    for name, value in (("cat", 10), ("dog", 200)):
        (tmp_path / name).mkdir()
        for i in range(5):
            np.save(tmp_path / name / f"{i}.npy", np.full((4, 6), value, np.uint8))
    assert open_data(f"images:{tmp_path}").input_spec.shape == ("batch", 1, 4, 6)
    assert open_data(f"images:{tmp_path}@8x10").input_spec.shape == ("batch", 1, 8, 10)
    with pytest.raises(UsageError, match=r"asks for pictures of 0x10; hint: images:.*@224x224"):
        open_data(f"images:{tmp_path}@0x10")
    with pytest.raises(UsageError, match="data 'images:' names no folder; hint: images:DIR"):
        open_data("images:")


def test_unknown_data_is_refused_with_the_list() -> None:
    with pytest.raises(UsageError) as raised:
        open_data("minst")
    assert str(raised.value) == (
        "data 'minst' is not known; "
        "hint: digits, mnist, fashion-mnist, cifar10, images:DIR, FILE.npz or pkg.mod:function"
    )


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_samples_are_the_prepared_pictures_of_the_split(split: str, digits: DataSet) -> None:
    samples = open_samples("digits", split=split, inputs=(INPUT,))
    chosen = digits.splits[split]
    np.testing.assert_array_equal(samples.feeds["input"], prepare(chosen.images, digits.preprocess))
    np.testing.assert_array_equal(samples.labels, chosen.labels)
    assert (len(samples), samples.source) == (len(chosen), f"digits/{split}")


def test_samples_follow_the_steps_and_the_name_of_the_model(digits: DataSet) -> None:
    steps = [*digits.preprocess[:1], {"op": "resize", "size": [8, 8]}, *digits.preprocess[2:]]
    spec = TensorSpec("x", "float32", (1, 1, 8, 8))  # a model of batch 1 runs sample by sample
    samples = open_samples("digits", split="test", inputs=(spec,), preprocess=steps)
    assert samples.feeds["x"].shape == (359, 1, 8, 8)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            (TensorSpec("input", "float32", ("batch", 3, 32, 32)),),
            "input 'input' expects shape (batch, 3, 32, 32), got (359, 1, 28, 28)",
        ),
        ((TensorSpec("input", "float16", ("batch", 1, 28, 28)),), "input 'input' expects float16, got float32"),
        ((INPUT, TensorSpec("mask", "bool", ("batch",))), "inputs are ['input'], the model expects ['input', 'mask']"),
    ],
)
def test_samples_that_do_not_fit_are_refused(inputs: tuple[TensorSpec, ...], message: str) -> None:
    with pytest.raises(InputRefused) as raised:
        open_samples("digits", split="test", inputs=inputs)
    assert message in str(raised.value)


def test_unknown_split_is_refused() -> None:
    for spec in ("digits", "x.npz"):
        with pytest.raises(UsageError, match="split 'val' is not known; hint: train, validation, test"):
            open_samples(spec, split="val", inputs=(INPUT,))


@pytest.mark.parametrize("seed", [0, 5])
def test_a_count_gives_what_taking_from_the_whole_gives(seed: int) -> None:
    whole = open_samples("digits", split="test", inputs=(INPUT,))
    for drawn in (
        open_samples("digits", split="test", inputs=(INPUT,), count=7, seed=seed),
        open_samples("digits", split="test", inputs=(INPUT,), at_most=7, seed=seed),
    ):
        assert drawn.fingerprint == whole.take(7, seed=seed).fingerprint
        assert drawn.source == whole.source
    assert open_samples("digits", split="test", inputs=(INPUT,), at_most=1000).fingerprint == whole.fingerprint


@pytest.mark.parametrize("count", [0, 360])
def test_a_count_that_the_split_has_not_is_refused(count: int) -> None:
    with pytest.raises(InputRefused, match=f"{count} samples asked for, digits/test has 359; hint: --samples 359"):
        open_samples("digits", split="test", inputs=(INPUT,), count=count)


def test_memory_is_that_of_the_count_not_of_the_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mydata", sys.modules[__name__])
    spec = TensorSpec("input", "float32", ("batch", 3, 32, 32))

    def draw(count: int | None) -> int:
        return peak_bytes(lambda: open_samples("mydata:large_data", split="train", inputs=(spec,), count=count))

    draw(1)  # makes and keeps the data
    prepared_bytes = large_data().train.images.nbytes * 4
    assert draw(None) > prepared_bytes
    assert draw(6) < prepared_bytes / 20


def test_npz_gives_arrays_and_labels(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    x = np.ones((3, 1, 28, 28), np.float32)
    np.savez(path, input=x, labels=np.array([1, 2, 3], np.int32))
    samples = open_samples(str(path), split="test", inputs=(INPUT,))
    assert samples.source == "x.npz"
    assert samples.labels is not None
    assert samples.labels.dtype == np.int64
    np.savez(path, input=x)
    assert open_samples(str(path), split="test", inputs=(INPUT,)).labels is None
    named = TensorSpec("labels", "float32", (1, 1, 28, 28))
    np.savez(path, labels=x)
    assert list(open_samples(str(path), split="test", inputs=(named,)).feeds) == ["labels"]


def numbered_npz(path: Path, n: int) -> str:
    """A file whose sample k is labelled k and is k all over."""
    numbers = np.arange(n)
    np.savez(path / "x.npz", x=np.repeat(numbers, 2).reshape(n, 2).astype(np.float32), labels=numbers)
    return str(path / "x.npz")


@pytest.mark.parametrize("n", [2, 3, 40])
def test_npz_is_divided_into_train_and_validation_and_judged_whole(n: int, tmp_path: Path) -> None:
    spec, inputs = numbered_npz(tmp_path, n), (TensorSpec("x", "float32", ("batch", 2)),)
    opened = {split: open_samples(spec, split=split, inputs=inputs) for split in SPLITS}
    rows = {split: list(samples.feeds["x"][:, 0].astype(int)) for split, samples in opened.items()}
    assert rows["test"] == list(range(n)) == sorted(rows["train"] + rows["validation"])
    assert len(rows["train"]) - len(rows["validation"]) in (0, 1)
    assert rows == {split: list(samples.labels) for split, samples in opened.items()}
    assert [samples.source for samples in opened.values()] == ["x.npz/train", "x.npz/validation", "x.npz"]


def test_npz_is_shuffled_before_it_is_divided_always_in_the_same_way(tmp_path: Path) -> None:
    spec, inputs = numbered_npz(tmp_path, 40), (TensorSpec("x", "float32", ("batch", 2)),)
    first, again = (open_samples(spec, split="train", inputs=inputs) for _ in range(2))
    assert first.fingerprint == again.fingerprint
    assert list(first.labels) != list(range(20))
    assert open_samples(spec, split="train", inputs=inputs, count=5, seed=3).fingerprint == (
        first.take(5, seed=3).fingerprint
    )
    assert len(open_samples(spec, split="train", inputs=inputs, at_most=99)) == 20


def test_npz_of_one_sample_cannot_be_divided(tmp_path: Path) -> None:
    spec, inputs = numbered_npz(tmp_path, 1), (TensorSpec("x", "float32", ("batch", 2)),)
    assert len(open_samples(spec, split="test", inputs=inputs)) == 1
    with pytest.raises(InputRefused, match=r"x\.npz has 1 sample, too few to divide into train and validation"):
        open_samples(spec, split="validation", inputs=inputs)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"inputs": np.zeros((1, 1, 28, 28), np.float32)}, "inputs are ['inputs'], the model expects ['input']"),
        ({"input": np.zeros((1, 28, 28), np.float32)}, "expects shape (batch, 1, 28, 28), got (1, 28, 28)"),
        ({"input": np.zeros((1, 1, 28, 28))}, "expects float32, got float64"),
        (
            {"input": np.zeros((2, 1, 28, 28), np.float32), "labels": np.zeros(3, int)},
            "has different numbers of samples, or none: {'input': 2, 'labels': 3}",
        ),
        ({"input": np.zeros((0, 1, 28, 28), np.float32)}, "has different numbers of samples, or none: {'input': 0}"),
        (
            {"input": np.zeros((2, 1, 28, 28), np.float32), "labels": np.zeros(2)},
            "has labels float64 (2,); hint: integers, (samples,)",
        ),
        ({"input": np.array([None], object)}, "cannot be read as .npz: Object arrays cannot be loaded"),
    ],
)
def test_npz_that_does_not_fit_is_refused(arrays: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(InputRefused) as raised:
        open_samples(str(tmp_path / "x.npz"), split="test", inputs=(INPUT,))
    assert message in str(raised.value)


@pytest.mark.parametrize("content", [None, b"", b"no archive", b"PK\x03\x04 half an archive"])
def test_npz_that_is_none_is_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputRefused, match=r"x\.npz cannot be read as \.npz"):
        open_samples(str(path), split="test", inputs=(INPUT,))


@given(st.integers(1, 10), st.integers(0, 99))
def test_taken_samples_are_distinct_and_in_order(n: int, seed: int) -> None:
    taken = SAMPLES.take(n, seed=seed)
    assert len(taken) == n
    assert taken.labels is not None
    assert (np.diff(taken.labels) > 0).all()
    np.testing.assert_array_equal(taken.feeds["y"], taken.labels)
    np.testing.assert_array_equal(taken.feeds["x"][:, 0], taken.labels * 2)
    assert taken.fingerprint == SAMPLES.take(n, seed=seed).fingerprint


@pytest.mark.parametrize("n", [0, 11])
def test_more_samples_than_there_are_cannot_be_taken(n: int) -> None:
    with pytest.raises(InputRefused, match=f"{n} samples asked for, ten has 10; hint: --samples 10"):
        SAMPLES.take(n, seed=0)


@given(st.integers(1, 12))
def test_batches_are_the_samples_in_order_without_a_copy(size: int) -> None:
    batches = list(SAMPLES.batches(size))
    np.testing.assert_array_equal(np.concatenate([batch["x"] for batch in batches]), SAMPLES.feeds["x"])
    assert all(len(batch["x"]) == size for batch in batches[:-1])
    assert np.shares_memory(batches[0]["x"], SAMPLES.feeds["x"])


def test_fingerprint_sees_inputs_and_labels() -> None:
    other_labels = Samples(SAMPLES.feeds, np.zeros(10, np.int64), "ten")
    no_labels = Samples(SAMPLES.feeds, None, "ten")
    other_inputs = Samples({**SAMPLES.feeds, "y": np.zeros(10, int)}, SAMPLES.labels, "ten")
    assert len({each.fingerprint for each in (SAMPLES, other_labels, no_labels, other_inputs)}) == 4
    assert Samples(SAMPLES.feeds, SAMPLES.labels, "elsewhere").fingerprint == SAMPLES.fingerprint


# --- batches, rows, streams


def test_a_batch_is_found_by_its_index_or_by_a_slice_and_there_are_no_others() -> None:
    batches = SAMPLES.batches(4)
    assert [len(batch["x"]) for batch in batches] == [4, 4, 2]
    np.testing.assert_array_equal(batches[2]["y"], [8, 9])
    assert [list(batch["y"]) for batch in batches[1:]] == [[4, 5, 6, 7], [8, 9]]
    for index in (-1, 3):
        with pytest.raises(IndexError):
            batches[index]


def test_rows_are_those_of_the_source_however_often_picked() -> None:
    first = SAMPLES.pick(np.array([1, 3, 5, 8, 9]))
    second = first.pick(slice(2, 5))
    assert SAMPLES.rows is None
    assert first.rows is not None
    assert second.rows is not None
    assert (list(first.rows), list(second.rows)) == ([1, 3, 5, 8, 9], [5, 8, 9])
    assert list(second.feeds["y"]) == [5, 8, 9]


def test_drawn_samples_know_their_indices_in_the_split(digits: DataSet) -> None:
    samples = open_samples("digits", split="test", inputs=(INPUT,), count=9, seed=4)
    assert samples.rows is not None
    assert len(set(samples.rows)) == 9
    chosen = digits.test.pick(samples.rows)
    np.testing.assert_array_equal(samples.feeds["input"], prepare(chosen.images, digits.preprocess))
    np.testing.assert_array_equal(samples.labels, chosen.labels)


def test_all_samples_of_a_split_have_all_indices() -> None:
    samples = open_samples("digits", split="test", inputs=(INPUT,))
    np.testing.assert_array_equal(samples.rows, np.arange(359))


@pytest.mark.parametrize("split", SPLITS)
def test_rows_of_npz_are_those_of_the_file(split: str, tmp_path: Path) -> None:
    spec, inputs = numbered_npz(tmp_path, 40), (TensorSpec("x", "float32", ("batch", 2)),)
    samples = open_samples(spec, split=split, inputs=inputs, count=7, seed=1)
    np.testing.assert_array_equal(samples.rows, samples.labels)


@pytest.mark.parametrize("count", [None, 11])
@pytest.mark.parametrize("size", [1, 4, 500])
def test_streamed_pictures_are_the_samples_opened_at_once(size: int, count: int | None) -> None:
    opened = open_samples("digits", split="test", inputs=(INPUT,), count=count, seed=2)
    streamed = stream_samples("digits", split="test", inputs=(INPUT,), count=count, seed=2)
    assert isinstance(streamed, Pictures)
    batches = list(streamed.batches(size))
    assert all(len(batch["input"]) == size for batch in batches[:-1])
    np.testing.assert_array_equal(np.concatenate([batch["input"] for batch in batches]), opened.feeds["input"])
    np.testing.assert_array_equal(streamed.labels, opened.labels)
    np.testing.assert_array_equal(streamed.rows, opened.rows)
    assert (len(streamed), streamed.source) == (len(opened), opened.source)


def test_picked_pictures_are_samples_that_know_their_rows() -> None:
    streamed = stream_samples("digits", split="test", inputs=(INPUT,), count=11, seed=2)
    picked = streamed.pick(slice(3, 6))
    assert isinstance(picked, Samples)
    assert streamed.rows is not None
    np.testing.assert_array_equal(picked.rows, streamed.rows[3:6])
    np.testing.assert_array_equal(picked.labels, streamed.labels[3:6])


def test_npz_is_streamed_as_it_is_opened(tmp_path: Path) -> None:
    spec, inputs = numbered_npz(tmp_path, 40), (TensorSpec("x", "float32", ("batch", 2)),)
    streamed = stream_samples(spec, split="train", inputs=inputs, count=5)
    assert isinstance(streamed, Samples)
    assert streamed.fingerprint == open_samples(spec, split="train", inputs=inputs, count=5).fingerprint


def test_pictures_that_do_not_fit_are_refused_when_they_are_read() -> None:
    wide = TensorSpec("input", "float32", ("batch", 3, 32, 32))
    streamed = stream_samples("digits", split="test", inputs=(wide,))
    with pytest.raises(InputRefused, match=r"input 'input' expects shape \(batch, 3, 32, 32\), got"):
        _ = streamed.batches(8)[0]


def test_the_fingerprint_of_pictures_sees_pictures_labels_and_steps() -> None:
    images = np.arange(48, dtype=np.uint8).reshape(3, 4, 4, 1)
    steps = make_data("own", [Split(images, np.arange(3))] * 3, ("a", "b", "c")).preprocess

    def pictures(images: np.ndarray, labels: np.ndarray, steps: tuple[dict[str, object], ...]) -> Pictures:
        return Pictures(Split(images, labels), steps, (INPUT,), "own/train")

    labels = np.arange(3)
    all_of_them = [
        pictures(images, labels, steps),
        pictures(images[::-1].copy(), labels, steps),
        pictures(images, labels[::-1].copy(), steps),
        pictures(images, labels, steps[:-1]),
    ]
    assert len({each.fingerprint for each in all_of_them}) == 4
    assert pictures(images.copy(), labels.copy(), steps).fingerprint == all_of_them[0].fingerprint


def test_memory_of_streamed_pictures_is_that_of_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mydata", sys.modules[__name__])
    spec = TensorSpec("input", "float32", ("batch", 3, 32, 32))
    streamed = stream_samples("mydata:large_data", split="train", inputs=(spec,))

    def read(size: int) -> int:
        batches = streamed.batches(size)
        return peak_bytes(lambda: [float(batches[index]["input"].sum()) for index in range(len(batches))])

    prepared_bytes = large_data().train.images.nbytes * 4
    assert read(600) > prepared_bytes
    assert read(10) < prepared_bytes / 10
