"""Memory, accuracy and latency of many artifacts on many runtimes, one fresh process each."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from memopt.accuracy import agreement, finite, sqnr_db, top1
from memopt.artifact import Artifact, open_artifact
from memopt.bundle import Bundle, open_bundle
from memopt.errors import InputRefused, MemoptError, UsageError
from memopt.manifest import EngineInfo, Profile, Variant
from memopt.memory import STEADY
from memopt.probe import Measurement, Request, measure
from memopt.report import Report, Row
from memopt.runtimes import RUNTIMES
from memopt.tensors import Array

DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Subject:
    """One artifact to compare: a model file, or one variant of a bundle."""

    name: str
    path: Path
    artifact: Artifact
    variant: str | None = None
    precision: str | None = None
    weights_bytes: int | None = None
    activation_bytes: int | None = None  # planned at batch 1
    distrusted: str | None = None  # why it may not run


@dataclass(frozen=True)
class Cell:
    """One measurement to make, or the reason why it cannot be made."""

    subject: Subject
    runtime: str
    device: str
    batch: int
    reason: str | None = None


def subjects(paths: Iterable[Path], *, trust_engines: bool = False) -> list[Subject]:
    """Every artifact in these files and bundles; a bundle counts for all its variants.

    A name that stands more than once gets its path in front. Engines in bundles are code, and not run unless
    `trust_engines`; an engine named by its own path is.

    Raises:
        InputRefused, IntegrityError: a file that is no artifact, or a damaged bundle.
    """
    found: list[Subject] = []
    for path in paths:
        if path.suffix == ".mopt" or path.is_dir():
            bundle = open_bundle(path)
            variants = bundle.manifest.variants
            found += [_variant_subject(path, bundle, each, trust_engines=trust_engines) for each in variants]
        else:
            found.append(Subject(path.name, path, open_artifact(path)))
    names = Counter(subject.name for subject in found)
    return [subject if names[subject.name] == 1 else replace(subject, name=_full_name(subject)) for subject in found]


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
    todo: Sequence[Cell], feeds: Mapping[str, Array], labels: Array | None, *,
    reference: str | None = None, source: str = "", machine: Mapping[str, str] | None = None,
    on_row: Callable[[Row], None] | None = None,
) -> Report:  # fmt: skip
    """Measures every cell; one that fails carries its reason and does not stop the others.

    Args:
        todo: what to measure, see `cells`.
        feeds: samples by input name, first axis = samples; the same for all.
        labels: (samples,), or None when accuracy is unknown.
        reference: name of the subject that the others are held against; None takes the first. Where it cannot be
            measured, agreement and SQNR stay unknown.
        source: where the samples come from, for the report.
        machine: what to say of this machine.
        on_row: called with each finished row.
    """
    reference = reference or todo[0].subject.name
    if reference not in {cell.subject.name for cell in todo}:
        raise UsageError(f"the reference {reference!r} is not among what is compared")
    order = sorted(range(len(todo)), key=lambda i: todo[i].subject.name != reference)  # the reference's outputs first
    rows: dict[int, Row] = {}
    expected: Array | None = None
    with tempfile.TemporaryDirectory(prefix="memopt-compare-") as name:
        folder = Path(name)
        files = save_arrays(feeds, folder)
        for i in order:
            row, outputs = _measure_cell(todo[i], files, folder / f"outputs-{i}.npy")
            if outputs is not None and expected is None and row.name == reference:
                expected = outputs
            if outputs is not None:
                row = _judge(row, outputs, expected, labels)
            rows[i] = row
            if on_row is not None:
                on_row(row)
    samples = len(next(iter(feeds.values())))
    return Report(tuple(rows[i] for i in range(len(todo))), reference, source, samples, dict(machine or {}))


def save_arrays(feeds: Mapping[str, Array], folder: Path) -> dict[str, str]:
    """The samples as .npy files in `folder`, for every process to map: input name -> path."""
    if not feeds:
        raise InputRefused("there are no samples", hint="--data SPEC")
    files = {name: str(folder / f"input-{i}.npy") for i, name in enumerate(feeds)}
    for name, array in feeds.items():
        np.save(files[name], array)
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
        activation_bytes=memory.activation_bytes,
        distrusted=bundle.distrusts(variant, trust_engines=trust_engines),
    )


def _full_name(subject: Subject) -> str:
    return f"{subject.path}:{subject.variant}" if subject.variant else str(subject.path)


def _places(subject: Subject, runtimes: Sequence[str], devices: Sequence[str]) -> Iterator[tuple[str, str, str | None]]:
    """Where to measure: (runtime, device, why not)."""
    engine = subject.artifact.engine
    openers = [name for name in runtimes if _opens(name, subject.artifact)]
    if not openers:
        name = engine.flavor if engine is not None and engine.flavor in RUNTIMES else runtimes[0]
        reason = f"{name} was not asked for" if name not in runtimes else RUNTIMES[name].refuses(subject.artifact)
        yield name, RUNTIMES[name].DEVICES[0], reason
    for name in openers:
        runtime = RUNTIMES[name]
        if subject.distrusted is not None:
            yield name, runtime.DEVICES[0], subject.distrusted
            continue
        possible = [device for device in runtime.DEVICES if device in devices and subject.artifact.runs_on(device)]
        reasons = {device: runtime.unavailable(device) for device in possible}
        usable = [device for device, reason in reasons.items() if reason is None]
        yield from ((name, device, None) for device in usable)
        if not usable:
            device = next(iter(reasons), runtime.DEVICES[0])
            yield name, device, reasons.get(device, f"{device} was not asked for")


def _opens(name: str, artifact: Artifact) -> bool:
    """Whether the artifact is this runtime's; what was made for one machine is, even on another."""
    if artifact.engine is not None:
        return artifact.engine.flavor == name
    return RUNTIMES[name].refuses(replace(artifact, cpu=None)) is None


def _measure_cell(cell: Cell, files: dict[str, str], outputs: Path) -> tuple[Row, Array | None]:
    row = _empty_row(cell)
    engine = cell.subject.artifact.engine
    outputs.mkdir()
    try:
        if cell.reason is not None:
            return replace(row, reason=cell.reason), None
        if engine is not None and _profile(engine, cell.batch) is None:
            return replace(row, reason=f"no profile of the engine takes batch {cell.batch}"), None
        request = Request(
            str(cell.subject.path),
            cell.runtime,
            cell.device,
            cell.batch,
            files,
            cell.subject.variant,
            outputs=str(outputs),
        )
        return _filled(row, measure(request)), np.load(outputs / "0.npy") if (outputs / "0.npy").exists() else None
    except MemoptError as error:
        return replace(row, reason=error.problem), None


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
    """Planned activations: of an engine its profile's, of a graph the plan, which is linear in the batch."""
    if subject.artifact.engine is not None:
        return profile.activation_bytes if profile is not None else None
    return subject.activation_bytes * batch if subject.activation_bytes is not None else None


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
        load_ms=found.load_ms,
        p50_ms=found.p50_ms,
        p95_ms=found.p95_ms,
        placement=found.placement,
        bill=found.bill,
    )


def _judge(row: Row, outputs: Array, expected: Array | None, labels: Array | None) -> Row:
    """The row with accuracy by the labels, and agreement with the reference where that could be measured."""
    if outputs.ndim == 2 and labels is not None:
        row = replace(row, top1=top1(outputs, labels))
    if expected is None or outputs.shape != expected.shape:
        return row
    same = agreement(outputs, expected) if outputs.ndim == 2 else None
    return replace(row, agreement=same, sqnr_db=finite(sqnr_db(outputs, expected)))
