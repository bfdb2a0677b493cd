"""Data sets that torchvision downloads, checks and unpacks; what lies there already is opened without it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from memopt.errors import InputRefused
from memopt_models.dataset import DataSet, Split, make_data
from memopt_models.idx import has_idx_files, map_split
from memopt_models.store import Content, default_store, describe_files

_DIGITS = tuple("0123456789")
_CLOTHES = ("t-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
_THINGS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def mnist(root: Path, *, download: bool) -> DataSet:
    """LeCun's handwritten digits: 55000 + 5000 + 10000 gray pictures of 28x28, mapped from `root/MNIST/raw`."""
    return _idx_data("mnist", root, "MNIST", _DIGITS, download=download)


def fashion_mnist(root: Path, *, download: bool) -> DataSet:
    """Zalando's articles of clothing, as many and as large as MNIST's, mapped from `root/FashionMNIST/raw`."""
    return _idx_data("fashion-mnist", root, "FashionMNIST", _CLOTHES, download=download)


def cifar10(root: Path, *, download: bool) -> DataSet:
    """Krizhevsky's things: 45834 + 4166 + 10000 RGB pictures of 32x32, mapped from the store.

    Their files are pickles; torchvision opens them, once and only when their MD5 is the published one.
    """
    whole, test = (_stored_cifar10(root, train=train, download=download) for train in (True, False))
    return make_data("cifar10", [*_hold_out(whole), test], _THINGS)


def _stored_cifar10(root: Path, *, train: bool, download: bool) -> Split:
    """One part, out of the store; its pickles are opened where it is not there yet."""
    folder, store = root / "cifar-10-batches-py", default_store()

    @cache
    def fetch() -> Any:
        return _fetch("cifar10", "CIFAR10", root, train=train, download=download)

    if not folder.is_dir():
        fetch()  # the files, before they can be described
    made_from = {"cifar10": describe_files(sorted(folder.glob("*_batch*"))), "train": train}
    images = store.get({**made_from, "of": "images"}, lambda: Content(fetch().data.shape, [fetch().data]))
    labels = store.get(
        {**made_from, "of": "labels"}, lambda: Content((len(fetch().targets),), [np.array(fetch().targets, np.uint8)])
    )
    return Split(images, labels.astype(np.int64))


def _idx_data(name: str, root: Path, kind: str, classes: Sequence[str], *, download: bool) -> DataSet:
    folder = root / kind / "raw"
    if not has_idx_files(folder):
        _fetch(name, kind, root, train=False, download=download)
    whole, test = map_split(folder, "train"), map_split(folder, "t10k")
    return make_data(name, [*_hold_out(whole), test], classes)


def _fetch(name: str, kind: str, root: Path, *, train: bool, download: bool) -> Any:
    """The data set of this kind, as torchvision has it."""
    import torchvision

    try:
        return getattr(torchvision.datasets, kind)(root, train=train, download=download)
    except (RuntimeError, OSError) as error:
        reason = str(error).partition("\n")[0]
        tried = f", and the download failed: {reason}" if download else ""
        raise InputRefused(f"{name} is not in {root}{tried}", hint="--data-root DIR, or MEMOPT_DATA_ROOT") from error


def _hold_out(split: Split) -> tuple[Split, Split]:
    """Train and validation: the last twelfth, 5000 of MNIST's 60000, is held out.

    A slice and not a draw: a slice of a mapped file costs no memory, and these files come shuffled.
    """
    cut = len(split) - max(1, len(split) // 12)
    return split.pick(slice(cut)), split.pick(slice(cut, None))
