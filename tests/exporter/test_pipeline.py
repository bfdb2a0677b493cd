"""The whole line on the embedded data set, small: one epoch, one batch, and then again."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

import memopt
from memopt import machine
from memopt.bundle import Bundle, open_bundle
from memopt.report import Report, read_report
from memopt_export.job import TrainJob, read_job
from memopt_export.pipeline import Work, train_dense
from memopt_export.stages import Stages
from memopt_models.checkpoint import load_checkpoint
from memopt_models.train import Progress, TrainSettings

JOB = """
name = "small"
data = "digits"
license = "Apache-2.0"

[train]
network = "simple_cnn"
settings = { channels = [8, 16], hidden = 32 }
how = { epochs = 2 }

[prune]
ratio = 0.5
finetune = { epochs = 1 }

[distill]
network = "ds_cnn"
how = { train = { epochs = 1, learning_rate = 1e-2 } }

[quantize]
recipes = ["int8"]
samples = 64

[[engine]]
how = { flavor = "tensorrt-rtx", targets = ["sm75", "sm86"], batches = [[1, 1, 1], [2, 8, 32]] }
precisions = ["fp32"]

[[engine]]
how = { flavor = "tensorrt", targets = ["local"] }
precisions = ["int8"]

[compare]
batches = [4]
runtimes = ["onnxruntime", "tensorrt-rtx"]
"""


@dataclass(frozen=True)
class Ran:
    folder: Path
    out: str
    err: str

    @property
    def bundle(self) -> Path:
        return self.folder / "dist" / "small.mopt"

    @property
    def report(self) -> Report:
        return read_report((self.folder / "dist" / "small.report.json").read_bytes())


def run(folder: Path) -> Ran:
    command = [sys.executable, "-m", "memopt_export", "pipeline", "job.toml"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Ran(folder, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("pipeline")
    (folder / "job.toml").write_text(JOB)
    return run(folder)


@pytest.fixture(scope="module")
def bundle(first: Ran) -> Bundle:
    return open_bundle(first.bundle)


def test_the_bundle_holds_every_variant(bundle: Bundle) -> None:
    ids = [variant.id for variant in bundle.manifest.variants]
    assert ids == [
        "dense-fp32", "dense-int8", "pruned-fp32", "pruned-int8", "student-fp32", "student-int8",
        "dense-fp32-rtx", "pruned-fp32-rtx", "student-fp32-rtx",
    ]  # fmt: skip
    assert bundle.labels == tuple("0123456789")
    assert bundle.manifest.license == "Apache-2.0"


def test_every_number_can_be_walked_back_to_the_weights(bundle: Bundle, first: Ran) -> None:
    lineage = {stage.output_sha256: stage for stage in bundle.manifest.lineage}
    for variant in bundle.manifest.variants:
        assert lineage[variant.weights_sha256].stage in ("train", "prune", "distill")
    engines = [stage for stage in lineage.values() if stage.stage == "engine"]
    for stage in engines:
        graph = lineage[stage.parents[0]]
        weights = lineage[graph.parents[0]]
        assert graph.stage == "export"
        assert weights.settings["data"] == "digits"
    assert len(engines) == 3


def test_pruning_and_int8_really_shrink_the_tensors(bundle: Bundle) -> None:
    size = {variant.id: variant.memory for variant in bundle.manifest.variants}
    assert size["pruned-fp32"].weights_bytes < size["dense-fp32"].weights_bytes / 2
    assert size["dense-int8"].weights_bytes < size["dense-fp32"].weights_bytes / 3
    assert (size["pruned-fp32"].activation_bytes or 0) < (size["dense-fp32"].activation_bytes or 0)


def test_memory_is_measured_at_three_batches_for_every_graph(bundle: Bundle) -> None:
    for variant in bundle.manifest.variants:
        if variant.engine is None:
            assert [point.batch for point in variant.memory.measured] == [1, 8, 32]
            assert set(variant.metrics) >= {"validation_top1", "test_top1", "agreement"}


def test_engines_carry_all_that_is_needed_to_refuse_them(bundle: Bundle) -> None:
    info = bundle.manifest.variant("dense-fp32-rtx").engine
    assert info is not None
    assert info.targets == ("sm86",)  # sm75 cannot multiply float32 matrices in TensorRT-RTX
    assert [profile.batches for profile in info.profiles] == [(1, 1), (2, 32)]
    assert all(profile.activation_bytes for profile in info.profiles)


def test_what_could_not_be_built_is_said(first: Ran) -> None:
    assert "no engine for sm75: " in first.out
    assert "dense-fp32-rtx" in first.out
    if machine.runtimes_here()["tensorrt"]["cuda"] is not None:
        assert "no engine: " in first.out  # why TensorRT built none, and the line went on


def test_the_report_has_a_row_for_every_variant_and_runtime(first: Ran) -> None:
    rows = {(row.name, row.runtime): row for row in first.report.rows}
    dense = rows["dense-fp32", "onnxruntime"]
    assert dense.agreement == 1.0
    assert dense.top1 is not None
    assert dense.top1 > 0.5
    for (name, runtime), row in rows.items():
        if runtime == "onnxruntime":
            assert row.reason is None
            assert row.p50_ms is not None
        else:
            assert name.endswith("-rtx")
            assert row.weights_bytes
            assert row.activation_bytes
            assert row.reason is not None or row.p50_ms is not None


def test_a_second_run_makes_nothing_and_says_so(first: Ran) -> None:
    before = first.bundle.read_bytes()
    again = run(first.folder)
    assert "0 stages made, 20 cached (nothing had to be done again)" in again.out
    assert again.err.count("cached") == first.err.count("✔") == 20
    assert first.bundle.read_bytes() == before


def test_an_interrupted_training_goes_on_after_its_last_epoch(tmp_path: Path) -> None:
    job = replace(read_job("digits"), train=TrainJob("ds_cnn", TrainSettings(3), {"width": 2, "depth": 1}))
    notes: list[str] = []

    def make(folder: str, *, interrupted: bool) -> str:
        def on_progress(progress: Progress) -> None:
            if interrupted and (progress.epoch, progress.step) == (3, 1):
                raise KeyboardInterrupt
            notes.extend([progress.note] * bool(progress.note))

        stages = Stages(tmp_path / folder, lambda stage: None, lambda outcome: None)
        made = train_dense(Work(job, stages, on_progress))
        return load_checkpoint(made.folder / "checkpoint.safetensors").sha256

    with pytest.raises(KeyboardInterrupt):
        make("one", interrupted=True)
    (kept,) = (tmp_path / "one").iterdir()
    assert make("one", interrupted=False) == make("other", interrupted=False)
    assert notes == [f"goes on after epoch 2, kept in {kept}"]
    assert not list(tmp_path.rglob("*.resume"))


def test_a_damaged_stage_alone_is_made_again(first: Ran) -> None:
    (stage,) = (first.folder / "build" / "small").glob("quantize-student-int8-*")
    (stage / "model.onnx").write_bytes(b"damaged")
    again = run(first.folder)
    assert "1 stages made, 19 cached" in again.out


def test_the_bundle_runs_and_agrees_with_its_golden_outputs(first: Ran, bundle: Bundle) -> None:
    for name in ("dense-fp32", "student-int8"):
        with memopt.load(first.bundle, device="cpu", variant=name) as model:
            got = model(bundle.golden_inputs()["input"])
        expected = bundle.golden_outputs(name)[0]
        assert bundle.manifest.golden is not None
        assert np.abs(got - expected).max() <= bundle.manifest.golden.atol[name]


def test_json_is_one_document(first: Ran, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from memopt_export import cli

    monkeypatch.chdir(first.folder)
    with pytest.raises(SystemExit):
        cli.main(["pipeline", "job.toml", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["bundle"] == "dist/small.mopt"
    assert found["refused"]
    assert len(found["report"]["rows"]) == len(first.report.rows)


def test_what_is_chosen_is_within_a_point_of_the_best_on_validation(first: Ran, bundle: Bundle) -> None:
    top1 = {v.id: v.metrics["validation_top1"] for v in bundle.manifest.variants if v.engine is None}
    with memopt.load(first.bundle, device="cpu") as model:
        assert max(top1.values()) - top1[model.variant] <= 0.01 + 1e-9


def test_engines_claim_no_accuracy_that_nobody_measured(bundle: Bundle) -> None:
    assert all(not variant.metrics for variant in bundle.manifest.variants if variant.engine is not None)
