"""Stages, cached by content: what was made from the same inputs, options and tools is not made again."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from memopt.errors import IntegrityError, OutOfResource
from memopt.files import sha256_file
from memopt.strict_json import from_json, to_json, to_plain

RECORD = "stage.json"
_MAKING = ".making-"
_SHOWS_ONLY = frozenset({
    "cli.py", "__main__.py", "commands.py", "console.py", "inspection.py", "charts.py", "findings.py", "gate.py",
    "options.py", "page.py", "pictures.py", "plan_svg.py", "spread.py", "training_cli.py", "training_commands.py",
})  # fmt: skip
# Distributions whose version changes what a stage makes.
TOOLS = (
    "numpy", "onnx", "onnxruntime-gpu", "onnxruntime", "onnxscript", "scikit-learn", "tensorrt", "tensorrt-rtx",
    "torch", "torch-pruning", "torchvision",
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What a stage made, and whether it was there already."""

    stage: str
    folder: Path
    files: dict[str, str]  # name -> sha256
    seconds: float
    cached: bool

    @property
    def sha256(self) -> str:
        """Digest of all that the stage made."""
        return hashlib.sha256(json.dumps(self.files, sort_keys=True).encode()).hexdigest()

    def read(self, name: str) -> bytes:
        """The bytes of one of its files."""
        return (self.folder / name).read_bytes()


@dataclass(frozen=True)
class _Record:
    stage: str
    key: str
    files: dict[str, str]
    seconds: float


@dataclass(frozen=True)
class Stages:
    """A folder of finished stages. A stage is made in a folder of its own and renamed when it is whole."""

    root: Path
    on_start: Callable[[str], None]
    on_done: Callable[[Outcome], None]

    def run(self, stage: str, made_from: Mapping[str, Any], make: Callable[[Path], None]) -> Outcome:
        """The stage's outcome, from the cache when inputs, options and tools are the same.

        Args:
            stage: its name, such as "quantize dense-int8".
            made_from: all that decides the result: digests of inputs, and options, as JSON values.
            make: writes the stage's files into the folder it is given.

        Raises:
            OutOfResource: the disk is full.
        """
        key, folder = _key(stage, made_from), self.folder_of(stage, made_from)
        found = _find(stage, folder, key)
        if found is None:
            self.on_start(stage)
            found = self._make(stage, folder, key, make)
        self.on_done(found)
        return found

    def folder_of(self, stage: str, made_from: Mapping[str, Any]) -> Path:
        """Where the finished stage lies, or will lie."""
        return self.root / f"{stage.replace(' ', '-')}-{_key(stage, made_from)[:16]}"

    def _make(self, stage: str, folder: Path, key: str, make: Callable[[Path], None]) -> Outcome:
        started = time.perf_counter()
        beside = None
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            _sweep(self.root)
            beside = Path(tempfile.mkdtemp(prefix=f"{_MAKING}{os.getpid()}-", dir=self.root))
            make(beside)
            files = {path.name: sha256_file(path) for path in sorted(beside.iterdir())}
            seconds = time.perf_counter() - started
            (beside / RECORD).write_text(to_json(_Record(stage, key, files, seconds)))
            _move(beside, folder, lambda: _find(stage, folder, key) is not None)
        except OSError as error:
            raise OutOfResource(
                f"{self.root} cannot be written: {error.strerror or error}", hint="--work DIR"
            ) from error
        finally:
            if beside is not None:
                shutil.rmtree(beside, ignore_errors=True)
        return Outcome(stage, folder, files, seconds, cached=False)


@contextmanager
def locked(folder: Path, *, on_wait: Callable[[], None]) -> Iterator[None]:
    """Keeps other processes out of the folder; `on_wait` is told when another one is inside. The kernel frees the lock
    of a process that dies.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise OutOfResource(f"{folder} cannot be written: {error.strerror or error}", hint="--work DIR") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _move(beside: Path, folder: Path, is_there: Callable[[], bool]) -> None:
    """Renames the finished stage into place; where another run was faster, its stage stays."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        beside.rename(folder)
    except OSError:
        if not is_there():
            raise


def _sweep(root: Path) -> None:
    """Removes what a killed run has left behind."""
    for path in root.glob(f"{_MAKING}*"):
        owner = path.name.removeprefix(_MAKING).partition("-")[0]
        if owner.isdigit() and not _lives(int(owner)):
            shutil.rmtree(path, ignore_errors=True)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def tool_versions() -> dict[str, str]:
    """The installed versions of the tools that decide results."""
    versions = {}
    for name in TOOLS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _key(stage: str, made_from: Mapping[str, Any]) -> str:
    parts = {"stage": stage, "from": to_plain(dict(made_from)), "tools": tool_versions(), "memopt": _own_sources()}
    return hashlib.sha256(json.dumps(parts, sort_keys=True, allow_nan=False).encode()).hexdigest()


@cache
def _own_sources() -> str:
    """Digest of memopt's own code: a changed line is a changed tool, except in what only asks and shows."""
    import memopt
    import memopt_export
    import memopt_models

    digest = hashlib.sha256()
    for package in (memopt, memopt_models, memopt_export):
        for path in sorted(Path(str(package.__file__)).parent.rglob("*.py")):
            if path.name not in _SHOWS_ONLY:
                digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _find(stage: str, folder: Path, key: str) -> Outcome | None:
    """A finished stage whose files are still what they were; None otherwise."""
    record_path = folder / RECORD
    if not record_path.is_file():
        return None
    started = time.perf_counter()
    try:
        record = from_json(_Record, record_path.read_bytes(), where=RECORD)
        intact = record.key == key and all(sha256_file(folder / name) == sha for name, sha in record.files.items())
    except (IntegrityError, OSError):
        return None
    return Outcome(stage, folder, record.files, time.perf_counter() - started, cached=True) if intact else None
