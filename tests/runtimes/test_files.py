from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from memopt.errors import InputRefused, OutOfResource, UsageError
from memopt.files import atomic_file, sha256_file, write_atomically


def test_the_old_content_stays_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_atomically(path, b"old")
    with pytest.raises(RuntimeError), atomic_file(path, force=True) as file:
        file.write(b"half of the new")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


def test_overwriting_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_atomically(path, b"old")
    with pytest.raises(UsageError, match="exists; hint: --force"):
        write_atomically(path, b"new")
    write_atomically(path, b"new", force=True)
    assert path.read_bytes() == b"new"


def test_an_open_file_keeps_its_content_when_it_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_atomically(path, b"old")
    with path.open("rb") as file:
        write_atomically(path, b"new", force=True)
        assert file.read() == b"old"


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, OutOfResource), (errno.EROFS, InputRefused)])
def test_a_full_or_read_only_disk_is_said_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception]
) -> None:
    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(kind, match=str(tmp_path / "x")):
        write_atomically(tmp_path / "x", b"data")
    assert not list(tmp_path.iterdir())


def test_a_folder_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a directory"):
        write_atomically(tmp_path, b"data", force=True)


def test_a_device_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="is no ordinary file"):
        write_atomically(tmp_path / "pipe", b"data", force=True)


def test_the_digest_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_file(tmp_path / "x").startswith("ba7816bf8f01cfea")
