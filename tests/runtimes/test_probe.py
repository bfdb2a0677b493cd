"""The process that measures: what it finds for models of known size, and what must not reach into it."""

from __future__ import annotations

import mmap
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from memopt import memory, probe
from memopt.errors import BackendError, InputRefused
from memopt.probe import Request, growth, measure
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
    bill = measure(request_for(onnx_file, tmp_path)).bill
    private_bytes = bill.phases["steady"].private_bytes
    assert private_bytes is not None
    assert WEIGHTS_BYTES - MIB < private_bytes < 3 * WEIGHTS_BYTES
    assert bill.peak_bytes is not None
    assert bill.peak_bytes >= private_bytes


def test_mapped_weights_are_not(table: Graph, tmp_path: Path) -> None:
    pack(Contents("table", (OnnxPart("table", "table", table),)), tmp_path / "table.mopt")
    found = measure(request_for(tmp_path / "table.mopt", tmp_path, variant="table"))
    private_bytes = found.bill.phases["steady"].private_bytes
    assert private_bytes is not None
    assert private_bytes < WEIGHTS_BYTES / 4


def test_all_samples_have_outputs_though_the_last_batch_is_short(onnx_file: Path, table: Graph, tmp_path: Path) -> None:
    from onnx import numpy_helper

    measure(request_for(onnx_file, tmp_path, outputs=tmp_path))
    assert np.array_equal(np.load(tmp_path / "0.npy"), numpy_helper.to_array(table.model.graph.initializer[0])[:10])


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
def test_each_phase_has_its_peak_with_and_without_the_kernels(
    tiny_bundle: Path, tiny_inputs: Array, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: bool
) -> None:
    np.save(tmp_path / "x.npy", tiny_inputs)
    if not allowed:
        monkeypatch.setattr(memory, "reset_peak", lambda: False)
    inputs = {"input": str(tmp_path / "x.npy")}
    asked = Request(str(tiny_bundle), "onnxruntime", "cpu", 1, inputs, "large", runs=5, seconds=0.1)
    bill = probe._measure_here(asked).bill
    assert tuple(bill.phases) == memory.PHASES
    assert all(each.peak_bytes is not None for each in bill.phases.values())
    said = "VmHWM, reset through clear_refs" if allowed else "RSS sampled every 1 ms"
    assert all(each.method.endswith(f"peak: {said}") for each in bill.phases.values())


def test_growth_is_what_most_blocks_add() -> None:
    def grown(*mebibytes: float | None, runs: int = 40) -> int | None:
        return growth([None if each is None else round(each * MIB) for each in mebibytes], runs)

    assert grown(0, 1, 2, 3) == 25 * MIB
    assert grown(0, 0, 0, 9, 9, 9, 9, 9) == 0  # once
    assert grown(0, 0, 9, 9, 9, 19, 19, 19) == 0  # twice
    assert grown(5, 4, 9, 8, 13, 12, 17, 16) == -25 * MIB  # up and down
    assert grown(0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.12, 0.14, runs=8) == 0  # 2.5 MiB in 1,000 runs, seen in 56
    assert grown(0, None, 20) is None
    assert grown(7) is None


class Leaking:
    """A session that keeps this many bytes of every run, in pages of their own: no hole in the heap takes them."""

    device_bytes, device_method, placement = None, "", "here"

    def __init__(self, kept_bytes: int) -> None:
        self._kept_bytes, self._kept = kept_bytes, list[mmap.mmap]()

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        time.sleep(0.0002)
        if self._kept_bytes:
            self._kept.append(mmap.mmap(-1, self._kept_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
            self._kept[-1].write(b"x" * self._kept_bytes)
        return [feeds["ids"]]

    def trim(self) -> None:
        """A leak is not trimmed."""

    def close(self) -> None:
        """Nothing to free."""


@pytest.mark.parametrize(("kept_bytes", "runs"), [(0, 280), (4096, 280), (16384, 280), (16384, 50)])
def test_the_leak_of_known_size_is_found_where_there_are_enough_runs(
    onnx_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept_bytes: int, runs: int
) -> None:
    monkeypatch.setattr(probe.RUNTIMES["onnxruntime"], "open", lambda *_, **__: Leaking(kept_bytes))
    asked = replace(request_for(onnx_file, tmp_path), soak_runs=runs)
    found = probe._measure_here(asked)
    if runs < probe.LEAST_SOAK_RUNS:
        assert (found.leak_bytes_per_1000_runs, found.soak_runs) == (None, 0)
    else:
        assert found.soak_runs == runs
        assert found.leak_bytes_per_1000_runs == pytest.approx(1000 * kept_bytes, rel=0.1, abs=2**17)


def test_a_soak_takes_no_longer_than_it_may_unless_it_must(onnx_file: Path, tmp_path: Path) -> None:
    in_no_time = replace(request_for(onnx_file, tmp_path), soak_runs=70, seconds=1e-9)
    assert measure(in_no_time).soak_runs == 0
    assert measure(replace(in_no_time, soak_always=True)).soak_runs == 70
