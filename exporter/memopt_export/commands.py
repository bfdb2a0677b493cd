"""What each command does: reads its files, makes one call, writes its files, and returns what there is to show."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from memopt import machine
from memopt.accuracy import max_difference
from memopt.artifact import Artifact, open_artifact, read_sidecar
from memopt.batching import MemoryCurve, engine_curve, largest_batch, memory_curve
from memopt.bundle import Bundle, open_bundle
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
from memopt.errors import InputRefused, MemoptError, UsageError, first_line
from memopt.files import refuse_to_overwrite, sha256_file, write_atomically
from memopt.gate import hold_against, parse_tolerances
from memopt.judgement import Judgement
from memopt.manifest import EngineInfo, PlannedPoint
from memopt.preprocess import prepare
from memopt.report import Report, read_report
from memopt.runtimes import runtime
from memopt.session import Runtime
from memopt.tensors import Array, TensorSpec

if TYPE_CHECKING:
    from memopt_export import pack as packing
    from memopt_export.budget import Sensitivity
    from memopt_export.findings import Finding
    from memopt_export.from_torch import Parity
    from memopt_export.graph import Graph
    from memopt_export.judge import Verdict
    from memopt_export.means import Means, Step
    from memopt_export.pipeline import Result
    from memopt_export.plan import Plan
    from memopt_export.quantize import Quantized
    from memopt_export.recipe import Recipe, RecipeFile
    from memopt_export.stages import Outcome
    from memopt_models.checkpoint import Checkpoint
    from memopt_models.data import Pictures, Samples
    from memopt_models.train import OnStep

_TIMED_AGAIN = 2  # times, at most, what seems slower than in an earlier report
_JUDGED_SAMPLES = 512  # of the validation split, on which `quantize` compares with the float graph


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
class QuantizeRequest:
    """What is asked of `quantize`. What is None or empty was not said: the recipe file says it, or the default holds.

    The first fields are those of `memopt_export.recipe.RecipeFile`, and go before what the file `recipe` says.
    """

    precision: str | None = None
    target: str | None = None
    data: str | None = None
    samples: int | None = None
    seed: int | None = None
    batch_size: int | None = None
    calibration: str | None = None
    percentile: float | None = None
    correction: str | None = None
    equalize: bool | None = None
    weight_bits: int | None = None
    group_size: int | None = None
    convert_io: bool | None = None
    exclude: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    recipe: Path | None = None
    save_recipe: Path | None = None
    max_drop: float | None = None  # percentage points of top-1
    min_sqnr: float | None = None  # dB
    sensitivity: bool = False
    memory_limit: int | None = None  # bytes
    external_data: bool = False
    measure: bool = True
    data_root: Path | None = None
    force: bool = False

    @property
    def needs_data(self) -> str | None:
        """The first option that means nothing without samples."""
        options = {
            "--max-drop": self.max_drop, "--min-sqnr": self.min_sqnr, "--sensitivity": self.sensitivity or None,
            "--memory-limit": self.memory_limit,
        }  # fmt: skip
        return next((name for name, value in options.items() if value is not None), None)


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
class SavedQuantized:
    """A quantized graph on disk, held against the float one on samples that did not calibrate it.

    `recipe` is what made it: the layers that a budget kept in float are excluded in it. `holds` is None without one.
    `findings` are what costs bytes in it and need not; `unseen` says what could not be looked at.
    """

    path: str
    precision: str
    sha256: str
    recipe: RecipeFile
    calibrated: str | None
    kept_float: tuple[str, ...]
    notes: tuple[str, ...]
    verdict: Verdict
    ranking: tuple[Sensitivity, ...] = ()
    holds: bool | None = None
    reached: str | None = None
    recipe_path: str | None = None
    findings: tuple[Finding, ...] = ()
    unseen: tuple[str, ...] = ()

    def refusal(self, *, strict: bool) -> str | None:
        """Why the answer is no; None where it is yes. Flags count where one is strict."""
        if self.holds is False:
            return f"the budget does not hold: {self.reached}"
        return f"--strict: {'; '.join(self.verdict.flags)}" if strict and self.verdict.flags else None


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
class Packed:
    """A bundle on disk, or what else `pack` writes."""

    path: str
    format: str
    size_bytes: int
    sha256: str | None  # of a single file
    variants: tuple[str, ...]
    files: int
    signed_by: str | None = None
    left_out: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SavedKey:
    """A pair of keys on disk."""

    path: str
    public_path: str
    key_id: str


@dataclass(frozen=True)
class Predicted:
    """The classes of each picture, best first, and why this variant ran."""

    variant: str
    why: tuple[str, ...]
    pictures: tuple[tuple[str, tuple[tuple[str, float], ...]], ...]  # (file, ((label, probability), ...))


PREPROCESSING = "preprocessing"  # stands for a variant in the row of the golden pictures


@dataclass(frozen=True)
class Replay:
    """One variant against the golden outputs, on one runtime of this machine; or the pictures against the inputs."""

    variant: str
    runtime: str
    max_difference: float | None
    atol: float | None
    reason: str | None = None
    excused: bool = False  # this machine lacks what the variant needs

    @property
    def holds(self) -> bool:
        """Whether the outputs are the golden ones, or cannot be had on this machine."""
        if self.max_difference is None or self.atol is None:
            return self.excused
        return self.max_difference <= self.atol


@dataclass(frozen=True)
class Verification:
    """A bundle whose structure and digests hold, and what its variants compute here."""

    path: str
    files: int
    size_bytes: int
    replays: tuple[Replay, ...] = ()
    signed_by: str | None = None  # the trusted key whose signature holds
    signatures: tuple[str, ...] = ()  # the keys that claim to have signed

    @property
    def holds(self) -> bool:
        """Whether every variant that runs here gives the golden outputs, and, where that was asked, one does run."""
        ran = [replay for replay in self.replays if not replay.excused and replay.variant != PREPROCESSING]
        return all(replay.holds for replay in self.replays) and (bool(ran) or not self.replays)


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
    _refuse_own_input(output, [model])
    graph = load_graph(model)
    before = sum(file.stat().st_size for file in (model, model.with_name(model.name + ".data")) if file.is_file())
    done = compacting.compact(graph) if compact else simplifying.simplify(graph)
    save_graph(done, output, force=force, external=external)
    size = sum(file.stat().st_size for file in (output, output.with_name(output.name + ".data")) if file.is_file())
    return SavedSimple(
        str(output), sha256_file(output), len(done.model.graph.node), size, len(graph.model.graph.node), before
    )


def quantize(
    model: Path, output: Path, request: QuantizeRequest, *,
    on_step: Callable[[Step], None] | None = None, say: Callable[[str], None] | None = None,
) -> SavedQuantized:  # fmt: skip
    """A quantized graph, and the verdict on it on validation samples; `say` is told what memory it will need."""
    from memopt_export import inspection, judge
    from memopt_export.graph import load_graph, save_graph
    from memopt_export.means import Means
    from memopt_export.recipe import save_recipe
    from memopt_models.data import open_samples, stream_samples

    for path in filter(None, (output, request.save_recipe)):
        refuse_to_overwrite(path, force=request.force)
        _refuse_own_input(path, [model])
    if output == request.save_recipe:
        raise UsageError(f"{output} is named twice", hint=f"--save-recipe {output.with_suffix('.toml')}")
    asked = _recipe_file(request)
    graph, calibration, judged = load_graph(model), None, None
    if asked.data is not None:
        given = partial(
            stream_samples, asked.data, inputs=graph.inputs, preprocess=graph.preprocess, root=request.data_root
        )
        calibration = given(split="train", at_most=asked.samples, seed=asked.seed)
        judged = open_samples(
            asked.data,
            split="validation",
            inputs=graph.inputs,
            preprocess=graph.preprocess,
            root=request.data_root,
            at_most=max(_JUDGED_SAMPLES, graph.fixed_batch or 0),
        )
    means = Means(asked.batch_size, on_step=on_step)
    made = _within_memory(request, _Making(graph, asked.recipe, calibration, judged, means), say)
    done = made.quantized.graph.with_seed(asked.seed)
    verdict = judge.judge(graph, replace(made.quantized, graph=done), made.recipe, judged, made.means)
    if request.measure:
        means.tell("measure, each graph in a process of its own", 0, 2)
        verdict = judge.measured(verdict, graph, done, made.recipe, judged)
    else:
        verdict = judge.unmeasured(verdict, "--no-measure")
    saved, told = replace(asked, recipe=made.recipe, batch_size=made.means.batch_size), done.quantization
    save_graph(done, output, force=request.force, external=request.external_data)
    if request.save_recipe is not None:
        save_recipe(saved, request.save_recipe, force=request.force)
    findings, unseen = inspection.look(output, source=model)
    return SavedQuantized(
        path=str(output),
        precision=done.precision,
        sha256=sha256_file(output),
        recipe=saved,
        calibrated=f"{told.samples} samples of {told.source}, seed {told.seed}" if told and told.source else None,
        kept_float=made.quantized.kept_float,
        notes=made.quantized.notes,
        verdict=verdict,
        ranking=made.ranking,
        holds=made.holds,
        reached=made.reached,
        recipe_path=str(request.save_recipe) if request.save_recipe else None,
        findings=findings,
        unseen=unseen,
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
        _refuse_own_input(request.html, paths)
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


def pack(
    paths: Sequence[Path], output: Path, *, form: str, name: str | None, data: str | None, labels: Path | None,
    license_id: str | None, license_file: Path | None = None, sign: Path | None = None,
    passphrase: str | None = None, specialized: bool = False, force: bool = False, data_root: Path | None = None,
) -> Packed:  # fmt: skip
    """A bundle of these graphs and engines; labels, preprocessing and golden samples come from the data set.

    With `specialized`, every graph that gains by it stands beside one that is optimized for this processor.
    """
    from memopt.specialization import gains_nothing
    from memopt_export import formats
    from memopt_export import pack as packing
    from memopt_export.signing import load_key
    from memopt_export.specialize import specialize
    from memopt_export.stages import tool_versions
    from memopt_models.data import Pictures, is_data_set, open_data, stream_samples

    _refuse_own_input(output, paths)
    key = load_key(sign, passphrase) if sign is not None else None
    parts = _parts(paths)
    graphs = [part for part in parts if isinstance(part, packing.OnnxPart)]
    skipped = {
        part.id: why for part in graphs if specialized and (why := gains_nothing(part.graph.precision)) is not None
    }
    parts += [specialize(part) for part in graphs if specialized and part.id not in skipped]
    named = data is not None and bool(graphs) and is_data_set(data, graphs[0].graph.inputs)
    opened = open_data(data, root=data_root) if data is not None and named else None
    golden, pictures, steps = {}, None, graphs[0].graph.preprocess or () if graphs else ()
    if data and graphs:
        first = graphs[0].graph
        at_most = first.fixed_batch or packing.GOLDEN_SAMPLES
        found = stream_samples(
            data, split="test", inputs=first.inputs, preprocess=first.preprocess, root=data_root, at_most=at_most
        )
        golden = found.pick(slice(None)).feeds
        if isinstance(found, Pictures):
            pictures, steps = found.pictures, tuple(map(dict, found.steps))
    contents = packing.Contents(
        name=name or output.stem,
        parts=tuple(parts),
        labels=_read_labels(labels) if labels else opened.classes if opened else (),
        preprocess=steps,
        golden_inputs=golden,
        golden_pictures=pictures,
        license=license_id,
        license_text=_read_text(license_file) if license_file else None,
        tools=tool_versions(),
    )
    written = formats.write(form, contents, output, sign=key, force=force)
    size = sum(path.stat().st_size for path in (output, *output.rglob("*")) if path.is_file())
    digest = sha256_file(output) if output.is_file() else None
    signed_by = key.key_id if key else None
    left_out = skipped | written.left_out
    return Packed(str(output), form, size, digest, written.variants, written.files, signed_by, left_out)


def keygen(output: Path, passphrase: str | None, *, force: bool) -> SavedKey:
    """A new pair of keys: the private one locked by the passphrase, the public one beside it."""
    from memopt_export import signing

    key = signing.generate()
    signing.save_key(key, output, passphrase or "", force=force)
    return SavedKey(str(output), str(signing.public_path(output)), key.key_id)


def run(
    bundle: Path, pictures: Sequence[Path], *, device: str, variant: str | None, memory_limit: str | None, topk: int,
    trusted_keys: Sequence[Path] = (), trust_engines: bool = False,
) -> Predicted:  # fmt: skip
    """The classes of these pictures, by the embedded runtime."""
    import memopt

    with memopt.load(
        bundle, device=device, variant=variant, memory_limit=memory_limit, trusted_keys=trusted_keys,
        trust_engines=trust_engines,
    ) as model:  # fmt: skip
        found = model.predict(pictures, topk=topk)
        answers = tuple(
            (str(picture), tuple((p.label, p.probability) for p in best))
            for picture, best in zip(pictures, found, strict=True)
        )
        return Predicted(model.variant, model.why, answers)


def verify(path: Path, *, replay: bool, trusted_keys: Sequence[Path] = (), trust_engines: bool = False) -> Verification:
    """Structure and digests of a bundle, and its signature when keys are given.

    With `replay`, the golden outputs on every runtime of this machine as well.
    """
    bundle = open_bundle(path, trusted_keys=trusted_keys)
    size = sum(len(entry) for entry in bundle.entries.values())
    replays = tuple(_replay(bundle, trust_engines=trust_engines)) if replay else ()
    return Verification(str(path), len(bundle.manifest.files), size, replays, bundle.signed_by, bundle.signatures)


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


@dataclass(frozen=True, eq=False)
class _Making:
    """What a quantization starts from."""

    graph: Graph
    recipe: Recipe
    calibration: Samples | Pictures | None
    judged: Samples | None
    means: Means


@dataclass(frozen=True)
class _Made:
    """A quantized graph, the recipe and the means that made it in the end, and what a budget found on the way."""

    quantized: Quantized
    recipe: Recipe
    means: Means
    ranking: tuple[Sensitivity, ...] = ()
    holds: bool | None = None
    reached: str | None = None


def _recipe_file(request: QuantizeRequest) -> RecipeFile:
    """The recipe file, the defaults where there is none, with what the request says itself.

    Raises:
        InputRefused, UsageError: the file cannot be read, or something in it or in the request is not possible.
    """
    from memopt_export.recipe import RecipeFile, parse, read_recipe

    file = RecipeFile(parse(request.precision or "int8")) if request.recipe is None else read_recipe(request.recipe)
    own = {field.name for field in (*fields(file.recipe), *fields(file))} - {"recipe"}
    asked = file.changed({name: value for name, value in vars(request).items() if name in own})
    if request.percentile is not None and asked.recipe.calibration != "percentile":
        raise UsageError(
            f"--percentile means nothing to calibration {asked.recipe.calibration}", hint="--calibration percentile"
        )
    if asked.data is None and request.needs_data:
        raise UsageError(f"{request.needs_data} needs samples", hint="--data SPEC")
    return asked


def _within_memory(request: QuantizeRequest, making: _Making, say: Callable[[str], None] | None) -> _Made:
    """What `_within_budget` makes, in a process that is not allowed to hold more than the request says."""
    limit = request.memory_limit
    if limit is None:
        return _within_budget(request, making)
    from memopt_export import memory_limit

    need = memory_limit.estimate(making.graph, making.recipe, making.calibration, making.means)
    if say is not None:
        say(need.text())
    means = memory_limit.fit(making.graph, making.recipe, making.calibration, making.means, limit)
    with memory_limit.hard_cap(limit):
        return _within_budget(request, replace(making, means=means))


def _within_budget(request: QuantizeRequest, making: _Making) -> _Made:
    """The graph by the recipe, or by one that keeps as many layers in float as the request's budget wants."""
    from memopt_export import quantize as quantizing

    graph, recipe, calibration, means = making.graph, making.recipe, making.calibration, making.means
    judged = making.judged
    if request.max_drop is not None or request.min_sqnr is not None:
        from memopt_export.budget import Budget, within

        assert judged is not None  # a request that needs samples was refused without
        budget = Budget(request.max_drop, request.min_sqnr)
        kept = within(graph, recipe, calibration, judged, budget, means)
        return _Made(kept.quantized, kept.recipe, means, kept.ranking, kept.holds, kept.reached)
    ranking: tuple[Sensitivity, ...] = ()
    if request.sensitivity:
        from memopt_export.budget import rank

        assert judged is not None
        ranking = rank(graph, recipe, calibration, judged, means)
    return _Made(quantizing.quantize(graph, recipe, calibration, means), recipe, means, ranking)


def _refuse_own_input(output: Path, inputs: Sequence[Path]) -> None:
    """Raises UsageError when the output would replace what it is made from."""
    for path in inputs:
        if output.exists() and path.exists() and output.samefile(path):
            raise UsageError(f"{output} is what it would be made from", hint=f"-o {output.stem}-new{output.suffix}")


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
    from memopt.artifact import read_sidecar
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


def _read_labels(path: Path) -> tuple[str, ...]:
    return tuple(_read_text(path).removesuffix("\n").split("\n"))


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputRefused(f"{path} cannot be read: {error.strerror}") from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputRefused(f"{path} cannot be read as text: {first_line(error)}") from error


def _parts(paths: Sequence[Path]) -> list[packing.OnnxPart | packing.EnginePart]:
    """The parts of a bundle: graphs first, then the engines built from them, found by digest."""
    from memopt.artifact import open_artifact
    from memopt_export.graph import load_graph
    from memopt_export.pack import EnginePart, OnnxPart, engine_id

    parts: list[OnnxPart | EnginePart] = []
    for path in paths:
        if path.suffix not in (".onnx", ".engine"):
            raise UsageError(f"{path} cannot be packed", hint="*.onnx, and *.engine built from one of them")
    for path in (path for path in paths if path.suffix == ".onnx"):
        parts.append(OnnxPart(path.stem, path.stem, load_graph(path)))
    sources = {part.graph.sha256: part for part in parts if isinstance(part, OnnxPart)}
    for path in (path for path in paths if path.suffix == ".engine"):
        artifact = open_artifact(path)
        assert artifact.engine is not None  # open_artifact reads the sidecar
        source = sources.get(artifact.engine.onnx_sha256)
        if source is None:
            raise UsageError(f"{path} was built from a graph that is not packed with it", hint="name its .onnx as well")
        precision, data = source.graph.precision, bytes(artifact.data)
        name = engine_id(path.stem, artifact.engine.flavor)
        parts.append(EnginePart(name, source.network, precision, data, artifact.engine, source.id))
    return parts


def _replay(bundle: Bundle, *, trust_engines: bool) -> Iterator[Replay]:
    """Every variant on every device of its runtime that works here; what a machine lacks is no fault of the bundle."""
    if bundle.manifest.golden is None:
        raise InputRefused(f"{bundle.path} has no golden outputs", hint="memopt-export pack --data SPEC")
    inputs, pictures = bundle.golden_inputs(), bundle.golden_pictures()
    if pictures is not None:
        prepared = prepare(pictures, bundle.manifest.preprocess)
        yield Replay(PREPROCESSING, "numpy", max_difference(prepared, next(iter(inputs.values()))), 0.0)
    for variant in bundle.manifest.variants:
        expected = bundle.golden_outputs(variant.id)
        made_for = runtime(variant.runtime)
        artifact = bundle.artifact(variant.id)
        distrusted = bundle.distrusts(variant, trust_engines=trust_engines)
        for device in filter(artifact.runs_on, made_for.DEVICES):
            reason = distrusted or made_for.unavailable(device) or made_for.refuses(artifact)
            place = f"{variant.runtime} {device}"
            if reason is not None:
                yield Replay(variant.id, place, None, None, reason, excused=True)
            else:
                replay = Replay(variant.id, place, None, bundle.manifest.golden.atol[variant.id])
                yield _replay_on(replay, artifact, made_for, device, inputs, expected)


def _replay_on(
    replay: Replay, artifact: Artifact, made_for: Runtime, device: str, inputs: Mapping[str, Array],
    expected: Sequence[Array],
) -> Replay:  # fmt: skip
    """What the artifact computes, held against what is expected."""
    try:
        session = made_for.open(artifact, device=device)
        got = session.run(inputs)
        session.close()
    except MemoptError as error:
        return replace(replay, reason=error.problem)
    differences = [max_difference(a, b) if a.shape == b.shape else np.inf for a, b in zip(got, expected, strict=True)]
    worst = float(np.max(differences))
    if not np.isfinite(worst):
        return replace(replay, reason="outputs are not finite, or of another shape")
    return replace(replay, max_difference=worst)
