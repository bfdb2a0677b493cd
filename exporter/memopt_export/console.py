"""What people see: tables on stdout, progress on stderr. The only file that draws."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from memopt import compare
from memopt.errors import printable
from memopt.gate import LEAK_BYTES
from memopt.memory import STEADY
from memopt.report import COLUMNS, TEXT_COLUMNS, Report, Row, columns_of
from memopt.sizes import show_count, show_size
from memopt.strict_json import to_json
from memopt_export.bundle_commands import Packed, Predicted, SavedKey, Verification
from memopt_export.commands import Diagnosis, Needs, Plans, SavedEngine, SavedGraph, SavedSimple
from memopt_export.inspection import Inspection
from memopt_export.quantize_commands import SavedQuantized
from memopt_export.training_commands import Pruned, SavedCheckpoint

if TYPE_CHECKING:
    from rich.console import Console

    from memopt_export.budget import Sensitivity
    from memopt_export.findings import Finding
    from memopt_export.judge import Verdict
    from memopt_export.means import Step
    from memopt_export.pipeline import Result
    from memopt_export.stages import Outcome
    from memopt_models.layer_costs import Shrunk
    from memopt_models.train import Progress

_WIDTH_OF_PIPES = 160  # what is not a terminal has no width of its own
_REFRESH_S = 0.1
# What a pruning takes out, by the way it went.
_WAYS = {
    "channels": "channels, with all that depend on each other",
    "channels-here": "channels, with all that depend on each other",
    "hidden": "the features hidden between two layers",
}
# Columns of a report that a narrow terminal does without, the most dispensable first.
_FIRST_TO_GO = (
    "Worst", "Leak", "Weights", "Top-5", "Planned", "File-backed", "x p50", "SQNR", "Agree", "File", "x memory",
    "Device", "Metric", "p50", "Batch",
)  # fmt: skip


def show(value: Any, *, as_json: bool) -> None:
    """The result of a command on stdout: a drawing for people, or one JSON document."""
    if as_json:
        sys.stdout.write(to_json(value) + "\n")
        return
    _DRAW[type(value).__name__](_console(sys.stdout), value)


@contextmanager
def training(*, quiet: bool = False) -> Iterator[Callable[[Progress], None]]:
    """Shows the steps of a training as one line that is overwritten, and one line that stays for each epoch."""
    if quiet:
        yield lambda progress: None
        return
    with _progress_line() as line:
        yield lambda progress: _show_step(line, progress)


@contextmanager
def measuring() -> Iterator[compare.Listener]:
    """Shows what is being measured, and each row as it is finished."""
    with _progress_line() as line:
        yield compare.Listener(
            lambda cell, number, total: line.overwrite(f"  {number}/{total} {cell.key} …"),
            lambda row: line.stay(f"  {row.key}: {_brief(row)}"),
        )


@dataclass(frozen=True)
class Listener:
    """What the pipeline tells: each stage when it starts and when it is done, and the steps of training."""

    line: _Line

    def on_start(self, stage: str) -> None:
        """A stage has to be made."""
        self.line.overwrite(f"  {stage} …")

    def on_done(self, outcome: Outcome) -> None:
        """A stage is there."""
        said = "cached" if outcome.cached else f"{outcome.seconds:.1f} s"
        self.line.stay(f"✔ {outcome.stage:<28} {said:>7}")

    def on_progress(self, progress: Progress) -> None:
        """A training made a step."""
        _show_step(self.line, progress, keep_epochs=False)


@contextmanager
def pipeline() -> Iterator[Listener]:
    """Shows the stages of a pipeline, one line each."""
    with _progress_line() as line:
        yield Listener(line)


@dataclass(frozen=True)
class QuantizeListener:
    """What a quantization tells: each step, and what it needs."""

    line: _Line

    def on_step(self, step: Step) -> None:
        """A run or a layer is done."""
        self.line.overwrite(f"  {step.what} {step.done}/{step.total}")

    def say(self, text: str) -> None:
        """Something that stays."""
        self.line.stay(f"  {text}")


@contextmanager
def quantizing() -> Iterator[QuantizeListener]:
    """Shows where a quantization stands, as one line that is overwritten."""
    with _progress_line() as line:
        yield QuantizeListener(line)


class _Line:
    """The last line on stderr: overwritten on a terminal, left out elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last = 0.0

    def overwrite(self, text: str) -> None:
        """Shows `text` until the next one comes; at most ten times a second."""
        now = time.monotonic()
        if self._console.is_terminal and now - self._last >= _REFRESH_S:
            self._last = now
            self._console.file.write("\r\x1b[2K" + printable(text)[: self._console.width - 1])
            self._console.file.flush()

    def stay(self, text: str) -> None:
        """Prints a line that stays."""
        self.clear()
        _say(self._console, text)

    def clear(self) -> None:
        """Empties the line."""
        if self._console.is_terminal:
            self._console.file.write("\r\x1b[2K")
            self._console.file.flush()


@contextmanager
def _progress_line() -> Iterator[_Line]:
    line = _Line(_console(sys.stderr))
    try:
        yield line
    finally:
        line.clear()


def _show_step(line: _Line, progress: Progress, *, keep_epochs: bool = True) -> None:
    if progress.note:
        show = line.overwrite if progress.note.endswith("…") else line.stay
        show(f"  {progress.stage} {progress.note}")
        return
    where = f"{progress.stage} epoch {progress.epoch}/{progress.epochs}  loss {progress.loss:.4f}"
    if progress.validation_top1 is None:
        line.overwrite(f"  {where}  step {progress.step}/{progress.steps}")
        return
    said = f"  {where}  validation {100 * progress.validation_top1:.2f}%  peak {show_size(progress.peak_bytes)}"
    if progress.peak_device_bytes is not None:
        said += f", device {show_size(progress.peak_device_bytes)}"
    if keep_epochs:
        line.stay(said)
    else:
        line.overwrite(said)


def _brief(row: Row) -> str:
    if row.reason is not None:
        return f"not measured: {row.reason}"
    return f"{show_size(row.private_bytes)} private, {row.p50_ms:.3g} ms"


def _console(stream: Any) -> Console:
    from rich.console import Console

    return Console(file=stream, width=None if stream.isatty() else _WIDTH_OF_PIPES, highlight=False)


def _facts(console: Console, facts: Mapping[str, object]) -> None:
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        if value is not None:
            table.add_row(name, _escape(str(value)))
    console.print(table)


def _table(console: Console, columns: Mapping[str, str], rows: list[list[str]]) -> None:
    """A table; `columns` maps headings to "left" or "right"."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading, justify in columns.items():
        table.add_column(heading, justify="right" if justify == "right" else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_escape(cell) for cell in row))
    console.print(table)


def _say(console: Console, text: str, *, style: str | None = None) -> None:
    """A line as it is: folded at words on a terminal, whole in a pipe."""
    console.print(printable(text), markup=False, highlight=False, soft_wrap=not console.is_terminal, style=style)


def _say_reasons(console: Console, what: str, reasons: Sequence[tuple[str, str]]) -> None:
    """One line for each reason, with the names that share it."""
    names: dict[str, dict[str, None]] = {}
    for name, reason in reasons:
        names.setdefault(reason, {})[name] = None
    for reason, sharing in names.items():
        _say(console, f"{what} {reason} ({', '.join(sharing)})")


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(printable(text))


def _draw_checkpoint(console: Console, saved: SavedCheckpoint) -> None:
    facts: dict[str, object] = {
        "saved": f"{saved.path} ({show_size(saved.size_bytes)})",
        "network": f"{saved.network}, {saved.parameters} parameters",
        "began fresh": ", ".join(saved.fresh) or None,
        "warning": (saved.warning or "").removeprefix("warning: ") or None,
    }
    shares = {name: f"{100 * value:.2f}%" for name, value in saved.metrics.items() if "top1" in name}
    if saved.pruned is not None:
        facts |= _pruned_facts(saved.pruned, saved.metrics)
    _facts(console, facts | {name.replace("_", " "): text for name, text in shares.items()} | {"sha256": saved.sha256})
    if saved.pruned is not None and "way" in saved.pruned.note:
        _draw_parts(console, saved.pruned.parts)
    _next(console, f"memopt-export export {saved.path} -o {_with(saved.path, '.onnx')}")


def _pruned_facts(pruned: Pruned, metrics: Mapping[str, float]) -> dict[str, object]:
    note = pruned.note
    if "way" not in note:
        return _sparse_facts(note, metrics)
    facts: dict[str, object] = {
        f"not by {way}": f"{why}; what was done instead: {_WAYS[note['way']]}" for way, why in note["instead"].items()
    }
    steps = ", then ".join(f"{100 * ratio:.1f}%" for ratio in note["ratios"])
    facts["pruned"] = f"{steps} of {_WAYS[note['way']]}, ranked by {note['method']}, scope {note['scope']}"
    target = note["target"]
    if target is not None:
        show = show_size if target["measure"] == "memory" else show_count
        what = f"planned memory at batch {target['batch']}" if target["measure"] == "memory" else target["measure"]
        reached, limit, before = (show(note[name]) for name in ("after", "limit", "before"))
        facts[what] = f"{reached}, {limit} allowed, {before} before"
    return facts


def _sparse_facts(note: Mapping[str, Any], metrics: Mapping[str, float]) -> dict[str, object]:
    """What zeros save, and what they do not."""
    after, before = (show_size(metrics[name]) for name in ("compressed_bytes", "compressed_bytes_before"))
    saves = "a compressed file, nothing else: zeros are stored and computed with like any other number"
    if "pattern" in note["kind"]:
        saves = "time in TensorRT from sm80 on where the pattern is 2:4, and a compressed file; nothing else"
    return {
        "zeros": f"{100 * metrics['zeros']:.2f}% of the parameters, in {len(note['layers'])} layers",
        "left dense": _some(note["skipped"]),
        "compressed": f"{after}, before {before} (weights, as gzip does it)",
        "saves": saves,
    }


def _draw_parts(console: Console, parts: Sequence[Shrunk]) -> None:
    """Each part of the network before and after."""
    columns = {"Part": "left"} | dict.fromkeys(("Layers", "Outputs", "Parameters", "MACs"), "right")
    rows = [
        [part.name, str(part.layers)]
        + [_shrunk(getattr(part.before, cost), getattr(part.after, cost)) for cost in ("outputs", "parameters", "macs")]
        for part in parts
    ]
    _table(console, columns, rows)


def _shrunk(before: int, after: int) -> str:
    return show_count(before) if before == after else f"{show_count(before)} → {show_count(after)}"


def _draw_graph(console: Console, saved: SavedGraph) -> None:
    parity = saved.parity
    facts = {
        "saved": f"{saved.path} ({show_size(saved.size_bytes)})",
        "program": saved.program,
        "precision": f"{saved.precision.upper()} by training" if saved.precision != "fp32" else None,
        "parity": f"largest difference {parity.max_difference:.2g} of {parity.largest_output:.3g} "
        f"on {parity.samples} samples",
        "agreement": f"{100 * parity.agreement:.2f}%" if parity.agreement is not None else None,
        "weights sha256": saved.weights_sha256,
    }
    _facts(console, facts)
    if saved.precision == "fp32":
        _next(console, f"memopt-export quantize {saved.path} --data digits -o {_with(saved.path, '-int8.onnx')}")
    else:
        _next(console, f"memopt-export compare {saved.path} --data digits")


def _draw_simple(console: Console, saved: SavedSimple) -> None:
    facts = {
        "saved": f"{saved.path} ({show_size(saved.size_bytes)}, before {show_size(saved.source_bytes)})",
        "nodes": f"{saved.nodes}, before {saved.source_nodes}",
        "sha256": saved.sha256,
    }
    _facts(console, facts)
    _next(console, f"memopt-export inspect {saved.path}")


def _draw_quantized(console: Console, saved: SavedQuantized) -> None:
    verdict = saved.verdict
    facts = {
        "saved": f"{saved.path} ({show_size(verdict.size_bytes)}, float {show_size(verdict.float_bytes)})",
        "recipe": saved.recipe.recipe.text(),
        "saved as": saved.recipe_path,
        "calibrated": f"on {saved.calibrated}" if saved.calibrated else None,
        "fused": f"{verdict.fused[0]} of {verdict.fused[1]} layers by ONNX Runtime" if verdict.fused else None,
        "kept float": _some(saved.kept_float),
        "budget": saved.reached,
        "judged": f"on {verdict.samples} samples of {verdict.source}" if verdict.samples else None,
    }
    _facts(console, facts | _verdict_facts(verdict))
    if saved.ranking:
        _draw_ranking(console, saved.ranking)
    for note in saved.notes:
        _say(console, f"note: {note}")
    for reason in verdict.reasons:
        _say(console, f"not known: {reason}")
    for flag in verdict.flags:
        _say(console, f"flagged: {flag}", style="bold")
    _draw_findings(console, saved.findings, saved.unseen)
    if saved.recipe.data is not None:
        _next(console, f"memopt-export compare {saved.path} --data {saved.recipe.data}")


def _verdict_facts(verdict: Verdict) -> dict[str, object]:
    facts: dict[str, object] = {}
    if verdict.sqnr_db is not None:
        facts["SQNR"] = f"{verdict.sqnr_db:.1f} dB"
    if verdict.kl_divergence is not None:
        facts["KL divergence"] = f"{verdict.kl_divergence:.3g} nats"
    if verdict.agreement is not None:
        facts["agreement"] = f"{100 * verdict.agreement:.2f}%"
    if verdict.top1 is not None and verdict.float_top1 is not None:
        facts["top-1"] = f"{100 * verdict.top1:.2f}%, float {100 * verdict.float_top1:.2f}%"
    if verdict.measured is not None and verdict.float_measured is not None:
        after, before = verdict.measured, verdict.float_measured
        now, was = after.bill.phases[STEADY], before.bill.phases[STEADY]
        facts["latency"] = f"{after.p50_ms:.3g} ms at batch {verdict.batch}, float {before.p50_ms:.3g} ms"
        facts["private"] = f"{show_size(now.private_bytes)}, float {show_size(was.private_bytes)}"
        facts["peak"] = f"{show_size(after.bill.peak_bytes)}, float {show_size(before.bill.peak_bytes)}"
    return facts


def _draw_ranking(console: Console, ranking: Sequence[Sensitivity]) -> None:
    """What the whole graph reaches when one layer alone stays float, the best first, and what that costs."""
    columns = {"Kept float": "left", "Operator": "left", "SQNR": "right"}
    columns |= {"Top-1": "right", "Weights": "right", "Activations": "right"}
    rows = [
        [each.layer, each.operator, f"{each.sqnr_db:.1f} dB", _cell("top1", each.top1),
         _added(each.weights_bytes), _added(each.activation_bytes)]
        for each in ranking
    ]  # fmt: skip
    _table(console, columns, rows)
    _say(
        console, "SQNR and top-1 are those of the whole graph when this layer alone stays float; sizes are what it adds"
    )


def _added(size_bytes: int) -> str:
    return f"{'' if size_bytes < 0 else '+'}{show_size(size_bytes)}"


def _some(names: Sequence[str], *, at_most: int = 8) -> str | None:
    """The names, or the first of them and how many more there are; None where there are none."""
    more = f" and {len(names) - at_most} more (--json has all)" if len(names) > at_most else ""
    return ", ".join(names[:at_most]) + more or None


def _draw_engine(console: Console, saved: SavedEngine) -> None:
    if saved.info is not None:
        info = saved.info
        _facts(
            console,
            {
                "saved": f"{saved.path} ({show_size(saved.size_bytes)}) and {saved.path}.json",
                "built by": f"{info.flavor} {info.version} in {info.build_seconds or 0:.1f} s, "
                f"peak {show_size(info.build_peak_bytes)}",
                "targets": ", ".join(info.targets),
                "weights": show_size(info.weights_bytes),
            },
        )
        rows = [[_range(profile.batches), show_size(profile.activation_bytes)] for profile in info.profiles]
        _table(console, {"Profile": "left", "Activations": "right"}, rows)
    for target, why in saved.refused.items():
        _say(console, f"not for {target}: {why}")


def _draw_needs(console: Console, found: Needs) -> None:
    batches = [batch for batch, _ in found.needs[0].points] if found.needs else []
    columns = {"Variant": "left", "Runtime": "left", "Weights": "right"}
    columns |= {f"Batch {batch}": "right" for batch in batches}
    columns |= {"Largest": "right"} if found.budget_bytes is not None else {}
    rows = [
        [need.name, need.runtime, show_size(need.weights_bytes), *(show_size(size) for _, size in need.points)]
        + ([str(need.largest_batch or "nothing")] if found.budget_bytes is not None else [])
        for need in found.needs
    ]
    _table(console, columns, rows)
    _say_reasons(console, "by", [(need.name, need.method) for need in found.needs])


def _draw_plans(console: Console, plans: Plans) -> None:
    columns = dict.fromkeys(("Batch", "Weights", "Peak activations", "Input", "Output"), "right") | {"Peak at": "left"}
    rows = [
        [str(plan.batch), *map(show_size, (plan.weights_bytes, plan.activation_bytes, plan.input_bytes)),
         show_size(plan.output_bytes), plan.peak_node]
        for plan in plans.plans
    ]  # fmt: skip
    _table(console, columns, rows)
    first = plans.plans[0]
    held = [f"{name} {show_size(size)}" for name, size in first.peak_tensors]
    held += [f"and {show_size(first.peak_scratch_bytes)} of its kernel"] if first.peak_scratch_bytes else []
    facts = {
        "nodes": f"{len(first.steps)}, as executed by {first.by}",
        "weights": ", ".join(f"{dtype} {show_size(size)}" for dtype, size in first.weights.items()) or None,
        "at the peak": _some(held),
        "at least, without": _some(first.unknown) and f"{_some(first.unknown)}, whose sizes depend on values",
        "tensors, measured": ", ".join(f"batch {batch}: {show_size(size)}" for batch, size in plans.measured) or None,
        "as a line": plans.line and f"{show_size(round(plans.line[0]))} and {show_size(round(plans.line[1]))} a sample",
        "method": plans.measured_by,
        "drawn": plans.svg,
    }
    if plans.peak_before_bytes is not None:
        peaks = f"{show_size(plans.peak_before_bytes)} before, {show_size(first.activation_bytes)} now"
        facts["reordered"] = f"{plans.reordered}: {peaks}" if plans.reordered else None
    _facts(console, facts)
    if plans.budget_bytes is not None:
        answer = f"batch {plans.largest_batch}" if plans.largest_batch is not None else "nothing"
        _say(console, f"largest within {show_size(plans.budget_bytes)}: {answer}")


def _draw_report(console: Console, report: Report) -> None:
    headings, left_out = _fitting(console.width, report)
    columns = {heading: "left" if heading in TEXT_COLUMNS else "right" for heading in headings}
    _table(console, columns, [[COLUMNS[heading].text(row) for heading in headings] for row in report.rows])
    if left_out:
        _say(console, f"left out at this width: {', '.join(left_out)} (--json has all)")
    missing = [(row.name, f"{row.runtime} {row.device}: {row.reason}") for row in report.rows if row.reason is not None]
    _say_reasons(console, "not measured on", missing)
    notes = [(row.name, f"{row.runtime} {row.device}: {row.note}") for row in report.rows if row.note is not None]
    _say_reasons(console, "not judged on", notes)
    beside = f"{report.reference} on {report.reference_place}" if report.reference_place else report.reference
    own = f"; metric {report.metric}" if report.metric else ""
    _say(
        console,
        f"{report.samples} samples of {report.source}{own}; reference {beside}; "
        "host memory above each runtime's own baseline, one fresh process a row",
    )
    for row in report.rows:
        if (row.leak_bytes_per_1000_runs or 0) >= LEAK_BYTES:
            grown = show_size(row.leak_bytes_per_1000_runs)
            _say(console, f"grows: {row.key}, by {grown} of private memory in 1,000 runs", style="bold")
    for line in report.gate.lines() if report.gate is not None else ():
        _say(console, line, style="bold" if line.startswith(("worse", "broken")) else None)


def _fitting(width: int, report: Report) -> tuple[list[str], list[str]]:
    """The headings whose columns stand side by side within this width, and those that had to go."""
    headings = columns_of(report)
    widths = {name: max(len(name), *(len(COLUMNS[name].text(row)) for row in report.rows)) for name in headings}
    left_out: list[str] = []
    for name in _FIRST_TO_GO:
        if sum(widths[heading] + 3 for heading in headings) > width and name in headings:
            headings.remove(name)
            left_out.append(name)
    return headings, left_out


def _draw_packed(console: Console, packed: Packed) -> None:
    facts = {
        "packed": f"{packed.path} ({show_size(packed.size_bytes)}, {packed.files} files)",
        "variants": ", ".join(packed.variants),
        "sha256": packed.sha256,
        "signed": f"by key {packed.signed_by}" if packed.signed_by else None,
    }
    _facts(console, facts)
    for part, why in packed.left_out.items():
        _say(console, f"{part}: {why}")
    ours = packed.format in ("mopt", "dir")
    _next(console, f"memopt-export {f'verify {packed.path} --run' if ours else f'inspect {packed.path}'}")


def _draw_key(console: Console, saved: SavedKey) -> None:
    facts = {"private key": f"{saved.path}, keep it", "public key": f"{saved.public_path}, give it away"}
    _facts(console, facts | {"key id": saved.key_id})
    _next(console, f"memopt-export pack MODEL.onnx --sign {saved.path} -o MODEL.mopt")


def _draw_predicted(console: Console, predicted: Predicted) -> None:
    for picture, classes in predicted.pictures:
        said = "  ".join(f"{label} {100 * probability:.1f}%" for label, probability in classes)
        _say(console, f"{picture}  {said}")
    _say(_console(sys.stderr), predicted.why[-1])


def _draw_inspection(console: Console, inspection: Inspection) -> None:
    facts = {"file": f"{inspection.path}, {inspection.kind}, {show_size(inspection.size_bytes)}"}
    by_dtype = ", ".join(f"{dtype} {show_size(size)}" for dtype, size in inspection.bytes_by_dtype.items())
    _facts(console, facts | inspection.facts | ({"weights": by_dtype} if by_dtype else {}))
    if inspection.parts:
        columns = {name: "left" if i < 3 else "right" for i, name in enumerate(inspection.parts[0])}
        rows = [[_cell(name, value) for name, value in part.items()] for part in inspection.parts]
        _table(console, {name.replace("_bytes", "").replace("_", " "): j for name, j in columns.items()}, rows)
    if inspection.findings is not None:
        _draw_findings(console, inspection.findings, inspection.unseen)


def _draw_findings(console: Console, findings: Sequence[Finding], unseen: Sequence[str]) -> None:
    """What each costs, what it is and where, what to type."""
    for finding in findings:
        where = f": {', '.join(finding.where)}" if finding.where else ""
        more = f" and {finding.count - len(finding.where)} more" if finding.count > len(finding.where) else ""
        of = f"{finding.variant}: " if finding.variant is not None else ""
        _say(console, f"found {_cost(finding)}: {of}{finding.what}{where}{more}")
        _say(console, f"  remedy: {finding.remedy}", style="dim")
    for reason in unseen:
        _say(console, f"not looked at: {reason}")
    if not findings:
        _say(console, "found nothing that costs bytes and need not")


def _cost(finding: Finding) -> str:
    if finding.costs_nothing:
        return "at no cost in bytes"
    costs = []
    if finding.file_bytes:
        costs.append(f"file {show_size(finding.file_bytes)}")
    if finding.memory_bytes != 0:
        costs.append(f"memory {show_size(finding.memory_bytes)}")
    return ", ".join(costs)


def _draw_verification(console: Console, verification: Verification) -> None:
    size = show_size(verification.size_bytes)
    _say(console, f"{verification.path}: structure holds, {verification.files} sha256 hold ({size})")
    _say(console, _signed(verification))
    rows = []
    for replay in (replay for replay in verification.replays if not replay.excused):
        difference = "–" if replay.max_difference is None else f"{replay.max_difference:.2g}"
        allowed = "–" if replay.atol is None else f"{replay.atol:.2g}"
        verdict = replay.reason or ("golden outputs hold" if replay.holds else "outputs differ")
        rows.append([replay.variant, replay.runtime, difference, allowed, verdict])
    if rows:
        columns = {"Variant": "left", "Runtime": "left", "Difference": "right", "Allowed": "right", "Verdict": "left"}
        _table(console, columns, rows)
    excused = [(each.variant, f"{each.runtime}: {each.reason}") for each in verification.replays if each.excused]
    _say_reasons(console, "not run on", excused)


def _signed(verification: Verification) -> str:
    if verification.signed_by is not None:
        return f"signature holds, by key {verification.signed_by}"
    if verification.signatures:
        return f"signed by {', '.join(verification.signatures)}, not checked (--key KEY.pub checks)"
    return "not signed"


def _draw_diagnosis(console: Console, diagnosis: Diagnosis) -> None:
    machine = dict(diagnosis.machine)
    memory = machine.pop("memory_bytes")
    _facts(console, machine | {"memory": show_size(int(memory)) if memory.isdigit() else memory})
    works = [
        [name, device, "works" if reason is None else f"no: {reason}"]
        for name, devices in diagnosis.runtimes.items()
        for device, reason in devices.items()
    ]
    _table(console, {"Runtime": "left", "Device": "left", "State": "left"}, works)
    builds = [[name, "builds here" if why is None else f"no: {why}"] for name, why in diagnosis.builders.items()]
    _table(console, {"Engine builder": "left", "State": "left"}, builds)
    _say(console, "tools: " + ", ".join(f"{name} {version}" for name, version in diagnosis.tools.items()))


def _draw_result(console: Console, result: Result) -> None:
    _draw_report(console, result.report)
    for (what, why), names in _refusals(result.refused).items():
        _say(console, f"{what}: {why} ({', '.join(names)})")
    again = " (nothing had to be done again)" if result.made == 0 else ""
    _say(console, f"{result.made} stages made, {result.cached} cached{again}")
    size = show_size(result.bundle.stat().st_size)
    _say(console, f"bundle {result.bundle} ({size}, sha256 {result.bundle_sha256[:16]}…)")
    _say(console, f"report {result.report_path}, and .html and .md beside it")
    _next(console, f"memopt-export run {result.bundle} PICTURE.png")


def _refusals(refused: Mapping[str, str]) -> dict[tuple[str, str], list[str]]:
    """The engines that share a reason; "dense-fp32-rtx sm75" is refused for a target, "dense-fp32-trt" as a whole."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for what, why in refused.items():
        name, _, target = what.partition(" ")
        grouped.setdefault((f"no engine for {target}" if target else "no engine", why), []).append(name)
    return grouped


def _next(console: Console, command: str) -> None:
    _say(console, f"next: {command}", style="dim")


def _with(path: str, ending: str) -> str:
    return path.rpartition(".")[0] + ending


def _range(batches: tuple[int, int]) -> str:
    low, high = batches
    return f"batch {low}" if low == high else f"batch {low} to {high}"


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "–"
    return (
        show_size(value) if name.endswith("_bytes") else f"{100 * value:.2f}%" if name.endswith("top1") else str(value)
    )


# What is drawn how, by the name of its type, so that a result need not be imported to be shown.
_DRAW: dict[str, Callable[[Console, Any], None]] = {
    "SavedCheckpoint": _draw_checkpoint,
    "SavedGraph": _draw_graph,
    "SavedQuantized": _draw_quantized,
    "SavedSimple": _draw_simple,
    "SavedEngine": _draw_engine,
    "Plans": _draw_plans,
    "Needs": _draw_needs,
    "Report": _draw_report,
    "Packed": _draw_packed,
    "SavedKey": _draw_key,
    "Predicted": _draw_predicted,
    "Inspection": _draw_inspection,
    "Verification": _draw_verification,
    "Diagnosis": _draw_diagnosis,
    "Result": _draw_result,
}
