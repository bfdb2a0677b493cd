"""Test-time augmentation inside a graph: the mean of its outputs over pictures moved by a pixel.

A network of few weights that halves height and width sees every other position only. Seen from four places, the picture
as it is and moved by a pixel up, left, and both, it answers better, without a weight more; time and activations are
those of a batch four times as large. (Averaging over shifted crops is as old as Krizhevsky et al. 2012, section 4.1.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from memopt.errors import InputRefused, UsageError
from memopt.tensors import Array, show_shape
from memopt_export.graph import Graph

if TYPE_CHECKING:
    from torch import nn

WINDOWS = {1: 1, 4: 2, 9: 3}  # number of views -> height and width of the window of moves


def check_views(views: int) -> None:
    """Raises UsageError for a number of views that there is no window for."""
    if views not in WINDOWS:
        raise UsageError(f"a picture is seen from {views} places", hint="--views 1, 4 or 9")


def seen_from(graph: Graph, views: int) -> Graph:
    """The graph whose outputs are the mean over the views of each sample.

    Args:
        graph: of one input (batch, channels, height, width), all but the batch fixed, and one output (batch, classes).
        views: 4: moved by 0 or 1 pixel up and left; 9: by -1, 0 or 1; what comes in at an edge is 0.

    Raises:
        InputRefused: a graph of other inputs or outputs.
    """
    from onnx import helper, numpy_helper

    channels, height, width, classes = _sizes(graph)
    model = graph.copy_model()
    given, answer = model.graph.input[0].name, model.graph.output[0].name
    moved, each, many = "memopt.moved", "memopt.each", "memopt.views"
    for node in model.graph.node:
        node.input[:] = [each if name == given else name for name in node.input]
        node.output[:] = [many if name == answer else name for name in node.output]
    constants = {
        "memopt.moves": window(channels, views),
        "memopt.batch": np.array([-1, channels, height, width], np.int64),
        "memopt.apart": np.array([-1, views, classes], np.int64),
        "memopt.axis": np.array([1], np.int64),
    }
    before, after = _pads(views)
    first = [
        helper.make_node("Conv", [given, "memopt.moves"], [moved], name=moved, pads=[before, before, after, after]),
        helper.make_node("Reshape", [moved, "memopt.batch"], [each], name=each),
    ]
    last = [
        helper.make_node("Reshape", [many, "memopt.apart"], ["memopt.answers"], name="memopt.answers"),
        helper.make_node("ReduceMean", ["memopt.answers", "memopt.axis"], [answer], name="memopt.mean", keepdims=0),
    ]
    nodes = [*first, *model.graph.node, *last]
    del model.graph.node[:], model.graph.value_info[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
    return graph.with_model(model)


def module_seen_from(module: nn.Module, views: int) -> nn.Module:
    """The same of a torch module."""
    import torch
    from torch import nn
    from torch.nn import functional

    class Seen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = module

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            _, channels, height, width = inputs.shape
            before, after = _pads(views)
            kernel = torch.from_numpy(window(channels, views))
            padded = functional.pad(inputs, (before, after, before, after))
            answers: torch.Tensor = self.body(functional.conv2d(padded, kernel).reshape(-1, channels, height, width))
            return answers.reshape(-1, views, answers.shape[1]).mean(1)

    return Seen().eval()


def window(channels: int, views: int) -> Array:
    """Weights of a convolution that gives all views one after another: (views * channels, channels, side, side)."""
    side = WINDOWS[views]
    places = np.eye(views, dtype=np.float32).reshape(views, 1, 1, side, side)
    return (places * np.eye(channels, dtype=np.float32)[:, :, None, None]).reshape(-1, channels, side, side)


def _pads(views: int) -> tuple[int, int]:
    side = WINDOWS[views]
    return (side - 1) // 2, side // 2


def _sizes(graph: Graph) -> tuple[int, int, int, int]:
    """Channels, height, width, classes."""
    shapes = [spec.shape for spec in (*graph.inputs, *graph.outputs)]
    sizes = [dim for shape in shapes for dim in shape[1:]]
    if [len(shape) for shape in shapes] != [4, 2] or not all(isinstance(dim, int) for dim in sizes):
        shown = ", ".join(show_shape(shape) for shape in shapes)
        raise InputRefused(f"views are for pictures (batch, channels, height, width) -> (batch, classes), got {shown}")
    channels, height, width, classes = (int(dim) for dim in sizes)
    return channels, height, width, classes
