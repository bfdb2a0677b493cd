"""Models as others' exporters write them, through the commands: each works, or is one line that says what does not.

Nothing here comes from our own exporter. Names, dims, opsets and detours are those that TensorFlow, Paddle, old torch,
scikit-learn and others leave in their files.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from memopt import compare, load, probe
from memopt_export import cli, first_session, inspection, preflight

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402  # after the skip

FLOAT, INT64, BOOL, UINT8, STRING = (
    TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL, TensorProto.UINT8, TensorProto.STRING
)  # fmt: skip
HALF, BRAIN, DOUBLE = TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE
RNG = np.random.default_rng(0)


def weight(*shape, dtype=np.float32):
    return (RNG.normal(size=shape) * 0.2).astype(dtype)


def value(name, dtype=FLOAT, shape=("batch", 8)):
    """A dim may be a number, -1 included, a name, or None: said nothing."""
    made = helper.make_tensor_value_info(name, dtype, None if shape is None else [])
    for dim in shape or ():
        said = made.type.tensor_type.shape.dim.add()
        if isinstance(dim, str):
            said.dim_param = dim
        elif dim is not None:
            said.dim_value = dim
    return made


node = helper.make_node


def constant(name, array):
    return node("Constant", [], [name], value=numpy_helper.from_array(np.asarray(array)))


def model(nodes, inputs, outputs, arrays=(), *, opset=17, ir_version=8, opsets=(), functions=(), **how):
    graph = helper.make_graph(
        nodes, "graph", inputs, outputs,
        [numpy_helper.from_array(np.asarray(array), name) for name, array in dict(arrays).items()],
    )  # fmt: skip
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(*each) for each in opsets)]
    return helper.make_model(graph, opset_imports=imports, ir_version=ir_version, functions=list(functions), **how)


# --- TensorFlow, by tf2onnx


def tf_classifier(opset=9, ir_version=4):
    """NHWC outside and NCHW within, a Squeeze with attributes, names with colons."""
    scope = "StatefulPartitionedCall/sequential/conv2d"
    nodes = [
        node("Transpose", ["input_1:0"], [f"{scope}/Conv2D__6:0"], name=f"{scope}/Conv2D__6", perm=[0, 3, 1, 2]),
        node("Conv", [f"{scope}/Conv2D__6:0", f"{scope}/kernel:0"], [f"{scope}/Conv2D:0"], name=f"{scope}/Conv2D",
             auto_pad="SAME_UPPER", strides=[2, 2], kernel_shape=[3, 3]),
        node("BatchNormalization", [f"{scope}/Conv2D:0", "gamma:0", "beta:0", "mean:0", "variance:0"], ["bn:0"],
             epsilon=1e-3),
        node("Relu", ["bn:0"], ["relu:0"], name="StatefulPartitionedCall/sequential/re_lu/Relu"),
        node("GlobalAveragePool", ["relu:0"], ["pool:0"]),
        node("Squeeze", ["pool:0"], ["squeezed:0"], axes=[2, 3]),
        node("MatMul", ["squeezed:0", "dense/kernel:0"], ["dense/MatMul:0"], name="dense/MatMul"),
        node("Add", ["dense/MatMul:0", "dense/bias:0"], ["Identity_1:0"], name="dense/BiasAdd"),
        node("Softmax", ["Identity_1:0"], ["dense"], axis=1),
    ]  # fmt: skip
    arrays = {
        f"{scope}/kernel:0": weight(16, 3, 3, 3), "gamma:0": np.ones(16, np.float32), "beta:0": weight(16),
        "mean:0": weight(16), "variance:0": np.ones(16, np.float32), "dense/kernel:0": weight(16, 10),
        "dense/bias:0": weight(10),
    }  # fmt: skip
    ends = [value("input_1:0", shape=("unk__12", 8, 8, 3))], [value("dense", shape=("unk__13", 10))]
    return model(nodes, *ends, arrays, opset=opset, ir_version=ir_version, producer_name="tf2onnx")


def tf_reshape():
    """A batch that is read off the input, as tf.keras.layers.Reshape does it."""
    nodes = [
        node("Shape", ["args_0"], ["shape__1"]),
        node("Cast", ["shape__1"], ["shape__2"], to=TensorProto.INT32),
        node("Slice", ["shape__2", "const_starts__3", "const_ends__4", "const_axes__5"], ["strided_slice"]),
        node("Cast", ["strided_slice"], ["batch__6"], to=INT64),
        node("Concat", ["batch__6", "const_fold_opt__7"], ["Reshape/shape_Concat__8:0"], axis=0),
        node("Reshape", ["args_0", "Reshape/shape_Concat__8:0"], ["Reshape:0"]),
        node("ReduceMean", ["Reshape:0"], ["output_0"], axes=[1], keepdims=0),
    ]
    arrays = {
        "const_starts__3": np.int64([0]), "const_ends__4": np.int64([1]), "const_axes__5": np.int64([0]),
        "const_fold_opt__7": np.int64([4, 6]),
    }  # fmt: skip
    ends = [value("args_0", shape=("unk__15", 24))], [value("output_0", shape=("unk__16", 6))]
    return model(nodes, *ends, arrays, opset=11, ir_version=6)


def tf_while():
    """tf.while_loop: a Loop with a condition, a state that grows by a weight of the graph around it."""
    body = helper.make_graph(
        [
            node("Add", ["state", "while/weight:0"], ["state_out"]),
            node("ReduceSum", ["state_out"], ["sum"], keepdims=0),
            node("Less", ["sum", "limit"], ["go_out"]),
        ],
        "while_body",
        [value("i", INT64, ()), value("go", BOOL, ()), value("state", shape=None)],
        [value("go_out", BOOL, ()), value("state_out", shape=None)],
    )
    nodes = [node("Loop", ["trips", "yes", "x:0"], ["Identity:0"], name="while_loop", body=body)]
    arrays = {
        "trips": np.int64(3), "yes": np.asarray(True), "while/weight:0": weight(8), "limit": np.float32(1e6)
    }  # fmt: skip
    return model(
        nodes, [value("x:0", shape=("unk__1", 8))], [value("Identity:0", shape=("unk__2", 8))], arrays, opset=12
    )


# --- Paddle, by paddle2onnx


def paddle_detector():
    """Weights in Constant nodes, a batch of -1, Identity chains, several outputs with paths for names."""
    nodes = [
        constant("conv2d_0.w_0", weight(8, 3, 3, 3)),
        constant("batch_norm_0.b_0", weight(8)),
        constant("roi@Resize.0", np.float32([])),
        constant("scales@Resize.0", np.float32([1, 1, 2, 2])),
        node("Identity", ["image"], ["Identity.0"]),
        node("Identity", ["Identity.0"], ["p2o.Identity.1"]),
        node("Conv", ["p2o.Identity.1", "conv2d_0.w_0", "batch_norm_0.b_0"], ["conv2d_0.tmp_0"], pads=[1] * 4),
        node("HardSigmoid", ["conv2d_0.tmp_0"], ["hardsigmoid_0.tmp_0"], alpha=1 / 6, beta=0.5),
        node("Mul", ["conv2d_0.tmp_0", "hardsigmoid_0.tmp_0"], ["hardswish_0.tmp_0"]),
        node(
            "Resize",
            ["hardswish_0.tmp_0", "roi@Resize.0", "scales@Resize.0"],
            ["nearest_interp_v2_0.tmp_0"],
            mode="nearest",
        ),
        node("ReduceMean", ["nearest_interp_v2_0.tmp_0"], ["mean"], axes=[2, 3], keepdims=0),
        node("Identity", ["mean"], ["save_infer_model/scale_0.tmp_0"]),
        node("Identity", ["nearest_interp_v2_0.tmp_0"], ["save_infer_model/scale_1.tmp_0"]),
    ]
    outputs = [
        value("save_infer_model/scale_0.tmp_0", shape=(-1, 8)),
        value("save_infer_model/scale_1.tmp_0", shape=(-1, 8, -1, -1)),
    ]
    return model(
        nodes, [value("image", shape=(-1, 3, 8, 8))], outputs, opset=11, ir_version=7, producer_name="PaddlePaddle"
    )


def paddle_recognizer():
    """Width is free, and called by a dotted name; opset 10, Slice by inputs, LSTM of two directions."""
    nodes = [
        constant("axes", np.int64([2])), constant("starts", np.int64([0])), constant("ends", np.int64([1])),
        node("Slice", ["x", "starts", "ends", "axes"], ["slice_0.tmp_0"]),
        node("Squeeze", ["slice_0.tmp_0"], ["squeeze_0.tmp_0"], axes=[2]),
        node("Transpose", ["squeeze_0.tmp_0"], ["transpose_0.tmp_0"], perm=[2, 0, 1]),
        node("LSTM", ["transpose_0.tmp_0", "lstm.w", "lstm.r"], ["lstm.out"], hidden_size=6, direction="bidirectional"),
        node("Transpose", ["lstm.out"], ["transpose_1.tmp_0"], perm=[2, 0, 1, 3]),
        node("Reshape", ["transpose_1.tmp_0", "shape"], ["reshape_0.tmp_0"]),
        node("MatMul", ["reshape_0.tmp_0", "linear_0.w_0"], ["softmax_0.tmp_0"]),
    ]  # fmt: skip
    arrays = {
        "lstm.w": weight(2, 24, 3), "lstm.r": weight(2, 24, 6), "shape": np.int64([0, 0, 12]),
        "linear_0.w_0": weight(12, 7),
    }  # fmt: skip
    inputs = [value("x", shape=("DynamicDimension.0", 3, 4, "DynamicDimension.1"))]
    outputs = [value("softmax_0.tmp_0", shape=("DynamicDimension.2", "DynamicDimension.3", 7))]
    return model(nodes, inputs, outputs, arrays, opset=10, ir_version=7)


# --- torch, years ago


def torch_1_0():
    """Opset 9, IR 3: weights among the inputs, numbers for names, Upsample, Pad by attribute, stack traces."""
    arrays = {
        "conv1.weight": weight(8, 3, 3, 3), "conv1.bias": weight(8), "bn.weight": np.ones(8, np.float32),
        "bn.bias": weight(8), "bn.running_mean": weight(8), "bn.running_var": np.ones(8, np.float32),
        "bn.num_batches_tracked": np.int64(7), "fc.weight": weight(10, 8), "fc.bias": weight(10),
    }  # fmt: skip
    inputs = [
        value("input.1", shape=(1, 3, 8, 8)),
        *(value(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape) for name, array in arrays.items()),
    ]
    nodes = [
        node("Pad", ["input.1"], ["10"], mode="constant", pads=[0, 0, 1, 1, 0, 0, 1, 1], value=0.0),
        node("Conv", ["10", "conv1.weight", "conv1.bias"], ["11"], kernel_shape=[3, 3],
             doc_string='File "/home/me/net.py", line 3, in forward\n' * 40),
        node("BatchNormalization", ["11", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"], ["12"],
             epsilon=1e-5, momentum=0.9),
        constant("13", np.float32([1, 1, 2, 2])),
        node("Upsample", ["12", "13"], ["14"], mode="nearest"),
        node("GlobalAveragePool", ["14"], ["15"]),
        node("Shape", ["15"], ["16"]),
        constant("17", np.int64(0)),
        node("Gather", ["16", "17"], ["18"], axis=0),
        constant("19", np.int64(-1)),
        node("Unsqueeze", ["18"], ["20"], axes=[0]),
        node("Unsqueeze", ["19"], ["21"], axes=[0]),
        node("Concat", ["20", "21"], ["22"], axis=0),
        node("Reshape", ["15", "22"], ["23"]),
        node("Dropout", ["23"], ["24"], ratio=0.5),
        node("Gemm", ["24", "fc.weight", "fc.bias"], ["25"], transB=1),
    ]  # fmt: skip
    return model(nodes, inputs, [value("25", shape=(1, 10))], arrays, opset=9, ir_version=3, producer_name="pytorch")


def torch_keeps_initializers():
    """keep_initializers_as_inputs=True at IR 6, where a caller may replace them."""
    arrays = {"0.weight": weight(16, 8), "0.bias": weight(16), "2.weight": weight(4, 16)}
    nodes = [
        node("Gemm", ["input", "0.weight", "0.bias"], ["6"], transB=1),
        node("Relu", ["6"], ["7"]),
        node("Gemm", ["7", "2.weight"], ["output"], transB=1),
    ]
    inputs = [value("input", shape=("batch_size", 8)), *(value(name, shape=a.shape) for name, a in arrays.items())]
    return model(nodes, inputs, [value("output", shape=("batch_size", 4))], arrays, opset=11, ir_version=6)


def plain(shape, *, out=None):
    """One MatMul between ends of these shapes."""
    nodes = [node("MatMul", ["x", "w"], ["y"])]
    return model(nodes, [value("x", shape=shape)], [value("y", shape=out)], {"w": weight(8, 4)}, opset=13)


def lstm_with_states():
    nodes = [
        node("LSTM", ["x", "w", "r", "b", "", "h0", "c0"], ["y", "hn", "cn"], hidden_size=6),
        node("Squeeze", ["y", "axis"], ["output"]),
    ]
    arrays = {"w": weight(1, 24, 5), "r": weight(1, 24, 6), "b": weight(1, 48), "axis": np.int64([1])}
    inputs = [
        value("x", shape=("seq", "batch", 5)), value("h0", shape=(1, "batch", 6)), value("c0", shape=(1, "batch", 6))
    ]  # fmt: skip
    outputs = [value(name, shape=None) for name in ("output", "hn", "cn")]
    return model(nodes, inputs, outputs, arrays, opset=13)


def gru_and_rnn():
    nodes = [
        node("Transpose", ["x"], ["t"], perm=[1, 0, 2]),
        node("GRU", ["t", "w", "r"], ["g"], hidden_size=6, linear_before_reset=1),
        node("Squeeze", ["g"], ["s"], axes=[1]),
        node("RNN", ["s", "rw", "rr"], ["", "last"], hidden_size=4),
    ]
    arrays = {"w": weight(1, 18, 5), "r": weight(1, 18, 6), "rw": weight(1, 4, 6), "rr": weight(1, 4, 4)}
    ends = [value("x", shape=("batch", 7, 5))], [value("last", shape=(1, "batch", 4))]
    return model(nodes, *ends, arrays, opset=11, ir_version=6)


# --- control flow


def branch(name, nodes, output, arrays=()):
    stored = [numpy_helper.from_array(array, key) for key, array in dict(arrays).items()]
    return helper.make_graph(nodes, name, [], [value(output, shape=None)], stored)


def if_with_weights():
    then = branch("then", [node("MatMul", ["x", "w1"], ["t"])], "t", {"w1": weight(8, 8)})
    other = branch("else", [node("MatMul", ["x", "w2"], ["e"])], "e", {"w2": weight(8, 8)})
    nodes = [
        node("ReduceSum", ["x"], ["sum"], keepdims=0),
        node("Greater", ["sum", "zero"], ["positive"]),
        node("If", ["positive"], ["y"], then_branch=then, else_branch=other),
    ]
    return model(nodes, [value("x")], [value("y")], {"zero": np.float32(0)})


def if_in_if():
    inner = [branch(side, [node(kind, ["x"], [side])], side) for side, kind in (("a", "Relu"), ("b", "Neg"))]
    middle = [node("If", ["flag"], ["m"], then_branch=inner[0], else_branch=inner[1])]
    other = branch("else", [node("Identity", ["x"], ["e"])], "e")
    nodes = [node("If", ["flag"], ["y"], then_branch=branch("then", middle, "m"), else_branch=other)]
    return model(nodes, [value("x"), value("flag", BOOL, ())], [value("y")])


def loop_over_count():
    """The trip count is an input."""
    body = helper.make_graph(
        [node("MatMul", ["state", "w"], ["next"]), node("Identity", ["go"], ["go_out"])], "body",
        [value("i", INT64, ()), value("go", BOOL, ()), value("state", shape=None)],
        [value("go_out", BOOL, ()), value("next", shape=None)],
    )  # fmt: skip
    nodes = [node("Loop", ["n", "", "x"], ["y"], body=body)]
    return model(nodes, [value("x"), value("n", INT64, ())], [value("y")], {"w": weight(8, 8)})


def scan():
    body = helper.make_graph(
        [node("Add", ["sum_in", "part"], ["sum_out"]), node("Identity", ["sum_out"], ["seen"])], "body",
        [value("sum_in", shape=(8,)), value("part", shape=(8,))],
        [value("sum_out", shape=(8,)), value("seen", shape=(8,))],
    )  # fmt: skip
    nodes = [node("Scan", ["zeros", "x"], ["total", "y"], body=body, num_scan_inputs=1)]
    return model(nodes, [value("x")], [value("y")], {"zeros": np.zeros(8, np.float32)})


# --- quantized already


def qlinear_conv():
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        node("QLinearConv", ["xq", "s", "z", "w", "ws", "wz", "s", "z"], ["yq"], pads=[1] * 4),
        node("DequantizeLinear", ["yq", "s", "z"], ["y"]),
    ]
    arrays = {
        "s": np.float32(0.05), "z": np.uint8(128), "w": RNG.integers(-127, 127, (8, 3, 3, 3)).astype(np.int8),
        "ws": np.float32(0.01), "wz": np.int8(0),
    }  # fmt: skip
    ends = [value("x", shape=("N", 3, 8, 8))], [value("y", shape=("N", 8, 8, 8))]
    return model(nodes, *ends, arrays, opset=10, ir_version=5)


def qdq_per_channel():
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["xq"]), node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=0),
        node("Gemm", ["xd", "wd"], ["g"], transB=1),
        node("QuantizeLinear", ["g", "s", "z"], ["gq"]), node("DequantizeLinear", ["gq", "s", "z"], ["y"]),
    ]  # fmt: skip
    arrays = {
        "s": np.float32(0.05), "z": np.int8(0), "w": RNG.integers(-127, 127, (16, 8)).astype(np.int8),
        "ws": np.full(16, 0.01, np.float32), "wz": np.zeros(16, np.int8),
    }  # fmt: skip
    return model(nodes, [value("x")], [value("y", shape=("batch", 16))], arrays, opset=13, ir_version=7)


def matmul_integer():
    nodes = [
        node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"]),
        node("MatMulInteger", ["xq", "w", "xz", "wz"], ["i"]),
        node("Cast", ["i"], ["f"], to=FLOAT),
        node("Mul", ["xs", "ws"], ["scale"]),
        node("Mul", ["f", "scale"], ["y"]),
    ]
    arrays = {"w": RNG.integers(0, 255, (8, 4)).astype(np.uint8), "wz": np.uint8(128), "ws": np.float32(0.01)}
    return model(nodes, [value("x")], [value("y", shape=("batch", 4))], arrays, opset=11, ir_version=6)


def int4_blocks():
    packed = helper.make_tensor("w", TensorProto.INT4, [32, 8], RNG.integers(-8, 7, 256).tolist())
    nodes = [
        node("DequantizeLinear", ["w", "ws"], ["wd"], axis=0, block_size=16),
        node("MatMul", ["x", "wd"], ["y"]),
    ]
    ends = [value("x", shape=("batch", 32))], [value("y", shape=("batch", 8))]
    made = model(nodes, *ends, {"ws": np.full((2, 8), 0.1, np.float32)}, opset=21, ir_version=10)
    made.graph.initializer.append(packed)
    return made


def matmul_nbits():
    nodes = [node("MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", K=32, N=8, bits=4, block_size=16)]
    arrays = {"w": RNG.integers(0, 255, (8, 2, 8)).astype(np.uint8), "s": np.full(16, 0.1, np.float32)}
    ends = [value("x", shape=("batch", 32))], [value("y", shape=("batch", 8))]
    return model(nodes, *ends, arrays, opsets=[("com.microsoft", 1)])


# --- types


def tokens_and_scalar():
    nodes = [
        node("Gather", ["table", "input_ids"], ["e"]),
        node("Unsqueeze", ["attention_mask", "last"], ["m"]),
        node("Cast", ["m"], ["mf"], to=FLOAT),
        node("Mul", ["e", "mf"], ["em"]),
        node("Mul", ["em", "temperature"], ["t"]),
        node("ReduceSum", ["t", "one"], ["sentence_embedding"], keepdims=0),
    ]
    inputs = [
        value("input_ids", INT64, ("batch_size", "sequence_length")),
        value("attention_mask", INT64, ("batch_size", "sequence_length")), value("temperature", shape=()),
    ]  # fmt: skip
    arrays = {"table": weight(50, 8), "last": np.int64([-1]), "one": np.int64([1])}
    return model(nodes, inputs, [value("sentence_embedding", shape=("batch_size", 8))], arrays, opset=14)


def picture_bytes():
    nodes = [
        node("Cast", ["image"], ["f"], to=FLOAT),
        node("Div", ["f", "c255"], ["d"]),
        node("ReduceMean", ["d"], ["m"], axes=[1, 2], keepdims=0),
        node("ArgMax", ["m"], ["label"], axis=1, keepdims=0),
    ]
    inputs = [value("image", UINT8, ("N", 4, 4, 3))]
    return model(nodes, inputs, [value("label", INT64, ("N",)), value("m", shape=("N", 3))], {"c255": np.float32(255)})


def doubles():
    return model([node("MatMul", ["x", "w"], ["y"])], [value("x", DOUBLE)], [value("y", DOUBLE, ("batch", 4))],
                 {"w": weight(8, 4, dtype=np.float64)})  # fmt: skip


def halves(dtype):
    stored = helper.make_tensor("w", dtype, [8, 4], weight(8, 4).ravel().tolist())
    made = model([node("MatMul", ["x", "w"], ["y"])], [value("x", dtype)], [value("y", dtype, ("batch", 4))], opset=13)
    made.graph.initializer.append(stored)
    return made


def sequence_within():
    nodes = [
        node("SequenceConstruct", ["x", "x"], ["s"]),
        node("ConcatFromSequence", ["s"], ["y"], axis=1),
    ]
    return model(nodes, [value("x")], [value("y", shape=("batch", 16))])


def optional_within():
    nodes = [
        node("Optional", ["x"], ["o"]),
        node("OptionalGetElement", ["o"], ["e"]),
        node("Relu", ["e"], ["y"]),
    ]
    return model(nodes, [value("x")], [value("y")])


def sequence_input():
    made = helper.make_tensor_sequence_value_info("xs", FLOAT, ["batch", 8])
    return model([node("ConcatFromSequence", ["xs"], ["y"], axis=1)], [made], [value("y", shape=None)])


def optional_input():
    kind = helper.make_optional_type_proto(helper.make_tensor_type_proto(FLOAT, ["batch", 8]))
    nodes = [node("OptionalGetElement", ["x"], ["y"])]
    return model(nodes, [helper.make_value_info("x", kind)], [value("y")])


def strings_within():
    """Labels that no output returns."""
    nodes = [
        constant("names", np.asarray(["cat", "dog"], object)),
        node("Gather", ["names", "one"], ["name"]),
        node("Equal", ["name", "dog"], ["is_dog"]),
        node("Cast", ["is_dog"], ["f"], to=FLOAT),
        node("Mul", ["x", "f"], ["y"]),
    ]
    made = model(nodes, [value("x")], [value("y")], {"one": np.int64(1)}, opset=19, ir_version=9)
    made.graph.initializer.append(helper.make_tensor("dog", STRING, [], [b"dog"]))
    return made


def strings_in():
    return model([node("Identity", ["x"], ["y"])], [value("x", STRING)], [value("y", STRING)])


# --- scikit-learn, by sklearn-onnx


def sklearn_linear(*, zipmap):
    nodes = [
        node("Scaler", ["X"], ["scaled"], domain="ai.onnx.ml", offset=[0.0] * 8, scale=[1.0] * 8),
        node("LinearClassifier", ["scaled"], ["label", "probabilities"], domain="ai.onnx.ml",
             classlabels_ints=[0, 1, 2], coefficients=weight(24).tolist(), intercepts=[0.0] * 3,
             multi_class=1, post_transform="SOFTMAX"),
    ]  # fmt: skip
    outputs = [value("label", INT64, (None,)), value("probabilities", shape=(None, 3))]
    if zipmap:
        nodes.append(node("ZipMap", ["probabilities"], ["maps"], domain="ai.onnx.ml", classlabels_int64s=[0, 1, 2]))
        kind = helper.make_sequence_type_proto(
            helper.make_map_type_proto(INT64, helper.make_tensor_type_proto(FLOAT, []))
        )
        outputs = [outputs[0], helper.make_value_info("maps", kind)]
    return model(nodes, [value("X", shape=(None, 8))], outputs, opset=15, opsets=[("ai.onnx.ml", 1)])


def sklearn_trees():
    nodes = [
        node("TreeEnsembleRegressor", ["X"], ["variable"], domain="ai.onnx.ml", n_targets=1,
             nodes_treeids=[0, 0, 0], nodes_nodeids=[0, 1, 2], nodes_featureids=[0, 0, 0], nodes_values=[0.5, 0.0, 0.0],
             nodes_modes=["BRANCH_LEQ", "LEAF", "LEAF"], nodes_truenodeids=[1, 0, 0], nodes_falsenodeids=[2, 0, 0],
             target_treeids=[0, 0], target_nodeids=[1, 2], target_ids=[0, 0], target_weights=[1.0, 2.0]),
    ]  # fmt: skip
    return model(nodes, [value("X", shape=(None, 8))], [value("variable", shape=(None, 1))], opset=15,
                 opsets=[("ai.onnx.ml", 1)])  # fmt: skip


# --- newer, and other


def opset_24():
    nodes = [
        node("RMSNormalization", ["x", "scale"], ["n"], axis=-1),
        node("MatMul", ["n", "w"], ["m"]),
        node("Relu", ["m"], ["y"]),
    ]
    arrays = {"scale": np.ones(8, np.float32), "w": weight(8, 8)}
    return model(nodes, [value("x")], [value("y")], arrays, opset=24, ir_version=11)


def microsoft_operators():
    nodes = [
        node("SkipLayerNormalization", ["x", "x", "g", "b"], ["n"], domain="com.microsoft"),
        node("FusedMatMul", ["n", "w"], ["m"], domain="com.microsoft", transB=1, alpha=0.5),
        node("FastGelu", ["m", "mb"], ["y"], domain="com.microsoft"),
    ]
    arrays = {"g": np.ones(8, np.float32), "b": weight(8), "w": weight(8, 8), "mb": weight(8)}
    ends = [value("x", shape=("batch", 5, 8))], [value("y", shape=("batch", 5, 8))]
    return model(nodes, *ends, arrays, opsets=[("com.microsoft", 1), ("ai.onnx.training", 1), ("ai.onnx.ml", 3)])


def local_functions():
    gelu = helper.make_function(
        "local.nn", "Gelu", ["a"], ["b"],
        [constant("half", np.float32(0.5)), node("Erf", ["a"], ["e"]), node("Add", ["e", "half"], ["s"]),
         node("Mul", ["a", "s"], ["b"])],
        [helper.make_opsetid("", 18)],
    )  # fmt: skip
    nodes = [node("MatMul", ["x", "w"], ["m"]), node("Gelu", ["m"], ["y"], domain="local.nn")]
    return model(nodes, [value("x")], [value("y")], {"w": weight(8, 8)}, opset=18, opsets=[("local.nn", 1)],
                 functions=[gelu])  # fmt: skip


def shape_by_value():
    """How many rows come out depends on what the numbers are."""
    nodes = [
        node("Greater", ["scores", "zero"], ["mask"]),
        node("NonZero", ["mask"], ["at"]),
        node("Transpose", ["at"], ["rows"], perm=[1, 0]),
        node("GatherND", ["scores", "rows"], ["kept"]),
    ]
    return model(nodes, [value("scores")], [value("kept", shape=("found",))], {"zero": np.float32(0)})


def nothing_goes_in():
    return model(
        [node("Add", ["a", "b"], ["y"])], [], [value("y", shape=(2, 2))], {"a": weight(2, 2), "b": weight(2, 2)}
    )


def passes_through():
    return model([node("Relu", ["x"], ["y"])], [value("x"), value("spare")], [value("x"), value("y")])


MODELS: dict[str, Callable[[], onnx.ModelProto]] = {
    "TensorFlow": tf_classifier,
    "TensorFlow, opset 12": lambda: tf_classifier(12, 7),
    "TensorFlow, Reshape": tf_reshape,
    "TensorFlow, while": tf_while,
    "Paddle, detector": paddle_detector,
    "Paddle, recognizer": paddle_recognizer,
    "torch 1.0": torch_1_0,
    "torch, initializers kept": torch_keeps_initializers,
    "dim -1": lambda: plain((-1, 8), out=(-1, 4)),
    "dim 0": lambda: plain((0, 8), out=(0, 4)),
    "dim of nothing": lambda: plain((None, 8), out=(None, 4)),
    "dim with spaces": lambda: plain(("Größe der Charge", 8), out=("2*N + 1", 4)),
    "no shape": lambda: plain(None, out=None),
    "no shape comes out": lambda: plain(("N", 8), out=None),
    "LSTM with states": lstm_with_states,
    "GRU and RNN": gru_and_rnn,
    "If": if_with_weights,
    "If in If": if_in_if,
    "Loop over a count": loop_over_count,
    "Scan": scan,
    "QLinearConv": qlinear_conv,
    "Q/DQ per channel": qdq_per_channel,
    "MatMulInteger": matmul_integer,
    "INT4 blocks": int4_blocks,
    "MatMulNBits": matmul_nbits,
    "tokens and a scalar": tokens_and_scalar,
    "picture of bytes": picture_bytes,
    "float64": doubles,
    "float16": lambda: halves(HALF),
    "bfloat16": lambda: halves(BRAIN),
    "sequence within": sequence_within,
    "optional within": optional_within,
    "sequence in": sequence_input,
    "optional in": optional_input,
    "strings within": strings_within,
    "strings in": strings_in,
    "scikit-learn, linear": lambda: sklearn_linear(zipmap=False),
    "scikit-learn, ZipMap": lambda: sklearn_linear(zipmap=True),
    "scikit-learn, trees": sklearn_trees,
    "opset 24": opset_24,
    "com.microsoft": microsoft_operators,
    "local functions": local_functions,
    "shape by value": shape_by_value,
    "nothing goes in": nothing_goes_in,
    "an input comes out": passes_through,
}


# Model -> command -> exit code, and what its one line says. What is not here ends with 0.
_SCALAR = "expects shape (), got (1,)"
_QUANTIZED = "the graph is already int8; hint: start from the fp32 graph"
ALL = ("inspect", "plan", "compare", "simplify", "quantize", "pack")
NOT: dict[str, dict[str, tuple[int, str]]] = {
    "dim 0": {"compare": (1, "input 'x' expects shape (0, 8), got (1, 8)")},
    "no shape": dict.fromkeys(ALL, (3, "input 'x' has no shape, not even a number of dimensions")),
    "If in If": {"compare": (1, _SCALAR)},
    "Loop over a count": {"compare": (1, _SCALAR)},
    "QLinearConv": {"quantize": (3, _QUANTIZED)},
    "Q/DQ per channel": {"quantize": (3, _QUANTIZED)},
    "MatMulInteger": {"quantize": (3, _QUANTIZED)},
    "INT4 blocks": {"quantize": (3, _QUANTIZED.replace("int8", "int4-weights"))},
    "MatMulNBits": {"quantize": (3, _QUANTIZED)},
    "tokens and a scalar": {"compare": (1, _SCALAR)},
    "float16": {"quantize": (3, "the graph is already fp16")},
    "bfloat16": {"quantize": (3, "the graph is already bf16"), "compare": (3, "input 'x' expects bfloat16")},
    "sequence in": dict.fromkeys(ALL, (3, "'xs' is a sequence; only tensors are supported")),
    "optional in": dict.fromkeys(ALL, (3, "'x' is a optional; only tensors are supported")),
    "strings in": dict.fromkeys(ALL, (3, "'x' holds strings; only numbers are supported")),
    "scikit-learn, ZipMap": dict.fromkeys(ALL, (3, "'maps' is a sequence; only tensors are supported")),
    "com.microsoft": {
        "quantize": (3, "a com.microsoft.SkipLayerNormalization, whose types are"),
    },
    "nothing goes in": {"compare": (3, "d.npz has different numbers of samples, or none")},
}  # fmt: skip
WORDS = {
    "inspect": ("m.onnx",),
    "plan": ("m.onnx", "--batch", "1,4"),
    "compare": ("m.onnx", "--data", "d.npz", "--batch", "1", "--devices", "cpu", "--runtimes", "onnxruntime"),
    "simplify": ("m.onnx", "-o", "out.onnx"),
    "quantize": ("m.onnx", "--precision", "fp16", "--no-measure", "-o", "out.onnx"),
    "pack": ("m.onnx", "-o", "out.mopt"),
}


def samples(proto, rows, *, scalars):
    """Numbers for each input that is a tensor of them; a scalar is given for each row where `scalars` says so."""
    rng, feeds = np.random.default_rng(1), {}
    initialized = {tensor.name for tensor in proto.graph.initializer}
    for given in proto.graph.input:
        tensor = given.type.tensor_type
        if given.name in initialized or tensor.elem_type in (0, STRING):
            continue
        dims = [dim.dim_value if dim.dim_value > 0 else 4 for dim in tensor.shape.dim]
        if dims and not tensor.shape.dim[0].dim_value > 0:
            dims[0] = rows
        dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        shape = (rows, *dims[1:]) if scalars else dims
        feeds[given.name] = np.asarray(np.abs(rng.normal(size=shape) * 2)).astype(dtype)
    return feeds


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder where all that runs in a process of its own runs in this one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preflight, "open_apart", lambda path, *_, **__: first_session._open(path))
    monkeypatch.setattr(inspection, "look_apart", _look_here)
    monkeypatch.setattr(compare, "measure", lambda request, **_: probe._measure_here(request))
    return tmp_path


def _look_here(path, *_, **__):
    answer = first_session._open(path, look=True)
    return answer.execution, answer.reason


@pytest.mark.parametrize("command", ALL)
@pytest.mark.parametrize("name", MODELS)
def test_it_works_or_one_line_says_what_does_not(folder, capsys, name, command):
    proto = MODELS[name]()
    onnx.save(proto, "m.onnx")
    np.savez("d.npz", **samples(proto, 4, scalars=True))
    with pytest.raises(SystemExit) as ended:
        cli.main([command, *WORDS[command]])
    told = capsys.readouterr()
    code, said = NOT.get(name, {}).get(command, (0, ""))
    assert ended.value.code == code
    lines = [line for line in told.err.splitlines() if not line.startswith("  ")]  # what goes on is indented
    if code:
        assert len(lines) == 1
        assert said in (lines[0] if code == 3 else told.out)
    else:
        assert lines == []
        assert command != "compare" or "not measured" not in told.out


@pytest.mark.parametrize("name", [name for name in MODELS if "pack" not in NOT.get(name, {}) and name != "bfloat16"])
def test_simplified_and_packed_it_computes_the_same(folder, name):
    import onnxruntime

    proto = MODELS[name]()
    onnx.save(proto, "m.onnx")
    for command in ("simplify", "pack"):
        with pytest.raises(SystemExit) as ended:
            cli.main([command, *WORDS[command]])
        assert ended.value.code == 0
    feeds = samples(proto, 0 if name == "dim 0" else 4, scalars=False)
    sessions = [
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]) for path in ("m.onnx", "out.onnx")
    ]
    expected, simplified = (session.run(None, feeds) for session in sessions)
    with load("out.mopt", device="cpu") as packed:
        got = packed.run(None, feeds)
    for outputs in (simplified, got):
        for output, wanted in zip(outputs, expected, strict=True):
            np.testing.assert_allclose(output, wanted, rtol=1e-5, atol=1e-5)


def test_what_the_table_says_of_commands_is_about_models_and_commands_that_exist():
    assert NOT.keys() <= MODELS.keys()
    assert {command for told in NOT.values() for command in told} <= set(ALL)
