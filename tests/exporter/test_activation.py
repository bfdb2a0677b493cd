import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memopt_export.activation import IDENTITY, behind
from memopt_export.graph import wire

onnx = pytest.importorskip("onnx")

# Away from the corners, where a slope has two values.
POINTS = np.linspace(-7.03, 7.05, 97, dtype=np.float32)


def relu(net):
    net.op("Relu")


def relu6(net):
    net.relu6()


def clip_from_below(net):
    net.op("Clip", net.last, net.constant("low", np.float32(-0.5)))


def clip_from_above(net):
    net.op("Clip", net.last, "", net.constant("high", np.float32(2.5)))


def clip_without_ends(net):
    net.op("Clip", net.last)


def leaky(net):
    net.op("LeakyRelu")


def leaky_of_own_slope(net):
    net.op("LeakyRelu", alpha=0.3)


def sigmoid(net):
    net.op("Sigmoid")


def tanh(net):
    net.op("Tanh")


def hard_sigmoid(net):
    net.op("HardSigmoid")


def hard_sigmoid_of_mobilenet(net):
    net.op("HardSigmoid", alpha=1 / 6, beta=0.5)


def hard_swish(net):
    net.op("HardSwish")


def silu(net):
    value = net.last
    net.op("Mul", value, net.op("Sigmoid", value))


def silu_the_other_way_round(net):
    value = net.last
    net.op("Mul", net.op("Sigmoid", value), value)


def hard_swish_in_two(net):
    value = net.last
    net.op("Mul", value, net.op("HardSigmoid", value, alpha=1 / 6, beta=0.5))


KNOWN = [
    relu, relu6, clip_from_below, clip_from_above, clip_without_ends, leaky, leaky_of_own_slope, sigmoid, tanh,
    hard_sigmoid, hard_sigmoid_of_mobilenet, hard_swish, silu, silu_the_other_way_round, hard_swish_in_two,
]  # fmt: skip


def layer_and(draw, net):
    """A MatMul by 1, and what is drawn behind it."""
    drawn = net(1)
    drawn.op("MatMul", "x", drawn.constant("one", np.ones((1, 1), np.float32)))
    draw(drawn)
    return drawn.graph()


@pytest.fixture(scope="module", params=KNOWN, ids=lambda draw: draw.__name__)
def case(request, net):
    """A graph, and the activation that was found in it."""
    graph = layer_and(request.param, net)
    return graph, behind(0, wire(graph.model))


def test_it_computes_what_onnx_runtime_computes(case):
    import onnxruntime as ort

    graph, activation = case
    session = ort.InferenceSession(graph.data, providers=["CPUExecutionProvider"])
    expected = session.run(None, {"x": POINTS[:, None]})[0][:, 0]
    np.testing.assert_allclose(activation.of(POINTS), expected, atol=2e-6)


def test_the_slope_is_that_of_finite_differences(case):
    _, activation = case
    points, half = POINTS.astype(np.float64), 1e-6
    expected = (activation.of(points + half) - activation.of(points - half)) / (2 * half)
    np.testing.assert_allclose(activation.slope(points), expected, atol=1e-5)


def test_float32_stays_float32(case):
    _, activation = case
    assert activation.of(POINTS).dtype == activation.slope(POINTS).dtype == np.float32


def test_far_ends_give_no_overflow(case):
    _, activation = case
    ends = np.float32([-1e4, 1e4])
    assert np.isfinite(activation.of(ends)).all()
    assert np.isfinite(activation.slope(ends)).all()


def test_relu6_lets_nothing_through_beyond_its_ends(net):
    activation = behind(0, wire(layer_and(relu6, net).model))
    assert activation.slope(np.float32([-1, 0.5, 5.5, 7])).tolist() == [0, 1, 1, 0]


# --- where nothing is known


def an_output(net):
    net.op("Relu")
    net.op("Identity", "matmul0.out")
    net.shown = ("relu1.out", "matmul0.out")


def two_readers(net):
    left, right = net.op("Relu", "matmul0.out"), net.op("Tanh", "matmul0.out")
    net.op("Add", left, right)


def a_gate_of_something_else(net):
    gate = net.op("Sigmoid", "matmul0.out")
    other = net.op("Exp", "x")
    product = net.op("Mul", gate, other)
    net.op("Add", product, "matmul0.out")


def a_product_with_something_else(net):
    net.op("Sigmoid", "matmul0.out")
    gate = net.last
    product = net.op("Mul", "matmul0.out", "x")
    net.op("Add", product, gate)


def an_unknown_function(net):
    net.op("Exp")


def a_clip_with_computed_ends(net):
    ends = net.op("ReduceMax", "x", keepdims=0)
    net.op("Clip", "matmul0.out", "", ends)


def nothing(net):
    pass


@pytest.mark.parametrize(
    "draw",
    [
        an_output, two_readers, a_gate_of_something_else, a_product_with_something_else, an_unknown_function,
        a_clip_with_computed_ends, nothing,
    ],
    ids=lambda draw: draw.__name__,
)  # fmt: skip
def test_what_is_not_known_is_the_identity(net, draw):
    drawn = net(1)
    drawn.op("MatMul", "x", drawn.constant("one", np.ones((1, 1), np.float32)))
    draw(drawn)
    graph = drawn.graph(*getattr(drawn, "shown", ()))
    assert behind(0, wire(graph.model)) is IDENTITY


@given(st.lists(st.floats(-100, 100, width=32), min_size=1))
def test_the_identity_lets_everything_through(values):
    array = np.float32(values)
    np.testing.assert_array_equal(IDENTITY.of(array), array)
    assert (IDENTITY.slope(array) == 1).all()
