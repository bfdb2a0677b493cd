"""The weights of the best epoch so far, in a file: a second copy in memory would cost as much as the network."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING

from memopt.errors import OutOfResource
from memopt_models.checkpoint import bytes_of

if TYPE_CHECKING:
    import torch
    from torch import nn


class BestWeights:
    """A temporary file that no other process sees, with the bytes of a module's state one after the other."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="memopt-weights-")  # noqa: SIM115  # closed by __exit__

    def keep(self, module: nn.Module) -> None:
        """Writes the module's weights over those of before.

        Raises:
            OutOfResource: the disk is full.
        """
        self._file.seek(0)
        try:
            for tensor in _tensors(module):
                self._file.write(bytes_of(tensor).data)
            self._file.flush()
        except OSError as error:
            raise OutOfResource(
                f"the best weights cannot be kept in {tempfile.gettempdir()}: {error.strerror}", hint="TMPDIR=DIR"
            ) from error

    def restore(self, module: nn.Module) -> None:
        """Gives a module of the same shapes the weights that were kept; one tensor at a time is in memory twice."""
        import torch

        self._file.seek(0)
        for tensor in _tensors(module):
            read = torch.empty(tensor.shape, dtype=tensor.dtype)
            self._file.readinto(bytes_of(read).data)
            tensor.copy_(read)

    def tensors(self, module: nn.Module) -> dict[str, torch.Tensor]:
        """What was kept of a module of the same shapes, by name, as it lies in the file: read where it is used."""
        import torch

        mapped = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)
        kept, at = {}, 0
        for name, tensor in module.state_dict().items():
            size, kind = tensor.numel(), tensor.dtype
            flat = torch.frombuffer(mapped, dtype=kind, count=size, offset=at) if size else torch.empty(0, dtype=kind)
            kept[name] = flat.reshape(tensor.shape)
            at += size * tensor.element_size()
        return kept

    def __enter__(self) -> BestWeights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """All that `state_dict` has, without history."""
    for tensor in module.state_dict().values():
        yield tensor.detach()
