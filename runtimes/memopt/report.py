"""A report: the rows of a comparison as frozen values, to JSON, to Markdown and back."""

from __future__ import annotations

import math
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
        header = "| " + " | ".join(COLUMNS) + " |"
        rule = "|" + "|".join("---" if i < 3 else "--:" for i in range(len(COLUMNS))) + "|"
        return "\n".join([header, rule, *("| " + " | ".join(cells_of(row)) + " |" for row in self.rows)])


def read_report(data: bytes) -> Report:
    """The report in these JSON bytes; IntegrityError when it is none."""
    return from_json(Report, data, where="report")


COLUMNS = (
    "Variant", "Runtime", "Batch", "File", "Private", "File-backed", "Peak", "Device", "p50", "Top-1", "Agree",
)  # fmt: skip


def cells_of(row: Row) -> list[str]:
    """The row as text, one string for each of COLUMNS; what was not measured is a dash."""
    if row.reason is not None:
        planned = f"planned {show_size(row.weights_bytes)} weights + {show_size(row.activation_bytes)} activations"
        return [*_what(row), planned, "–", "–", "–", "–", "–", "–"] if row.weights_bytes else [*_what(row), *"–––––––"]
    sizes = [row.private_bytes, row.file_backed_bytes, row.peak_bytes]
    device = show_size(row.device_bytes) if row.device_bytes is not None else "–"
    return [
        *_what(row),
        *(show_size(size) for size in sizes),
        device,
        _ms(row.p50_ms),
        _percent(row.top1),
        _percent(row.agreement),
    ]


def _what(row: Row) -> list[str]:
    return [row.name, f"{row.runtime} {row.device}", str(row.batch), show_size(row.file_bytes)]


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g} ms"


def _percent(share: float | None) -> str:
    return "–" if share is None or math.isnan(share) else f"{100 * share:.2f}%"
