"""Models as others make them, through every method: none may be refused for how it is written."""

import warnings

import numpy as np
import pytest

from memopt.accuracy import sqnr_db
from memopt.errors import AnswerIsNo
from memopt_export.graph import Graph, load_graph, wire
from memopt_export.quantize import half, quantize
from memopt_export.recipe import parse
from memopt_export.simplify import simplify
from memopt_models.data import Samples, open_samples

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402  # after the skip

# What a method keeps, at least, of a network of a few layers.
FLOOR_DB = {
    "fp16": 50, "bf16": 30, "int8": 18, "int8-tensorrt": 18, "int8-dynamic": 25, "int8-weights": 30,
    "int8-weights-tensorrt": 30, "int4-weights": 11, "int4-weights-tensorrt": 11,
}  # fmt: skip
RNG = np.random.default_rng(0)


@pytest.fixture(params=list(FLOOR_DB))
def recipe(request):
    return parse(request.param)


def array(*shape, scale=1.0):
    """He-initialized, inputs on the axis before the last."""
    return (RNG.normal(size=shape) * scale * (2 / shape[-2]) ** 0.5).astype(np.float32)


def value(name, kind, shape):
    return helper.make_tensor_value_info(name, kind, shape)


def model(nodes, inputs, outputs, arrays, *, opset=17, ir_version=8):
    graph = helper.make_graph(
        nodes, "net", inputs, outputs, [numpy_helper.from_array(given, name) for name, given in arrays.items()]
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
    onnx.checker.check_model(made)
    return Graph(made, "0" * 64)


def run(graph, feeds):
    import onnxruntime as ort

    graph = half.emulated(graph) if graph.precision == "bf16" else graph
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if graph.precision == "bf16":
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(graph.data, options, providers=["CPUExecutionProvider"]).run(None, feeds)


def check(graph, recipe, feeds, *, scalars=()):
    """Quantizes the graph, on these feeds where the method wants samples; every output has to be close to float."""
    rows = len(next(given for name, given in feeds.items() if name not in scalars))
    samples = Samples({n: np.full(rows, a) if n in scalars else a for n, a in feeds.items()}, None, "by hand")
    result = quantize(graph, recipe, samples)
    onnx.checker.check_model(result.graph.model)
    assert (result.graph.inputs, result.graph.outputs) == (simplify(graph).inputs, simplify(graph).outputs)
    for output, expected in zip(run(result.graph, feeds), run(graph, feeds), strict=True):
        if expected.dtype != np.float32:
            np.testing.assert_array_equal(output, expected)
        else:
            assert output.shape == expected.shape
            assert sqnr_db(output, expected) > FLOOR_DB[recipe.name]
    return result


def changed(result):
    """How many large float32 weights of the main graph are left."""
    tensors = result.graph.model.graph.initializer
    return not any(t.data_type == TensorProto.FLOAT and len(t.dims) > 1 and np.prod(t.dims) >= 2048 for t in tensors)


# --- subgraphs


def branch(name, nodes, output, shape, arrays=None):
    stored = [numpy_helper.from_array(given, key) for key, given in (arrays or {}).items()]
    return helper.make_graph(nodes, name, [], [value(output, TensorProto.FLOAT, shape)], stored)


def draw_choice():
    """Two MatMuls around an If, whose branches read the first one's output and weight, and have one of their own."""
    shape = ["batch", 64]
    then = branch("then", [helper.make_node("MatMul", ["hidden", "w1"], ["t"], name="inner.shared")], "t", shape)
    other = branch(
        "else", [helper.make_node("MatMul", ["hidden", "own"], ["e"], name="inner.own")], "e", shape,
        {"own": array(64, 64)},
    )  # fmt: skip
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["first"], name="first"),
        helper.make_node("Relu", ["first"], ["hidden"], name="relu"),
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
        helper.make_node("Greater", ["sum", "zero"], ["positive"]),
        helper.make_node("If", ["positive"], ["chosen"], name="choice", then_branch=then, else_branch=other),
        helper.make_node("MatMul", ["chosen", "w2"], ["y"], name="last"),
    ]
    arrays = {"w1": array(64, 64), "w2": array(64, 64), "zero": np.float32(0)}
    return model(nodes, [value("x", TensorProto.FLOAT, ["batch", 64])], [value("y", TensorProto.FLOAT, shape)], arrays)


def test_layers_around_an_if_are_quantized_and_those_within_named(recipe):
    graph = draw_choice()
    x = RNG.normal(size=(16, 64)).astype(np.float32)
    for sign in (1, -1):
        shifted = x + np.float32(sign)
        result = check(graph, recipe, {"x": shifted})
    assert set(result.kept_float) >= {"inner.shared", "inner.own"}
    assert not {"first", "last"} & set(result.kept_float)


def test_names_that_a_subgraph_reads_are_there(recipe):
    result = check(draw_choice(), recipe, {"x": RNG.normal(size=(16, 64)).astype(np.float32)})
    wiring = wire(result.graph.model)
    (choice,) = [index for index, node in enumerate(wiring.nodes) if node.op_type == "If"]
    captured = [name for name, reads in wiring.readers.items() if (choice, -1) in reads]
    assert captured
    for name in captured:
        assert name in wiring.initializers or wiring.writer[name] < choice


def test_a_loop_and_a_scan_are_carried_along(recipe):
    step = helper.make_graph(
        [
            helper.make_node("Add", ["state", "bias"], ["state_out"]),
            helper.make_node("Identity", ["go"], ["go_out"]),
        ],
        "step",
        [value("i", TensorProto.INT64, []), value("go", TensorProto.BOOL, []), value("state", TensorProto.FLOAT, None)],
        [value("go_out", TensorProto.BOOL, []), value("state_out", TensorProto.FLOAT, None)],
    )
    column = helper.make_graph(
        [helper.make_node("Add", ["sum_in", "part"], ["sum_out"]), helper.make_node("Identity", ["sum_out"], ["seen"])],
        "column",
        [value("sum_in", TensorProto.FLOAT, [8]), value("part", TensorProto.FLOAT, [8])],
        [value("sum_out", TensorProto.FLOAT, [8]), value("seen", TensorProto.FLOAT, [8])],
    )
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["first"], name="first"),
        helper.make_node("Loop", ["times", "", "first"], ["looped"], name="loop", body=step),
        helper.make_node("MatMul", ["looped", "w2"], ["second"], name="second"),
        helper.make_node("Scan", ["zeros", "second"], ["total", "y"], name="scan", body=column, num_scan_inputs=1),
    ]
    arrays = {
        "w1": array(64, 64), "w2": array(64, 8), "bias": np.full(64, 0.1, np.float32), "times": np.asarray(3),
        "zeros": np.zeros(8, np.float32),
    }  # fmt: skip
    ends = [value("x", TensorProto.FLOAT, ["batch", 64])], [value("y", TensorProto.FLOAT, ["batch", 8])]
    result = check(model(nodes, *ends, arrays), recipe, {"x": RNG.normal(size=(12, 64)).astype(np.float32)})
    assert [node.op_type for node in result.graph.model.graph.node if node.name in ("loop", "scan")] == ["Loop", "Scan"]
    assert not {"first", "second"} & set(result.kept_float)


@pytest.mark.parametrize("name", ["int8-weights", "int4-weights", "int8-dynamic"])
def test_a_graph_whose_layers_all_lie_inside_is_refused_with_the_reason(name):
    branches = {
        f"{side}_branch": branch(
            side, [helper.make_node("MatMul", ["x", "w"], [side])], side, ["batch", 64], {"w": array(64, 64)}
        )
        for side in ("then", "else")
    }
    ends = [value("x", TensorProto.FLOAT, ["batch", 64])], [value("y", TensorProto.FLOAT, ["batch", 64])]
    graph = model([helper.make_node("If", ["yes"], ["y"], **branches)], *ends, {"yes": np.asarray(True)})
    with pytest.raises(AnswerIsNo, match="2 layers lie inside If, Loop or Scan, where all stays float"):
        quantize(graph, parse(name), None)


# --- weights


def test_weights_of_constant_nodes_are_quantized(recipe):
    constants = [
        helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array(64, 64))) for name in ("w1", "w2")
    ]
    nodes = [
        *constants,
        helper.make_node("MatMul", ["x", "w1"], ["a"], name="first"),
        helper.make_node("MatMul", ["a", "w2"], ["y"], name="second"),
    ]
    ends = [value("x", TensorProto.FLOAT, ["batch", 64])], [value("y", TensorProto.FLOAT, ["batch", 64])]
    result = check(model(nodes, *ends, {}), recipe, {"x": RNG.normal(size=(16, 64)).astype(np.float32)})
    assert changed(result)
    assert result.kept_float == ()


def test_models_that_differ_in_constant_nodes_alone_have_other_weights(tmp_path):
    digests = set()
    for gain in (1, 2):
        weight = numpy_helper.from_array(np.full((8, 8), gain, np.float32))
        nodes = [helper.make_node("Constant", [], ["w"], value=weight), helper.make_node("MatMul", ["x", "w"], ["y"])]
        ends = [value("x", TensorProto.FLOAT, ["batch", 8])], [value("y", TensorProto.FLOAT, ["batch", 8])]
        onnx.save(model(nodes, *ends, {}).model, tmp_path / f"{gain}.onnx")
        digests.add(load_graph(tmp_path / f"{gain}.onnx").weights_sha256)
    assert len(digests) == 2


@pytest.mark.parametrize("excluded", [(), ("second",)])
def test_weights_of_two_layers_serve_both(recipe, excluded):
    from dataclasses import replace

    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="first"),
        helper.make_node("MatMul", ["a", "w"], ["y"], name="second"),
    ]
    ends = [value("x", TensorProto.FLOAT, ["batch", 64])], [value("y", TensorProto.FLOAT, ["batch", 64])]
    graph = model(nodes, *ends, {"w": array(64, 64)})
    result = check(graph, replace(recipe, exclude=excluded), {"x": RNG.normal(size=(16, 64)).astype(np.float32)})
    assert result.kept_float == excluded
    stored = {tensor.data_type for tensor in result.graph.model.graph.initializer if np.prod(tensor.dims) >= 1024}
    assert (TensorProto.FLOAT in stored) == bool(excluded)


def test_an_initializer_that_is_an_output_or_an_input_too(recipe):
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="first"),
        helper.make_node("MatMul", ["a", "v"], ["y"], name="second"),
    ]
    inputs = [value("x", TensorProto.FLOAT, ["batch", 64]), value("v", TensorProto.FLOAT, [64, 64])]
    outputs = [value("y", TensorProto.FLOAT, ["batch", 64]), value("w", TensorProto.FLOAT, [64, 64])]
    graph = model(nodes, inputs, outputs, {"w": array(64, 64), "v": array(64, 64)})
    result = check(graph, recipe, {"x": RNG.normal(size=(16, 64)).astype(np.float32)})
    assert [spec.name for spec in result.graph.inputs] == ["x"]
    assert result.kept_float == ()


# --- inputs


def draw_tagger():
    """Token ids, how many of them count, and a scalar that scales: (batch, tokens), (batch,), ()."""
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["embedded"], name="embed"),
        helper.make_node("Shape", ["ids"], ["shape"]),
        helper.make_node("Gather", ["shape", "one"], ["width"]),
        helper.make_node("Range", ["zero", "width", "one"], ["positions"]),
        helper.make_node("Unsqueeze", ["lengths", "last"], ["column"]),
        helper.make_node("Less", ["positions", "column"], ["inside"]),
        helper.make_node("Cast", ["inside"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["wide"]),
        helper.make_node("Mul", ["embedded", "wide"], ["masked"]),
        helper.make_node("MatMul", ["masked", "w1"], ["a"], name="first"),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "w2"], ["c"], name="second"),
        helper.make_node("Mul", ["c", "gain"], ["scores"]),
        helper.make_node("ArgMax", ["ids"], ["longest"], axis=1, keepdims=0),
    ]
    arrays = {
        "table": array(500, 32), "w1": array(32, 64), "w2": array(64, 64), "zero": np.asarray(0), "one": np.asarray(1),
        "last": np.asarray([-1]),
    }  # fmt: skip
    inputs = [
        value("ids", TensorProto.INT64, ["batch", "tokens"]), value("lengths", TensorProto.INT64, ["batch"]),
        value("gain", TensorProto.FLOAT, []),
    ]  # fmt: skip
    outputs = [
        value("scores", TensorProto.FLOAT, ["batch", "tokens", 64]), value("longest", TensorProto.INT64, ["batch"])
    ]  # fmt: skip
    return model(nodes, inputs, outputs, arrays)


def tagger_feeds(rows=12, tokens=9):
    return {
        "ids": RNG.integers(0, 500, (rows, tokens)),
        "lengths": RNG.integers(1, tokens + 1, rows),
        "gain": np.asarray(2, np.float32),
    }


def test_tokens_lengths_and_scalars_are_inputs_like_others(recipe):
    result = check(draw_tagger(), recipe, tagger_feeds(), scalars=("gain",))
    assert [spec.dtype for spec in result.graph.inputs] == ["int64", "int64", "float32"]
    assert not {"first", "second"} & set(result.kept_float)


def test_a_free_dimension_other_than_the_batch_stays_free(recipe):
    graph = draw_tagger()
    result = check(graph, recipe, tagger_feeds(tokens=9), scalars=("gain",))
    others = tagger_feeds(rows=3, tokens=17)
    assert sqnr_db(run(result.graph, others)[0], run(graph, others)[0]) > FLOOR_DB[recipe.name] - 3


def test_calibration_samples_with_integers_come_from_npz(tmp_path):
    graph = draw_tagger()
    np.savez(tmp_path / "tokens.npz", **(tagger_feeds(40) | {"gain": np.full(40, 2, np.float32)}))
    samples = open_samples(str(tmp_path / "tokens.npz"), split="train", inputs=graph.inputs)
    result = quantize(graph, parse("int8"), samples)
    assert (result.fused, result.ranges.samples) == ((2, 2), 20)


def test_several_float_inputs(recipe):
    nodes = [
        helper.make_node("MatMul", ["left", "w1"], ["a"], name="first"),
        helper.make_node("MatMul", ["right", "w2"], ["b"], name="second"),
        helper.make_node("Add", ["a", "b"], ["y"]),
    ]
    inputs = [value("left", TensorProto.FLOAT, ["batch", 64]), value("right", TensorProto.FLOAT, ["batch", 48])]
    graph = model(
        nodes, inputs, [value("y", TensorProto.FLOAT, ["batch", 64])], {"w1": array(64, 64), "w2": array(48, 64)}
    )
    feeds = {name: RNG.normal(size=(16, width)).astype(np.float32) for name, width in (("left", 64), ("right", 48))}
    assert check(graph, recipe, feeds).kept_float == ()


def test_a_fixed_batch(recipe):
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"], name="first"),
        helper.make_node("MatMul", ["a", "w2"], ["y"], name="second"),
    ]
    ends = [value("x", TensorProto.FLOAT, [4, 64])], [value("y", TensorProto.FLOAT, [4, 64])]
    graph = model(nodes, *ends, {"w1": array(64, 64), "w2": array(64, 64)})
    result = check(graph, recipe, {"x": RNG.normal(size=(4, 64)).astype(np.float32)})
    assert result.graph.inputs[0].shape == (4, 64)


# --- opsets


@pytest.mark.parametrize("opset", [*range(9, 25)])
def test_every_opset(recipe, opset):
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["a"], name="conv", pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "g", "c"], ["h"], name="gemm", transB=1),
        helper.make_node("MatMul", ["h", "m"], ["y"], name="matmul"),
    ]
    arrays = {
        "w": array(32, 8, 3, 3), "b": RNG.normal(size=32).astype(np.float32), "g": array(64, 32),
        "c": RNG.normal(size=64).astype(np.float32), "m": array(64, 64),
    }  # fmt: skip
    ends = [value("x", TensorProto.FLOAT, ["batch", 8, 8, 8])], [value("y", TensorProto.FLOAT, ["batch", 64])]
    graph = model(nodes, *ends, arrays, opset=opset, ir_version=4 if opset < 13 else 8)
    result = check(graph, recipe, {"x": RNG.normal(size=(8, 8, 8, 8)).astype(np.float32)})
    assert set(result.kept_float) <= {"conv"}
    assert "Constant" not in {node.op_type for node in result.graph.model.graph.node}


# --- what torch writes


@pytest.fixture(scope="module")
def exported():
    """A function: torch module, example inputs, names -> graph with free batch and time."""
    torch = pytest.importorskip("torch")

    def export(module, examples, names):
        dims = ({0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("time", min=2, max=128)},) * len(
            names
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's about itself
            program = torch.onnx.export(
                module.eval(), examples, dynamo=True, opset_version=21, input_names=names, output_names=["y"],
                dynamic_shapes=dims, verbose=False,
            )  # fmt: skip
        return simplify(Graph(program.model_proto, "0" * 64))

    return export


@pytest.fixture(scope="module")
def recurrent(exported):
    import torch

    class Tagger(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(300, 48)
            self.lstm = torch.nn.LSTM(48, 32, batch_first=True, bidirectional=True)
            self.gru = torch.nn.GRU(64, 32, batch_first=True)
            self.head = torch.nn.Linear(32, 80)

        def forward(self, ids):
            states, _ = self.lstm(self.embed(ids))
            states, _ = self.gru(states)
            return self.head(states)

    torch.manual_seed(0)
    return exported(Tagger(), (torch.randint(0, 300, (2, 10)),), ["ids"])


@pytest.fixture(scope="module")
def encoder(exported):
    import torch

    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(300, 64)
            layer = torch.nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True, norm_first=True)
            self.layers = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

        def forward(self, ids):
            return self.layers(self.embed(ids))

    torch.manual_seed(0)
    return exported(Encoder(), (torch.randint(0, 300, (2, 10)),), ["ids"])


def tokens(rows=16, length=14):
    return {"ids": RNG.integers(0, 300, (rows, length))}


def test_torch_s_recurrent_tagger(recurrent, recipe):
    result = check(recurrent, recipe, tokens())
    if recipe.precision == "int8-dynamic":
        assert result.fused == (2, 3)  # the LSTM and the head
        assert len(result.kept_float) == 1
    if recipe.precision.endswith("-weights"):
        assert changed(result)


def test_torch_s_transformer_encoder(encoder, recipe):
    result = check(encoder, recipe, tokens())
    if recipe.precision == "int8-dynamic":
        assert result.fused == (8, 8)
        assert result.kept_float == ()
    if recipe.precision.endswith("-weights"):
        assert changed(result)
