import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memopt.errors import InputRefused
from memopt.tensors import TensorSpec
from memopt_export.calibrate import Ranges, calibrate, collect_ranges, merge
from memopt_export.graph import Graph
from memopt_export.means import Means, Step
from memopt_export.walk import share_scalars
from memopt_models.data import Samples

PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module")
def doubled(net):
    """(batch, 3) -> twice the input -> its Relu."""
    drawn = net(3)
    drawn.op("Mul", "x", drawn.constant("two", np.float32(2)), name="double")
    drawn.op("Relu", name="relu")
    return drawn.graph()


def collect(graph, batches, tensors=("x", "double.out", "relu.out"), **options):
    return collect_ranges(graph, tensors, batches, source="random/train", fingerprint="f" * 64, **options)


def rows(*values):
    return {"x": np.float32(values).reshape(-1, 3)}


def test_ranges_by_hand(doubled):
    ranges = collect(doubled, [rows(1, -2, 0), rows(0, 0.5, 3, -1, 1, 1)])
    assert ranges == Ranges(
        {"x": (-2.0, 3.0), "double.out": (-4.0, 6.0), "relu.out": (0.0, 6.0)}, 3, "random/train", "f" * 64
    )


@settings(max_examples=20, deadline=None)
@given(cut=st.integers(1, 39), seed=st.integers(0, 2**16))
def test_merged_shards_equal_the_unsharded_run(doubled, cut, seed):
    values = np.random.default_rng(seed).normal(size=(40, 3)).astype(np.float32)
    parts = [collect(doubled, [{"x": part}]) for part in (values[:cut], values[cut:])]
    assert merge(*parts) == collect(doubled, [{"x": values}])


@pytest.mark.parametrize("size", [1, 7, 32])
def test_ranges_do_not_depend_on_the_batch_size(cnn, samples_of, size):
    graph = cnn().graph()
    samples = samples_of(graph)
    tensors = ["x", "residual.out", "fc.out"]
    whole = collect(graph, samples.batches(len(samples)), tensors)
    split = collect(graph, samples.batches(size), tensors)
    for name in tensors:
        np.testing.assert_allclose(split.bounds[name], whole.bounds[name], rtol=1e-5)


def test_ranges_of_different_data_name_both(doubled):
    first = collect(doubled, [rows(1, 2, 3)])
    second = Ranges(first.bounds, 5, "other", "e" * 64)
    merged = merge(first, second)
    assert (merged.samples, merged.source) == (6, "random/train+other")
    assert merged.fingerprint == "f" * 64 + "+" + "e" * 64


def test_ranges_of_different_graphs_do_not_merge(doubled):
    first = collect(doubled, [rows(1, 2, 3)])
    with pytest.raises(InputRefused, match=re.escape("ranges of different graphs: only one side knows 'x'")):
        merge(first, collect(doubled, [rows(1, 2, 3)], ["double.out", "relu.out"]))


def test_without_samples_nothing_is_invented(doubled):
    with pytest.raises(
        InputRefused, match=r"random/train gave no samples; calibration data is never invented.*--data SPEC"
    ):
        collect(doubled, [])


@pytest.mark.parametrize("position", range(6))
@pytest.mark.parametrize(("value", "word"), [(np.nan, "NaN"), (np.inf, "infinity"), (-np.inf, "infinity")])
def test_a_value_that_is_not_finite_names_its_tensor(doubled, position, value, word):
    batch = rows(1, 2, 3, 4, 5, 6)
    batch["x"].flat[position] = value
    with pytest.raises(InputRefused, match=f"tensor 'x' holds {word} on the calibration data"):
        collect(doubled, [rows(1, 2, 3), batch])


def test_infinity_is_a_bound_where_that_is_allowed(doubled):
    ranges = collect(doubled, [rows(1, -np.inf, 3)], allow_infinity=True)
    assert ranges.bounds == {"x": (-np.inf, 3), "double.out": (-np.inf, 6), "relu.out": (0, 6)}


@pytest.mark.parametrize("position", range(3))
def test_nan_is_no_bound_even_where_infinity_is_one(doubled, position):
    batch = rows(1, -np.inf, 3)
    batch["x"].flat[position] = np.nan
    with pytest.raises(InputRefused, match="tensor 'x' holds NaN on the calibration data"):
        collect(doubled, [batch], allow_infinity=True)


def test_overflow_within_the_graph_is_told_where_it_starts(doubled):
    with pytest.raises(InputRefused, match=r"tensor 'double\.out' holds infinity"):
        collect(doubled, [rows(3e38, 0, 0)])


def test_a_batch_that_does_not_fit_the_inputs_is_refused(doubled):
    with pytest.raises(InputRefused, match=r"input 'x' expects shape \(batch, 3\), got \(2, 4\)"):
        collect(doubled, [{"x": np.zeros((2, 4), np.float32)}])


def test_an_unknown_tensor_is_refused(doubled):
    with pytest.raises(InputRefused, match="the graph has no tensor 'nothing' to calibrate"):
        collect(doubled, [rows(1, 2, 3)], ["nothing"])


def test_samples_are_run_in_batches_of_the_size_asked_for(doubled):
    samples, seen = Samples(rows(1, 2, 3, 4, 5, 6, 7, 8, 9), None, "random/train"), []
    ranges = calibrate(doubled, ["x"], samples, Means(batch_size=2, on_step=seen.append))
    assert ranges == Ranges({"x": (1.0, 9.0)}, 3, "random/train", samples.fingerprint)
    assert seen == [Step("calibrate", 2, 3), Step("calibrate", 3, 3)]


def test_samples_that_do_not_fill_a_fixed_batch_are_left_out_and_not_counted(doubled):
    model = doubled.copy_model()
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = 2
    samples = Samples(rows(1, 2, 3, 4, 5, 6, 7, 8, 9), None, "random/train")
    ranges = calibrate(Graph(model, "0" * 64), ["x"], samples, Means())
    assert (ranges.bounds, ranges.samples) == ({"x": (1.0, 6.0)}, 2)


def test_progress_counts_samples(doubled):
    seen = []
    collect(doubled, [rows(1, 2, 3), rows(1, 2, 3, 4, 5, 6)], on_step=seen.append)
    assert seen == [1, 3]


def test_graph_is_unchanged(doubled):
    before = doubled.model.SerializeToString(deterministic=True)
    collect(doubled, [rows(1, 2, 3)])
    assert doubled.model.SerializeToString(deterministic=True) == before


def test_memory_does_not_grow_with_samples(net):
    """150 batches write 4 MiB of activations each: 600 MiB, were they kept."""
    drawn = net(1, 128, 128)
    drawn.conv(64, kernel=1)
    drawn.op("Relu")
    graph = drawn.graph()
    batch = {"x": np.ones((1, 1, 128, 128), np.float32)}
    seen = []

    def resident_bytes(_samples=0):
        seen.append(int(Path("/proc/self/statm").read_text().split()[1]) * PAGE)

    collect(graph, [batch] * 150, ["x", graph.outputs[0].name], on_step=resident_bytes)
    assert seen[-1] - seen[9] < 32 * 2**20


def test_a_scalar_input_gets_the_one_value_of_all_samples():
    inputs = (TensorSpec("x", "float32", ("batch", 3)), TensorSpec("rate", "int64", ()))
    batch = {"x": np.zeros((4, 3), np.float32), "rate": np.full(4, 16000)}
    feeds = share_scalars(inputs, batch)
    assert (feeds["rate"].shape, int(feeds["rate"]), feeds["x"].shape) == ((), 16000, (4, 3))
    with pytest.raises(InputRefused, match="input 'rate' is one number for all samples of a run"):
        share_scalars(inputs, {**batch, "rate": np.arange(4)})
