"""Fashion-MNIST as networks for photographs want it: three channels, 64x64; a part of it, so that training is brief."""

from __future__ import annotations

from memopt.preprocess import resize
from memopt_models.data import DataSet, Split, make_data, open_data

TRAIN, VALIDATION, TEST = 20_000, 4_000, 4_000


def fashion64() -> DataSet:
    """20000 / 4000 / 4000 pictures, uint8 (n, 64, 64, 3)."""
    data = open_data("fashion-mnist")
    parts = ((data.train, TRAIN), (data.validation, VALIDATION), (data.test, TEST))
    return make_data("fashion64", [_enlarged(split, count) for split, count in parts], data.classes)


def _enlarged(split: Split, count: int) -> Split:
    some = split.pick(slice(min(count, len(split))))
    return Split(resize(some.images, (64, 64)).repeat(3, axis=3), some.labels)
