"""Memory, accuracy and latency of many artifacts on many runtimes, one fresh process each."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from memopt.artifact import KINDS, Artifact, open_artifact
from memopt.bundle import Bundle, open_bundle
from memopt.errors import InputRefused, MemoptError, UsageError
from memopt.judgement import Judgement, judged
from memopt.manifest import EngineInfo, PlannedPoint, Profile, Variant, planned_at
from memopt.memory import STEADY
from memopt.probe import Measurement, Request, measure
from memopt.report import Report, Row, held_bytes
from memopt.runtimes import RUNTIMES
from memopt.tensors import Array

DEVICES = ("cpu", "cuda")
SOAK_RUNS = 280  # over which private memory is watched, where they take no longer than some seconds
_LONG_SOAK_S = 3600.0  # what a measurement may take where its runs are asked for


@dataclass(frozen=True)
class Subject:
    """One artifact to compare: a model file, or one variant of a bundle."""

    name: str
    path: Path
    artifact: Artifact
    variant: str | None = None
    precision: str | None = None
    weights_bytes: int | None = None
    planned: tuple[PlannedPoint, ...] = ()
    refused: str | None = None  # why it may not run, or cannot be opened
    takes_pictures: bool = False  # as uint8, and makes numbers of them itself


@dataclass(frozen=True)
class Cell:
    """One measurement to make, or the reason why it cannot be made."""

    subject: Subject
    runtime: str
    device: str
    batch: int
    reason: str | None = None

    @property
    def key(self) -> str:
        """That of its row."""
        return _empty_row(self).key


@dataclass(frozen=True, eq=False)
class Given:
    """Samples that all artifacts run on."""

    feeds: Mapping[str, Array]  # by input name; first axis = samples
    source: str = ""  # where they come from, such as "digits/test"
    sha256: str | None = None  # of inputs and labels
    pictures: Mapping[str, Array] = field(default_factory=dict)  # the same, for artifacts that take pictures


@dataclass(frozen=True)
class Listener:
    """Whom a comparison tells: each cell before it is measured, with its number and how many there are; each row."""

    on_cell: Callable[[Cell, int, int], None] = field(default=lambda cell, number, total: None)
    on_row: Callable[[Row], None] = field(default=lambda row: None)


def subjects(
    paths: Iterable[Path], *, trust_engines: bool = False, refused: Mapping[Path, str] | None = None
) -> list[Subject]:
    """Every artifact in these files and bundles; a bundle counts for all its variants.

    A name that stands more than once gets its path in front. Engines in bundles are code, and not run unless
    `trust_engines`; an engine named by its own path is. What is damaged, or `refused` already, is a subject with its
    reason.

    Raises:
        InputRefused: a file that is not there, or is called like no artifact.
    """
    found: list[Subject] = []
    for path in paths:
        expect_artifact(path)
        try:
            if refused is not None and path in refused:
                raise InputRefused(refused[path])
            if is_bundle(path):
                bundle = open_bundle(path)
                variants = bundle.manifest.variants
                found += [_variant_subject(path, bundle, each, trust_engines=trust_engines) for each in variants]
            else:
                found.append(Subject(path.name, path, open_artifact(path)))
        except MemoptError as error:
            found.append(_damaged_subject(path, error.problem))
    names = Counter(subject.name for subject in found)
    return [subject if names[subject.name] == 1 else replace(subject, name=_full_name(subject)) for subject in found]


def expect_artifact(path: Path) -> None:
    """Raises InputRefused for a path that can only be a slip of the hand: nothing is there, or no kind of artifact."""
    if not is_bundle(path) and path.suffix not in KINDS:
        raise InputRefused(f"{path} is no model file", hint="one of *" + ", *".join(KINDS) + ", *.mopt")
    if not path.exists():
        raise InputRefused(f"{path} does not exist")


def is_bundle(path: Path) -> bool:
    """Whether it is called like a bundle, as one file or a folder."""
    return path.suffix == ".mopt" or path.is_dir()


def cells(
    found: Sequence[Subject], *, batches: Sequence[int], runtimes: Sequence[str] | None = None,
    devices: Sequence[str] = DEVICES,
) -> list[Cell]:  # fmt: skip
    """Every (subject, runtime, device, batch) that makes sense: the runtime opens this kind of artifact.

    Every subject has a cell: where nothing opens it, or its device is not there, the cell carries the reason.

    Raises:
        UsageError: a runtime or device that does not exist, a batch below 1, or nothing to compare.
    """
    for what, names, known in (("runtime", runtimes or (), tuple(RUNTIMES)), ("device", devices, DEVICES)):
        for name in names:
            if name not in known:
                raise UsageError(f"{what} {name!r} is not known", hint="one of " + ", ".join(known))
    for batch in batches:
        if batch < 1:
            raise UsageError(f"batch is {batch}", hint="--batch 1,8,32")
    if not (found and batches and devices):
        raise UsageError("there is nothing to compare")
    return [
        Cell(subject, runtime_name, device, batch, reason)
        for subject in found
        for runtime_name, device, reason in _places(subject, tuple(runtimes or RUNTIMES), devices)
        for batch in batches
    ]


def compare(
    todo: Sequence[Cell], given: Given, judgement: Judgement, *, reference: str | None = None,
    machine: Mapping[str, str] | None = None, soak_runs: int | None = None, listener: Listener | None = None,
) -> Report:  # fmt: skip
    """Measures every cell; one that fails carries its reason and does not stop the others.

    Args:
        todo: what to measure, see `cells`.
        given: the samples, the same for all.
        judgement: what the outputs are judged by.
        reference: name of the subject that the others are held against; None takes the first that can be measured.
            Where a named one cannot be, agreement, SQNR and ratios stay unknown.
        machine: what to say of this machine.
        soak_runs: over which private memory is watched, however long that takes; None: some hundreds, in few seconds.
        listener: is told what is measured.
    """
    wanted = reference or next((cell for cell in todo if cell.reason is None), todo[0]).subject.name
    if wanted not in {cell.subject.name for cell in todo}:
        raise UsageError(f"the reference {wanted!r} is not among what is compared")
    listener = listener or Listener()
    order = sorted(range(len(todo)), key=lambda i: todo[i].subject.name != wanted)  # the reference's outputs first
    rows: dict[int, Row] = {}
    expected: Array | None = None
    place: str | None = None
    with tempfile.TemporaryDirectory(prefix="memopt-compare-") as name:
        folder = Path(name)
        files = {False: save_arrays(given.feeds, folder)}
        if given.pictures:
            files[True] = save_arrays(given.pictures, folder, name="picture")
        for number, i in enumerate(order, 1):
            listener.on_cell(todo[i], number, len(todo))
            fitting = files.get(todo[i].subject.takes_pictures, files[False])
            row, outputs = _measure_cell(todo[i], fitting, folder / f"outputs-{i}", soak_runs)
            if outputs and expected is None and row.name == wanted:
                expected, place = outputs[0], row.place
            rows[i] = judged(row, outputs, expected, judgement) if outputs else row
            listener.on_row(rows[i])
    return Report(
        rows=_with_ratios([rows[i] for i in range(len(todo))], wanted),
        reference=wanted,
        source=given.source,
        samples=len(next(iter(given.feeds.values()))),
        machine=dict(machine or {}),
        reference_place=place,
        samples_sha256=given.sha256,
        classes=judgement.classes,
        metric=judgement.metric_name,
    )


def retimed(report: Report, again: Report) -> Report:
    """The report with the shorter of two timings for each row that `again` has measured as well, and ratios anew.

    A machine that has something else to do makes a model slower, never faster.
    """
    others = {row.key: row for row in again.rows if row.p50_ms is not None}
    rows = [_shorter(row, others.get(row.key)) for row in report.rows]
    return replace(report, rows=_with_ratios(rows, report.reference))


def save_arrays(feeds: Mapping[str, Array], folder: Path, *, name: str = "input") -> dict[str, str]:
    """The samples as .npy files in `folder`, for every process to map: input name -> path."""
    if not feeds:
        raise InputRefused("there are no samples", hint="--data SPEC")
    files = {each: str(folder / f"{name}-{i}.npy") for i, each in enumerate(feeds)}
    for each, array in feeds.items():
        np.save(files[each], array)
    return files


def _variant_subject(path: Path, bundle: Bundle, variant: Variant, *, trust_engines: bool) -> Subject:
    memory = variant.memory
    return Subject(
        name=variant.id,
        path=path,
        artifact=bundle.artifact(variant.id),
        variant=variant.id,
        precision=variant.precision,
        weights_bytes=memory.weights_bytes,
        planned=memory.plan,
        refused=bundle.distrusts(variant, trust_engines=trust_engines),
    )


def _damaged_subject(path: Path, why: str) -> Subject:
    size_bytes = path.stat().st_size if path.is_file() else 0
    artifact = Artifact(path.name, KINDS.get(path.suffix, "onnx"), memoryview(b""), size_bytes, path=path)
    return Subject(path.name, path, artifact, refused=why)


def _full_name(subject: Subject) -> str:
    return f"{subject.path}:{subject.variant}" if subject.variant else str(subject.path)


def _places(subject: Subject, runtimes: Sequence[str], devices: Sequence[str]) -> Iterator[tuple[str, str, str | None]]:
    """Where to measure: (runtime, device, why not)."""
    engine = subject.artifact.engine
    openers = [name for name in runtimes if _opens(name, subject.artifact)]
    if not openers:
        name = engine.flavor if engine is not None and engine.flavor in RUNTIMES else _likely(subject, runtimes)
        why = subject.refused or RUNTIMES[name].refuses(subject.artifact)
        yield name, RUNTIMES[name].DEVICES[0], f"{name} was not asked for" if name not in runtimes else why
    elif subject.refused is not None:
        yield openers[0], RUNTIMES[openers[0]].DEVICES[0], subject.refused
        return
    for name in openers:
        runtime = RUNTIMES[name]
        possible = [device for device in runtime.DEVICES if device in devices and subject.artifact.runs_on(device)]
        reasons = {device: runtime.unavailable(device) for device in possible}
        usable = [device for device, reason in reasons.items() if reason is None]
        yield from ((name, device, None) for device in usable)
        if not usable:
            device = next(iter(reasons), runtime.DEVICES[0])
            yield name, device, reasons.get(device, f"{device} was not asked for")


def _likely(subject: Subject, runtimes: Sequence[str]) -> str:
    """Of these, the one in whose row it is said why nothing opens it: for an engine, one that is for a GPU alone."""
    for_engines = [name for name in runtimes if RUNTIMES[name].DEVICES == ("cuda",)]
    return for_engines[0] if for_engines and subject.artifact.kind == "engine" else runtimes[0]


def _opens(name: str, artifact: Artifact) -> bool:
    """Whether the artifact is this runtime's; what was made for one machine is, even on another."""
    if artifact.engine is not None:
        return artifact.engine.flavor == name
    return RUNTIMES[name].refuses(replace(artifact, cpu=None)) is None


def _measure_cell(cell: Cell, files: dict[str, str], folder: Path, soak_runs: int | None) -> tuple[Row, list[Array]]:
    """The row, and the outputs that have a row for each sample, in the model's order."""
    row = _empty_row(cell)
    engine = cell.subject.artifact.engine
    folder.mkdir()
    try:
        if cell.reason is not None:
            return replace(row, reason=cell.reason), []
        if engine is not None and _profile(engine, cell.batch) is None:
            return replace(row, reason=f"no profile of the engine takes batch {cell.batch}"), []
        request = Request(
            str(cell.subject.path),
            cell.runtime,
            cell.device,
            cell.batch,
            files,
            cell.subject.variant,
            soak_runs=SOAK_RUNS if soak_runs is None else soak_runs,
            soak_always=soak_runs is not None,
            allocator=True,
            outputs=str(folder),
        )
        found = measure(request) if soak_runs is None else measure(request, timeout_s=_LONG_SOAK_S)
        row = _filled(row, found)
    except MemoptError as error:
        return replace(row, reason=error.problem), []
    names = sorted((path for path in folder.iterdir()), key=lambda path: int(path.stem))
    return row, [np.load(path) for path in names] if (folder / "0.npy") in names else []


def _empty_row(cell: Cell) -> Row:
    subject, engine = cell.subject, cell.subject.artifact.engine
    profile = _profile(engine, cell.batch) if engine else None
    return Row(
        name=subject.name,
        runtime=cell.runtime,
        device=cell.device,
        batch=cell.batch,
        precision=subject.precision,
        file_bytes=subject.artifact.size_bytes,
        weights_bytes=engine.weights_bytes if engine else subject.weights_bytes,
        activation_bytes=_planned(subject, profile, cell.batch),
    )


def _planned(subject: Subject, profile: Profile | None, batch: int) -> int | None:
    """Planned activations: of an engine its profile's, of a graph those of its plan."""
    if subject.artifact.engine is not None:
        return profile.activation_bytes if profile is not None else None
    return planned_at(subject.planned, batch)


def _profile(engine: EngineInfo, batch: int) -> Profile | None:
    """The smallest profile that takes this batch; None when none does."""
    fitting = [profile for profile in engine.profiles if profile.batches[0] <= batch <= profile.batches[1]]
    return min(fitting, key=lambda profile: profile.batches[1], default=None)


def _filled(row: Row, found: Measurement) -> Row:
    steady = found.bill.phases[STEADY]
    return replace(
        row,
        private_bytes=steady.private_bytes,
        file_backed_bytes=steady.file_backed_bytes,
        peak_bytes=found.bill.peak_bytes,
        device_bytes=found.bill.device[STEADY].best[0] if found.bill.device else None,
        leak_bytes_per_1000_runs=found.leak_bytes_per_1000_runs,
        load_ms=found.load_ms,
        p50_ms=found.p50_ms,
        p95_ms=found.p95_ms,
        p99_ms=found.p99_ms,
        runs=found.runs,
        placement=found.placement,
        bill=found.bill,
    )


def _shorter(row: Row, other: Row | None) -> Row:
    if other is None or row.p50_ms is None or other.p50_ms is None or other.p50_ms >= row.p50_ms:
        return row
    return replace(row, p50_ms=other.p50_ms, p95_ms=other.p95_ms, p99_ms=other.p99_ms, runs=other.runs)


def _with_ratios(rows: Sequence[Row], reference: str) -> tuple[Row, ...]:
    """The rows with multiples of the reference's memory and latency at the same batch."""
    return tuple(_with_ratio(row, _counterpart(row, rows, reference)) for row in rows)


def _counterpart(row: Row, rows: Sequence[Row], reference: str) -> Row | None:
    """The reference's row at the same batch: on the same runtime and device, else the first."""
    there = [each for each in rows if (each.name, each.batch) == (reference, row.batch) and each.reason is None]
    same = [each for each in there if each.place == row.place]
    return next(iter(same + there), None)


def _with_ratio(row: Row, other: Row | None) -> Row:
    if other is None or row.reason is not None:
        return row
    held, others = held_bytes(row), held_bytes(other)
    return replace(
        row,
        memory_ratio=held / others if held is not None and others else None,
        latency_ratio=row.p50_ms / other.p50_ms if row.p50_ms and other.p50_ms else None,
    )
