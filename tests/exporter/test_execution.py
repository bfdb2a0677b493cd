"""What ONNX Runtime executes: how many nodes of what, by whom, what it holds, and what it leaves as it stands."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from memopt.errors import InputRefused
from memopt_export.execution import Execution, count_layers, executed, fused_counts, options, read
from memopt_export.first_session import look_apart
from memopt_export.graph import Graph, save_graph
from memopt_export.quantize import quantize
from memopt_export.recipe import Recipe

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402  # after the skip


def drawn(nodes, weights, *, ends=("x", "y")) -> onnx.ModelProto:
    """A graph as the library would write it, which is not run."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 8]) for name in ends]
    graph = helper.make_graph(
        nodes,
        "graph",
        values[:1],
        values[1:],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def pair(source, name):
    """QuantizeLinear and DequantizeLinear of a tensor."""
    return [
        helper.make_node("QuantizeLinear", [source, "s"], [f"{name}.q"], name=f"{name}.Q"),
        helper.make_node("DequantizeLinear", [f"{name}.q", "s"], [name], name=f"{name}.DQ"),
    ]


def told(nodes, weights=(), sizes=None) -> Execution:
    return read(drawn(nodes, {"s": np.float32(1), **dict(weights)}), {}, layers=0, sizes=sizes or {})


def test_a_float_layer_between_quantized_tensors_is_left() -> None:
    relu = helper.make_node("Relu", ["a"], ["b"], name="relu")
    again = helper.make_node("QuantizeLinear", ["b", "s"], ["y"])
    left = told([*pair("x", "a"), relu, again], sizes={"a": 100, "b": 60}).activations
    assert (left.count, left.readers, left.nodes, left.float_bytes, left.unsized) == (1, 1, ("Relu 'relu'",), 160, 0)


def test_the_last_dequantizer_is_none_that_is_left() -> None:
    kernel = helper.make_node("QLinearSigmoid", ["x.q", "s", "", "s", ""], ["k"], domain="com.microsoft")
    first = helper.make_node("QuantizeLinear", ["x", "s"], ["x.q"])
    last = helper.make_node("DequantizeLinear", ["k", "s"], ["f"])
    softmax = helper.make_node("Softmax", ["f"], ["y"])
    assert told([first, kernel, last, softmax], sizes={"f": 100}).activations.count == 0


def test_floats_that_are_not_alive_together_do_not_add_up() -> None:
    """a and b live together, b and c do; a is gone when c comes."""
    relus = [helper.make_node("Relu", [read], [write]) for read, write in (("a", "b"), ("b", "c"))]
    again = helper.make_node("QuantizeLinear", ["c", "s"], ["y"])
    nodes = [*pair("x", "a"), *relus, again]
    assert told(nodes, sizes={"a": 100, "b": 40, "c": 10}).activations.float_bytes == 140
    assert told(nodes, sizes={"a": 10, "b": 40, "c": 100}).activations.float_bytes == 140


def test_sizes_are_those_of_the_tensors_that_the_library_named_its_own_after() -> None:
    relu = helper.make_node("Relu", ["a_token_3"], ["other"])
    again = helper.make_node("QuantizeLinear", ["other", "s"], ["y"])
    left = told([*pair("x", "a_token_3"), relu, again], sizes={"a": 100}).activations
    assert (left.float_bytes, left.unsized) == (100, 1)


def test_weights_that_are_dequantized_in_every_run_are_counted_in_floats() -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["w.f"]),
        helper.make_node("MatMul", ["x", "w.f"], ["y"], name="product"),
    ]
    left = told(nodes, {"w": np.ones((8, 8), np.int8)}).weights
    assert (left.count, left.nodes, left.float_bytes) == (1, ("MatMul 'product'",), 4 * 64)


def test_operators_providers_and_weights_are_those_of_the_session(cnn, samples_of, tmp_path: Path) -> None:
    graph = cnn().graph()
    done = quantize(graph, Recipe("int8", correction="none"), samples_of(graph)).graph
    optimized, providers = executed(done.data, options())
    found = read(optimized, providers, layers=count_layers(done.model), sizes={})
    assert found.fused == fused_counts(done.data) == (5, 5)
    assert found.operators["QLinearConv"] == 4
    assert found.providers == {"CPUExecutionProvider": sum(providers.values())}
    assert found.held_bytes["int8"] == done.weights_bytes()["int8"]
    save_graph(done, tmp_path / "m.onnx")
    apart, reason = look_apart(tmp_path / "m.onnx", 2**20)
    assert reason == ""
    assert apart == found


def test_subgraphs_count_and_a_node_without_a_kernel_is_a_reason(tmp_path: Path, net) -> None:
    drawing = net(8)
    drawing.choice()
    model = drawing.model()
    del model.graph.initializer[:]  # a condition that is known is no If any more
    model.graph.input.append(helper.make_tensor_value_info("yes", TensorProto.BOOL, ()))
    onnx.save(model, tmp_path / "if.onnx")
    found, _ = look_apart(tmp_path / "if.onnx", 2**20)
    assert found is not None
    assert found.operators == {"Add": 2, "If": 1}
    half = drawn([helper.make_node("MatMul", ["x", "w"], ["y"])], {})
    for value in (*half.graph.input, *half.graph.output):
        value.type.tensor_type.elem_type = TensorProto.BFLOAT16
    half.graph.initializer.append(helper.make_tensor("w", TensorProto.BFLOAT16, [8, 8], [0.0] * 64))
    onnx.save(half, tmp_path / "bf16.onnx")
    found, reason = look_apart(tmp_path / "bf16.onnx", 2**20)
    assert found is None
    assert reason.startswith("cannot be opened by onnxruntime on this CPU: ")


def test_a_model_that_onnx_refuses_is_refused(tmp_path: Path) -> None:
    broken = drawn([helper.make_node("NoSuchOperator", ["x"], ["y"])], {})
    onnx.save(broken, tmp_path / "m.onnx")
    with pytest.raises(InputRefused, match="is not a valid ONNX model: "):
        look_apart(tmp_path / "m.onnx", 2**20)


def test_layers_are_counted_whether_they_compute_in_integers_already(cnn) -> None:
    assert count_layers(cnn().model()) == 5
    kernel = helper.make_node("MatMulInteger", ["x", "w"], ["y"])
    assert count_layers(drawn([kernel], {"w": np.ones((8, 8), np.int8)})) == 1
    assert fused_counts(Graph(cnn().model(), "0" * 64).data) == (0, 5)
