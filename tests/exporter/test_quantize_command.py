"""`memopt-export quantize` as a user types it: recipe files, flags, --strict, budgets, memory limits, what is shown."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

import memopt_export
from memopt.files import sha256_file
from memopt.memory import Bill, HostMemory
from memopt.probe import Measurement
from memopt_export import cli, judge
from memopt_export.graph import Graph, load_graph, save_graph
from memopt_export.means import UNLIMITED
from memopt_export.quantize import quantize
from memopt_export.recipe import Recipe, RecipeFile, read_recipe, save_recipe

MIB = 2**20


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str


@pytest.fixture
def folder(tmp_path: Path, cnn, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a model and its data."""
    graph = cnn().graph()
    save_graph(graph, tmp_path / "cnn.onnx")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 3, 16, 16)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x, labels=rng.integers(0, 10, 40))
    np.savez(tmp_path / "bare.npz", x=x)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def type_(folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """Types `quantize cnn.onnx -o q.onnx --no-measure` and more words."""

    def run(*words: object, measure: bool = False) -> Answer:
        fixed = ["quantize", "cnn.onnx", "-o", "q.onnx", *([] if measure else ["--no-measure"])]
        with pytest.raises(SystemExit) as ended:
            cli.main([*fixed, *map(str, words)])
        captured = capsys.readouterr()
        return Answer(int(ended.value.code or 0), captured.out, captured.err)

    return run


QUICK = ("--data", "data.npz", "--correction", "none", "--calibration", "minmax")


# --- recipe files


def test_a_saved_recipe_makes_the_same_bytes(type_: Callable[..., Answer], folder: Path) -> None:
    words = ("--data", "data.npz", "--samples", 12, "--seed", 5, "--exclude", "wide", "--correction", "bias")
    assert type_(*words, "--batch-size", 4, "--save-recipe", "q.toml").code == 0
    before = (folder / "q.onnx").read_bytes()
    (folder / "q.onnx").unlink()
    said = read_recipe(folder / "q.toml")
    assert said == RecipeFile(Recipe("int8", correction="bias", exclude=("wide",)), "data.npz", 12, 5, 4)
    assert type_("--recipe", "q.toml").code == 0
    assert (folder / "q.onnx").read_bytes() == before


def test_the_command_line_goes_before_the_file(type_: Callable[..., Answer], folder: Path) -> None:
    recipe = Recipe("int8", "tensorrt", calibration="minmax", correction="none", exclude=("wide",))
    save_recipe(RecipeFile(recipe, "data.npz", 12, 5, 4), folder / "a.toml")
    answer = type_("--recipe", "a.toml", "--target", "cpu", "--samples", 6, "--exclude", "stem", "--json")
    assert answer.code == 0, answer.err
    used = json.loads(answer.out)["recipe"]
    assert used["recipe"]["exclude"] == ["stem"]
    assert (used["recipe"]["target"], used["recipe"]["calibration"]) == ("cpu", "minmax")
    assert (used["samples"], used["seed"], used["batch_size"]) == (6, 5, 4)
    assert json.loads(answer.out)["kept_float"] == ["stem"]


def test_operators_are_excluded_and_included(type_: Callable[..., Answer]) -> None:
    assert json.loads(type_(*QUICK, "--exclude", "Gemm", "--json").out)["kept_float"] == ["fc"]
    answer = type_(*QUICK, "--include", "Conv", "--include", "fc", "--force", "--json")
    assert json.loads(answer.out)["kept_float"] == []


def test_an_unknown_key_of_a_recipe_names_the_nearest(type_: Callable[..., Answer], folder: Path) -> None:
    (folder / "a.toml").write_text('precision = "int8"\nexlude = []\n')
    answer = type_("--recipe", "a.toml")
    assert answer.code == 2
    assert "a.toml: unknown field 'exlude'; hint: did you mean 'exclude'?" in answer.err
    assert not (folder / "q.onnx").exists()


# --- what is shown


def test_inspect_tells_what_quantized_it(
    type_: Callable[..., Answer], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    type_(*QUICK, "--samples", 3, "--seed", 2)
    told = load_graph(folder / "q.onnx").quantization
    assert told is not None
    assert told.rows is not None
    with pytest.raises(SystemExit):
        cli.main(["inspect", "q.onnx", "--json"])
    facts = json.loads(capsys.readouterr().out)["facts"]
    assert facts["recipe"] == "int8 for cpu, minmax, none"
    assert facts["calibrated"] == f"on 3 samples of data.npz/train, seed 2: {', '.join(map(str, told.rows))}"
    assert facts["data sha256"] == told.fingerprint


def test_the_end_says_what_did_not_take_and_what_to_type_with_the_float_file_s_name(
    type_: Callable[..., Answer],
) -> None:
    halves = type_("--precision", "fp16")
    assert "found memory " in halves.out
    assert "of float32 in ONNX Runtime on this CPU: " in halves.out
    assert (
        "  remedy: memopt-export quantize cnn.onnx --precision int8 --target cpu --data SPEC -o INT8.onnx" in halves.out
    )
    (found,) = json.loads(type_("--precision", "fp16", "--force", "--json").out)["findings"]
    assert found["check"] == "unpacked at load"
    few = type_(*QUICK, "--samples", 3, "--force").out
    assert "found at no cost in bytes: ranges of activations from 3 samples of data.npz/train, fewer than 32" in few


def test_what_is_known_and_what_is_not_is_shown(type_: Callable[..., Answer]) -> None:
    labelled = type_(*QUICK)
    assert "top-1 " in labelled.out
    assert "5 of 5 layers by ONNX Runtime" in labelled.out
    assert "not known: latency and memory are not measured: --no-measure" in labelled.out
    assert "next: memopt-export compare q.onnx --data data.npz" in labelled.out
    assert "top-1" not in type_(*QUICK, "--data", "bare.npz", "--force").out
    halves = type_("--precision", "fp16", "--force")
    assert "not known: outputs are not compared: there are no samples; --data SPEC names some" in halves.out


@pytest.fixture
def worse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements in which the quantized graph takes three times as long and twice the memory."""
    answers = [(1.0, 4 * MIB), (3.0, 8 * MIB)]

    def measure(request: object) -> Measurement:
        p50_ms, private = answers.pop(0)
        steady = HostMemory(private, 0, None, private, "by hand")
        return Measurement(Bill({"steady": steady}), "CPU", 1.0, p50_ms, p50_ms, p50_ms, 5)

    monkeypatch.setattr(judge, "measure_file", measure)


SLOWER = "slower than float: 3.00x (1 ms -> 3 ms)"
LARGER = "larger in private memory than float: 4.00 MiB -> 8.00 MiB"


@pytest.mark.parametrize("strict", [True, False])
def test_a_flag_is_shown_and_fails_where_one_is_strict(
    type_: Callable[..., Answer], folder: Path, worse: None, strict: bool
) -> None:
    answer = type_(*QUICK, *(["--strict"] if strict else []), measure=True)
    assert answer.code == (1 if strict else 0)
    assert f"flagged: {SLOWER}\nflagged: {LARGER}\n" in answer.out
    assert (f"memopt-export: error: --strict: {SLOWER}; {LARGER}" in answer.err) == strict
    assert (folder / "q.onnx").exists()


def test_strict_with_json_is_one_document(type_: Callable[..., Answer], worse: None) -> None:
    answer = type_(*QUICK, "--strict", "--json", measure=True)
    assert answer.code == 1
    assert json.loads(answer.out)["verdict"]["flags"] == [SLOWER, LARGER]


def test_strict_without_flags_is_content(type_: Callable[..., Answer]) -> None:
    assert type_(*QUICK, "--strict").code == 0


# --- budgets and limits: what is passed on, and what is made of the answer


@dataclass(frozen=True)
class Rank:
    layer: str
    operator: str
    sqnr_db: float
    top1: float | None
    weights_bytes: int
    activation_bytes: int


RANKING = (Rank("stem", "Conv", 31.25, 0.5, 2048, 4096), Rank("fc", "Gemm", 30.0, None, 1024, 0))


@pytest.fixture
def budget(monkeypatch: pytest.MonkeyPatch) -> list:
    """A budget that keeps `stem` in float, and what it was asked."""
    asked: list = []

    def within(graph, recipe, calibration, judged, limits, means):
        asked.append((limits, len(calibration), len(judged), means.batch_size))
        kept = replace(recipe, exclude=("stem",))
        done = quantize(graph, kept, calibration, means)
        holds = limits.max_drop_points != 0
        return SimpleNamespace(quantized=done, recipe=kept, ranking=RANKING, holds=holds, reached="SQNR 28.5 dB")

    module = ModuleType("memopt_export.budget")
    module.Budget = lambda drop, noise: SimpleNamespace(max_drop_points=drop, min_sqnr_db=noise)
    module.within = within
    module.rank = lambda *arguments: RANKING
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(memopt_export, "budget", module, raising=False)
    return asked


def test_a_budget_that_holds_is_told_and_reproduced(
    type_: Callable[..., Answer], folder: Path, budget: list
) -> None:  # fmt: skip
    answer = type_(*QUICK, "--max-drop", 0.5, "--min-sqnr", 25, "--save-recipe", "q.toml")
    assert answer.code == 0, answer.err
    ((limits, calibrated, judged, batch),) = budget
    assert (limits.max_drop_points, limits.min_sqnr_db) == (0.5, 25)
    assert (calibrated, judged, batch) == (20, 20, UNLIMITED.batch_size)
    assert "SQNR 28.5 dB" in answer.out
    assert read_recipe(folder / "q.toml").recipe.exclude == ("stem",)
    before = (folder / "q.onnx").read_bytes()
    assert type_("--recipe", "q.toml", "--force").code == 0
    assert (folder / "q.onnx").read_bytes() == before


def test_a_budget_that_does_not_hold_exits_with_one_and_the_best(
    type_: Callable[..., Answer], folder: Path, budget: list
) -> None:
    answer = type_(*QUICK, "--max-drop", 0, "--json")
    assert answer.code == 1
    assert "memopt-export: error: the budget does not hold: SQNR 28.5 dB" in answer.err
    assert json.loads(answer.out)["holds"] is False
    assert (folder / "q.onnx").exists()


def test_the_ranked_layers_are_a_table_and_json(type_: Callable[..., Answer], budget: list) -> None:
    table = type_(*QUICK, "--sensitivity").out
    lines = [line.split() for line in table.splitlines() if "Conv" in line or "Gemm" in line]
    assert lines == [
        ["stem", "Conv", "31.2", "dB", "50.00%", "+2.00", "KiB", "+4.00", "KiB"],
        ["fc", "Gemm", "30.0", "dB", "–", "+1.00", "KiB", "+0", "B"],
    ]
    ranking = json.loads(type_(*QUICK, "--sensitivity", "--force", "--json").out)["ranking"]
    assert [each["layer"] for each in ranking] == ["stem", "fc"]
    assert budget == []


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> list:
    """A memory limit that halves the batches, and what happened in which order."""
    happened: list = []
    module = ModuleType("memopt_export.memory_limit")

    @contextmanager
    def hard_cap(limit_bytes):
        happened.append(("cap", limit_bytes))
        yield
        happened.append(("uncap", limit_bytes))

    module.estimate = lambda *_: SimpleNamespace(text=lambda: "needs 300 MiB")
    module.fit = lambda graph, recipe, calibration, means, limit_bytes: replace(means, batch_size=4)
    module.hard_cap = hard_cap
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(memopt_export, "memory_limit", module, raising=False)
    return happened


def test_a_memory_limit_says_what_is_needed_first_and_caps_the_work(
    type_: Callable[..., Answer], folder: Path, limit: list
) -> None:
    answer = type_(*QUICK, "--memory-limit", "512MiB", "--save-recipe", "q.toml")
    assert answer.code == 0
    assert "needs 300 MiB" in answer.err
    assert limit == [("cap", 512 * MIB), ("uncap", 512 * MIB)]
    assert read_recipe(folder / "q.toml").batch_size == 4


def test_a_graph_of_a_fixed_batch_is_held_to_a_budget(
    type_: Callable[..., Answer], folder: Path, cnn: Callable[..., Any]
) -> None:
    """Of its 20 validation samples it takes four at a time."""
    model = cnn().model()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    save_graph(Graph(model, "0" * 64), folder / "cnn.onnx", force=True)
    answer = type_(*QUICK, "--min-sqnr", 300, "--max-drop", 100, "--json")
    assert answer.code == 1, answer.err
    found = json.loads(answer.out)
    assert found["verdict"]["samples"] == 20
    assert {each["layer"] for each in found["ranking"]} == {"stem", "depthwise", "pointwise", "wide", "fc"}


# --- files


def test_weights_go_beside_the_graph_on_request(type_: Callable[..., Answer], folder: Path) -> None:
    assert type_(*QUICK).code == 0
    whole = load_graph(folder / "q.onnx")
    answer = type_(*QUICK, "--external-data", "--force", "--json")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["sha256"] == sha256_file(folder / "q.onnx")
    assert (folder / "q.onnx.data").stat().st_size > (folder / "q.onnx").stat().st_size / 10
    apart = load_graph(folder / "q.onnx")
    assert apart.quantization == whole.quantization
    assert apart.weights_bytes() == whole.weights_bytes()
    again = type_(*QUICK, "--external-data", "--force", "--json")
    assert json.loads(again.out)["sha256"] == json.loads(answer.out)["sha256"]


def test_equalization_is_said_and_unsaid(type_: Callable[..., Answer], folder: Path) -> None:
    assert type_(*QUICK, "--no-equalize", "--save-recipe", "q.toml").code == 0
    assert read_recipe(folder / "q.toml").recipe.equalize is False
    answer = type_("--recipe", "q.toml", "--equalize", "--force", "--json")
    assert json.loads(answer.out)["recipe"]["recipe"]["equalize"] is True
