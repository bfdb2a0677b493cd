import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from memopt.accuracy import sqnr_db
from memopt.errors import AnswerIsNo, InputRefused, UsageError
from memopt.ort_runtime import library_errors
from memopt_export.graph import Graph, load_graph, save_graph
from memopt_export.means import Means
from memopt_export.quantize import METHODS, Quantized, half, quantize
from memopt_export.recipe import PRECISIONS, Recipe, parse
from memopt_models.data import Samples

onnx = pytest.importorskip("onnx")

# What each method promises on a network that neither dies nor explodes: a half keeps 11 bits, 66 dB for one rounding,
# less what a dozen of them add up; 8 bits over a range of a few standard deviations keep about 40 dB, less the same.
# Weights alone of 8 bits, one scale a channel, lose some 40 dB each; those of 4 bits, one scale for 32, some 20.
# bfloat16 keeps 8, 48 dB for one rounding.
FLOOR_DB = {
    "fp16": 55, "bf16": 35, "int8": 20, "int8-tensorrt": 20, "int8-weights": 33, "int8-weights-tensorrt": 33,
    "int4-weights": 15, "int4-weights-tensorrt": 15, "int8-dynamic": 28, "fp8": 20,
}  # fmt: skip
# Share of the float file that is left, names and all.
LARGEST_SHARE = {
    "fp16": 0.55, "bf16": 0.55, "int8": 0.45, "int8-tensorrt": 0.4, "int8-weights": 0.35, "int8-weights-tensorrt": 0.35,
    "int4-weights": 0.25, "int4-weights-tensorrt": 0.35, "int8-dynamic": 0.35, "fp8": 0.4,
}  # fmt: skip
# What looks at samples, where there are any.
CALIBRATED = frozenset({"fp16", "bf16", "int8", "fp8"})


@pytest.fixture(scope="module", params=list(FLOOR_DB))
def recipe(request):
    return parse(request.param)


def draw_mlp(net):
    """For what leaves convolutions alone: five products, "wide" among them."""
    drawn = net(96)
    for index, name in enumerate(("stem", "depthwise", "pointwise", "wide")):
        drawn.op("MatMul", drawn.last, drawn.weight(f"{name}.w", 96, 96), name=name)
        drawn.op("Relu", name=f"relu{index}")
    drawn.gemm(96, 10)
    return drawn


@pytest.fixture(scope="module")
def own(net, graph, recipe):
    """A graph in which the recipe has five layers."""
    return draw_mlp(net).graph() if recipe.precision == "int8-dynamic" else graph


@pytest.fixture(scope="module")
def own_samples(own, samples_of):
    return samples_of(own)


@pytest.fixture(scope="module")
def run_any(run):
    """As `run`, but of bf16, which ONNX Runtime does not open on a CPU, what `half.emulated` makes of it.

    fp8 runs as it stands: ONNX Runtime's optimizer fails on a Clip before a QuantizeLinear to floats of 8 bits.
    """

    def infer(graph, samples):
        if graph.precision == "fp8":
            return run(graph, samples, optimize=False)
        return run(half.emulated(graph), samples, optimize=False) if graph.precision == "bf16" else run(graph, samples)

    return infer


@pytest.fixture(scope="module")
def done(own, recipe, own_samples):
    return quantize(own, recipe, own_samples)


# --- the contract of all methods


def test_every_precision_has_its_method_and_its_case_here():
    assert set(METHODS) == set(PRECISIONS) - {"fp32"}
    assert {parse(name).precision for name in FLOOR_DB} == set(METHODS)


def test_inputs_and_outputs_are_unchanged(done, own):
    assert done.graph.inputs == own.inputs
    assert done.graph.outputs == own.outputs
    assert done.graph.inputs[0].shape[0] == "batch"


def test_result_carries_the_recipe_s_name_and_the_lineage(done, own, recipe):
    assert done.graph.precision == recipe.name
    assert done.graph.weights_sha256 == own.weights_sha256


def test_checker_accepts_it(done):
    onnx.checker.check_model(done.graph.model, full_check=True)


def test_file_is_smaller(done, own, recipe):
    assert len(done.graph.data) < LARGEST_SHARE[recipe.name] * len(own.data)


@pytest.mark.parametrize("batch", [1, 5])
def test_it_is_close_to_float_at_every_batch(done, own, recipe, samples_of, run, run_any, batch):
    others = samples_of(own, batch, seed=7)
    output = run_any(done.graph, others)
    assert output.shape == (batch, 10)
    assert sqnr_db(output, run(own, others)) > FLOOR_DB[recipe.name]


def test_optimization_does_not_change_its_outputs(done, recipe, own_samples, run):
    if recipe.precision in ("bf16", "fp8"):
        with pytest.raises(library_errors()):  # no bfloat16 operators on a CPU; an optimizer without float8
            run(done.graph, own_samples)
        return
    close = sqnr_db(run(done.graph, own_samples), run(done.graph, own_samples, optimize=False))
    assert close > FLOOR_DB[recipe.name] + 5


def test_bytes_are_the_same_each_time(done, own, recipe, own_samples):
    assert quantize(own, recipe, own_samples).graph.data == done.graph.data


def test_graph_given_is_unchanged(own, recipe, own_samples):
    before = own.model.SerializeToString(deterministic=True)
    quantize(own, recipe, own_samples)
    assert own.model.SerializeToString(deterministic=True) == before
    assert own.precision == "fp32"


def test_an_excluded_node_is_reported_and_keeps_its_weights(own, recipe, own_samples):
    result = quantize(own, replace(recipe, exclude=("wide",)), own_samples)
    stored = {tensor.name: tensor for tensor in result.graph.model.graph.initializer}
    kept = [name for name in stored if name.startswith("wide.w")]
    assert result.kept_float == ("wide",)
    assert [stored[name].data_type for name in kept] == [onnx.TensorProto.FLOAT]


def test_file_survives_a_round_trip(done, recipe, tmp_path):
    save_graph(done.graph, tmp_path / "small.onnx")
    loaded = load_graph(tmp_path / "small.onnx")
    assert (loaded.precision, loaded.data) == (recipe.name, done.graph.data)


def test_tensorrt_builds_it(graph, samples, build_engine):
    for name in ("fp16", "bf16", "int8-tensorrt", "int8-weights-tensorrt", "int4-weights-tensorrt", "fp8"):
        assert build_engine(quantize(graph, parse(name), samples).graph) > 0


def test_better_precision_is_closer_to_float(graph, samples, samples_of, run, run_any):
    others = samples_of(graph, seed=9)
    expected = run(graph, others)
    close = {name: sqnr_db(run_any(quantize(graph, parse(name), samples).graph, others), expected) for name in FLOOR_DB}
    assert close["fp16"] > close["bf16"]
    for suffix in ("", "-tensorrt"):
        assert close["fp16"] > close[f"int8{suffix}"]
        assert close["fp16"] > close[f"int8-weights{suffix}"]
    assert close["int8-weights"] > close["int4-weights"]  # for TensorRT, only one layer of this net has 4 bits


def test_bytes_do_not_depend_on_the_hash_seed(graph, samples, tmp_path):
    save_graph(graph, tmp_path / "float.onnx")
    np.save(tmp_path / "x.npy", samples.feeds["x"])
    program = """if True:
        import sys, numpy
        from pathlib import Path
        from memopt_export.graph import load_graph
        from memopt_export.quantize import quantize
        from memopt_export.recipe import parse
        from memopt_models.data import Samples
        folder = Path(sys.argv[1])
        samples = Samples({"x": numpy.load(folder / "x.npy")}, None, "random/train")
        print([quantize(load_graph(folder / "float.onnx"), parse(name), samples).graph.sha256 for name in sys.argv[2:]])
    """
    command = [sys.executable, "-c", program, str(tmp_path), *FLOOR_DB]
    answer = subprocess.run(command, env={"PYTHONHASHSEED": "12345"}, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == str([quantize(graph, parse(name), samples).graph.sha256 for name in FLOOR_DB])


def test_progress_reaches_the_number_of_samples(own, recipe, own_samples):
    seen = []
    quantize(own, recipe, own_samples, Means(batch_size=10, on_step=seen.append))
    assert [step.done for step in seen if step.what == "calibrate"] == (
        [10, 20, 30, 32] if recipe.precision in CALIBRATED else []
    )
    assert [step.done for step in seen if step.what == "weights"] == (
        [1, 2, 3, 4, 5] if recipe.precision not in CALIBRATED else []
    )


def test_a_fixed_batch_decides_the_size_of_calibration_runs(net, recipe, samples_of):
    drawn = net(3, 8, 8)
    drawn.conv(8)
    drawn.op("MatMul", drawn.last, drawn.weight("w", 8, 96))
    model = drawn.model()
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = 2
    graph = Graph(model, "0" * 64)
    seen = []
    quantize(graph, recipe, samples_of(graph, 7), Means(batch_size=5, on_step=seen.append))
    assert [step.done for step in seen if step.what == "calibrate"] == (
        [2, 4, 6] if recipe.precision in CALIBRATED else []
    )


# --- refusals


def test_an_unknown_node_to_exclude_is_refused_with_the_nearest_names(own, recipe, own_samples):
    with pytest.raises(UsageError, match=r"the graph has no node 'wild' to exclude; hint: --exclude wide or "):
        quantize(own, replace(recipe, exclude=("wild",)), own_samples)


def test_what_is_quantized_already_is_refused(done, recipe, samples):
    with pytest.raises(InputRefused, match=f"the graph is already {recipe.name}; hint: start from the fp32 graph"):
        quantize(done.graph, recipe, samples)


def test_a_foreign_quantized_graph_is_refused_too(done, recipe, samples):
    if recipe.precision == "int8":
        with pytest.raises(InputRefused, match="the graph is already quantized"):
            quantize(Graph(done.graph.model, "0" * 64), recipe, samples)


def test_fp32_is_no_quantization(graph, samples):
    with pytest.raises(UsageError, match=r"fp32 is not made by quantizing; hint: --precision fp16\|"):
        quantize(graph, Recipe("fp32"), samples)


# --- int8


@pytest.mark.parametrize("name", ["int8", "int8-tensorrt"])
def test_static_int8_without_samples_is_refused(graph, name):
    with pytest.raises(UsageError, match="static int8 needs samples to calibrate on; hint: --data SPEC"):
        quantize(graph, parse(name), None)


def test_int8_tells_ranges_and_fused_layers(graph, samples):
    cpu, tensorrt = (quantize(graph, parse(name), samples) for name in ("int8", "int8-tensorrt"))
    assert (cpu.fused, tensorrt.fused) == ((5, 5), None)
    assert cpu.ranges.samples == 32
    assert (cpu.ranges.source, cpu.ranges.fingerprint) == ("random/train", samples.fingerprint)
    assert cpu.ranges.bounds["x"] == (float(samples.feeds["x"].min()), float(samples.feeds["x"].max()))
    assert tensorrt.ranges.bounds.keys() < cpu.ranges.bounds.keys()


def test_an_old_opset_is_raised(net, samples_of, run):
    drawn = net(3, 8, 8, opset=11)
    drawn.conv(8)
    drawn.relu6()
    drawn.conv(8)
    graph = drawn.graph()
    samples = samples_of(graph)
    result = quantize(graph, Recipe("int8"), samples)
    assert result.graph.model.opset_import[0].version == 13
    assert result.fused == (2, 2)
    assert sqnr_db(run(result.graph, samples), run(graph, samples)) > 20


def test_a_graph_is_simplified_first(net, samples_of):
    """Weights in Constant nodes, or listed among the inputs, and BatchNorms would keep layers in float."""
    drawn = net(3, 8, 8)
    drawn.conv(8, name="first", bias=False)
    ones = [drawn.constant(name, np.ones(8, np.float32)) for name in ("gamma", "beta", "mean", "variance")]
    drawn.op("BatchNormalization", drawn.last, *ones)
    drawn.conv(4, name="second", bias=False)
    weight = onnx.numpy_helper.from_array(drawn.arrays.pop("second.w"))
    drawn.nodes.insert(0, onnx.helper.make_node("Constant", [], ["second.w"], value=weight))
    model = drawn.model()
    model.graph.input.append(onnx.helper.make_tensor_value_info("first.w", onnx.TensorProto.FLOAT, (8, 3, 3, 3)))
    graph = Graph(model, "0" * 64)
    result = quantize(graph, Recipe("int8"), samples_of(graph))
    assert (result.fused, result.kept_float) == ((2, 2), ())
    assert [value.name for value in result.graph.model.graph.input] == ["x"]


def test_a_graph_without_layers_is_refused(net, samples_of):
    drawn = net(3)
    drawn.op("Relu")
    graph = drawn.graph()
    with pytest.raises(AnswerIsNo, match="the graph has no Conv, Gemm or MatMul that int8 could serve"):
        quantize(graph, Recipe("int8"), samples_of(graph))


# --- fp16


def converted(drawn, samples_of, run, *outputs, exclude=()):
    """The graph converted without samples, after checking that it runs close to the float one."""
    graph = drawn.graph(*outputs)
    samples = samples_of(graph, 4)
    result = half.convert(graph, Recipe("fp16", exclude=tuple(exclude)))
    onnx.checker.check_model(result.graph.model, full_check=True)
    assert (result.graph.inputs, result.graph.outputs) == (graph.inputs, graph.outputs)
    assert sqnr_db(run(result.graph, samples), run(graph, samples)) > FLOOR_DB["fp16"]
    return result


def kinds(result: Quantized):
    return [node.op_type for node in result.graph.model.graph.node]


def test_fp16_casts_at_the_ends_only(graph):
    result = quantize(graph, Recipe("fp16"), None)
    assert kinds(result).count("Cast") == 2
    assert {tensor.data_type for tensor in result.graph.model.graph.initializer} == {onnx.TensorProto.FLOAT16}
    assert (result.ranges, result.fused, result.kept_float) == (None, None, ())


def test_fp16_keeps_a_node_float_whose_weight_is_too_large_for_a_half(net, samples_of, run):
    drawn = net(8)
    drawn.op("Mul", "x", drawn.constant("huge", np.float32(1e5)), name="up")
    drawn.op("Mul", drawn.last, drawn.constant("tiny", np.float32(1e-5)), name="down")
    result = converted(drawn, samples_of, run)
    assert result.kept_float == ("up",)
    assert onnx.numpy_helper.to_array(
        next(tensor for tensor in result.graph.model.graph.initializer if tensor.name.startswith("huge"))
    ) == np.float32(1e5)


def draw_overflow(net):
    """A network whose values reach some 600 000 in the middle, and are brought back."""
    drawn = net(16)
    for name, gain in (("first", 1.0), ("up", 2e5), ("down", 1e-2), ("last", 1e-2)):
        drawn.constant(f"{name}.w", drawn.rng.normal(0, gain / 4, (16, 16)).astype(np.float32))
        drawn.op("MatMul", drawn.last, f"{name}.w", name=name)
        if name == "up":
            drawn.arrays["up.w"] = drawn.arrays["up.w"].clip(-6e4, 6e4)
            drawn.op("Relu", name="relu")
    return drawn.graph()


def run_as_it_stands(graph, samples):
    """The graph in numpy, every node in the precision that it names: what ONNX Runtime does not do on a CPU."""
    from onnx.reference import ReferenceEvaluator

    with np.errstate(over="ignore", invalid="ignore"):
        return ReferenceEvaluator(graph.model).run(None, samples.feeds)[0]


def test_fp16_that_overflows_looks_good_on_a_cpu_and_is_not(net, samples_of, run):
    """Why the nodes have to be found by their ranges: measuring accuracy here does not find them."""
    graph = draw_overflow(net)
    samples = samples_of(graph)
    blind = half.convert(graph)
    assert (blind.ranges, blind.kept_float) == (None, ())
    assert sqnr_db(run(blind.graph, samples), run(graph, samples)) > FLOOR_DB["fp16"]
    assert not np.isfinite(run_as_it_stands(blind.graph, samples)).all()


def test_fp16_keeps_nodes_float_whose_values_are_too_large_for_a_half(net, samples_of, run):
    graph = draw_overflow(net)
    samples = samples_of(graph)
    result = quantize(graph, Recipe("fp16"), samples)
    assert result.kept_float == ("up", "relu", "down")
    assert result.ranges.bounds["relu.out"][1] > 5e5
    assert (result.ranges.samples, result.ranges.fingerprint) == (32, samples.fingerprint)
    others = samples_of(graph, seed=9)
    for outputs in (run(result.graph, others), run_as_it_stands(result.graph, others)):
        assert sqnr_db(outputs, run(graph, others)) > FLOOR_DB["fp16"]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("peak", "kept"), [(32752, ()), (32753, ("double", "halve")), (65504, ("double", "halve"))])
def test_fp16_leaves_a_factor_of_two_of_head_room(net, sign, peak, kept):
    drawn = net(2)
    drawn.op("Mul", "x", drawn.constant("two", np.float32(2)), name="double")
    drawn.op("Mul", drawn.last, drawn.constant("half", np.float32(0.5)), name="halve")
    drawn.op("Relu", name="relu")
    samples = Samples({"x": np.float32([[sign * peak / 2, 1], [0, 0]])}, None, "by hand")
    assert half.convert(drawn.graph(), samples=samples).kept_float == tuple(kept)


def test_fp16_keeps_the_first_node_float_where_inputs_are_too_large(net, run):
    drawn = net(2)
    drawn.op("Mul", "x", drawn.constant("tiny", np.float32(1e-5)), name="down")
    drawn.op("Relu", name="relu")
    graph, samples = drawn.graph(), Samples({"x": np.float32([[1e6, -1e6]])}, None, "by hand")
    result = half.convert(graph, samples=samples)
    assert result.kept_float == ("down",)
    np.testing.assert_allclose(run_as_it_stands(result.graph, samples), run(graph, samples), rtol=1e-3)


def test_fp16_keeps_float_what_a_mask_makes_infinite_on_samples(net, samples_of, run):
    drawn = net(4)
    drawn.op("Add", "x", drawn.constant("mask", np.float32([0, -np.inf, 0, 0])), name="mask_add")
    drawn.op("Softmax", axis=-1, name="softmax")
    graph = drawn.graph()
    samples = samples_of(graph)
    result = half.convert(graph, samples=samples)
    assert result.kept_float == ("mask_add", "softmax")
    np.testing.assert_allclose(run(result.graph, samples), run(graph, samples), atol=1e-3)


def test_fp16_refuses_samples_that_make_nan(net, samples_of):
    drawn = net(4)
    drawn.op("Sqrt", "x", name="root")
    graph = drawn.graph()
    with pytest.raises(InputRefused, match=r"tensor 'root\.out' holds NaN on the calibration data"):
        half.convert(graph, samples=samples_of(graph))


def test_fp16_turns_an_infinite_weight_into_an_infinite_half(net, samples_of, run):
    drawn = net(4)
    mask = drawn.constant("mask", np.float32([0, -np.inf, 0, 0]))
    drawn.op("Add", "x", mask)
    drawn.op("Softmax", axis=-1)
    assert converted(drawn, samples_of, run).kept_float == ()


def test_fp16_leaves_the_scales_of_a_resize_float(net, samples_of, run, build_engine):
    drawn = net(3, 4, 4)
    drawn.op("Resize", "x", "", drawn.constant("scales", np.float32([1, 1, 2, 2])), mode="nearest")
    result = converted(drawn, samples_of, run)
    (scales,) = result.graph.model.graph.initializer
    assert (scales.data_type, kinds(result)) == (onnx.TensorProto.FLOAT, ["Cast", "Resize", "Cast"])
    assert build_engine(result.graph) > 0


def test_fp16_keeps_an_operator_float_that_knows_no_half(net, samples_of, run):
    drawn = net(4)
    start, limit, delta = (
        drawn.constant(name, np.float32(value)) for name, value in zip("abc", (0, 4, 1), strict=True)
    )
    drawn.op("Range", start, limit, delta, name="ramp")
    drawn.op("Add", "x", drawn.last)
    result = converted(drawn, samples_of, run)
    assert result.kept_float == ("ramp",)
    assert kinds(result) == ["Range", "Cast", "Cast", "Add", "Cast"]


def test_fp16_turns_the_attributes_that_name_a_type(net, samples_of, run):
    drawn = net(4)
    drawn.op("Cast", "x", to=onnx.TensorProto.INT32, name="down")
    drawn.op("Cast", drawn.last, to=onnx.TensorProto.FLOAT, name="up")
    shape = drawn.op("Shape", "x")
    ones = drawn.op("ConstantOfShape", shape, value=onnx.numpy_helper.from_array(np.ones(1, np.float32)))
    zeros = drawn.op("ConstantOfShape", shape)
    drawn.nodes.append(onnx.helper.make_node("Constant", [], ["quarter"], value_float=0.25))
    total = drawn.op("Sum", "up.out", ones, zeros, "quarter")
    result = converted(drawn, samples_of, run, total)
    assert result.kept_float == ()
    assert kinds(result).count("Cast") == 4


def test_fp16_output_that_is_read_inside_too_keeps_its_name(net, samples_of, run):
    drawn = net(3, 8, 8)
    first = drawn.conv(8)
    drawn.conv(4, name="second")
    result = converted(drawn, samples_of, run, first, "second.out")
    assert [spec.name for spec in result.graph.outputs] == [first, "second.out"]


def test_fp16_weight_read_in_both_precisions_is_stored_in_both(net, samples_of, run):
    drawn = net(8)
    weight = drawn.weight("w", 8, 8)
    drawn.op("MatMul", "x", weight, name="first")
    drawn.op("MatMul", drawn.last, weight, name="second")
    result = converted(drawn, samples_of, run, exclude=["first"])
    stored = {tensor.data_type for tensor in result.graph.model.graph.initializer}
    assert stored == {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16}


def draw_norm(net, epsilon, *, gain=1.0):
    """x / sqrt(mean(x^2) + epsilon), node by node, as exporters write it; some rows of x are all zeros."""
    drawn = net(16)
    drawn.op("Mul", "x", drawn.constant("gain", np.float32(gain)), name="gain")
    scaled = drawn.last
    drawn.op("Mul", scaled, scaled, name="square")
    drawn.op("ReduceMean", drawn.last, drawn.constant("axes", np.asarray([-1])), name="mean", keepdims=1)
    drawn.op("Add", drawn.last, drawn.constant("epsilon", np.float32(epsilon)), name="safe")
    drawn.op("Sqrt", drawn.last, name="root")
    drawn.op("Div", scaled, drawn.last, name="norm")
    drawn.op("Relu", name="relu")
    return drawn.graph()


def run_emulated(result, samples, run):
    return run(half.emulated(result.graph), samples, optimize=False)


def test_fp16_keeps_an_epsilon_that_would_be_zero_and_the_division_that_it_saves(net, run):
    graph = draw_norm(net, 1e-12)
    samples = Samples({"x": np.float32([np.zeros(16), np.arange(16)])}, None, "by hand")
    result = half.convert(graph)
    assert result.kept_float == ("safe", "root", "norm")
    for outputs in (run_as_it_stands(result.graph, samples), run_emulated(result, samples, run)):
        np.testing.assert_allclose(outputs, run(graph, samples), atol=2e-3)


def test_fp16_without_the_rule_divides_zero_by_zero(net, run):
    """Case without: the same graph with its epsilon in fp16 by hand."""
    graph = draw_norm(net, 1e-3)
    samples = Samples({"x": np.zeros((1, 16), np.float32)}, None, "by hand")
    result = half.convert(graph)
    assert result.kept_float == ()
    model = result.graph.copy_model()
    epsilon = next(tensor for tensor in model.graph.initializer if tensor.name.startswith("epsilon"))
    epsilon.CopyFrom(onnx.numpy_helper.from_array(np.float16(1e-12), epsilon.name))
    with np.errstate(invalid="ignore"):
        assert np.isnan(run_as_it_stands(Graph(model, "0" * 64), samples)).any()


@pytest.mark.parametrize(
    ("value", "lost"),
    [
        (1e-5, False),  # a subnormal half, 0.1% off
        (1e-6, True),  # 1.3% off
        (1e-8, True),  # zero
        (0.0, False),
        (70000.0, True),
        (-np.inf, False),  # stays what it is
        (2049.0, True),  # 2048
        (2048.0, False),
        (0.1, False),
    ],
)
def test_what_a_half_loses(value, lost):
    assert half.FORMATS["fp16"].loses(np.float32([value])) is lost


@pytest.mark.parametrize(
    ("value", "lost"),
    [(1e-12, False), (1e5 + 0.5, False), (257.0, True), (256.0, False), (3.4e38, True), (3.3e38, False), (0.1, False)],
)
def test_what_a_bfloat16_loses(value, lost):
    assert half.FORMATS["bf16"].loses(np.float32([value])) is lost


def test_fp16_keeps_a_weight_whose_values_are_all_too_small(net, samples_of, run):
    drawn = net(16)
    drawn.constant("tiny", drawn.rng.normal(0, 1e-7, (16, 16)).astype(np.float32))
    drawn.op("MatMul", "x", "tiny", name="down")
    drawn.op("Mul", drawn.last, drawn.constant("up", np.float32(1000)), name="up")
    drawn.op("Mul", drawn.last, "up", name="again")
    graph = drawn.graph()
    samples = samples_of(graph)
    blind, seeing = half.convert(graph), quantize(graph, Recipe("fp16"), samples)
    assert (blind.kept_float, seeing.kept_float) == (("down",), ("down", "up"))  # what lies between is too small, too
    expected = run(graph, samples)
    assert sqnr_db(run_emulated(seeing, samples, run), expected) > 55
    assert sqnr_db(run_emulated(blind, samples, run), expected) < 40


def test_bf16_keeps_positions_whose_last_digit_it_would_lose(net):
    drawn = net(512)
    drawn.op("Add", "x", drawn.constant("positions", np.arange(512, dtype=np.float32)), name="add")
    drawn.op("Relu", name="relu")
    assert half.convert(drawn.graph(), Recipe("bf16")).kept_float == ("add",)
    assert half.convert(drawn.graph(), Recipe("fp16")).kept_float == ()


def test_bf16_holds_what_overflows_in_fp16(net, samples_of, run):
    graph = draw_overflow(net)
    samples = samples_of(graph)
    result = quantize(graph, Recipe("bf16"), samples)
    assert result.kept_float == ()
    assert sqnr_db(run_emulated(result, samples, run), run(graph, samples)) > 30


def test_bf16_is_written_in_an_opset_that_knows_it_everywhere(graph):
    result = quantize(graph, Recipe("bf16"), None)
    assert result.graph.model.opset_import[0].version == 22
    assert {tensor.data_type for tensor in result.graph.model.graph.initializer} == {onnx.TensorProto.BFLOAT16}
    assert kinds(result).count("Cast") == 2
    assert "onnxruntime has no bfloat16 operators for a CPU and does not open it there" in result.notes


def test_bf16_cannot_be_opened_by_onnxruntime_on_a_cpu_as_its_note_says(graph, samples, run):
    from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel

    with pytest.raises(NoKernel):
        run(quantize(graph, Recipe("bf16"), None).graph, samples)


def test_emulated_fp16_shows_the_overflow_that_onnxruntime_hides(net, samples_of, run):
    graph = draw_overflow(net)
    samples = samples_of(graph)
    blind = half.convert(graph)
    assert np.isfinite(run(blind.graph, samples)).all()
    assert not np.isfinite(run_emulated(blind, samples, run)).all()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_inputs_and_outputs_become_halves_by_choice(graph, samples, run, precision, build_engine):
    result = quantize(graph, Recipe(precision, convert_io=True), None)
    dtype = half.FORMATS[precision].dtype
    assert [spec.dtype for spec in (*result.graph.inputs, *result.graph.outputs)] == [dtype, dtype]
    assert [spec.name for spec in result.graph.outputs] == [spec.name for spec in graph.outputs]
    assert "Cast" not in kinds(result)
    onnx.checker.check_model(result.graph.model, full_check=True)
    assert sqnr_db(run_emulated(result, samples, run), run(graph, samples)) > FLOOR_DB[precision]
    assert build_engine(result.graph) > 0


def test_converted_ends_reach_nodes_that_stay_float(net, run):
    drawn = net(8)
    drawn.op("Mul", "x", drawn.constant("huge", np.float32(1e5)), name="up")
    drawn.op("Mul", drawn.last, drawn.constant("tiny", np.float32(1e-4)), name="down")
    graph = drawn.graph("up.out", "down.out")
    result = half.convert(graph, Recipe("fp16", convert_io=True, exclude=("down",)))
    onnx.checker.check_model(result.graph.model, full_check=True)
    assert [spec.name for spec in result.graph.outputs] == ["up.out", "down.out"]
    assert [spec.dtype for spec in result.graph.outputs] == ["float16", "float16"]
    x = Samples({"x": np.full((1, 8), 0.25, np.float16)}, None, "by hand")
    np.testing.assert_allclose(run(result.graph, x), 25000, rtol=1e-3)


def test_fp16_keeps_a_transpose_float_with_which_onnxruntime_would_crash(net, samples_of, run):
    """As halves, the process dies of SIGSEGV when it opens the graph; so there is no case without."""
    drawn = net(6, 32)
    drawn.op("Transpose", "x", perm=[1, 0, 2], name="steps")
    drawn.op("MatMul", drawn.last, drawn.weight("w", 32, 16), name="head")
    assert converted(drawn, samples_of, run).kept_float == ("steps",)


def test_fp16_refuses_an_operator_of_unknown_types(graph, samples):
    model = graph.copy_model()
    model.graph.node[1].domain = "own"
    model.opset_import.append(onnx.helper.make_opsetid("own", 1))
    with pytest.raises(InputRefused, match=r"'relu1' is a own\.Relu, whose types are not known"):
        quantize(Graph(model, "0" * 64), Recipe("fp16"), samples)
