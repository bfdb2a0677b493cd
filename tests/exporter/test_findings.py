"""What costs bytes and need not: each kind is found with its bytes, and its remedy takes it away."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from memopt.errors import BackendError, InputRefused, OutOfResource
from memopt_export import bundle_commands, cli, commands, console, inspection
from memopt_export.execution import Execution, Left
from memopt_export.findings import Finding, Model, bytes_by_dtype, bytes_by_place, find, stored_in
from memopt_export.graph import Graph, save_graph
from memopt_export.quantize import quantize
from memopt_export.recipe import Recipe

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402  # after the skip

KIB = 1024
W = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)  # 16 KiB


def drawn(weights, *, nodes=(), tensors=(), ir_version=9, inputs=(), reads=None, **how) -> onnx.ModelProto:
    """x (batch, 64) through one MatMul for each weight that is read, by default all of them."""
    reads = list(weights) if reads is None else reads
    names = ["x", *(f"h{index}" for index in range(len(reads) - 1)), "y"]
    matmuls = [
        helper.make_node("MatMul", [names[index], name], [names[index + 1]], name=f"matmul{index}")
        for index, name in enumerate(reads)
    ]
    graph = helper.make_graph(
        [*nodes, *matmuls],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64]), *inputs],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 64])],
        [*(numpy_helper.from_array(array, name) for name, array in weights.items()), *tensors],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=ir_version, **how)


def look(model: onnx.ModelProto, execution: Execution | None = None) -> list[Finding]:
    graph = Graph(model, "0" * 64)
    return list(find(Model(graph, stored_in(model, Path()), execution, Path("m.onnx"))))


def only(model: onnx.ModelProto, execution: Execution | None = None) -> Finding:
    (finding,) = look(model, execution)
    return finding


def test_a_model_as_it_should_be_has_nothing_to_find():
    assert look(drawn({"w": W, "v": W * 3})) == []


# --- how it is stored: name -> (model, check, where, file bytes, memory bytes)


def one_by_one():
    typed = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[64, 64])
    typed.float_data.extend(W.ravel().tolist())
    return drawn({}, tensors=[typed], reads=["w"])


def small_integers_one_by_one():
    typed = TensorProto(name="q", data_type=TensorProto.INT8, dims=[64, 64])
    typed.int32_data.extend([-1] * 4096)  # each takes ten bytes
    scale = numpy_helper.from_array(np.float32(0.1), "scale")
    node = helper.make_node("DequantizeLinear", ["q", "scale"], ["w"])
    return drawn({}, nodes=[node], tensors=[typed, scale], reads=["w"])


def constant_node():
    return drawn({}, nodes=[helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(W))], reads=["w"])


def among_inputs():
    return drawn({"w": W}, inputs=[helper.make_tensor_value_info("w", TensorProto.FLOAT, [64, 64])])


def with_notes():
    model = drawn({"w": W}, doc_string="x" * 2 * KIB)
    model.graph.node[0].doc_string = 'File "/home/me/net.py", line 7, in forward'
    return model


BAD = {
    "floats one by one": (one_by_one, "stored one by one", ("w",), (0, 8), 16 * KIB),
    "int8 one by one": (small_integers_one_by_one, "stored one by one", ("q",), (9 * 4096, 8), 4 * KIB),
    "twice": (lambda: drawn({"w": W, "v": W}), "stored twice", ("v",), (16 * KIB, 0), 16 * KIB),
    "never read": (lambda: drawn({"w": W, "v": W * 3}, reads=["w"]), "never read", ("v",), (16 * KIB, 0), 0),
    "Constant": (constant_node, "constant nodes", ("w",), (0, 0), 16 * KIB),
    "among the inputs": (among_inputs, "weights as inputs", ("w",), (21, 4), None),
    "notes": (with_notes, "notes", ("matmul0",), (2 * KIB + 42, 8), 0),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_stored_badly_is_found_with_its_bytes_and_simplify_takes_it_away(tmp_path: Path, name: str) -> None:
    make, check, where, (file_bytes, within), memory_bytes = BAD[name]
    found = only(make())
    assert (found.check, found.where, found.count, found.memory_bytes) == (check, where, len(where), memory_bytes)
    assert abs(found.file_bytes - file_bytes) <= within
    path, simple = tmp_path / "m.onnx", tmp_path / "simple.onnx"
    onnx.save(make(), path)
    saved = commands.simplify(path, simple)
    assert found.remedy == "memopt-export simplify m.onnx -o m-simple.onnx"
    assert look(onnx.load(simple)) == []
    card = 100 + 64  # what our own metadata entry takes, at most
    assert saved.source_bytes - saved.size_bytes >= found.file_bytes - card


def test_before_ir_version_4_weights_are_constants_among_the_inputs_too():
    model = among_inputs()
    model.ir_version = 3
    assert look(model) == []


def test_stack_traces_are_told_for_what_they_give_away():
    assert "1 of them name the source files of whoever exported it" in only(with_notes()).what
    assert "source files" not in only(drawn({"w": W}, doc_string="x" * 2 * KIB)).what


def test_external_data_that_names_share_costs_no_file(tmp_path: Path) -> None:
    (tmp_path / "w.data").write_bytes(W.tobytes())
    model = drawn({}, reads=["w", "v"])
    for name in ("w", "v"):
        tensor = model.graph.initializer.add(name=name, data_type=TensorProto.FLOAT, dims=W.shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "w.data"), ("offset", "0"), ("length", str(W.nbytes))):
            tensor.external_data.add(key=key, value=value)
    onnx.save(model, tmp_path / "m.onnx")
    found = inspection.inspect(tmp_path / "m.onnx")
    assert [(each.check, each.file_bytes, each.memory_bytes) for each in found.findings] == [
        ("stored twice", 0, W.nbytes)
    ]
    assert found.size_bytes == (tmp_path / "m.onnx").stat().st_size + W.nbytes
    assert found.facts["stored in"] == "external data 32.0 KiB"


def test_bytes_are_counted_wherever_they_lie() -> None:
    """Initializers, Constant nodes, other nodes, branches; two 4-bit integers in a byte."""
    branch = helper.make_graph(
        [helper.make_node("MatMul", ["x", "inner"], ["b"])], "branch", [],
        [helper.make_tensor_value_info("b", TensorProto.FLOAT, None)], [numpy_helper.from_array(W, "inner")],
    )  # fmt: skip
    packed = helper.make_tensor("int4", TensorProto.INT4, [64, 64], [1] * 4096)
    nodes = [
        helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(W.astype(np.float64))),
        helper.make_node("ConstantOfShape", ["shape"], ["ones"], value=numpy_helper.from_array(np.int64([1]))),
        helper.make_node("If", ["yes"], ["z"], then_branch=branch, else_branch=branch),
    ]
    model = drawn({"w": W, "yes": np.asarray(True)}, nodes=nodes, tensors=[packed])
    stored = stored_in(model, Path())
    assert bytes_by_dtype(stored) == {
        "float32": 3 * 16 * KIB, "float64": 32 * KIB, "int4": 2 * KIB, "int64": 8, "bool": 1,
    }  # fmt: skip
    assert bytes_by_place(stored) == {
        "Constant nodes": 32 * KIB, "subgraphs and functions": 32 * KIB, "initializers": 18 * KIB + 1, "other nodes": 8,
    }  # fmt: skip


# --- which numbers


def test_doubles_cost_half():
    found = only(drawn({"w": W.astype(np.float64)}))
    assert (found.check, found.file_bytes, found.memory_bytes) == ("float64", 16 * KIB, 16 * KIB)


def levels(step):
    """Integers from -127 to 127 in even steps, with one step for each column."""
    return (np.random.default_rng(1).integers(-127, 128, (64, 64)) * step).astype(np.float32)


FITS = {
    "one step": (levels(np.float32(0.037)), "fits 8 bits", 12 * KIB),
    "a step for each column": (levels(np.linspace(0.01, 0.02, 64, dtype=np.float32)), "fits 8 bits", 12 * KIB),
    "a step for each row": (levels(np.linspace(0.01, 0.02, 64, dtype=np.float32)[:, None]), "fits 8 bits", 12 * KIB),
    "halves": (W.astype(np.float16).astype(np.float32), "fits 16 bits", 8 * KIB),
}


@pytest.mark.parametrize("name", FITS)
def test_weights_that_were_smaller_once_are_found(name: str) -> None:
    array, check, saved = FITS[name]
    found = only(drawn({"w": array}))
    assert (found.check, found.file_bytes, found.memory_bytes) == (check, saved, saved)


def test_a_value_off_the_grid_or_a_small_part_of_the_weights_is_no_finding() -> None:
    off = levels(np.float32(0.037))
    off[-1, -1] += 0.01
    wide = levels(np.float32(0.037))
    wide[0, :] *= 5  # 635 steps: beyond 8 bits for all ways to share a step but one for each row
    assert look(drawn({"w": off})) == []
    assert [each.check for each in look(drawn({"w": wide}))] == ["fits 8 bits"]
    assert look(drawn({"w": W, "v": W * 3, "few": W.astype(np.float16).astype(np.float32)})) == []


def test_channels_of_zeros_are_counted_along_both_axes() -> None:
    pruned = W.copy()
    pruned[:16] = 0
    pruned[:, :8] = 0
    found = only(drawn({"w": pruned}))
    freed = 4 * (64 * 64 - 48 * 56)
    assert (found.check, found.file_bytes, found.memory_bytes) == ("zero channels", freed, freed)
    assert found.remedy.startswith("memopt-export prune CHECKPOINT")


def test_zeros_here_and_there_save_nothing_and_2_of_4_is_told() -> None:
    scattered = np.where(np.random.default_rng(2).random(W.shape) < 0.5, 0, W)
    found = only(drawn({"w": scattered}))
    assert (found.check, found.file_bytes) == ("scattered zeros", 4 * int((scattered == 0).sum()))
    assert "scattered: they save no bytes" in found.what
    pattern = W.copy().reshape(64, 16, 4)
    pattern[:, :, :2] = 0
    assert "two of each four, which TensorRT computes faster" in only(drawn({"w": _shuffled_in_fours(pattern)})).what
    few = np.where(np.random.default_rng(2).random(W.shape) < 0.2, 0, W)
    assert look(drawn({"w": few})) == []


def _shuffled_in_fours(blocks):
    """Where the zeros of each four are differs, so that no whole channel is zero."""
    return np.random.default_rng(3).permuted(blocks, axis=2).reshape(64, 64)


# --- what is executed


def test_what_is_left_unfused_and_unpacked_is_told_with_its_floats() -> None:
    left = Left(3, 40, tuple(f"Conv 'c{index}'" for index in range(32)), 5 * KIB, 2)
    execution = Execution(
        held_bytes={"float32": 16 * KIB}, activations=left, weights=replace(left, float_bytes=9 * KIB)
    )
    found = look(drawn({"w": W}), execution)
    assert [(each.check, each.memory_bytes, each.count) for each in found] == [
        ("unpacked in each run", 9 * KIB, 40), ("unfused Q/DQ", 5 * KIB, 40),
    ]  # fmt: skip
    assert found[1].what.startswith("3 DequantizeLinear left by ONNX Runtime on this CPU between")
    assert "(2 of unknown size are not counted)" in found[1].what
    assert len(found[1].where) == 5


def test_small_weights_that_become_floats_at_load_are_told() -> None:
    model = drawn({"w": W.astype(np.float16)})
    found = only(model, Execution(held_bytes={"float32": 16 * KIB}))
    assert (found.check, found.memory_bytes) == ("unpacked at load", 8 * KIB)
    assert look(model, Execution(held_bytes={"float16": 8 * KIB})) == []


@pytest.fixture(scope="module")
def float_graph(cnn) -> Graph:
    return cnn().graph()


@pytest.mark.parametrize(
    ("recipe", "checks"),
    [
        (Recipe("int8", correction="none"), []),
        (Recipe("int8", "tensorrt", correction="none"), ["unpacked in each run", "unfused Q/DQ"]),
        (Recipe("fp16"), ["unpacked at load"]),
        (Recipe("int4-weights"), ["unpacked in each run"]),
    ],
    ids=lambda each: getattr(each, "name", ""),
)
def test_each_precision_took_on_this_cpu_or_is_found_not_to_have(
    float_graph, samples_of, tmp_path: Path, recipe: Recipe, checks: list[str]
) -> None:
    done = quantize(float_graph, recipe, samples_of(float_graph, 64))
    path = tmp_path / "q.onnx"
    save_graph(done.graph, path)
    findings, unseen = inspection.look(path, source=tmp_path / "float.onnx")
    assert [each.check for each in findings] == checks
    assert unseen == ()
    if recipe.target == "tensorrt":
        assert findings[0].memory_bytes >= 4 * 20_000  # all weights, for their Q/DQ stand before the first layer
        assert findings[0].remedy == f"memopt-export engine {path} -o q.engine"
    elif findings:
        assert str(tmp_path / "float.onnx") in findings[0].remedy


def test_floats_between_integer_layers_are_counted_where_they_lie(net, samples_of, tmp_path: Path) -> None:
    """One layer in float between integer ones: what it reads and what it writes, at batch 1."""
    drawing = net(8, 8, 8)
    for name in ("first", "second", "third"):
        drawing.conv(8, name=name)
    graph = drawing.graph()
    done = quantize(graph, Recipe("int8", correction="none", exclude=("second",)), samples_of(graph, 64))
    save_graph(done.graph, tmp_path / "q.onnx")
    findings, _ = inspection.look(tmp_path / "q.onnx")
    (found,) = [each for each in findings if each.check == "unfused Q/DQ"]
    assert found.where == ("Conv 'second'",)
    assert found.memory_bytes == 2 * 4 * 8 * 8 * 8


# --- calibration


def test_ranges_of_unknown_origin_or_of_few_samples_are_told_though_they_cost_nothing(float_graph, samples_of) -> None:
    done = quantize(float_graph, Recipe("int8", correction="none"), samples_of(float_graph, 8)).graph
    stored = stored_in(done.model, Path())
    (few,) = find(Model(done, stored, None, Path("m.onnx")))
    assert (few.check, few.cost_bytes) == ("calibration", 0)
    assert "8 samples of random/train, fewer than 32" in few.what
    (unknown,) = find(Model(replace(done, quantization=None), stored, None, Path("m.onnx")))
    assert "does not say what it was calibrated on" in unknown.what
    assert unknown.remedy.endswith("--data SPEC -o INT8.onnx")


# --- all of them


def test_findings_stand_in_the_order_of_their_cost() -> None:
    found = look(
        drawn({"w": W, "v": W, "big": np.zeros((64, 640), np.float32)}, reads=["w", "v"], doc_string="x" * 2000)
    )
    assert [each.check for each in found] == ["never read", "stored twice", "notes"]
    costs = [each.cost_bytes for each in found]
    assert costs == sorted(costs, reverse=True)


def test_every_remedy_can_be_typed(float_graph, samples_of) -> None:
    done = quantize(float_graph, Recipe("int8", "tensorrt", correction="none"), samples_of(float_graph, 8)).graph
    left = Left(1, 1, ("Conv 'c'",), 5 * KIB)
    executed = Execution(held_bytes={"float32": 64 * KIB}, activations=left, weights=left)
    models = [make() for make, *_ in BAD.values()] + [drawn({"w": array}) for array, *_ in FITS.values()]
    models += [
        drawn({"w": W.astype(np.float64)}),
        drawn({"w": np.where(W > 0, W, 0)}),
        drawn({"w": W.astype(np.float16)}),
    ]
    found = [finding for model in models for finding in look(model, executed)]
    found += find(Model(done, stored_in(done.model, Path()), executed, Path("m.onnx")))
    checks = {finding.check for finding in found}
    assert len(checks) >= 13
    for finding in found:
        program, command, *words = shlex.split(finding.remedy)
        assert program == "memopt-export"
        cli.cli.commands[command].make_context(command, words)


# --- inspect


def test_the_command_says_what_it_found_and_that_it_found_nothing(tmp_path: Path, capsys) -> None:
    onnx.save(drawn({"w": W, "v": W}), tmp_path / "m.onnx")
    console.show(inspection.inspect(tmp_path / "m.onnx"), as_json=False)
    said = capsys.readouterr().out
    assert (
        "found file 16.0 KiB, memory 16.0 KiB: the same values under several names, each held by a session: v" in said
    )
    assert f"remedy: memopt-export simplify {tmp_path / 'm.onnx'} -o m-simple.onnx" in said
    assert "2 nodes on CPUExecutionProvider" in said
    commands.simplify(tmp_path / "m.onnx", tmp_path / "simple.onnx")
    console.show(inspection.inspect(tmp_path / "simple.onnx"), as_json=False)
    assert "found nothing that costs bytes and need not" in capsys.readouterr().out


@pytest.mark.parametrize("error", [BackendError("onnxruntime crashed with SIGSEGV"), OutOfResource("it took too long")])
def test_what_cannot_be_opened_is_inspected_without_a_session(tmp_path: Path, monkeypatch, error) -> None:
    def fail(*_, **__):
        raise error

    onnx.save(drawn({"w": W, "v": W}), tmp_path / "m.onnx")
    monkeypatch.setattr(inspection, "look_apart", fail)
    found = inspection.inspect(tmp_path / "m.onnx")
    assert [each.check for each in found.findings] == ["stored twice"]
    assert found.unseen == (f"what ONNX Runtime executes: {error.problem}",)


def test_nodes_without_inputs_and_outputs_do_no_harm_where_nobody_checked_them(tmp_path: Path, monkeypatch) -> None:
    def crash(*_, **__):
        raise BackendError("onnxruntime crashed")

    bare = ["Constant", "DequantizeLinear", "QuantizeLinear", "QLinearConv", "MatMul", "Conv", "If"]
    model = drawn({"w": W})
    model.graph.node.extend(helper.make_node(kind, [], []) for kind in bare)
    model.graph.ClearField("name")
    model.graph.doc_string = "x" * 2 * KIB
    onnx.save(model, tmp_path / "m.onnx")
    monkeypatch.setattr(inspection, "look_apart", crash)
    assert [each.check for each in inspection.inspect(tmp_path / "m.onnx").findings] == ["notes"]
    model.graph.output[0].type.tensor_type.ClearField("elem_type")
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(InputRefused, match="'y' has no dtype"):
        inspection.inspect(tmp_path / "m.onnx")


def test_what_onnxruntime_refuses_is_inspected_and_what_onnx_refuses_is_not(tmp_path: Path) -> None:
    strange = drawn({"w": W})
    strange.graph.node[0].domain = "com.microsoft"
    strange.graph.node[0].op_type = "NoSuchOperator"
    strange.opset_import.add(domain="com.microsoft", version=1)
    onnx.save(strange, tmp_path / "strange.onnx")
    (reason,) = inspection.inspect(tmp_path / "strange.onnx").unseen
    assert reason.startswith("what ONNX Runtime executes: cannot be opened by onnxruntime: ")
    assert "NoSuchOperator" in reason
    broken = drawn({"w": W})
    broken.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(broken, tmp_path / "broken.onnx")
    with pytest.raises(InputRefused, match="is not a valid ONNX model"):
        inspection.inspect(tmp_path / "broken.onnx")


def test_the_variants_of_a_bundle_are_looked_at_each(tiny_bundle: Path, tmp_path: Path) -> None:
    clean = inspection.inspect(tiny_bundle)
    assert (clean.findings, clean.unseen) == ((), ())
    for name, array in (("good", W * 3), ("twice", W)):
        onnx.save(drawn({"w": W, "v": array}), tmp_path / f"{name}.onnx")
    bundle_commands.pack(
        [tmp_path / "good.onnx", tmp_path / "twice.onnx"], tmp_path / "x.mopt", form="mopt", name=None, data=None,
        labels=None, license_id=None,
    )  # fmt: skip
    (found,) = inspection.inspect(tmp_path / "x.mopt").findings
    assert (found.variant, found.check, found.remedy) == (
        "twice", "stored twice", "memopt-export simplify twice.onnx -o twice-simple.onnx"
    )  # fmt: skip
