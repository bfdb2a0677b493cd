"""Kernels that a library compiled for one GPU at run time, kept in a file of this user's for its next process."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

from memopt.errors import MemoptError
from memopt.files import is_private, write_atomically
from memopt.strict_json import to_json

MAX_BYTES = 2**30
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class KernelFile:
    """The file, which may not exist yet. What cannot be read or written is as if nothing was kept, and logged."""

    path: Path

    @staticmethod
    def of(folder: Path, *made_for: object) -> KernelFile:
        """The file for what these values say: engine, GPU, driver."""
        key = hashlib.sha256(to_json(made_for).encode()).hexdigest()
        return KernelFile(folder / f"{key}.kernels")

    def read(self) -> bytes | None:
        """What was kept; None where nothing is, or others than this user can write to the folder: kernels are code."""
        try:
            if not is_private(self.path.parent) or self.path.stat().st_size > MAX_BYTES:
                return None
            return self.path.read_bytes()
        except OSError:
            return None

    def write(self, data: bytes) -> None:
        """Keeps the kernels, whole or not at all."""
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if is_private(self.path.parent) and data != self.read():
                write_atomically(self.path, data, force=True)
        except (OSError, MemoptError) as error:
            _log.info("%s is not kept: %s", self.path, error)
