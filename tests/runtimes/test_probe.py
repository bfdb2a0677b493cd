"""The process that measures: what it finds for models of known size, and what must not reach into it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from memopt import probe
from memopt.errors import BackendError, InputRefused
from memopt.probe import Request, measure
from memopt.tensors import Array
from memopt_export.graph import Graph, save_graph
from memopt_export.pack import Contents, OnnxPart, pack

ROWS, COLUMNS = 8192, 1024
WEIGHTS_BYTES = ROWS * COLUMNS * 4  # 32 MiB
MIB = 2**20


@pytest.fixture(scope="session")
def table() -> Graph:
    """Rows of one 32 MiB initializer by their number: an operator that neither packs nor copies its weights."""
    from onnx import TensorProto, helper, numpy_helper

    weights = np.random.default_rng(0).normal(size=(ROWS, COLUMNS)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Gather", ["weights", "ids"], ["rows"], name="gather")],
        "table",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch"])],
        [helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["batch", COLUMNS])],
        [numpy_helper.from_array(weights, "weights")],
    )
    return Graph(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), "0" * 64)


@pytest.fixture(scope="session")
def onnx_file(tmp_path_factory: pytest.TempPathFactory, table: Graph) -> Path:
    path = tmp_path_factory.mktemp("probe") / "table.onnx"
    save_graph(table, path)
    return path


def request_for(path: Path, folder: Path, *, variant: str | None = None, outputs: Path | None = None) -> Request:
    np.save(folder / "ids.npy", np.arange(10, dtype=np.int64) % ROWS)
    inputs = {"ids": str(folder / "ids.npy")}
    where = str(outputs) if outputs else None
    return Request(str(path), "onnxruntime", "cpu", 4, inputs, variant, threads=1, runs=5, seconds=0.1, outputs=where)


def test_inlined_weights_are_private_memory(onnx_file: Path, tmp_path: Path) -> None:
    steady = measure(request_for(onnx_file, tmp_path)).bill.phases["steady"]
    assert steady.private_bytes is not None
    assert WEIGHTS_BYTES - MIB < steady.private_bytes < 3 * WEIGHTS_BYTES
    assert steady.peak_bytes is not None
    assert steady.peak_bytes >= steady.private_bytes


def test_mapped_weights_are_not(table: Graph, tmp_path: Path) -> None:
    pack(Contents("table", (OnnxPart("table", "table", table),)), tmp_path / "table.mopt")
    found = measure(request_for(tmp_path / "table.mopt", tmp_path, variant="table"))
    private_bytes = found.bill.phases["steady"].private_bytes
    assert private_bytes is not None
    assert private_bytes < WEIGHTS_BYTES / 4


def test_all_samples_have_outputs_though_the_last_batch_is_short(onnx_file: Path, table: Graph, tmp_path: Path) -> None:
    from onnx import numpy_helper

    measure(request_for(onnx_file, tmp_path, outputs=tmp_path / "outputs.npy"))
    assert np.array_equal(
        np.load(tmp_path / "outputs.npy"), numpy_helper.to_array(table.model.graph.initializer[0])[:10]
    )


def test_files_of_the_current_folder_are_not_imported(
    onnx_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("statistics", "signal", "numpy", "onnxruntime", "memopt"):
        (tmp_path / f"{name}.py").write_text("open('canary', 'w')\nraise SystemExit('executed')")
    monkeypatch.chdir(tmp_path)
    assert measure(request_for(onnx_file, tmp_path)).runs == 5
    assert not (tmp_path / "canary").exists()


NOISE = """
import os, sys
os.write(1, b"from C\\n")
print("from Python")
print("at the end", flush=False)
"""
THE_REAL_ONE = """
sys.path.remove(os.path.dirname(os.path.dirname(__file__)))
del sys.modules["onnxruntime"]
import onnxruntime
"""


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a package stands that is imported in the place of onnxruntime."""
    (tmp_path / "noisy" / "onnxruntime").mkdir(parents=True)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "noisy"))
    return tmp_path / "noisy" / "onnxruntime" / "__init__.py"


def test_what_a_library_prints_does_not_reach_the_answer(library: Path, onnx_file: Path, tmp_path: Path) -> None:
    library.write_text(NOISE + THE_REAL_ONE)
    assert measure(request_for(onnx_file, tmp_path)).placement == "CPUExecutionProvider"


def test_what_a_library_prints_does_not_reach_a_refusal(library: Path, onnx_file: Path, tmp_path: Path) -> None:
    library.write_text(NOISE + "raise ImportError('it is broken')")
    with pytest.raises(BackendError, match=r"^onnxruntime cannot be imported: it is broken; hint: pip install"):
        measure(request_for(onnx_file, tmp_path))


def test_a_refusal_of_the_child_is_of_the_same_class(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="does not exist"):
        measure(request_for(tmp_path / "missing.onnx", tmp_path))


@pytest.mark.parametrize("allowed", [True, False])
def test_a_peak_that_cannot_be_reset_is_unknown(
    tiny_bundle: Path, tiny_inputs: Array, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: bool
) -> None:
    """VmHWM then holds the peak of the import, which is not the model's."""
    np.save(tmp_path / "x.npy", tiny_inputs)
    monkeypatch.setattr(probe, "reset_peak", lambda: allowed)
    inputs = {"input": str(tmp_path / "x.npy")}
    asked = Request(str(tiny_bundle), "onnxruntime", "cpu", 1, inputs, "large", runs=5, seconds=0.1)
    phases = probe._measure_here(asked).bill.phases
    assert phases["import"].peak_bytes is not None
    assert [phases[name].peak_bytes is not None for name in ("load", "first run", "steady")] == [allowed] * 3
