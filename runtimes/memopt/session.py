"""The borders: what every runtime offers, and what an open model answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from memopt.arena import MemoryPool
from memopt.artifact import Artifact
from memopt.tensors import Array, TensorSpec


class Session(Protocol):
    """One open model on one device. `run` may be called from several threads."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What `run` expects."""

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What `run` returns, in order."""

    @property
    def placement(self) -> str:
        """Where the work really runs, as the library says it, such as "CPUExecutionProvider"."""

    @property
    def device_bytes(self) -> int | None:
        """What the session holds on the device by its own account; None when it cannot tell."""

    @property
    def device_method(self) -> str:
        """How `device_bytes` is known, or why it is not."""

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        """The outputs, in order. The arrays belong to the caller.

        Raises:
            InputRefused: names, dtypes or shapes do not fit.
            BackendError: the library failed.
        """

    def trim(self) -> None:
        """Gives back what the session holds without being used; the next run takes it again."""

    def close(self) -> None:
        """Frees what the session holds; closing twice is harmless. A later `run` raises BackendError."""


class Runtime(Protocol):
    """A library that opens artifacts. Modules and objects both serve."""

    @property
    def NAME(self) -> str:  # noqa: N802  # modules serve, and a module's constants are written so
        """The name in the table, in manifests and reports."""

    @property
    def DEVICES(self) -> tuple[str, ...]:  # noqa: N802
        """Where it can run in principle: "cpu", "cuda"."""

    def version(self) -> str | None:
        """The library's version; None when it is not installed. Must not create a context on a device."""

    def load_library(self) -> None:
        """Imports what the runtime needs, so that the library's own memory can be told from the model's.

        Raises:
            BackendError: not installed, or broken.
        """

    def unavailable(self, device: str) -> str | None:
        """Why nothing can run here on `device`; None when it can."""

    def refuses(self, artifact: Artifact) -> str | None:
        """Why this artifact cannot be opened here; None when it can."""

    def open(
        self, artifact: Artifact, *, device: str = "cpu", threads: int = 0, profile: str = "balanced",
        pool: MemoryPool | None = None,
    ) -> Session:  # fmt: skip
        """A session.

        Args:
            artifact: what to open.
            device: one of DEVICES; never another one than was asked for.
            threads: threads within one operator; 0 lets the library choose.
            profile: what it may cost: "fast", "balanced" or "minimum" (memory).
            pool: the memory that it shares with other sessions, where the runtime can.

        Raises:
            UsageError: no such profile.
            BackendError: the runtime or device is not available, or refuses the artifact.
            IntegrityError: the bytes are not what the manifest says.
        """
