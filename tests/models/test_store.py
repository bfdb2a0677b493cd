from __future__ import annotations

import gc
import os
import threading
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from memopt.errors import InputRefused, OutOfResource
from memopt_models.dataset import Split
from memopt_models.selection import Selection
from memopt_models.store import Content, Store, default_store, describe_files

KEY = {"what": "numbers"}
NUMBERS = np.arange(60, dtype=np.uint8).reshape(10, 2, 3)


def numbers() -> Content:
    return Content(NUMBERS.shape, [NUMBERS[:4], NUMBERS[4:]])


def never() -> Content:
    pytest.fail("made again")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "store").mkdir(mode=0o700)
    return tmp_path / "store"


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_what_was_made_is_mapped(kept: bool, dtype: str, folder: Path) -> None:
    array = NUMBERS.astype(dtype)
    got = Store(folder if kept else None).get(KEY, lambda: Content(array.shape, [array], dtype))
    np.testing.assert_array_equal(got, array)
    assert got.dtype == dtype
    assert not got.flags.writeable
    assert not got.flags.owndata


@pytest.mark.parametrize("kept", [True, False])
def test_a_split_knows_what_of_it_is_mapped(kept: bool, folder: Path) -> None:
    labels, plain = np.zeros(10, np.int64), NUMBERS[..., None]
    mapped = Store(folder if kept else None).get(KEY, numbers)[..., None]
    assert Split(plain, labels).mapped_bytes == 0
    assert Split(mapped, labels).mapped_bytes == Split(mapped, labels).pick(slice(0, 10)).mapped_bytes == 60
    assert Split(Selection(mapped, np.array([1, 5])), labels[:2]).mapped_bytes == 12


def test_it_is_made_once(folder: Path) -> None:
    Store(folder).get(KEY, numbers)
    np.testing.assert_array_equal(Store(folder).get(KEY, never), NUMBERS)
    other = Store(folder).get({"what": "others"}, lambda: Content((1, 2), [NUMBERS[0, :1, :2]]))
    assert other.shape == (1, 2)
    (first, second) = folder.glob("*.npy")
    assert np.load(first).shape != np.load(second).shape  # they are plain .npy files
    assert first.stat().st_mode & 0o777 == 0o600


def test_what_is_damaged_is_made_again(folder: Path) -> None:
    Store(folder).get(KEY, numbers)
    (path,) = folder.glob("*.npy")
    for damage in (path.read_bytes()[:-1], b"no array", b""):
        path.write_bytes(damage)
        np.testing.assert_array_equal(Store(folder).get(KEY, numbers), NUMBERS)


def test_nothing_stays_where_making_fails(folder: Path) -> None:
    def broken() -> Content:
        def blocks():
            yield NUMBERS[:4]
            raise InputRefused("the fifth picture is broken")

        return Content(NUMBERS.shape, blocks())

    for store in (Store(folder), Store(None)):
        with pytest.raises(InputRefused, match="the fifth picture is broken"):
            store.get(KEY, broken)
    assert not list(folder.glob("*.npy"))
    np.testing.assert_array_equal(Store(folder).get(KEY, numbers), NUMBERS)


def test_the_least_recently_used_goes_when_there_is_too_much(folder: Path) -> None:
    def block(value: int) -> Content:
        return Content((1000,), [np.full(1000, value, np.uint8)])

    store = Store(folder, limit_bytes=2500)  # two, with their headers
    first = store.get({"n": 1}, lambda: block(1))
    store.get({"n": 2}, lambda: block(2))
    for age_s, path in enumerate(sorted(folder.glob("*.npy"), key=lambda path: np.load(path)[0])):
        os.utime(path, (time.time() - 100 + age_s,) * 2)
    store.get({"n": 1}, never)  # used again
    store.get({"n": 3}, lambda: block(3))
    assert sorted(np.load(path)[0] for path in folder.glob("*.npy")) == [1, 3]
    store.get({"n": 4}, lambda: block(4))
    store.get({"n": 5}, lambda: block(5))
    assert (first == 1).all()  # a process that has it mapped keeps it


def test_what_is_larger_than_the_limit_is_gone_with_the_process(folder: Path) -> None:
    np.testing.assert_array_equal(Store(folder, limit_bytes=10).get(KEY, numbers), NUMBERS)
    gc.collect()
    assert not list(folder.iterdir())


def test_a_folder_others_can_write_to_is_left_alone(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder.chmod(0o777)
    np.testing.assert_array_equal(Store(folder).get(KEY, numbers), NUMBERS)
    assert not list(folder.iterdir())
    assert "nothing is kept there" in caplog.text


def test_a_folder_that_cannot_be_made_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    np.testing.assert_array_equal(Store(tmp_path / "file" / "store").get(KEY, numbers), NUMBERS)


@pytest.mark.parametrize("kept", [True, False])
def test_a_disk_that_is_too_small_is_said_before_it_is_full(
    kept: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(50))
    with pytest.raises(OutOfResource, match=r"the decoded samples need 60 B, .* has 50 B; hint: MEMOPT_CACHE"):
        Store(folder if kept else None).get(KEY, numbers)


def test_whoever_comes_second_waits_for_the_first(folder: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slowly() -> Content:
        begun.set()
        assert go_on.wait(20)
        return numbers()

    found: list[np.ndarray] = []
    first = threading.Thread(target=lambda: found.append(Store(folder).get(KEY, slowly)))
    first.start()
    assert begun.wait(20)
    second = threading.Thread(target=lambda: found.append(Store(folder).get(KEY, never)))
    second.start()
    time.sleep(0.05)
    assert not found
    go_on.set()
    first.join(20)
    second.join(20)
    assert len(found) == 2


def test_where_the_store_is_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_store() == Store(None)  # "off", for all tests
    monkeypatch.setenv("MEMOPT_CACHE", "/some/cache")
    assert default_store() == Store(Path("/some/cache/pictures"))
    monkeypatch.delenv("MEMOPT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert default_store() == Store(Path("/xdg/memopt/pictures"))


def test_files_are_described_without_being_read(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    path.chmod(0)
    before = describe_files([path])
    assert describe_files([path]) == before
    path.chmod(0o600)
    path.write_bytes(b"abd")
    assert describe_files([path]) != before
