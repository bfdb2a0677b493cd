"""What a network answers, and how often it is right."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from memopt.errors import InputRefused
from memopt.tensors import Array
from memopt_models.feed import Feeder

if TYPE_CHECKING:
    import torch
    from torch import nn

    from memopt_models.dataset import DataSet, Split


def predict(module: nn.Module, inputs: Array, *, batch_size: int = 256) -> Array:
    """Logits, (samples, classes), float32, in evaluation mode; the module's mode is left as it was.

    Args:
        module: the network, on any device.
        inputs: prepared samples, (samples, channels, height, width).
        batch_size: samples in memory at a time; the logits do not depend on it beyond rounding.
    """
    import torch

    device = device_of(module)
    with _evaluating(module):
        parts = [
            module(torch.from_numpy(inputs[start : start + batch_size]).to(device)).float().cpu().numpy()
            for start in range(0, len(inputs), batch_size)
        ]
    return np.concatenate(parts)


def score(
    module: nn.Module, split: Split, steps: Sequence[Mapping[str, Any]], *, batch_size: int = 256,
    moves: Array | None = None,
) -> float:  # fmt: skip
    """Top-1 accuracy on the split, 0 to 1; neither pictures nor logits of more than a batch are in memory.

    Args:
        module: the network; where it lies on a GPU, pictures are prepared there.
        split: what it is judged on; a mapped one stays mapped.
        steps: that prepare the pictures.
        batch_size: samples in memory at a time.
        moves: (samples, 2), by how many pixels each picture is moved; None moves none.

    Raises:
        InputRefused: the network does not answer with a number for each class.
    """
    feeder = Feeder(split, steps, batch_size=batch_size, device=device_of(module))
    with _evaluating(module):
        return sum(_right(module(inputs), labels) for inputs, labels in feeder.in_order(moves)) / len(split)


def measure(module: nn.Module, data: DataSet) -> dict[str, float]:
    """The metrics of a finished network: "validation_top1" and "test_top1"."""
    return {
        "validation_top1": score(module, data.validation, data.preprocess),
        "test_top1": score(module, data.test, data.preprocess),
    }


def device_of(module: nn.Module) -> torch.device:
    """Where the module's weights lie; the CPU for one without weights."""
    import torch

    first = next(module.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def _right(logits: torch.Tensor, labels: torch.Tensor) -> int:
    """How many samples have their largest logit, the first of equals, at the label."""
    if logits.ndim != 2 or len(logits) != len(labels):
        shape = tuple(logits.shape)
        raise InputRefused(f"outputs are {shape} for {len(labels)} labels", hint="(samples, classes)")
    return int((logits.argmax(dim=1) == labels).sum())


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Inside, the module is in evaluation mode and keeps nothing for gradients; its mode is left as it was."""
    import torch

    was_training = module.training
    module.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        module.train(was_training)
