"""Nodes that come again and again in the same pattern, written once as a function of the model."""

from __future__ import annotations

import string
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from memopt_export.bodies import captured, subgraphs
from memopt_export.graph import set_nodes
from memopt_export.opset import OWN

if TYPE_CHECKING:
    import onnx

DOMAIN = "f"
_LONGEST = 12  # nodes of a function
_TRIED = 12  # patterns that are tried as the first


@dataclass(frozen=True)
class _Window:
    """Neighbouring nodes of which others read one tensor only."""

    start: int
    stop: int
    body: onnx.FunctionProto  # the same for windows that do the same
    inputs: tuple[str, ...]
    numbers: tuple[int, ...]  # what the body's own attributes are here
    output: str
    size_bytes: int  # of its nodes

    @property
    def key(self) -> bytes:
        return bytes(self.body.SerializeToString(deterministic=True))


def outline(model: onnx.ModelProto) -> None:
    """Replaces patterns by calls as long as that makes the model smaller. In place.

    Which pattern is replaced first decides what is left for others, so the most promising ones are each tried; after
    it goes on with what saves most. Every runtime writes functions out again when it loads a model, so they cost no
    time. Nodes have to be without names, for what is alike to be found alike.
    """
    firsts = _repeated(model)[:_TRIED]
    results = [_outlined(model, first) for first in firsts]
    smallest = min(results, key=lambda result: result.ByteSize(), default=model)
    if smallest.ByteSize() < model.ByteSize():
        model.CopyFrom(smallest)


def _outlined(model: onnx.ModelProto, windows: list[_Window]) -> onnx.ModelProto:
    """A copy in which these windows are calls, and then others, as long as something saves."""
    result = type(model)()
    result.CopyFrom(model)
    for name in string.ascii_uppercase:
        _call(result, windows, name)
        found = _repeated(result)
        if not found:
            break
        windows = found[0]
    return result


def _repeated(model: onnx.ModelProto) -> list[list[_Window]]:
    """The patterns whose replacement saves something, each as windows apart from each other, what saves most first."""
    groups: dict[bytes, list[_Window]] = {}
    for window in _windows(model):
        group = groups.setdefault(window.key, [])
        if not group or group[-1].stop <= window.start:
            group.append(window)
    saved = [(_saved_bytes(group, first=not model.functions), group) for group in groups.values() if len(group) > 1]
    return [group for bytes_, group in sorted(saved, key=lambda each: -each[0]) if bytes_ > 0]


def _saved_bytes(windows: list[_Window], *, first: bool) -> int:
    calls = sum(_field_bytes(_call_of(window, "A").ByteSize()) for window in windows)
    domain = _field_bytes(5) if first else 0
    return sum(window.size_bytes for window in windows) - calls - _field_bytes(windows[0].body.ByteSize()) - domain


def _windows(model: onnx.ModelProto) -> Iterator[_Window]:
    """All neighbouring nodes that could be a function, by start."""
    nodes = list(model.graph.node)
    readers: dict[str, set[int]] = {value.name: {-1} for value in model.graph.output}
    for index, node in enumerate(nodes):
        for name in (*node.input, *captured(node)):
            readers.setdefault(name, set()).add(index)
    for start in range(len(nodes)):
        for stop in range(start + 1, min(start + _LONGEST, len(nodes)) + 1):
            last = nodes[stop - 1]
            if last.domain not in OWN or any(subgraphs(last)):
                break
            inside = set(range(start, stop))
            written = [name for node in nodes[start:stop] for name in node.output if name]
            left = [name for name in written if readers.get(name, set()) - inside]
            if len(left) == 1 and left[0] == nodes[stop - 1].output[0]:
                plain = _window(model, nodes[start:stop], start, left[0])
                yield plain
                if any(_is_number(attribute) for node in nodes[start:stop] for attribute in node.attribute):
                    yield _with_numbers_outside(plain)


def _window(model: onnx.ModelProto, nodes: list[onnx.NodeProto], start: int, output: str) -> _Window:
    """The window with its body, whose names follow from its structure alone."""
    from onnx import FunctionProto, helper

    written = {name for node in nodes for name in node.output}
    inputs = tuple(dict.fromkeys(name for node in nodes for name in node.input if name and name not in written))
    order = dict.fromkeys((*inputs, *(name for node in nodes for name in node.output if name)))
    short = {name: chr(ord("a") + index) if index < 26 else f"_{index}" for index, name in enumerate(order)}
    body = FunctionProto(name="A", domain=DOMAIN, input=[short[name] for name in inputs], output=[short[output]])
    for node in nodes:
        copy = body.node.add()
        copy.CopyFrom(node)
        for names in (copy.input, copy.output):
            names[:] = [short.get(name, "") for name in names]
    version = max(entry.version for entry in model.opset_import if entry.domain in OWN)
    body.opset_import.append(helper.make_opsetid("", version))
    size = sum(_field_bytes(node.ByteSize()) for node in nodes)
    return _Window(start, start + len(nodes), body, inputs, (), output, size)


def _with_numbers_outside(window: _Window) -> _Window:
    """The same window, whose body is told its numbers by each call: groups of channels, say, may differ."""
    from onnx import AttributeProto, FunctionProto

    body = FunctionProto()
    body.CopyFrom(window.body)
    told = [each for node in body.node for each in node.attribute if _is_number(each)]
    numbers = tuple(each.i for each in told)
    for name, each in zip(string.ascii_lowercase, told, strict=False):
        each.CopyFrom(AttributeProto(name=each.name, type=each.type, ref_attr_name=name))
        body.attribute.append(name)
    return replace(window, body=body, numbers=numbers)


def _is_number(attribute: onnx.AttributeProto) -> bool:
    from onnx import AttributeProto

    return attribute.type == AttributeProto.INT


def _call(model: onnx.ModelProto, windows: list[_Window], name: str) -> None:
    """The function, and a call in place of each window. In place."""
    from onnx import helper

    starts = {window.start: window for window in windows}
    nodes: list[onnx.NodeProto] = []
    index = 0
    while index < len(model.graph.node):
        window = starts.get(index)
        nodes.append(_call_of(window, name) if window is not None else model.graph.node[index])
        index = window.stop if window is not None else index + 1
    set_nodes(model.graph, nodes)
    if not model.functions:
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    function = model.functions.add()
    function.CopyFrom(windows[0].body)
    function.name = name


def _call_of(window: _Window, name: str) -> onnx.NodeProto:
    from onnx import AttributeProto, NodeProto

    call = NodeProto(op_type=name, domain=DOMAIN, input=window.inputs, output=[window.output])
    for attribute, number in zip(window.body.attribute, window.numbers, strict=True):
        call.attribute.append(AttributeProto(name=attribute, type=AttributeProto.INT, i=number))
    return call


def _field_bytes(length: int) -> int:
    """Bytes of a protobuf field of that length, with its tag and its length."""
    return length + (2 if length < 128 else 3)
