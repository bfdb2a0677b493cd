"""How much of a batch is in memory at once: found by measured probes, within limits that the user sets."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from memopt.errors import OutOfResource
from memopt.memory import settled_resident
from memopt.sizes import show_size
from memopt_models.dataset import DataSet
from memopt_models.resume import Keep
from memopt_models.team import ALONE, Team
from memopt_models.train import AUTO, OnStep, Progress, TrainSettings
from memopt_models.training_probe import Peak, Refusal, Subject, measure_peak

MIB = 2**20
_SLACK_BYTES = 16 * MIB  # trainings were seen to hold up to 11 MiB more than their probes
_SURELY = 1.05  # a peak extrapolated beyond this many times the limit is not measured

Measure = Callable[[TrainSettings, int | None], Peak | Refusal]  # settings and the child's cap


@dataclass
class Ledger:
    """Passes the progress on and keeps what a lineage says of memory."""

    on_step: OnStep | None = None
    probes: list[dict[str, Any]] = field(default_factory=list)
    peaks: dict[str, list[int | None]] = field(default_factory=dict)
    device_peaks: dict[str, list[int | None]] = field(default_factory=dict)

    def __call__(self, progress: Progress) -> None:
        """A step is done."""
        if progress.validation_top1 is not None:
            self.peaks.setdefault(progress.stage, []).append(progress.peak_bytes)
            if progress.peak_device_bytes is not None:
                self.device_peaks.setdefault(progress.stage, []).append(progress.peak_device_bytes)
        if self.on_step is not None:
            self.on_step(progress)

    @property
    def memory(self) -> dict[str, Any]:
        """{"peak_bytes": {stage: [of each epoch]}}, the same for a GPU where there is one, and the "probes"."""
        found = {"peak_bytes": self.peaks, "peak_device_bytes": self.device_peaks, "probes": self.probes}
        return {name: value for name, value in found.items() if value}


def settle(
    subject: Subject,
    data: DataSet,
    how: TrainSettings,
    ledger: Ledger,
    *,
    stage: str,
    keep: Keep | None = None,
    team: Team = ALONE,
) -> TrainSettings:
    """The settings with a number for each AUTO: parts of a batch as large as the limits allow.

    Sizes that are tried are the whole batch, and the powers of two below it. The batch stays what it is.

    Args:
        subject: what will be trained.
        data: what on; of it only shapes and sizes count.
        how: asked for. What it says already is not tried, and without a limit nothing is.
        ledger: is told what was measured and chosen.
        stage: how the progress calls it.
        keep: where a training to go on with may be: it stays with the parts that it has.
        team: the processes that train together, among which every batch is divided before it is cut.

    Raises:
        OutOfResource: not even the smallest part fits; the hint says what would.
    """
    settled = how.settled(len(data.train))
    if how.accumulate != AUTO:
        return settled
    parts = 0
    if team.is_first:
        own = replace(settled, batch_size=-(-settled.batch_size // team.size))
        kept = None if keep is None else keep.accumulate(stage)
        parts = kept or (_measured(subject, data, own, ledger, stage).accumulate if how.has_limit else 1)
    return replace(settled, accumulate=int(team.add(parts)))


def _measured(subject: Subject, data: DataSet, how: TrainSettings, ledger: Ledger, stage: str) -> TrainSettings:
    """The settings with the largest part that fits, and the ledger told why."""

    def say(text: str) -> None:
        ledger(Progress(stage, 0, how.epochs, 0, 0, math.nan, note=text))

    def held() -> int:
        return settled_resident() + _unread_bytes(data)

    search = _Search(how, held, lambda tried, cap: measure_peak(subject, tried, cap_bytes=cap), say, ledger)
    chosen = search.run()
    say(search.explain(chosen))
    return _with_part(how, chosen)


@dataclass
class _Search:
    """Probes of one training, by the size of a part."""

    how: TrainSettings
    held: Callable[[], int]  # bytes of this process before its module is made; asked after a probe, which imports
    measure: Measure
    say: Callable[[str], None]
    ledger: Ledger
    found: dict[int, Peak | Refusal] = field(default_factory=dict)

    def run(self) -> int:
        """The largest part that fits: the whole batch, else between the smallest that does and what does not.

        What grows by the sample grows linearly: two probes say where to look next.
        """
        sizes = _sizes(self.how.batch_size)
        if self.fits(sizes[-1], capped=len(sizes) > 1):
            return sizes[-1]
        while len(sizes) > 1 and self.probe(sizes[0], capped=False) == Refusal("too few"):
            sizes = sizes[1:]
        if not self.fits(sizes[0], capped=False):
            raise self.refuse(sizes[0])
        lowest, highest = 0, len(sizes) - 1  # fits, does not
        while highest - lowest > 1:
            between = range(lowest + 1, highest)
            expected = [self.expect(sizes[i]) for i in between]
            likely = [i for i, peak in zip(between, expected, strict=True) if peak is None or self.within(peak)]
            first = expected[0]
            if not likely and first is not None and not self.within(first, times=_SURELY):
                break
            tried = min(2, highest - 1) if first is None else max(likely, default=between[0])
            if self.fits(sizes[tried]):
                lowest = tried
            else:
                highest = tried
        return sizes[lowest]

    def fits(self, size: int, *, capped: bool = True) -> bool:
        """Whether a part of so many samples stays within the limits."""
        peak = self.probe(size, capped=capped)
        return isinstance(peak, Peak) and self.within(peak)

    def probe(self, size: int, *, capped: bool = True) -> Peak | Refusal:
        """What a part of so many samples needs, measured once; capped, no more than the limit is taken to see it."""
        if size not in self.found:
            self.say(f"measuring a part of {size} of {self.how.batch_size} …")
            self.found[size] = found = self.measured(_with_part(self.how, size), capped=capped)
            self.ledger.probes.append({"micro_batch": size, **_plain(found)})
        return self.found[size]

    def measured(self, how: TrainSettings, *, capped: bool) -> Peak | Refusal:
        """A probe's figure as this process will have it."""
        found = self.measure(how, self.how.max_memory_bytes if capped else None)
        if isinstance(found, Refusal) or found.host_bytes is None:
            return found
        return replace(found, host_bytes=self.held() + found.host_bytes + _SLACK_BYTES)

    def within(self, peak: Peak, *, times: float = 1.0) -> bool:
        """Whether the peak is at most so many times the limits; what is not known is taken to be."""
        pairs = ((peak.host_bytes, self.how.max_memory_bytes), (peak.device_bytes, self.how.max_device_memory_bytes))
        return all(found is None or limit is None or found <= times * limit for found, limit in pairs)

    def expect(self, size: int) -> Peak | None:
        """The peak on the line through the two largest parts measured; None where there are not two."""
        known = sorted((n, peak) for n, peak in self.found.items() if isinstance(peak, Peak))[-2:]
        if len(known) < 2:
            return None
        (a, first), (b, second) = known
        return Peak(
            _on_line(size, a, first.host_bytes, b, second.host_bytes),
            _on_line(size, a, first.device_bytes, b, second.device_bytes),
        )

    def explain(self, chosen: int) -> str:
        """What was chosen and why: "micro-batch 4 x 16 = 64: peak 246 MiB of 313 MiB; 8 would need 326 MiB"."""
        how, peak = _with_part(self.how, chosen), self.found[chosen]
        assert isinstance(peak, Peak)
        text = f"micro-batch {chosen} x {how.accumulate} = {how.batch_size}: peak {self.show(peak)}"
        larger = next((size for size in _sizes(how.batch_size) if size > chosen), None)
        if larger is None:
            return text
        found = self.found.get(larger)
        if isinstance(found, Peak):
            return f"{text}; {larger} would need {_show(found)}"
        expected = self.expect(larger)
        return f"{text}; {larger} " + (f"would need about {_show(expected)}" if expected else "does not fit")

    def show(self, peak: Peak) -> str:
        """The peak beside its limits."""
        return _show(peak, limits=(self.how.max_memory_bytes, self.how.max_device_memory_bytes))

    def refuse(self, size: int) -> OutOfResource:
        """Says what the smallest part needs, and which settings need the least."""
        smallest = _with_part(self.how, size)
        least, options, found = self.found[size], "", self.found[size]
        for levers in _LEVERS:
            tried = replace(smallest, **levers)
            if tried == smallest:
                continue
            words = " ".join(f"--{name} {value}" for name, value in levers.items())
            self.say(f"measuring {words} …")
            peak = self.measured(tried, capped=False)
            self.ledger.probes.append({"micro_batch": size, **levers, **_plain(peak)})
            if isinstance(peak, Peak) and (isinstance(least, Refusal) or _less(peak, least)):
                least, options = peak, words
            if isinstance(peak, Peak) and self.within(peak):
                break
        needs = self.show(found) if isinstance(found, Peak) else "more than there is"
        problem = (
            f"a micro-batch of {size} does not fit: peak {needs}, {show_size(self.held())} of it before the network"
        )
        return OutOfResource(problem, hint=self.hint(least, options))

    def hint(self, least: Peak | Refusal, options: str) -> str | None:
        """What to type: the options with the least memory, and the limits that they need."""
        if isinstance(least, Refusal):
            return None
        higher = [
            f"--{name} {-(-found // MIB)}MiB"
            for name, found, limit in (
                ("max-memory", least.host_bytes, self.how.max_memory_bytes),
                ("max-device-memory", least.device_bytes, self.how.max_device_memory_bytes),
            )
            if found is not None and limit is not None and found > limit
        ]
        return " ".join([options] * bool(options) + higher)


# What a refused training could do with, from that which changes nothing to that which rounds.
_LEVERS: tuple[dict[str, Any], ...] = (
    {"checkpointing": "blocks"},
    {"precision": "bf16"},
    {"checkpointing": "blocks", "precision": "bf16"},
)


def _sizes(batch: int) -> list[int]:
    """The powers of two below the batch, and the batch.

    >>> _sizes(12), _sizes(8), _sizes(1)
    ([1, 2, 4, 8, 12], [1, 2, 4, 8], [1])
    """
    return [2**k for k in range(batch.bit_length()) if 2**k < batch] + [batch]


def _with_part(how: TrainSettings, size: int) -> TrainSettings:
    """The same batch in parts of at most `size`."""
    return replace(how, accumulate=-(-how.batch_size // size))


def _unread_bytes(data: DataSet) -> int:
    """Pages of mapped pictures: they count as this process's as soon as they were read."""
    return data.train.mapped_bytes + data.validation.mapped_bytes


def _on_line(x: int, a: int, at_a: int | None, b: int, at_b: int | None) -> int | None:
    """Where the line through (a, at_a) and (b, at_b) is at x.

    >>> _on_line(8, 1, 100, 4, 160)
    240
    """
    return None if at_a is None or at_b is None else round(at_b + (x - b) * (at_b - at_a) / (b - a))


def _less(peak: Peak, other: Peak) -> bool:
    """Whether one peak is below another; a GPU's counts before the host's."""
    return (peak.device_bytes or 0, peak.host_bytes or 0) < (other.device_bytes or 0, other.host_bytes or 0)


def _plain(found: Peak | Refusal) -> dict[str, Any]:
    if isinstance(found, Refusal):
        return {"refused": found.why}
    named = {"peak_bytes": found.host_bytes, "peak_device_bytes": found.device_bytes}
    return {name: value for name, value in named.items() if value is not None}


def _show(peak: Peak, *, limits: tuple[int | None, int | None] = (None, None)) -> str:
    parts = []
    for found, limit, where in zip((peak.host_bytes, peak.device_bytes), limits, ("", " on the device"), strict=True):
        if found is not None or (limit is not None and not where):
            parts.append(show_size(found) + where + (f" of {show_size(limit)}" if limit is not None else ""))
    return ", ".join(parts)
