import numpy as np
import pytest

from memopt_export.equalize import equalize
from memopt_export.placement import place
from memopt_export.recipe import Recipe

onnx = pytest.importorskip("onnx")

UNEVEN = np.logspace(-2, 0, 8, dtype=np.float32)


def uneven(drawn, name):
    """Brings the output channels of a layer to ranges of 1 to 100."""
    weight = drawn.arrays[f"{name}.w"]
    drawn.arrays[f"{name}.w"] = weight * UNEVEN.reshape(-1, *[1] * (weight.ndim - 1))
    if f"{name}.b" in drawn.arrays:
        drawn.arrays[f"{name}.b"] = drawn.arrays[f"{name}.b"] * UNEVEN


def first(drawn, **options):
    """A layer of 8 channels, from 1 to 100."""
    written = drawn.conv(8, name="first", **options)
    uneven(drawn, "first")
    return written


# --- nets that gain


def relu(net):
    first(net)
    net.op("Relu", name="watched")
    net.conv(8, name="second")


def relu6(net):
    first(net)
    net.op("Clip", net.last, net.constant("low", np.float32(0)), net.constant("high", np.float32(6)), name="watched")
    net.conv(8, name="second")


def nothing_between(net):
    first(net)
    net.op("Identity", name="watched")
    net.conv(8, name="second")


def without_bias(net):
    first(net, bias=False)
    net.op("Relu", name="watched")
    net.conv(8, name="second", bias=False)


def leaky(net):
    first(net)
    net.op("LeakyRelu", alpha=0.2, name="watched")
    net.conv(8, name="second")


def max_pool(net):
    first(net)
    net.op("Relu")
    net.op("MaxPool", kernel_shape=[2, 2], strides=[2, 2], name="watched")
    net.conv(8, name="second")


def average_pool(net):
    first(net)
    net.op("AveragePool", kernel_shape=[2, 2], name="watched")
    net.conv(8, name="second")


def depthwise(net):
    first(net)
    net.op("Relu", name="watched")
    net.conv(8, group=8, name="second")
    net.op("Relu")
    net.conv(8, kernel=1, name="third")


def groups(net):
    first(net)
    net.op("Relu", name="watched")
    net.conv(12, group=4, name="second")


def residual(net):
    skip = first(net)
    net.op("Relu")
    skip = net.last
    net.conv(8, name="branch")
    uneven(net, "branch")
    net.op("Add", net.last, skip)
    net.op("Relu", name="watched")
    net.conv(8, name="second")


def flatten(net):
    """Each channel reaches the Gemm at 64 places."""
    first(net)
    net.op("Relu", name="watched")
    net.op("Flatten")
    net.gemm(512, 8)


def flatten_plain_gemm(net):
    """The same, with a weight that is not transposed."""
    first(net)
    net.op("Relu", name="watched")
    net.op("Flatten")
    net.op("Gemm", net.last, net.weight("w", 512, 8), name="fc")


def reduce_mean(net):
    first(net)
    net.op("Relu", name="watched")
    net.op("ReduceMean", net.last, net.constant("axes", np.asarray([2, 3])), keepdims=0)
    net.gemm(8, 4)


def reduce_mean_from_behind(net):
    first(net)
    net.op("Relu", name="watched")
    net.op("ReduceMean", net.last, net.constant("axes", np.asarray([-1, -2])), keepdims=1)
    net.conv(4, kernel=1)


def gemms(net):
    net.op("Flatten")
    net.gemm(192, 8, name="first")
    uneven(net, "first")
    net.op("Relu", name="watched")
    net.gemm(8, 4)


def two_readers(net):
    first(net)
    read = net.op("Relu", name="watched")
    net.conv(8, read=read, name="left")
    left = net.op("Sigmoid")
    net.conv(8, read=read, name="right")
    right = net.op("Tanh")
    net.op("Add", left, right)


def shared_weight(net):
    """Two layers with one weight: each gets its own."""
    first(net)
    net.op("Relu", name="watched")
    net.conv(8, name="second")
    net.op("Relu")
    net.op("Conv", net.last, "second.w", "second.b", pads=[1, 1, 1, 1], name="third")


TOUCHED = [
    relu, relu6, nothing_between, without_bias, leaky, max_pool, average_pool, depthwise, groups, residual, flatten,
    flatten_plain_gemm, reduce_mean, reduce_mean_from_behind, gemms, two_readers, shared_weight,
]  # fmt: skip


# --- nets that must not be touched


def clip_around_zero(net):
    first(net)
    net.op("Clip", net.last, net.constant("low", np.float32(-1)), net.constant("high", np.float32(1)))
    net.conv(8)


def sigmoid(net):
    first(net)
    net.op("Sigmoid")
    net.conv(8)


def an_output(net):
    shown = first(net)
    net.op("Relu")
    net.conv(8)
    return shown, net.last


def an_output_behind(net):
    first(net)
    shown = net.op("Relu")
    net.conv(8)
    return shown, net.last


def concatenated(net):
    left, right = first(net), net.conv(8, read="x")
    net.op("Concat", left, right, axis=1)
    net.channels[net.last] = 16
    net.conv(8)


def constant_added(net):
    first(net)
    net.op("Add", net.last, net.constant("shift", np.ones((1, 8, 1, 1), np.float32)))
    net.conv(8)


def broadcast_added(net):
    """One channel is added to all eight."""
    left = first(net)
    right = net.conv(1, read="x")
    net.op("Add", left, right)
    net.channels[net.last] = 8
    net.conv(8)


def broadcast_over_places(net):
    """Means over the whole are added at every place: the channels are the same, and scale alike."""
    left = first(net)
    net.op("GlobalAveragePool", left)
    gate = net.op("Sigmoid")
    net.op("Mul", left, gate)
    net.conv(8)


def multiplied(net):
    left = first(net)
    right = net.conv(8, read="x")
    net.op("Mul", left, right)
    net.conv(8)


def added_to_the_input(net):
    net.op("Add", net.conv(3, name="stem"), "x")
    net.channels[net.last] = 3
    net.conv(8)


def mean_over_channels(net):
    first(net)
    net.op("ReduceMean", net.last, net.constant("axes", np.asarray([1])), keepdims=1)
    net.channels[net.last] = 1
    net.conv(8)


def transposed(net):
    first(net)
    net.op("Transpose", perm=[0, 2, 1, 3])
    net.conv(8)


def flattened_elsewhere(net):
    first(net)
    net.op("Flatten", axis=2)
    net.op("MatMul", net.last, net.weight("w", 64, 4))


def gemm_with_a_factor(net):
    first(net)
    net.op("Relu")
    net.op("Flatten")
    net.op("Gemm", net.last, net.weight("w", 512, 8), alpha=0.5)


def read_by_something_else_too(net):
    first(net)
    read = net.op("Relu")
    convolved = net.conv(8)
    net.op("Exp", read)
    net.op("Add", net.last, convolved)


def read_by_a_subgraph(net):
    from onnx import TensorProto, helper

    first(net)
    read = net.op("Relu")
    convolved = net.conv(8)
    branches = {}
    for branch in ("then_branch", "else_branch"):
        add = helper.make_node("Identity", [read], [f"{branch}.out"])
        value = helper.make_tensor_value_info(f"{branch}.out", TensorProto.FLOAT, None)
        branches[branch] = helper.make_graph([add], branch, [], [value])
    chosen = net.op("If", net.constant("yes", np.asarray(True)), **branches)
    net.op("Add", chosen, convolved)


LEFT_ALONE = [
    clip_around_zero, sigmoid, an_output, an_output_behind, concatenated, constant_added, broadcast_added,
    broadcast_over_places, multiplied, added_to_the_input, mean_over_channels, transposed, flattened_elsewhere,
    gemm_with_a_factor, read_by_something_else_too, read_by_a_subgraph,
]  # fmt: skip


@pytest.fixture(scope="module", params=TOUCHED)
def pair(request, graph_of, equalized, samples_of):
    """A graph, and the equalized one."""
    graph = graph_of(request.param)
    return graph, equalized(graph, samples_of(graph, 16))


def test_outputs_are_those_it_had(pair, samples_of, assert_same_outputs):
    assert_same_outputs(*pair, samples_of(pair[0], seed=5))


def largest(values):
    """The largest magnitude of each channel."""
    return np.abs(values).max(axis=(0, *range(2, values.ndim)))


def test_channels_come_closer(pair, samples_of, tensor_of):
    graph, other = pair
    samples = samples_of(graph, 16)
    before, after = (largest(tensor_of(each, "watched.out", samples)) for each in pair)
    assert (after >= before * 0.999).all()
    assert after.max() <= before.max() * 1.001
    assert after.max() / after.min() < before.max() / before.min() / 2
    assert other.inputs == graph.inputs
    assert other.outputs == graph.outputs


def test_the_graph_given_is_left_as_it_is(pair):
    graph, other = pair
    assert other.data != graph.data
    onnx.checker.check_model(other.model, full_check=True)


def test_weights_keep_their_names_where_nobody_else_reads_them(pair):
    graph, other = pair
    reads = [name for node in graph.model.graph.node for name in node.input]
    own = {tensor.name for tensor in graph.model.graph.initializer if reads.count(tensor.name) == 1}
    assert own <= {tensor.name for tensor in other.model.graph.initializer}
    assert [node.op_type for node in other.model.graph.node] == [node.op_type for node in graph.model.graph.node]


@pytest.mark.parametrize("draw", LEFT_ALONE)
def test_what_does_not_commute_with_scaling_is_left_byte_for_byte(graph_of, draw, equalized, samples_of):
    graph = graph_of(draw)
    assert equalized(graph, samples_of(graph, 16)).data == graph.data


def test_even_channels_are_left_alone(net, equalized, samples_of):
    made = net(3, 8, 8)
    made.conv(8, name="first")
    made.arrays["first.w"] = np.repeat(made.arrays["first.w"][:1], 8, axis=0)
    made.arrays["first.b"][:] = 0.1
    made.op("Relu")
    made.conv(8)
    graph = made.graph()
    assert equalized(graph, samples_of(graph)).data == graph.data


def test_a_dead_channel_is_scaled_to_finite_numbers(net, equalized, samples_of, run):
    made = net(3, 8, 8)
    first(made)
    made.arrays["first.w"][3] = 0
    made.arrays["first.b"][3] = 0
    made.op("Relu")
    made.conv(8)
    graph = made.graph()
    samples = samples_of(graph)
    other = equalized(graph, samples)
    assert all(np.isfinite(onnx.numpy_helper.to_array(t)).all() for t in other.model.graph.initializer)
    np.testing.assert_allclose(run(other, samples), run(graph, samples), atol=1e-4)


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
def test_quantized_it_is_closer_to_float_where_channels_were_uneven(net, gain_of_equalizing, target):
    """Every channel counts the same behind the second layer, whose weights make up for what the first one's lack."""
    made = net(3, 8, 8)
    relu(made)
    made.arrays["second.w"] = made.arrays["second.w"] / UNEVEN[None, :, None, None]
    assert gain_of_equalizing(made.graph(), target) > 1


def test_cuts_change_nothing(cnn, samples_of):
    graph = cnn().graph()
    samples, placement = samples_of(graph), place(graph, Recipe("int8"))
    whole = equalize(graph, placement, samples.batches(32))
    assert equalize(graph, placement, samples.batches(32), cuts=(3, 5, 9)).data == whole.data
