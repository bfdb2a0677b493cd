"""A graph in two files: the nodes, and the initializers at aligned offsets, ready to be mapped."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memopt.archive import MIN_ALIGN, PAGE
from memopt_export.graph import Graph

if TYPE_CHECKING:
    import onnx

# Below this a graph stays one file: a mapping costs at least a page, and gains nothing.
SMALLEST_FILE_BYTES = 64 * 2**10
# Initializers smaller than this stay in the graph; larger ones than PAGE_FROM start on a page of their own.
_SMALLEST_TENSOR_BYTES = 1024
_PAGE_FROM_BYTES = 16 * PAGE


def split(graph: Graph, location: str) -> tuple[bytes, bytes]:
    """The graph with its large initializers moved to a file called `location`, and that file's bytes.

    A graph with little to move comes back whole, with no bytes beside it.
    """
    movable = sum(len(tensor.raw_data) for tensor in graph.model.graph.initializer if _moves(tensor))
    if movable < SMALLEST_FILE_BYTES:
        return graph.data, b""
    model = graph.copy_model()
    weights = bytearray()
    for tensor in model.graph.initializer:
        if _moves(tensor):
            _move(tensor, weights, location)
    return graph.with_model(model).data, bytes(weights)


def _moves(tensor: onnx.TensorProto) -> bool:
    return len(tensor.raw_data) >= _SMALLEST_TENSOR_BYTES


def _move(tensor: onnx.TensorProto, weights: bytearray, location: str) -> None:
    from onnx import TensorProto

    align = PAGE if len(tensor.raw_data) >= _PAGE_FROM_BYTES else MIN_ALIGN
    weights += bytes(-len(weights) % align)
    for key, value in (("location", location), ("offset", len(weights)), ("length", len(tensor.raw_data))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, str(value)
    weights += tensor.raw_data
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
