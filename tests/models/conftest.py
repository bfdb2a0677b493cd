"""Data small enough to train on in a blink, and the three checkpoints that come of it."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

from memopt_models.checkpoint import Checkpoint
from memopt_models.data import DataSet, open_data
from memopt_models.distill import DistillSettings, distill
from memopt_models.prune import PruneSettings, prune
from memopt_models.train import TrainSettings, train

settings.register_profile("busy machine", deadline=None)
settings.load_profile("busy machine")

ONE_EPOCH = TrainSettings(epochs=1, learning_rate=2e-3)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small are no faster with two threads, and with the cores of a busy machine much slower."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def digits() -> DataSet:
    return open_data("digits")


@pytest.fixture(scope="session")
def few(digits: DataSet) -> DataSet:
    """Digits, but only 256, 64 and 64 of them."""
    sizes = {"train": 256, "validation": 64, "test": 64}
    return replace(digits, **{name: split.pick(slice(sizes[name])) for name, split in digits.splits.items()})


@pytest.fixture(scope="session")
def dense(few: DataSet) -> Checkpoint:
    return train("simple_cnn", {"hidden": 32}, few, replace(ONE_EPOCH, epochs=4))


@pytest.fixture(scope="session")
def pruned(dense: Checkpoint, few: DataSet) -> Checkpoint:
    return prune(dense, few, PruneSettings(ratio=0.5, ways=("channels-here",), finetune=ONE_EPOCH))


@pytest.fixture(scope="session")
def student(dense: Checkpoint, few: DataSet) -> Checkpoint:
    how = DistillSettings(TrainSettings(epochs=2, learning_rate=1e-2))
    return distill(dense, "ds_cnn", {"width": 4, "depth": 2}, few, how)


@pytest.fixture
def small_mnist(tmp_path: Path) -> Path:
    """A data root with idx files of MNIST's form: 120 + 24 pictures of 28x28."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, n in (("train", 120), ("t10k", 24)):
        write_idx(raw / f"{part}-images-idx3-ubyte", rng.integers(0, 256, (n, 28, 28), np.uint8))
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(n, dtype=np.uint8) % 10)
    return tmp_path


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.tobytes())
