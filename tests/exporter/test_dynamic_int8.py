from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from memopt.accuracy import sqnr_db
from memopt.errors import AnswerIsNo, UsageError
from memopt_export.execution import fused_counts
from memopt_export.quantize import quantize
from memopt_export.recipe import Recipe, parse

onnx = pytest.importorskip("onnx")

FLOOR_DB = 28
RECIPE = Recipe("int8-dynamic")


def draw_tagger(net, kind="LSTM", *, hidden=32, direction="bidirectional", **attributes):
    """A recurrent layer and a classifier of each step; inputs are (batch, 12, 48)."""
    drawn = net(12, 48)
    directions, gates = (2 if direction == "bidirectional" else 1), {"LSTM": 4, "GRU": 3, "RNN": 1}[kind] * hidden
    drawn.op("Transpose", perm=[1, 0, 2])
    weights = [drawn.weight(name, directions, gates, columns) for name, columns in (("w", 48), ("r", hidden))]
    bias = drawn.constant("b", drawn.rng.normal(0, 0.1, (directions, 2 * gates)).astype(np.float32))
    drawn.op(kind, drawn.last, *weights, bias, name="rnn", hidden_size=hidden, direction=direction, **attributes)
    drawn.op("Transpose", perm=[2, 0, 1, 3])
    drawn.op("Reshape", drawn.last, drawn.constant("shape", np.asarray([0, 0, directions * hidden])))
    drawn.op("MatMul", drawn.last, drawn.weight("head.w", directions * hidden, 40), name="head")
    return drawn


def closeness(drawn, recipe, samples_of, run):
    graph = drawn.graph()
    result = quantize(graph, recipe, None)
    samples = samples_of(graph)
    return result, sqnr_db(run(result.graph, samples), run(graph, samples))


def kinds(result):
    return Counter(node.op_type for node in result.graph.model.graph.node)


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_an_lstm_and_the_product_behind_it_are_computed_in_integers(net, direction, samples_of, run):
    result, close = closeness(draw_tagger(net, direction=direction), RECIPE, samples_of, run)
    assert (kinds(result)["DynamicQuantizeLSTM"], kinds(result)["MatMulInteger"], kinds(result)["LSTM"]) == (1, 1, 0)
    assert (result.fused, result.kept_float, result.ranges) == ((2, 2), (), None)
    assert close > FLOOR_DB


def test_an_lstm_s_weights_have_a_scale_for_each_gate_of_each_unit(net):
    result = quantize(draw_tagger(net).graph(), RECIPE, None)
    stored = {tensor.name: tensor for tensor in result.graph.model.graph.initializer}
    assert list(stored["w.gates.quantized"].dims) == [2, 48, 128]
    assert list(stored["r.gates.quantized"].dims) == [2, 32, 128]
    assert list(stored["w.gates.quantized.scale"].dims) == [2, 128]
    assert {stored[name].data_type for name in ("w.gates.quantized", "r.gates.quantized")} == {onnx.TensorProto.INT8}


def test_an_lstm_keeps_its_other_inputs_and_attributes(net, samples_of, run):
    """Initial states, and a clip that is small enough to matter."""
    drawn = draw_tagger(net, direction="forward", clip=0.1)
    lstm = next(node for node in drawn.nodes if node.op_type == "LSTM")
    for name in ("h", "c"):
        drawn.constant(name, drawn.rng.normal(size=(1, 1, 32)).astype(np.float32))
    lstm.input.extend(["", "h", "c"])
    graph = drawn.graph()
    result = quantize(graph, RECIPE, None)
    samples = samples_of(graph, 1)
    assert sqnr_db(run(result.graph, samples), run(graph, samples)) > FLOOR_DB


@pytest.mark.parametrize("kind", ["GRU", "RNN"])
def test_what_has_no_kernel_stays_float_and_is_named(net, kind, samples_of, run):
    result, close = closeness(draw_tagger(net, kind), RECIPE, samples_of, run)
    assert (result.fused, result.kept_float) == ((1, 2), ("rnn",))
    assert kinds(result)[kind] == 1
    assert close > FLOOR_DB


def test_an_lstm_with_the_batch_first_has_no_kernel(net):
    drawn = net(12, 48)
    weights = drawn.weight("w", 1, 128, 48), drawn.weight("r", 1, 128, 32)
    drawn.op("LSTM", "x", *weights, name="rnn", hidden_size=32, layout=1)
    with pytest.raises(AnswerIsNo, match="no MatMul, Gemm or LSTM that int8-dynamic could serve"):
        quantize(drawn.graph(), RECIPE, None)


def test_layers_that_read_one_tensor_share_its_integers(net, samples_of, run):
    drawn = net(10, 64)
    for name in ("query", "key", "value"):
        drawn.op("MatMul", "x", drawn.weight(f"{name}.w", 64, 64), name=name)
    drawn.op("Sum", "query.out", "key.out", "value.out")
    result, close = closeness(drawn, RECIPE, samples_of, run)
    assert (kinds(result)["DynamicQuantizeLinear"], kinds(result)["MatMulInteger"]) == (1, 3)
    assert result.fused == (3, 3)
    assert close > FLOOR_DB


def test_a_product_right_behind_another_has_names_of_its_own(net, samples_of, run):
    drawn = net(64)
    drawn.op("MatMul", drawn.last, drawn.weight("w1", 64, 64))
    drawn.op("MatMul", drawn.last, drawn.weight("w2", 64, 64))
    result, close = closeness(drawn, RECIPE, samples_of, run)
    assert result.fused == (2, 2)
    assert close > FLOOR_DB


def optimized(graph, folder):
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    ort.InferenceSession(graph.data, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


def test_onnxruntime_makes_one_node_of_a_layer_with_its_bias(net, tmp_path, samples_of, run):
    drawn = net(96)
    drawn.gemm(96, 64, name="first")
    drawn.op("Relu")
    drawn.op("MatMul", drawn.last, drawn.weight("w", 64, 64), name="second")
    drawn.op("Add", drawn.last, drawn.constant("b", np.ones(64, np.float32)))
    result, close = closeness(drawn, RECIPE, samples_of, run)
    assert optimized(result.graph, tmp_path) == {"DynamicQuantizeMatMul": 2, "Relu": 1}
    assert fused_counts(result.graph.data)[0] == 2
    assert close > FLOOR_DB


def test_onnxruntime_makes_one_node_of_each_product_that_shares_its_input(net, tmp_path):
    drawn = net(10, 64)
    for name in ("query", "key"):
        drawn.op("MatMul", "x", drawn.weight(f"{name}.w", 64, 64), name=name)
    drawn.op("Add", "query.out", "key.out")
    graph = quantize(drawn.graph(), RECIPE, None).graph
    assert optimized(graph, tmp_path) == {"DynamicQuantizeLinear": 1, "MatMulIntegerToFloat": 2, "Add": 1}


def test_seven_bits_leave_room_for_sums_of_sixteen(net, samples_of, run):
    drawn = draw_tagger(net)
    eight, seven = (closeness(drawn, Recipe("int8-dynamic", weight_bits=bits), samples_of, run) for bits in (8, 7))
    for (result, _), largest in ((eight, 127), (seven, 63)):
        stored = [
            onnx.numpy_helper.to_array(tensor)
            for tensor in result.graph.model.graph.initializer
            if tensor.data_type == onnx.TensorProto.INT8
        ]
        assert max(np.abs(array.astype(int)).max() for array in stored) == largest
    assert eight[1] > seven[1] > 20


def test_an_all_zero_channel_stays_zero(net, samples_of, run):
    drawn = net(64)
    drawn.weight("w", 64, 64)
    drawn.arrays["w"][:, 3] = 0
    drawn.op("MatMul", "x", "w")
    graph = drawn.graph()
    result = quantize(graph, RECIPE, None)
    assert not run(result.graph, samples_of(graph))[:, 3].any()


def test_excluded_layers_keep_their_weights_though_others_share_them(net):
    drawn = net(64)
    drawn.weight("w", 64, 64)
    drawn.op("MatMul", "x", "w", name="first")
    drawn.op("MatMul", drawn.last, "w", name="second")
    result = quantize(drawn.graph(), replace(RECIPE, exclude=("second",)), None)
    stored = {tensor.name for tensor in result.graph.model.graph.initializer}
    assert result.kept_float == ("second",)
    assert {"w", "w.quantized"} <= stored


def test_include_names_an_operator(net):
    result = quantize(draw_tagger(net).graph(), replace(RECIPE, include=("LSTM",)), None)
    assert result.kept_float == ("head",)


def test_old_opsets_are_raised(net, samples_of, run):
    drawn = net(96, opset=9)
    drawn.gemm(96, 64)
    result, close = closeness(drawn, RECIPE, samples_of, run)
    assert result.graph.model.opset_import[0].version == 11
    assert close > FLOOR_DB


def test_convolutions_alone_are_refused(net):
    drawn = net(3, 8, 8)
    drawn.conv(64)
    with pytest.raises(
        AnswerIsNo,
        match=r"MatMul, Gemm or LSTM that int8-dynamic could serve, so it stays float; hint: --precision int8 --data",
    ):
        quantize(drawn.graph(), RECIPE, None)


def test_tensorrt_is_refused():
    with pytest.raises(UsageError, match="int8-dynamic has no form for tensorrt; hint: --target cpu, or --precision"):
        parse("int8-dynamic-tensorrt")
