"""Narrow tensors stored twice, as `equalize` does it."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memopt.accuracy import sqnr_db
from memopt_export import twofold
from memopt_export.quantize import quantize
from memopt_export.recipe import Recipe

onnx = pytest.importorskip("onnx")


def bottleneck(net):
    net.conv(4, name="first")
    net.conv(16, kernel=1)


def stream(net):
    """Two sums, one on top of the other."""
    net.op("Add", net.conv(4, name="first"), net.conv(4, read="x"))
    before = net.last
    net.op("Relu", net.conv(16, kernel=1))
    net.op("Add", net.conv(4, kernel=1), before)
    net.conv(16, kernel=1)


def pooled(net):
    net.conv(4, name="first")
    net.op("GlobalAveragePool")
    net.op("Flatten")
    net.gemm(4, 16)


def flattened_for_a_plain_gemm(net):
    net.conv(4, name="first")
    net.op("Flatten")
    net.op("Gemm", net.last, net.weight("w", 256, 16), name="fc")


def without_biases(net):
    net.conv(4, name="first", bias=False)
    net.conv(16, kernel=1, bias=False)


def shared_weights(net):
    net.conv(4, name="first")
    net.conv(16, kernel=1, name="second")
    net.op("Relu")
    net.conv(4, kernel=1)
    net.op("Conv", net.last, "second.w", "second.b", name="third")


DOUBLED = [bottleneck, stream, pooled, without_biases, shared_weights]


def wide(net):
    """Stored twice it would be the larger of the two tensors."""
    net.conv(12, name="first")
    net.conv(16, kernel=1)


def grouped_reader(net):
    net.conv(4, name="first")
    net.conv(16, kernel=1, group=2)


def padded_reader(net):
    net.conv(4, name="first")
    net.conv(16)


def behind_a_function(net):
    net.conv(4, name="first")
    net.op("Relu")
    net.conv(16, kernel=1)


SINGLE = [wide, grouped_reader, padded_reader, behind_a_function]


@pytest.fixture
def at_any_price(monkeypatch):
    monkeypatch.setattr(twofold, "_PRICE", 2.0)


def first_channels(graph):
    node = next(node for node in graph.model.graph.node if node.name == "first")
    (weight,) = (tensor for tensor in graph.model.graph.initializer if tensor.name == node.input[1])
    return weight.dims[0]


RECIPES = [Recipe("int8"), Recipe("int8", "tensorrt")]


@pytest.mark.usefixtures("at_any_price")
@pytest.mark.parametrize(
    ("draw", "recipe"),
    [*itertools.product(DOUBLED, RECIPES), (flattened_for_a_plain_gemm, RECIPES[0])],  # TensorRT rounds behind Flatten
    ids=lambda given: getattr(given, "target", None),
)
def test_outputs_are_those_it_had_and_noise_falls(
    graph_of, draw, recipe, equalized, samples_of, assert_same_outputs, run, monkeypatch
):
    graph = graph_of(draw)
    calibration, samples = samples_of(graph, 32), samples_of(graph, 32, seed=5)
    other = equalized(graph, calibration, recipe)
    assert first_channels(other) == 8
    assert_same_outputs(graph, other, samples)
    onnx.checker.check_model(other.model, full_check=True)
    expected = run(graph, samples, optimize=False)
    finer = sqnr_db(run(quantize(graph, recipe, calibration).graph, samples), expected)
    monkeypatch.setattr(twofold, "_PRICE", 0.0)
    assert finer > sqnr_db(run(quantize(graph, recipe, calibration).graph, samples), expected) - 0.5


@pytest.mark.usefixtures("at_any_price")
@pytest.mark.parametrize("draw", SINGLE)
def test_what_is_not_narrow_stays_single(graph_of, draw, equalized, samples_of):
    graph = graph_of(draw)
    channels = first_channels(graph)
    assert first_channels(equalized(graph, samples_of(graph))) == channels


@pytest.mark.usefixtures("at_any_price")
@pytest.mark.parametrize(
    "recipe", [Recipe("fp8", "tensorrt"), Recipe("int8", exclude=("first",))], ids=["fp8", "float layer"]
)
def test_what_has_no_steps_stays_single(graph_of, recipe, equalized, samples_of):
    graph = graph_of(bottleneck)
    assert first_channels(equalized(graph, samples_of(graph), recipe)) == 4


def test_what_costs_too_much_stays_single(graph_of, equalized, samples_of):
    graph = graph_of(bottleneck)
    assert first_channels(equalized(graph, samples_of(graph))) == 4


@pytest.mark.usefixtures("at_any_price")
def test_steps_are_halved(graph_of, equalized, samples_of, tensor_of, run, monkeypatch):
    """Where the one tensor's rounding is all the noise there is, 6 dB."""
    graph = graph_of(bottleneck)
    samples = samples_of(graph, 64)
    noise = {}
    for price in (0.0, 2.0):
        monkeypatch.setattr(twofold, "_PRICE", price)
        other = equalized(graph, samples, Recipe("int8"))
        first, second = (node for node in other.model.graph.node if node.op_type == "Conv")
        exact, rounded = (other.copy_model() for _ in range(2))
        values = tensor_of(other, first.output[0], samples)
        scale = np.asarray((values.max() - values.min()) / 255, np.float32)
        pair(rounded, first.output[0], second.name, scale)
        got, expected = (run(other.with_model(each), samples, optimize=False) for each in (rounded, exact))
        noise[price] = sqnr_db(got, expected)
    assert noise[2.0] - noise[0.0] == pytest.approx(6, abs=1)


def pair(model, tensor, reader, scale):
    """Rounds what the reader reads to steps of `scale`."""
    constants = [
        onnx.numpy_helper.from_array(scale, "scale"),
        onnx.numpy_helper.from_array(np.asarray(128, np.uint8), "zero"),
    ]
    model.graph.initializer.extend(constants)
    nodes = list(model.graph.node)
    index = next(i for i, node in enumerate(nodes) if node.name == reader)
    nodes[index].input[0] = "rounded"
    q = onnx.helper.make_node("QuantizeLinear", [tensor, "scale", "zero"], ["integers"])
    dq = onnx.helper.make_node("DequantizeLinear", ["integers", "scale", "zero"], ["rounded"])
    del model.graph.node[:]
    model.graph.node.extend([*nodes[:index], q, dq, *nodes[index:]])


@given(st.floats(1e-3, 1e3))
def test_one_writer_is_half_a_step_apart(step):
    (apart,) = twofold._half_steps([(np.ones(1), step)], 1)
    assert abs(apart) / step == pytest.approx(0.5)


@given(st.lists(st.floats(0.1, 10), min_size=3, max_size=3))
def test_sums_are_nearly_so(steps):
    first, second, total = steps
    apart = twofold._half_steps([(np.eye(2)[0], first), (np.eye(2)[1], second), (np.ones(2), total)], 2)
    missed = [
        abs(offset / step - np.floor(offset / step) - 0.5)
        for offset, step in ((apart[0], first), (apart[1], second), (apart.sum(), total))
    ]
    assert missed[0] == pytest.approx(0, abs=1e-9)
    assert sum(np.square(missed)) <= 0.5  # both others a whole number of steps apart, at worst
