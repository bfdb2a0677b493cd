"""Files are written beside and renamed: a reader sees the old content or the new one, never half of it."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from memopt.errors import InputRefused, OutOfResource, UsageError


def write_atomically(path: Path, data: bytes, *, force: bool = False, mode: int = 0o644) -> None:
    """Writes `data` to `path`, whole or not at all, readable by whom `mode` allows and at no time by others.

    Raises:
        UsageError: the file exists and `force` is not given.
        OutOfResource: the disk is full.
        InputRefused: the folder cannot be written.
    """
    with atomic_file(path, force=force, mode=mode) as file:
        file.write(data)


@contextmanager
def atomic_file(path: Path, *, force: bool = False, mode: int = 0o644) -> Iterator[BinaryIO]:
    """A file open for writing that becomes `path` when the block ends well, and vanishes when it does not."""
    refuse_to_overwrite(path, force=force)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(mode)
        temporary.replace(path)
    except OSError as error:
        _drop(temporary)
        raise _as_ours(error, path) from error
    except BaseException:
        _drop(temporary)
        raise


def refuse_to_overwrite(path: Path, *, force: bool) -> None:
    """Raises UsageError when `path` exists and may not be replaced; a device or a pipe never may."""
    if path.is_dir():
        raise UsageError(f"{path} is a directory", hint=f"-o {path / 'NAME'}")
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is no ordinary file")
    if path.exists() and not force:
        raise UsageError(f"{path} exists", hint="--force replaces it")


def sha256_file(path: Path) -> str:
    """Digest of the file's bytes, as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: BinaryIO) -> str:
    """What hashlib.file_digest does, for Python 3.10."""
    digest = hashlib.sha256()
    while block := file.read(2**20):
        digest.update(block)
    return digest.hexdigest()


def _drop(temporary: Path | None) -> None:
    if temporary is not None:
        temporary.unlink(missing_ok=True)


def _as_ours(error: OSError, path: Path) -> Exception:
    import errno

    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return OutOfResource(f"no space left to write {path}")
    return InputRefused(f"{path} cannot be written: {error.strerror or error}")
