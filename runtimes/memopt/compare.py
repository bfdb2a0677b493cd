"""Memory, accuracy and latency of many artifacts on many runtimes, one fresh process each."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from memopt.accuracy import agreement, sqnr_db, top1
from memopt.artifact import Artifact, open_artifact
from memopt.bundle import open_bundle
from memopt.errors import InputRefused, MemoptError, UsageError
from memopt.manifest import EngineInfo
from memopt.probe import Measurement, Request, measure
from memopt.report import Report, Row
from memopt.runtimes import RUNTIMES
from memopt.tensors import Array


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


@dataclass(frozen=True)
class Cell:
    """One measurement to make."""

    subject: Subject
    runtime: str
    device: str
    batch: int


def subjects(paths: Iterable[Path]) -> list[Subject]:
    """Every artifact in these files and bundles; a bundle counts for all its variants.

    Raises:
        InputRefused, IntegrityError: a file that is no artifact, or a damaged bundle.
    """
    found: list[Subject] = []
    for path in paths:
        if path.suffix == ".mopt" or path.is_dir():
            bundle = open_bundle(path)
            found += [
                Subject(
                    v.id,
                    path,
                    bundle.artifact(v.id),
                    v.id,
                    v.precision,
                    v.memory.weights_bytes,
                    v.memory.activation_bytes,
                )
                for v in bundle.manifest.variants
            ]
        else:
            found.append(Subject(path.name, path, open_artifact(path)))
    return found


def cells(
    found: Sequence[Subject], *, batches: Sequence[int], runtimes: Sequence[str] | None = None,
    devices: Sequence[str] = ("cpu", "cuda"),
) -> list[Cell]:  # fmt: skip
    """Every (subject, runtime, device, batch) that makes sense: the runtime opens this kind of artifact.

    A device without its driver gets cells only for artifacts that nothing else could run: an engine keeps its row.

    Raises:
        UsageError: a runtime that does not exist, or a batch below 1.
    """
    for name in runtimes or ():
        if name not in RUNTIMES:
            raise UsageError(f"runtime {name!r} is not known", hint="one of " + ", ".join(RUNTIMES))
    for batch in batches:
        if batch < 1:
            raise UsageError(f"batch is {batch}", hint="--batch 1,8,32")
    return [
        Cell(subject, runtime_name, device, batch)
        for subject in found
        for runtime_name, device in _places(subject, runtimes, devices)
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
        reference: name of the subject that the others are held against; None takes the first.
        source: where the samples come from, for the report.
        machine: what to say of this machine.
        on_row: called with each finished row.
    """
    reference = reference or (todo[0].subject.name if todo else None)
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
            if outputs is not None:
                expected = outputs if expected is None else expected
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


def _places(subject: Subject, runtimes: Sequence[str] | None, devices: Sequence[str]) -> Iterator[tuple[str, str]]:
    for name in runtimes or RUNTIMES:
        runtime = RUNTIMES[name]
        if subject.artifact.engine is not None and subject.artifact.engine.flavor == name:
            yield name, "cuda"
        elif runtime.refuses(subject.artifact) is None:
            usable = [device for device in runtime.DEVICES if device in devices and runtime.unavailable(device) is None]
            yield from ((name, device) for device in usable or runtime.DEVICES[:1])


def _measure_cell(cell: Cell, files: dict[str, str], outputs: Path) -> tuple[Row, Array | None]:
    row = _empty_row(cell)
    engine = cell.subject.artifact.engine
    try:
        reason = RUNTIMES[cell.runtime].unavailable(cell.device)
        if reason:
            return replace(row, reason=reason), None
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
        return _filled(row, measure(request)), np.load(outputs)
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
        activation_bytes=_planned(profile, subject.activation_bytes, cell.batch),
    )


def _planned(profile: int | None, activation_bytes: int | None, batch: int) -> int | None:
    """Planned activations: the engine's own figure for its profile, else linear in the batch."""
    if profile is not None:
        return profile
    return activation_bytes * batch if activation_bytes is not None else None


def _profile(engine: EngineInfo, batch: int) -> int | None:
    """Activation bytes of the smallest profile that takes this batch; None when none does."""
    fitting = [p.activation_bytes or 0 for p in engine.profiles if p.batches[0] <= batch <= p.batches[1]]
    return min(fitting, default=None)


def _filled(row: Row, found: Measurement) -> Row:
    steady = found.bill.phases["steady"]
    return replace(
        row,
        private_bytes=steady.private_bytes,
        file_backed_bytes=steady.file_backed_bytes,
        peak_bytes=steady.peak_bytes,
        device_bytes=found.bill.device.used_bytes,
        load_ms=found.load_ms,
        p50_ms=found.p50_ms,
        p95_ms=found.p95_ms,
        placement=found.placement,
        bill=found.bill,
    )


def _judge(row: Row, outputs: Array, expected: Array, labels: Array | None) -> Row:
    classes = outputs.ndim == 2 and outputs.shape == expected.shape
    return replace(
        row,
        top1=top1(outputs, labels) if classes and labels is not None else None,
        agreement=agreement(outputs, expected) if classes else None,
        sqnr_db=_finite(sqnr_db(outputs, expected)) if outputs.shape == expected.shape else None,
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
