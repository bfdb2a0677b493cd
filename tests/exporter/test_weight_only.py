from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from memopt.accuracy import sqnr_db
from memopt.errors import AnswerIsNo, UsageError
from memopt.probe import Request, measure
from memopt_export.graph import Graph, save_graph
from memopt_export.quantize import quantize
from memopt_export.recipe import GROUP_SIZES, Recipe, parse
from memopt_models.data import Samples

onnx = pytest.importorskip("onnx")

TARGETS = ("cpu", "tensorrt")


@pytest.fixture(params=["int8-weights", "int4-weights"])
def precision(request):
    return request.param


@pytest.fixture
def floor_db(precision):
    """What weights alone keep: 8 bits some 40 dB, 4 bits some 20."""
    return {"int8-weights": 30, "int4-weights": 14}[precision]


def nodes(graph, kind):
    return [node for node in graph.model.graph.node if node.op_type == kind]


def stored(graph):
    return {tensor.name: tensor for tensor in graph.model.graph.initializer}


def settings(node):
    return {part.name: part.i for part in node.attribute}


def closeness(net, recipe, samples_of, run, *, outputs=()):
    """The graph in this recipe, and how close its first output is to the float one's."""
    graph = net.graph(*outputs)
    result = quantize(graph, recipe, None)
    onnx.checker.check_model(result.graph.model, full_check=True)
    samples = samples_of(graph)
    return result, sqnr_db(run(result.graph, samples), run(graph, samples))


# --- MatMulNBits


@pytest.fixture
def mlp(net):
    """Two MatMuls whose weights are stored as (inputs, outputs)."""
    drawn = net(96)
    for name, shape in (("first", (96, 80)), ("second", (80, 64))):
        drawn.op("MatMul", drawn.last, drawn.weight(f"{name}.w", *shape), name=name)
        drawn.op("Relu")
    return drawn


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_cpu_matmuls_are_packed(mlp, precision, group_size, floor_db, samples_of, run):
    result, close = closeness(mlp, Recipe(precision, group_size=group_size), samples_of, run)
    bits, block = int(precision[3]), min(group_size or 128, 128)  # a row of 96 needs no block above 128
    for name, rows, columns in (("first", 80, 96), ("second", 64, 80)):
        (node,) = [node for node in nodes(result.graph, "MatMulNBits") if node.name == name]
        blocks = -(-columns // block)
        assert settings(node) == {
            "K": columns, "N": rows, "bits": bits, "block_size": block, "accuracy_level": 4,
        }  # fmt: skip
        weight = stored(result.graph)[node.input[1]]
        assert (weight.data_type, list(weight.dims)) == (onnx.TensorProto.UINT8, [rows, blocks, block * bits // 8])
    assert close > floor_db
    assert result.kept_float == ()


@pytest.mark.parametrize(("features", "outputs"), [(33, 40), (200, 48), (70, 96), (1000, 3)])
def test_cpu_matmuls_of_any_shape_are_padded(net, precision, floor_db, features, outputs, samples_of, run):
    drawn = net(features)
    drawn.op("MatMul", "x", drawn.weight("w", features, outputs))
    result, close = closeness(drawn, parse(precision), samples_of, run)
    assert len(nodes(result.graph, "MatMulNBits")) == 1
    assert close > floor_db


def test_cpu_gemms_become_matmuls_with_the_bias_behind(net, precision, floor_db, samples_of, run):
    drawn = net(96)
    drawn.gemm(96, 64)
    result, close = closeness(drawn, parse(precision), samples_of, run)
    assert [node.op_type for node in result.graph.model.graph.node] == ["MatMulNBits", "Add"]
    assert [node.name for node in result.graph.model.graph.node] == ["fc", "fc.bias"]
    assert close > floor_db


def test_cpu_gemm_with_factors_is_dequantized(net, precision, floor_db, samples_of, run):
    drawn = net(96)
    drawn.op("Gemm", "x", drawn.weight("w", 96, 64), drawn.constant("b", np.ones(64, np.float32)), alpha=0.5)
    result, close = closeness(drawn, parse(precision), samples_of, run)
    assert [node.op_type for node in result.graph.model.graph.node] == ["DequantizeLinear", "Gemm"]
    assert close > floor_db


def test_cpu_zero_points_are_stored_only_where_they_gain(net):
    one_sided = net(64)
    one_sided.constant("w", np.abs(one_sided.rng.normal(size=(64, 64))).astype(np.float32))
    one_sided.op("MatMul", "x", "w")
    even = net(16)
    even.constant("w", np.tile(np.arange(-8, 8, dtype=np.float32)[:, None], (1, 64)))
    even.op("MatMul", "x", "w")
    recipe = Recipe("int4-weights", group_size=16)
    assert [
        len(nodes(quantize(drawn.graph(), recipe, None).graph, "MatMulNBits")[0].input) for drawn in (one_sided, even)
    ] == [4, 3]


# --- embeddings


@pytest.fixture
def embedder(net):
    """Token ids, a table of 200 rows, and a classifier on the mean of what they give."""
    from onnx import TensorProto, helper

    def draw(width=64):
        drawn = net(6)
        drawn.op(
            "Gather", drawn.constant("table", drawn.rng.normal(size=(200, width)).astype(np.float32)), "x", name="embed"
        )
        drawn.op("MatMul", drawn.last, drawn.weight("w", width, 48), name="head")
        graph = helper.make_graph(
            drawn.nodes, "net", [helper.make_tensor_value_info("x", TensorProto.INT64, ("batch", 6))],
            [helper.make_tensor_value_info(drawn.last, TensorProto.FLOAT, ("batch", 6, 48))],
            [onnx.numpy_helper.from_array(array, name) for name, array in drawn.arrays.items()],
        )  # fmt: skip
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        return Graph(model, "0" * 64)

    return draw


def embed(graph, run):
    ids = np.random.default_rng(3).integers(0, 200, (5, 6))
    return run(graph, Samples({"x": ids}, None, "by hand"))


@pytest.mark.parametrize("width", [64, 70])
def test_cpu_tables_stay_packed_in_memory(embedder, precision, floor_db, width, run):
    graph = embedder(width)
    result = quantize(graph, parse(precision), None)
    (node,) = nodes(result.graph, "GatherBlockQuantized")
    bits = int(precision[3])
    dtype = onnx.TensorProto.UINT8 if bits == 8 else onnx.TensorProto.UINT4
    assert stored(result.graph)[node.input[0]].data_type == dtype
    assert len(stored(result.graph)[node.input[0]].raw_data) == 200 * width * bits // 8
    assert sqnr_db(embed(result.graph, run), embed(graph, run)) > floor_db


def test_tensorrt_tables_are_dequantized(embedder, precision, floor_db, run, build_engine):
    graph = embedder()
    result = quantize(graph, parse(f"{precision}-tensorrt"), None)
    assert len(nodes(result.graph, "DequantizeLinear")) == 2
    assert sqnr_db(embed(result.graph, run), embed(graph, run)) > floor_db
    assert build_engine(result.graph) > 0


# --- DequantizeLinear


def test_a_convolution_is_stored_in_integers_of_its_shape(net, precision, floor_db, samples_of, run):
    drawn = net(64, 8, 8)
    drawn.conv(48, name="conv")
    result, close = closeness(drawn, parse(precision), samples_of, run)
    tensors, bits = stored(result.graph), int(precision[3])
    (read,) = nodes(result.graph, "DequantizeLinear")
    weight, scale = (tensors[name] for name in read.input[:2])
    assert (list(weight.dims), len(weight.raw_data)) == ([48, 64, 3, 3], 48 * 64 * 9 * bits // 8)
    assert list(scale.dims) == ([48] if bits == 8 else [48, 2, 3, 3])
    assert close > floor_db


@pytest.mark.parametrize("target", TARGETS)
def test_channels_shorter_than_a_group_keep_eight_bits_and_one_scale(net, target, samples_of, run):
    drawn = net(64, 8, 8)
    drawn.conv(64, group=64, name="depthwise")
    result, close = closeness(drawn, Recipe("int4-weights", target, group_size=32), samples_of, run)
    tensors = stored(result.graph)
    assert tensors["depthwise.w.quantized"].data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
    assert list(tensors["depthwise.w.quantized.scale"].dims) == [64]
    assert close > 30


def test_four_bits_for_whole_channels_are_given_to_who_asks(net, samples_of, run):
    drawn = net(64, 8, 8)
    drawn.conv(64, name="conv")
    result, close = closeness(drawn, Recipe("int4-weights", group_size=0), samples_of, run)
    weight = stored(result.graph)["conv.w.quantized"]
    assert weight.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)
    assert len(weight.raw_data) == 64 * 64 * 9 // 2
    assert 10 < close < 30


def test_tensorrt_has_no_zero_points(cnn, mlp):
    for drawn in (cnn(), mlp):
        for name in ("int8-weights-tensorrt", "int4-weights-tensorrt"):
            graph = quantize(drawn.graph(), parse(name), None).graph
            assert {len(node.input) for node in nodes(graph, "DequantizeLinear")} == {2}
            assert not nodes(graph, "MatMulNBits")


def test_dequantizers_stand_first_so_that_a_run_holds_one_weight_at_a_time(net, tmp_path):
    """In ONNX Runtime's own order the last nodes of a file run first, where nothing else decides."""
    drawn = net(64, 8, 8)
    for _ in range(8):
        drawn.conv(64)
    recipe = Recipe("int8-weights")
    small = quantize(drawn.graph(), recipe, None).graph
    kinds = [node.op_type for node in small.model.graph.node]
    assert kinds == ["DequantizeLinear"] * 8 + ["Conv"] * 8
    assert executed(small, tmp_path) == ["DequantizeLinear", "Conv"] * 8
    moved = small.copy_model()
    del moved.graph.node[:]
    for read, conv in zip(small.model.graph.node[:8], small.model.graph.node[8:], strict=True):
        moved.graph.node.extend([read, conv])
    assert executed(Graph(moved, "0" * 64), tmp_path) == ["DequantizeLinear"] * 8 + ["Conv"] * 8


def executed(graph, folder):
    """The operators of weights in the order in which ONNX Runtime runs them, by its own profile."""
    import json

    import onnxruntime as ort

    options = ort.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")
    session = ort.InferenceSession(graph.data, options, providers=["CPUExecutionProvider"])
    session.run(None, {"x": np.zeros((1, *graph.inputs[0].shape[1:]), np.float32)})
    profile = json.loads(Path(session.end_profiling()).read_text())
    events = [event for event in profile if event["name"].endswith("_kernel_time")]
    kinds = [event["args"]["op_name"] for event in sorted(events, key=lambda event: event["ts"])]
    return [kind for kind in kinds if kind in ("DequantizeLinear", "Conv")]


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_recurrent_weights_are_small_too(net, precision, floor_db, kind, samples_of, run):
    drawn = net(5, 64)
    gates = {"LSTM": 4, "GRU": 3}[kind] * 32
    drawn.op("Transpose", perm=[1, 0, 2])
    drawn.op(
        kind, drawn.last, drawn.weight("w", 1, gates, 64), drawn.weight("r", 1, gates, 32), name="rnn", hidden_size=32
    )
    result, close = closeness(drawn, parse(precision), samples_of, run)
    assert len(nodes(result.graph, "DequantizeLinear")) == 2
    assert close > floor_db


# --- rounding for what a layer reads


def correlated(graph, n, seed):
    """Samples with a few strong directions, as activations have."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(5).normal(size=(12, 96))
    x = rng.normal(size=(n, 12)) @ mix + 0.3 * rng.normal(size=(n, 96))
    return Samples({"x": x.astype(np.float32)}, None, "by hand")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("group_size", [0, 32])
def test_samples_make_the_rounding_better_at_the_same_size(mlp, precision, target, group_size, run):
    graph = mlp.graph()
    recipe = Recipe(precision, target, group_size=group_size)
    others = correlated(graph, 64, seed=2)
    blind = quantize(graph, recipe, None)
    seeing = quantize(graph, recipe, correlated(graph, 256, seed=1))
    asked_not_to = quantize(graph, replace(recipe, correction="none"), correlated(graph, 256, seed=1))
    # Unoptimized: DequantizeLinear and MatMul are not made one node that rounds its inputs too.
    close = [sqnr_db(run(done.graph, others, optimize=False), run(graph, others)) for done in (blind, seeing)]
    blind_data, seeing_data, asked_not_to_data = (
        replace(done.graph, quantization=None).data for done in (blind, seeing, asked_not_to)
    )  # without what each tells of its own making
    assert asked_not_to_data == blind_data
    assert len(seeing_data) == len(blind_data)
    gain = 1.5 if precision == "int4-weights" or target == "tensorrt" else 0
    assert close[1] > close[0] + gain


# --- what is shared, excluded, too small


def test_a_weight_of_two_layers_is_stored_once(net, precision, samples_of, run, floor_db):
    drawn = net(64)
    weight = drawn.weight("w", 64, 64)
    drawn.op("MatMul", "x", weight, name="first")
    drawn.op("MatMul", drawn.last, weight, name="second")
    result, close = closeness(drawn, parse(precision), samples_of, run)
    first, second = nodes(result.graph, "MatMulNBits")
    assert first.input[1:] == second.input[1:]
    assert close > floor_db - 3


def test_a_weight_that_an_excluded_layer_shares_is_there_for_it(net, precision, samples_of, run):
    drawn = net(64)
    weight = drawn.weight("w", 64, 64)
    drawn.op("MatMul", "x", weight, name="first")
    drawn.op("MatMul", drawn.last, weight, name="second")
    recipe = replace(parse(precision), exclude=("second",))
    result, _ = closeness(drawn, recipe, samples_of, run)
    assert result.kept_float == ("second",)
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(stored(result.graph)["w"]), drawn.arrays["w"])


def test_a_weight_read_along_both_axes_is_stored_for_each(net, precision, samples_of, run, floor_db):
    drawn = net(64)
    weight = drawn.weight("w", 64, 64)
    drawn.op("Gemm", "x", weight, name="first")
    drawn.op("Gemm", drawn.last, weight, name="second", transB=1)
    result, close = closeness(drawn, parse(precision), samples_of, run)
    first, second = nodes(result.graph, "MatMulNBits")
    assert first.input[1] != second.input[1]
    assert close > floor_db - 3


def test_a_weight_that_would_save_nothing_stays_float(net, precision, samples_of, run):
    drawn = net(8)
    drawn.op("MatMul", "x", drawn.weight("w1", 8, 8), name="tiny")
    drawn.op("MatMul", drawn.last, drawn.weight("w2", 8, 512), name="large")
    result, _ = closeness(drawn, parse(precision), samples_of, run)
    assert result.kept_float == ("tiny",)


def test_include_leaves_all_others_float(mlp, precision):
    result = quantize(mlp.graph(), replace(parse(precision), include=("second",)), None)
    assert result.kept_float == ("first",)


def test_a_graph_without_weights_is_refused(net, precision):
    drawn = net(3)
    drawn.op("Relu")
    with pytest.raises(AnswerIsNo, match=f"the graph has no weights that {precision} could make smaller"):
        quantize(drawn.graph(), parse(precision), None)


def test_an_unknown_group_size_is_refused():
    with pytest.raises(UsageError, match="group_size is 48; hint: one of 0, 16, 32, 64, 128, 256"):
        Recipe("int4-weights", group_size=48)


# --- engines


def test_tensorrt_keeps_integers_in_its_engine(net, build_engine):
    """An engine's other content is the same, so its size tells how many bits each weight has there."""
    drawn = net(512)
    drawn.gemm(512, 512, name="fc1")
    drawn.op("Relu")
    drawn.op("MatMul", drawn.last, drawn.weight("w", 512, 512), name="fc2")
    graph, weights = drawn.graph(), 2 * 512 * 512
    fp32 = build_engine(graph)
    int8 = build_engine(quantize(graph, parse("int8-weights-tensorrt"), None).graph)
    int4 = build_engine(quantize(graph, parse("int4-weights-tensorrt"), None).graph)
    assert fp32 - int8 > 2.5 * weights
    assert fp32 - int4 > 3 * weights


def test_tensorrt_gets_whole_blocks_only_and_of_4_bits_alone(net, precision, samples_of, run):
    """Of others its parser refuses some, and takes the rest for blocks of another size."""
    drawn = net(200)
    drawn.op("MatMul", "x", drawn.weight("w1", 200, 48), name="eights")
    drawn.op("MatMul", drawn.last, drawn.weight("w2", 48, 48), name="sixteens")
    result, _ = closeness(drawn, Recipe(precision, "tensorrt", group_size=32), samples_of, run)
    eights, sixteens = nodes(result.graph, "DequantizeLinear")
    assert settings(eights) == {"axis": 1}
    assert settings(sixteens) == ({"axis": 0, "block_size": 16} if precision == "int4-weights" else {"axis": 1})


def test_tensorrt_keeps_a_convolution_s_integers_too(net, build_engine):
    drawn = net(128, 8, 8)
    drawn.conv(256)
    drawn.conv(256)
    graph, weights = drawn.graph(), 9 * (128 * 256 + 256 * 256)
    fp32 = build_engine(graph)
    assert fp32 - build_engine(quantize(graph, parse("int8-weights-tensorrt"), None).graph) > 2.5 * weights


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_tensorrt_builds_every_group_size(net, precision, group_size, build_engine):
    drawn = net(8, 8, 8)
    drawn.conv(16)
    drawn.op("GlobalAveragePool")
    drawn.op("Flatten")
    drawn.op("MatMul", drawn.last, drawn.weight("w1", 16, 200))
    drawn.op("MatMul", drawn.last, drawn.weight("w2", 200, 33))
    drawn.op("MatMul", drawn.last, drawn.weight("w3", 33, 65), name="odd")
    assert build_engine(quantize(drawn.graph(), Recipe(precision, "tensorrt", group_size=group_size), None).graph) > 0


# --- what the notes say is so


def private_bytes(graph, path, x):
    save_graph(graph, path)
    np.save(path.with_suffix(".npy"), x)
    request = Request(str(path), "onnxruntime", "cpu", 1, {"x": str(path.with_suffix(".npy"))}, runs=3, seconds=0.1)
    return measure(request).bill.phases["steady"].private_bytes


@pytest.mark.parametrize("kind", ["MatMul", "Conv"])
def test_private_memory_shrinks_as_the_notes_say(net, precision, kind, tmp_path):
    if kind == "MatMul":
        drawn = net(1024)
        for index in range(8):
            drawn.op("MatMul", drawn.last, drawn.weight(f"w{index}", 1024, 1024))
    else:
        drawn = net(256, 8, 8)
        for _ in range(12):
            drawn.conv(256)
    graph = drawn.graph()
    result = quantize(graph, parse(precision), None)
    x = np.zeros((1, *graph.inputs[0].shape[1:]), np.float32)
    before = private_bytes(graph, tmp_path / "float.onnx", x)
    after = private_bytes(result.graph, tmp_path / "small.onnx", x)
    assert after < 0.6 * before
    said = "stay integers" if kind == "MatMul" else "dequantized one by one"
    assert any(said in note for note in result.notes)
