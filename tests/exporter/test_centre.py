"""Channels in the middle of their ranges, as `equalize` puts them there."""

import numpy as np
import pytest

from memopt_export.recipe import Recipe

onnx = pytest.importorskip("onnx")

OFFSETS = np.linspace(-20, 40, 8, dtype=np.float32)


def first(net, name="first", **options):
    """A layer of 8 channels, each far from zero."""
    written = net.conv(8, name=name, **options)
    net.arrays[f"{name}.b"] = net.arrays[f"{name}.b"] + OFFSETS
    return written


# --- nets with a tensor "watched" whose channels can be moved one by one


def linear(net):
    first(net)
    net.op("Identity", name="watched")
    net.conv(4, kernel=1)


def sums(net):
    """Two sums, one on top of the other, as linear bottlenecks have them."""
    net.op("Add", first(net), first(net, "second", read="x"))
    stream = net.last
    branch = net.op("Relu", net.conv(8, kernel=1, read=stream))
    net.op("Add", stream, first(net, "third", read=branch), name="watched")
    net.conv(4, kernel=1)


def twice(net):
    written = first(net)
    net.op("Add", written, written, name="watched")
    net.conv(4, kernel=1)


def global_mean(net):
    first(net)
    net.op("GlobalAveragePool", name="watched")
    net.conv(4, kernel=1)


def largest_at_the_edge(net):
    first(net)
    net.op("MaxPool", kernel_shape=[3, 3], pads=[1, 1, 1, 1], name="watched")
    net.conv(4, kernel=1)


def mean_that_leaves_padding_out(net):
    first(net)
    net.op("AveragePool", kernel_shape=[3, 3], pads=[1, 1, 1, 1], name="watched")
    net.conv(4, kernel=1)


def flatten(net):
    first(net)
    net.op("Flatten", name="watched")
    net.gemm(512, 4)


def groups(net):
    first(net)
    net.op("Identity", name="watched")
    net.conv(8, kernel=1, group=4)


def reader_without_bias(net):
    first(net)
    net.op("Identity", name="watched")
    net.conv(4, kernel=1, bias=False)


def reader_with_a_bias_called_nothing(net):
    first(net)
    net.op("Identity", name="watched")
    net.op("Conv", net.last, net.weight("w", 4, 8, 1, 1), "")


def two_readers(net):
    first(net)
    read = net.op("Identity", name="watched")
    left = net.conv(4, kernel=1, read=read)
    net.op("Add", left, net.conv(4, kernel=1, read=read, bias=False))


MOVED = [
    linear, sums, twice, global_mean, largest_at_the_edge, mean_that_leaves_padding_out, flatten, groups,
    reader_without_bias, reader_with_a_bias_called_nothing, two_readers,
]  # fmt: skip


# --- nets whose watched tensor is behind a function


def relu(net):
    net.conv(8)
    net.op("Relu", name="watched")
    net.conv(4, kernel=1)


def relu6(net):
    first(net)
    net.op("Clip", net.last, net.constant("low", np.float32(0)), net.constant("high", np.float32(6)), name="watched")
    net.conv(4, kernel=1)


def open_clip(net):
    net.conv(8, bias=False)
    net.op("Clip", net.last, net.constant("low", np.float32(0)), name="watched")
    net.conv(4, kernel=1)


def relu_and_mean(net):
    net.conv(8)
    net.op("Relu")
    net.op("GlobalAveragePool", name="watched")
    net.op("Flatten")
    net.gemm(8, 4)


CLIPPED = [relu, relu6, open_clip]


# --- nets that stay


def padded_reader(net):
    first(net)
    net.conv(4)


def padded_reader_too(net):
    read = first(net)
    net.op("Add", net.conv(4, read=read), net.conv(4, kernel=1, read=read))


def padding_counted(net):
    first(net)
    net.op("AveragePool", kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1)
    net.conv(4, kernel=1)


def nonlinear(net):
    first(net)
    net.op("Sigmoid")
    net.conv(4, kernel=1)


def shown(net):
    out = first(net)
    net.conv(4, kernel=1)
    return out, net.last


STAYING = [padded_reader, padded_reader_too, padding_counted, nonlinear, shown]


TENSORRT = Recipe("int8", "tensorrt")
FORMS = pytest.mark.parametrize("recipe", [Recipe("int8"), TENSORRT], ids=lambda recipe: recipe.target)


@pytest.fixture(scope="module")
def channels(tensor_of):
    """A function: a graph, samples -> the lowest and the highest value of each channel of its watched tensor."""

    def read(graph, samples):
        values = tensor_of(graph, "watched.out", samples)
        values = values.reshape(len(values), 8, -1)
        return values.min(axis=(0, 2)), values.max(axis=(0, 2))

    return read


@FORMS
@pytest.mark.parametrize("draw", [*MOVED, *CLIPPED, relu_and_mean])
def test_outputs_are_those_it_had(graph_of, draw, recipe, equalized, samples_of, assert_same_outputs):
    graph = graph_of(draw)
    samples = samples_of(graph, 16)
    other = equalized(graph, samples, recipe)
    assert_same_outputs(graph, other, samples)
    onnx.checker.check_model(other.model, full_check=True)


@pytest.mark.parametrize("draw", MOVED)
def test_channels_come_to_the_middle(graph_of, draw, equalized, samples_of, channels):
    graph = graph_of(draw)
    samples = samples_of(graph, 16)
    low, high = channels(equalized(graph, samples), samples)
    assert np.abs(low + high).max() < 0.5 * (high - low).max()  # a mean shares its middle with what it is a mean of
    before = channels(graph, samples)
    assert high.max() - low.min() < 0.9 * (before[1].max() - before[0].min())


@pytest.mark.parametrize("draw", CLIPPED)
def test_what_a_function_cuts_off_below_uses_all_symmetric_integers(graph_of, draw, equalized, samples_of, channels):
    graph = graph_of(draw)
    samples = samples_of(graph, 16)
    low, high = channels(equalized(graph, samples, TENSORRT), samples)
    assert low.min() < 0 < high.max()
    assert low.min() == pytest.approx(-high.max(), rel=1e-5)
    assert channels(equalized(graph, samples), samples)[0].min() == 0  # unsigned ones do already


@FORMS
@pytest.mark.parametrize("draw", STAYING)
def test_what_cannot_be_moved_stays(graph_of, draw, recipe, equalized, samples_of):
    graph = graph_of(draw)
    bias = [onnx.numpy_helper.to_array(t) for t in graph.model.graph.initializer if t.name == "first.b"]
    other = equalized(graph, samples_of(graph, 16), recipe)
    scaled = [onnx.numpy_helper.to_array(t) for t in other.model.graph.initializer if t.name == "first.b"]
    assert (np.abs(scaled[0]) >= np.abs(bias[0])).all()
    assert (np.sign(scaled[0]) == np.sign(bias[0])).all()


@pytest.mark.parametrize("draw", [linear, relu6])
def test_floats_of_8_bits_stay_around_zero(graph_of, draw, equalized, samples_of, channels):
    graph = graph_of(draw)
    samples = samples_of(graph, 16)
    before, after = (channels(each, samples) for each in (graph, equalized(graph, samples, Recipe("fp8", "tensorrt"))))
    assert (np.sign(after) == np.sign(before)).all()


@pytest.mark.parametrize(
    ("draw", "target"), [(linear, "cpu"), (linear, "tensorrt"), (sums, "cpu"), (relu6, "tensorrt")]
)
def test_quantized_it_is_closer_to_float(graph_of, draw, target, gain_of_equalizing):
    assert gain_of_equalizing(graph_of(draw), target) > 1
