"""Every body of nodes that a model holds: its graph, its functions, and the branches and loop bodies within them."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, Mapping
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


def captured(node: onnx.NodeProto) -> tuple[str, ...]:
    """The tensors from around the node that its subgraphs read, at any depth, each once, in the order of reading."""
    names: dict[str, None] = {}
    for graph in subgraphs(node):
        inner = {value.name for part in (graph.input, graph.initializer) for value in part}
        inner |= {sparse.values.name for sparse in graph.sparse_initializer}
        for each in graph.node:
            reads = (*each.input, *captured(each))
            names.update(dict.fromkeys(name for name in reads if name and name not in inner))
            inner.update(each.output)
        names.update(dict.fromkeys(value.name for value in graph.output if value.name not in inner))
    return tuple(names)


def inner_nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """The nodes inside the branches and loop bodies of the main graph, at any depth."""
    todo = [graph for node in model.graph.node for graph in subgraphs(node)]
    while todo:
        graph = todo.pop(0)
        yield from graph.node
        todo.extend(inner for node in graph.node for inner in subgraphs(node))


def rename_captured(node: onnx.NodeProto, renamed: Mapping[str, str]) -> None:
    """Has the node's subgraphs read other tensors from around it; names that they define themselves stay. In place."""
    for graph in subgraphs(node):
        own = {value.name for part in (graph.input, graph.initializer) for value in part}
        own.update(name for each in graph.node for name in each.output)
        outer = {old: new for old, new in renamed.items() if old not in own}
        for each in graph.node:
            for slot, name in enumerate(each.input):
                each.input[slot] = outer.get(name, name)
            rename_captured(each, outer)
        for value in graph.output:
            value.name = outer.get(value.name, value.name)


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
