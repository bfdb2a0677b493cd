"""What commands do: each reads its files, makes one call, writes its files, and returns what there is to show.

Those of training, of quantization and of bundles have modules of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from memopt import machine
from memopt.artifact import open_artifact, read_sidecar
from memopt.batching import MemoryCurve, engine_curve, largest_batch, memory_curve
from memopt.bundle import open_bundle
from memopt.compare import (
    DEVICES,
    Given,
    Listener,
    Subject,
    cells,
    compare,
    expect_artifact,
    is_bundle,
    retimed,
    subjects,
)  # fmt: skip
from memopt.errors import InputRefused, MemoptError, UsageError
from memopt.files import refuse_own_input, refuse_to_overwrite, sha256_file, write_atomically
from memopt.gate import hold_against, parse_tolerances
from memopt.judgement import Judgement
from memopt.manifest import EngineInfo, PlannedPoint
from memopt.report import Report, read_report
from memopt.tensors import TensorSpec

if TYPE_CHECKING:
    from memopt_export.from_torch import Parity
    from memopt_export.graph import Graph
    from memopt_export.pipeline import Result
    from memopt_export.plan import Plan
    from memopt_export.stages import Outcome
    from memopt_models.checkpoint import Checkpoint
    from memopt_models.data import Samples
    from memopt_models.train import OnStep

_TIMED_AGAIN = 2  # times, at most, what seems slower than in an earlier report


@dataclass(frozen=True)
class SavedGraph:
    """An exported graph on disk, with the proof that it computes what torch does."""

    path: str
    size_bytes: int
    sha256: str
    weights_sha256: str
    parity: Parity
    precision: str = "fp32"  # of its weights and activations
    program: str | None = None


@dataclass(frozen=True)
class SavedSimple:
    """A simplified graph on disk, and what it was before."""

    path: str
    sha256: str
    nodes: int
    size_bytes: int
    source_nodes: int
    source_bytes: int


@dataclass(frozen=True)
class CompareRequest:
    """What is asked of `compare`."""

    data: str
    batches: tuple[int, ...] = (1, 32)
    runtimes: tuple[str, ...] = ()  # none: every one that opens the artifact
    devices: tuple[str, ...] = DEVICES
    reference: str | None = None
    samples: int | None = None
    seed: int = 0
    soak: int | None = None  # runs over which private memory is watched
    metric: str | None = None  # pkg.mod:function
    confusion: bool = False
    against: Path | None = None  # an earlier report
    tolerances: tuple[str, ...] = ()
    html: Path | None = None
    trust_engines: bool = False
    data_root: Path | None = None
    force: bool = False

    def judge(self) -> Callable[[Report], Report]:
        """What holds a report against the earlier one, which is read, as the tolerances are, before anything runs."""
        if self.against is None:
            if self.tolerances:
                raise UsageError("--tolerance means nothing alone", hint="--against base.json")
            return lambda report: report
        tolerances, where = parse_tolerances(self.tolerances), str(self.against)
        base = read_report(_read_bytes(self.against))
        return lambda report: replace(report, gate=hold_against(report, base, tolerances, where=where))

    def judgement(self, given: Samples, inputs: Sequence[TensorSpec]) -> Judgement:
        """What the outputs of models with these inputs are judged by."""
        from memopt_models.data import is_data_set, open_data
        from memopt_models.factories import load_factory

        named = self.confusion and is_data_set(self.data, inputs)
        return Judgement(
            labels=given.labels,
            classes=open_data(self.data, root=self.data_root).classes if named else (),
            confusion=self.confusion,
            metric=load_factory(self.metric) if self.metric is not None else None,
            metric_name=self.metric,
        )


@dataclass(frozen=True)
class SavedEngine:
    """A TensorRT engine on disk, and the targets that could not be served."""

    path: str | None
    size_bytes: int
    info: EngineInfo | None
    refused: dict[str, str]


@dataclass(frozen=True)
class Plans:
    """The static memory plan of one graph at several batches, and the largest batch within a budget."""

    path: str
    plans: tuple[Plan, ...]
    budget_bytes: int | None = None
    largest_batch: int | None = None
    # (batch, bytes of tensors that a run asked for), without what kernels take while they run
    measured: tuple[tuple[int, int | None], ...] = ()
    measured_by: str | None = None
    svg: str | None = None  # where the first plan's picture is
    reordered: str | None = None  # where the graph in another order is
    peak_before_bytes: int | None = None  # of the order in the file, where another one was sought

    @property
    def fits(self) -> bool:
        """Whether something fits into the budget; true without one."""
        return self.budget_bytes is None or self.largest_batch is not None

    @property
    def line(self) -> tuple[float, float] | None:
        """Activations over the batch, as measured: bytes that are there at any batch, and bytes of each sample."""
        if len(self.measured) < 2 or any(size is None for _, size in self.measured):
            return None
        (one, low), (other, high) = self.measured[0], self.measured[-1]
        each = ((high or 0) - (low or 0)) / (other - one)
        return (low or 0) - each * one, each


@dataclass(frozen=True)
class Need:
    """What one artifact needs at each batch asked for, in bytes, and who says so; None where that is not known."""

    name: str
    runtime: str
    weights_bytes: int | None
    points: tuple[tuple[int, int | None], ...]
    largest_batch: int | None
    method: str


@dataclass(frozen=True)
class Needs:
    """What an engine, or each variant of a bundle, needs by the numbers it carries."""

    path: str
    needs: tuple[Need, ...]
    budget_bytes: int | None = None

    @property
    def fits(self) -> bool:
        """Whether something is known to fit into the budget; true without one."""
        return self.budget_bytes is None or any(need.largest_batch is not None for need in self.needs)


@dataclass(frozen=True)
class Diagnosis:
    """The machine, its runtimes, and why one is unavailable."""

    machine: dict[str, str]
    runtimes: dict[str, dict[str, str | None]]
    builders: dict[str, str | None]
    tools: dict[str, str]


def export(
    source: str, data: str | None, output: Path, *, samples: int, network: str | None = None,
    program: Path | None = None, compact: bool = False, views: int | None = None, uint8: bool = False,
    data_root: Path | None = None, force: bool = False,
) -> SavedGraph:  # fmt: skip
    """A checkpoint, or the module that `pkg.mod:factory` makes, as ONNX; with `uint8` its input are pictures."""
    from memopt_export import from_torch, uint8_input
    from memopt_export.graph import save_graph
    from memopt_models.data import open_samples

    for path in filter(None, (output, program)):
        refuse_to_overwrite(path, force=force)
    checkpoint = _checkpoint_of(source, network, data, data_root)
    spec = data or _data_of(checkpoint)
    found = partial(open_samples, spec, split="validation", root=data_root, at_most=samples)
    floats = found(inputs=checkpoint.inputs, preprocess=checkpoint.preprocess).feeds[checkpoint.inputs[0].name]
    exported = from_torch.export(checkpoint, floats, compact=compact and not uint8, views=views)
    if uint8:
        wanted = uint8_input.take_pictures(exported.graph)
        pictures = found(inputs=wanted.inputs, preprocess=wanted.preprocess).feeds[wanted.inputs[0].name]
        exported = uint8_input.with_uint8_input(exported, pictures, floats, compact=compact)
    save_graph(exported.graph, output, force=force)
    if program is not None:
        write_atomically(program, exported.program, force=force)
    return SavedGraph(
        str(output), output.stat().st_size, exported.graph.sha256, exported.graph.weights_sha256, exported.parity,
        exported.graph.precision, str(program) if program else None,
    )  # fmt: skip


def simplify(
    model: Path, output: Path, *, external: bool = False, compact: bool = False, force: bool = False
) -> SavedSimple:
    """The same function in a file without what it does not need."""
    from memopt_export import compact as compacting
    from memopt_export import simplify as simplifying
    from memopt_export.graph import load_graph, save_graph

    refuse_to_overwrite(output, force=force)
    refuse_own_input(output, [model])
    graph = load_graph(model)
    before = sum(file.stat().st_size for file in (model, model.with_name(model.name + ".data")) if file.is_file())
    done = compacting.compact(graph) if compact else simplifying.simplify(graph)
    save_graph(done, output, force=force, external=external)
    size = sum(file.stat().st_size for file in (output, output.with_name(output.name + ".data")) if file.is_file())
    return SavedSimple(
        str(output), sha256_file(output), len(done.model.graph.node), size, len(graph.model.graph.node), before
    )


def engine(
    model: Path, flavor: str, targets: Sequence[str], batches: Sequence[tuple[int, int, int]], output: Path, *,
    weight_streaming: bool = False, force: bool = False, timeout_s: float = 600.0,
) -> SavedEngine:  # fmt: skip
    """A TensorRT engine with its sidecar, for the targets that can take the graph; the others with their reasons."""
    from memopt_export.graph import load_graph
    from memopt_export.tensorrt_engine import EngineSettings, build, save_engine, split_targets

    refuse_to_overwrite(output, force=force)
    how = EngineSettings(flavor, tuple(targets), tuple(batches), weight_streaming)
    accepted, refused = split_targets(load_graph(model).model, how.targets, flavor=how.flavor)
    if not accepted:
        return SavedEngine(None, 0, None, refused)
    built = build(model, replace(how, targets=accepted), timeout_s=timeout_s)
    save_engine(built, output, force=force)
    return SavedEngine(str(output), len(built.data), built.info, refused)


def plan(
    model: Path, batches: Sequence[int], budget_bytes: int | None, *, dims: Mapping[str, int], svg: Path | None,
    reordered: Path | None, measure: bool, force: bool,
) -> Plans:  # fmt: skip
    """The static memory plan, and the largest batch whose weights, inputs and activations fit into the budget.

    Args:
        model: an .onnx file.
        batches: to plan; free dimensions that `dims` does not name are as large.
        budget_bytes: for all of it, or None.
        dims: sizes of free dimensions by name.
        svg: where a picture of the first plan goes, or None.
        reordered: where the graph goes in an order of nodes that needs less, if there is one, or None.
        measure: whether the smallest and the largest batch are run too, on zeros.
        force: whether existing files may be replaced.

    Raises:
        UsageError: no input has a free dimension of that name, or a file exists and `force` is not given.
    """
    from memopt_export import plan as planning
    from memopt_export.graph import load_graph, save_graph
    from memopt_export.hollow import as_executed
    from memopt_export.order import reorder
    from memopt_export.plan_svg import draw

    for path in filter(None, (svg, reordered)):
        refuse_to_overwrite(path, force=force)
    graph = load_graph(model)
    _check_dims(graph, dims)
    found = reorder(graph, batch=batches[0]) if reordered is not None else None
    executed = as_executed(found.graph if found is not None else graph)
    plans = tuple(planning.plan(executed, batch=batch, dims=dims) for batch in batches)
    largest = planning.largest_batch(executed, budget_bytes, dims=dims) if budget_bytes is not None else None
    if svg is not None:
        write_atomically(svg, draw(plans[0], title=model.name).encode(), force=force)
    if reordered is not None and found is not None and found.helps:
        save_graph(found.graph, reordered, force=force)
    measured = _allocated(model, graph, batches, dims) if measure else ((), None)
    return Plans(
        str(model), plans, budget_bytes, largest, *measured,
        svg=str(svg) if svg is not None else None,
        reordered=str(reordered) if found is not None and found.helps else None,
        peak_before_bytes=found.before_bytes if found is not None else None,
    )  # fmt: skip


def _allocated(
    model: Path, graph: Graph, batches: Sequence[int], dims: Mapping[str, int]
) -> tuple[tuple[tuple[int, int | None], ...], str | None]:
    """What runs at the smallest and the largest batch asked ONNX Runtime's allocator for, and by which method."""
    from memopt.ort_allocator import allocator_use

    low, high = min(batches), max(batches)
    high = high if high > low else 2 * low
    found, method = [], None
    for batch in (low, high) if graph.fixed_batch is None else (low,):
        feeds = {
            spec.name: np.zeros([d if isinstance(d, int) else dims.get(d, batch) for d in spec.shape], spec.dtype)
            for spec in graph.inputs
        }
        use = allocator_use(open_artifact(model), feeds, device="cpu", threads=0)
        found.append((batch, use.activation_bytes))
        method = use.method
    return tuple(found), method


def needs(path: Path, batches: Sequence[int], budget_bytes: int | None) -> Needs:
    """What an engine or a bundle says of itself: TensorRT's figures of each profile, or memory measured at `pack`."""
    if path.suffix == ".engine":
        info = read_sidecar(path)
        curves = [(path.stem, info.flavor, info.weights_bytes, engine_curve(info, info.weights_bytes))]
    else:
        curves = [
            (variant.id, variant.runtime, variant.memory.weights_bytes,
             memory_curve(variant, runtime=variant.runtime, device="cuda" if variant.engine is not None else "cpu"))
            for variant in open_bundle(path).manifest.variants
        ]  # fmt: skip
    return Needs(str(path), tuple(_need(*each, batches, budget_bytes) for each in curves), budget_bytes)


def _need(
    name: str, runtime: str, weights_bytes: int | None, curve: MemoryCurve | None, batches: Sequence[int],
    budget_bytes: int | None,
) -> Need:  # fmt: skip
    if curve is None:
        return Need(name, runtime, weights_bytes, tuple((batch, None) for batch in batches), None, "not known")
    points = tuple((batch, curve.at(batch) if batch <= curve.last_batch else None) for batch in batches)
    fits = budget_bytes is not None and curve.at(1) <= budget_bytes
    largest = largest_batch(curve, budget_bytes).batch if fits and budget_bytes is not None else None
    return Need(name, runtime, weights_bytes, points, largest, curve.method)


def _check_dims(graph: Graph, dims: Mapping[str, int]) -> None:
    free = sorted({dim for spec in graph.inputs for dim in spec.shape if isinstance(dim, str)})
    for name in dims:
        if name not in free:
            raise UsageError(f"no input has a free dimension called {name!r}", hint=", ".join(free) or "there is none")


def compare_files(paths: Sequence[Path], request: CompareRequest, listener: Listener | None = None) -> Report:
    """Memory, accuracy and latency of every artifact in these files, on the test split; the page where it is wanted.

    Every graph passes the pre-flight once. What is refused keeps a row with the reason, unless everything is. What
    seems slower than in the earlier report is timed again, and the reference with it, before that is believed.
    """
    from memopt.page import render
    from memopt_models.data import open_samples

    if request.html is not None:
        refuse_to_overwrite(request.html, force=request.force)
        refuse_own_input(request.html, paths)
    judge = request.judge()
    seen, refused = _look_at(paths)
    opened = partial(
        open_samples, request.data, split="test", root=request.data_root, at_most=request.samples, seed=request.seed
    )
    forms = {
        each.takes_pictures: (each.inputs, each.preprocess)
        for each in reversed(list(seen.values()))
        if each.inputs is not None
    }
    inputs, steps = forms.get(False) or forms[True]
    given = opened(inputs=inputs, preprocess=steps)
    pictures = opened(inputs=forms[True][0], preprocess=forms[True][1]).feeds if len(forms) == 2 else {}
    found = [
        seen[subject.path].told_of(subject) if subject.path in seen else subject
        for subject in subjects(paths, trust_engines=request.trust_engines, refused=refused)
    ]
    todo = cells(found, batches=request.batches, runtimes=request.runtimes or None, devices=request.devices)
    on = Given(given.feeds, given.source, given.fingerprint, pictures)
    report = compare(
        todo, on, request.judgement(given, inputs),
        reference=request.reference, machine=machine.describe(), soak_runs=request.soak, listener=listener,
    )  # fmt: skip
    report = judge(report)
    for _ in range(_TIMED_AGAIN):
        slower = report.gate.slower if report.gate is not None else ()
        if slower:
            doubted = [cell for cell in todo if cell.subject.name == report.reference or cell.key in slower]
            again = compare(doubted, on, Judgement(), reference=report.reference, soak_runs=0, listener=listener)
            report = judge(retimed(report, again))
    if request.html is not None:
        write_atomically(request.html, render(report).encode(), force=request.force)
    return report


def doctor() -> Diagnosis:
    """The machine, what runs and builds on it, and why something does not."""
    from memopt_export.stages import tool_versions
    from memopt_export.tensorrt_engine import flavors_available

    return Diagnosis(machine.describe(), machine.runtimes_here(), dict(flavors_available()), tool_versions())


def pipeline(
    recipe: str, *, work: Path | None, output: Path | None, data_root: Path | None,
    on_start: Callable[[str], None], on_done: Callable[[Outcome], None], on_progress: OnStep,
) -> Result:  # fmt: skip
    """The whole line, from a recipe to a packed, measured bundle."""
    from memopt_export import pipeline as line
    from memopt_export.job import read_job

    job = read_job(recipe)
    return line.run(
        job,
        folder=work or Path("build") / job.name,
        output=output or Path("dist") / f"{job.name}.mopt",
        on_start=on_start,
        on_done=on_done,
        on_progress=on_progress,
        data_root=data_root,
    )


def _checkpoint_of(source: str, network: str | None, data: str | None, data_root: Path | None) -> Checkpoint:
    """The checkpoint in a file, or the untrained one of a user's factory with inputs and classes of the data."""
    from memopt_models.checkpoint import load_checkpoint

    if source.endswith(".safetensors") or ":" not in source:
        return load_checkpoint(Path(source), network=network)
    from memopt_models.data import open_data
    from memopt_models.train import TrainSettings, begin

    if data is None:
        raise UsageError(f"{source} does not say what its inputs are", hint="--data SPEC")
    return begin(source, {}, open_data(data, root=data_root), TrainSettings(epochs=1), start=None)


def _data_of(checkpoint: Checkpoint) -> str:
    """The data set that the checkpoint was last trained on."""
    from memopt_models.data import is_known

    settings = [stage.settings for stage in reversed(checkpoint.lineage)]
    named = next((str(each.get("spec", each.get("data"))) for each in settings if "data" in each), None)
    if named is None or not is_known(named):  # a file may name a data set of ours, never code to run
        raise UsageError("parity is proved on real samples, and the checkpoint names no data set", hint="--data SPEC")
    return named


@dataclass(frozen=True)
class _Seen:
    """What is known of the artifact in a file before it runs; a bundle knows of itself what is planned."""

    inputs: tuple[TensorSpec, ...] | None = None
    precision: str | None = None
    weights_bytes: int | None = None
    planned: tuple[PlannedPoint, ...] = ()
    preprocess: tuple[dict[str, Any], ...] | None = None

    @property
    def takes_pictures(self) -> bool:
        """Whether its first input is uint8."""
        return self.inputs is not None and [spec.dtype for spec in self.inputs[:1]] == ["uint8"]

    def told_of(self, subject: Subject) -> Subject:
        """The subject with all of that."""
        subject = replace(subject, takes_pictures=self.takes_pictures)
        if self.weights_bytes is None:
            return subject
        return replace(subject, precision=self.precision, weights_bytes=self.weights_bytes, planned=self.planned)


def _look_at(paths: Sequence[Path]) -> tuple[dict[Path, _Seen], dict[Path, str]]:
    """What is known of the artifacts in these files, and why others cannot be opened. A graph passes the pre-flight.

    Raises:
        MemoptError: none of them can, for the reason of the first; or none says what it expects.
    """
    for path in paths:
        expect_artifact(path)
    seen: dict[Path, _Seen] = {}
    refused: dict[Path, MemoptError] = {}
    for path in dict.fromkeys(paths):
        try:
            seen[path] = _see(path)
        except MemoptError as error:
            refused[path] = error
    if not seen:
        raise next(iter(refused.values()))
    if all(each.inputs is None for each in seen.values()):
        raise UsageError("an engine alone does not name its inputs", hint="compare it with its .onnx, or in a bundle")
    return seen, {path: error.problem for path, error in refused.items()}


def _see(path: Path) -> _Seen:
    from memopt.torch_runtime import read_specs
    from memopt_export.graph import load_graph
    from memopt_export.pack import planned_points

    if is_bundle(path):
        manifest = open_bundle(path, verify="off").manifest
        return _Seen(manifest.inputs, preprocess=manifest.preprocess or None)
    if path.suffix == ".pt2":
        return _Seen(read_specs(path)["inputs"])
    if path.suffix == ".onnx":
        graph = load_graph(path)
        weights_bytes = sum(graph.weights_bytes().values())
        return _Seen(graph.inputs, graph.precision, weights_bytes, planned_points(graph), graph.preprocess)
    read_sidecar(path)
    return _Seen()


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputRefused(f"{path} cannot be read: {error.strerror}") from error
