from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from memopt.errors import InputRefused
from memopt_models.class_folders import read_class_folders


def draw(path: Path, value: int, *, size: tuple[int, ...] = (4, 6)) -> None:
    """A picture of one value, as .npy."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, np.full(size, value, np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten pictures each of "cat" (value 10) and "dog" (200)."""
    for name, value in (("cat", 10), ("dog", 200)):
        for i in range(10):
            draw(tmp_path / name / f"{i}.npy", value)
    return tmp_path


def test_class_folders_are_divided_class_by_class(folder: Path) -> None:
    splits, classes = read_class_folders(folder)
    assert classes == ["cat", "dog"]
    assert [np.bincount(split.labels).tolist() for split in splits] == [[6, 6], [2, 2], [2, 2]]
    for split in splits:
        assert (split.images[split.labels == 0] == 10).all()
        assert (split.images[split.labels == 1] == 200).all()


def test_folders_that_are_divided_already_stay_divided(tmp_path: Path) -> None:
    for part, value in (("train", 1), ("val", 2), ("test", 3)):
        for name in ("cat", "dog"):
            draw(tmp_path / part / name / "x.npy", value)
    splits, classes = read_class_folders(tmp_path)
    assert classes == ["cat", "dog"]
    assert [split.images.max() for split in splits] == [1, 2, 3]


def test_first_picture_gives_size_and_color_unless_a_size_is_asked_for(folder: Path) -> None:
    draw(folder / "cat" / "9.npy", 10, size=(8, 8, 3))
    assert read_class_folders(folder)[0][0].images.shape[1:] == (4, 6, 1)
    assert read_class_folders(folder, size=(2, 2))[0][0].images.shape[1:] == (2, 2, 1)


def test_same_folder_gives_the_same_splits(folder: Path) -> None:
    one, other = (read_class_folders(folder)[0] for _ in range(2))
    assert all((a.images == b.images).all() and (a.labels == b.labels).all() for a, b in zip(one, other, strict=True))


def test_dot_files_are_left_out(folder: Path) -> None:
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x.npy").write_bytes(b"no picture")
    (folder / "cat" / ".DS_Store").write_bytes(b"no picture")
    assert sum(len(split) for split in read_class_folders(folder)[0]) == 20


def test_what_is_no_folder_of_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="nothing is not a folder"):
        read_class_folders(tmp_path / "nothing")
    with pytest.raises(InputRefused, match=r"has no pictures in class folders; hint: .*/CLASS/PICTURE\.png"):
        read_class_folders(tmp_path)
    draw(tmp_path / "cat" / "1.npy", 1)
    with pytest.raises(InputRefused, match="has 1 pictures, too few to divide into train, validation and test"):
        read_class_folders(tmp_path)


def test_picture_that_cannot_be_read_is_named(folder: Path) -> None:
    (folder / "dog" / "3.npy").write_bytes(b"no picture")
    with pytest.raises(InputRefused, match=r"dog/3\.npy is not a picture that can be read"):
        read_class_folders(folder)


def test_missing_or_unknown_part_is_refused(tmp_path: Path) -> None:
    draw(tmp_path / "train" / "cat" / "1.npy", 1)
    draw(tmp_path / "val" / "cat" / "1.npy", 1)
    with pytest.raises(InputRefused, match="test is not a folder"):
        read_class_folders(tmp_path)
    draw(tmp_path / "test" / "emu" / "1.npy", 1)
    with pytest.raises(InputRefused, match=r"emu/1\.npy is of class 'emu', which has no train pictures"):
        read_class_folders(tmp_path)
