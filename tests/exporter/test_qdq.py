import numpy as np
import pytest

from memopt.accuracy import sqnr_db
from memopt_export.calibrate import collect_ranges
from memopt_export.execution import fused_counts
from memopt_export.graph import Graph, wire
from memopt_export.placement import place
from memopt_export.qdq import insert
from memopt_export.recipe import Recipe
from memopt_export.simplify import simplify

onnx = pytest.importorskip("onnx")

LAYERS = ("Conv", "Gemm", "MatMul")


@pytest.fixture(scope="module")
def quantized(samples_of):
    """A function: graph, target -> the graph with Q/DQ, calibrated on random samples."""

    def quantize(graph, target, *, exclude=()):
        samples = samples_of(graph)
        placement = place(graph, Recipe("int8", target, exclude=tuple(exclude)))
        ranges = collect_ranges(graph, placement.tensors, samples.batches(8), source="random", fingerprint="0" * 64)
        return insert(graph, placement, ranges)

    return quantize


@pytest.fixture(scope="module", params=["cpu", "tensorrt"])
def target(request):
    return request.param


def arrays(graph):
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.model.graph.initializer}


def writer(wiring, tensor):
    """The operator that writes a tensor; "" for inputs and initializers."""
    return wiring.nodes[wiring.writer[tensor]].op_type if tensor in wiring.writer else ""


def of_type(wiring, *kinds):
    return [node for node in wiring.nodes if node.op_type in kinds]


def activation_pairs(graph):
    """Each activation's QuantizeLinear."""
    return of_type(wire(graph.model), "QuantizeLinear")


# --- both targets


def test_weights_are_int8_in_the_file_with_one_scale_a_channel(cnn, quantized, target):
    graph = quantized(cnn().graph(), target)
    wiring, stored = wire(graph.model), arrays(graph)
    for layer in of_type(wiring, *LAYERS):
        read = wiring.nodes[wiring.writer[layer.input[1]]]
        weight, scale, zero_point = (stored[name] for name in read.input)
        assert read.op_type == "DequantizeLinear"
        assert weight.dtype == zero_point.dtype == np.int8
        assert scale.shape == (weight.shape[0],)
        assert np.abs(weight.reshape(len(weight), -1).astype(int)).max(axis=1).tolist() == [127] * len(weight)
        assert not zero_point.any()
    assert not any(array.dtype == np.float32 and array.ndim > 1 for array in stored.values())


def test_inputs_and_outputs_stay_float(cnn, quantized, target):
    graph = cnn().graph()
    assert quantized(graph, target).inputs == graph.inputs
    assert quantized(graph, target).outputs == graph.outputs


@pytest.mark.parametrize("output", ["stem.out", "relu1.out"])
def test_an_output_between_layers_stays_float_and_keeps_its_name(cnn, quantized, target, output, samples_of, run):
    graph = cnn().graph(output, "fc.out")
    small = quantized(graph, target)
    samples = samples_of(graph)
    assert [spec.name for spec in small.outputs] == [output, "fc.out"]
    assert sqnr_db(run(small, samples), run(graph, samples)) > 25


def test_pass_through_operations_share_the_parameters_of_their_input(net, quantized, target):
    drawn = net(3, 8, 8)
    drawn.conv(8)
    drawn.op("Relu", name="relu")
    drawn.pool()
    drawn.op("Transpose", perm=[0, 1, 3, 2])
    drawn.op("Flatten")
    drawn.gemm(128, 4)
    pairs = activation_pairs(quantized(drawn.graph(), target))
    assert {pair.input[1] for pair in pairs} == {"x.quantized.scale", "relu.out.quantized.scale"}


def test_what_a_subgraph_reads_keeps_its_name_and_stays_float(net, quantized, target, samples_of, run):
    from onnx import TensorProto, helper

    drawn = net(3, 8, 8)
    drawn.conv(8, name="conv")
    drawn.op("Relu", name="relu")
    branches = {
        branch: helper.make_graph(
            [helper.make_node(kind, ["relu.out"], [branch])], branch, [],
            [helper.make_tensor_value_info(branch, TensorProto.FLOAT, ["batch", 8, 8, 8])],
        )
        for branch, kind in (("then_branch", "Neg"), ("else_branch", "Abs"))
    }  # fmt: skip
    drawn.op("If", drawn.constant("yes", np.asarray(True)), name="choice", **branches)
    flipped = drawn.last
    drawn.conv(8, read="relu.out", name="second")
    drawn.op("Add", drawn.last, flipped)
    graph = drawn.graph()
    small = quantized(graph, target)
    onnx.checker.check_model(small.model, full_check=True)
    choice = next(node for node in small.model.graph.node if node.name == "choice")
    assert [each.g.node[0].input[0] for each in choice.attribute] == ["relu.out", "relu.out"]
    assert writer(wire(small.model), "relu.out") == "Relu"
    samples = samples_of(graph)
    assert sqnr_db(run(small, samples), run(graph, samples)) > 30


def test_what_has_no_integer_kernel_is_reported(net, target):
    drawn = net(8)
    drawn.op("Gemm", "x", drawn.weight("w1", 8, 8), name="factored", alpha=0.5)
    drawn.op("MatMul", drawn.last, drawn.weight("w2", 1, 8, 8), name="stacked")
    drawn.op("MatMul", drawn.last, drawn.weight("w3", 8, 8), name="plain")
    assert place(drawn.graph(), Recipe("int8", target)).kept_float == ("factored", "stacked")


def test_graph_given_is_unchanged(cnn, quantized, target):
    graph = cnn().graph()
    before = graph.model.SerializeToString(deterministic=True)
    quantized(graph, target)
    assert graph.model.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("bias", [0.0, 3.0])
def test_an_all_zero_channel_stays_zero_but_for_its_bias(net, quantized, target, samples_of, run, bias):
    drawn = net(3, 8, 8)
    drawn.conv(8, name="conv")
    drawn.arrays["conv.w"][2] = 0
    drawn.arrays["conv.b"][2] = bias
    graph = drawn.graph()
    small = quantized(graph, target)
    samples = samples_of(graph)
    assert all((array > 0).all() for name, array in arrays(small).items() if name.endswith("scale"))
    assert sqnr_db(run(small, samples), run(graph, samples)) > 30
    np.testing.assert_allclose(run(small, samples)[:, 2], bias, atol=0.05)


# --- the CPU


def plain(net):
    net.conv(8)
    net.op("Relu")
    net.conv(16, bias=False)


def depthwise(net):
    net.conv(8)
    net.relu6()
    net.conv(8, group=8)
    net.relu6()
    net.conv(16, kernel=1)


def max_pool(net):
    net.conv(8)
    net.op("Relu")
    net.pool()
    net.conv(8)


def pool_before_relu(net):
    net.conv(8)
    net.pool()
    net.op("Relu")
    net.conv(8)


def residual(net):
    skip = net.conv(8)
    net.op("Relu")
    branch = net.conv(8)
    net.op("Add", branch, skip)
    net.op("Relu")
    net.conv(8)


def head(net):
    net.conv(8)
    net.op("GlobalAveragePool")
    net.op("Flatten")
    net.gemm(8, 4)


def mean_head(net):
    net.conv(8)
    net.op("Relu")
    axes = net.constant("axes", np.asarray([2, 3]))
    net.op("ReduceMean", net.last, axes, keepdims=0)
    net.gemm(8, 4)


def two_gemms(net):
    net.op("Flatten")
    net.gemm(192, 16, name="fc1")
    net.op("Relu")
    net.gemm(16, 4, name="fc2")


def matmuls(net):
    net.op("Flatten")
    net.op("MatMul", net.last, net.weight("w1", 192, 16))
    net.op("Add", net.last, net.constant("b1", np.ones(16, np.float32)))
    net.op("Relu")
    net.op("MatMul", net.last, net.weight("w2", 16, 4))


def concat(net):
    left, right = net.conv(4, read="x"), net.conv(4, read="x")
    net.op("Concat", left, right, axis=1)
    net.channels[net.last] = 8
    net.conv(8)


def average_pool(net):
    net.conv(8)
    net.op("AveragePool", kernel_shape=[2, 2], strides=[2, 2])
    net.conv(8)


def gate(net):
    value = net.conv(8)
    net.op("GlobalAveragePool")
    net.conv(8, kernel=1)
    net.op("Sigmoid")
    net.op("Mul", value, net.last)
    net.conv(8)


def leaky(net):
    net.conv(8)
    net.op("LeakyRelu", alpha=0.1)
    net.conv(8)


def symmetric_clip(net):
    net.conv(8)
    net.op("Clip", net.last, net.constant("low", np.float32(-1)), net.constant("high", np.float32(1)))
    net.conv(8)


def soft_output(net):
    net.conv(8)
    net.op("Softmax", axis=1)


SHAPES = [
    plain, depthwise, max_pool, pool_before_relu, residual, head, mean_head, two_gemms, matmuls, concat, average_pool,
    gate, leaky, symmetric_clip, soft_output,
]  # fmt: skip


@pytest.mark.parametrize("draw", SHAPES, ids=lambda draw: draw.__name__)
def test_onnx_runtime_fuses_every_layer(net, quantized, draw, samples_of, run):
    drawn = net(3, 8, 8)
    draw(drawn)
    graph = drawn.graph()
    small = quantized(graph, "cpu")
    fused, total = fused_counts(small.data)
    assert fused == total == sum(node.op_type in LAYERS for node in graph.model.graph.node)
    samples = samples_of(graph)
    assert sqnr_db(run(small, samples), run(graph, samples)) > 20


@pytest.mark.parametrize("opset", [13, 17, 19, 21, 22, 23])
def test_onnx_runtime_fuses_every_layer_in_each_opset(cnn, quantized, opset):
    assert fused_counts(quantized(cnn(opset=opset).graph(), "cpu").data) == (5, 5)


def test_onnx_runtime_computes_everything_between_layers_in_integers(cnn, quantized, tmp_path):
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(quantized(cnn().graph(), "cpu").data, options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert kinds == [
        "QuantizeLinear", "QLinearConv", "MaxPool", "QLinearConv", "QLinearConv", "QLinearAdd", "QLinearConv",
        "QLinearGlobalAveragePool", "Flatten", "QGemm",
    ]  # fmt: skip


def test_a_float_graph_has_nothing_fused(cnn):
    assert fused_counts(cnn().graph().data) == (0, 5)


def test_cpu_activations_are_uint8_and_biases_int32(cnn, quantized):
    graph = quantized(cnn().graph(), "cpu")
    wiring, stored = wire(graph.model), arrays(graph)
    assert {stored[node.input[2]].dtype for node in activation_pairs(graph)} == {np.dtype(np.uint8)}
    for layer in of_type(wiring, *LAYERS):
        assert stored[wiring.nodes[wiring.writer[layer.input[2]]].input[0]].dtype == np.int32


def test_cpu_reads_everything_between_layers_dequantized(cnn, quantized):
    wiring = wire(quantized(cnn().graph(), "cpu").model)
    for node in of_type(wiring, *LAYERS, "Add", "GlobalAveragePool", "MaxPool", "Flatten"):
        inputs = node.input[:2] if node.op_type == "Add" else node.input[:1]
        assert {writer(wiring, name) for name in inputs} == {"DequantizeLinear"}


# --- layers left in float


@pytest.mark.parametrize("excluded", ["stem", "depthwise", "pointwise", "wide", "fc"])
def test_cpu_computes_an_excluded_layer_with_its_own_weights(cnn, quantized, samples_of, run, excluded):
    """ONNX Runtime would requantize them, one scale in all, were the layer not guarded."""
    graph = cnn().graph()
    small = quantized(graph, "cpu", exclude=[excluded])
    samples = samples_of(graph)
    assert fused_counts(small.data) == (4, 5)
    assert sqnr_db(run(small, samples), run(small, samples, optimize=False)) > 60
    np.testing.assert_array_equal(arrays(small)[f"{excluded}.w"], arrays(graph)[f"{excluded}.w"])


def test_cpu_guard_is_what_keeps_the_weights(net, quantized, samples_of, run):
    """Case without: the same graph with its bias as an initializer loses a channel that is a thousand times smaller."""
    drawn = net(3, 8, 8)
    drawn.conv(8, name="first")
    drawn.op("Relu")
    drawn.conv(8, name="middle")
    drawn.arrays["middle.w"] *= np.logspace(-3, 0, 8, dtype=np.float32)[:, None, None, None]
    drawn.conv(8, name="last")
    graph = drawn.graph()
    guarded = quantized(graph, "cpu", exclude=["middle"])
    model = guarded.copy_model()
    middle = next(node for node in model.graph.node if node.name == "middle")
    middle.input[2] = "middle.b"
    model.graph.initializer.append(onnx.numpy_helper.from_array(drawn.arrays["middle.b"], "middle.b"))
    bare = Graph(model, "0" * 64)
    samples = samples_of(graph)
    assert sqnr_db(run(guarded, samples), run(guarded, samples, optimize=False)) > 60
    assert sqnr_db(run(bare, samples), run(bare, samples, optimize=False)) < 60


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["Gemm", "ConvTranspose"])
def test_cpu_guards_every_kind_of_layer_that_would_be_requantized(net, quantized, samples_of, run, kind, bias):
    drawn = net(3, 8, 8)
    drawn.conv(8, name="first")
    drawn.op("Relu")
    extra = [drawn.constant("b", drawn.rng.normal(size=6).astype(np.float32))] if bias else []
    if kind == "Gemm":
        drawn.op("Flatten")
        drawn.op("Gemm", drawn.last, drawn.weight("w", 512, 6), *extra, name="float")
        drawn.gemm(6, 4)
    else:
        drawn.op("ConvTranspose", drawn.last, drawn.weight("w", 8, 3, 3, 3), *extra, name="float", group=2)
        drawn.channels[drawn.last] = 6
        drawn.conv(4)
    graph = drawn.graph()
    small = quantized(graph, "cpu", exclude=["float"])
    samples = samples_of(graph)
    assert sqnr_db(run(small, samples), run(small, samples, optimize=False)) > 60


def test_an_excluded_layer_that_reads_float_has_no_qdq_on_its_input(cnn, quantized, target):
    wiring = wire(quantized(cnn().graph(), target, exclude=["stem"]).model)
    stem = next(node for node in wiring.nodes if node.name == "stem")
    assert list(stem.input) == ["x", "stem.w", "stem.b"]


@pytest.mark.parametrize("excluded", ["stem", "depthwise", "pointwise", "wide", "fc"])
def test_tensorrt_has_no_qdq_on_any_input_of_an_excluded_layer(cnn, quantized, excluded):
    wiring = wire(quantized(cnn().graph(), "tensorrt", exclude=[excluded]).model)
    layer = next(node for node in wiring.nodes if node.name == excluded)
    assert "DequantizeLinear" not in {writer(wiring, name) for name in layer.input}


# --- TensorRT


def test_tensorrt_activations_are_int8_with_zero_point_0_and_biases_float(cnn, quantized):
    graph = quantized(cnn().graph(), "tensorrt")
    wiring, stored = wire(graph.model), arrays(graph)
    for node in of_type(wiring, "QuantizeLinear", "DequantizeLinear"):
        assert stored[node.input[2]].dtype == np.int8
        assert not stored[node.input[2]].any()
    assert {stored[layer.input[2]].dtype for layer in of_type(wiring, *LAYERS)} == {np.dtype(np.float32)}


def test_tensorrt_has_nothing_between_a_layer_and_its_activation(cnn, quantized):
    wiring = wire(quantized(cnn().graph(), "tensorrt").model)
    assert {writer(wiring, node.input[0]) for node in of_type(wiring, "Relu", "Clip")} == {"Conv", "Add"}
    assert "Conv" not in {writer(wiring, node.input[0]) for node in of_type(wiring, "QuantizeLinear")}


def test_tensorrt_adds_a_residual_with_one_float_branch(cnn, quantized):
    wiring = wire(quantized(cnn().graph(), "tensorrt").model)
    (add,) = of_type(wiring, "Add")
    assert [writer(wiring, name) for name in add.input] == ["Conv", "DequantizeLinear"]


def test_tensorrt_quantizes_the_earlier_of_two_convolutions_that_are_added(net, quantized):
    drawn = net(3, 8, 8)
    shortcut = drawn.conv(8, read="x", name="shortcut")
    branch = drawn.conv(8, read="x", name="branch")
    drawn.op("Add", shortcut, branch)
    wiring = wire(quantized(drawn.graph(), "tensorrt").model)
    (add,) = of_type(wiring, "Add")
    assert [writer(wiring, name) for name in add.input] == ["DequantizeLinear", "Conv"]


@pytest.mark.parametrize("draw", SHAPES, ids=lambda draw: draw.__name__)
def test_tensorrt_builds_every_shape(net, quantized, draw, build_engine):
    drawn = net(3, 8, 8)
    draw(drawn)
    assert build_engine(quantized(simplify(drawn.graph()), "tensorrt")) > 0
