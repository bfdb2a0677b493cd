"""Samples with classes, divided into train, validation and test; pictures are uint8 until a batch is prepared."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from memopt.errors import InputRefused
from memopt.strict_json import to_json
from memopt.tensors import Array, TensorSpec
from memopt_models.digest import digest_arrays
from memopt_models.selection import Selection

SPLITS = ("train", "validation", "test")
_BLOCK_BYTES = 2**16  # of pictures that are counted at once; numpy counts them as int64


@dataclass(frozen=True, eq=False)
class Split:
    """Samples and their classes: pictures, or what a network takes as it is."""

    images: Array | Selection  # uint8 (n, height, width, 1 or 3), or float32 (n, channels, height, width)
    labels: Array  # int64 (n,)

    def __post_init__(self) -> None:
        images = self.images
        if images.ndim != 4 or not (images.dtype == np.float32 or (self.are_pictures and images.shape[3] in (1, 3))):
            hint = "uint8 (n, h, w, 1 or 3), or float32 (n, channels, h, w)"
            raise InputRefused(f"pictures are {images.dtype} {images.shape}", hint=hint)
        if self.labels.dtype != np.int64 or self.labels.shape != self.images.shape[:1]:
            raise InputRefused(f"labels are {self.labels.dtype} {self.labels.shape} for {len(self.images)} pictures")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def are_pictures(self) -> bool:
        """Whether the samples are uint8, to be prepared."""
        return bool(self.images.dtype == np.uint8)

    @property
    def mapped_bytes(self) -> int:
        """Of samples that lie in a mapped file, whose pages come and go as they are read; 0 for others."""
        images = self.images.array if isinstance(self.images, Selection) else self.images
        return math.prod(self.images.shape) * images.itemsize if _is_mapped(images) else 0

    def pick(self, rows: Array | slice) -> Split:
        """These rows; of a slice, or a selection, the pictures are a view, so that a mapped file stays mapped."""
        images = self.images.pick(rows) if isinstance(self.images, Selection) else self.images[rows]
        return Split(images, self.labels[rows])


@dataclass(frozen=True, eq=False)
class DataSet:
    """Three splits of samples of one size, and how one becomes an input."""

    name: str
    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...]
    preprocess: tuple[dict[str, Any], ...]  # steps of memopt.preprocess
    spec: str | None = None  # what `open_data` was asked for; None for a set that it did not open

    def __post_init__(self) -> None:
        size = self.train.images.shape[1:]
        for name, split in self.splits.items():
            if not len(split):
                raise InputRefused(f"data {self.name!r} has no {name} samples")
            if split.images.shape[1:] != size or split.images.dtype != self.train.images.dtype:
                raise InputRefused(
                    f"data {self.name!r} has pictures of {split.images.shape[1:]} in {name}, {size} in train"
                )
            if split.labels.min() < 0 or split.labels.max() >= len(self.classes):
                raise InputRefused(f"data {self.name!r} has labels outside its {len(self.classes)} classes in {name}")

    @property
    def splits(self) -> dict[str, Split]:
        """The splits by name."""
        return {"train": self.train, "validation": self.validation, "test": self.test}

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of all that a model is made from, as 64 hex digits: pictures, labels, class names, preprocessing."""
        images = {f"{name}.images": split.images for name, split in self.splits.items()}
        labels = {f"{name}.labels": split.labels for name, split in self.splits.items()}
        card = to_json({"classes": self.classes, "preprocess": self.preprocess}).encode()
        return digest_arrays(images | labels | {"card": np.frombuffer(card, np.uint8)})

    @property
    def input_spec(self) -> TensorSpec:
        """What a model of this data takes."""
        _, *shape = self.train.images.shape
        channels_first = (shape[2], shape[0], shape[1]) if self.train.are_pictures else shape
        return TensorSpec("input", "float32", ("batch", *channels_first))


def make_data(name: str, splits: Sequence[Split], classes: Sequence[str]) -> DataSet:
    """A DataSet whose preprocessing brings the train pictures to mean 0 and deviation 1 in each channel.

    What are no pictures has no preprocessing.

    Args:
        name: as it stands in lineage and reports.
        splits: train, validation and test.
        classes: names, in the order of the labels.
    """
    train, validation, test = splits
    if not train.are_pictures:
        return DataSet(name, train, validation, test, tuple(classes), ())
    _, height, width, channels = train.images.shape
    mean, std = channel_statistics(train.images)
    preprocess: tuple[dict[str, Any], ...] = (
        {"op": "decode", "color": "gray" if channels == 1 else "rgb"},
        {"op": "resize", "size": [height, width]},
        {"op": "scale", "factor": 1 / 255},
        {"op": "normalize", "mean": mean, "std": std},
        {"op": "layout", "to": "NCHW"},
    )
    return DataSet(name, train, validation, test, tuple(classes), preprocess)


def channel_statistics(images: Array | Selection) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel in 0 to 1, rounded to 4 digits; exact, from the counts of 256 values.

    >>> channel_statistics(np.array([0, 255], np.uint8).reshape(1, 1, 2, 1))
    ([0.5], [0.5])
    """
    channels, rows = images.shape[3], max(1, _BLOCK_BYTES // math.prod(images.shape[1:]))
    counts = np.zeros((channels, 256), np.int64)
    for start in range(0, len(images), rows):  # the pictures may be a mapped file: never all in memory
        block = images[start : start + rows]
        counts += [np.bincount(block[..., channel].ravel(), minlength=256) for channel in range(channels)]
    shares, values = counts / counts.sum(axis=1, keepdims=True), np.arange(256) / 255
    mean = shares @ values
    std = np.sqrt(np.maximum(shares @ values**2 - mean**2, 0))  # rounding may go below zero in a flat channel
    return [round(float(m), 4) for m in mean], [round(float(s), 4) or 1.0 for s in std]


def split_by_class(labels: Array, *, shares: Sequence[float] = (0.6, 0.2, 0.2), seed: int = 0) -> list[Array]:
    """Rows of each part, sorted: every class is divided by `shares`, drawn with the seed.

    >>> [len(rows) for rows in split_by_class(np.array([0] * 10 + [1] * 5))]
    [9, 3, 3]
    """
    rng = np.random.default_rng(seed)
    parts: list[list[Array]] = [[] for _ in shares]
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        cuts = np.rint(np.cumsum(shares)[:-1] * len(rows)).astype(int)
        for part, piece in zip(parts, np.split(rows, cuts), strict=True):
            part.append(piece)
    return [np.sort(np.concatenate(part)) for part in parts]


def _is_mapped(array: Any) -> bool:
    """Whether the array is a view of a mapped file, through whatever other views."""
    while isinstance(array, np.ndarray):
        array = array.base
    return isinstance(array.obj if isinstance(array, memoryview) else array, mmap.mmap)
