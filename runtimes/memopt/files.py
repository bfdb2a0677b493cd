"""Files and folders are written beside and renamed: a reader sees the old content or the new one, never half of it.

What is being written is locked by its writer. The kernel frees the lock of a process that dies, so the next writer of
the same path knows what a killed one has left behind, and removes it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from memopt.errors import InputRefused, OutOfResource, UsageError, first_line

_BESIDE = ".memopt-tmp"  # how what is being written ends
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # rename(2), linux/fs.h


def write_atomically(path: Path, data: bytes, *, force: bool = False, mode: int = 0o644) -> None:
    """Writes `data` to `path`, whole or not at all, readable by whom `mode` allows and at no time by others.

    Raises:
        UsageError: the file exists and `force` is not given.
        OutOfResource: the disk is full.
        InputRefused: the folder cannot be written.
    """
    write_together({path: (data, mode)}, force=force)


def write_together(files: Mapping[Path, tuple[bytes, int]], *, force: bool = False) -> None:
    """Writes a file and what belongs to it, each with its mode; none is in place before all are whole and on the disk.

    Between the renames there may be a first file without the others, but never one beside others of its predecessor.
    """
    for path in files:
        refuse_to_overwrite(path, force=force)
    with ExitStack() as stack:
        besides = {path: stack.enter_context(_beside(path, _new_file)) for path in files}
        for path, (data, mode) in files.items():
            with _synced(besides[path], mode) as file:
                file.write(data)
        for companion in list(besides)[1:]:
            companion.unlink(missing_ok=True)
        for path, beside in besides.items():
            beside.replace(path)


@contextmanager
def atomic_file(path: Path, *, force: bool = False, mode: int = 0o644) -> Iterator[BinaryIO]:
    """A file open for writing that becomes `path` when the block ends well, and vanishes when it does not."""
    refuse_to_overwrite(path, force=force)
    with _beside(path, _new_file) as beside:
        with _synced(beside, mode) as file:
            yield file
        beside.replace(path)


def write_folder(
    files: Mapping[str, bytes | memoryview], path: Path, *, force: bool = False, is_ours: Callable[[Path], bool]
) -> None:
    """Writes a folder with these files, by relative path, whole or not at all.

    Args:
        files: their contents.
        path: where the folder is to be.
        force: replaces a folder that is there, if it `is_ours`.
        is_ours: whether a folder is of the kind that may be replaced.

    Raises:
        UsageError, OutOfResource, InputRefused: see `write_atomically`.
    """
    with atomic_folder(path, force=force, is_ours=is_ours) as beside:
        for name, data in files.items():
            (beside / name).parent.mkdir(parents=True, exist_ok=True)
            with _synced(beside / name, 0o644) as file:
                file.write(data)


@contextmanager
def atomic_folder(
    path: Path, *, force: bool = False, mode: int = 0o755, is_ours: Callable[[Path], bool]
) -> Iterator[Path]:
    """A folder to write into that becomes `path` when the block ends well, and vanishes when it does not."""
    refuse_to_replace(path, force=force, is_ours=is_ours)
    with _beside(path, tempfile.mkdtemp) as beside:
        yield beside
        beside.chmod(mode)
        _move_into_place(beside, path)


def is_private(folder: Path) -> bool:
    """Whether nobody but this user can write to the folder, or make one of that name."""
    try:
        status = folder.lstat()
    except FileNotFoundError:
        return True
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022


@contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Whether the file at `path`, made where it is missing, could be locked for this block: nobody else has it.

    With `wait` it is locked as soon as nobody else has it. The kernel frees the lock of a process that dies. On a file
    system without locks everybody has it.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0), 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield True
    finally:
        os.close(handle)


def read_text(path: Path) -> str:
    """The text in a file; InputRefused where there is none."""
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputRefused(f"{path} cannot be read as text: {first_line(error)}") from error


def refuse_to_overwrite(path: Path, *, force: bool) -> None:
    """Raises UsageError when `path` exists and may not be replaced; a device or a pipe never may."""
    if path.is_dir():
        raise UsageError(f"{path} is a directory", hint=f"-o {path / 'NAME'}")
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is no ordinary file")
    if path.exists() and not force:
        raise UsageError(f"{path} exists", hint="--force replaces it")


def refuse_own_input(output: Path, inputs: Sequence[Path]) -> None:
    """Raises UsageError when the output would replace what it is made from."""
    for path in inputs:
        if output.exists() and path.exists() and output.samefile(path):
            raise UsageError(f"{output} is what it would be made from", hint=f"-o {output.stem}-new{output.suffix}")


def refuse_to_replace(path: Path, *, force: bool, is_ours: Callable[[Path], bool]) -> None:
    """Raises UsageError when something is at `path`, unless it is a folder of ours and `force` is given."""
    if path.exists() and not (force and path.is_dir() and is_ours(path)):
        raise UsageError(f"{path} exists", hint="--force replaces a folder of the same kind, and nothing else")


def drop_least_recent(entries: Iterable[tuple[int, int, Path]], *, limit_bytes: int, keep: Path) -> None:
    """Removes entries of a cache, the least recently used first, until the others are within the limit.

    Args:
        entries: when it was used last, its bytes, and the file or folder that it is.
        limit_bytes: of all of them together.
        keep: stays, whatever it takes.
    """
    known = sorted(entries)
    total_bytes = sum(size_bytes for _, size_bytes, _ in known)
    for _, size_bytes, entry in known:
        if total_bytes <= limit_bytes:
            break
        if entry == keep:
            continue
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
        total_bytes -= size_bytes


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


@contextmanager
def _beside(path: Path, make: Callable[..., str]) -> Iterator[Path]:
    """What `make` makes beside `path`, locked, and gone after the block unless it has been renamed."""
    beside = lock = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        while lock is None:  # it may be swept before it is locked
            beside = Path(make(prefix=f".{path.name}.", suffix=_BESIDE, dir=path.parent))
            lock = _lock(beside, fcntl.LOCK_EX)
        assert beside is not None
        yield beside
        _sync_folder(path.parent)
    except OSError as error:
        raise _as_ours(error, path) from error
    finally:
        if beside is not None:
            _remove(beside)
        if lock is not None:
            os.close(lock)


def _new_file(**place: Any) -> str:
    handle, path = tempfile.mkstemp(**place)
    os.close(handle)
    return str(path)


def _sweep(path: Path) -> None:
    """Removes what killed writers of `path` have left beside it."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*{_BESIDE}"):
        with suppress(OSError):  # BlockingIOError: its writer lives
            lock = _lock(left, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if lock is not None:
                _remove(left)
                os.close(lock)


def _lock(path: Path, how: int) -> int | None:
    """The handle that keeps a file or folder locked until it is closed; None where it has vanished meanwhile.

    On a file system without locks a writer goes on without; nothing is swept there.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, how)
    except OSError as error:
        if how & fcntl.LOCK_NB or error.errno not in _NO_LOCKS:
            os.close(handle)
            raise
    if path.exists():
        return handle
    os.close(handle)
    return None


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _synced(path: Path, mode: int) -> Iterator[BinaryIO]:
    """The file open for writing; on the disk, and with this mode, when the block ends."""
    with path.open("wb") as file:
        yield file
        file.flush()
        path.chmod(mode)
        os.fsync(file.fileno())


def _move_into_place(beside: Path, path: Path) -> None:
    """Renames the folder `beside` to `path`; a folder that is there changes places with it, and so is dropped.

    A file system that cannot exchange two names gets two renames; killed between them, it keeps the old folder under
    the name `.NAME.old`.
    """
    if not path.exists():
        beside.rename(path)
    elif not _exchange(beside, path):
        old = path.with_name(f".{path.name}.old")
        path.rename(old)
        beside.rename(path)
        shutil.rmtree(old)


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two names in one step; False where the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    failed = renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    if failed and ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS, errno.EXDEV):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return not failed


def _sync_folder(folder: Path) -> None:
    """Makes a rename in the folder last through a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _as_ours(error: OSError, path: Path) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return OutOfResource(f"no space left to write {path}")
    return InputRefused(f"{path} cannot be written: {error.strerror or error}")
