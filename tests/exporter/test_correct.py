from dataclasses import replace

import numpy as np
import pytest

from memopt.accuracy import sqnr_db
from memopt_export.affine import bias_scale
from memopt_export.calibrate import batches_for, calibrate
from memopt_export.correct import choose_weights
from memopt_export.graph import wire
from memopt_export.means import Means
from memopt_export.placement import place
from memopt_export.qdq import input_affine, insert, nearest
from memopt_export.quantize import quantize
from memopt_export.recipe import Recipe

onnx = pytest.importorskip("onnx")

TARGETS = ("cpu", "tensorrt")


class Chosen:
    """What the recipe makes of a graph on samples, and all that led there."""

    def __init__(self, graph, recipe, samples, means=None):
        self.means = means or Means()
        self.graph, self.wiring = graph, wire(graph.model)
        self.placement = place(graph, recipe)
        self.ranges = calibrate(graph, self.placement.tensors, samples, self.means)
        batches = batches_for(graph, samples, self.means)
        self.stored = choose_weights(graph, self.placement, self.ranges, batches, recipe, self.means)

    @property
    def quantized(self):
        return insert(self.graph, self.placement, self.ranges, self.stored)

    def nearest(self, **options):
        return {
            layer.index: nearest(layer, self.wiring, self.placement, self.ranges, **options)
            for layer in self.placement.layers
        }


@pytest.fixture(scope="module", params=TARGETS)
def target(request):
    return request.param


@pytest.fixture(scope="module")
def samples(graph, samples_of):
    return samples_of(graph, 40)


@pytest.fixture(scope="module")
def held_out(graph, samples_of):
    return samples_of(graph, 64, seed=99)


@pytest.fixture(scope="module")
def chosen(graph, samples, target):
    """By each correction."""
    return {name: Chosen(graph, Recipe("int8", target, correction=name), samples) for name in ("none", "bias", "gptq")}


# --- what each promises against the simpler one


def test_none_is_rounding_to_nearest(chosen):
    plain = chosen["none"]
    for index, stored in plain.nearest().items():
        np.testing.assert_array_equal(plain.stored[index].integers, stored.integers)
        np.testing.assert_array_equal(plain.stored[index].bias, stored.bias)


def test_bias_leaves_weights_alone_and_moves_biases(chosen):
    for index, stored in chosen["none"].stored.items():
        other = chosen["bias"].stored[index]
        np.testing.assert_array_equal(other.integers, stored.integers)
        assert not np.array_equal(other.bias, stored.bias)


def test_gptq_moves_weights_by_few_steps_of_the_same_size(chosen):
    """But for the first layer: the samples are noise, whose values have nothing in common."""
    for index, stored in chosen["none"].stored.items():
        other = chosen["gptq"].stored[index]
        np.testing.assert_array_equal(other.affine.scale, stored.affine.scale)
        moved = np.abs(other.integers.astype(int) - stored.integers)
        assert (moved.max() > 0) == (index > 0)
        assert moved.max() < 30
        assert (moved <= 2).mean() > 0.95


@pytest.mark.parametrize("correction", ["bias", "gptq"])
def test_corrections_are_closer_to_float_on_samples_that_none_has_seen(chosen, graph, held_out, run, correction):
    expected = run(graph, held_out)
    close = {name: sqnr_db(run(each.quantized, held_out), expected) for name, each in chosen.items()}
    assert close[correction] > close["none"] + 1


@pytest.fixture(scope="module")
def clipped(net):
    """Two layers, the first behind a ReLU6 that cuts half of its values, and its activation as the graph's output."""
    drawn = net(8, 8, 8)
    drawn.conv(32, name="first")
    drawn.arrays["first.w"] *= 3
    drawn.arrays["first.b"] = np.linspace(-4, 8, 32, dtype=np.float32)
    drawn.relu6()
    shown = drawn.last
    drawn.conv(16, name="second")
    return drawn.graph(shown, drawn.last)


def mean_error(each, held_out, run):
    """The mean error of each channel behind the ReLU6, in all."""
    error = run(each.quantized, held_out) - run(each.graph, held_out)
    return np.square(error.mean(axis=(0, 2, 3), dtype=np.float64)).sum()


def test_bias_brings_the_mean_behind_a_relu6_closer(clipped, samples_of, run, target):
    samples, held_out = samples_of(clipped, 32), samples_of(clipped, 32, seed=5)
    errors = {}
    for correction in ("none", "bias"):
        recipe = Recipe("int8", target, correction=correction, weight_bits=7)
        errors[correction] = mean_error(Chosen(clipped, recipe, samples), held_out, run)
    assert errors["bias"] < errors["none"] / 2


def test_a_mean_is_not_matched_where_a_relu6_discards_the_values(net, samples_of):
    """Channel 0 lies far above 6 throughout: no error of it is seen, and its bias stays."""
    drawn = net(8, 8, 8)
    drawn.conv(4, name="first")
    drawn.arrays["first.b"][:] = [60, 1, 1, -60]
    drawn.relu6()
    drawn.conv(8, name="second")
    graph = drawn.graph()
    bias = Chosen(graph, Recipe("int8", "tensorrt", correction="bias"), samples_of(graph)).stored[0].bias
    before = np.float32([60, 1, 1, -60])
    assert bias[[0, 3]].tolist() == [60, -60]
    assert (bias[1:3] != before[1:3]).all()


# --- layers of every kind


def conv_without_bias(drawn):
    drawn.conv(8, bias=False)
    drawn.op("Relu")
    drawn.conv(8, bias=False)


def matmul(drawn):
    drawn.op("Flatten")
    drawn.op("MatMul", drawn.last, drawn.weight("w1", 192, 32))
    drawn.op("Relu")
    drawn.op("MatMul", drawn.last, drawn.weight("w2", 32, 8))


def gemm_without_bias(drawn):
    drawn.op("Flatten")
    drawn.op("Gemm", drawn.last, drawn.weight("w", 192, 16))
    drawn.op("Relu")
    drawn.gemm(16, 8)


def groups(drawn):
    drawn.conv(8)
    drawn.op("Relu")
    drawn.conv(8, group=4)
    drawn.op("Relu")
    drawn.conv(8, group=8, bias=False)


def rows_of_three_axes(drawn):
    drawn.op("Reshape", drawn.last, drawn.constant("shape", np.asarray([0, 12, 16])))
    drawn.op("MatMul", drawn.last, drawn.weight("w1", 16, 32))
    drawn.op("Relu")
    drawn.op("MatMul", drawn.last, drawn.weight("w2", 32, 8))


def samples_behind_other_axes(drawn):
    """What the layer reads does not divide into the samples of a batch."""
    drawn.op("Reshape", drawn.last, drawn.constant("shape", np.asarray([-1, 12, 16])))
    drawn.op("Transpose", drawn.last, perm=[1, 0, 2])
    drawn.op("MatMul", drawn.last, drawn.weight("w1", 16, 32))
    drawn.op("Relu")
    drawn.op("MatMul", drawn.last, drawn.weight("w2", 32, 8))


KINDS = [conv_without_bias, matmul, gemm_without_bias, groups, rows_of_three_axes, samples_behind_other_axes]


@pytest.mark.parametrize("correction", ["bias", "gptq"])
@pytest.mark.parametrize("draw", KINDS, ids=lambda draw: draw.__name__)
def test_layers_of_every_kind_get_no_worse_by_correction(net, draw, samples_of, run, target, correction):
    drawn = net(3, 8, 8)
    draw(drawn)
    graph = drawn.graph()
    samples, held_out = samples_of(graph, 200), samples_of(graph, 100, seed=9)
    close = {}
    for name in ("none", correction):
        each = Chosen(graph, Recipe("int8", target, correction=name, weight_bits=7), samples, Means(batch_size=70))
        close[name] = sqnr_db(run(each.quantized, held_out), run(graph, held_out))
    assert close[correction] > close["none"] - 0.2


def test_a_layer_without_bias_gets_one_where_its_operator_has_room(net, samples_of, target):
    for draw, gets in ((conv_without_bias, True), (gemm_without_bias, True), (matmul, False)):
        drawn = net(3, 8, 8)
        draw(drawn)
        graph = drawn.graph()
        stored = Chosen(graph, Recipe("int8", target), samples_of(graph)).stored
        first = stored[min(stored)]
        assert (first.bias is not None) is gets
        if gets:
            assert first.bias.shape == (graph.model.graph.initializer[0].dims[0 if draw is conv_without_bias else 1],)


@pytest.mark.parametrize("n", [8, 32, 600])
def test_gptq_does_not_make_up_for_what_few_samples_show_by_chance(net, samples_of, run, target, n):
    """Inputs that have nothing in common: nearest is the best there is."""
    drawn = net(192)
    drawn.gemm(192, 64)
    graph = drawn.graph()
    held_out = samples_of(graph, 200, seed=9)
    close = {}
    for name in ("bias", "gptq"):
        each = Chosen(graph, Recipe("int8", target, correction=name, weight_bits=7), samples_of(graph, n))
        close[name] = sqnr_db(run(each.quantized, held_out), run(graph, held_out))
    assert close["gptq"] > close["bias"] - 0.1


def test_gptq_gains_where_inputs_do_go_together(net, samples_of, run, target):
    """Each of 8 numbers reaches 192 inputs, as features of a network do."""
    drawn = net(8)
    drawn.op("MatMul", "x", drawn.weight("spread", 8, 192), name="spread")
    drawn.op("Relu")
    drawn.gemm(192, 64)
    graph = drawn.graph()
    held_out = samples_of(graph, 200, seed=9)
    close = {}
    for name in ("bias", "gptq"):
        recipe = Recipe("int8", target, correction=name, weight_bits=7, exclude=("spread",))
        each = Chosen(graph, recipe, samples_of(graph, 64))
        close[name] = sqnr_db(run(each.quantized, held_out), run(graph, held_out))
    assert close["gptq"] > close["bias"] + 0.5


# --- integers


@pytest.mark.parametrize("correction", ["none", "gptq"])
@pytest.mark.parametrize(("bits", "largest"), [(8, 127), (7, 63)])
def test_integers_stay_within_their_bits_and_use_them(graph, samples, target, correction, bits, largest):
    recipe = Recipe("int8", target, correction=correction, weight_bits=bits)
    for stored in Chosen(graph, recipe, samples).stored.values():
        assert np.abs(stored.integers.astype(int)).max() == largest


def test_the_quantized_file_holds_7_bits_where_they_were_asked_for(graph, samples):
    made = quantize(graph, Recipe("int8", weight_bits=7), samples).graph
    weights = [
        onnx.numpy_helper.to_array(tensor)
        for tensor in made.model.graph.initializer
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) > 1
    ]
    assert len(weights) == 5
    assert {int(np.abs(weight.astype(int)).max()) for weight in weights} == {63}


@pytest.mark.parametrize("correction", ["none", "bias", "gptq"])
def test_a_bias_that_outweighs_its_channel_has_room_in_int32(net, samples_of, run, correction):
    drawn = net(3, 8, 8)
    drawn.conv(8, name="conv")
    drawn.arrays["conv.w"][2] *= np.float32(1e-9)
    drawn.arrays["conv.b"][2] = 3
    graph = drawn.graph()
    samples = samples_of(graph)
    each = Chosen(graph, Recipe("int8", correction=correction), samples)
    (layer,) = each.placement.layers
    stored = each.stored[layer.index]
    scale = bias_scale(input_affine(layer, each.wiring, each.placement, each.ranges), stored.affine)
    assert (np.abs(stored.bias / scale) <= 2**30 * 1.001).all()
    np.testing.assert_allclose(run(each.quantized, samples)[:, 2], 3, atol=0.05)


# --- how it is done


def test_progress_counts_layers(graph, samples):
    seen = []
    Chosen(graph, Recipe("int8"), samples, Means(on_step=seen.append))
    assert [(step.done, step.total) for step in seen if step.what == "correct"] == [(n, 5) for n in range(1, 6)]


def test_a_layer_with_more_inputs_than_are_rounded_together_is_rounded_in_parts(net, samples_of, run, monkeypatch):
    drawn = net(96)
    drawn.gemm(96, 32)
    graph = drawn.graph()
    samples, held_out = samples_of(graph, 256), samples_of(graph, 64, seed=3)
    recipe = Recipe("int8", "tensorrt", weight_bits=7)
    expected = run(graph, held_out)
    whole = Chosen(graph, recipe, samples)
    monkeypatch.setattr("memopt_export.correct._MOST_INPUTS", 40)
    parts = Chosen(graph, recipe, samples)
    plain = Chosen(graph, replace(recipe, correction="none"), samples)
    assert not np.array_equal(parts.stored[0].integers, whole.stored[0].integers)
    assert sqnr_db(run(parts.quantized, held_out), expected) > sqnr_db(run(plain.quantized, held_out), expected) - 0.2


def test_inputs_that_do_not_divide_are_rounded_to_nearest_and_still_get_their_bias(net, samples_of, monkeypatch):
    drawn = net(97)
    drawn.gemm(97, 32)
    graph = drawn.graph()
    monkeypatch.setattr("memopt_export.correct._MOST_INPUTS", 40)
    found, plain = (Chosen(graph, Recipe("int8", correction=name), samples_of(graph)) for name in ("gptq", "none"))
    np.testing.assert_array_equal(found.stored[0].integers, plain.stored[0].integers)
    assert not np.array_equal(found.stored[0].bias, plain.stored[0].bias)


def test_fewer_rows_than_samples_are_enough(net, samples_of, run, monkeypatch):
    drawn = net(8)
    drawn.gemm(8, 8)
    graph = drawn.graph()
    monkeypatch.setattr("memopt_export.correct._COMPARED_BYTES", 64)
    samples = samples_of(graph, 32)
    assert sqnr_db(run(Chosen(graph, Recipe("int8"), samples).quantized, samples), run(graph, samples)) > 30


@pytest.mark.parametrize("n", [1, 2])
def test_one_sample_is_enough_not_to_do_harm(graph, samples_of, held_out, run, target, n):
    close = {}
    for name in ("none", "gptq"):
        each = Chosen(graph, Recipe("int8", target, correction=name), samples_of(graph, n))
        close[name] = sqnr_db(run(each.quantized, held_out), run(graph, held_out))
    assert close["gptq"] > close["none"] - 1
