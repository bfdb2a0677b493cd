"""Hostile ONNX files: each is refused in one line that names the thing, by us or by a process that may die of it.

The numbers are those of the list of bad inputs that a bundle has to refuse.
"""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from memopt.errors import BackendError, InputRefused, MemoptError, OutOfResource
from memopt_export import cli, first_session, preflight
from memopt_export.graph import Graph, load_graph, run_graph, save_graph
from memopt_export.protobuf_walk import walk
from memopt_export.simplify import simplify

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
OURS = helper.make_opsetid("", 17)
LOCAL = helper.make_opsetid("local", 1)


def value(name="x", dtype=FLOAT, shape=(2, 3)):
    return helper.make_tensor_value_info(name, dtype, shape)


def weight(array, name="w"):
    return numpy_helper.from_array(np.asarray(array), name)


def model(
    nodes=None, initializers=(), *, inputs=None, outputs=None, functions=(), opsets=(OURS, LOCAL), **how
) -> onnx.ModelProto:
    """x (2, 3) -> y, by default through one Relu."""
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"], name="relu")] if nodes is None else nodes,
        "g",
        [value()] if inputs is None else inputs,
        [value("y", shape=("a", "b"))] if outputs is None else outputs,
        list(initializers),
    )
    return helper.make_model(graph, functions=list(functions), opset_imports=list(opsets), **{"ir_version": 9} | how)


def node(kind, inputs=("x",), outputs=("y",), **attributes):
    return helper.make_node(kind, list(inputs), list(outputs), name=f"my{kind}", **attributes)


def added(array=None, **changed):
    """x + w, with fields of w changed."""
    tensor = weight(np.ones((2, 3), np.float32) if array is None else array)
    for name, content in changed.items():
        if name == "dims":
            del tensor.dims[:]
            tensor.dims.extend(content)
        else:
            setattr(tensor, name, content)
    return model([node("Add", ("x", "w"))], [tensor])


def external(location="w.data", *, count=6, also=(), **entries):
    """x + w, where w's 24 bytes lie in a file beside."""
    result = added()
    tensor = result.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, content in ({"location": location} | entries).items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, str(content)
    for name, offset in also:
        other = result.graph.initializer.add()
        other.CopyFrom(tensor)
        other.name = name
        del other.external_data[1:]
        entry = other.external_data.add()
        entry.key, entry.value = "offset", str(offset)
        entry = other.external_data.add()
        entry.key, entry.value = "length", "24"
    return result


def function(name, nodes):
    return helper.make_function("local", name, ["a"], ["b"], nodes, [OURS, LOCAL])


def call(name, reads, writes):
    return helper.make_node(name, [reads], [writes], domain="local")


def chain(length, *, calls=1, last="Relu"):
    """Functions f0 ... fn, each of which calls the next so many times; the last holds one node."""
    made = []
    for index in range(length):
        names = ["a", *(f"t{i}" for i in range(calls - 1)), "b"]
        made.append(function(f"f{index}", [call(f"f{index + 1}", *pair) for pair in pairwise(names)]))
    inner = call("f0", "a", "b") if last == "f0" else helper.make_node(last, ["a"], ["b"])
    return model([call("f0", "x", "y")], functions=[*made, function(f"f{length}", [inner])])


def length_delimited(number, content):
    def varint(number):
        out = b""
        while number > 0x7F:
            out, number = out + bytes([number & 0x7F | 0x80]), number >> 7
        return out + bytes([number])

    return varint(number << 3 | 2) + varint(len(content)) + content


def nested(depth):
    """Subgraphs in subgraphs, as bytes: no library of ours would write them."""
    graph = b""
    for _ in range(depth):
        attribute = length_delimited(1, b"body") + length_delimited(6, graph)
        graph = length_delimited(1, length_delimited(4, b"Loop") + length_delimited(5, attribute))
    return length_delimited(7, graph)


def nested_types(depth):
    """An input that is a sequence of sequences of sequences."""
    kind = length_delimited(1, b"\x08\x01")
    for _ in range(depth):
        kind = length_delimited(4, length_delimited(1, kind))
    return length_delimited(7, length_delimited(11, length_delimited(1, b"x") + length_delimited(2, kind)))


def quantized(scale, *, axis=1, zero=None, shape=(2, 3), **how):
    """x + dequantized w."""
    extra = [] if zero is None else [weight(np.asarray(zero, np.int8), "z")]
    nodes = [
        node("DequantizeLinear", ("w", "s", *(["z"] if extra else [])), ("d",), axis=axis),
        node("Add", ("x", "d")),
    ]
    return model(nodes, [weight(np.ones(shape, np.int8)), weight(np.asarray(scale, np.float32), "s"), *extra], **how)


def shaped(kind, inputs, *, shape=("a", "b"), **attributes):
    """A node whose int64 inputs are given as lists, and x as "x"."""
    names = [each if isinstance(each, str) else f"i{index}" for index, each in enumerate(inputs)]
    tensors = [weight(each, names[i]) for i, each in enumerate(inputs) if not isinstance(each, str)]
    return model([node(kind, names, **attributes)], tensors, outputs=[value("y", shape=shape)])


def ints(*numbers):
    return np.asarray(numbers, np.int64)


def doubling_concat(times=30):
    """A constant that is joined to itself again and again."""
    nodes = [node("Concat", (f"c{i}", f"c{i}"), (f"c{i + 1}",), axis=0) for i in range(times)]
    nodes.append(node("ReduceSum", (f"c{times}",), ("s",), keepdims=0))
    nodes.append(node("Add", ("x", "s")))
    return model(nodes, [weight(np.ones(8, np.float32), "c0")])


def bomb_in_function():
    inner = [
        helper.make_node("Constant", [], ["n"], value=weight(ints(2**29))),
        helper.make_node("ConstantOfShape", ["n"], ["big"], name="big"),
        helper.make_node("ReduceSum", ["big"], ["sum"], keepdims=0),
        helper.make_node("Add", ["a", "sum"], ["b"]),
    ]
    return model([call("f", "x", "y")], functions=[function("f", inner)])


def bomb_in_branch():
    branch = helper.make_graph(
        [helper.make_node("ConstantOfShape", ["n"], ["big"], name="big"),
         helper.make_node("ReduceSum", ["big"], ["sum"], keepdims=0)],
        "branch", [], [value("sum", shape=())], [weight(ints(2**29), "n")],
    )  # fmt: skip
    nodes = [node("If", ("yes",), ("c",), then_branch=branch, else_branch=branch), node("Add", ("x", "c"))]
    return model(nodes, [weight(np.asarray(True), "yes")])


def without(field):
    result = model()
    result.ClearField(field)
    return result


def sequence_input():
    return model(
        [node("SequenceAt", ("q", "i"))], [weight(np.int64(0), "i")],
        inputs=[helper.make_tensor_sequence_value_info("q", FLOAT, None)],
    )  # fmt: skip


def typed(field, numbers, dtype=FLOAT):
    """w with its numbers one by one in a field."""
    result = added()
    tensor = result.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_type = dtype
    getattr(tensor, field).extend(numbers)
    return result


def renamed(name):
    return model([node("Relu", (name,))], inputs=[value(name)])


def with_metadata(number):
    result = model()
    entry = result.metadata_props.add()
    entry.key, entry.value = "memopt", '{"precision": "int8", "weights": "' + "0" * 64 + '"}'
    result.graph.initializer.append(weight(np.full(3, number, np.float32)))
    return result


def pickled():
    return pickle.dumps({"weights": [1.0]}, 4)


def zipped():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("data.pkl", b"x")
    return file.getvalue()


NAN, INFINITE = float("nan"), float("inf")
EXPAND = ("x", ints(2**14, 2**14, 2, 3))
WHOLE = model().SerializeToString()

# Name -> what makes it, and what the one line has to say.
REFUSED: dict[str, tuple[Callable[[], onnx.ModelProto | bytes], str]] = {
    "3 empty": (lambda: b"", "it is empty"),
    "4 random bytes": (lambda: random.Random(0).randbytes(4096), "not a valid ONNX model"),
    "5 cut": (lambda: WHOLE[: len(WHOLE) // 2], "it is cut: byte 4 announces 67 bytes, 40 are left"),
    "6 HTML": (lambda: b"\n<!DOCTYPE html><html>not found</html>", "a page of HTML"),
    "7 git-LFS": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "hint: git lfs pull"),
    "8 pickle": (pickled, "a Python pickle"),
    "9 zip": (zipped, "a zip archive"),
    "10 external missing": (lambda: external("none.data"), "'none.data': No such file"),
    "11 external above": (lambda: external("../w.data"), "'../w.data', outside the model's folder"),
    "11 external above, hidden": (lambda: external("a/../../w.data"), "outside the model's folder"),
    "12 external absolute": (lambda: external("/etc/passwd"), "'/etc/passwd', which is no relative path"),
    "12 external drive": (lambda: external("C:/w.data"), "no relative path"),
    "12 external backslash": (lambda: external("a\\w.data"), "no relative path"),
    "12 external URL": (lambda: external("https://x/w.data"), "no relative path"),
    "12 external nowhere": (lambda: external(""), "no relative path"),
    "13 external link": (lambda: external("link.data"), "through a link; hint: copy"),
    "13 external through a linked folder": (lambda: external("linked/w.data"), "through a link"),
    "13 external folder": (lambda: external("folder"), "is no file"),
    "13 external fifo": (lambda: external("fifo"), "is no file"),
    "14 external NUL": (lambda: external("w.data\0.x"), r"w.data\x00.x"),
    "14 external newline": (lambda: external("w\n.data"), r"w\n.data"),
    "14 tensor name ESC": (lambda: renamed("a\x1b[31mb"), r"'a\x1b[31mb' has control characters"),
    "14 tensor name NUL": (lambda: renamed("a\0b"), r"a\x00b"),
    "14 tensor name turned around": (lambda: renamed("a\u202eb"), r"a\u202eb"),
    "15 memory address": (lambda: external("*/_ORT_MEM_ADDR_/*", offset=4096, length=24), "address in memory"),
    "16 external too short": (lambda: external(offset=4090, length=24), "ends at byte 4114, 'w.data' has 4096"),
    "17 external offset negative": (lambda: external(offset=-4, length=24), "external offset is '-4'"),
    "17 external offset huge": (lambda: external(offset=10**30), "external offset is '1000"),
    "17 external length text": (lambda: external(length="many"), "external length is 'many'"),
    "17 external key": (lambda: external(basepath="/etc"), "described by ['location', 'basepath']"),
    "18 external length lies": (lambda: external(length=20), "take 24 bytes, its external data has 20"),
    "18 external without length": (external, "take 24 bytes, its external data has 4096"),
    "19 external overlap": (lambda: external(offset=0, length=24, also=[("v", 8)]), "'w' and 'v' overlap"),
    "20 dims overflow": (lambda: added(dims=(2**40, 2**40)), "no shape"),
    "20 too many dims": (lambda: added(dims=(1,) * 65), "65 dims"),
    "21 negative dim": (lambda: added(dims=(-2, -3)), "tensor 'w': dims (-2, -3) are no shape"),
    "22 raw data short": (lambda: added(raw_data=b"abcd"), "takes 24 in raw_data, the file has 4"),
    "22 raw data long": (lambda: added(raw_data=bytes(28)), "the file has 28"),
    "22 nothing": (lambda: added(raw_data=b""), "the file has nothing"),
    "22 numbers short": (lambda: typed("float_data", [1.0]), "takes 6 in float_data, the file has 1"),
    "22 numbers elsewhere": (lambda: typed("int32_data", [1] * 6), "the file has 6 in int32_data"),
    "23 unknown dtype": (lambda: added(data_type=99), "tensor 'w': dtype 99 is not known"),
    "23 no dtype": (lambda: added(data_type=0), "dtype UNDEFINED is not known"),
    "23 unknown dtype of an input": (lambda: model(inputs=[value(dtype=99)]), "dtype 99 is not known"),
    "24 no graph": (lambda: without("graph"), "it has no outputs"),
    "24 no outputs": (lambda: model(outputs=[]), "it has no outputs"),
    "25 cycle": (lambda: model([node("Add", ("x", "b"), ("a",)), node("Relu", ("a",), ("b",)), node("Relu", ("b",))]),
                 "topologically sorted, however input 'b'"),
    "26 dangling input": (lambda: model([node("Add", ("x", "nowhere"))]), "input 'nowhere'"),
    "26 dangling output": (lambda: model(outputs=[value("nowhere")]), "nowhere"),
    "27 written twice": (lambda: model([node("Relu"), node("Abs")]), "'y' has been used"),
    "27 input twice": (lambda: model(inputs=[value(), value()]), "input 'x' stands 2 times"),
    "27 weight twice": (lambda: model(initializers=[weight(ints(1))] * 2), "initializer 'w' stands 2 times"),
    "28 unknown operator": (lambda: model([node("Relux")]), "Relux"),
    "29 foreign domain": (lambda: model([node("Gelu", domain="my.ops")]), "node 'myGelu' is a my.ops.Gelu"),
    "29 unknown function": (lambda: model([call("f9", "x", "y")]), "is a local.f9"),
    "29 foreign domain in a function": (
        lambda: model([call("f", "x", "y")], functions=[function("f", [node("Gelu", "a", "b", domain="my.ops")])]),
        "my.ops.Gelu"),
    "30 opset 999": (lambda: model(opsets=[helper.make_opsetid("", 999)]), "opset 999 is not known"),
    "30 opset 0": (lambda: model(opsets=[helper.make_opsetid("", 0)]), "opset 0 is not known"),
    "31 IR 999": (lambda: model(ir_version=999), "IR version 999 is not known"),
    "32 no opset": (lambda: without("opset_import"), "it names no opset"),
    "33 EPContext": (lambda: model([node("EPContext", domain="com.microsoft")]), "'myEPContext' is a EPContext"),
    "33 PyOp": (lambda: model([node("PyOp", domain="com.microsoft")]), "which carries a program"),
    "34 ConstantOfShape": (lambda: shaped("ConstantOfShape", [ints(2**29)], shape=("a",)), "2.00 GiB in node 'myCon"),
    "34 in a function": (bomb_in_function, "unfolds to 2.00 GiB"),
    "34 in a branch": (bomb_in_branch, "unfolds to 2.00 GiB in node 'big'"),
    "34 ConstantOfShape in two dims": (lambda: shaped("ConstantOfShape", [ints(2**15, 2**15)]), "unfolds to 4.00 GiB"),
    "35 Tile": (lambda: shaped("Tile", ["x", ints(2**14, 2**14)]), "'myTile' (Tile)"),
    "35 Concat doubling": (doubling_concat, "'myConcat' (Concat)"),
    "35 Expand": (lambda: shaped("Expand", EXPAND, shape=("a", "b", "c", "d")), "'myExpand' (Expand)"),
    "35 Range": (lambda: model([node("Range", ("a", "b", "c"))],
                               [weight(np.int64(n), k) for k, n in (("a", 0), ("b", 2**31), ("c", 1))],
                               outputs=[value("y", INT64, ("a",))]), "'myRange' (Range)"),
    "35 Pad": (lambda: shaped("Pad", ["x", ints(0, 0, 2**15, 2**15)]), "'myPad' (Pad)"),
    "35 Resize": (lambda: model([node("Resize", ("x", "", "", "sizes"))], [weight(ints(2**15, 2**15), "sizes")]),
                  "'myResize' (Resize)"),
    "36 function chain": (lambda: chain(3000), "more than 1,000 functions"),
    "36 function chain, shorter": (lambda: chain(900), "not a valid ONNX model"),
    "37 recursive function": (lambda: chain(0, last="f0"), "its function 'f0' calls itself"),
    "37 recursive ring": (lambda: chain(5, last="f0"), "calls itself"),
    "38 exponential functions": (lambda: chain(26, calls=2), "unfold to more than 200,000 nodes"),
    "39 subgraphs": (lambda: nested(3000), "subgraphs are nested deeper than 16"),
    "39 types": (lambda: nested_types(3000), "nested too deep"),
    "39 many empty nodes": (lambda: length_delimited(7, b"\x0a\x00" * 300_000), "more than 200,000 nodes"),
    "39 many empty names": (lambda: length_delimited(7, length_delimited(1, b"\x0a\x00" * 3_100_000)), "fields"),
    "41 scale zero": (lambda: quantized(0), "scale 's' of node 'myDequantizeLinear' is not positive"),
    "41 scale negative": (lambda: quantized([1, -1, 1]), "is not positive"),
    "41 scale NaN": (lambda: quantized(NAN), "tensor 's': it holds NaN"),
    "41 scale infinite": (lambda: quantized(INFINITE), "tensor 's': it is a weight and holds an infinity"),
    "41 scale of another axis": (lambda: quantized([1, 1, 1], axis=0), "do not fit axis 0 of (2, 3)"),
    "41 scale without axis": (lambda: quantized([1, 1, 1], axis=7), "do not fit axis 7"),
    "41 zero point of another shape": (lambda: quantized([1, 1, 1], zero=[0, 0]), "its zero point (2,)"),
    "42 NaN": (lambda: added(np.full((2, 3), NAN, np.float32)), "tensor 'w': it holds NaN"),
    "42 NaN, float16": (lambda: added(np.full((2, 3), NAN, np.float16)), "it holds NaN"),
    "42 NaN, bfloat16": (lambda: added(data_type=TensorProto.BFLOAT16, raw_data=b"\xc0\x7f" * 6), "it holds NaN"),
    "42 NaN, float64": (lambda: added(np.full((2, 3), NAN)), "it holds NaN"),
    "42 NaN one by one": (lambda: typed("float_data", [NAN] * 6), "it holds NaN"),
    "42 NaN one by one, float16": (lambda: typed("int32_data", [0x7E00] * 6, TensorProto.FLOAT16), "it holds NaN"),
    "42 NaN in a Constant": (
        lambda: model([node("Constant", (), ("c",), value=weight(np.float32(NAN))), node("Add", ("x", "c"))]),
        "tensor 'c': it holds NaN"),
    "42 NaN in a file beside": (lambda: external("nan.data", length=24), "it holds NaN"),
    "42 infinite weight": (
        lambda: model([node("MatMul", ("x", "w"))], [weight(np.full((3, 3), INFINITE, np.float32))]),
        "it is a weight and holds an infinity"),
    "42 NaN behind our own mark": (lambda: with_metadata(NAN), "it holds NaN"),
    "43 strings": (lambda: model([node("Identity")], inputs=[value(dtype=TensorProto.STRING)]), "'x' holds strings"),
    "43 sequence": (sequence_input, "'q' is a sequence; only tensors are supported"),
    "47 shape lies": (lambda: model(outputs=[value("y", shape=(7, 7))]), "not a valid ONNX model"),
    "47 dtype lies": (lambda: model(outputs=[value("y", INT64, (2, 3))]), "not a valid ONNX model"),
    "text that is not UTF-8": (lambda: WHOLE.replace(b"relu", b"\xff\xfe\xfd\xfc"), "is not UTF-8"),
    "a field of no known kind": (lambda: WHOLE + b"\x0b", "is no ONNX"),
    "a number that never ends": (lambda: WHOLE + b"\x08" + b"\xff" * 12, "is no ONNX"),
}  # fmt: skip


def write(path: Path, content: onnx.ModelProto | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.SerializeToString())
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with what external data may name."""
    (tmp_path / "w.data").write_bytes(np.arange(1024, dtype=np.float32).tobytes())
    (tmp_path / "nan.data").write_bytes(np.full(6, NAN, np.float32).tobytes())
    (tmp_path / "link.data").symlink_to("w.data")
    (tmp_path / "folder").mkdir()
    (tmp_path / "linked").symlink_to(".")
    os.mkfifo(tmp_path / "fifo")
    return tmp_path


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_file_is_refused_in_one_line_that_names_the_thing(folder: Path, name: str) -> None:
    make, said = REFUSED[name]
    path = write(folder / "m.onnx", make())
    before = sorted(folder.iterdir())
    started = time.perf_counter()
    with pytest.raises(InputRefused) as refused:
        preflight.check(path)
    line = str(refused.value)
    assert time.perf_counter() - started < 5
    assert said in line
    assert "m.onnx" in line
    assert line.isprintable()
    assert len(line) < 600
    assert sorted(folder.iterdir()) == before


NESTING = ("36 function chain", "37 recursive ring", "38 exponential functions", "39 subgraphs", "39 types")


@pytest.mark.parametrize("name", NESTING)
def test_hostile_nesting_never_reaches_a_library(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "open_apart", lambda *_, **__: pytest.fail("it was opened"))
    path = write(folder / "m.onnx", REFUSED[name][0]())
    started = time.perf_counter()
    with pytest.raises(InputRefused):
        preflight.check(path)
    assert time.perf_counter() - started < 2


def test_the_walk_costs_no_memory() -> None:
    """8 MB of empty nodes, which a parser would blow up to a gigabyte."""
    data = length_delimited(7, b"\x0a\x00" * 4_000_000)
    tracemalloc.start()
    with pytest.raises(InputRefused, match="more than 200,000 nodes"):
        walk(data)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 2**20


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("none.onnx", "does not exist"),
        ("folder", "is not a file"),
        ("fifo", "is not a file"),
        ("no\x1b.onnx", r"no\x1b.onnx does not exist"),
    ],
)
def test_what_is_no_file_is_refused(folder: Path, path: str, said: str) -> None:
    with pytest.raises(InputRefused) as refused:
        preflight.check(folder / path)
    assert said in str(refused.value)


def test_a_file_beyond_protobufs_limit_is_refused_unread(folder: Path) -> None:
    with (folder / "m.onnx").open("wb") as file:
        file.truncate(2**31)
    with pytest.raises(InputRefused, match=r"2\.00 GiB, 2 GiB is the limit; hint: store the weights as external data"):
        preflight.check(folder / "m.onnx")


@pytest.mark.parametrize("command", ["inspect", "plan", "quantize"])
@pytest.mark.parametrize("name", [
    "5 cut", "7 git-LFS", "11 external above", "14 external NUL", "14 tensor name ESC", "22 raw data short",
    "29 foreign domain", "34 ConstantOfShape", "38 exponential functions", "42 NaN", "43 strings",
])  # fmt: skip
def test_the_command_line_answers_3_with_one_line_and_leaves_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], command: str, name: str
) -> None:
    make, said = REFUSED[name]
    path = write(folder / "m.onnx", make())
    before = sorted(folder.iterdir())
    more = ("--precision", "fp16", "-o", folder / "out.onnx") if command == "quantize" else ()
    with pytest.raises(SystemExit) as ended:
        cli.main([command, str(path), *map(str, more)])
    err = capsys.readouterr().err
    assert ended.value.code == 3
    assert len(err.splitlines()) == 1
    assert said in err
    assert "\x1b" not in err
    assert sorted(folder.iterdir()) == before


def accepted() -> dict[str, Callable[[], onnx.ModelProto]]:
    def loop():
        body = helper.make_graph(
            [helper.make_node("Identity", ["c"], ["c2"]), helper.make_node("Add", ["v", "v"], ["v2"])], "body",
            [value("i", INT64, ()), value("c", TensorProto.BOOL, ()), value("v")],
            [value("c2", TensorProto.BOOL, ()), value("v2")],
        )  # fmt: skip
        return model([node("Loop", ("n", "", "x"), body=body)], [weight(np.int64(3), "n")])

    def branches():
        branch = helper.make_graph([helper.make_node("Relu", ["x"], ["r"])], "b", [], [value("r")])
        other = helper.make_graph([helper.make_node("Neg", ["x"], ["r"])], "b", [], [value("r")])
        return model([node("If", ("yes",), then_branch=branch, else_branch=other)], [weight(np.asarray(True), "yes")])

    return {
        **{f"opset {n}": lambda n=n: model(opsets=[helper.make_opsetid("", n)], ir_version=8) for n in range(9, 25)},
        "IR 3, weights among the inputs": lambda: model(
            [node("Add", ("x", "w"))], [weight(np.ones((2, 3), np.float32))], inputs=[value(), value("w")],
            ir_version=3, opsets=[helper.make_opsetid("", 9)],
        ),
        "loop": loop,
        "branches": branches,
        "functions": lambda: chain(5, calls=2),
        "external": lambda: external(offset=96, length=24),
        "external, tied": lambda: external(offset=0, length=24, also=[("v", 0)]),
        "external, side by side": lambda: external(offset=0, length=24, also=[("v", 24)]),
        "external in a folder": lambda: external("./deep/er/w.data", offset=0, length=24),
        "external, hard link": lambda: external("hard.data", offset=0, length=24),
        "int input": lambda: model([node("Cast", to=FLOAT)], inputs=[value(dtype=INT64)]),
        "scalar input": lambda: model(inputs=[value(shape=())], outputs=[value("y", shape=())]),
        "free batch": lambda: model(inputs=[value(shape=("batch", 3))]),
        "no samples": lambda: model(inputs=[value(shape=(0, 3))]),
        "empty weight": lambda: model([node("Relu")], [weight(np.empty((0, 3), np.float32))]),
        "numbers one by one": lambda: typed("float_data", [1.0] * 6),
        "mask of infinities": lambda: added(np.full((2, 3), -INFINITE, np.float32)),
        "per channel": lambda: quantized([1, 2, 3], zero=[0, 0, 0]),
        "per tensor": lambda: quantized(0.5),
        "unused import": lambda: model(opsets=[OURS, helper.make_opsetid("org.pytorch.aten", 1)]),
        "notes with line breaks": lambda: model(doc_string="a\nb\x1b"),
        "Resize of a reasonable size": lambda: model(
            [node("Resize", ("x", "", "", "sizes"))], [weight(ints(200, 300), "sizes")]),
        "an operator without kernel here": lambda: model(
            [node("Conv", ("x", "w"))], [added(data_type=TensorProto.BFLOAT16, raw_data=bytes(24),
                                               dims=(3, 4, 1, 1)).graph.initializer[0]],
            inputs=[value(dtype=TensorProto.BFLOAT16, shape=(1, 4, 8, 8))],
            outputs=[value("y", TensorProto.BFLOAT16, ("a", "b", "c", "d"))], opsets=[helper.make_opsetid("", 22)]),
    }  # fmt: skip


@pytest.mark.parametrize("name", accepted())
def test_a_good_file_passes_and_loads(folder: Path, name: str) -> None:
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "deep" / "er" / "w.data").write_bytes(bytes(24))
    (folder / "hard.data").hardlink_to(folder / "deep" / "er" / "w.data")
    path = write(folder / "m.onnx", accepted()[name]())
    graph = load_graph(path)
    assert graph.inputs[0].name == "x"
    assert load_graph(path, checked=True).sha256 == graph.sha256
    assert all(tensor.data_location == TensorProto.DEFAULT for tensor in graph.model.graph.initializer)


def test_external_weights_are_the_bytes_in_their_file(folder: Path) -> None:
    graph = load_graph(write(folder / "m.onnx", external(offset=96, length=24)))
    feeds = {"x": np.zeros((2, 3), np.float32)}
    assert np.array_equal(run_graph(graph, feeds)[0], np.arange(24, 30, dtype=np.float32).reshape(2, 3))


def test_what_we_write_passes(tmp_path: Path, tiny_graph: Graph, cnn: Callable, samples_of: Callable) -> None:
    from memopt_export.quantize import quantize
    from memopt_export.recipe import Recipe

    graph = cnn().graph()
    made = [tiny_graph, graph, simplify(graph)]
    made += [quantize(graph, Recipe(name, "cpu"), samples_of(graph)).graph for name in ("int8", "fp16")]
    for index, each in enumerate(made):
        path = tmp_path / f"{index}.onnx"
        save_graph(each, path)
        assert load_graph(path).sha256 == each.sha256


def test_the_first_session_costs_little(tmp_path: Path, tiny_graph: Graph) -> None:
    save_graph(tiny_graph, tmp_path / "m.onnx")
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        load_graph(tmp_path / "m.onnx")
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 2  # 0.25 to 0.4 on an idle core


def test_bytes_known_by_digest_are_not_opened_apart(
    tmp_path: Path, tiny_graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_graph(tiny_graph, tmp_path / "m.onnx")
    opened = []
    monkeypatch.setattr(preflight, "open_apart", lambda path, *_, **__: opened.append(path))
    load_graph(tmp_path / "m.onnx", checked=True)
    assert not opened
    load_graph(tmp_path / "m.onnx")
    assert opened == [tmp_path / "m.onnx"]


CHILDREN = [
    ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", BackendError, "crashed with SIGSEGV"),
    ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", OutOfResource, "more memory"),
    ("import os, sys; sys.stderr.write('std::bad_alloc\\n'); sys.stderr.flush(); os.abort()", OutOfResource, "memory"),
    ("import time; time.sleep(60)", OutOfResource, "was not open after 0.5 seconds"),
    ("raise ValueError('by hand')", BackendError, "code 1 when it opened m.onnx: ValueError: by hand"),
]


@pytest.mark.parametrize(("program", "kind", "said"), CHILDREN)
def test_what_becomes_of_the_other_process_becomes_a_line(
    monkeypatch: pytest.MonkeyPatch, program: str, kind: type[MemoptError], said: str
) -> None:
    import sys

    monkeypatch.setattr(first_session, "_COMMAND", (sys.executable, "-c", program))
    with pytest.raises(kind) as failed:
        first_session.open_apart(Path("m.onnx"), 0, timeout_s=0.5)
    assert said in str(failed.value)
    assert "\n" not in str(failed.value)


@pytest.mark.parametrize(("length", "said"), [(2**29, "unfolds to 2.00 GiB"), (2**20, None)])
def test_a_bomb_whose_size_is_computed_is_seen(folder: Path, length: int, said: str | None) -> None:
    nodes = [node("Mul", ("n", "one"), ("m",)), node("ConstantOfShape", ("m",), ("c",)),
             node("ReduceSum", ("c",), ("s",), keepdims=0), node("Add", ("x", "s"))]  # fmt: skip
    path = write(folder / "m.onnx", model(nodes, [weight(ints(length), "n"), weight(ints(1), "one")]))
    if said is None:
        preflight.check(path)
    else:
        with pytest.raises(InputRefused, match=said):
            preflight.check(path)


def test_a_bomb_whose_size_nobody_can_tell_is_refused(folder: Path) -> None:
    nodes = [node("Abs", ("n",), ("m",)), node("ConstantOfShape", ("m",), ("c",)),
             node("ReduceSum", ("c",), ("s",), keepdims=0), node("Add", ("x", "s"))]  # fmt: skip
    path = write(folder / "m.onnx", model(nodes, [weight(ints(2**29), "n")]))
    with pytest.raises(InputRefused, match=r"who knows what in node 'myConstantOfShape'"):
        preflight.check(path)


def test_a_bomb_that_goes_off_is_told_by_the_memory_it_took(folder: Path) -> None:
    """Its size depends on the shape of an input, by an operator that inference does not follow."""
    nodes = [node("Shape", outputs=("p",)), node("Mul", ("p", "n"), ("q",)), node("Abs", ("q",), ("m",)),
             node("ConstantOfShape", ("m",), ("c",)), node("ReduceSum", ("c",), ("s",), keepdims=0),
             node("Add", ("x", "s"))]  # fmt: skip
    path = write(folder / "m.onnx", model(nodes, [weight(ints(5500), "n")]))  # (11000, 16500) floats: 692 MiB
    with pytest.raises(InputRefused, match="iB to open, far more than it stores"):
        preflight.check(path)


def test_the_other_process_has_a_limit_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_session, "MEMORY_BYTES", 2**27)
    with pytest.raises((OutOfResource, BackendError)):
        preflight.check(write(tmp_path / "m.onnx", model()))


def test_the_current_folder_is_not_importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "m.onnx", model())
    for name in ("onnx", "numpy", "resource"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    preflight.check(Path("m.onnx"))
    assert not (tmp_path / "canary").exists()


def test_an_endless_loop_is_ended() -> None:
    """40: its condition stays true and nobody counts."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["c2"]), helper.make_node("Add", ["v", "one"], ["v2"])], "body",
        [value("i", INT64, ()), value("c", TensorProto.BOOL, ()), value("v")],
        [value("c2", TensorProto.BOOL, ()), value("v2")], [weight(np.float32(1), "one")],
    )  # fmt: skip
    endless = model([node("Loop", ("", "yes", "x"), body=body)], [weight(np.asarray(True), "yes")])
    graph = Graph(endless, "0" * 64)
    started = time.perf_counter()
    with pytest.raises(OutOfResource, match=r"the graph was not done after 0\.3 seconds"):
        run_graph(graph, {"x": np.zeros((2, 3), np.float32)}, timeout_s=0.3)
    assert time.perf_counter() - started < 5


def loads_or_refuses(path: Path, data: bytes) -> bool:
    path.write_bytes(data)
    try:
        load_graph(path)
    except MemoptError as error:
        assert str(error).isprintable()
        return False
    return True


def test_every_truncation_and_500_flips_load_or_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flipped: Callable
) -> None:
    """In this process, so that all are tried: the child's own work, then the session, for what passes our rules."""
    data = quantized([1, 2, 3], zero=[0, 0, 0], opsets=[OURS]).SerializeToString()
    monkeypatch.setattr(preflight, "open_apart", lambda path, *_, **__: first_session._open(path))
    path, rng = tmp_path / "m.onnx", random.Random(0)
    cuts = [loads_or_refuses(path, data[:length]) for length in range(len(data))]
    flips = [loads_or_refuses(path, flipped(data, rng.randrange(len(data)), rng.randrange(8))) for _ in range(500)]
    assert not any(cuts)
    assert 50 < sum(flips) < 450


def test_flips_of_a_number_are_never_a_crash(tmp_path: Path) -> None:
    """The same in the real child, for lengths and dims that were made as large as they can be."""
    data = added().SerializeToString()
    at = data.index(struct.pack("<f", 1.0))
    for position in range(at - 12, at):
        loads_or_refuses(tmp_path / "m.onnx", data[:position] + b"\x7f" + data[position + 1 :])
