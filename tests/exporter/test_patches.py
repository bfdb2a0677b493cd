import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memopt_export.patches import Geometry

onnx = pytest.importorskip("onnx")

# What a Conv reads, its output channels, and its attributes.
CONVOLUTIONS = {
    "plain": ((2, 3, 7, 6), 4, {"kernel_shape": [3, 3]}),
    "pointwise": ((2, 3, 5, 5), 4, {"kernel_shape": [1, 1]}),
    "strides": ((2, 3, 9, 8), 4, {"kernel_shape": [3, 2], "strides": [2, 3]}),
    "pads on one side": ((2, 3, 6, 6), 4, {"kernel_shape": [3, 3], "pads": [0, 2, 1, 0]}),
    "dilations": ((2, 3, 9, 9), 4, {"kernel_shape": [3, 2], "dilations": [2, 3], "pads": [1, 1, 1, 1]}),
    "all at once": ((3, 4, 11, 10), 6, {
        "kernel_shape": [3, 2], "strides": [2, 1], "dilations": [1, 2], "pads": [1, 0, 2, 1], "group": 2,
    }),
    "groups": ((2, 6, 5, 5), 9, {"kernel_shape": [3, 3], "group": 3}),
    "depthwise": ((2, 4, 6, 6), 4, {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "group": 4}),
    "depthwise with a multiplier": ((2, 4, 6, 6), 8, {"kernel_shape": [3, 3], "group": 4}),
    "valid": ((2, 3, 7, 7), 4, {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "VALID"}),
    "same upper, an odd pad": ((2, 3, 7, 8), 4, {"kernel_shape": [2, 4], "auto_pad": "SAME_UPPER"}),
    "same lower, an odd pad": ((2, 3, 7, 8), 4, {"kernel_shape": [2, 4], "auto_pad": "SAME_LOWER"}),
    "same upper, strides": ((2, 3, 8, 7), 4, {"kernel_shape": [3, 3], "strides": [2, 3], "auto_pad": "SAME_UPPER"}),
    "same lower, strides": ((2, 3, 8, 7), 4, {"kernel_shape": [3, 3], "strides": [2, 3], "auto_pad": "SAME_LOWER"}),
    "same, where a stride skips more than it pads": (
        (2, 3, 7, 9), 4, {"kernel_shape": [1, 1], "strides": [4, 2], "auto_pad": "SAME_UPPER"},
    ),
    "one axis": ((2, 3, 12), 4, {"kernel_shape": [3], "strides": [2], "pads": [2, 1]}),
    "three axes": ((2, 2, 4, 5, 6), 4, {"kernel_shape": [2, 3, 2], "pads": [1, 0, 0, 0, 1, 1], "group": 2}),
}  # fmt: skip

PRODUCTS = {
    "Gemm": ("Gemm", (5, 6), (6, 4), 1, {}),
    "Gemm of a transposed weight": ("Gemm", (5, 6), (4, 6), 0, {"transB": 1}),
    "MatMul": ("MatMul", (5, 6), (6, 4), 1, {}),
    "MatMul of three axes": ("MatMul", (2, 5, 6), (6, 4), 1, {}),
    "MatMul of four axes": ("MatMul", (2, 3, 5, 6), (6, 4), 1, {}),
}


def compute(node, read, weight):
    """What ONNX Runtime writes for the node."""
    import onnxruntime as ort
    from onnx import TensorProto, helper

    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "w", "y")]
    graph = helper.make_graph([node], "one", values[:2], values[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=8)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": read, "w": weight})[0]


def multiply(geometry, read, weight):
    """Every row times the matrix, (positions, channels)."""
    rows = geometry.rows(read, np.arange(geometry.positions(read)))
    products = rows @ geometry.matrix(weight).swapaxes(1, 2)  # (groups, positions, outputs)
    return products.swapaxes(0, 1).reshape(products.shape[1], -1)


def draw_conv(shape, channels, attributes):
    rng = np.random.default_rng(0)
    attributes = dict(attributes)
    kernel = attributes["kernel_shape"]
    read = rng.normal(size=shape).astype(np.float32)
    weight = rng.normal(size=(channels, shape[1] // attributes.get("group", 1), *kernel)).astype(np.float32)
    return onnx.helper.make_node("Conv", ["x", "w"], ["y"], **attributes), read, weight


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_rows_times_matrix_are_what_the_convolution_writes(case):
    node, read, weight = draw_conv(*CONVOLUTIONS[case])
    geometry = Geometry.of(node, weight, 0)
    written = compute(node, read, weight)
    expected = np.moveaxis(written, 1, -1).reshape(-1, written.shape[1])
    assert geometry.positions(read) == len(expected)
    np.testing.assert_allclose(multiply(geometry, read, weight), expected, atol=1e-5)


@pytest.mark.parametrize("case", PRODUCTS)
def test_rows_times_matrix_are_what_the_product_writes(case):
    op, shape, weight_shape, axis, attributes = PRODUCTS[case]
    rng = np.random.default_rng(0)
    read, weight = (rng.normal(size=size).astype(np.float32) for size in (shape, weight_shape))
    node = onnx.helper.make_node(op, ["x", "w"], ["y"], **attributes)
    expected = compute(node, read, weight).reshape(-1, 4)
    geometry = Geometry.of(node, weight, axis)
    assert geometry.positions(read) == len(expected)
    np.testing.assert_allclose(multiply(geometry, read, weight), expected, atol=1e-5)


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_unfold_is_the_inverse_of_matrix_for_convolutions(case):
    node, _, weight = draw_conv(*CONVOLUTIONS[case])
    geometry = Geometry.of(node, weight, 0)
    np.testing.assert_array_equal(geometry.unfold(geometry.matrix(weight), weight), weight)


@pytest.mark.parametrize("case", PRODUCTS)
def test_unfold_is_the_inverse_of_matrix_for_products(case):
    _, _, shape, axis, _ = PRODUCTS[case]
    weight = np.arange(24, dtype=np.float32).reshape(shape)
    geometry = Geometry(1, axis)
    assert geometry.matrix(weight).shape == (1, 4, 6)
    np.testing.assert_array_equal(geometry.unfold(geometry.matrix(weight), weight), weight)


@settings(max_examples=20, deadline=None)
@given(data=st.data(), case=st.sampled_from(sorted(CONVOLUTIONS)))
def test_some_rows_are_those_of_all_rows(data, case):
    node, read, weight = draw_conv(*CONVOLUTIONS[case])
    geometry = Geometry.of(node, weight, 0)
    count = geometry.positions(read)
    chosen = np.asarray(data.draw(st.lists(st.integers(0, count - 1), max_size=9)), np.int64)
    np.testing.assert_array_equal(geometry.rows(read, chosen), geometry.rows(read, np.arange(count))[:, chosen])


def test_positions_of_a_sample_lie_together():
    node, read, weight = draw_conv(*CONVOLUTIONS["all at once"])
    geometry = Geometry.of(node, weight, 0)
    each = geometry.positions(read[:1])
    whole = geometry.rows(read, np.arange(geometry.positions(read)))
    for index in range(len(read)):
        own = geometry.rows(read[index : index + 1], np.arange(each))
        np.testing.assert_array_equal(whole[:, index * each : (index + 1) * each], own)
