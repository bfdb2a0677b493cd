"""Test-time augmentation as a part of the network: the mean of its outputs over pictures moved by a pixel.

A network of few weights that halves height and width sees every other position only. Seen from four places, the picture
as it is and moved by a pixel up, left, and both, it answers better, without a weight more; time and activations are
those of a batch four times as large. (Averaging over shifted crops is as old as Krizhevsky et al. 2012, section 4.1.)
It answers better still when it was trained for that mean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from memopt.errors import UsageError
from memopt.tensors import Array

if TYPE_CHECKING:
    import torch
    from torch import nn

WINDOWS = {1: 1, 4: 2, 9: 3}  # number of views -> height and width of the window of moves


def check_views(views: int) -> None:
    """Raises UsageError for a number of views that there is no window for."""
    if views not in WINDOWS:
        raise UsageError(f"a picture is seen from {views} places", hint="--views 1, 4 or 9")


def seen_from(module: nn.Module, views: int) -> nn.Module:
    """The module whose output is the mean over the views of each sample; the module itself for one view.

    Args:
        module: (batch, channels, height, width) -> (batch, classes).
        views: 4: moved by 0 or 1 pixel up and left; 9: by -1, 0 or 1; what comes in at an edge is 0.
    """
    import torch
    from torch import nn
    from torch.nn import functional

    class Seen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = module

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            _, channels, height, width = inputs.shape
            before, after = pads(views)
            kernel = torch.from_numpy(window(channels, views)).to(inputs)
            padded = functional.pad(inputs, (before, after, before, after))
            answers: torch.Tensor = self.body(functional.conv2d(padded, kernel).reshape(-1, channels, height, width))
            return answers.reshape(-1, views, answers.shape[1]).mean(1)

    return Seen().train(module.training) if views > 1 else module


def window(channels: int, views: int) -> Array:
    """Weights of a convolution that gives all views one after another: (views * channels, channels, side, side)."""
    side = WINDOWS[views]
    places = np.eye(views, dtype=np.float32).reshape(views, 1, 1, side, side)
    return (places * np.eye(channels, dtype=np.float32)[:, :, None, None]).reshape(-1, channels, side, side)


def pads(views: int) -> tuple[int, int]:
    """Pixels that are added before and after the picture, in height as in width."""
    side = WINDOWS[views]
    return (side - 1) // 2, side // 2
