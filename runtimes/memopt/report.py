"""A report: the rows of a comparison as frozen values, to JSON, to Markdown and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import inf, isfinite
from typing import Any

from memopt.accuracy import WorstSample
from memopt.errors import IntegrityError
from memopt.gate import Gate
from memopt.memory import STEADY, Bill
from memopt.sizes import show_size
from memopt.strict_json import from_json, from_plain, to_json

SCHEMA = "2.0"


@dataclass(frozen=True)
class Row:
    """One (artifact, runtime, device, batch). None means unknown; `reason` says why a cell has no measurement.

    Host memory is above the runtime's own baseline, in the steady state after warm-up; the peak is that of RSS since
    the baseline. Shares (`top1`, `agreement`) are 0 to 1. `sqnr_db` is None for outputs equal to the reference's.
    Ratios are to the reference's row at the same batch: on the same runtime and device where it has one there, else its
    first. `note` says what could not be judged of a row that was measured.
    """

    name: str
    runtime: str
    device: str
    batch: int
    precision: str | None = None
    file_bytes: int | None = None
    weights_bytes: int | None = None
    activation_bytes: int | None = None  # planned, at this batch
    private_bytes: int | None = None
    file_backed_bytes: int | None = None
    peak_bytes: int | None = None
    device_bytes: int | None = None
    leak_bytes_per_1000_runs: int | None = None  # private memory, see `memopt.probe.growth`
    memory_ratio: float | None = None  # of private and device memory together
    latency_ratio: float | None = None  # of p50
    load_ms: float | None = None
    p50_ms: float | None = None
    p95_ms: float | None = None
    p99_ms: float | None = None
    runs: int | None = None  # that were timed
    top1: float | None = None
    top5: float | None = None
    metric: float | None = None  # the user's own
    agreement: float | None = None
    sqnr_db: float | None = None
    max_difference: float | None = None  # to the reference's first output; 0 where they are equal
    worst: WorstSample | None = None
    confusion: tuple[tuple[int, ...], ...] | None = None  # row = label, column = answer
    placement: str | None = None
    reason: str | None = None
    note: str | None = None
    bill: Bill | None = None

    @property
    def place(self) -> str:
        """Where and how it ran, such as "onnxruntime cpu, batch 8"."""
        return f"{self.runtime} {self.device}, batch {self.batch}"

    @property
    def key(self) -> str:
        """What is measured, such as "int8.onnx on onnxruntime cpu, batch 8"; in a report no two rows have the same."""
        return f"{self.name} on {self.place}"


@dataclass(frozen=True)
class Report:
    """The rows, in the order they were asked for, with the reference and the samples they were judged on."""

    rows: tuple[Row, ...]
    reference: str  # name of the artifact that the others are held against
    source: str  # of the samples, such as "digits/test"
    samples: int
    machine: dict[str, str] = field(default_factory=dict)
    reference_place: str | None = None  # whose outputs were taken; None where it could not be measured
    samples_sha256: str | None = None  # of inputs and labels
    classes: tuple[str, ...] = ()  # the labels' names, where they are known
    metric: str | None = None  # the user's own, as pkg.mod:function
    gate: Gate | None = None  # what an earlier report says to this one
    schema: str = SCHEMA

    def to_json(self) -> str:
        """Deterministic JSON; the inverse of `read_report`."""
        return to_json(self)

    def to_markdown(self) -> str:
        """The table for a README or a pull request; below it, what got worse since the report it was held against."""
        headings = columns_of(self)
        rule = ["---" if heading in TEXT_COLUMNS else "--:" for heading in headings]
        cells = [[_in_markdown(COLUMNS[heading].text(row)) for heading in headings] for row in self.rows]
        lines = ["| " + " | ".join(line) + " |" for line in (headings, rule, *cells)]
        if self.gate is not None:
            lines += ["", *(f"* {_in_markdown(line)}" for line in self.gate.lines())]
        return "\n".join(lines)


def read_report(data: bytes) -> Report:
    """The report in these JSON bytes, of this schema or an older one.

    Raises:
        IntegrityError: it is no report, or of a schema to come.
    """
    plain = from_json(dict[str, Any], data, where="report")
    schema = plain.get("schema")
    if schema == "1.0":
        plain = _from_1_0(plain)
    elif schema != SCHEMA:
        raise IntegrityError(f"report has schema {schema!r}, this memopt reads 1.0 and {SCHEMA}")
    return from_plain(Report, plain, where="report")


def _from_1_0(plain: Mapping[str, Any]) -> dict[str, Any]:
    """A report of schema 1.0, in which a bill had one device figure for all phases."""
    rows = [dict(row) if isinstance(row, dict) else row for row in plain.get("rows", ())]
    for row in rows:
        bill = row.get("bill") if isinstance(row, dict) else None
        if isinstance(bill, dict):
            device = dict(bill.get("device", {}))
            method = device.pop("method", "unknown")
            found = {STEADY: device | {"methods": dict.fromkeys(device, method)}} if device else {}
            row["bill"] = bill | {"device": found}
    return dict(plain) | {"rows": rows, "schema": SCHEMA}


NONE = "–"  # where there is nothing to say


@dataclass(frozen=True)
class Column:
    """What rows say under a heading: the value, by which they can be sorted, and how it is shown."""

    value: Callable[[Row], Any]
    show: Callable[[Any], str] = str
    measured: bool = False  # where such a value of a measured row is None, it is "unknown"

    def text(self, row: Row) -> str:
        """A dash where there is nothing to say."""
        value = self.value(row)
        if value is None:
            return "unknown" if self.measured and row.reason is None else NONE
        return self.show(value)


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"


def _ratio(ratio: float) -> str:
    return f"{ratio:.2f}x"


def _time(milliseconds: float) -> str:
    return f"{milliseconds:.3f} ms"


def _decibels(value: float) -> str:
    return f"{value:.1f} dB" if isfinite(value) else "equal"


def _noise(row: Row) -> float | None:
    """Equal outputs have no noise; nor has a reference that is all zero a signal."""
    return row.sqnr_db if row.sqnr_db is not None or row.max_difference != 0 else inf


def _worst(worst: WorstSample) -> str:
    off = f"{worst.max_difference:.2g} off" if worst.sqnr_db is None else _decibels(worst.sqnr_db)
    return f"#{worst.index} {off}"


COLUMNS = {
    "Variant": Column(lambda row: row.name),
    "Runtime": Column(lambda row: f"{row.runtime} {row.device}"),
    "Batch": Column(lambda row: row.batch),
    "File": Column(lambda row: row.file_bytes, show_size),
    "Weights": Column(lambda row: row.weights_bytes, show_size),
    "Planned": Column(lambda row: row.activation_bytes, show_size),
    "Private": Column(lambda row: row.private_bytes, show_size, measured=True),
    "x memory": Column(lambda row: row.memory_ratio, _ratio),
    "File-backed": Column(lambda row: row.file_backed_bytes, show_size, measured=True),
    "Peak": Column(lambda row: row.peak_bytes, show_size, measured=True),
    "Device": Column(lambda row: row.device_bytes, show_size),
    "Leak": Column(lambda row: row.leak_bytes_per_1000_runs, show_size),
    "p50": Column(lambda row: row.p50_ms, _time),
    "x p50": Column(lambda row: row.latency_ratio, _ratio),
    "Top-1": Column(lambda row: row.top1, _percent),
    "Top-5": Column(lambda row: row.top5, _percent),
    "Metric": Column(lambda row: row.metric, lambda value: f"{value:.4g}"),
    "Agree": Column(lambda row: row.agreement, _percent),
    "SQNR": Column(_noise, _decibels),
    "Worst": Column(lambda row: row.worst, _worst),
}
TEXT_COLUMNS = ("Variant", "Runtime")


def held_bytes(row: Row) -> int | None:
    """What the model takes away: private memory, and on a device its memory there; None where one is unknown."""
    if row.device == "cpu" or row.private_bytes is None or row.device_bytes is None:
        return row.private_bytes if row.device == "cpu" else None
    return row.private_bytes + row.device_bytes


def columns_of(report: Report) -> list[str]:
    """The headings under which some row has something to say."""
    return [heading for heading, column in COLUMNS.items() if any(column.text(row) != NONE for row in report.rows)]


def _in_markdown(text: str) -> str:
    """One line that does not leave its cell."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
