from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memopt.errors import InputRefused
from memopt_export import grids
from memopt_export.from_torch import export
from memopt_export.graph import run_graph
from memopt_models.checkpoint import Checkpoint, snapshot
from memopt_models.data import open_data
from memopt_models.networks import build
from memopt_models.qat import deployed
from memopt_models.ste import gridded

onnx = pytest.importorskip("onnx")
torch = pytest.importorskip("torch")

TINY = {"channels": [4, 6, 6]}


def rounded(network, settings, bits, **options):
    """A checkpoint as rounded training leaves it, after no step at all."""
    data = open_data("digits")
    torch.manual_seed(0)
    module = build(network, settings)
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    start = Checkpoint(
        network, settings, snapshot(module), (data.input_spec,), data.classes, data.preprocess, (), {}, 0
    )
    made = gridded(start, bits, **{"layers": {}, "steps": "layer", "biases": True, **options})
    steps = {f"quantization.{name}": step for name, step in made.steps().items()}
    return replace(start, state=made.state(start) | steps, quantization={"method": "ste", "bits": made.bits})


@pytest.fixture(scope="module")
def samples():
    return np.random.default_rng(0).normal(size=(8, 1, 28, 28)).astype(np.float32)


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize(
    ("network", "settings", "bits", "options"),
    [
        ("tiny_cnn", TINY, 4, {}),
        ("tiny_cnn", TINY, 4, {"layers": {"fc": 8, "stem.conv": 2, "block1.depthwise": 32}}),
        ("tiny_cnn", TINY, 4, {"steps": "network"}),
        ("simple_cnn", {"hidden": 16}, 2, {"steps": "channel", "biases": False}),
        ("simple_cnn", {"hidden": 16}, 8, {"steps": "channel"}),
    ],
)
def test_graph_computes_what_torch_does(network, settings, bits, options, compact, samples):
    exported = export(rounded(network, settings, bits, **options), samples, compact=compact)
    assert exported.parity.holds
    assert exported.parity.max_difference < 1e-5
    onnx.checker.check_model(exported.graph.model, full_check=True)


def test_integers_have_the_bits_that_were_asked_for(samples):
    graph = export(rounded("tiny_cnn", TINY, 4, layers={"stem.conv": 2}), samples).graph
    types = {tensor.name: tensor.data_type for tensor in graph.model.graph.initializer}
    assert types["stem.conv.weight.integers"] == onnx.TensorProto.INT2
    assert types["block1.pointwise.conv.weight.integers"] == onnx.TensorProto.INT4
    assert types["stem.norm.bias.integers"] == onnx.TensorProto.INT8
    assert graph.precision == "int2-weights"
    stored = graph.weights_bytes()
    assert stored["int2"] == 4 * 9 / 4
    assert stored["int4"] == (4 * 9 + 4 * 6 + 6 * 9 + 6 * 6 + 6 * 10) / 2


def test_one_step_for_the_network_is_stored_once(samples):
    apart, one = (export(rounded("tiny_cnn", TINY, 4, steps=steps), samples).graph for steps in ("layer", "network"))
    steps = [[t.name for t in g.model.graph.initializer if t.name.endswith(".step")] for g in (apart, one)]
    assert [len(names) for names in steps] == [7, 2]  # one is that of the biases


def test_zeros_and_equal_tensors_are_stored_too(samples):
    checkpoint = rounded("simple_cnn", {"hidden": 16}, 4)
    state = dict(checkpoint.state)
    state["conv1.bias"] = torch.zeros_like(state["conv1.bias"])
    state["fc1.bias"] = torch.zeros_like(state["fc1.bias"])
    exported = export(replace(checkpoint, state=state), samples)
    assert exported.parity.holds


def test_smaller_by_the_bits(samples):
    float_bytes = 4 * rounded("simple_cnn", {}, 4).parameters
    graph = export(rounded("simple_cnn", {}, 4), samples, compact=True).graph
    assert len(graph.data) < float_bytes / 7.8
    expected = export(rounded("simple_cnn", {}, 4), samples).graph
    got, wanted = (run_graph(each, {"input": samples})[0] for each in (graph, expected))
    np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_weights_that_are_not_in_the_graph_are_refused(samples):
    checkpoint = rounded("simple_cnn", {"hidden": 16}, 4)
    other = rounded("simple_cnn", {"hidden": 8}, 4)
    graph = export(replace(other, quantization={}, state=snapshot(deployed(other))), samples).graph
    with pytest.raises(InputRefused, match=r"the graph does not have '.*' as it was trained"):
        grids.store_integers(graph, checkpoint, deployed(checkpoint))


@given(st.lists(st.integers(-2, 1), min_size=1, max_size=20))
def test_two_bits_are_packed_as_onnx_reads_them(values):
    from onnx import TensorProto, numpy_helper

    packed = grids._pack(np.int8(values).view(np.uint8), 2)
    tensor = TensorProto(name="t", data_type=TensorProto.INT2, dims=[len(values)], raw_data=packed.tobytes())
    assert numpy_helper.to_array(tensor).astype(np.int8).tolist() == values
