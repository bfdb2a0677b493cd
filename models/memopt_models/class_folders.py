"""Pictures in folders named by their class, already divided into train/ val/ test/ or to be divided here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from memopt.errors import InputRefused
from memopt.image import read_image, to_color
from memopt.preprocess import resize
from memopt_models.dataset import Split, split_by_class


@dataclass(frozen=True)
class Picture:
    """One file and the name of its class."""

    path: Path
    label: str


def read_class_folders(folder: Path, *, size: tuple[int, int] | None = None) -> tuple[list[Split], list[str]]:
    """Train, validation and test, and the names of the classes.

    With a folder `train` beside it there are `val` and `test`, each with class folders; else the class folders of
    `folder` are divided 60/20/20, class by class.

    Args:
        folder: where the pictures are.
        size: height and width that all are brought to; None takes those of the first picture. Its colour, gray or
            RGB, is always that of all.

    Raises:
        InputRefused: no pictures, a picture that cannot be read, or a class that is not in `train`.
    """
    parts = _list_parts(folder)
    classes = sorted({picture.label for picture in parts[0]})
    strangers = [picture for part in parts for picture in part if picture.label not in classes]
    if strangers:
        raise InputRefused(f"{strangers[0].path} is of class {strangers[0].label!r}, which has no train pictures")
    first = read_image(parts[0][0].path)
    height, width = size or first.shape[:2]
    color = "gray" if first.shape[2] == 1 else "rgb"
    return [_read(part, classes, size=(height, width), color=color) for part in parts], classes


def _list_parts(folder: Path) -> list[list[Picture]]:
    if (folder / "train").is_dir():
        return [_list_pictures(folder / name) for name in ("train", "val", "test")]
    pictures = _list_pictures(folder)
    rows = split_by_class(np.array([picture.label for picture in pictures]))
    if not all(len(part) for part in rows):
        raise InputRefused(f"{folder} has {len(pictures)} pictures, too few to divide into train, validation and test")
    return [[pictures[row] for row in part] for part in rows]


def _list_pictures(folder: Path) -> list[Picture]:
    """The files of `folder/CLASS/`, sorted, so that their order does not hang on the disk; dot files are left out."""
    if not folder.is_dir():
        raise InputRefused(f"{folder} is not a folder")
    pictures = [Picture(path, path.parent.name) for path in sorted(folder.glob("[!.]*/[!.]*")) if path.is_file()]
    if not pictures:
        raise InputRefused(f"{folder} has no pictures in class folders", hint=f"{folder / 'CLASS' / 'PICTURE.png'}")
    return pictures


def _read(pictures: Sequence[Picture], classes: Sequence[str], *, size: tuple[int, int], color: str) -> Split:
    """The pictures, each brought to size and colour as it is read, so that only one is ever there in full size."""
    images = [resize(to_color(read_image(picture.path)[None], color), size) for picture in pictures]
    return Split(np.concatenate(images), np.array([classes.index(picture.label) for picture in pictures], np.int64))
