"""Reports of this schema and of older ones; what a row says under each heading."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from memopt.accuracy import WorstSample
from memopt.errors import IntegrityError
from memopt.report import COLUMNS, SCHEMA, Report, Row, columns_of, held_bytes, read_report

GOLDEN = Path(__file__).parent / "golden"
ROW = Row("a", "onnxruntime", "cpu", 1, private_bytes=2**20, peak_bytes=2**21, p50_ms=1.5)


def test_a_report_of_schema_1_0_loads_with_what_it_knew() -> None:
    report = read_report((GOLDEN / "report-1.0.json").read_bytes())
    assert report.schema == SCHEMA
    torch, plain, *_ = report.rows
    assert (torch.name, torch.runtime, torch.batch) == ("dense-fp32", "torch", 1)
    assert plain.bill is not None
    assert plain.private_bytes == plain.bill.phases["steady"].private_bytes == 2543616
    assert plain.bill.device["steady"].used_bytes == 104857600
    assert plain.bill.device["steady"].methods["used_bytes"].startswith("cuMemGetInfo")
    assert torch.bill is not None
    assert torch.bill.device == {}
    assert report.rows[-1].reason is not None
    assert read_report(report.to_json().encode()) == report


def test_a_schema_to_come_is_refused_by_name() -> None:
    to_come = replace(Report((), "a", "", 0), schema="3.0").to_json()
    with pytest.raises(IntegrityError, match=r"report has schema '3\.0', this memopt reads 1\.0 and 2\.0"):
        read_report(to_come.encode())
    with pytest.raises(IntegrityError, match="report has schema None"):
        read_report(b"{}")
    with pytest.raises(IntegrityError, match="report is not valid JSON"):
        read_report(b"not json")


@pytest.mark.parametrize("rows", ['["x"]', '[{"bill": 7}]', "[null]"])
def test_a_damaged_report_of_schema_1_0_is_refused(rows: str) -> None:
    data = f'{{"schema": "1.0", "reference": "a", "source": "", "samples": 1, "rows": {rows}}}'
    with pytest.raises(IntegrityError, match=r"report\.rows\[0\]"):
        read_report(data.encode())


@pytest.mark.parametrize(
    ("heading", "row", "said"),
    [
        ("Private", ROW, "1.00 MiB"),
        ("Private", replace(ROW, private_bytes=None), "unknown"),
        ("Private", replace(ROW, private_bytes=None, reason="broken"), "–"),
        ("x memory", replace(ROW, memory_ratio=0.1234), "0.12x"),
        ("SQNR", replace(ROW, sqnr_db=27.04, max_difference=0.5), "27.0 dB"),
        ("SQNR", replace(ROW, max_difference=0.0), "equal"),
        ("SQNR", replace(ROW, max_difference=0.5), "–"),
        ("SQNR", ROW, "–"),
        ("Worst", replace(ROW, worst=WorstSample(7, 12.25, 0.5)), "#7 12.2 dB"),
        ("Worst", replace(ROW, worst=WorstSample(7, None, 0.5)), "#7 0.5 off"),
        ("Leak", replace(ROW, leak_bytes_per_1000_runs=0), "0 B"),
        ("Metric", replace(ROW, metric=0.123456), "0.1235"),
    ],
)
def test_each_heading_says_what_is_known(heading: str, row: Row, said: str) -> None:
    assert COLUMNS[heading].text(row) == said


def test_columns_that_say_nothing_are_left_out() -> None:
    assert columns_of(Report((ROW,), "a", "", 1)) == [
        "Variant",
        "Runtime",
        "Batch",
        "Private",
        "File-backed",
        "Peak",
        "p50",
    ]


def test_markdown_keeps_hostile_names_in_their_cells() -> None:
    rows = (replace(ROW, name="a|b\n<script>"), replace(ROW, name="c\\"))
    lines = Report(rows, "a", "", 1).to_markdown().splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("| a\\|b &lt;script> | onnxruntime cpu |")
    assert lines[3].startswith("| c\\\\ |")


def test_memory_held_is_that_of_host_and_device_together() -> None:
    assert held_bytes(ROW) == 2**20
    on_gpu = replace(ROW, device="cuda", device_bytes=2**22)
    assert held_bytes(on_gpu) == 2**20 + 2**22
    assert held_bytes(replace(on_gpu, device_bytes=None)) is None
