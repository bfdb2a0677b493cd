"""The pictures of a report: its rows as bars and points, by what they hold, how long they take, what was planned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from memopt.charts import Point, Segment, Tick, bar, scale_for, scatter, text
from memopt.memory import AFTER_TRIM, IMPORT, LOAD, STEADY, HostMemory
from memopt.report import COLUMNS, NONE, Column, Report, Row, held_bytes
from memopt.sizes import show_size

P95 = Column(lambda row: row.p95_ms, COLUMNS["p50"].show)
P99 = Column(lambda row: row.p99_ms, COLUMNS["p50"].show)

_MIB = 2**20
_MOST_OPEN = 24  # rows of a picture that are shown at once; the other batches fold
_SHAPES = {"onnxruntime": "circle", "torch": "square", "tensorrt": "triangle", "tensorrt-rtx": "triangle"}


Drawn = tuple[Row, list[str], str, str]  # a row, its bars, and what stands beside them: large, small


@dataclass(frozen=True)
class Quality:
    """What stands against memory: the more, the better."""

    title: str
    value: Callable[[Row], float | None]
    show: Callable[[float], str]
    is_accuracy: bool = True

    def text(self, row: Row) -> str:
        """A dash where it is not known."""
        value = self.value(row)
        return NONE if value is None else self.show(value)


def quality_of(report: Report) -> Quality:
    """The user's metric, top-1, agreement or SQNR, whichever is known first; speed where none is."""

    def percent(value: float) -> str:
        return f"{100 * value:.4g}%"

    choices = (
        Quality(report.metric or "metric", lambda row: row.metric, lambda value: f"{value:.4g}"),
        Quality("Top-1", lambda row: row.top1, percent),
        Quality("Agreement with the reference", lambda row: row.agreement, percent),
        Quality("SQNR", lambda row: row.sqnr_db, lambda value: f"{value:.3g} dB"),
    )
    fastest = Quality(
        "p50", lambda row: -row.p50_ms if row.p50_ms else None, lambda value: f"{abs(value):.3g} ms", is_accuracy=False
    )
    known = (each for each in choices if any(each.value(row) is not None for row in report.rows if not row.reason))
    return next(known, fastest)


def points_of(rows: Sequence[Row], quality: Quality) -> str:
    """Memory against quality; the rows know both."""
    points = [
        Point(
            (held_bytes(row) or 0) / _MIB,
            quality.value(row) or 0.0,
            row.name,
            f"{row.name} on {row.place}: {show_size(held_bytes(row))}, {quality.text(row)}",
            _SHAPES.get(row.runtime, "diamond"),
        )
        for row in rows
    ]
    memory = "memory, MiB" if all(row.device == "cpu" for row in rows) else "memory of host and device, MiB"
    return scatter(
        points, x_title=f"private {memory}", y_title=quality.title, show_x=lambda value: f"{value:.4g}",
        show_y=quality.show,
    )  # fmt: skip


def bill_bars(rows: Sequence[Row]) -> Iterator[Drawn]:
    """Private memory by where it came from, file-backed memory, peak, what stays after trim; the device below."""
    scale = scale_for([_extent(row) for row in rows], from_zero=True)
    for row in rows:
        steady, load = phase_of(row, STEADY), phase_of(row, LOAD)
        assert steady is not None  # the caller chose such rows
        private, mapped = max(steady.private_bytes or 0, 0), max(steady.file_backed_bytes or 0, 0)
        loaded = min(max((load or steady).private_bytes or 0, 0), private)
        segments = _stacked(scale.high, (
            (loaded, "load", f"private, from loading: {show_size(loaded)}"),
            (private - loaded, "runs", f"private, from running: {show_size(private - loaded)}"),
            (mapped, "mapped", f"file-backed: {show_size(mapped)}"),
        ))  # fmt: skip
        trimmed = phase_of(row, AFTER_TRIM)
        idle_bytes = trimmed.private_bytes if trimmed is not None else None
        ticks = _ticks(scale.high, (
            (row.peak_bytes, "peak", f"peak: {show_size(row.peak_bytes)}"),
            (idle_bytes, "idle", f"private after trim: {show_size(idle_bytes)}"),
        ))  # fmt: skip
        lines = [bar(segments, ticks, label=f"{show_size(row.private_bytes)} private")]
        if row.device_bytes is not None:
            share = min(max(row.device_bytes, 0) / scale.high, 1.0)
            lines.append(bar([Segment(0, share, "context", f"device: {show_size(row.device_bytes)}")], label="device"))
        on_device = f", device {show_size(row.device_bytes)}" if row.device_bytes is not None else ""
        yield row, lines, f"{show_size(row.private_bytes)} private", f"peak {show_size(row.peak_bytes)}{on_device}"


def _extent(row: Row) -> float:
    steady = phase_of(row, STEADY)
    held = (row.peak_bytes, row.device_bytes, steady.resident_bytes if steady is not None else None)
    return max((value for value in held if value is not None), default=0)


def latency_bars(rows: Sequence[Row]) -> Iterator[Drawn]:
    """From p50 to p95, with p99."""
    times = [value for row in rows for value in (row.p50_ms, row.p95_ms, row.p99_ms) if value is not None]
    scale = scale_for(times)
    scale = scale if scale.logarithmic else scale_for(times, from_zero=True)
    for row in rows:
        start, end = (scale.share(value or row.p50_ms or 0) for value in (row.p50_ms, row.p95_ms))
        pieces = [Segment(start, end, "runs", f"p50 to p95: {COLUMNS['p50'].text(row)} to {P95.text(row)}")]
        ticks = [Tick(start, "p50", f"p50: {COLUMNS['p50'].text(row)}")]
        if row.p99_ms is not None:
            ticks.append(Tick(scale.share(row.p99_ms), "p99", f"p99: {P99.text(row)}"))
        rest = ", ".join(f"{name} {value:.3g}" for name, value in (("p95", row.p95_ms), ("p99", row.p99_ms)) if value)
        yield row, [bar(pieces, ticks, label=f"p50 {COLUMNS['p50'].text(row)}")], COLUMNS["p50"].text(row), rest


def plan_bars(rows: Sequence[Row]) -> Iterator[Drawn]:
    """Activations as planned; below, as the runtime's allocator was asked for them at the peak of a run."""
    scale = scale_for([max(row.activation_bytes or 0, allocated_bytes(row) or 0) for row in rows], from_zero=True)
    for row in rows:
        planned, allocated = show_size(row.activation_bytes), allocated_bytes(row)
        lines = [_whole_bar(row.activation_bytes or 0, scale.high, "runs", f"planned: {planned}")]
        rest = "not told"
        if allocated is not None:
            rest = f"{show_size(allocated)} allocated"
            rest += f", {row.activation_bytes / allocated:.2f}x planned" if row.activation_bytes and allocated else ""
            lines.append(_whole_bar(allocated, scale.high, "held", f"allocated: {show_size(allocated)}"))
        yield row, lines, f"{planned} planned", rest


def _whole_bar(size: float, whole: float, style: str, title: str) -> str:
    return bar(_stacked(whole, ((size, style, title),)), label=title)


def allocated_bytes(row: Row) -> int | None:
    """What a run asked the runtime's allocator for, at its peak; None where it does not tell."""
    return row.bill.allocator.activation_bytes if row.bill is not None and row.bill.allocator is not None else None


def _stacked(whole: float, pieces: Sequence[tuple[float, str, str]]) -> list[Segment]:
    found, start = [], 0.0
    for size, style, title in pieces:
        end = min(start + size / whole, 1.0)
        found.append(Segment(start, end, style, title))
        start = end
    return found


def _ticks(whole: float, marks: Sequence[tuple[int | None, str, str]]) -> list[Tick]:
    return [Tick(min(max(at, 0) / whole, 1.0), style, title) for at, style, title in marks if at is not None]


def per_batch(rows: Sequence[Row], draw: Callable[[Sequence[Row]], Iterator[Drawn]]) -> str:
    """The bars of each batch on a scale of their own; where they are many, all but the first batch fold."""
    groups = by_batch(rows)
    pieces = []
    for i, (batch, each) in enumerate(groups):
        is_open = " open" if i == 0 or len(rows) <= _MOST_OPEN else ""
        lines = "".join(_bar_row(*drawn) for drawn in draw(each))
        pieces.append(
            f'<details class="batch"{is_open}><summary>Batch {batch}</summary><div class="bars">{lines}</div></details>'
        )
    return "".join(pieces)


def _bar_row(row: Row, bars: Sequence[str], value: str, rest: str) -> str:
    place = text(f"{row.runtime} {row.device}")
    return (
        f'<div class="entry"><div class="who">{text(row.name)}<small>{place}</small></div>'
        f'<div class="lines">{"".join(bars)}</div>'
        f'<div class="value num">{text(value)}<small>{text(rest)}</small></div></div>'
    )


def libraries(rows: Sequence[Row]) -> str:
    """What each runtime takes before there is a model, by the first row that ran on it."""
    first = {(row.runtime, row.device): row for row in reversed(rows)}
    lines = []
    for (runtime, device), row in sorted(first.items()):
        library = row.bill.library if row.bill is not None else None
        context = row.bill.device.get(IMPORT) if row.bill is not None else None
        if library is not None:
            sizes = [show_size(size) for size in (library.private_bytes, library.file_backed_bytes)]
            sizes.append(show_size(context.process_bytes) if context is not None else NONE)
            cells = "".join(f"<td>{size}</td>" for size in sizes)
            lines.append(f'<tr><td class="text">{text(f"{runtime} {device}")}</td>{cells}</tr>')
    if not lines:
        return ""
    heads = '<th class="text">Runtime</th><th>Private</th><th>File-backed</th><th>Context on the device</th>'
    note = "What importing the runtime's library takes, in every process; it is in no bar above."
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f'<h3>Before there is a model</h3><p class="note">{note}</p><div class="scroll">{table}</div>'


def legend(*entries: tuple[str, str, str]) -> str:
    """What colours and marks mean: (kind of mark, style, name) each."""
    marks = {
        "rect": '<svg width="14" height="12"><rect class="{}" width="14" height="12" rx="2"/></svg>',
        "line": '<svg width="8" height="14"><line class="{}" x1="4" x2="4" y1="0" y2="14"/></svg>',
    }
    items = "".join(f"<li>{marks[kind].format(style)}{text(name)}</li>" for kind, style, name in entries)
    return f'<ul class="legend">{items}</ul>'


def by_batch(rows: Sequence[Row]) -> list[tuple[int, list[Row]]]:
    """The rows of each batch, the smallest first."""
    return [(batch, [row for row in rows if row.batch == batch]) for batch in sorted({row.batch for row in rows})]


def phase_of(row: Row, name: str) -> HostMemory | None:
    """One phase of the row's bill; None where it was not read."""
    return row.bill.phases.get(name) if row.bill is not None else None
