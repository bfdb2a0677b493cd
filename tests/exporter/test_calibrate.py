import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memopt.errors import InputRefused
from memopt.tensors import TensorSpec
from memopt_export.affine import asymmetric_uint8
from memopt_export.calibrate import METHODS, Ranges, batches_for, calibrate, collect_ranges, count, cuts, merge, narrow
from memopt_export.graph import Graph
from memopt_export.means import UNLIMITED, Means, Step
from memopt_export.quantize import quantize
from memopt_export.recipe import CALIBRATIONS, Recipe
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
    samples, seen = Samples(rows(*range(1, 13)), None, "random/train"), []
    ranges = calibrate(doubled, ["x"], samples, Means(batch_size=2, on_step=seen.append))
    assert ranges == Ranges({"x": (1.0, 12.0)}, 4, "random/train", samples.fingerprint)
    assert seen == [Step("calibrate", 2, 4), Step("calibrate", 4, 4)]


def test_no_sample_is_run_alone_where_there_are_others(doubled):
    for total in range(2, 40):
        samples = Samples({"x": np.ones((total, 3), np.float32)}, None, "random/train")
        for size in (1, 2, 5, 32):
            runs = [len(batch["x"]) for batch in batches_for(doubled, samples, Means(batch_size=size))]
            assert sum(runs) == total
            assert min(runs) > 1


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


# --- capped and not capped
#
# In runs of two samples or more. What ONNX Runtime computes of one alone differs in the last bit where it has several
# threads: it divides that one among them, and then sums in blocks of another size.

CAPPED = {
    "pieces of one node": Means(piece_bytes=1),
    "few samples at once": Means(batch_size=6),
    "both": Means(piece_bytes=1, run_bytes=500_000),
}


def draw_mlp(net):
    drawn = net(48)
    for index, (features, wide) in enumerate(((48, 96), (96, 64), (64, 32))):
        drawn.gemm(features, wide, name=f"fc{index}")
        drawn.op("Relu")
    drawn.op("MatMul", drawn.last, drawn.weight("head.w", 32, 10), name="head")
    return drawn


@pytest.fixture(scope="module", params=["cnn", "mlp"])
def network(request, net, cnn):
    return (cnn() if request.param == "cnn" else draw_mlp(net)).graph()


@pytest.fixture(scope="module", params=CAPPED)
def capped(request):
    return CAPPED[request.param]


def everything(graph):
    return ["x", *(name for node in graph.model.graph.node for name in node.output)]


def test_caps_are_caps(cnn, samples_of):
    """So that what follows compares different ways: the first cap cuts before every layer, the others run in parts."""
    graph = cnn().graph()
    samples = samples_of(graph)
    assert cuts(graph, None) == ()
    assert len(cuts(graph, 1)) == 5
    assert 0 < len(cuts(graph, 20_000)) < 5
    assert [len(batches_for(graph, samples, means)) for means in (UNLIMITED, *CAPPED.values())] == [1, 1, 6, 8]


def test_ranges_are_equal_with_and_without_a_cap(network, samples_of, capped):
    samples, tensors = samples_of(network), everything(network)
    assert calibrate(network, tensors, samples, capped) == calibrate(network, tensors, samples, UNLIMITED)


def test_histograms_are_equal_with_and_without_a_cap(network, samples_of, capped):
    samples, tensors = samples_of(network), everything(network)
    ranges = calibrate(network, tensors, samples, UNLIMITED)
    found, expected = (
        count(network, ranges, batches_for(network, samples, means), cuts=cuts(network, means.piece_bytes))
        for means in (capped, UNLIMITED)
    )
    for name in tensors:
        np.testing.assert_array_equal(found[name].counts, expected[name].counts, err_msg=name)


@pytest.fixture(scope="module", params=["gptq", "bias"])
def recipe(request):
    return Recipe("int8", correction=request.param)


@pytest.fixture(scope="module")
def uncapped_data(network, samples_of, recipe):
    return quantize(network, recipe, samples_of(network)).graph.data


def test_quantized_bytes_are_equal_with_and_without_a_cap(network, samples_of, capped, recipe, uncapped_data):
    """Rows that corrections look at are drawn sample by sample, and sums are over one sample or a set number."""
    assert quantize(network, recipe, samples_of(network), capped).graph.data == uncapped_data


# --- the second pass


@settings(max_examples=10, deadline=None)
@given(cut=st.integers(1, 39), seed=st.integers(0, 2**16))
def test_shards_counted_within_merged_ranges_give_the_unsharded_histograms(doubled, cut, seed):
    values = np.random.default_rng(seed).normal(size=(40, 3)).astype(np.float32)
    shards = [{"x": part} for part in (values[:cut], values[cut:])]
    ranges = merge(*(collect(doubled, [shard]) for shard in shards))
    first, second = (count(doubled, ranges, [shard]) for shard in shards)
    whole = count(doubled, ranges, [{"x": values}])
    for name in ("x", "double.out", "relu.out"):
        np.testing.assert_array_equal(first[name].merged(second[name]).counts, whole[name].counts)


@pytest.mark.parametrize("size", [None, 1, 2])
def test_every_value_is_counted_once(doubled, size):
    """Inputs too, wherever the graph is cut."""
    ranges = collect(doubled, [rows(1, -2, 0), rows(0, 0.5, 3, -1, 1, 1)])
    stops = () if size is None else (size,)
    found = count(doubled, ranges, [rows(1, -2, 0), rows(0, 0.5, 3, -1, 1, 1)], cuts=stops)
    assert {name: int(histogram.counts.sum()) for name, histogram in found.items()} == dict.fromkeys(found, 9)
    middles, counts = found["relu.out"].occupied()
    np.testing.assert_allclose(middles, [0, 1, 2, 6], atol=found["relu.out"].step)
    assert counts.tolist() == [4, 1, 3, 1]


def test_every_calibration_has_its_method():
    assert set(METHODS) == set(CALIBRATIONS)


@pytest.fixture(scope="module")
def heavy(doubled):
    """A tensor whose largest values are a hundred times what most are: its range by each calibration."""
    values = np.random.default_rng(0).standard_t(2, (5000, 3)).astype(np.float32)
    ranges = collect(doubled, [{"x": values}])
    histograms = count(doubled, ranges, [{"x": values}])
    found = {name: narrow(ranges, histograms, Recipe("int8", calibration=name), asymmetric_uint8) for name in METHODS}
    return ranges, found


def test_minmax_is_what_was_seen(heavy):
    ranges, found = heavy
    assert found["minmax"] == ranges


@pytest.mark.parametrize("calibration", sorted(set(CALIBRATIONS) - {"minmax"}))
def test_other_calibrations_cut_a_heavy_tail_and_keep_the_rest_of_what_is_known(heavy, calibration):
    ranges, found = heavy
    low, high = found[calibration].bounds["x"]
    assert ranges.bounds["x"][0] <= low < 0 < high <= ranges.bounds["x"][1]
    assert high - low < ranges.bounds["x"][1] - ranges.bounds["x"][0]
    assert found[calibration].bounds["relu.out"][0] == 0
    assert (found[calibration].samples, found[calibration].fingerprint) == (5000, ranges.fingerprint)


def test_entropy_differs_from_minmax_by_far(heavy):
    ranges, found = heavy
    spans = [high - low for low, high in (found["entropy"].bounds["x"], ranges.bounds["x"])]
    assert spans[0] < spans[1] / 2
