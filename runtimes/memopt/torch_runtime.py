"""PyTorch, for exported programs (`.pt2`): the reference for accuracy and the baseline for memory."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from memopt.artifact import Artifact
from memopt.errors import BackendError, InputRefused, IntegrityError, OutOfResource
from memopt.strict_json import from_plain
from memopt.tensors import Array, TensorSpec, check_feeds

if TYPE_CHECKING:
    import torch

NAME = "torch"
DEVICES = ("cpu", "cuda")
# The entry of a .pt2 file that names inputs and outputs: {"inputs": [...], "outputs": [...]}, TensorSpecs as JSON.
SPECS = "memopt.json"


def version() -> str | None:
    """The installed version; None without one."""
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return None


def load_library() -> None:
    """Imports torch and torch.export.

    Raises:
        BackendError: not installed, or broken.
    """
    try:
        import torch.export.pt2_archive  # noqa: F401  # the import is the point
    except ImportError as error:
        raise BackendError(f"torch cannot be imported: {error}", hint="pip install 'memopt[torch]'") from error


def unavailable(device: str) -> str | None:
    """Why torch cannot run on `device`; None when it can."""
    if version() is None:
        return "torch is not installed; hint: pip install 'memopt[torch]'"
    if device == "cpu":
        return None
    import torch

    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def refuses(artifact: Artifact) -> str | None:
    """Why torch cannot open this kind of artifact; None when it can."""
    if artifact.kind != "pt2":
        return f"torch opens .pt2, not .{artifact.kind}"
    return None if artifact.path else "torch opens .pt2 files only from a path"


def open(artifact: Artifact, *, device: str = "cpu", threads: int = 0) -> TorchSession:  # noqa: A001  # the arrow's name
    """A session on this device; see `memopt.session.Runtime.open`."""
    reason = refuses(artifact) or unavailable(device)
    if reason or artifact.path is None:
        raise BackendError(reason or "torch opens .pt2 files only from a path")
    load_library()
    import torch

    if threads:
        torch.set_num_threads(threads)
    specs = read_specs(artifact.path)
    try:
        program = torch.export.load(str(artifact.path))
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        raise InputRefused(f"torch cannot open {artifact.name}: {str(error).splitlines()[0]}") from error
    return TorchSession(artifact.name, program.module().to(device), specs, device)


def read_specs(path: Path) -> dict[str, tuple[TensorSpec, ...]]:
    """What the exported program at `path` expects ("inputs") and returns ("outputs"), read without torch.

    Raises:
        InputRefused: not a `.pt2` file of ours.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith(f"/{SPECS}"))
            plain = json.loads(archive.read(name))
        return {key: from_plain(tuple[TensorSpec, ...], plain[key], where=key) for key in ("inputs", "outputs")}
    except (OSError, zipfile.BadZipFile, StopIteration, ValueError, KeyError, TypeError, IntegrityError) as error:
        hint = "memopt-export export CKPT --program OUT.pt2 writes one that does"
        raise InputRefused(f"{path} does not name its inputs", hint=hint) from error


class TorchSession:
    """An exported program on one device. Threads may share it."""

    def __init__(
        self, name: str, module: torch.nn.Module, specs: dict[str, tuple[TensorSpec, ...]], device: str
    ) -> None:
        self._name, self._device = name, device
        self._module: torch.nn.Module | None = module
        self.inputs, self.outputs = specs["inputs"], specs["outputs"]
        self.placement = f"torch {device}"
        self.device_bytes: int | None = None

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        """The outputs, in order; see `memopt.session.Session.run`."""
        import torch

        module = self._module
        if module is None:
            raise BackendError(f"{self._name} is closed")
        check_feeds(self.inputs, feeds)
        try:
            with torch.inference_mode():
                given = [torch.from_numpy(np.ascontiguousarray(feeds[spec.name])) for spec in self.inputs]
                outputs = module(*(tensor.to(self._device) for tensor in given))
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise OutOfResource(f"torch ran out of memory in {self._name}: {str(error).splitlines()[0]}") from error
        except RuntimeError as error:
            raise BackendError(f"torch failed in {self._name}: {str(error).splitlines()[0]}") from error
        outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        return [output.cpu().numpy() for output in outputs]

    def close(self) -> None:
        """Frees the module."""
        self._module = None
