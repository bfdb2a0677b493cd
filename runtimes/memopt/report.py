"""A report: the rows of a comparison as frozen values, to JSON, to Markdown and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from memopt.memory import Bill
from memopt.sizes import show_size
from memopt.strict_json import from_json, to_json

SCHEMA = "1.0"


@dataclass(frozen=True)
class Row:
    """One (artifact, runtime, device, batch). None means unknown; `reason` says why a cell has no measurement.

    Host memory is above the runtime's own baseline, in the steady state after warm-up; the peak is that of RSS since
    the baseline. Shares (`top1`, `agreement`) are 0 to 1. `sqnr_db` is None for outputs equal to the reference's.
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
    load_ms: float | None = None
    p50_ms: float | None = None
    p95_ms: float | None = None
    top1: float | None = None
    agreement: float | None = None
    sqnr_db: float | None = None
    placement: str | None = None
    reason: str | None = None
    bill: Bill | None = None


@dataclass(frozen=True)
class Report:
    """The rows, in the order they were asked for, with the reference and the samples they were judged on."""

    rows: tuple[Row, ...]
    reference: str
    source: str  # of the samples, such as "digits/test"
    samples: int
    machine: dict[str, str] = field(default_factory=dict)
    schema: str = SCHEMA

    def to_json(self) -> str:
        """Deterministic JSON; the inverse of `read_report`."""
        return to_json(self)

    def to_markdown(self) -> str:
        """The table for a README or a pull request."""
        headings = columns_of(self)
        rule = ["---" if heading in _TEXT_COLUMNS else "--:" for heading in headings]
        cells = [[COLUMNS[heading](row) for heading in headings] for row in self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in (headings, rule, *cells))


def read_report(data: bytes) -> Report:
    """The report in these JSON bytes; IntegrityError when it is none."""
    return from_json(Report, data, where="report")


# Heading -> what a row says under it.
COLUMNS: dict[str, Callable[[Row], str]] = {
    "Variant": lambda row: row.name,
    "Runtime": lambda row: f"{row.runtime} {row.device}",
    "Batch": lambda row: str(row.batch),
    "File": lambda row: _size(row.file_bytes),
    "Weights": lambda row: _size(row.weights_bytes),
    "Planned": lambda row: _size(row.activation_bytes),
    "Private": lambda row: _measured(row, row.private_bytes),
    "File-backed": lambda row: _measured(row, row.file_backed_bytes),
    "Peak": lambda row: _measured(row, row.peak_bytes),
    "Device": lambda row: _size(row.device_bytes),
    "p50": lambda row: f"{row.p50_ms:.3f} ms" if row.p50_ms is not None else _NONE,
    "Top-1": lambda row: _percent(row.top1),
    "Agree": lambda row: _percent(row.agreement),
}
_TEXT_COLUMNS = ("Variant", "Runtime")
_NONE = "–"


def columns_of(report: Report) -> list[str]:
    """The headings under which some row has something to say."""
    return [heading for heading, said in COLUMNS.items() if any(said(row) != _NONE for row in report.rows)]


def _size(size_bytes: int | None) -> str:
    return _NONE if size_bytes is None else show_size(size_bytes)


def _measured(row: Row, size_bytes: int | None) -> str:
    """A measured size; "unknown" where a measurement could not read it, a dash where there was none."""
    return _NONE if row.reason is not None else show_size(size_bytes)


def _percent(share: float | None) -> str:
    return _NONE if share is None else f"{100 * share:.2f}%"
