import errno
from pathlib import Path

import numpy as np
import pytest

from memopt.errors import OutOfResource
from memopt_export.graph import Graph, open_session
from memopt_export.hollow import as_executed, as_written
from memopt_export.plan import plan

onnx = pytest.importorskip("onnx")


@pytest.fixture(scope="module")
def graph(net):
    """A network with 2.4 MiB of weights, of which the last layer's are hollow."""
    drawn = net(3, 16, 16)
    drawn.conv(16)
    drawn.op("BatchNormalization", drawn.last, *(drawn.constant(n, np.ones(16, np.float32)) for n in "abcd"))
    drawn.op("Relu")
    drawn.op("Flatten")
    drawn.gemm(4096, 150)
    return drawn.graph()


def test_nodes_are_those_of_the_session_that_has_the_weights(graph, tmp_path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "real.onnx"), 4
    open_session(graph, options)
    real = onnx.load(str(tmp_path / "real.onnx"))
    found = as_executed(graph)
    assert [node.op_type for node in found.model.graph.node] == [node.op_type for node in real.graph.node]
    assert found.by == f"onnxruntime {onnxruntime.__version__}"


def test_large_weights_have_no_data_and_the_graph_keeps_its_own(graph):
    before = graph.model.SerializeToString(deterministic=True)
    for found in (as_executed(graph), as_written(graph)):
        assert found.model.ByteSize() < 50_000
    assert graph.model.SerializeToString(deterministic=True) == before


def test_constant_nodes_are_hollow_too(net):
    drawn = net(300)
    drawn.op("Tanh")
    model = drawn.model()
    value = onnx.numpy_helper.from_array(np.ones((300, 300), np.float32), "large")
    model.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["large"], value=value))
    model.graph.node.append(onnx.helper.make_node("MatMul", [model.graph.output[0].name, "large"], ["product"]))
    assert plan(Graph(model, "0" * 64)).weights_bytes == 360_000
    assert as_executed(Graph(model, "0" * 64)).model.ByteSize() < 50_000


def test_a_graph_that_the_library_cannot_open_is_planned_as_it_is_written(net):
    drawn = net(4)
    drawn.op("Tanh", name="tanh")
    model = drawn.model()
    model.graph.node[0].op_type, model.graph.node[0].domain = "Unheard", "of.somebody"
    model.opset_import.append(onnx.helper.make_opsetid("of.somebody", 1))
    found = as_executed(Graph(model, "0" * 64))
    assert found.by.startswith("the file's own nodes: onnxruntime cannot open it: ")
    assert [node.op_type for node in found.model.graph.node] == ["Unheard"]


def test_no_room_for_temporary_files_is_said(graph, monkeypatch):
    def full(path, *args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutOfResource, match=r"no room for temporary files: .*No space left on device"):
        as_executed(graph)
