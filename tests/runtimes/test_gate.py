"""The gate: what got worse by more than is tolerated, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest

from memopt.errors import UsageError
from memopt.gate import METRICS, Gate, hold_against, parse_tolerances
from memopt.report import Report, Row, read_report

MIB = 2**20
MACHINE = {"arch": "x86_64", "cpu": "fake", "cores": "2"}
REFERENCE = Row("fp32", "onnxruntime", "cpu", 1, private_bytes=100 * MIB, p50_ms=10.0, latency_ratio=1.0, top1=0.9)
ROW = Row(
    "int8", "onnxruntime", "cpu", 1, file_bytes=40 * MIB, private_bytes=50 * MIB, peak_bytes=80 * MIB,
    device_bytes=60 * MIB, leak_bytes_per_1000_runs=0, latency_ratio=0.5, p50_ms=5.0, top1=0.9, top5=0.99, metric=0.8,
    agreement=0.95, sqnr_db=30.0, max_difference=0.1,
)  # fmt: skip


def report(*rows: Row, **fields: object) -> Report:
    plain = {"reference": "fp32", "source": "digits/test", "samples": 359, "machine": MACHINE, "samples_sha256": "a"}
    return Report(rows, **{**plain, **fields})  # type: ignore[arg-type]


def held(now: Row | Report, *tolerances: str, base: Report | None = None) -> Gate:
    later = now if isinstance(now, Report) else report(REFERENCE, now)
    return hold_against(later, base or report(REFERENCE, ROW), parse_tolerances(tolerances), where="base.json")


def test_a_report_held_against_itself_passes() -> None:
    gate = held(ROW)
    assert gate.passed
    assert gate.compared == len(METRICS) + 4  # of the reference: private, p50, latency and top1
    assert gate.lines() == [f"{gate.compared} figures held against base.json: nothing got worse"]


WORSE = {  # metric -> just within what is tolerated, just beyond, and what the line says of it
    "private": (52.4 * MIB, 52.6 * MIB, "was 50.0 MiB, is 52.6 MiB (+5%), tolerated +2.50 MiB"),
    "peak": (83.9 * MIB, 84.1 * MIB, "was 80.0 MiB, is 84.1 MiB (+5%), tolerated +4.00 MiB"),
    "device": (62.9 * MIB, 63.1 * MIB, "was 60.0 MiB, is 63.1 MiB (+5%), tolerated +3.00 MiB"),
    "leak": (0.9 * MIB, 1.1 * MIB, "was 0 B, is 1.10 MiB, tolerated +1.00 MiB"),
    "size": (40.3 * MIB, 40.5 * MIB, "was 40.0 MiB, is 40.5 MiB (+1%), tolerated +410 KiB"),
    "p50": (7.4, 7.6, "was 5 ms, is 7.6 ms (+52%), tolerated +2.5 ms"),
    "latency": (0.74, 0.76, "was 0.50x, is 0.76x (+52%), tolerated +0.25x"),
    "top1": (0.896, 0.894, "was 90.00%, is 89.40%, tolerated -0.50 pp"),
    "top5": (0.986, 0.984, "was 99.00%, is 98.40%, tolerated -0.50 pp"),
    "agreement": (0.946, 0.944, "was 95.00%, is 94.40%, tolerated -0.50 pp"),
    "sqnr": (29.1, 28.9, "was 30.0 dB, is 28.9 dB, tolerated -1.0 dB"),
    "metric": (0.793, 0.791, "was 0.8, is 0.791 (-1%), tolerated -0.008"),
}
FIELDS = {
    "private": "private_bytes", "peak": "peak_bytes", "device": "device_bytes", "leak": "leak_bytes_per_1000_runs",
    "size": "file_bytes", "p50": "p50_ms", "latency": "latency_ratio", "sqnr": "sqnr_db",
}  # fmt: skip


def changed(metric: str, value: float) -> Row:
    return replace(ROW, **{FIELDS.get(metric, metric): int(value) if value > 1000 else value})


def test_every_metric_has_a_case() -> None:
    assert tuple(WORSE) == METRICS


@pytest.mark.parametrize("metric", METRICS)
def test_what_got_worse_by_more_than_is_tolerated_is_named_with_its_numbers(metric: str) -> None:
    within, beyond, said = WORSE[metric]
    assert held(changed(metric, within)).passed
    gate = held(changed(metric, beyond))
    assert not gate.passed
    assert gate.refusal() == "1 got worse"
    assert gate.lines()[1:] == [f"worse: int8 on onnxruntime cpu, batch 1: {metric} {said}"]
    assert held(changed(metric, beyond), f"{metric}=off").passed
    assert gate.slower == (("int8 on onnxruntime cpu, batch 1",) if metric in ("p50", "latency") else ())


@pytest.mark.parametrize("metric", METRICS)
def test_what_got_better_never_counts(metric: str) -> None:
    was = getattr(ROW, FIELDS.get(metric, metric))
    better = 1.5 if metric in ("top1", "top5", "agreement", "sqnr", "metric") else 0.5
    assert held(changed(metric, was * better)).passed


def test_what_is_small_varies_below_the_floors_without_failing() -> None:
    tiny = replace(
        ROW, private_bytes=100_000, peak_bytes=MIB, p50_ms=0.04, latency_ratio=0.8, file_bytes=3000, device_bytes=None
    )
    noisy = replace(
        tiny, private_bytes=1_000_000, peak_bytes=2 * MIB, p50_ms=0.12, latency_ratio=2.4, file_bytes=6000,
        leak_bytes_per_1000_runs=900_000,
    )  # fmt: skip
    assert held(noisy, base=report(REFERENCE, tiny)).passed


def test_memory_once_given_back_is_not_owed_for_ever() -> None:
    shrank = replace(ROW, leak_bytes_per_1000_runs=-90 * MIB)
    assert held(ROW, base=report(REFERENCE, shrank)).passed


def test_equal_outputs_that_are_not_equal_any_more_are_worse() -> None:
    equal = replace(ROW, sqnr_db=None, max_difference=0.0)
    assert held(equal, base=report(REFERENCE, equal)).passed
    (worse,) = held(ROW, base=report(REFERENCE, equal)).worse
    assert worse.metric == "sqnr"


def test_tolerances_of_ones_own() -> None:
    worse = replace(ROW, private_bytes=56 * MIB, peak_bytes=90 * MIB)
    assert [change.metric for change in held(worse).worse] == ["private", "peak"]
    assert held(worse, "15%").passed
    assert [change.metric for change in held(worse, "private=15%").worse] == ["peak"]
    assert held(worse, "private=7MiB,peak=11 MiB").passed
    assert not held(worse, "15%", "peak=512KiB").passed
    assert not held(replace(ROW, private_bytes=51 * MIB), "private=100KiB").passed  # an amount is the whole tolerance
    assert held(replace(ROW, private_bytes=51 * MIB), "private=0%").passed  # a share leaves the floor
    assert held(replace(ROW, top1=0.885), "top1=2pp", "10%").passed
    assert held(replace(ROW, sqnr_db=26.0), "sqnr=5dB").passed
    assert held(replace(ROW, p50_ms=7.9, latency_ratio=0.79), "p50=3ms", "latency=0.3x").passed


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("speed=5%", "--tolerance 'speed=5%' is of no metric; hint: one of private, peak, device, leak"),
        ("top1=5%", "--tolerance 'top1=5%' is no tolerance; hint: top1=0.5pp, or off"),
        ("private=5ms", "--tolerance 'private=5ms' is no tolerance; hint: private=5% or private=512KiB, or off"),
        ("p50=5", "--tolerance 'p50=5' is no tolerance; hint: p50=5% or p50=1ms, or off"),
        ("private=5 apples", "'5 apples' is not a size"),
        ("5MiB", "--tolerance '5MiB' is no share; hint: 10%, or an amount of one metric: private=1MiB"),
        ("off", "--tolerance 'off' is no share"),
        ("", "--tolerance '' is no share"),
        ("private=-5%", "is not a size"),
    ],
)
def test_impossible_tolerances_are_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_tolerances([text])
    assert said in str(refused.value)


def test_a_row_that_cannot_be_measured_any_more_has_broken() -> None:
    gate = held(Row("int8", "onnxruntime", "cpu", 1, file_bytes=40 * MIB, reason="killed by SIGSEGV"))
    assert not gate.passed
    assert gate.refusal() == "1 broke"
    assert gate.broken == ("int8 on onnxruntime cpu, batch 1: killed by SIGSEGV",)
    failed_then = report(REFERENCE, replace(ROW, reason="killed"))
    assert held(replace(ROW, reason="killed"), base=failed_then).passed


def test_rows_that_are_missing_or_new_are_said_and_fail_nothing() -> None:
    gate = held(report(REFERENCE, replace(ROW, batch=8)))
    assert gate.passed
    assert gate.missing == ("int8 on onnxruntime cpu, batch 1",)
    assert gate.new == ("int8 on onnxruntime cpu, batch 8",)
    assert gate.lines()[1:] == [f"missing: {gate.missing[0]}", f"new: {gate.new[0]}"]


def test_where_nothing_can_be_compared_nothing_passes() -> None:
    gate = held(report(replace(ROW, name="other")))
    assert not gate.passed
    assert gate.refusal() == "no figure of this report is in it"


def test_what_is_not_known_any_more_is_said() -> None:
    gate = held(replace(ROW, leak_bytes_per_1000_runs=None, top5=None))
    assert gate.passed
    assert gate.skipped == ("int8 on onnxruntime cpu, batch 1: leak, top5 are not known any more",)


def test_what_differs_between_machines_samples_and_references_is_not_compared() -> None:
    slower = replace(ROW, p50_ms=50.0, top1=0.5, agreement=0.5, sqnr_db=1.0, latency_ratio=9.0)
    elsewhere = held(report(REFERENCE, replace(ROW, p50_ms=50.0), machine=MACHINE | {"cpu": "another"}))
    assert elsewhere.passed
    assert elsewhere.skipped[0].startswith("p50: the reports come from different processors")
    on_others = held(report(REFERENCE, replace(slower, p50_ms=5.0, latency_ratio=0.5), samples=64))
    assert on_others.passed
    assert "top1: other samples: 359 of digits/test, now 64 of digits/test" in on_others.skipped
    drawn_anew = held(report(REFERENCE, replace(ROW, top1=0.5), samples_sha256="b"))
    assert drawn_anew.passed
    beside_another = held(report(REFERENCE, replace(slower, p50_ms=5.0, top1=0.9), reference="int8"))
    assert beside_another.passed
    assert "latency: the reference was fp32, and is int8" in beside_another.skipped
    by_another_metric = held(report(REFERENCE, replace(ROW, metric=0.1), metric="a:b"))
    assert by_another_metric.skipped == ("metric: it was None, and is a:b",)


def test_a_report_carries_its_gate() -> None:
    later = replace(report(REFERENCE, ROW), gate=held(changed("private", 99 * MIB)))
    assert read_report(later.to_json().encode()) == later
    assert "* worse: int8 on onnxruntime cpu, batch 1: private was 50.0 MiB" in later.to_markdown()
