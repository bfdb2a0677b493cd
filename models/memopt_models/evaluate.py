"""What a network answers, and how often it is right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from memopt.accuracy import top1
from memopt.preprocess import prepare
from memopt.tensors import Array

if TYPE_CHECKING:
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

    was_training = module.training
    device = next(module.parameters(), torch.empty(0)).device
    module.eval()
    with torch.inference_mode():
        parts = [
            module(torch.from_numpy(inputs[start : start + batch_size]).to(device)).float().cpu().numpy()
            for start in range(0, len(inputs), batch_size)
        ]
    module.train(was_training)
    return np.concatenate(parts)


def score(module: nn.Module, split: Split, steps: Sequence[Mapping[str, Any]], *, batch_size: int = 256) -> float:
    """Top-1 accuracy on the split, 0 to 1; pictures are prepared a batch at a time, so a mapped split stays mapped."""
    batches = range(0, len(split), batch_size)
    logits = [predict(module, prepare(split.images[start : start + batch_size], steps)) for start in batches]
    return top1(np.concatenate(logits), split.labels)


def measure(module: nn.Module, data: DataSet) -> dict[str, float]:
    """The metrics of a finished network: "validation_top1" and "test_top1"."""
    return {
        "validation_top1": score(module, data.validation, data.preprocess),
        "test_top1": score(module, data.test, data.preprocess),
    }
