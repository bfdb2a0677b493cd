"""An artifact: the bytes that a runtime opens, mapped and not copied, with what is known of them."""

from __future__ import annotations

import mmap
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from memopt.cpu import CpuTarget
from memopt.errors import InputRefused, IntegrityError
from memopt.manifest import EngineInfo
from memopt.strict_json import from_json

# File ending -> kind.
KINDS = {".onnx": "onnx", ".engine": "engine", ".pt2": "pt2"}


@dataclass(frozen=True)
class Artifact:
    """One model file, or one variant of a bundle.

    `path` is a file of its own where there is one; `data` is the model and `weights` the external initializers,
    both read-only views of mapped files.
    """

    name: str
    kind: str  # "onnx", "engine", "pt2"
    data: memoryview
    size_bytes: int  # on disk, external initializers included
    path: Path | None = None
    weights: memoryview | None = None
    weights_location: str | None = None  # the name by which the graph calls its external initializers
    engine: EngineInfo | None = None
    cpu: CpuTarget | None = None  # of a graph that is optimized already, and for nothing else
    precision: str | None = None
    packed: bool = False  # the file of weights holds those of products in the kernels' layout too

    def runs_on(self, device: str) -> bool:
        """Whether a runtime that opens it may do so on this device."""
        return self.cpu is None or device == "cpu"


def open_artifact(path: Path) -> Artifact:
    """The artifact in an .onnx, .engine or .pt2 file. An engine needs its sidecar, `X.engine.json`.

    Raises:
        InputRefused: missing, empty or of another kind.
    """
    if path.suffix not in KINDS:
        raise InputRefused(f"{path} is no model file", hint="one of *" + ", *".join(KINDS) + ", *.mopt")
    data = map_file(path)
    external = path.with_name(path.name + ".data")
    size_bytes = len(data) + (external.stat().st_size if path.suffix == ".onnx" and external.is_file() else 0)
    engine = read_sidecar(path) if path.suffix == ".engine" else None
    return Artifact(path.name, KINDS[path.suffix], data, size_bytes, path=path, engine=engine)


def read_sidecar(path: Path) -> EngineInfo:
    """What is known of the engine at `path`, from `X.engine.json` beside it."""
    sidecar = path.with_name(path.name + ".json")
    if not sidecar.is_file():
        raise InputRefused(
            f"{path} has no {sidecar.name} beside it", hint="memopt-export engine MODEL.onnx writes both"
        )
    try:
        return from_json(EngineInfo, sidecar.read_bytes(), where=sidecar.name)
    except IntegrityError as error:
        raise InputRefused(str(error)) from error


def map_file(path: Path) -> memoryview:
    """The file's bytes, read-only, file-backed and shared with every other process that maps it."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # a pipe would wait for its writer
    except FileNotFoundError as error:
        raise InputRefused(f"{path} does not exist") from error
    except (OSError, ValueError) as error:  # ValueError: no file name has a zero byte
        raise InputRefused(f"{path} cannot be read: {getattr(error, 'strerror', error)}") from error
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise InputRefused(f"{path} is {'a directory' if stat.S_ISDIR(status.st_mode) else 'no ordinary file'}")
        if status.st_size == 0:
            raise InputRefused(f"{path} is empty")
        return memoryview(mmap.mmap(handle, 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise InputRefused(f"{path} cannot be read: {error.strerror}") from error
    finally:
        os.close(handle)


def release_pages(view: memoryview) -> None:
    """Lets the kernel drop the resident pages of the mapped file behind `view`; they come back when touched."""
    mapping = view.obj
    if isinstance(mapping, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED)
