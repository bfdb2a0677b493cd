"""Pictures in folders named by their class, already divided into train/ val/ test/ or to be divided here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np

from memopt.errors import InputRefused
from memopt.image import read_image, to_color
from memopt.preprocess import resize
from memopt.tensors import Array
from memopt_models.dataset import Split, split_by_class
from memopt_models.store import Content, Store, describe_files


@dataclass(frozen=True)
class Listing:
    """The files of one part, without their pictures: names are all that grows with their number."""

    folder: Path
    names: list[str]  # CLASS/FILE, sorted
    labels: list[str]  # a class for each

    def __len__(self) -> int:
        return len(self.names)

    def pick(self, rows: Array) -> Listing:
        """These files."""
        return Listing(self.folder, [self.names[row] for row in rows], [self.labels[row] for row in rows])

    def path(self, row: int) -> Path:
        """Where the file is."""
        return self.folder / self.names[row]


def read_class_folders(
    folder: Path, store: Store, *, size: tuple[int, int] | None = None
) -> tuple[list[Split], list[str]]:
    """Train, validation and test, and the names of the classes; pictures are decoded one by one into the store.

    With a folder `train` beside it there are `val` and `test`, each with class folders; else the class folders of
    `folder` are divided 60/20/20, class by class.

    Args:
        folder: where the pictures are.
        store: where decoded pictures are kept, and found again as long as no file changes.
        size: height and width that all are brought to; None takes those of the first picture. Its colour, gray or
            RGB, is always that of all.

    Raises:
        InputRefused: no pictures, a picture that cannot be read, or a class that is not in `train`.
        OutOfResource: the disk is too small for the decoded pictures.
    """
    parts = _list_parts(folder)
    classes = sorted(set(parts[0].labels))
    for part in parts:
        strange = next((row for row, label in enumerate(part.labels) if label not in classes), None)
        if strange is not None:
            raise InputRefused(
                f"{part.path(strange)} is of class {part.labels[strange]!r}, which has no train pictures"
            )
    first = read_image(parts[0].path(0))
    shape = (*(size or first.shape[:2]), first.shape[2])
    made_from = {
        "class folders": [describe_files(map(part.path, range(len(part)))) for part in parts], "shape": shape
    }  # fmt: skip
    images = store.get(made_from, lambda: Content((sum(map(len, parts)), *shape), _decode(parts, shape)))
    ends = list(accumulate(map(len, parts)))
    return [
        Split(images[end - len(part) : end], np.array([classes.index(label) for label in part.labels], np.int64))
        for part, end in zip(parts, ends, strict=True)
    ], classes


def _list_parts(folder: Path) -> list[Listing]:
    folder = folder.absolute()  # another folder's pictures are others, whatever their names
    if (folder / "train").is_dir():
        return [_list_pictures(folder / name) for name in ("train", "val", "test")]
    pictures = _list_pictures(folder)
    parts = [pictures.pick(rows) for rows in split_by_class(np.array(pictures.labels))]
    if not all(map(len, parts)):
        raise InputRefused(f"{folder} has {len(pictures)} pictures, too few to divide into train, validation and test")
    return parts


def _list_pictures(folder: Path) -> Listing:
    """The files of `folder/CLASS/`, sorted, so that their order does not hang on the disk; dot files are left out."""
    if not folder.is_dir():
        raise InputRefused(f"{folder} is not a folder")
    names, labels = [], []
    for inner in sorted(folder.glob("[!.]*/")):
        files = sorted(path.name for path in inner.glob("[!.]*") if path.is_file())
        names += [f"{inner.name}/{name}" for name in files]
        labels += [inner.name] * len(files)
    if not names:
        raise InputRefused(f"{folder} has no pictures in class folders", hint=f"{folder / 'CLASS' / 'PICTURE.png'}")
    return Listing(folder, names, labels)


def _decode(parts: Sequence[Listing], shape: tuple[int, ...]) -> Iterator[Array]:
    """The pictures, each brought to size and colour as it is read, so that only one is ever there."""
    height, width, channels = shape
    color = "gray" if channels == 1 else "rgb"
    for part in parts:
        for row in range(len(part)):
            yield resize(to_color(read_image(part.path(row))[None], color), (height, width))
