"""A gate for memory: what got worse since an earlier report, by more than is tolerated.

Rows are the same where artifact, runtime, device and batch are. Each metric has a tolerance: a share of what it was,
and a floor in its own unit below which nothing counts, because what is measured twice is never the same to the byte:

    metric     what                                                  share   floor
    private    private memory in the steady state                    5%      1 MiB
    peak       the highest RSS since the baseline                    5%      2 MiB
    device     device memory in the steady state                     5%      2 MiB
    leak       private memory that 1,000 runs add                    0%      1 MiB
    size       bytes on disk                                         1%      4 KiB
    p50        median latency; on the same processor only            50%     0.2 ms
    latency    p50 as a multiple of the reference's, on any machine  50%     0.2 ms of the row
    top1 top5 agreement   shares of samples, of the same samples             0.5 pp
    sqnr       against the reference                                         1 dB
    metric     the user's own, more is better                        1%
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from memopt.errors import UsageError
from memopt.sizes import parse_size, show_size

if TYPE_CHECKING:
    from memopt.report import Report, Row

LEAK_BYTES = 2**20  # added by 1,000 runs; less is noise

_MIB = 2**20
_LEAST_MS = 0.2
_EQUAL_DB = 200.0  # stands for outputs equal to the reference's, whose SQNR is no number
_SAME_MACHINE = ("arch", "cpu", "cores")


@dataclass(frozen=True)
class Tolerance:
    """How much worse a metric may get: a share of what it was, but never less than the floor in its own unit."""

    share: float = 0.0
    floor: float = 0.0
    off: bool = False

    def allowed(self, base: float) -> float:
        """The change that is tolerated."""
        return max(self.share * abs(base), self.floor)


@dataclass(frozen=True)
class Change:
    """One metric of one row that got worse."""

    row: str
    metric: str
    base: float
    now: float
    allowed: float

    def text(self) -> str:
        """The line that says so, with the three numbers."""
        metric = _METRICS[self.metric]
        show, sign = _SHOW[metric.unit], "-" if metric.more_is_better else "+"
        share = f" ({100 * (self.now / self.base - 1):+.0f}%)" if self.base > 0 and metric.has_share else ""
        allowed = f"{100 * self.allowed:.2f} pp" if metric.unit == "pp" else show(self.allowed)
        return f"{self.row}: {self.metric} was {show(self.base)}, is {show(self.now)}{share}, tolerated {sign}{allowed}"


@dataclass(frozen=True)
class Gate:
    """What an earlier report says to a later one. It is passed where nothing got worse and nothing broke."""

    base: str  # where the earlier report lies
    compared: int  # metrics of rows that both have
    worse: tuple[Change, ...] = ()
    broken: tuple[str, ...] = ()  # rows that were measured then and are not now, with the reason
    missing: tuple[str, ...] = ()  # rows that only the earlier report has
    new: tuple[str, ...] = ()  # and only the later
    skipped: tuple[str, ...] = ()  # what was not compared, or is not known any more, and why

    @property
    def slower(self) -> tuple[str, ...]:
        """Rows whose latency got worse, which a busy machine may have done: to be timed again before it is believed."""
        return tuple(dict.fromkeys(change.row for change in self.worse if change.metric in ("p50", "latency")))

    @property
    def passed(self) -> bool:
        """Whether nothing got worse than is tolerated, in anything at all that could be compared."""
        return not self.worse and not self.broken and self.compared > 0

    def lines(self) -> list[str]:
        """The verdict, and each thing that got worse, broke, is missing, new, or was not compared."""
        verdict = f"{self.compared} figures held against {self.base}: " if self.compared else f"{self.base}: "
        verdict += "nothing got worse" if self.passed else self.refusal()
        return [
            verdict,
            *(f"worse: {change.text()}" for change in self.worse),
            *(f"broken: {row}" for row in self.broken),
            *(f"missing: {row}" for row in self.missing),
            *(f"new: {row}" for row in self.new),
            *(f"not compared: {what}" for what in self.skipped),
        ]

    def refusal(self) -> str:
        """Why it is not passed, in a few words."""
        if not self.compared and not self.broken:
            return "no figure of this report is in it"
        counts = ((len(self.worse), "got worse"), (len(self.broken), "broke"))
        return ", ".join(f"{count} {what}" for count, what in counts if count)


def hold_against(now: Report, base: Report, tolerances: Mapping[str, Tolerance], *, where: str) -> Gate:
    """What got worse in `now` since `base`.

    Args:
        now: the later report.
        base: the earlier one.
        tolerances: of each metric, see `parse_tolerances`.
        where: how the earlier report is called.
    """
    before, after = ({row.key: row for row in report.rows} for report in (base, now))
    both = [(before[key], after[key]) for key in after if key in before]
    skipped = {name: why for name, why in _incomparable(now, base) if not tolerances[name].off}
    judged = [name for name in _METRICS if name not in skipped and not tolerances[name].off]
    pairs = [
        (change, _METRICS[name].worse_by(change) > change.allowed)
        for old, new in both
        for name in judged
        if (change := _change(name, old, new, tolerances[name])) is not None
    ]
    return Gate(
        base=where,
        compared=len(pairs),
        worse=tuple(change for change, worse in pairs if worse),
        broken=tuple(f"{new.key}: {new.reason}" for old, new in both if new.reason and not old.reason),
        missing=tuple(key for key in before if key not in after),
        new=tuple(key for key in after if key not in before),
        skipped=(*(f"{name}: {why}" for name, why in skipped.items()), *_forgotten(both, judged)),
    )


def parse_tolerances(texts: Sequence[str]) -> dict[str, Tolerance]:
    """The tolerance of each metric, from texts such as "10%", "private=5%,p50=50%", "top1=1pp", "leak=2MiB", "p50=off".

    A share alone is that of every metric that has one; floors stay. An absolute amount is the whole tolerance.

    Raises:
        UsageError: no such metric, or an amount in another unit than the metric's.

    >>> found = parse_tolerances(["10%", "top1=1pp"])
    >>> found["peak"].share, found["peak"].floor, found["top1"].floor
    (0.1, 2097152, 0.01)
    """
    found = {name: metric.default for name, metric in _METRICS.items()}
    for part in (part.strip() for text in texts for part in text.split(",")):
        name, equals, amount = part.rpartition("=")
        if equals and name not in _METRICS:
            raise UsageError(f"--tolerance {part!r} is of no metric", hint=f"one of {', '.join(_METRICS)}")
        if not equals and not amount.endswith("%"):
            raise UsageError(f"--tolerance {part!r} is no share", hint="10%, or an amount of one metric: private=1MiB")
        for each in [name] if equals else [name for name, metric in _METRICS.items() if metric.has_share]:
            found[each] = _parse_amount(part, amount, _METRICS[each])
    return found


@dataclass(frozen=True)
class _Metric:
    read: Callable[[Row], float | None]
    unit: str
    default: Tolerance
    more_is_better: bool = False

    @property
    def has_share(self) -> bool:
        return self.unit not in ("pp", "dB")

    def worse_by(self, change: Change) -> float:
        return change.base - change.now if self.more_is_better else change.now - change.base


def _growth(row: Row) -> int | None:
    """What 1,000 runs add; memory that they gave back once is not owed for ever."""
    grown = row.leak_bytes_per_1000_runs
    return None if grown is None else max(grown, 0)


_METRICS: dict[str, _Metric] = {
    "private": _Metric(lambda row: row.private_bytes, "B", Tolerance(0.05, _MIB)),
    "peak": _Metric(lambda row: row.peak_bytes, "B", Tolerance(0.05, 2 * _MIB)),
    "device": _Metric(lambda row: row.device_bytes, "B", Tolerance(0.05, 2 * _MIB)),
    "leak": _Metric(_growth, "B", Tolerance(0.0, LEAK_BYTES)),
    "size": _Metric(lambda row: row.file_bytes, "B", Tolerance(0.01, 4096)),
    "p50": _Metric(lambda row: row.p50_ms, "ms", Tolerance(0.5, _LEAST_MS)),
    "latency": _Metric(lambda row: row.latency_ratio, "x", Tolerance(0.5)),
    "top1": _Metric(lambda row: row.top1, "pp", Tolerance(floor=0.005), more_is_better=True),
    "top5": _Metric(lambda row: row.top5, "pp", Tolerance(floor=0.005), more_is_better=True),
    "agreement": _Metric(lambda row: row.agreement, "pp", Tolerance(floor=0.005), more_is_better=True),
    "sqnr": _Metric(
        lambda row: _EQUAL_DB if row.max_difference == 0 else row.sqnr_db,
        "dB",
        Tolerance(floor=1.0),
        more_is_better=True,
    ),
    "metric": _Metric(lambda row: row.metric, "", Tolerance(0.01), more_is_better=True),
}
METRICS = tuple(_METRICS)

_SHOW: dict[str, Callable[[float], str]] = {
    "B": show_size,
    "ms": lambda value: f"{value:.3g} ms",
    "x": lambda value: f"{value:.2f}x",
    "pp": lambda value: f"{100 * value:.2f}%",
    "dB": lambda value: f"{value:.1f} dB",
    "": lambda value: f"{value:.4g}",
}


def _change(name: str, old: Row, new: Row, tolerance: Tolerance) -> Change | None:
    """What a metric was and is, with what is tolerated; None where one of them is not known."""
    base, now = _METRICS[name].read(old), _METRICS[name].read(new)
    if base is None or now is None:
        return None
    if name == "latency" and new.p50_ms:  # what a run of no length varies by, in multiples of the reference's
        tolerance = replace(tolerance, floor=max(tolerance.floor, _LEAST_MS * now / new.p50_ms))
    return Change(new.key, name, base, now, tolerance.allowed(base))


def _forgotten(both: Sequence[tuple[Row, Row]], judged: Sequence[str]) -> Iterator[str]:
    """What was known of a row and is not, though it was measured again."""
    for old, new in both:
        names = [name for name in judged if _METRICS[name].read(old) is not None and _METRICS[name].read(new) is None]
        if names and new.reason is None:
            yield f"{new.key}: {', '.join(names)} {'are' if len(names) > 1 else 'is'} not known any more"


def _incomparable(now: Report, base: Report) -> Iterator[tuple[str, str]]:
    """Metrics that say nothing about two such reports, with the reason."""
    if any(now.machine.get(key) is None or now.machine.get(key) != base.machine.get(key) for key in _SAME_MACHINE):
        yield "p50", "the reports come from different processors (latency, against the reference, is compared)"
    if now.reference != base.reference:
        why = f"the reference was {base.reference}, and is {now.reference}"
        yield from ((name, why) for name in ("latency", "agreement", "sqnr"))
    known = None not in (now.samples_sha256, base.samples_sha256)
    others = (now.source, now.samples) != (base.source, base.samples)
    if others or (known and now.samples_sha256 != base.samples_sha256):
        why = f"other samples: {base.samples} of {base.source}, now {now.samples} of {now.source}"
        yield from ((name, why) for name in ("top1", "top5", "agreement", "sqnr", "metric"))
    elif now.metric != base.metric:
        yield "metric", f"it was {base.metric}, and is {now.metric}"


def _parse_amount(part: str, amount: str, metric: _Metric) -> Tolerance:
    if amount == "off":
        return Tolerance(off=True)
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%|ms|x|pp|dB|)", amount.strip())
    if match is not None and match[2] == "%" and metric.has_share:
        return replace(metric.default, share=float(match[1]) / 100)
    if metric.unit == "B" and match is None:
        return Tolerance(floor=parse_size(amount))
    if match is not None and match[2] == metric.unit and metric.unit != "B":
        return Tolerance(floor=float(match[1]) / (100 if metric.unit == "pp" else 1))
    raise UsageError(f"--tolerance {part!r} is no tolerance", hint=f"{_example(metric)}, or off")


def _example(metric: _Metric) -> str:
    amount = {"B": "512KiB", "ms": "1ms", "x": "0.5x", "pp": "0.5pp", "dB": "1dB", "": "0.01"}[metric.unit]
    name = next(name for name, each in _METRICS.items() if each is metric)
    return f"{name}=5% or {name}={amount}" if metric.has_share else f"{name}={amount}"
