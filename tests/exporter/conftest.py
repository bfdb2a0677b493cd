"""Small ONNX models, drawn line by line, and samples to calibrate them on."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from memopt.accuracy import sqnr_db
from memopt_export.equalize import equalize
from memopt_export.graph import Graph
from memopt_export.placement import place
from memopt_export.quantize import quantize
from memopt_export.recipe import Recipe
from memopt_export.walk import watch_all
from memopt_models.data import Samples

sys.path.append(str(Path(__file__).parent.parent / "tracing"))
from traced import peaks, tracer  # found through the line above

INT8 = Recipe("int8")


class Net:
    """An ONNX model in the making: each method adds one node and returns the name of what it writes."""

    def __init__(self, *shape, seed=0, opset=21):
        self.shape, self.opset = ("batch", *shape), opset
        self.rng = np.random.default_rng(seed)
        self.nodes, self.arrays = [], {}
        self.channels = {"x": shape[0]}
        self.last = "x"

    def constant(self, name, array):
        self.arrays[name] = np.asarray(array)
        return name

    def op(self, kind, *inputs, name=None, outputs=1, **attributes):
        """Any node; without inputs it reads what was written last, and keeps its channels."""
        from onnx import helper

        inputs = inputs or (self.last,)
        name = name or f"{kind.lower()}{len(self.nodes)}"
        written = [f"{name}.out"] + [f"{name}.out{index}" for index in range(1, outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), written, name=name, **attributes))
        self.channels.update(dict.fromkeys(written, self.channels.get(inputs[0])))
        self.last = written[0]
        return self.last

    def weight(self, name, *shape):
        """He-initialized, so that the signal neither dies nor explodes."""
        fan = int(np.prod(shape[1:]))
        return self.constant(name, (self.rng.normal(size=shape) * (2 / fan) ** 0.5).astype(np.float32))

    def conv(self, channels, *, kernel=3, group=1, read=None, bias=True, name=None):
        read, name = read or self.last, name or f"conv{len(self.nodes)}"
        inputs = [read, self.weight(f"{name}.w", channels, self.channels[read] // group, kernel, kernel)]
        if bias:
            inputs.append(self.constant(f"{name}.b", self.rng.normal(0, 0.1, channels).astype(np.float32)))
        written = self.op("Conv", *inputs, name=name, group=group, pads=[kernel // 2] * 4)
        self.channels[written] = channels
        return written

    def gemm(self, features, classes, *, name="fc"):
        bias = self.constant(f"{name}.b", self.rng.normal(0, 0.1, classes).astype(np.float32))
        return self.op("Gemm", self.last, self.weight(f"{name}.w", classes, features), bias, name=name, transB=1)

    def relu6(self):
        low, high = self.constant("zero", np.float32(0)), self.constant("six", np.float32(6))
        return self.op("Clip", self.last, low, high)

    def pool(self):
        return self.op("MaxPool", kernel_shape=[2, 2], strides=[2, 2])

    def choice(self, name="choice"):
        """An If whose branches both return x + 1."""
        from onnx import TensorProto, helper

        branches = {}
        for branch in ("then_branch", "else_branch"):
            one = helper.make_node("Constant", [], [f"{branch}.one"], value_float=1.0)
            add = helper.make_node("Add", ["x", f"{branch}.one"], [f"{branch}.out"], doc_string="exported")
            returned = helper.make_tensor_value_info(f"{branch}.out", TensorProto.FLOAT, self.shape)
            branches[branch] = helper.make_graph([one, add], branch, [], [returned], doc_string="exported")
        return self.op("If", self.constant("yes", np.asarray(True)), name=name, **branches)

    def model(self, *outputs):
        """The finished model; `outputs` names what it returns, by default what was written last."""
        import onnx
        from onnx import TensorProto, helper, numpy_helper

        returned = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs or (self.last,)]
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, self.shape)],
            returned,
            [numpy_helper.from_array(array, name) for name, array in self.arrays.items()],
        )
        opset = helper.make_opsetid("", self.opset)
        model = onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=[opset], ir_version=8))
        del model.graph.value_info[:]
        onnx.checker.check_model(model, full_check=True)
        return model

    def graph(self, *outputs):
        return Graph(self.model(*outputs), "0" * 64)


def draw_cnn(*, opset=21, seed=0):
    """What the quantizer has to cope with: max pooling, depthwise convolution, ReLU6, a residual, averages, a Gemm."""
    net = Net(3, 16, 16, opset=opset, seed=seed)
    net.conv(32, name="stem")
    net.op("Relu")
    skip = net.pool()
    net.conv(32, group=32, name="depthwise")
    net.relu6()
    branch = net.conv(32, kernel=1, name="pointwise")
    net.op("Add", branch, skip, name="residual")
    net.op("Relu")
    net.conv(64, name="wide")
    net.op("Relu")
    net.op("GlobalAveragePool")
    net.op("Flatten")
    net.gemm(64, 10)
    return net


@pytest.fixture(scope="session")
def net():
    """The class Net."""
    return Net


@pytest.fixture(scope="session")
def cnn():
    """A function that draws the larger CNN: cnn(opset=..., seed=...)."""
    return draw_cnn


@pytest.fixture(scope="session")
def graph(cnn):
    """The larger CNN as it comes; a module that needs another one has its own."""
    return cnn().graph()


@pytest.fixture(scope="session")
def samples_of():
    """A function that draws samples for a graph: standard normal, from a seed."""

    def draw(graph, n=32, *, seed=1):
        rng = np.random.default_rng(seed)
        feeds = {spec.name: rng.normal(size=(n, *spec.at_batch(1)[1:])).astype(np.float32) for spec in graph.inputs}
        return Samples(feeds, None, "random/train")

    return draw


@pytest.fixture(scope="session")
def run():
    """A function that runs a graph in ONNX Runtime: run(graph, samples, optimize=True) -> the first output."""
    import onnxruntime as ort

    def infer(graph, samples, *, optimize=True):
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if not optimize:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = ort.InferenceSession(graph.data, options, providers=["CPUExecutionProvider"])
        return session.run(None, samples.feeds)[0]

    return infer


@pytest.fixture(scope="session")
def graph_of(net):
    """A function: what draws a net for 3 x 8 x 8, and names its outputs or not -> the net's graph."""

    def draw(what):
        made = net(3, 8, 8)
        return made.graph(*(what(made) or ()))

    return draw


@pytest.fixture(scope="session")
def tensor_of():
    """A function: a graph, the name of a tensor in it, samples -> the tensor's values."""

    def read(graph, name, samples):
        ((_, values),) = watch_all(graph.model, samples.batches(len(samples)), [name])
        return values

    return read


@pytest.fixture(scope="session")
def assert_same_outputs(run):
    """A function that asserts that two graphs compute the same on samples, up to rounding."""

    def check(graph, other, samples):
        expected, got = (run(each, samples, optimize=False) for each in (graph, other))
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())

    return check


@pytest.fixture(scope="session")
def equalized():
    """A function: a graph, samples, a recipe -> the graph as that recipe equalizes it."""

    def make(graph, samples, recipe=INT8):
        return equalize(graph, place(graph, recipe), samples.batches(8))

    return make


@pytest.fixture(scope="session")
def gain_of_equalizing(samples_of, run):
    """A function: a graph, a target -> how much closer to float its INT8 is with `equalize`, in dB."""

    def measure(graph, target):
        samples, held_out = samples_of(graph, 32), samples_of(graph, 32, seed=5)
        expected = run(graph, held_out)
        on, off = (
            sqnr_db(run(quantize(graph, Recipe("int8", target, equalize=each), samples).graph, held_out), expected)
            for each in (True, False)
        )
        return on - off

    return measure


@pytest.fixture(scope="session")
def build_engine():
    """A function that builds a TensorRT-RTX engine for SM89, without a GPU, and returns its size in bytes."""
    trt = pytest.importorskip("tensorrt_rtx")

    class Log(trt.ILogger):
        def __init__(self):
            trt.ILogger.__init__(self)
            self.errors = []

        def log(self, severity, message):
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

    def build(graph, largest=4):
        log = Log()
        builder = trt.Builder(log)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        assert trt.OnnxParser(network, log).parse(graph.data), log.errors
        config = builder.create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.SM89, 0)
        profile = builder.create_optimization_profile()
        for spec in graph.inputs:
            profile.set_shape(spec.name, spec.at_batch(1), spec.at_batch(largest), spec.at_batch(largest))
        config.add_optimization_profile(profile)
        engine = builder.build_serialized_network(network, config)
        assert engine is not None, log.errors
        return engine.nbytes

    return build


@pytest.fixture(scope="session")
def samples(graph, samples_of):
    """Samples of `graph`; a module that has its own graph, or needs others, has its own."""
    return samples_of(graph)


@pytest.fixture(scope="session")
def tracing(tmp_path_factory):
    """Function from a list of `traced.Run` to the bytes that ONNX Runtime allocates at the peak of each."""
    library = tracer(tmp_path_factory.mktemp("tracing"))
    if library is None:
        pytest.skip("gcc is not installed, so what traces allocations cannot be compiled")
    return partial(peaks, library)
