"""Data by name: sets to train on, and samples that a model can run."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np

from memopt.errors import InputRefused, UsageError
from memopt.preprocess import prepare, resize, without_numbers
from memopt.strict_json import to_json
from memopt.tensors import Array, TensorSpec, check_feeds
from memopt_models import downloads, npz
from memopt_models.class_folders import read_class_folders
from memopt_models.dataset import SPLITS, DataSet, Split, make_data, split_by_class
from memopt_models.digest import digest_arrays
from memopt_models.factories import load_factory
from memopt_models.store import default_store

__all__ = [
    "SPLITS", "Batches", "DataSet", "Pictures", "Samples", "Split", "default_root", "is_data_set", "is_known",
    "make_data", "open_data", "open_samples", "stream_samples",
]  # fmt: skip


@dataclass(frozen=True, eq=False)
class Samples:
    """Inputs of a model, ready to run; the first axis counts the samples."""

    feeds: dict[str, Array]
    labels: Array | None  # int64 (n,)
    source: str  # such as "digits/test"
    rows: Array | None = None  # int64 (n,), which samples of the source they are; None: all, or not known

    def __len__(self) -> int:
        return len(next(iter(self.feeds.values())))

    def take(self, n: int, *, seed: int) -> Samples:
        """`n` samples drawn without replacement, in the order they had.

        Raises:
            InputRefused: there are fewer, or `n` is not positive.
        """
        return self.pick(_draw_rows(len(self), n, seed=seed, source=self.source))

    def pick(self, rows: Array | slice) -> Samples:
        """These rows of all arrays; of a slice they are views."""
        labels = None if self.labels is None else self.labels[rows]
        known = self.rows if self.rows is not None else np.arange(len(self))
        feeds = {name: array[rows] for name, array in self.feeds.items()}
        return replace(self, feeds=feeds, labels=labels, rows=known[rows])

    def batches(self, size: int) -> Batches:
        """The inputs, `size` samples at a time; the last batch may be smaller. Views, no copies."""
        return Batches(self, size)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the inputs and labels, as 64 hex digits."""
        labels = {} if self.labels is None else {"labels": self.labels}
        return digest_arrays({f"feeds.{name}": array for name, array in self.feeds.items()} | labels)


@dataclass(frozen=True)
class Batches(Sequence[dict[str, Array]]):
    """The inputs of samples, some at a time; each batch is made when it is read."""

    samples: Samples | Pictures
    size: int

    def __len__(self) -> int:
        return (len(self.samples) + self.size - 1) // self.size

    @overload
    def __getitem__(self, index: int) -> dict[str, Array]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[dict[str, Array]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Array] | Sequence[dict[str, Array]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.samples.pick(slice(index * self.size, (index + 1) * self.size)).feeds


@dataclass(frozen=True, eq=False)
class Pictures:
    """Samples that are prepared when they are read: memory is that of their uint8 pictures and of one batch."""

    split: Split
    steps: Sequence[Mapping[str, Any]]  # of memopt.preprocess
    inputs: tuple[TensorSpec, ...]  # the first takes the pictures
    source: str
    rows: Array | None = None

    def __len__(self) -> int:
        return len(self.split)

    @property
    def labels(self) -> Array:
        """int64 (n,)."""
        return self.split.labels

    @property
    def pictures(self) -> Array | None:
        """uint8 (n, height, width, channels); None where the samples are none."""
        return self.split.images[:] if self.split.are_pictures else None

    def pick(self, rows: Array | slice) -> Samples:
        """These rows, prepared.

        Raises:
            InputRefused: the pictures do not fit the inputs.
        """
        chosen = self.split.pick(rows)
        feeds = {self.inputs[0].name: prepare(chosen.images[:], self.steps)}
        check_feeds(self.inputs, feeds)
        return Samples(feeds, chosen.labels, self.source, None if self.rows is None else self.rows[rows])

    def batches(self, size: int) -> Batches:
        """The inputs, `size` samples at a time."""
        return Batches(self, size)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of pictures, labels and steps, as 64 hex digits."""
        card = np.frombuffer(to_json(tuple(self.steps)).encode(), np.uint8)
        return digest_arrays({"images": self.split.images, "labels": self.split.labels, "card": card})


def open_data(spec: str, *, root: Path | None = None, download: bool = True) -> DataSet:
    """The data set that `spec` names.

    Args:
        spec: "digits" (offline), "mnist", "fashion-mnist", "cifar10", "images:DIR" or "images:DIR@HEIGHTxWIDTH"
            (class folders), "FILE.npz" (see `memopt_models.npz`), or "pkg.mod:function" (returns a DataSet).
        root: where downloaded data lies; None takes `default_root()`.
        download: whether missing data may be fetched.

    Raises:
        UsageError: no such data.
        InputRefused: the data is missing and cannot be fetched, or it is damaged.
    """
    if is_known(spec):
        data = _KNOWN[spec](root or default_root(), download=download)
    elif spec.startswith("images:"):
        data = _images(spec)
    elif spec.endswith(".npz"):
        data = npz.read_npz(Path(spec), default_store())
    elif ":" in spec:
        data = load_factory(spec)()
        if not isinstance(data, DataSet):
            raise UsageError(f"{spec!r} returned a {type(data).__name__}, not a memopt_models.data.DataSet")
    else:
        raise UsageError(f"data {spec!r} is not known", hint=_HINT)
    return replace(data, spec=spec)


def is_data_set(spec: str, inputs: Sequence[TensorSpec]) -> bool:
    """Whether the spec names what `open_data` opens, and not just arrays for a model with these inputs."""
    return not spec.endswith(".npz") or npz.is_data_set(Path(spec), inputs)


def is_known(spec: str) -> bool:
    """Whether the spec names built-in data: to be asked before opening what only a file, such as a checkpoint, names.

    >>> [is_known(spec) for spec in ("digits", "images:pets", "pkg.mod:function", "x.npz")]
    [True, False, False, False]
    """
    return spec in _KNOWN


def open_samples(
    spec: str,
    *,
    split: str,
    inputs: Sequence[TensorSpec],
    root: Path | None = None,
    preprocess: Sequence[Mapping[str, Any]] | None = None,
    count: int | None = None,
    at_most: int | None = None,
    seed: int = 0,
) -> Samples:
    """Samples that a model with these inputs can run.

    Args:
        spec: as for `open_data`, or "FILE.npz" with arrays named and typed as the inputs and, if known, "labels". Its
            rows are shuffled, always in the same way: "train" is the first half of them, "validation" the other one;
            "test" is the whole file, for a file that a user brings to judge a model is there to be judged.
        split: "train", "validation" or "test".
        inputs: of the model; their first dimension is the batch.
        root: as for `open_data`.
        preprocess: the model's own steps; None takes those of the data set, as far as they fit the inputs' dtype.
        count: how many samples, drawn as by `Samples.take` but before they are prepared; None takes all.
        at_most: the same, but a smaller split is taken whole; it goes before `count`.
        seed: of the draw.

    Raises:
        UsageError: no such data or split.
        InputRefused: the samples do not fit the inputs, there are fewer than `count`, or the file is damaged.
    """
    found = stream_samples(
        spec, split=split, inputs=inputs, root=root, preprocess=preprocess, count=count, at_most=at_most, seed=seed
    )
    return found if isinstance(found, Samples) else found.pick(slice(None))


def stream_samples(
    spec: str,
    *,
    split: str,
    inputs: Sequence[TensorSpec],
    root: Path | None = None,
    preprocess: Sequence[Mapping[str, Any]] | None = None,
    count: int | None = None,
    at_most: int | None = None,
    seed: int = 0,
) -> Samples | Pictures:
    """The same samples as by `open_samples`, prepared batch by batch where they are pictures."""
    if split not in SPLITS:
        raise UsageError(f"split {split!r} is not known", hint=", ".join(SPLITS))
    per_sample = [replace(tensor, shape=("batch", *tensor.shape[1:])) for tensor in inputs]
    if not is_data_set(spec, inputs):
        samples = _divide(_read_samples(Path(spec), per_sample), split)
        wanted = count if at_most is None else min(at_most, len(samples))
        return samples if wanted is None else samples.take(wanted, seed=seed)
    data = open_data(spec, root=root)
    chosen, source = data.splits[split], f"{data.name}/{split}"
    wanted = count if at_most is None else min(at_most, len(chosen))
    rows = np.arange(len(chosen))
    if wanted is not None:
        rows = _draw_rows(len(chosen), wanted, seed=seed, source=source)
        chosen = chosen.pick(rows)
    takes_pictures = inputs[0].dtype == "uint8"
    own = without_numbers(data.preprocess) if takes_pictures else data.preprocess
    steps = own if preprocess is None else preprocess
    return Pictures(chosen, steps, tuple(per_sample), source, rows)


def default_root() -> Path:
    """Where downloaded data lies: $MEMOPT_DATA_ROOT, else the user's cache."""
    import os

    return Path(os.environ.get("MEMOPT_DATA_ROOT") or Path.home() / ".cache" / "memopt" / "data")


def _digits(root: Path, *, download: bool) -> DataSet:
    """scikit-learn's 1797 digits, 8x8 with values 0 to 16, brought to 28x28; they come with the library."""
    from sklearn.datasets import load_digits

    pictures, labels = load_digits(return_X_y=True)
    images = np.rint(pictures.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    whole = Split(resize(images, (28, 28)), labels.astype(np.int64))
    return make_data("digits", [whole.pick(rows) for rows in split_by_class(whole.labels)], tuple("0123456789"))


class _Opener(Protocol):
    def __call__(self, root: Path, *, download: bool) -> DataSet: ...


_KNOWN: dict[str, _Opener] = {
    "digits": _digits,
    "mnist": downloads.mnist,
    "fashion-mnist": downloads.fashion_mnist,
    "cifar10": downloads.cifar10,
}


_HINT = f"{', '.join(_KNOWN)}, images:DIR, FILE.npz or pkg.mod:function"


def _draw_rows(available: int, n: int, *, seed: int, source: str) -> Array:
    """`n` different rows of the available ones, sorted."""
    if not 0 < n <= available:
        raise InputRefused(f"{n} samples asked for, {source} has {available}", hint=f"--samples {available}")
    return np.sort(np.random.default_rng(seed).choice(available, n, replace=False))


def _images(spec: str) -> DataSet:
    match = re.fullmatch(r"images:(.+?)(?:@(\d+)x(\d+))?", spec)
    if match is None:
        raise UsageError(f"data {spec!r} names no folder", hint="images:DIR")
    size = (int(match[2]), int(match[3])) if match[2] else None
    if size and not all(0 < side <= 4096 for side in size):
        raise UsageError(f"data {spec!r} asks for pictures of {size[0]}x{size[1]}", hint=f"images:{match[1]}@224x224")
    splits, classes = read_class_folders(Path(match[1]), default_store(), size=size)
    return make_data(spec, splits, classes)


def _read_samples(path: Path, inputs: Sequence[TensorSpec]) -> Samples:
    """Arrays named as the inputs, each with the samples along its first axis, and the labels if there are any."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays: dict[str, Array] = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise InputRefused(f"{path} cannot be read as .npz: {error}") from error
    labels = arrays.pop("labels", None) if "labels" not in [tensor.name for tensor in inputs] else None
    check_feeds(inputs, arrays)
    lengths = {name: len(array) for name, array in arrays.items()} | ({} if labels is None else {"labels": len(labels)})
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise InputRefused(f"{path} has different numbers of samples, or none: {lengths}")
    if labels is not None and (labels.ndim != 1 or labels.dtype.kind not in "iu"):
        raise InputRefused(f"{path} has labels {labels.dtype} {labels.shape}", hint="integers, (samples,)")
    return Samples(arrays, None if labels is None else labels.astype(np.int64), path.name)


def _divide(samples: Samples, split: str) -> Samples:
    """The split of samples that nobody has divided, see `open_samples`; the odd one goes to train."""
    if split == "test":
        return samples
    if len(samples) < 2:
        raise InputRefused(f"{samples.source} has 1 sample, too few to divide into train and validation")
    rows = np.random.default_rng(0).permutation(len(samples))
    middle = (len(rows) + 1) // 2
    chosen = samples.pick(np.sort(rows[:middle] if split == "train" else rows[middle:]))
    return replace(chosen, source=f"{samples.source}/{split}")
