"""Graphs whose weights go to a file of their own: on request, or because they are more than one file holds."""

import numpy as np
import pytest

from memopt.errors import InputRefused, UsageError
from memopt_export import first_session
from memopt_export import graph as graphs
from memopt_export.graph import load_graph, run_graph, save_graph
from memopt_export.opset import at_least_opset
from memopt_export.quantize import quantize
from memopt_export.recipe import parse

onnx = pytest.importorskip("onnx")


@pytest.fixture(scope="module")
def graph(net):
    drawn = net(64)
    for name in ("first", "second"):
        drawn.op("MatMul", drawn.last, drawn.weight(f"{name}.w", 64, 64), name=name)
        drawn.op("Add", drawn.last, drawn.constant(f"{name}.b", np.ones(64, np.float32)))
    return drawn.graph()


@pytest.fixture
def too_large(monkeypatch):
    """One file holds 8 KiB from here on."""
    monkeypatch.setattr(graphs, "LARGEST_FILE_BYTES", 2**13)


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_large_initializers_lie_on_pages_of_a_file_beside(graph, tmp_path):
    save_graph(graph, tmp_path / "net.onnx", external=True)
    assert files(tmp_path) == ["net.onnx", "net.onnx.data"]
    model = onnx.load(tmp_path / "net.onnx", load_external_data=False)
    places = {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data} for tensor in model.graph.initializer
    }
    assert places["first.w"] == {"location": "net.onnx.data", "offset": "0", "length": "16384"}
    assert places["second.w"] == {"location": "net.onnx.data", "offset": "16384", "length": "16384"}
    assert places["first.b"] == {}  # 256 bytes stay in the graph
    assert (tmp_path / "net.onnx").stat().st_size < 2048


def test_it_comes_back_equal(graph, tmp_path, samples_of):
    save_graph(graph, tmp_path / "net.onnx", external=True)
    loaded = load_graph(tmp_path / "net.onnx")
    assert (loaded.weights_sha256, loaded.precision) == (graph.weights_sha256, "fp32")
    feeds = samples_of(graph).feeds
    np.testing.assert_array_equal(run_graph(loaded, feeds)[0], run_graph(graph, feeds)[0])


def test_what_one_file_does_not_hold_is_written_so_without_being_asked(graph, tmp_path, too_large):
    assert not graph.fits_one_file
    save_graph(graph, tmp_path / "net.onnx")
    assert files(tmp_path) == ["net.onnx", "net.onnx.data"]


def test_neither_file_is_replaced_unless_asked(graph, tmp_path):
    (tmp_path / "net.onnx.data").write_bytes(b"somebody's")
    with pytest.raises(UsageError, match=r"net\.onnx\.data exists; hint: --force replaces it"):
        save_graph(graph, tmp_path / "net.onnx", external=True)
    assert files(tmp_path) == ["net.onnx.data"]
    assert (tmp_path / "net.onnx.data").read_bytes() == b"somebody's"
    save_graph(graph, tmp_path / "net.onnx", external=True, force=True)
    assert (tmp_path / "net.onnx.data").stat().st_size == 2 * 16384


@pytest.mark.parametrize("name", ["fp16", "int8-weights", "int4-weights"])
def test_a_graph_that_one_file_does_not_hold_runs_and_is_quantized(graph, tmp_path, too_large, name, samples_of):
    feeds = samples_of(graph).feeds
    expected = run_graph(graph, feeds)[0]
    small = quantize(graph, parse(name), None).graph
    save_graph(small, tmp_path / "small.onnx", external=True)
    output = run_graph(load_graph(tmp_path / "small.onnx"), feeds)[0]
    assert np.abs(output - expected).max() < 0.35 * np.abs(expected).max()


def test_an_opset_is_raised_without_serializing_the_weights(net, monkeypatch):
    from onnx import version_converter

    drawn = net(64, opset=11)
    drawn.op("MatMul", "x", drawn.weight("w", 64, 64))
    seen = []
    convert = version_converter.convert_version
    monkeypatch.setattr(
        version_converter, "convert_version", lambda model, to: seen.append(model.ByteSize()) or convert(model, to)
    )
    graph = drawn.graph()
    raised = at_least_opset(graph, 21)
    assert seen[0] < 1024
    assert raised.model.opset_import[0].version == 21
    assert [value.name for value in raised.model.graph.input] == ["x"]
    assert raised.model.graph.initializer[0] == graph.model.graph.initializer[0]


@pytest.mark.parametrize(("kind", "counts"), [("DequantizeLinear", False), ("Mul", True)])
def test_weights_that_are_dequantized_in_each_run_unfold_to_nothing_at_the_start(kind, counts):
    """ONNX Runtime folds a Mul of constants when it opens a graph, and no DequantizeLinear."""
    from onnx import TensorProto, helper, numpy_helper

    arrays = {"w": np.ones((64, 64), np.int8 if kind == "DequantizeLinear" else np.float32), "s": np.float32(0.5)}
    nodes = [helper.make_node(kind, ["w", "s"], ["d"]), helper.make_node("MatMul", ["x", "d"], ["y"])]
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 64])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )  # fmt: skip
    inferred = onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]))
    unfolding = first_session._Unfolding(2**13)
    if counts:
        with pytest.raises(InputRefused, match=r"unfolds to 16\.0 KiB"):
            unfolding.add(inferred.graph, frozenset())
    else:
        unfolding.add(inferred.graph, frozenset())
        assert unfolding._total_bytes == 0
