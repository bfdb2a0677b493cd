"""The whole way of the data, from a recipe to a packed, measured bundle. Every stage is cached by content."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from memopt import machine
from memopt.accuracy import agreement, sqnr_db, top1
from memopt.artifact import read_sidecar
from memopt.compare import cells, compare, save_arrays, subjects
from memopt.errors import BackendError, InputRefused
from memopt.files import sha256_file, write_atomically
from memopt.manifest import MemoryPoint, Stage
from memopt.ort_runtime import NAME as ORT
from memopt.probe import Request, measure
from memopt.report import Report, read_report
from memopt.strict_json import from_plain, to_json, to_plain
from memopt.tensors import Array
from memopt_export.graph import Graph, load_graph, save_graph
from memopt_export.job import Job
from memopt_export.pack import Contents, EnginePart, OnnxPart, engine_id, pack, run_graph
from memopt_export.recipe import Recipe
from memopt_export.stages import Outcome, Stages, tool_versions
from memopt_models.data import DataSet, Samples, open_data, open_samples

if TYPE_CHECKING:
    from memopt_models.checkpoint import Checkpoint
    from memopt_models.train import Progress

MEASURED_BATCHES = (1, 32)  # two points give the line that `fit_batch` reads
GOLDEN_SAMPLES = 8
PARITY_SAMPLES = 64
CALIBRATION_BATCH = 16
CHECKPOINT, MODEL, PROGRAM, ENGINE, NOTE = (
    "checkpoint.safetensors",
    "model.onnx",
    "model.pt2",
    "model.engine",
    "note.json",
)


@dataclass(frozen=True)
class Line:
    """What every stage needs: the job, its data, the cache, and whom to tell."""

    job: Job
    stages: Stages
    on_progress: Callable[[Progress], None]
    data_root: Path | None = None

    @cached_property
    def data(self) -> DataSet:
        """The data set, opened once."""
        return open_data(self.job.data, root=self.data_root)

    def network_of(self, name: str) -> str:
        """The network that the recipe names for "dense", "pruned" or "student"."""
        student = self.job.distill if name == "student" else None
        return student.network if student is not None else self.job.train.network

    def samples(self, split: str) -> Samples:
        """A split as the model's inputs."""
        return open_samples(self.job.data, split=split, inputs=(self.data.input_spec,), root=self.data_root)


@dataclass(frozen=True)
class Built:
    """One variant on its way into the bundle: an ONNX graph, or the engine made from one."""

    id: str
    network: str
    precision: str
    outcome: Outcome
    source: Built | None = None


@dataclass(frozen=True)
class Result:
    """What the pipeline leaves behind."""

    bundle: Path
    bundle_sha256: str
    report: Report
    report_path: Path
    refused: dict[str, str]  # engine and target -> why it could not be built
    made: int
    cached: int


def run(
    job: Job, *, work: Path, output: Path, on_start: Callable[[str], None], on_done: Callable[[Outcome], None],
    on_progress: Callable[[Progress], None], data_root: Path | None = None,
) -> Result:  # fmt: skip
    """Trains, prunes, distills, exports, quantizes, builds, measures, packs and compares.

    Args:
        job: what to do.
        work: the folder of finished stages; an interrupted run goes on from the last of them.
        output: the bundle; it and the report beside it belong to the pipeline and are replaced.
        on_start: told the name of each stage that has to be made.
        on_done: told each stage's outcome, made or cached.
        on_progress: told each step of training.
        data_root: where downloaded data lies.
    """
    done: list[Outcome] = []

    def finished(outcome: Outcome) -> None:
        done.append(outcome)
        on_done(outcome)

    line = Line(job, Stages(work, on_start, finished), on_progress, data_root)
    checkpoints = make_checkpoints(line)
    exported = {name: export_network(line, name, outcome) for name, outcome in checkpoints.items()}
    graphs = list(quantize_networks(line, exported))
    engines, refused = build_engines(line, graphs)
    measured = {built.id: measure_variant(line, built, graphs[0]) for built in graphs}
    packed = pack_bundle(line, checkpoints, graphs, engines, measured)
    report = compare_bundle(line, packed, {name: outcome.folder / PROGRAM for name, outcome in exported.items()})
    report_path = deliver(packed, report, output)
    cached = sum(outcome.cached for outcome in done)
    return Result(output, sha256_file(output), report, report_path, refused, len(done) - cached, cached)


def make_checkpoints(line: Line) -> dict[str, Outcome]:
    """The dense network, and the pruned and distilled ones that the job asks for."""
    checkpoints = {"dense": train_dense(line)}
    if line.job.prune is not None:
        checkpoints["pruned"] = prune_dense(line, checkpoints["dense"])
    if line.job.distill is not None:
        checkpoints["student"] = distill_student(line, checkpoints["dense"])
    return checkpoints


def train_dense(line: Line) -> Outcome:
    """The dense checkpoint."""
    asked = line.job.train

    def make(folder: Path) -> None:
        from memopt_models.train import train

        _save(train(asked.network, asked.settings, line.data, asked.how, on_step=line.on_progress), folder)

    return line.stages.run("train", {"job": asked, "data": line.data.fingerprint}, make)


def prune_dense(line: Line, dense: Outcome) -> Outcome:
    """The pruned and fine-tuned checkpoint."""
    asked = line.job.prune
    assert asked is not None

    def make(folder: Path) -> None:
        from memopt_models.prune import prune

        _save(prune(_load(dense, line.job.train.network), line.data, asked, on_step=line.on_progress), folder)

    return line.stages.run("prune", {"job": asked, "dense": dense.sha256, "data": line.data.fingerprint}, make)


def distill_student(line: Line, dense: Outcome) -> Outcome:
    """The student's checkpoint."""
    asked = line.job.distill
    assert asked is not None

    def make(folder: Path) -> None:
        from memopt_models.distill import distill

        student = distill(
            _load(dense, line.job.train.network),
            asked.network,
            asked.settings,
            line.data,
            asked.how,
            on_step=line.on_progress,
        )
        _save(student, folder)

    return line.stages.run("distill", {"job": asked, "dense": dense.sha256, "data": line.data.fingerprint}, make)


def export_network(line: Line, name: str, checkpoint: Outcome) -> Outcome:
    """The network as ONNX and as an exported program, parity proved on validation samples."""

    def make(folder: Path) -> None:
        from memopt_export.from_torch import export

        samples = line.samples("validation")
        exported = export(
            _load(checkpoint, line.network_of(name)), samples.feeds[line.data.input_spec.name][:PARITY_SAMPLES]
        )
        save_graph(exported.graph, folder / MODEL)
        (folder / PROGRAM).write_bytes(exported.program)
        _write_note(folder, {"parity": to_plain(exported.parity)})

    made_from = {"checkpoint": checkpoint.sha256, "data": line.data.fingerprint, "samples": PARITY_SAMPLES}
    return line.stages.run(f"export {name}", made_from, make)


def quantize_networks(line: Line, exported: Mapping[str, Outcome]) -> Iterator[Built]:
    """Every network in fp32 and in each precision that the job asks for; the dense fp32 one comes first."""
    for network, outcome in exported.items():
        yield Built(f"{network}-fp32", network, "fp32", outcome)
        for recipe in line.job.quantize.parsed:
            yield Built(f"{network}-{recipe.name}", network, recipe.name, _quantize(line, network, outcome, recipe))


def build_engines(line: Line, graphs: list[Built]) -> tuple[list[Built], dict[str, str]]:
    """An engine for each graph of the asked precisions, and why one could not be built."""
    asked = line.job.engine
    engines: list[Built] = []
    refused: dict[str, str] = {}
    for graph in graphs if asked is not None else []:
        if asked is None or graph.precision not in asked.precisions:
            continue
        name = engine_id(graph.id, asked.how.flavor)
        outcome = _build_engine(line, name, graph)
        refused |= {f"{name} {target}": why for target, why in _read_note(outcome)["refused"].items()}
        if ENGINE in outcome.files:
            engines.append(Built(name, graph.network, graph.precision, outcome, graph))
    return engines, refused


def measure_variant(line: Line, built: Built, reference: Built) -> Outcome:
    """Accuracy on validation and test, and the memory of the packed variant at two batches, each in a fresh process."""

    def make(folder: Path) -> None:
        samples = {split: line.samples(split) for split in ("validation", "test")}
        outputs = {split: _outputs(built, samples[split]) for split in samples}
        expected = outputs["validation"] if built is reference else _outputs(reference, samples["validation"])
        metrics = {f"{split}_top1": top1(outputs[split], _labels(samples[split])) for split in samples}
        metrics["agreement"] = agreement(outputs["validation"], expected)
        noise = sqnr_db(outputs["validation"], expected)
        metrics |= {"sqnr_db": noise} if np.isfinite(noise) else {}
        _write_note(folder, {"metrics": metrics, "points": _measure_points(built, samples["test"])})

    made_from = {
        "graph": built.outcome.sha256, "reference": reference.outcome.sha256, "data": line.data.fingerprint,
        "machine": machine.describe(), "batches": MEASURED_BATCHES,
    }  # fmt: skip
    return line.stages.run(f"measure {built.id}", made_from, make)


def pack_bundle(
    line: Line, checkpoints: Mapping[str, Outcome], graphs: list[Built], engines: list[Built],
    measured: Mapping[str, Outcome],
) -> Path:  # fmt: skip
    """The bundle with every variant, labels, preprocessing, golden samples, metrics and lineage."""

    def make(folder: Path) -> None:
        notes = {name: _read_note(outcome) for name, outcome in measured.items()}
        parts = [_onnx_part(built, notes[built.id]) for built in graphs]
        contents = Contents(
            name=line.job.name,
            parts=(*parts, *(_engine_part(built, notes) for built in engines)),
            labels=line.data.classes,
            preprocess=line.data.preprocess,
            golden_inputs=line.samples("test").take(GOLDEN_SAMPLES, seed=line.job.seed).feeds,
            lineage=tuple(_lineage(line, checkpoints, graphs, engines)),
            license=line.job.license,
            tools=tool_versions(),
        )
        pack(contents, folder / f"{line.job.name}.mopt")

    made_from = {
        "name": line.job.name, "license": line.job.license, "seed": line.job.seed, "data": line.data.fingerprint,
        "variants": [built.outcome.sha256 for built in (*graphs, *engines)],
        "measured": {name: outcome.sha256 for name, outcome in measured.items()},
    }  # fmt: skip
    return line.stages.run("pack", made_from, make).folder / f"{line.job.name}.mopt"


def compare_bundle(line: Line, bundle: Path, programs: Mapping[str, Path]) -> Report:
    """The report on every variant of the bundle, and on the networks in torch, judged on the test split."""
    asked = line.job.compare

    def make(folder: Path) -> None:
        torch_first = [
            replace(subject, name=f"{network}-fp32")
            for network, path in programs.items()
            for subject in subjects([path])
        ]
        samples = line.samples("test")
        todo = cells([*torch_first, *subjects([bundle])], batches=asked.batches, runtimes=asked.runtimes or None)
        report = compare(
            todo, samples.feeds, samples.labels,
            reference="dense-fp32", source=samples.source, machine=machine.describe(), on_row=None,
        )  # fmt: skip
        (folder / "report.json").write_text(report.to_json())

    made_from = {
        "bundle": sha256_file(bundle), "programs": {name: sha256_file(path) for name, path in programs.items()},
        "job": asked, "data": line.data.fingerprint, "machine": machine.describe(),
    }  # fmt: skip
    return read_report(line.stages.run("compare", made_from, make).read("report.json"))


def deliver(bundle: Path, report: Report, output: Path) -> Path:
    """Puts the bundle and its report where the user wants them; untouched when they are there already."""
    if not output.is_file() or sha256_file(output) != sha256_file(bundle):
        write_atomically(output, bundle.read_bytes(), force=True)
    report_path = output.with_suffix(".report.json")
    write_atomically(report_path, report.to_json().encode(), force=True)
    write_atomically(output.with_suffix(".report.md"), (report.to_markdown() + "\n").encode(), force=True)
    return report_path


def _quantize(line: Line, network: str, exported: Outcome, recipe: Recipe) -> Outcome:
    calibration = line.job.quantize.samples

    def make(folder: Path) -> None:
        from memopt_export.quantize import quantize

        train = line.samples("train")
        samples = train.take(min(calibration, len(train)), seed=line.job.seed)
        done = quantize(_graph(exported), recipe, samples, batch_size=CALIBRATION_BATCH)
        save_graph(done.graph, folder / MODEL)
        _write_note(folder, {"fused": done.fused, "kept_float": done.kept_float, "source": samples.source})

    made_from = {
        "graph": exported.files[MODEL], "recipe": recipe, "samples": calibration, "seed": line.job.seed,
        "data": line.data.fingerprint,
    }  # fmt: skip
    return line.stages.run(f"quantize {network}-{recipe.name}", made_from, make)


def _build_engine(line: Line, name: str, graph: Built) -> Outcome:
    """Builds for the targets that can take the graph; what was refused, and why, goes into the note."""
    assert line.job.engine is not None
    how = line.job.engine.how

    def make(folder: Path) -> None:
        from memopt_export.tensorrt_engine import build, save_engine, split_targets

        accepted, refused = split_targets(_graph(graph.outcome).model, how.targets, flavor=how.flavor)
        if accepted:
            try:
                save_engine(build(graph.outcome.read(MODEL), replace(how, targets=accepted)), folder / ENGINE)
            except BackendError as error:
                refused |= dict.fromkeys(accepted, error.problem)
        _write_note(folder, {"refused": refused})

    return line.stages.run(f"engine {name}", {"graph": graph.outcome.files[MODEL], "how": how}, make)


def _outputs(built: Built, samples: Samples) -> Array:
    graph = _graph(built.outcome)
    return np.concatenate([run_graph(graph, feeds)[0] for feeds in samples.batches(256)])


def _labels(samples: Samples) -> Array:
    if samples.labels is None:
        raise InputRefused(f"{samples.source} has no labels")
    return samples.labels


def _measure_points(built: Built, samples: Samples) -> list[MemoryPoint]:
    """The bill of the variant as it lies in a bundle, at MEASURED_BATCHES."""
    with tempfile.TemporaryDirectory(prefix="memopt-measure-") as name:
        folder = Path(name)
        pack(Contents(built.id, (OnnxPart(built.id, built.network, _graph(built.outcome)),)), folder / "draft.mopt")
        inputs = save_arrays(samples.feeds, folder)
        points = []
        for batch in MEASURED_BATCHES:
            request = Request(str(folder / "draft.mopt"), ORT, "cpu", batch, inputs, variant=built.id, runs=10)
            steady = measure(request).bill.phases["steady"]
            sizes = (steady.private_bytes, steady.file_backed_bytes, steady.peak_bytes)
            points.append(MemoryPoint(batch, *sizes, steady.method, ORT))
        return points


def _onnx_part(built: Built, note: Mapping[str, Any]) -> OnnxPart:
    points = from_plain(tuple[MemoryPoint, ...], note["points"], where=NOTE)
    return OnnxPart(built.id, built.network, _graph(built.outcome), note["metrics"], points)


def _engine_part(built: Built, notes: Mapping[str, Mapping[str, Any]]) -> EnginePart:
    """The engine, with the accuracy of the graph it was built from: a strongly typed engine computes the same."""
    assert built.source is not None
    return EnginePart(
        id=built.id,
        network=built.network,
        precision=built.precision,
        data=built.outcome.read(ENGINE),
        info=read_sidecar(built.outcome.folder / ENGINE),
        source=built.source.id,
        metrics=notes[built.source.id]["metrics"],
    )


def _lineage(
    line: Line, checkpoints: Mapping[str, Outcome], graphs: list[Built], engines: list[Built]
) -> Iterator[Stage]:
    """From the data to each artifact: the checkpoints' own stages, then one stage for each graph and engine."""
    seen: set[str] = set()
    weights = {}
    for name, outcome in checkpoints.items():
        checkpoint = _load(outcome, line.network_of(name))
        weights[name] = checkpoint.sha256
        for stage in checkpoint.lineage:
            if stage.output_sha256 not in seen:
                seen.add(stage.output_sha256)
                yield stage
    for built in graphs:
        settings = {"precision": built.precision} | _read_note(built.outcome)
        made_by = "export" if built.precision == "fp32" else "quantize"
        yield Stage(made_by, built.outcome.files[MODEL], (weights[built.network],), settings)
    for built in engines:
        assert built.source is not None
        yield Stage("engine", built.outcome.files[ENGINE], (built.source.outcome.files[MODEL],), {})


def _graph(outcome: Outcome) -> Graph:
    return load_graph(outcome.folder / MODEL)


def _load(outcome: Outcome, network: str) -> Checkpoint:
    from memopt_models.checkpoint import load_checkpoint

    return load_checkpoint(outcome.folder / CHECKPOINT, network=network)


def _save(checkpoint: Checkpoint, folder: Path) -> None:
    from memopt_models.checkpoint import save_checkpoint

    save_checkpoint(checkpoint, folder / CHECKPOINT)


def _write_note(folder: Path, note: Mapping[str, Any]) -> None:
    (folder / NOTE).write_text(to_json(dict(note)))


def _read_note(outcome: Outcome) -> dict[str, Any]:
    return dict(json.loads(outcome.read(NOTE)))
