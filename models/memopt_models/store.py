"""Samples decoded once, into a file that is mapped: private memory does not grow with their number.

    CACHE/0123…ef.npy           named by the sha256 of what it was made from
    CACHE/0123…ef.npy.lock      whoever makes it has it locked; others wait for it

A file is written beside and renamed. The least recently used ones go when all together pass the limit; a process that
has one mapped keeps it. Without a cache, or for samples beyond its limit, the file has no name and is gone with the
process: the disk is used all the same, memory is not.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from memopt.artifact import map_file
from memopt.errors import InputRefused, OutOfResource
from memopt.files import atomic_file, drop_least_recent, is_private, locked
from memopt.npy import read_npy
from memopt.sizes import show_size
from memopt.specialization import cache_folder
from memopt.strict_json import to_json
from memopt.tensors import Array

LIMIT_BYTES = 16 * 2**30
_SCHEMA = "1"  # of how samples are decoded; another one is another name
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Content:
    """What there is to store."""

    shape: tuple[int, ...]
    blocks: Iterable[Array]  # in order, one after another; together they have the shape
    dtype: str = "uint8"

    @property
    def size_bytes(self) -> int:
        """Of all samples."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Store:
    """Decoded samples in one folder of this user's; None keeps none of them beyond the process."""

    folder: Path | None
    limit_bytes: int = LIMIT_BYTES

    def get(self, made_from: Mapping[str, Any], make: Callable[[], Content]) -> Array:
        """The array, read-only and mapped from its file.

        Args:
            made_from: what decides every byte of it, as plain values.
            make: called where it is not there yet, to be decoded block by block.

        Raises:
            OutOfResource: the disk is too small for it.
            InputRefused: what `make` raises for samples that cannot be decoded.
        """
        if self.folder is None or not _is_usable(self.folder):
            return _in_nameless_file(make(), Path(tempfile.gettempdir()))
        key = hashlib.sha256(to_json({"schema": _SCHEMA, **made_from}).encode()).hexdigest()
        path = self.folder / f"{key}.npy"
        found = _find(path)
        if found is not None:
            return found
        lock = path.with_name(f"{path.name}.lock")
        with locked(lock, wait=True):
            found = _find(path)  # somebody else may have made it meanwhile
            if found is None:
                found = self._add(path, make())
            lock.unlink(missing_ok=True)
        return found

    def _add(self, path: Path, content: Content) -> Array:
        if content.size_bytes > self.limit_bytes:
            return _in_nameless_file(content, path.parent)
        _refuse_full_disk(content, path.parent)
        _log.info("decoding %s to %s", show_size(content.size_bytes), path)
        with atomic_file(path, force=True, mode=0o600) as file:
            _write(content, file)
        self._evict(keep=path)
        return read_npy(map_file(path))

    def _evict(self, *, keep: Path) -> None:
        """Removes files, the least recently used first, until the others are within the limit."""
        files = []
        for path in keep.parent.glob("[0-9a-f]*.npy"):
            with contextlib.suppress(OSError):  # another process may evict as well
                status = path.stat()
                files.append((status.st_mtime_ns, status.st_size, path))
        drop_least_recent(files, limit_bytes=self.limit_bytes, keep=keep)


def default_store() -> Store:
    """The store in `$MEMOPT_CACHE`, or the user's cache folder; without a folder where that is "off"."""
    return Store(cache_folder("pictures"))


def describe_files(paths: Iterable[Path]) -> str:
    """sha256 of names, sizes and times of change of the files: it changes when one of them does, and none is read."""
    digest = hashlib.sha256()
    for path in paths:
        status = path.stat()
        # ctime as well: mtime is what archives and rsync set to what it was.
        digest.update(f"{path}\0{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}\n".encode())
    return digest.hexdigest()


def _is_usable(folder: Path) -> bool:
    """Whether only this user can write there, and can."""
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.is_dir() and is_private(folder) and os.access(folder, os.W_OK):
        return True
    _log.warning("%s cannot be written, or by others too: nothing is kept there", folder)
    return False


def _find(path: Path) -> Array | None:
    if not path.exists():
        return None
    try:
        found = read_npy(map_file(path))
    except (InputRefused, ValueError) as error:
        _log.warning("%s is damaged and made again: %s", path, error)
        return None
    with contextlib.suppress(OSError):  # a read-only cache has no order of use
        os.utime(path)
    return found


def _in_nameless_file(content: Content, folder: Path) -> Array:
    """The array in a file that only this process knows."""
    _refuse_full_disk(content, folder)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            _write(content, file)
            file.flush()
            return read_npy(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))
    except OSError as error:
        raise OutOfResource(f"{folder} cannot hold {show_size(content.size_bytes)}: {error.strerror}") from error


def _refuse_full_disk(content: Content, folder: Path) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if content.size_bytes > free_bytes:
        needed, free = show_size(content.size_bytes), show_size(free_bytes)
        raise OutOfResource(f"the decoded samples need {needed}, {folder} has {free}", hint="MEMOPT_CACHE=DIR")


def _write(content: Content, file: BinaryIO) -> None:
    header = {"descr": np.dtype(content.dtype).str, "fortran_order": False, "shape": content.shape}
    np.lib.format.write_array_header_1_0(file, header)
    left_bytes = content.size_bytes
    for block in content.blocks:
        plain = np.ascontiguousarray(block, content.dtype)
        left_bytes -= file.write(plain.reshape(-1).view(np.uint8).data)
    assert left_bytes == 0, f"{left_bytes} bytes of {content.shape} were not made"
