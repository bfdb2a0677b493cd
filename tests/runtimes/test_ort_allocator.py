"""What ONNX Runtime's allocator holds, for a graph whose tensors are known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from memopt import ort_runtime
from memopt.artifact import Artifact, open_artifact
from memopt.errors import BackendError
from memopt.ort_allocator import allocator_use
from memopt_export.graph import Graph, save_graph

MIB = 2**20
SIDE = 1024  # a square of floats is 4 MiB


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Two products: weights of 4 MiB each, results of 4 MiB at batch 1024, both alive in the second."""
    weights = np.random.default_rng(0).normal(size=(SIDE, SIDE)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "one"], ["a"]), helper.make_node("MatMul", ["a", "two"], ["y"])],
        "products",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", SIDE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", SIDE])],
        [numpy_helper.from_array(weights, "one"), numpy_helper.from_array(weights + 1, "two")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path = tmp_path_factory.mktemp("allocator") / "products.onnx"
    save_graph(Graph(model, "0" * 64), path)
    return open_artifact(path)


@pytest.mark.parametrize(("batch", "mebibytes"), [(SIDE, 8), (4 * SIDE, 32)])
def test_live_results_are_what_a_run_asks_for_and_packed_weights_are_held_between(
    artifact: Artifact, batch: int, mebibytes: int
) -> None:
    found = allocator_use(artifact, {"x": np.ones((batch, SIDE), np.float32)}, device="cpu", threads=1)
    if found.requested_bytes is None:
        assert found.method == "unknown: the profiler of this onnxruntime does not tell"
        pytest.skip(found.method)
    assert found.activation_bytes == pytest.approx(mebibytes * MIB, abs=64)
    assert found.requested_bytes == pytest.approx((mebibytes + 8) * MIB, rel=0.03)
    assert found.in_use_bytes is not None
    assert found.held_bytes is not None
    assert found.requested_bytes <= found.in_use_bytes <= found.held_bytes
    assert found.method.startswith("ONNX Runtime's profiler (mem_bytes_requested_in_use")


def test_what_cannot_be_profiled_is_unknown_with_the_reason(artifact: Artifact) -> None:
    found = allocator_use(artifact, {"wrong": np.ones((1, 1), np.float32)}, device="cpu", threads=1)
    assert found.requested_bytes is None
    assert found.method.startswith("unknown: ")
    assert "wrong" in found.method or "x" in found.method


def test_a_profiler_without_memory_says_so(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    end = ort_runtime.OrtSession.end_record

    def older(session: ort_runtime.OrtSession) -> Path:
        path = end(session)
        events = json.loads(path.read_bytes())
        for event in events:
            event["args"] = {
                name: value for name, value in event.get("args", {}).items() if not name.startswith("mem_")
            }
        path.write_text(json.dumps(events))
        return path

    monkeypatch.setattr(ort_runtime.OrtSession, "end_record", older)
    found = allocator_use(artifact, {"x": np.ones((1, SIDE), np.float32)}, device="cpu", threads=1)
    assert found.method == "unknown: the profiler of this onnxruntime does not tell"


def test_a_closed_session_has_no_profile(artifact: Artifact, tmp_path: Path) -> None:
    session = ort_runtime.open(artifact, threads=1, record=tmp_path / "p")
    session.close()
    with pytest.raises(BackendError, match=r"products\.onnx is closed"):
        session.end_record()
