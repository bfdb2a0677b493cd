from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

from memopt.errors import InputRefused, UsageError
from memopt.preprocess import prepare
from memopt.tensors import TensorSpec
from memopt_models.data import Pictures, Samples, is_data_set, open_data, open_samples, stream_samples
from memopt_models.dataset import SPLITS
from memopt_models.feed import Feeder
from memopt_models.npz import read_npz
from memopt_models.selection import Selection
from memopt_models.store import Store
from memopt_models.train import TrainSettings, train

NONE = Store(None)
RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (50, 6, 5, 3), np.uint8)
LABELS = np.arange(50) % 3


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.npz"


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("name", ["images", "input"])
@pytest.mark.parametrize(
    "samples",
    [PICTURES, PICTURES[..., :1], PICTURES[..., 0], RNG.normal(size=(50, 2, 4, 3)).astype(np.float32)],
    ids=["rgb", "gray", "gray without an axis", "float"],
)
def test_the_file_is_divided_class_by_class(save, name: str, samples: np.ndarray, path: Path) -> None:
    save(path, **{name: samples}, labels=LABELS.astype(np.int32), classes=np.array(["cat", "dog", "emu"]))
    data = read_npz(path, NONE)
    assert (data.name, data.classes) == ("x.npz", ("cat", "dog", "emu"))
    assert [len(split) for split in data.splits.values()] == [30, 11, 9]
    seen = []
    for split in data.splits.values():
        assert isinstance(split.images, Selection)
        assert not split.images.array.flags.owndata  # it is mapped
        np.testing.assert_array_equal(
            split.images[:].reshape(len(split), -1), samples[split.images.rows].reshape(len(split), -1)
        )
        np.testing.assert_array_equal(split.labels, LABELS[split.images.rows])
        seen += split.images.rows.tolist()
    assert sorted(seen) == list(range(50))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_what_is_fed_are_the_samples(save, path: Path) -> None:
    save(path, images=PICTURES, labels=LABELS)
    data = read_npz(path, NONE)
    rows = np.array([0, 7, 29])
    inputs, _ = Feeder(data.train, data.preprocess, batch_size=8).batch(rows)
    np.testing.assert_array_equal(inputs.numpy(), prepare(PICTURES[data.train.images.rows[rows]], data.preprocess))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_networks_are_trained_on_floats_as_they_are(save, path: Path) -> None:
    inputs = RNG.normal(size=(60, 2, 8, 8)).astype(np.float32)
    save(path, input=inputs, labels=np.arange(60) % 3)
    data = open_data(str(path))
    made = train("simple_cnn", {"channels": [2, 3], "hidden": 4}, data, TrainSettings(epochs=1))
    assert (made.preprocess, made.labels, made.inputs[0].shape) == ((), ("0", "1", "2"), ("batch", 2, 8, 8))
    with pytest.raises(UsageError, match="samples of float32 are no pictures that could be shifted; hint: --shift 0"):
        train("simple_cnn", {}, data, TrainSettings(epochs=1, shift=1))


def test_compressed_samples_are_unpacked_once(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "store").mkdir(mode=0o700)
    np.savez_compressed(path, images=PICTURES, labels=LABELS)
    first = read_npz(path, Store(tmp_path / "store"))
    monkeypatch.setattr("memopt_models.npz._blocks", lambda *_: pytest.fail("unpacked again"))
    assert read_npz(path, Store(tmp_path / "store")).fingerprint == first.fingerprint


def test_the_form_of_the_file_does_not_change_the_data(path: Path) -> None:
    fingerprints = set()
    for save in (np.savez, np.savez_compressed):
        save(path, images=PICTURES, labels=LABELS)
        fingerprints.add(read_npz(path, NONE).fingerprint)
    assert len(fingerprints) == 1


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": PICTURES}, "holds pictures; hint: numpy.savez(FILE, images=..., labels=...)"),
        ({"images": PICTURES}, "holds images; hint"),
        ({"images": PICTURES.astype(float), "labels": LABELS},
         "has images float64 (50, 6, 5, 3); hint: uint8 (n, h, w[, 1 or 3]), or float32 (n, channels, h, w)"),
        ({"images": PICTURES[0, 0], "labels": LABELS}, "has images uint8 (5, 3); hint"),
        ({"images": PICTURES[..., :2], "labels": LABELS}, "has images uint8 (50, 6, 5, 2); hint"),
        ({"images": RNG.normal(size=(50, 7)).astype(np.float32), "labels": LABELS}, "images float32 (50, 7); hint"),
        ({"images": PICTURES.T, "labels": LABELS}, "has images uint8 (3, 5, 6, 50)"),
        ({"images": np.asfortranarray(PICTURES), "labels": LABELS}, "stored by columns; hint: numpy.ascontiguousarray"),
        ({"images": PICTURES, "labels": LABELS[1:]}, "has labels int64 (49,) for 50 samples; hint: integers"),
        ({"images": PICTURES, "labels": LABELS.astype(float)}, "has labels float64 (50,) for 50 samples"),
        ({"images": PICTURES, "labels": LABELS - 1}, "has labels outside its 2 classes"),
        ({"images": PICTURES, "labels": LABELS * 10**6}, "has a label 2000000; hint: labels count from 0"),
        ({"images": PICTURES, "labels": LABELS, "classes": np.array(["a", "b"])}, "outside its 2 classes"),
        ({"images": PICTURES, "labels": LABELS, "classes": np.arange(3)}, "classes int64 (3,); hint: numpy.array"),
        ({"images": PICTURES[:2], "labels": LABELS[:2]}, "has 2 samples, too few to divide into train"),
        ({"images": PICTURES, "labels": np.array([None] * 50)}, "labels.npy holds Python objects"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::UserWarning")  # numpy, of objects
def test_arrays_of_other_kinds_are_refused(arrays: dict[str, np.ndarray], message: str, path: Path) -> None:
    np.savez(path, **arrays)
    with pytest.raises(InputRefused) as raised:
        read_npz(path, NONE)
    assert message in str(raised.value)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_samples_are_refused(save, path: Path) -> None:
    save(path, images=PICTURES, labels=LABELS)
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("images.npy").header_offset
    data = bytearray(path.read_bytes())
    data[start + 1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputRefused, match=r"x\.npz cannot be read as \.npz"):
        read_npz(path, NONE)


@pytest.mark.parametrize("content", [None, b"", b"no archive", b"PK\x03\x04 half an archive"])
def test_a_file_that_is_none_is_refused(content: bytes | None, path: Path) -> None:
    if content is not None:
        path.write_bytes(content)
    assert not is_data_set(str(path), (TensorSpec("input", "float32", ("batch", 1)),))
    with pytest.raises(InputRefused, match=r"x\.npz cannot be read as \.npz"):
        open_data(str(path))


def test_a_header_that_claims_more_than_there_is_is_refused(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("images.npy", "labels.npy"):
            with archive.open(name, "w") as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": (10**9, 100, 100)}
                np.lib.format.write_array_header_1_0(file, header)
    with pytest.raises(InputRefused, match=r"images\.npy has 128 bytes, its header \(1000000000, 100, 100\) speaks of"):
        read_npz(path, NONE)


def test_pictures_are_samples_of_their_split_for_a_model_that_takes_floats(path: Path) -> None:
    np.savez(path, input=PICTURES, labels=LABELS)
    inputs = (TensorSpec("input", "float32", ("batch", 3, 6, 5)),)
    assert is_data_set(str(path), inputs)
    data = open_data(str(path))
    for split in SPLITS:
        found = stream_samples(str(path), split=split, inputs=inputs)
        assert isinstance(found, Pictures)
        samples = open_samples(str(path), split=split, inputs=inputs)
        np.testing.assert_array_equal(samples.feeds["input"], prepare(data.splits[split].images[:], data.preprocess))


def test_arrays_that_a_model_takes_as_they_are_stay_samples(path: Path) -> None:
    np.savez(path, input=PICTURES.astype(np.float32), labels=LABELS)
    inputs = (TensorSpec("input", "float32", ("batch", 6, 5, 3)),)
    assert not is_data_set(str(path), inputs)
    assert isinstance(stream_samples(str(path), split="test", inputs=inputs), Samples)
