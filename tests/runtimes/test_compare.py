from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from memopt.accuracy import agreement, sqnr_db, topk
from memopt.compare import Given, Listener, cells, compare, retimed, subjects
from memopt.errors import BackendError, InputRefused, OutOfResource, UsageError
from memopt.judgement import Judgement
from memopt.memory import PHASES
from memopt.probe import Request, measure
from memopt.report import Report, columns_of, read_report
from memopt.runtimes import RUNTIMES
from memopt.tensors import Array
from memopt_export.graph import Graph, run_graph, save_graph
from memopt_export.pack import Contents


@pytest.fixture(scope="module")
def report(tiny_bundle: Path, tiny_inputs: Array, tmp_path_factory: pytest.TempPathFactory) -> Report:
    broken = tmp_path_factory.mktemp("broken") / "broken.onnx"
    broken.write_bytes(b"not a model")
    todo = cells(subjects([broken, tiny_bundle]), batches=(1, 4), runtimes=("onnxruntime",), devices=("cpu",))
    labels = np.zeros(len(tiny_inputs), np.int64)
    judgement = Judgement(labels, ("zero", "one", "two"), confusion=True, metric=spread, metric_name="tests:spread")
    return compare(todo, Given({"input": tiny_inputs}, "by hand", "ab" * 32), judgement, reference="large")


def spread(outputs: list[Array], labels: Array | None) -> float:
    """A metric of one's own: the mean distance of the largest logit to the smallest."""
    assert labels is not None
    assert len(outputs) == 1
    return float(np.ptp(outputs[0], axis=1).mean())


def test_every_cell_has_a_row_in_the_order_asked_for(report: Report) -> None:
    assert [(row.name, row.batch) for row in report.rows] == [
        ("broken.onnx", 1), ("broken.onnx", 4), ("large", 1), ("large", 4), ("small", 1), ("small", 4),
    ]  # fmt: skip


def test_a_broken_artifact_carries_its_reason_and_stops_nothing(report: Report) -> None:
    assert all("onnxruntime cannot open broken.onnx" in str(row.reason) for row in report.rows[:2])
    assert all(row.reason is None for row in report.rows[2:])


def test_rows_hold_real_figures(report: Report) -> None:
    for row in report.rows[2:]:
        assert row.p50_ms is not None
        assert 0 < row.p50_ms <= (row.p95_ms or 0) <= (row.p99_ms or 0)
        assert row.leak_bytes_per_1000_runs is not None
        assert abs(row.leak_bytes_per_1000_runs) < 2**20
        assert row.placement == "CPUExecutionProvider"
        assert row.private_bytes is None or 0 < row.private_bytes < 2**28
        assert row.bill is not None
        assert set(row.bill.phases) == set(PHASES)
        assert row.bill.allocator is not None


def test_the_reference_agrees_with_itself_at_every_batch(report: Report) -> None:
    large, small = report.rows[2:4], report.rows[4:]
    assert [row.agreement for row in large] == [1.0, 1.0]
    assert large[0].max_difference == 0.0
    assert small[0].agreement is not None
    assert small[0].agreement < 1.0
    assert large[0].top1 == large[1].top1
    assert report.reference_place == "onnxruntime cpu, batch 1"


def test_multiples_of_the_reference_are_those_at_the_same_batch(report: Report) -> None:
    large, small = report.rows[2:4], report.rows[4:]
    assert [row.memory_ratio for row in large] == [row.latency_ratio for row in large] == [1.0, 1.0]
    for row, other in zip(small, large, strict=True):
        assert row.memory_ratio == pytest.approx(row.private_bytes / other.private_bytes)
        assert row.latency_ratio == pytest.approx(row.p50_ms / other.p50_ms)
    assert report.rows[0].memory_ratio is None


def test_the_worst_sample_is_the_one_that_numpy_finds(
    report: Report, tiny_contents: Contents, tiny_inputs: Array
) -> None:
    small = report.rows[4]
    assert small.worst is not None
    expected, found = (run_graph(part.graph, {"input": tiny_inputs})[0] for part in tiny_contents.graphs)
    ratios = (expected.astype(float) ** 2).sum(axis=1) / ((expected - found).astype(float) ** 2).sum(axis=1)
    assert small.worst.index == ratios.argmin()
    assert small.worst.sqnr_db == pytest.approx(10 * np.log10(ratios.min()), abs=0.01)


def test_the_confusion_and_a_metric_of_ones_own_are_counted_on_all_samples(report: Report) -> None:
    for row in report.rows[2:]:
        assert row.confusion is not None
        assert np.shape(row.confusion) == (3, 3)
        assert sum(row.confusion[0]) == report.samples == 32
        assert row.confusion[0][0] / 32 == row.top1
        assert row.metric is not None
        assert row.metric > 0
        assert row.top5 is None  # of three classes, all are among the first five
    assert report.metric == "tests:spread"


def test_of_two_timings_the_shorter_counts_and_ratios_follow(report: Report) -> None:
    large, small = report.rows[2], report.rows[4]
    assert large.p50_ms is not None
    assert small.p50_ms is not None
    slower = replace(large, p50_ms=large.p50_ms * 2)
    faster = replace(small, p50_ms=small.p50_ms / 4, p99_ms=0.5, top1=0.0)
    found = retimed(report, replace(report, rows=(slower, faster, replace(large, p50_ms=None, reason="broke"))))
    assert found.rows[2] == large
    assert (found.rows[4].p50_ms, found.rows[4].p99_ms, found.rows[4].top1) == (faster.p50_ms, 0.5, small.top1)
    assert found.rows[4].latency_ratio == pytest.approx(small.p50_ms / 4 / large.p50_ms)
    assert found.rows[3] == report.rows[3]


def test_a_report_survives_json_and_becomes_markdown(report: Report) -> None:
    assert read_report(report.to_json().encode()) == report
    lines = report.to_markdown().splitlines()
    assert len(lines) == 2 + len(report.rows)
    assert {line.count("|") for line in lines} == {len(columns_of(report)) + 1}
    assert "Device" not in columns_of(report)


def test_a_reference_that_cannot_be_measured_is_replaced_by_nobody(
    tiny_bundle: Path, tmp_path: Path, tiny_inputs: Array
) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a model")
    todo = cells(subjects([broken, tiny_bundle]), batches=(2,), runtimes=("onnxruntime",), devices=("cpu",))
    labels = np.zeros(len(tiny_inputs), np.int64)
    found = compare(todo, Given({"input": tiny_inputs}), Judgement(labels), reference="broken.onnx")
    assert [row.agreement for row in found.rows] == [None, None, None]
    assert [row.latency_ratio for row in found.rows] == [None, None, None]
    assert found.reference_place is None
    assert found.rows[1].top1 is not None


def test_without_a_name_the_first_that_runs_is_the_reference(
    tiny_bundle: Path, tmp_path: Path, tiny_inputs: Array
) -> None:
    (tmp_path / "lost.engine").write_bytes(b"an engine without its sidecar")
    (tmp_path / "cut.mopt").write_bytes(tiny_bundle.read_bytes()[:-7])
    found = subjects([tmp_path / "lost.engine", tmp_path / "cut.mopt", tiny_bundle])
    todo = cells(found, batches=(2,), devices=("cpu",))
    told: list[tuple[str, int, int] | str] = []
    listener = Listener(lambda cell, i, n: told.append((cell.subject.name, i, n)), lambda row: told.append(row.name))
    report = compare(todo, Given({"input": tiny_inputs}), Judgement(), listener=listener)
    assert report.reference == "large"
    reasons = {row.name: (row.runtime, row.device, row.reason) for row in report.rows}
    lost = tmp_path / "lost.engine"
    assert reasons["lost.engine"] == ("tensorrt", "cuda", f"{lost} has no lost.engine.json beside it")
    assert reasons["cut.mopt"][2] is not None
    assert reasons["large"][2] is None
    assert told[:2] == [("large", 1, 4), "large"]
    assert len(told) == 2 * len(report.rows)


def test_a_model_without_a_row_for_each_sample_is_measured_all_the_same(
    tiny_graph: Graph, tmp_path: Path, tiny_inputs: Array
) -> None:
    model = tiny_graph.copy_model()
    model.graph.node.append(helper.make_node("ReduceMax", ["logits"], ["most"], name="most", keepdims=0))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("most", TensorProto.FLOAT, []))
    save_graph(tiny_graph.with_model(model), tmp_path / "scalar.onnx")
    todo = cells(subjects([tmp_path / "scalar.onnx"]), batches=(2,), runtimes=("onnxruntime",), devices=("cpu",))
    (row,) = compare(todo, Given({"input": tiny_inputs}), Judgement(np.zeros(len(tiny_inputs), np.int64))).rows
    assert row.reason is None
    assert row.private_bytes is not None
    assert row.top1 is None


def test_files_of_one_name_are_told_apart_by_their_paths(tiny_bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.mopt"
    copy.write_bytes(tiny_bundle.read_bytes())
    names = [subject.name for subject in subjects([tiny_bundle, copy])]
    assert names == [f"{path}:{name}" for path in (tiny_bundle, copy) for name in ("large", "small")]


def test_what_nothing_opens_or_no_device_takes_keeps_its_row_and_reason(tiny_bundle: Path) -> None:
    found = subjects([tiny_bundle])
    foreign = cells(found, batches=(1,), runtimes=("torch",))
    assert {cell.reason for cell in foreign} == {"torch opens .pt2, not .onnx"}
    elsewhere = cells(found, batches=(1,), runtimes=("onnxruntime",), devices=("cuda",))
    if RUNTIMES["onnxruntime"].unavailable("cuda") is None:
        assert {(cell.device, cell.reason) for cell in elsewhere} == {("cuda", None)}
    else:
        assert {cell.device for cell in elsewhere} == {"cuda"}  # never the CPU in its place
        assert all(cell.reason for cell in elsewhere)


def test_impossible_questions_are_refused(tiny_bundle: Path, tiny_inputs: Array) -> None:
    found = subjects([tiny_bundle])
    with pytest.raises(UsageError, match="runtime 'tvm' is not known"):
        cells(found, batches=(1,), runtimes=("tvm",))
    with pytest.raises(UsageError, match="device 'gpu' is not known; hint: one of cpu, cuda"):
        cells(found, batches=(1,), devices=("gpu",))
    with pytest.raises(UsageError, match="nothing to compare"):
        cells([], batches=(1,))
    with pytest.raises(UsageError, match="batch is 0"):
        cells(found, batches=(0,))
    with pytest.raises(UsageError, match="reference 'x' is not among"):
        compare(cells(found, batches=(1,)), Given({"input": tiny_inputs}), Judgement(), reference="x")
    with pytest.raises(InputRefused, match=r"x\.txt is no model file; hint: one of \*\.onnx, \*\.engine"):
        subjects([Path("x.txt")])
    with pytest.raises(InputRefused, match=r"missing\.onnx does not exist"):
        subjects([Path("missing.onnx")])


def request_for(bundle: Path, folder: Path, **fields: object) -> Request:
    np.save(folder / "x.npy", np.zeros((2, 1, 8, 8), np.float32))
    plain = {"path": str(bundle), "runtime": "onnxruntime", "device": "cpu", "batch": 1, "variant": "large"}
    return Request(**{**plain, "inputs": {"input": str(folder / "x.npy")}, **fields})  # type: ignore[arg-type]


def test_what_the_child_refuses_the_parent_raises(tiny_bundle: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "wide.npy", np.zeros((2, 1, 8, 9), np.float32))
    with pytest.raises(InputRefused, match="expects shape"):
        measure(request_for(tiny_bundle, tmp_path, inputs={"input": str(tmp_path / "wide.npy")}))


def test_a_child_that_dies_or_hangs_becomes_a_line(tiny_bundle: Path, tmp_path: Path, monkeypatch) -> None:
    request = request_for(tiny_bundle, tmp_path)
    with pytest.raises(OutOfResource, match=r"longer than 0\.01 s"):
        measure(request, timeout_s=0.01)
    program = tmp_path / "python"
    monkeypatch.setattr("sys.executable", str(program))
    for body, kind, said in (
        ("kill -SEGV $$", BackendError, "killed by SIGSEGV"),
        ("kill -KILL $$", OutOfResource, "killed by SIGKILL"),
        ("echo broken library >&2; exit 1", BackendError, "broken library"),
    ):
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)
        with pytest.raises(kind, match=said):
            measure(request)


def test_accuracy_figures_by_hand() -> None:
    logits = np.array([[3.0, 2.0, 1.0], [1.0, 3.0, 2.0], [2.0, 1.0, 3.0]])
    assert topk(logits, np.array([0, 0, 0]), k=1) == pytest.approx(1 / 3)
    assert topk(logits, np.array([0, 0, 0]), k=2) == pytest.approx(2 / 3)
    assert agreement(logits, logits * 2) == 1.0
    assert sqnr_db(logits, logits) == float("inf")
    assert sqnr_db(np.array([0.9]), np.array([1.0])) == pytest.approx(20.0)
    with pytest.raises(InputRefused, match="for 2 labels"):
        topk(logits, np.array([0, 0]), k=1)
