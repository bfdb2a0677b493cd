from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from memopt.errors import InputRefused
from memopt_models.class_folders import read_class_folders
from memopt_models.store import Store

NONE = Store(None)


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
    splits, classes = read_class_folders(folder, NONE)
    assert classes == ["cat", "dog"]
    assert [np.bincount(split.labels).tolist() for split in splits] == [[6, 6], [2, 2], [2, 2]]
    for split in splits:
        assert (split.images[split.labels == 0] == 10).all()
        assert (split.images[split.labels == 1] == 200).all()


def test_folders_that_are_divided_already_stay_divided(tmp_path: Path) -> None:
    for part, value in (("train", 1), ("val", 2), ("test", 3)):
        for name in ("cat", "dog"):
            draw(tmp_path / part / name / "x.npy", value)
    splits, classes = read_class_folders(tmp_path, NONE)
    assert classes == ["cat", "dog"]
    assert [split.images.max() for split in splits] == [1, 2, 3]


def test_first_picture_gives_size_and_color_unless_a_size_is_asked_for(folder: Path) -> None:
    draw(folder / "cat" / "9.npy", 10, size=(8, 8, 3))
    assert read_class_folders(folder, NONE)[0][0].images.shape[1:] == (4, 6, 1)
    assert read_class_folders(folder, NONE, size=(2, 2))[0][0].images.shape[1:] == (2, 2, 1)


def test_same_folder_gives_the_same_splits(folder: Path) -> None:
    one, other = (read_class_folders(folder, NONE)[0] for _ in range(2))
    assert all((a.images == b.images).all() and (a.labels == b.labels).all() for a, b in zip(one, other, strict=True))


def test_dot_files_are_left_out(folder: Path) -> None:
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x.npy").write_bytes(b"no picture")
    (folder / "cat" / ".DS_Store").write_bytes(b"no picture")
    assert sum(len(split) for split in read_class_folders(folder, NONE)[0]) == 20


def test_what_is_no_folder_of_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="nothing is not a folder"):
        read_class_folders(tmp_path / "nothing", NONE)
    with pytest.raises(InputRefused, match=r"has no pictures in class folders; hint: .*/CLASS/PICTURE\.png"):
        read_class_folders(tmp_path, NONE)
    draw(tmp_path / "cat" / "1.npy", 1)
    with pytest.raises(InputRefused, match="has 1 pictures, too few to divide into train, validation and test"):
        read_class_folders(tmp_path, NONE)


def test_picture_that_cannot_be_read_is_named(folder: Path) -> None:
    (folder / "dog" / "3.npy").write_bytes(b"no picture")
    with pytest.raises(InputRefused, match=r"dog/3\.npy is not a picture that can be read"):
        read_class_folders(folder, NONE)


def test_missing_or_unknown_part_is_refused(tmp_path: Path) -> None:
    draw(tmp_path / "train" / "cat" / "1.npy", 1)
    draw(tmp_path / "val" / "cat" / "1.npy", 1)
    with pytest.raises(InputRefused, match="test is not a folder"):
        read_class_folders(tmp_path, NONE)
    draw(tmp_path / "test" / "emu" / "1.npy", 1)
    with pytest.raises(InputRefused, match=r"emu/1\.npy is of class 'emu', which has no train pictures"):
        read_class_folders(tmp_path, NONE)


# --- decoded pictures are stored


@pytest.fixture
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("store")
    folder.chmod(0o700)
    return Store(folder)


def test_stored_pictures_are_those_of_no_store_and_are_decoded_once(
    folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = read_class_folders(folder, NONE)
    first, _ = read_class_folders(folder, store)
    monkeypatch.setattr("memopt_models.class_folders._decode", lambda *_: pytest.fail("decoded again"))
    again, _ = read_class_folders(folder, store)
    for splits in (first, again):
        for split, wanted in zip(splits, expected, strict=True):
            np.testing.assert_array_equal(split.images, wanted.images)
            np.testing.assert_array_equal(split.labels, wanted.labels)
            assert not split.images.flags.writeable


def test_changed_pictures_are_decoded_again(folder: Path, store: Store) -> None:
    def brightest() -> int:
        return max(int(split.images.max()) for split in read_class_folders(folder, store)[0])

    assert brightest() == 200
    path = folder / "dog" / "4.npy"
    before = path.stat()
    draw(path, 222)
    assert brightest() == 222
    draw(path, 233)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as an archive would
    assert brightest() == 233
    draw(folder / "dog" / "10.npy", 244)
    assert brightest() == 244
    assert {len(split.images[0]) for split in read_class_folders(folder, store, size=(8, 8))[0]} == {8}


def test_another_folder_with_files_of_the_same_names_is_another(tmp_path: Path, store: Store) -> None:
    for value in (1, 2):
        for i in range(5):
            draw(tmp_path / str(value) / "cat" / f"{i}.npy", value)
            os.utime(tmp_path / str(value) / "cat" / f"{i}.npy", (0, 0))
    seen = [read_class_folders(tmp_path / str(value), store)[0][0].images.max() for value in (1, 2)]
    assert seen == [1, 2]


@pytest.mark.slow
def test_private_memory_does_not_grow_with_the_number_of_pictures(tmp_path: Path, store: Store) -> None:
    """3000 pictures are 35 MiB decoded; opened, hashed and fed once they may take 2 MiB more than 300."""
    code = (
        "import sys, torch; from pathlib import Path; from memopt.memory import give_back, read_host_memory\n"
        "from memopt_models.class_folders import read_class_folders; from memopt_models.data import make_data\n"
        "from memopt_models.feed import Feeder; from memopt_models.store import Store\n"
        "def held(): give_back(); return read_host_memory().private_bytes\n"
        "def use(folder):\n"
        "    data = make_data('x', *read_class_folders(Path(folder), Store(Path(sys.argv[1]))))\n"
        "    data.fingerprint; print(len(data.train), file=sys.stderr)\n"
        "    for _ in Feeder(data.train, data.preprocess, batch_size=32).in_order(): pass\n"
        "    return data\n"
        "use(sys.argv[2]); before = held(); kept = use(sys.argv[3]); print(held() - before)"
    )
    for n in (300, 3000):
        picture = np.random.default_rng(n).integers(0, 256, (64, 64, 3), np.uint8)
        for i in range(n):
            draw(tmp_path / str(n) / str(i % 3) / f"{i}.npy", 0, size=(64, 64, 3))
            (tmp_path / str(n) / str(i % 3) / f"{i}.npy").write_bytes(
                (tmp_path / str(n) / "0" / "0.npy").read_bytes()[:128] + picture.tobytes()
            )
    command = [sys.executable, "-c", code, str(store.folder), str(tmp_path / "300"), str(tmp_path / "3000")]
    grown_bytes = int(subprocess.run(command, capture_output=True, check=True).stdout)
    assert grown_bytes < 2 * 2**20
