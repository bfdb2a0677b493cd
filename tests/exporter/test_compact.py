import numpy as np
import pytest

from memopt.compare import subjects
from memopt_export.compact import compact
from memopt_export.graph import Graph, load_graph, save_graph
from memopt_export.outline import outline
from memopt_export.plan import plan
from memopt_export.recipe import parse
from memopt_export.simplify import simplify

onnx = pytest.importorskip("onnx")


@pytest.fixture(scope="module")
def blocks(net):
    """Three separable blocks of different widths, two of them in a row, and what torch writes behind them."""
    drawn = net(3, 8, 8)
    drawn.conv(4, name="stem")
    drawn.op("Relu")
    for index, width in enumerate((6, 8, 10)):
        drawn.conv(drawn.channels[drawn.last], group=drawn.channels[drawn.last], name=f"depthwise{index}")
        drawn.op("Relu")
        drawn.conv(width, kernel=1, name=f"pointwise{index}")
        drawn.op("Relu")
    drawn.op("ReduceMean", drawn.last, drawn.constant("axes", np.int64([-1, -2])), name="mean", keepdims=1)
    drawn.op("Reshape", drawn.last, drawn.constant("flat", np.int64([-1, 10])), name="reshape")
    drawn.gemm(10, 4)
    return drawn.graph()


@pytest.fixture(scope="module")
def small(blocks):
    return compact(blocks)


def operators(graph):
    return [node.op_type for node in graph.model.graph.node]


def test_outputs_are_equal(blocks, small, samples_of, run):
    samples = samples_of(blocks)
    for optimize in (True, False):
        expected, got = (run(graph, samples, optimize=optimize) for graph in (blocks, small))
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_it_is_smaller_than_what_is_simple_and_passes_the_checker(blocks, small):
    nodes = [
        sum(len(node.SerializeToString()) for node in graph.model.graph.node) for graph in (simplify(blocks), small)
    ]
    functions = sum(len(function.SerializeToString()) for function in small.model.functions)
    assert nodes[1] + functions < nodes[0] / 2
    assert len(small.data) < len(simplify(blocks).data) - 1000
    onnx.checker.check_model(small.model, full_check=True)


def test_blocks_that_differ_in_channels_only_are_written_once(small):
    (function,) = small.model.functions
    assert [node.op_type for node in function.node] == ["Conv", "Relu", "Conv", "Relu"]
    calls = [node for node in small.model.graph.node if node.op_type == function.name]
    assert [node.attribute[0].i for node in calls] == [4, 6, 8]


def test_names_of_ends_are_kept_and_others_are_short(blocks, small):
    assert [spec.name for spec in (*small.inputs, *small.outputs)] == [
        spec.name for spec in (*blocks.inputs, *blocks.outputs)
    ]
    assert small.inputs[0].shape[0] == "batch"
    assert max(len(tensor.name) for tensor in small.model.graph.initializer) == 1
    assert not any(node.name for node in small.model.graph.node)


def test_mean_and_reshape_need_no_shapes_any_more(small):
    assert operators(small)[-3:] == ["GlobalAveragePool", "Flatten", "Gemm"]
    assert not any(tensor.data_type == onnx.TensorProto.INT64 for tensor in small.model.graph.initializer)


@pytest.mark.parametrize(("axes", "keepdims", "kept"), [([1, 2], 1, True), ([2, 3], 0, True), ([2, 3], 1, False)])
def test_other_means_stay_as_they_are(net, axes, keepdims, kept, samples_of, run):
    drawn = net(3, 8, 8)
    drawn.conv(4)
    drawn.op("ReduceMean", drawn.last, drawn.constant("axes", np.int64(axes)), keepdims=keepdims)
    graph = drawn.graph()
    done = compact(graph)
    assert ("ReduceMean" in operators(done)) == kept
    samples = samples_of(graph)
    np.testing.assert_allclose(run(done, samples), run(graph, samples), rtol=1e-5, atol=1e-6)


def test_reshape_that_mixes_samples_stays(net):
    drawn = net(4, 8, 8)
    drawn.op("Reshape", drawn.last, drawn.constant("flat", np.int64([-1, 128])))
    assert operators(compact(drawn.graph())) == ["Reshape"]


def test_attributes_that_say_something_stay(net):
    drawn = net(3, 8, 8)
    drawn.conv(4, kernel=3, name="conv")
    drawn.nodes[-1].attribute.extend([
        onnx.helper.make_attribute("kernel_shape", [3, 3]), onnx.helper.make_attribute("strides", [2, 2]),
        onnx.helper.make_attribute("dilations", [1, 1]), onnx.helper.make_attribute("auto_pad", "NOTSET"),
    ])  # fmt: skip
    drawn.pool()
    conv, pool = compact(drawn.graph()).model.graph.node
    assert {each.name for each in conv.attribute} == {"strides", "pads"}
    assert {each.name for each in pool.attribute} == {"strides", "kernel_shape"}


def test_it_is_idempotent(small):
    assert compact(small).data == small.data


def test_other_commands_take_it(small, blocks, tmp_path, samples_of):
    save_graph(small, tmp_path / "small.onnx")
    loaded = load_graph(tmp_path / "small.onnx")
    assert loaded.precision == "fp32"
    assert plan(loaded).weights_bytes == plan(simplify(blocks)).weights_bytes - 16 - 16  # axes and shape
    assert [subject.name for subject in subjects([tmp_path / "small.onnx"])] == ["small.onnx"]
    from memopt_export.quantize import quantize

    done = quantize(loaded, parse("int8-weights"), samples_of(loaded))
    assert done.graph.precision == "int8-weights"


def test_a_graph_of_rounded_weights_says_so_without_a_card(net, tmp_path, samples_of):
    from memopt_export.quantize import quantize

    drawn = net(16, 8, 8)
    drawn.conv(64, name="conv")
    drawn.op("Relu")
    graph = drawn.graph()
    done = quantize(graph, parse("int8-weights"), samples_of(graph))
    save_graph(compact(done.graph), tmp_path / "small.onnx")
    assert load_graph(tmp_path / "small.onnx").precision == "int8-weights"


def test_subgraphs_keep_what_they_capture(net, samples_of, run):
    drawn = net(3, 8, 8)
    drawn.conv(4)
    drawn.choice()
    graph = drawn.graph()
    samples = samples_of(graph)
    np.testing.assert_allclose(run(compact(graph), samples), run(graph, samples), rtol=1e-5, atol=1e-5)


def test_what_comes_once_is_no_function(net):
    drawn = net(3, 8, 8)
    drawn.conv(4)
    drawn.op("Relu")
    model = simplify(Graph(drawn.model(), "0" * 64)).copy_model()
    before = model.SerializeToString()
    outline(model)
    assert model.SerializeToString() == before
