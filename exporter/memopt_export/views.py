"""A graph whose outputs are the mean over places that its picture is seen from, see `memopt_models.views`."""

from __future__ import annotations

import numpy as np

from memopt.errors import InputRefused
from memopt.tensors import show_shape
from memopt_export.graph import Graph
from memopt_models.views import pads, window


def graph_seen_from(graph: Graph, views: int) -> Graph:
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
    before, after = pads(views)
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


def _sizes(graph: Graph) -> tuple[int, int, int, int]:
    """Channels, height, width, classes."""
    shapes = [spec.shape for spec in (*graph.inputs, *graph.outputs)]
    sizes = [dim for shape in shapes for dim in shape[1:]]
    if [len(shape) for shape in shapes] != [4, 2] or not all(isinstance(dim, int) for dim in sizes):
        shown = ", ".join(show_shape(shape) for shape in shapes)
        raise InputRefused(f"views are for pictures (batch, channels, height, width) -> (batch, classes), got {shown}")
    channels, height, width, classes = (int(dim) for dim in sizes)
    return channels, height, width, classes
