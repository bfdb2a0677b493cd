"""A network as a graph, by torch.export; for any batch."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

from memopt.errors import InputRefused, first_line

if TYPE_CHECKING:
    import torch

LARGEST_BATCH = 2**16


def trace(module: torch.nn.Module, example: torch.Tensor, network: str) -> torch.export.ExportedProgram:
    """The module's program; the first dimension of its input is free.

    Args:
        module: in the mode in which it shall be traced.
        example: one input, with a batch of at least two.
        network: what an error calls it.

    Raises:
        InputRefused: torch cannot trace it.
    """
    import torch

    batch = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
    try:
        return torch.export.export(module, (example,), dynamic_shapes=({0: batch},))
    except (RuntimeError, ValueError, TypeError) as error:
        raise InputRefused(f"torch.export cannot trace {network}: {first_line(error)}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps off the terminal what torch, torchao and the ONNX exporter log, and deprecate in each other."""
    names = ("torch.onnx", "torch.export", "torch.utils._pytree", "onnxscript", "onnx_ir")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
