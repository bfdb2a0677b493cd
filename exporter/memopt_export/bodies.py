"""Every body of nodes that a model holds: its graph, its functions, and the branches and loop bodies within them."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class Body:
    """One body, and the tensors that its nodes may read: its own initializers and Constants before those around it."""

    graph: onnx.GraphProto | onnx.FunctionProto
    constants: ChainMap[str, onnx.TensorProto]

    def tensors(self) -> Iterator[tuple[str, onnx.TensorProto]]:
        """All tensors that this body itself stores, each with its name, or that of the node which carries it."""
        for tensor in getattr(self.graph, "initializer", ()):
            yield tensor.name, tensor
        for sparse in getattr(self.graph, "sparse_initializer", ()):
            yield from ((sparse.values.name, part) for part in (sparse.values, sparse.indices))
        for node in self.graph.node:
            name = node.output[0] if node.op_type == "Constant" and node.output else node_label(node)
            yield from ((name, tensor) for attribute in node.attribute for tensor in _carried(attribute))
        for attribute in getattr(self.graph, "attribute_proto", ()):
            yield from ((self.graph.name, tensor) for tensor in _carried(attribute))


def bodies(model: onnx.ModelProto) -> Iterator[Body]:
    """All bodies, each before those inside it. The nesting has to be known to be bounded."""
    for graph in (model.graph, *model.functions):
        yield from _bodies(graph, ChainMap())


def node_label(node: onnx.NodeProto) -> str:
    """What a node is called: its name, its first output, or its operator where it has neither."""
    return node.name or next(iter(node.output), "") or node.op_type


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The branches and loop bodies that a node carries."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _bodies(graph: onnx.GraphProto | onnx.FunctionProto, around: ChainMap[str, onnx.TensorProto]) -> Iterator[Body]:
    constants = around.new_child({tensor.name: tensor for tensor in getattr(graph, "initializer", ())})
    for node in graph.node:
        if node.op_type == "Constant" and node.output:
            constants.update((node.output[0], part.t) for part in node.attribute if part.name == "value")
    yield Body(graph, constants)
    for node in graph.node:
        for inner in subgraphs(node):
            yield from _bodies(inner, constants)


def _carried(attribute: onnx.AttributeProto) -> Iterator[onnx.TensorProto]:
    if attribute.HasField("t"):
        yield attribute.t
    yield from attribute.tensors
    for sparse in (
        *([attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []),
        *attribute.sparse_tensors,
    ):
        yield from (sparse.values, sparse.indices)
