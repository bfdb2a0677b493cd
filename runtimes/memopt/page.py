"""A report as one HTML page: no network, no library, whole without JavaScript, which only sorts.

Names, reasons and the rest of a report are foreign: each text is escaped where it enters, and the page's own policy
lets no script run but the one in the template.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from math import inf
from string import Template

from memopt.charts import text
from memopt.memory import IMPORT, PHASES, START, STEADY
from memopt.pictures import (
    P95,
    P99,
    Quality,
    bill_bars,
    by_batch,
    latency_bars,
    legend,
    libraries,
    per_batch,
    phase_of,
    plan_bars,
    points_of,
    quality_of,
)
from memopt.report import COLUMNS, NONE, TEXT_COLUMNS, Column, Report, Row, columns_of, held_bytes
from memopt.sizes import show_size

_LARGEST_MATRIX, _MISTAKES = 20, 12
_TEXT = (*TEXT_COLUMNS, "Placement", "Phase")
_DEVICE_HEADS = ("Device: process", "Device: all", "Device: runtime")
_LATER = {  # columns that only the page has
    "p95": P95,
    "p99": P99,
    "Load": Column(lambda row: row.load_ms, lambda value: f"{value:.1f} ms"),
    "Placement": Column(lambda row: row.placement),
}


def render(report: Report) -> str:
    """The page, which a file of its own can hold."""
    template = resources.files("memopt").joinpath("page.html").read_text("utf-8")
    script = re.search(r"<script>(.*?)</script>", template, re.DOTALL)
    assert script is not None  # the template is ours
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    measured = [row for row in report.rows if row.reason is None]
    sections = (_gate, _cards, _pareto, _bars, _latency, _planned, _table, _confusions, _every_phase, _methods)
    return Template(template).substitute(
        script_hash=f"sha256-{digest}",
        title=text(f"Memory, accuracy and latency of {_count(len({row.name for row in report.rows}), 'model')}"),
        lead=_lead(report, measured),
        body="\n".join(filter(None, (section(report, measured) for section in sections))),
        footer=f"memopt report, schema {text(report.schema)}. As numbers: <code>memopt-export compare --json</code>.",
    )


def _lead(report: Report, measured: Sequence[Row]) -> str:
    beside = f" on {report.reference_place}" if report.reference_place else ", which could not be measured"
    rows = f"{len(measured)} of {_count(len(report.rows), 'row')} measured, each in a process of its own"
    told = f"{rows}. Judged on {report.samples} samples of {report.source}, beside {report.reference}{beside}."
    return text(told)


# --- one function a section; "" where there is nothing to show


def _gate(report: Report, measured: Sequence[Row]) -> str:
    gate = report.gate
    if gate is None:
        return ""
    first, *lines = gate.lines()
    told = f"<ul>{''.join(f'<li>{text(line)}</li>' for line in lines)}</ul>" if lines else ""
    style = "passed" if gate.passed else "failed"
    return f'<section class="verdict {style}"><strong>{text(first)}</strong>{told}</section>'


def _cards(report: Report, measured: Sequence[Row]) -> str:
    """The best row of each kind at the smallest batch, where there are several to choose from."""
    batch = min((row.batch for row in measured), default=0)
    rows = [row for row in measured if row.batch == batch]
    if len(rows) < 2:  # one has no rival
        return ""
    quality = quality_of(report)
    kinds: tuple[tuple[str, Callable[[Row], float | None], Callable[[Row], str]], ...] = (
        ("least memory", held_bytes, lambda row: show_size(held_bytes(row))),
        ("lowest peak", lambda row: row.peak_bytes, lambda row: show_size(row.peak_bytes)),
        ("fastest", lambda row: row.p50_ms, COLUMNS["p50"].text),
        ("most accurate", _worse_by(quality), quality.text),
        ("smallest file", lambda row: row.file_bytes, lambda row: show_size(row.file_bytes)),
    )
    cards = []
    for title, value, show in kinds:
        known = [(number, i, row) for i, row in enumerate(rows) if (number := value(row)) is not None]
        if known:
            row = min(known)[2]
            cards.append(
                f"<div><small>{title}, batch {batch}</small><b>{text(show(row))}</b>"
                f"<span>{text(row.name)} <small>{text(f'{row.runtime} {row.device}')}</small></span></div>"
            )
    return f'<div class="cards">{"".join(cards)}</div>'


def _worse_by(quality: Quality) -> Callable[[Row], float | None]:
    """A number that is the smaller, the better the row is; None for speed, which is no accuracy."""

    def value(row: Row) -> float | None:
        found = quality.value(row)
        return -found if found is not None and quality.is_accuracy else None

    return value


def _pareto(report: Report, measured: Sequence[Row]) -> str:
    quality = quality_of(report)
    rows = [row for row in measured if held_bytes(row) is not None and quality.value(row) is not None]
    if len(rows) < 2:  # nothing to stand against
        return ""
    panels = [f"<figure><h3>Batch {batch}</h3>{points_of(each, quality)}</figure>" for batch, each in by_batch(rows)]
    what = "" if quality.is_accuracy else "No accuracy is known, so memory stands against speed. "
    note = (
        f"{what}Further left is less memory, further up is better. The dashed line joins those that no other beats in "
        "both; a circle is ONNX Runtime, a square torch, a triangle TensorRT. Rest on a point for its numbers."
    )
    title = "Memory against accuracy" if quality.is_accuracy else "Memory against speed"
    return _section(title, note, f'<div class="panels">{"".join(panels)}</div>')


def _bars(report: Report, measured: Sequence[Row]) -> str:
    rows = [row for row in measured if row.bill is not None and phase_of(row, STEADY) is not None]
    if not rows:
        return ""
    marks = legend(
        ("rect", "load", "private, from loading"),
        ("rect", "runs", "private, from running"),
        ("rect", "mapped", "file-backed: shared, droppable"),
        ("line", "peak", "peak"),
        ("line", "idle", "private after trim"),
        *((("rect", "context", "on the device"),) if any(row.bill and row.bill.device for row in rows) else ()),
    )
    note = "Host memory above the runtime's own, in the steady state. Private memory is what the device loses."
    return _section("Where the memory goes", note, marks + per_batch(rows, bill_bars) + libraries(rows))


def _latency(report: Report, measured: Sequence[Row]) -> str:
    rows = [row for row in measured if row.p50_ms is not None]
    if not rows:
        return ""
    marks = legend(("line", "p50", "p50"), ("rect", "runs", "p50 to p95"), ("line", "p99", "p99"))
    note = f"Of {_runs_of(rows)} timed runs after a warm-up. Where rows lie far apart, the scale is logarithmic."
    return _section("Latency", note, marks + per_batch(rows, latency_bars))


def _planned(report: Report, measured: Sequence[Row]) -> str:
    rows = [row for row in measured if row.activation_bytes is not None]
    if not rows:
        return ""
    marks = legend(("rect", "runs", "planned"), ("rect", "held", "allocated"))
    note = (
        "Activations: what live tensors need at the peak, planned before anything ran, beside what a run asked ONNX "
        "Runtime's allocator for. Other runtimes do not tell. Weights come on top."
    )
    return _section("Plan against measured", note, marks + per_batch(rows, plan_bars))


def _table(report: Report, measured: Sequence[Row]) -> str:
    columns = {name: COLUMNS[name] for name in columns_of(report)}
    columns |= {name: each for name, each in _LATER.items() if any(each.text(row) != NONE for row in report.rows)}
    heads = "".join(f'<th scope="col"{_style(name)}>{text(name)}</th>' for name in columns)
    lines = "".join(_table_row(row, columns, report.reference) for row in report.rows)
    own = f" Metric: {report.metric}." if report.metric else ""
    note = (
        "Click a heading to sort. x memory and x p50 are multiples of the reference's at the same batch; leak is "
        f"private memory that 1,000 runs add; worst is the sample furthest from the reference.{own}"
    )
    table = f'<table class="rows"><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table>'
    return _section("Every row", note, f'<div class="scroll">{table}</div>')


def _confusions(report: Report, measured: Sequence[Row]) -> str:
    first = {(row.name, row.runtime, row.device): row for row in reversed(measured) if row.confusion is not None}
    rows = [row for row in measured if row in first.values()]  # at one batch: the answers are those of the others
    if not rows:
        return ""
    note = "Rows are labels, columns are answers: how often each answer was given for each label."
    return _section("Confusion", note, "".join(_confusion(row, report.classes, is_open=row is rows[0]) for row in rows))


def _every_phase(report: Report, measured: Sequence[Row]) -> str:
    rows = [row for row in measured if row.bill is not None]
    if not rows:
        return ""
    heads = ("Variant", "Phase", "Private", "File-backed", "PSS", "Peak", *_DEVICE_HEADS)
    titles = "".join(f'<th scope="col"{_style(head)}>{head}</th>' for head in heads)
    lines = "".join("".join(_phase_rows(row)) for row in rows)
    table = f'<table class="rows"><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table>'
    note = (
        "Start and import are absolute: the process before and with the runtime's library. The others are above it, "
        "a peak is that of its phase."
    )
    inside = f'<details><summary>The whole bill of every row</summary><div class="scroll">{table}</div></details>'
    return _section("Phase by phase", note, inside)


def _methods(report: Report, measured: Sequence[Row]) -> str:
    facts = {name: value for name, value in report.machine.items() if name != "memory_bytes"}
    memory = report.machine.get("memory_bytes", "")
    facts |= {"memory": show_size(int(memory))} if memory.isdigit() else {}
    methods: dict[str, None] = {}
    for row in measured:
        methods |= dict.fromkeys(_methods_of(row))
    listed = "".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in facts.items())
    parts = (method.partition(": ") for method in methods)
    told = "".join(f"<dt>{text(what)}</dt><dd>{text(how)}</dd>" for what, _, how in parts)
    read = f"<h3>How each number was read</h3><dl>{told}</dl>" if told else ""
    return _section("Machine and methods", "", f"<dl>{listed}</dl>{read}")


# --- tables


def _table_row(row: Row, columns: dict[str, Column], reference: str) -> str:
    cells = []
    for name, column in columns.items():
        value = column.value(row)
        key = value if isinstance(value, (int, float, str)) else getattr(value, "max_difference", "")
        key = "1e999" if key == inf else key  # which JavaScript takes for an infinity
        said = text(column.text(row))
        if name == "Variant":
            said += "".join(f"<small>{text(why)}</small>" for why in (row.reason, row.note) if why)
        cells.append(f'<td{_style(name)} data-v="{text(str(key))}">{said}</td>')
    style = ' class="reference"' if row.name == reference else ""
    return f"<tr{style}>{''.join(cells)}</tr>"


def _style(heading: str) -> str:
    """The class of a column's cells; what only a screen has room for is not printed."""
    if heading == "Variant":
        return ' class="text name"'
    names = (["text"] if heading in _TEXT else []) + (["screen"] if heading in _LATER else [])
    return f' class="{" ".join(names)}"' if names else ""


def _phase_rows(row: Row) -> Iterator[str]:
    assert row.bill is not None  # the caller chose such rows
    for phase in PHASES:
        host, device = row.bill.phases.get(phase), row.bill.device.get(phase)
        if host is None:
            continue
        sizes = [host.private_bytes, host.file_backed_bytes, host.proportional_bytes, host.peak_bytes]
        known = [(value, show_size(value)) for value in sizes]
        on_device = (device.process_bytes, device.used_bytes, device.allocator_bytes) if device else (None,) * 3
        known += [(value, show_size(value) if device else NONE) for value in on_device]
        cells = "".join(f'<td data-v="{"" if value is None else value}">{said}</td>' for value, said in known)
        who = f'<td{_style("Variant")} data-v="{text(row.name)}">{text(row.name)}<small>{text(row.place)}</small></td>'
        yield f'<tr>{who}<td class="text" data-v="{PHASES.index(phase)}">{phase}</td>{cells}</tr>'


def _confusion(row: Row, classes: Sequence[str], *, is_open: bool) -> str:
    counts = row.confusion or ()
    names = [classes[i] if i < len(classes) else str(i) for i in range(len(counts))]
    inside = _matrix(counts, names) if len(counts) <= _LARGEST_MATRIX else _mistakes(counts, names)
    head = f"<summary>{text(row.name)} <small>{text(row.place)}</small></summary>"
    return f"<details{' open' if is_open else ''}>{head}{inside}</details>"


def _matrix(counts: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    heads = "".join(f"<th>{text(name)}</th>" for name in names)
    lines = []
    for name, line in zip(names, counts, strict=True):
        total = max(sum(line), 1)
        cells = "".join(
            f'<td style="background:rgba(var(--heat),{0.75 * count / total:.2f})">{count or ""}</td>' for count in line
        )
        lines.append(f'<tr><th class="text">{text(name)}</th>{cells}</tr>')
    table = f'<table class="matrix"><thead><tr><th></th>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
    return f'<div class="scroll">{table}</div>'


def _mistakes(counts: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """Of many classes, the confusions that are most frequent."""
    wrong = [(count, i, j) for i, line in enumerate(counts) for j, count in enumerate(line) if i != j and count]
    lines = "".join(
        f'<tr><td class="text">{text(names[i])}</td><td class="text">{text(names[j])}</td><td>{count}</td></tr>'
        for count, i, j in sorted(wrong, reverse=True)[:_MISTAKES]
    )
    heads = '<th class="text">Label</th><th class="text">Answer</th><th>Times</th>'
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table></div>'


# --- small things


def _section(title: str, note: str, inside: str) -> str:
    said = f'<p class="note">{text(note)}</p>' if note else ""
    return f"<section><h2>{text(title)}</h2>{said}{inside}</section>"


def _runs_of(rows: Sequence[Row]) -> str:
    counts = [row.runs for row in rows if row.runs is not None]
    if not counts:
        return "the"
    return str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"


def _methods_of(row: Row) -> Iterator[str]:
    """The methods of a row's bill, each as "what: how"."""
    if row.bill is None:
        return
    start = row.bill.phases.get(START) or row.bill.phases.get(IMPORT)
    if start is not None:
        yield f"host memory: {start.method}"
    if row.bill.allocator is not None:
        yield f"allocator ({row.runtime}): {row.bill.allocator.method}"
    for memory in row.bill.device.values():
        for field, method in memory.methods.items():
            yield f"device, {field.removesuffix('_bytes')} ({row.runtime}): {method}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
