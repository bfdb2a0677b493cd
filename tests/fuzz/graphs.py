"""Fuzzes the pre-flight of ONNX files: the walk over their bytes, and the rules on what was parsed.

The first session, in a process of its own, is left out: whatever reaches it has passed here.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import onnx
from changes import change_bytes
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper
from tally import Tally

from memopt_export import preflight
from memopt_export.protobuf_walk import walk

FLOAT = TensorProto.FLOAT


def fuzz(rng: random.Random, tally: Tally, done: Callable[[], bool]) -> None:
    """Walks, parses and checks changed ONNX files, with weights inside and beside."""
    seeds = [model.SerializeToString() for model in (make_model(), _external(make_model()))]
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "w.data").write_bytes(bytes(64))
        while not done():
            tally.count(change_bytes(rng, rng.choice(seeds)), lambda data: _check(data, Path(name)))


def make_model() -> onnx.ModelProto:
    """A little of all that the pre-flight looks at: a function, a branch, a quantizer, weights."""
    value = helper.make_tensor_value_info
    relu = helper.make_node("Relu", ["x"], ["r"])
    branch = helper.make_graph([relu], "b", [], [value("r", FLOAT, (2, 3))])
    nodes = [
        helper.make_node("Add", ["x", "w"], ["a"], name="add"),
        helper.make_node("QuantizeLinear", ["a", "s", "z"], ["q"], name="quantize"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], name="dequantize"),
        helper.make_node("f", ["d"], ["e"], domain="local"),
        helper.make_node("If", ["yes"], ["i"], name="if", then_branch=branch, else_branch=branch),
        helper.make_node("Add", ["e", "i"], ["y"], name="last"),
    ]
    tensors = [
        helper.make_tensor("w", FLOAT, (2, 3), [1.0] * 6),
        helper.make_tensor("s", FLOAT, (), [0.5]),
        helper.make_tensor("z", TensorProto.INT8, (), [0]),
        helper.make_tensor("yes", TensorProto.BOOL, (), [True]),
    ]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    function = helper.make_function("local", "f", ["a"], ["b"], [helper.make_node("Relu", ["a"], ["b"])], opsets)
    ends = [value("x", FLOAT, (2, 3))], [value("y", FLOAT, (2, 3))]
    graph = helper.make_graph(nodes, "g", *ends, tensors)
    return helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=9)


def _external(model: onnx.ModelProto) -> onnx.ModelProto:
    tensor = model.graph.initializer[0]
    tensor.ClearField("float_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, text in (("location", "w.data"), ("offset", "0"), ("length", "24")):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, text
    return model


def _check(data: bytes, folder: Path) -> tuple[str, str | None]:
    walk(data)
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError:
        return "refused by protobuf", None
    preflight._check_model(model, folder)
    return "passed on", None
