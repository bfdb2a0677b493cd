"""`memopt-export compare` as a user types it: any artifacts, in any state, against what was, onto a page."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from memopt import compare as comparing
from memopt import probe
from memopt.preprocess import prepare
from memopt.report import Report, read_report
from memopt_export import cli, console, from_torch, preflight
from memopt_export.graph import save_graph
from memopt_export.pack import Contents
from memopt_export.uint8_input import take_pictures
from memopt_models.data import open_data
from memopt_models.train import TrainSettings, begin

MIB = 2**20
METRIC = """
import numpy as np

def mean(outputs, labels):
    assert len(labels) == len(outputs[0])
    return float(np.mean(outputs[0]))

def fails(outputs, labels):
    raise KeyError("no such class")
"""

Typed = Callable[..., tuple[int, str, str]]


@pytest.fixture
def typed(capsys: pytest.CaptureFixture[str]) -> Typed:
    def run(*words: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(["compare", *map(str, words)])
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_contents: Contents, tiny_bundle: Path) -> Path:
    """Two graphs, their data, a metric, and artifacts that cannot be opened."""
    path = tmp_path_factory.mktemp("compare")
    for part in tiny_contents.graphs:
        save_graph(part.graph, path / f"{part.id}.onnx")
    rng = np.random.default_rng(0)
    np.savez(path / "data.npz", input=rng.normal(size=(24, 1, 8, 8)).astype(np.float32), labels=rng.integers(0, 3, 24))
    (path / "broken.onnx").write_bytes(b"<html>not found</html>")
    (path / "cut.mopt").write_bytes(tiny_bundle.read_bytes()[:-100])
    (path / "mymetric.py").write_text(METRIC)
    return path


@pytest.fixture(scope="module")
def base(folder: Path) -> Report:
    """A first report, also at base.json."""
    words = ("large.onnx", "small.onnx", "--data", "data.npz", "--batch", "2", "--json")
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.chdir(folder)
        patch.setattr(sys, "stdout", out)
        cli.main(["compare", *words])
    (folder / "base.json").write_text(out.getvalue())
    return read_report(out.getvalue().encode())


def test_broken_artifacts_keep_their_rows_wherever_they_stand(
    typed: Typed, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    check = preflight.check
    monkeypatch.setattr(preflight, "check", lambda path, **how: seen.append(path.name) or check(path, **how))
    files = [folder / name for name in ("broken.onnx", "cut.mopt", "large.onnx", "small.onnx", "broken.onnx")]
    code, out, err = typed(*files, "--data", folder / "data.npz", "--batch", 1, "--json")
    assert code == 0, err
    rows = json.loads(out)["rows"]
    assert "broken.onnx is not a valid ONNX model" in rows[0]["reason"]
    assert "cut.mopt" in rows[1]["reason"]
    assert all(row["p50_ms"] > 0 and row["weights_bytes"] and row["activation_bytes"] for row in rows[2:4])
    assert json.loads(out)["reference"] == "large.onnx"
    assert seen == ["broken.onnx", "large.onnx", "small.onnx"]  # each graph once


def test_what_takes_pictures_is_fed_them_beside_what_takes_floats(typed: Typed, tmp_path: Path) -> None:
    data = open_data("digits")
    graph = from_torch.export(
        begin("simple_cnn", {"hidden": 4}, data, TrainSettings(epochs=1), start=None),
        prepare(data.validation.images[:4], data.preprocess),
    ).graph
    save_graph(take_pictures(graph), tmp_path / "pictures.onnx")
    save_graph(graph, tmp_path / "floats.onnx")
    for names in (("pictures.onnx", "floats.onnx"), ("pictures.onnx",)):
        files = [tmp_path / name for name in names]
        code, out, _ = typed(*files, "--data", "digits", "--samples", 20, "--batch", 4, "--json")
        rows = read_report(out.encode()).rows
        assert code == 0
        assert [(row.reason, row.agreement) for row in rows] == [(None, 1.0)] * len(names)


def test_where_nothing_can_be_opened_the_first_refusal_is_the_answer(typed: Typed, folder: Path) -> None:
    code, _, err = typed(folder / "broken.onnx", folder / "cut.mopt", "--data", folder / "data.npz")
    assert code == 3
    assert "broken.onnx is not a valid ONNX model" in err
    assert typed(folder / "cut.mopt", folder / "broken.onnx", "--data", folder / "data.npz")[0] == 4
    code, _, err = typed(folder / "large.onnx", folder / "misspelt.onnx", "--data", folder / "data.npz")
    assert (code, err.count("\n")) == (3, 1)  # before anything is measured
    assert "misspelt.onnx does not exist" in err


def test_the_same_again_passes_the_gate_and_a_report_says_so(
    typed: Typed, folder: Path, base: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    words = ("large.onnx", "small.onnx", "--data", "data.npz", "--batch", 2)
    code, out, err = typed(*words, "--against", "base.json", "--tolerance", "p50=off,latency=off")
    assert code == 0, err
    assert "figures held against base.json: nothing got worse" in out
    assert "agreement" not in out.partition("not compared")[2]


def test_what_got_worse_exits_with_one_and_is_named(
    typed: Typed, folder: Path, base: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    large, small = base.rows
    better = replace(large, private_bytes=(large.private_bytes or 0) - 3 * MIB, top1=1.0)
    gone = replace(small, name="gone.onnx")
    (tmp_path / "better.json").write_text(replace(base, rows=(better, gone)).to_json())
    words = ("large.onnx", "--data", "data.npz", "--batch", 2, "--against", tmp_path / "better.json")
    code, out, err = typed(*words, "--tolerance", "25%,peak=off,p50=off")
    assert code == 1
    assert "worse: large.onnx on onnxruntime cpu, batch 2: private was" in out
    assert "worse: large.onnx on onnxruntime cpu, batch 2: top1 was 100.00%, is" in out
    assert "missing: gone.onnx on onnxruntime cpu, batch 2" in out
    assert err.splitlines()[-1] == "memopt-export: error: 2 got worse"
    code, out, _ = typed(*words, "--json", "--html", tmp_path / "page.html")
    document = json.loads(out)
    assert code == 1
    assert document["gate"]["worse"][0]["base"] == better.private_bytes
    page = (tmp_path / "page.html").read_text()  # a gate that is not passed still leaves its page
    assert "missing: gone.onnx" in page


def test_what_seems_slower_is_timed_again_before_it_counts(
    typed: Typed, folder: Path, base: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    first, timed = probe.measure, list[str]()

    def busy(request: probe.Request, **how: float) -> probe.Measurement:
        """As if the machine had something else to do the first time, and always when it measures the small one."""
        found = first(request, **how)
        timed.append(Path(request.path).name)
        slow = timed.count(timed[-1]) == 1 or timed[-1] == "small.onnx"
        return replace(found, p50_ms=found.p50_ms + 100) if slow else found

    monkeypatch.setattr(comparing, "measure", busy)
    words = ("large.onnx", "small.onnx", "--data", "data.npz", "--batch", 2, "--against", "base.json")
    code, out, _ = typed(*words, "--tolerance", "p50=50ms,latency=off,private=50MiB,peak=50MiB")
    assert code == 1
    assert "worse: small.onnx on onnxruntime cpu, batch 2: p50 was" in out
    assert "worse: large.onnx" not in out
    assert timed == ["large.onnx", "small.onnx"] * 3


REFUSED = [
    (("--tolerance", "5%"), 2, "--tolerance means nothing alone; hint: --against base.json"),
    (("--against", "none.json"), 3, "none.json cannot be read"),
    (("--against", "data.npz"), 4, "report is not valid JSON"),
    (("--against", "base.json", "--tolerance", "speed=5%"), 2, "is of no metric"),
    (("--metric", "mymetric:absent"), 2, "module 'mymetric' has no 'absent'"),
    (("--metric", "nowhere:mean"), 2, "'nowhere:mean' cannot be imported"),
    (("--html", "data.npz"), 2, "data.npz exists"),
    (("--html", "large.onnx", "--force"), 2, "large.onnx is what it would be made from"),
    (("--soak", "5"), 2, "--soak"),
]


@pytest.mark.parametrize(("words", "code", "said"), REFUSED)
@pytest.mark.usefixtures("base")
def test_what_cannot_be_is_refused_before_anything_runs(
    typed: Typed, folder: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], code: int, said: str
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    answer = typed("large.onnx", "--data", "data.npz", *words)
    assert answer[0] == code
    assert said in answer[2]
    assert len(answer[2].splitlines()) == 1


def test_a_metric_of_ones_own_a_confusion_and_a_soak_are_in_the_report(
    typed: Typed, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(folder))
    words = (folder / "large.onnx", "--data", folder / "data.npz", "--batch", 4)
    code, out, _ = typed(*words, "--metric", "mymetric:mean", "--confusion", "--soak", 70, "--json")
    (row,) = json.loads(out)["rows"]
    assert code == 0
    assert isinstance(row["metric"], float)
    assert np.sum(row["confusion"]) == 24
    assert "leak_bytes_per_1000_runs" in row
    code, out, _ = typed(*words, "--metric", "mymetric:fails", "--html", tmp_path / "page.html")
    assert code == 0
    assert "mymetric:fails raised KeyError: 'no such class'" in " ".join(out.split())
    assert "mymetric:fails raised KeyError" in (tmp_path / "page.html").read_text()


def drawn(report: Report, width: int) -> str:
    out = io.StringIO()
    console._draw_report(Console(file=out, width=width, force_terminal=True, color_system=None), report)
    return out.getvalue()


@pytest.mark.parametrize("width", [60, 80, 120, 160])
def test_the_table_fits_the_terminal_and_says_what_it_left_out(base: Report, width: int) -> None:
    text = drawn(base, width)
    assert max(map(len, text.splitlines())) <= width
    assert all(name in text for name in ("large.onnx", "small.onnx", "Private", "Peak"))
    assert "left out at this width: " in text


def test_growth_is_said_whatever_the_width(base: Report) -> None:
    leaking = replace(base.rows[0], leak_bytes_per_1000_runs=12 * MIB)
    text = " ".join(drawn(replace(base, rows=(leaking, base.rows[1])), 80).split())
    assert "grows: large.onnx on onnxruntime cpu, batch 2, by 12.0 MiB of private memory in 1,000 runs" in text
    assert "grows" not in drawn(base, 80)
