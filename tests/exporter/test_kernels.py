"""What `kernels` says of each operator is what ONNX Runtime allocates, to the byte where the arithmetic is ours."""

import numpy as np
import pytest
from traced import Run

from memopt_export.graph import Graph
from memopt_export.hollow import as_written
from memopt_export.plan import plan

onnx = pytest.importorskip("onnx")
MICROSOFT, NCHWC = "com.microsoft", "com.microsoft.nchwc"
SIDE, CHANNELS = 32, 64
_QUANTIZED = {"s": np.float32(0.02), "z": np.uint8(0), "ws": np.float32(0.02), "wz": np.int8(0)}
_CONV = {"kernel_shape": [3, 3], "pads": [1] * 4}


def weight(*dims):
    return np.ones(dims, np.float32)


def integers(*dims):
    return np.ones(dims, np.int8)


def unary(op, domain="", **attributes):
    return [(op, ["a"], ["u"], domain, attributes)], {}


def quantized(op, inputs, domain="", *, reads="q", **attributes):
    """An operator on integers: "q" is the quantized input."""
    quantize = ("QuantizeLinear", ["a", "s", "z"], ["q"], "", {})
    return [quantize, (op, [reads, *inputs], ["u"], domain, attributes)]


def conv8(weights, **attributes):
    domain = MICROSOFT if attributes.get("channels_last") else ""
    return quantized("QLinearConv", ["s", "z", "w", "ws", "wz", "s", "z"], domain, **attributes), _QUANTIZED | {
        "w": weights
    }


# Name -> nodes (operator, inputs, outputs, domain, attributes) from "a" to "u", and constants.
CASES = {
    **{op: unary(op) for op in (
        "Relu", "Sigmoid", "Tanh", "Elu", "LeakyRelu", "HardSigmoid", "Selu", "Softplus", "Softsign", "ThresholdedRelu",
        "Exp", "Sqrt", "Erf", "Identity", "Flatten", "Trilu", "Gelu", "GlobalAveragePool")},
    "Cast to as many bytes": unary("Cast", to=onnx.TensorProto.INT32),
    "Cast to half": unary("Cast", to=onnx.TensorProto.FLOAT16),
    "Clip": ([("Clip", ["a", "low", "high"], ["u"], "", {})], {"low": np.float32(0), "high": np.float32(6)}),
    "Softmax of rows": unary("Softmax", axis=-1),
    "Softmax of channels": unary("Softmax", axis=1),
    "LRN": unary("LRN", size=5),
    "Transpose": unary("Transpose", perm=[0, 2, 3, 1]),
    "Add": ([("Add", ["a", "w"], ["u"], "", {})], {"w": weight(1, CHANNELS, 1, 1)}),
    "MaxPool": unary("MaxPool", kernel_shape=[2, 2], strides=[2, 2]),
    "Concat": ([("Concat", ["a", "a"], ["u"], "", {"axis": 1})], {}),
    "BiasGelu": ([("BiasGelu", ["a", "b"], ["u"], MICROSOFT, {})], {"b": weight(SIDE)}),
    "FastGelu": unary("FastGelu", MICROSOFT),
    "FastGelu with a bias": ([("FastGelu", ["a", "b"], ["u"], MICROSOFT, {})], {"b": weight(SIDE)}),
    "QuickGelu": unary("QuickGelu", MICROSOFT),
    "Conv": ([("Conv", ["a", "w"], ["u"], "", _CONV)], {"w": weight(CHANNELS, CHANNELS, 3, 3)}),
    "Conv of one column": (
        [("Conv", ["a", "w"], ["u"], "", {"kernel_shape": [1, 1]})], {"w": weight(CHANNELS, CHANNELS, 1, 1)}),
    "Conv with a sum": (
        [("Sqrt", ["x"], ["sum"], "", {}), ("FusedConv", ["a", "w", "b", "sum"], ["u"], MICROSOFT, _CONV)],
        {"w": weight(CHANNELS, CHANNELS, 3, 3), "b": weight(CHANNELS)}),
    "ConvTranspose": (
        [("ConvTranspose", ["a", "w"], ["u"], "", {"kernel_shape": [4, 4], "strides": [2, 2], "pads": [1] * 4})],
        {"w": weight(CHANNELS, CHANNELS // 2, 4, 4)}),
    "blocked Conv with a sum": (
        [("ReorderInput", ["a"], ["c"], NCHWC, {}), ("MaxPool", ["c"], ["d"], NCHWC, {"kernel_shape": [1, 1]}),
         ("Conv", ["c", "w", "b", "d"], ["e"], NCHWC, _CONV),
         ("ReorderOutput", ["e"], ["u"], NCHWC, {"channels": CHANNELS})],
        {"w": weight(CHANNELS, CHANNELS, 3, 3), "b": weight(CHANNELS)}),
    "MatMul": ([("MatMul", ["a", "w"], ["u"], "", {})], {"w": weight(SIDE, SIDE)}),
    "LayerNormalization": (
        [("LayerNormalization", ["a", "g", "g"], ["u"], "", {})], {"g": weight(SIDE)}),
    "LSTM": (
        [("Reshape", ["a", "shape"], ["c"], "", {}), ("LSTM", ["c", "w", "r"], ["u"], "", {"hidden_size": 64})],
        {"shape": np.asarray([256, -1, 64]), "w": weight(1, 256, 64), "r": weight(1, 256, 64)}),
    "GRU": (
        [("Reshape", ["a", "shape"], ["c"], "", {}), ("GRU", ["c", "w", "r"], ["u"], "", {"hidden_size": 64})],
        {"shape": np.asarray([256, -1, 64]), "w": weight(1, 192, 64), "r": weight(1, 192, 64)}),
    "Attention": (
        [("Reshape", ["a", "shape"], ["c"], "", {}),
         ("Attention", ["c", "w", "b"], ["u"], MICROSOFT, {"num_heads": 8})],
        {"shape": np.asarray([-1, 256, 256]), "w": weight(256, 768), "b": weight(768)}),
    "DynamicQuantizeMatMul": (
        [("DynamicQuantizeMatMul", ["a", "w", "ws"], ["u"], MICROSOFT, {})],
        {"w": integers(SIDE, SIDE), "ws": np.float32(1)}),
    "MatMulNBits of 8 bits": (
        [("MatMulNBits", ["a", "w", "s"], ["u"], MICROSOFT,
          {"K": 32, "N": 32, "bits": 8, "block_size": 32, "accuracy_level": 4})],
        {"w": np.ones((32, 1, 32), np.uint8), "s": weight(32)}),
    "QLinearConv": conv8(integers(CHANNELS, CHANNELS, 3, 3), **_CONV),
    "QLinearConv of one column": conv8(integers(CHANNELS, CHANNELS, 1, 1), kernel_shape=[1, 1]),
    "QLinearConv, each channel apart": conv8(integers(CHANNELS, 1, 3, 3), group=CHANNELS, **_CONV),
    "QLinearConv in groups": conv8(integers(CHANNELS, CHANNELS // 4, 3, 3), group=4, **_CONV),
    "QLinearConv, channels last": conv8(integers(48, SIDE, 3, 3), channels_last=1, **_CONV),
    "QLinearMatMul": (
        quantized("QLinearMatMul", ["s", "z", "w", "ws", "wz", "s", "z"]), _QUANTIZED | {"w": integers(SIDE, SIDE)}),
    "QLinearAdd": (quantized("QLinearAdd", ["s", "z", "q", "s", "z", "s", "z"], MICROSOFT), _QUANTIZED),
    "QLinearSigmoid": (quantized("QLinearSigmoid", ["s", "z", "s", "z"], MICROSOFT), _QUANTIZED),
    "QLinearGlobalAveragePool": (quantized("QLinearGlobalAveragePool", ["s", "z", "s", "z"], MICROSOFT), _QUANTIZED),
}  # fmt: skip


def drawn(nodes, constants):
    """x -> Neg -> a -> the nodes -> u -> its shape: nothing but the operator decides what is alive."""
    from onnx import helper, numpy_helper

    made = [
        helper.make_node("Neg", ["x"], ["a"], name="neg"),
        *(helper.make_node(op, i, o, domain=d, name=f"{op}-{o[0]}", **more) for op, i, o, d, more in nodes),
        helper.make_node("Shape", ["u"], ["y"], name="shape"),
    ]
    graph = helper.make_graph(
        made, "net",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", CHANNELS, SIDE, SIDE])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.INT64, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid(name, version) for name, version in (("", 21), (MICROSOFT, 1), (NCHWC, 1))]
    return Graph(helper.make_model(graph, opset_imports=opsets, ir_version=10), "0" * 64)


@pytest.fixture(scope="module")
def traced(tracing, tmp_path_factory):
    """Case -> batch -> bytes at the peak, measured in one process."""
    folder = tmp_path_factory.mktemp("kernels")
    runs, batches = [], (1, 4)
    for index, (nodes, constants) in enumerate(CASES.values()):
        path = folder / f"{index}.onnx"
        path.write_bytes(drawn(nodes, constants).model.SerializeToString())
        runs += [Run(str(path), batch, optimize=False) for batch in batches]
    found = iter(tracing(runs))
    return {name: {batch: next(found) for batch in batches} for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_a_kernel_takes_what_the_plan_says(name, traced):
    graph = drawn(*CASES[name])
    for batch, measured in traced[name].items():
        found = plan(as_written(graph), batch=batch, threads=1)
        assert not found.unknown
        assert found.activation_bytes == pytest.approx(measured, rel=0.01, abs=8192), batch
