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
from memopt.compare import Given, cells, compare, save_arrays, subjects
from memopt.cuda_driver import open_driver
from memopt.errors import BackendError, InputRefused, MemoptError
from memopt.files import refuse_to_overwrite, sha256_file, write_atomically
from memopt.judgement import Judgement
from memopt.manifest import MemoryPoint, Stage
from memopt.memory import STEADY
from memopt.ort_runtime import NAME as ORT
from memopt.page import render
from memopt.probe import Request, measure
from memopt.report import Report, read_report
from memopt.strict_json import from_plain, to_json, to_plain
from memopt.tensors import Array
from memopt_export.from_torch import PARITY_SAMPLES
from memopt_export.graph import Graph, load_graph, run_batches, save_graph
from memopt_export.job import Job
from memopt_export.pack import GOLDEN_SAMPLES, Contents, EnginePart, OnnxPart, engine_id, pack
from memopt_export.recipe import Recipe
from memopt_export.stages import Outcome, Stages, locked, tool_versions
from memopt_models.data import DataSet, Pictures, Samples, open_data, stream_samples
from memopt_models.factories import source_digest
from memopt_models.resume import Keep

if TYPE_CHECKING:
    from memopt_export.tensorrt_engine import EngineSettings
    from memopt_models.checkpoint import Checkpoint
    from memopt_models.train import Progress

MEASURED_BATCHES = (1, 8, 32)  # the points of the curve that `fit_batch` reads
CHECKPOINT, MODEL, PROGRAM, ENGINE, NOTE = (
    "checkpoint.safetensors",
    "model.onnx",
    "model.pt2",
    "model.engine",
    "note.json",
)


@dataclass(frozen=True)
class Work:
    """What every stage works with: the job, its data, the cache, and whom to tell."""

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

    def samples(self, split: str, *, at_most: int | None = None, seed: int = 0) -> Samples:
        """A split as the model's inputs, or `at_most` samples of it."""
        return self.stream(split, at_most=at_most, seed=seed).pick(slice(None))

    def stream(self, split: str, *, at_most: int | None = None, seed: int = 0) -> Samples | Pictures:
        """The same, prepared when they are read."""
        inputs = (self.data.input_spec,)
        return stream_samples(
            self.job.data, split=split, inputs=inputs, root=self.data_root, at_most=at_most, seed=seed
        )


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
    job: Job, *, folder: Path, output: Path, on_start: Callable[[str], None], on_done: Callable[[Outcome], None],
    on_progress: Callable[[Progress], None], data_root: Path | None = None,
) -> Result:  # fmt: skip
    """Trains, prunes, distills, exports, quantizes, builds, measures, packs and compares.

    Args:
        job: what to do.
        folder: of finished stages; an interrupted run goes on from the last of them.
        output: the bundle; it and the report beside it belong to the pipeline and are replaced.
        on_start: told the name of each stage that has to be made.
        on_done: told each stage's outcome, made or cached.
        on_progress: told each step of training.
        data_root: where downloaded data lies.
    """
    refuse_to_overwrite(output, force=True)
    done: list[Outcome] = []

    def finished(outcome: Outcome) -> None:
        done.append(outcome)
        on_done(outcome)

    work = Work(job, Stages(folder, on_start, finished), on_progress, data_root)
    with locked(folder, on_wait=lambda: on_start(f"waiting for the pipeline that works in {folder}")):
        report, refused = _follow(work, output)
    cached = sum(outcome.cached for outcome in done)
    return Result(output, sha256_file(output), report, report_of(output), refused, len(done) - cached, cached)


def _follow(work: Work, output: Path) -> tuple[Report, dict[str, str]]:
    """The line itself, read aloud."""
    checkpoints = make_checkpoints(work)
    exported = {name: export_network(work, name, outcome) for name, outcome in checkpoints.items()}
    graphs = list(quantize_networks(work, exported))
    engines, refused = build_engines(work, graphs)
    measured = {built.id: measure_variant(work, built, graphs[0]) for built in graphs}
    packed = pack_bundle(work, checkpoints, graphs, engines, measured)
    report = compare_bundle(work, packed, {name: outcome.folder / PROGRAM for name, outcome in exported.items()})
    deliver(packed, report, output)
    return report, refused


def make_checkpoints(work: Work) -> dict[str, Outcome]:
    """The dense network, and the pruned and distilled ones that the job asks for."""
    checkpoints = {"dense": train_dense(work)}
    if work.job.prune is not None:
        checkpoints["pruned"] = prune_dense(work, checkpoints["dense"])
    if work.job.distill is not None:
        checkpoints["student"] = distill_student(work, checkpoints["dense"])
    return checkpoints


def train_dense(work: Work) -> Outcome:
    """The dense checkpoint."""
    asked = work.job.train

    def make(keep: Keep) -> Checkpoint:
        from memopt_models.train import train

        return train(asked.network, asked.settings, work.data, asked.how, on_step=work.on_progress, keep=keep)

    made_from = {"job": asked, "code": source_digest(asked.network), "data": work.data.fingerprint}
    return _trained(work, "train", made_from, make)


def prune_dense(work: Work, dense: Outcome) -> Outcome:
    """The pruned and fine-tuned checkpoint."""
    asked = work.job.prune
    assert asked is not None

    def make(keep: Keep) -> Checkpoint:
        from memopt_export.planned_memory import planner
        from memopt_models.prune import prune

        begin = _load(dense, work.job.train.network)
        return prune(begin, work.data, asked, price=planner(), on_step=work.on_progress, keep=keep)

    made_from = {"job": asked, "dense": dense.sha256, "data": work.data.fingerprint}
    return _trained(work, "prune", made_from, make)


def distill_student(work: Work, dense: Outcome) -> Outcome:
    """The student's checkpoint."""
    asked = work.job.distill
    assert asked is not None

    def make(keep: Keep) -> Checkpoint:
        from memopt_models.distill import distill

        return distill(
            _load(dense, work.job.train.network),
            asked.network,
            asked.settings,
            work.data,
            asked.how,
            on_step=work.on_progress,
            keep=keep,
        )

    made_from = {
        "job": asked, "code": source_digest(asked.network), "dense": dense.sha256, "data": work.data.fingerprint,
    }  # fmt: skip
    return _trained(work, "distill", made_from, make)


def export_network(work: Work, name: str, checkpoint: Outcome) -> Outcome:
    """The network as ONNX and as an exported program, parity proved on validation samples."""

    def make(folder: Path) -> None:
        from memopt_export.from_torch import export

        samples = work.samples("validation")
        exported = export(
            _load(checkpoint, work.network_of(name)), samples.feeds[work.data.input_spec.name][:PARITY_SAMPLES]
        )
        save_graph(exported.graph, folder / MODEL)
        (folder / PROGRAM).write_bytes(exported.program)
        _write_note(folder, {"parity": to_plain(exported.parity)})

    made_from = {"checkpoint": checkpoint.sha256, "data": work.data.fingerprint, "samples": PARITY_SAMPLES}
    return work.stages.run(f"export {name}", made_from, make)


def quantize_networks(work: Work, exported: Mapping[str, Outcome]) -> Iterator[Built]:
    """Every network in fp32 and in each precision that the job asks for; the dense fp32 one comes first."""
    for network, outcome in exported.items():
        yield Built(f"{network}-fp32", network, "fp32", outcome)
        for recipe in work.job.quantize.parsed:
            yield Built(f"{network}-{recipe.name}", network, recipe.name, _quantize(work, network, outcome, recipe))


def build_engines(work: Work, graphs: list[Built]) -> tuple[list[Built], dict[str, str]]:
    """An engine for each graph of the asked precisions, and why one could not be built."""
    engines: list[Built] = []
    refused: dict[str, str] = {}
    wanted = [(each, graph) for each in work.job.engine for graph in graphs if graph.precision in each.precisions]
    for asked, graph in wanted:
        name = engine_id(graph.id, asked.how.flavor)
        try:
            outcome = _build_engine(work, name, graph, asked.how)
        except MemoptError as error:  # no driver, no memory, no such operator: said, not cached, and the line goes on
            refused[name] = error.problem
            continue
        refused |= {f"{name} {target}": why for target, why in _read_note(outcome)["refused"].items()}
        if ENGINE in outcome.files:
            engines.append(Built(name, graph.network, graph.precision, outcome, graph))
    return engines, refused


def measure_variant(work: Work, built: Built, reference: Built) -> Outcome:
    """Accuracy on validation and test, and the packed variant's memory at MEASURED_BATCHES, each in a fresh process."""

    def make(folder: Path) -> None:
        samples = {split: work.samples(split) for split in ("validation", "test")}
        outputs = {split: _outputs(built, samples[split]) for split in samples}
        expected = outputs["validation"] if built is reference else _outputs(reference, samples["validation"])
        metrics = {f"{split}_top1": top1(outputs[split], _labels(samples[split])) for split in samples}
        metrics["agreement"] = agreement(outputs["validation"], expected)
        noise = sqnr_db(outputs["validation"], expected)
        metrics |= {"sqnr_db": noise} if np.isfinite(noise) else {}
        _write_note(folder, {"metrics": metrics, "points": _measure_points(built, samples["test"])})

    made_from = {
        "graph": built.outcome.sha256, "reference": reference.outcome.sha256, "data": work.data.fingerprint,
        "machine": machine.describe(), "batches": MEASURED_BATCHES,
    }  # fmt: skip
    return work.stages.run(f"measure {built.id}", made_from, make)


def pack_bundle(
    work: Work, checkpoints: Mapping[str, Outcome], graphs: list[Built], engines: list[Built],
    measured: Mapping[str, Outcome],
) -> Path:  # fmt: skip
    """The bundle with every variant, labels, preprocessing, golden samples, metrics and lineage."""

    def make(folder: Path) -> None:
        notes = {name: _read_note(outcome) for name, outcome in measured.items()}
        parts = [_onnx_part(built, notes[built.id]) for built in graphs]
        golden = work.stream("test", at_most=GOLDEN_SAMPLES)
        contents = Contents(
            name=work.job.name,
            parts=(*parts, *(_engine_part(built) for built in engines)),
            labels=work.data.classes,
            preprocess=work.data.preprocess,
            golden_inputs=golden.pick(slice(None)).feeds,
            golden_pictures=golden.pictures if isinstance(golden, Pictures) else None,
            lineage=tuple(_lineage(work, checkpoints, graphs, engines)),
            license=work.job.license,
            tools=tool_versions(),
        )
        pack(contents, folder / f"{work.job.name}.mopt")

    made_from = {
        "name": work.job.name, "license": work.job.license, "data": work.data.fingerprint,
        "variants": {built.id: built.outcome.sha256 for built in (*graphs, *engines)},
        "checkpoints": {name: outcome.sha256 for name, outcome in checkpoints.items()},
        "measured": {name: outcome.sha256 for name, outcome in measured.items()},
    }  # fmt: skip
    return work.stages.run("pack", made_from, make).folder / f"{work.job.name}.mopt"


def compare_bundle(work: Work, bundle: Path, programs: Mapping[str, Path]) -> Report:
    """The report on every variant of the bundle, and on the networks in torch, judged on the test split."""
    asked = work.job.compare

    def make(folder: Path) -> None:
        torch_first = [
            replace(subject, name=f"{network}-fp32")
            for network, path in programs.items()
            for subject in subjects([path])
        ]
        samples = work.samples("test")
        found = [*torch_first, *subjects([bundle], trust_engines=True)]  # built by this very run
        todo = cells(found, batches=asked.batches, runtimes=asked.runtimes or None)
        report = compare(
            todo, Given(samples.feeds, samples.source, samples.fingerprint),
            Judgement(samples.labels, work.data.classes), reference="dense-fp32", machine=machine.describe(),
        )  # fmt: skip
        (folder / "report.json").write_text(report.to_json())

    made_from = {
        "bundle": sha256_file(bundle), "programs": {name: sha256_file(path) for name, path in programs.items()},
        "job": asked, "data": work.data.fingerprint, "machine": machine.describe(),
    }  # fmt: skip
    return read_report(work.stages.run("compare", made_from, make).read("report.json"))


def deliver(bundle: Path, report: Report, output: Path) -> None:
    """Puts the bundle and its report where the user wants them; what is there already stays untouched."""
    _put(output, bundle.read_bytes())
    _put(report_of(output), report.to_json().encode())
    _put(output.with_suffix(".report.md"), (report.to_markdown() + "\n").encode())
    _put(output.with_suffix(".report.html"), render(report).encode())


def report_of(bundle: Path) -> Path:
    """Where the report on this bundle lies."""
    return bundle.with_suffix(".report.json")


def _put(path: Path, data: bytes) -> None:
    if not path.is_file() or path.read_bytes() != data:
        write_atomically(path, data, force=True)


def _trained(work: Work, stage: str, made_from: Mapping[str, Any], make: Callable[[Keep], Checkpoint]) -> Outcome:
    """A stage that trains. What it keeps lies beside its folder: an interrupted one goes on after its last epoch."""

    def save(folder: Path) -> None:
        keep = Keep(work.stages.folder_of(stage, made_from))
        _save(make(keep), folder)
        keep.forget()

    return work.stages.run(stage, made_from, save)


def _quantize(work: Work, network: str, exported: Outcome, recipe: Recipe) -> Outcome:
    asked = work.job.quantize

    def make(folder: Path) -> None:
        from memopt_export.quantize import quantize

        samples = work.samples("train", at_most=asked.samples, seed=asked.seed)
        done = quantize(_graph(exported), recipe, samples)
        save_graph(done.graph.with_seed(asked.seed), folder / MODEL)
        _write_note(folder, {"fused": done.fused, "kept_float": done.kept_float, "source": samples.source})

    made_from = {
        "graph": exported.files[MODEL], "recipe": recipe, "samples": asked.samples, "seed": asked.seed,
        "data": work.data.fingerprint,
    }  # fmt: skip
    return work.stages.run(f"quantize {network}-{recipe.name}", made_from, make)


def _build_engine(work: Work, name: str, graph: Built, how: EngineSettings) -> Outcome:
    """Builds for the targets that can take the graph; what was refused, and why, goes into the note."""

    def make(folder: Path) -> None:
        from memopt_export.tensorrt_engine import build, save_engine, split_targets

        accepted, refused = split_targets(_graph(graph.outcome).model, how.targets, flavor=how.flavor)
        if accepted:
            save_engine(build(graph.outcome.read(MODEL), replace(how, targets=accepted)), folder / ENGINE)
        _write_note(folder, {"refused": refused})

    made_from = {"graph": graph.outcome.files[MODEL], "how": how, "gpu": _gpu()}
    return work.stages.run(f"engine {name}", made_from, make)


def _gpu() -> str | None:
    """The GPU of this machine, for which "local" builds; None without a driver."""
    try:
        return open_driver().sm
    except BackendError:
        return None


def _outputs(built: Built, samples: Samples) -> Array:
    return np.concatenate([outputs[0] for outputs in run_batches(_graph(built.outcome), samples.batches(256))])


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
            bill = measure(request).bill
            steady = bill.phases[STEADY]
            sizes = (steady.private_bytes, steady.file_backed_bytes, bill.peak_bytes)
            points.append(MemoryPoint(batch, *sizes, steady.method, ORT))
        return points


def _onnx_part(built: Built, note: Mapping[str, Any]) -> OnnxPart:
    points = from_plain(tuple[MemoryPoint, ...], note["points"], where=NOTE)
    return OnnxPart(built.id, built.network, _graph(built.outcome), note["metrics"], points)


def _engine_part(built: Built) -> EnginePart:
    """The engine, without metrics: nothing has measured it."""
    assert built.source is not None
    return EnginePart(
        id=built.id,
        network=built.network,
        precision=built.precision,
        data=built.outcome.read(ENGINE),
        info=read_sidecar(built.outcome.folder / ENGINE),
        source=built.source.id,
    )


def _lineage(
    work: Work, checkpoints: Mapping[str, Outcome], graphs: list[Built], engines: list[Built]
) -> Iterator[Stage]:
    """From the data to each artifact: the checkpoints' own stages, then one stage for each graph and engine."""
    seen: set[str] = set()
    weights = {}
    for name, outcome in checkpoints.items():
        checkpoint = _load(outcome, work.network_of(name))
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
    return load_graph(outcome.folder / MODEL, checked=True)  # the stage's record has its sha256


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
