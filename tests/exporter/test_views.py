"""Graphs that see each picture from several places."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from memopt.errors import InputRefused, UsageError
from memopt_export.compact import compact
from memopt_export.from_torch import export
from memopt_export.graph import Graph, run_graph
from memopt_export.views import graph_seen_from
from memopt_models.checkpoint import Checkpoint
from memopt_models.data import open_data
from memopt_models.qat import QatSettings, train_rounded
from memopt_models.train import TrainSettings, begin
from memopt_models.views import seen_from, window


def scene(channels: int = 1) -> Graph:
    """A strided convolution and a mean: what it answers depends on where a picture lies."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(3, channels, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["input", "w"], ["c"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["g"]),
        helper.make_node("Flatten", ["g"], ["logits"]),
    ]
    ends = [
        helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", channels, 7, 6]),
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3]),
    ]
    graph = helper.make_graph(nodes, "scene", ends[:1], ends[1:], [onnx.numpy_helper.from_array(weights, "w")])
    return Graph(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), "0" * 64)


@pytest.fixture(scope="module")
def dense() -> Checkpoint:
    """An untrained network."""
    return begin("simple_cnn", {"hidden": 8}, open_data("digits"), TrainSettings(epochs=1), start=None)


def pictures(channels: int, samples: int = 3) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(samples, channels, 7, 6)).astype(np.float32)


def moved(x: np.ndarray, down: int, right: int) -> np.ndarray:
    """Each pixel is the one `down` below and `right` of it."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    return padded[:, :, 1 + down : 1 + down + x.shape[2], 1 + right : 1 + right + x.shape[3]]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("views", "moves"), [(4, (0, 1)), (9, (-1, 0, 1))])
def test_outputs_are_the_mean_over_moved_pictures(channels: int, views: int, moves: tuple[int, ...]) -> None:
    graph, x = scene(channels), pictures(channels)
    each = [run_graph(graph, {"input": moved(x, down, right)})[0] for down in moves for right in moves]
    for seen in (graph_seen_from(graph, views), compact(graph_seen_from(graph, views))):
        np.testing.assert_allclose(run_graph(seen, {"input": x})[0], np.mean(each, 0), rtol=1e-5, atol=1e-6)


def test_torch_sees_the_same(dense: Checkpoint) -> None:
    x = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    seen = seen_from(dense.module(), 4)
    padded = torch.nn.functional.pad(x, (0, 1, 0, 1))
    each = [dense.module()(padded[:, :, down : down + 28, right : right + 28]) for down in (0, 1) for right in (0, 1)]
    torch.testing.assert_close(seen(x), torch.stack(each).mean(0))


def test_export_proves_parity_of_what_is_seen_from_four_places(dense: Checkpoint) -> None:
    x = np.random.default_rng(0).normal(size=(4, 1, 28, 28)).astype(np.float32)
    exported = export(dense, x, views=4)
    assert exported.parity.holds
    assert exported.graph.inputs == export(dense, x).graph.inputs
    with torch.inference_mode():
        expected = seen_from(dense.module(), 4)(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(run_graph(exported.graph, {"input": x})[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["int4-weights", "int8"])
def test_what_was_trained_for_four_views_is_exported_with_them(dense: Checkpoint, precision: str) -> None:
    data = open_data("digits")
    few = replace(data, **{name: split.pick(slice(64)) for name, split in data.splits.items()})
    trained = train_rounded(dense, few, QatSettings(TrainSettings(epochs=1, seed=0), precision=precision, views=4))
    x = np.random.default_rng(0).normal(size=(8, 1, 28, 28)).astype(np.float32)
    default, four, one = (export(trained, x, views=views).graph for views in (None, 4, 1))
    assert default.sha256 == four.sha256 != one.sha256


def test_a_window_names_every_channel_once_for_each_view() -> None:
    weights = window(3, 4)
    assert weights.shape == (12, 3, 2, 2)
    assert weights.sum(axis=(1, 2, 3)).tolist() == [1] * 12
    assert np.argwhere(weights[4]).tolist() == [[1, 0, 1]]  # the second view of channel 1 looks one to the right


def test_other_numbers_of_views_are_refused(dense: Checkpoint) -> None:
    x = np.zeros((2, 1, 28, 28), np.float32)
    with pytest.raises(UsageError, match=r"^a picture is seen from 5 places; hint: --views 1, 4 or 9$"):
        export(dense, x, views=5)


def test_what_is_no_picture_is_refused() -> None:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in ("input", "logits")]
    graph = helper.make_graph([helper.make_node("Relu", ["input"], ["logits"])], "g", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    with pytest.raises(InputRefused, match=r"^views are for pictures .*, got \(batch, 4\), \(batch, 4\)$"):
        graph_seen_from(Graph(model, "0" * 64), 4)
