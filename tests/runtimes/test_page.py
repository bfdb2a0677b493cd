"""The page of a report: whole without scripts and network, harmless whatever a report says."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from memopt.accuracy import WorstSample
from memopt.gate import Change, Gate
from memopt.memory import PHASES, AllocatorUse, Bill, DeviceMemory, HostMemory
from memopt.page import render
from memopt.report import Report, Row, read_report

MIB = 2**20
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&\x1b[31m\u202e"
VOID = {"meta", "line", "rect", "path", "circle", "br", "img", "input", "link"}
METHODS = {"process_bytes": "NVML", "used_bytes": "cuMemGetInfo", "allocator_bytes": "unknown: it does not say"}


def bill(size: int, *, on_device: bool = False) -> Bill:
    phases = {name: HostMemory(size, size // 2, size, 2 * size, "by hand") for name in PHASES}
    device = {name: DeviceMemory(size, size, None, METHODS) for name in PHASES[1:]} if on_device else {}
    allocator = AllocatorUse(size // 2, size // 2, size // 2, size, "the profiler") if size > 15 * MIB else None
    return Bill(phases, device, allocator)


def row(name: str, batch: int = 1, size: int = 10 * MIB, **fields: object) -> Row:
    plain = {
        "file_bytes": size, "weights_bytes": size // 2, "activation_bytes": size // 4, "private_bytes": size,
        "file_backed_bytes": size // 2, "peak_bytes": 2 * size, "memory_ratio": 0.5, "latency_ratio": 0.5,
        "p50_ms": size / MIB, "p95_ms": size / MIB * 1.2, "p99_ms": size / MIB * 2, "runs": 50, "top1": 0.9,
        "placement": "CPUExecutionProvider", "bill": bill(size),
    }  # fmt: skip
    return Row(name, "onnxruntime", "cpu", batch, **{**plain, **fields})  # type: ignore[arg-type]


def report(*rows: Row, **fields: object) -> Report:
    return Report(rows, **{"reference": "a", "source": "digits/test", "samples": 359, **fields})  # type: ignore[arg-type]


class Reader(HTMLParser):
    """Tags, texts and attributes of a page; raises where tags do not close in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = list[str](), list[str](), list[tuple[str, str | None]](), ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID or tag in ("line", "rect", "path", "circle"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts += data


WORSE = Change("a on onnxruntime cpu, batch 1", "private", 10 * MIB, 20 * MIB, MIB)
FULL = report(
    row("a", confusion=((3, 1), (0, 4)), leak_bytes_per_1000_runs=4096, agreement=1.0, max_difference=0.0),
    row("b", size=20 * MIB, top1=0.95, worst=WorstSample(3, 12.0, 0.5), sqnr_db=20.0, max_difference=0.5, note="odd"),
    row("c", 8, size=900 * MIB),
    replace(row("d", 8), runtime="tensorrt", device="cuda", device_bytes=5 * MIB, bill=bill(MIB, on_device=True)),
    Row("e", "tensorrt", "cuda", 1, reason="no driver"),
    machine={"cpu": "fake", "memory_bytes": str(2**30)}, classes=("cat", "dog"),
    gate=Gate("base.json", 12, (WORSE,), broken=("x: gone",)),
)  # fmt: skip


def test_the_page_shows_every_section_and_every_row() -> None:
    page = Reader(render(FULL))
    for heading in (
        "Memory against accuracy", "Where the memory goes", "Before there is a model", "Latency",
        "Plan against measured", "Every row", "Confusion", "Phase by phase", "Machine and methods",
    ):  # fmt: skip
        assert heading in page.texts
    for said in (
        "12 figures held against base.json: 1 got worse, 1 broke", "private was 10.0 MiB, is 20.0 MiB", "no driver",
        "odd", "cat", "NVML", "unknown: it does not say", "by hand", "1.00 GiB", "10.0 MiB allocated", "the profiler",
        "#3 12.0 dB", "5.00 MiB", "95.00%",
    ):  # fmt: skip
        assert said in page.texts
    assert page.tags.count("tr") >= len(FULL.rows)


MANY = report(
    *(row(f"model {i}", batch, (i + 1) * MIB, top1=0.5 + i / 50) for i in range(15) for batch in (1, 8, 32, 64))
)
CASES = {
    "full": FULL,
    "one": report(row("a")),
    "sixty": MANY,
    "no accuracy": report(*(row(name, size=size * MIB, top1=None) for name, size in (("a", 1), ("b", 300)))),
    "failed": report(*(Row(name, "torch", "cpu", 1, reason="no") for name in "ab")),
    "empty": report(),
    "unknown": report(replace(row("a"), private_bytes=None, peak_bytes=None, bill=Bill()), row("b", bill=None)),
    "schema 1.0": read_report((Path(__file__).parent / "golden" / "report-1.0.json").read_bytes()),
    "nothing private": report(row("a", private_bytes=0, size=MIB), row("b", private_bytes=-4096, p50_ms=0.0)),
    "many classes": report(row("a", confusion=tuple(tuple((i * j) % 3 for i in range(30)) for j in range(30)))),
}


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_report_makes_a_well_formed_page(case: str) -> None:
    page = Reader(render(CASES[case]))
    assert page.tags.count("script") == 1
    assert "None" not in page.texts
    assert "nan" not in page.texts.split()


def test_without_accuracy_memory_stands_against_speed() -> None:
    texts = Reader(render(CASES["no accuracy"])).texts
    assert "Memory against speed" in texts
    assert "No accuracy is known" in texts
    assert "most accurate" not in texts


def test_nothing_that_a_report_says_becomes_markup() -> None:
    hostile = Row(
        HOSTILE, HOSTILE, HOSTILE, 1, placement=HOSTILE, note=HOSTILE, top1=0.5, private_bytes=MIB, p50_ms=1.0,
        activation_bytes=1, weights_bytes=1, confusion=((1, 0), (0, 1)), bill=Bill(
            {name: replace(HostMemory(1, 1, 1, 1, HOSTILE)) for name in PHASES},
            {"steady": DeviceMemory(1, 1, 1, dict.fromkeys(METHODS, HOSTILE))},
        ),
    )  # fmt: skip
    evil = report(
        hostile, replace(hostile, batch=2), row("b"), replace(hostile, reason=HOSTILE), reference=HOSTILE,
        source=HOSTILE, machine={HOSTILE: HOSTILE}, classes=(HOSTILE, HOSTILE), metric=HOSTILE, schema=HOSTILE,
        reference_place=HOSTILE, gate=Gate(HOSTILE, 1, (replace(WORSE, row=HOSTILE),), (HOSTILE,), (HOSTILE,)),
    )  # fmt: skip
    rendered = render(evil)
    page = Reader(rendered)
    assert page.tags.count("script") == 1
    assert "img" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "\x1b" not in rendered
    assert "\u202e" not in rendered
    assert "alert(1)" in page.texts


def test_the_page_asks_nobody_and_runs_one_script() -> None:
    rendered = render(FULL)
    assert not re.search(r"(src|href|action)\s*=|url\(|@import|https?://", rendered)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', rendered)
    assert policy is not None
    script = re.search(r"<script>(.*?)</script>", rendered, re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert policy[1] == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_sixty_rows_fold_all_but_the_first_batch() -> None:
    opened = re.findall(r'<details class="batch"( open)?><summary>Batch (\d+)', render(MANY))
    assert {batch for is_open, batch in opened if is_open} == {"1"}
    assert {batch for _, batch in opened} == {"1", "8", "32", "64"}
