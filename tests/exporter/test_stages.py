from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from memopt.errors import InputRefused, OutOfResource, UsageError
from memopt_export.job import read_job, shipped
from memopt_export.stages import Outcome, Stages, locked


@pytest.fixture
def started() -> list[str]:
    return []


@pytest.fixture
def stages(tmp_path: Path, started: list[str]) -> Stages:
    return Stages(tmp_path / "work", started.append, lambda outcome: None)


def writer(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "out.txt").write_text(text) and None


def made(stages: Stages, text: str = "a", **made_from: object) -> Outcome:
    return stages.run("stage one", {"x": 1} | made_from, writer(text))


def test_the_same_inputs_are_not_worked_on_twice(stages: Stages, started: list[str]) -> None:
    first, second = made(stages), made(stages)
    assert started == ["stage one"]
    assert (first.cached, second.cached) == (False, True)
    assert first.files == second.files
    assert second.read("out.txt") == b"a"


def test_another_input_another_option_or_another_tool_is_new_work(
    stages: Stages, started: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made(stages)
    made(stages, x=2)
    made(stages, option="b")
    monkeypatch.setattr("memopt_export.stages.tool_versions", lambda: {"numpy": "0"})
    made(stages)
    assert len(started) == 4


def test_a_stage_that_fails_leaves_nothing_and_is_made_next_time(stages: Stages, started: list[str]) -> None:
    def fail(folder: Path) -> None:
        (folder / "half.txt").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stages.run("stage one", {"x": 1}, fail)
    assert not list(stages.root.iterdir())
    assert made(stages).cached is False


@pytest.mark.parametrize("damage", ["change", "remove", "record"])
def test_a_damaged_stage_is_made_again(stages: Stages, damage: str) -> None:
    folder = made(stages).folder
    if damage == "change":
        (folder / "out.txt").write_text("b")
    elif damage == "remove":
        (folder / "out.txt").unlink()
    else:
        (folder / "stage.json").write_text("{")
    again = made(stages)
    assert again.cached is False
    assert again.read("out.txt") == b"a"


def test_outcomes_are_told_apart_by_content(stages: Stages) -> None:
    assert made(stages, "a").sha256 == made(stages, "a", y=1).sha256
    assert made(stages, "a").sha256 != made(stages, "b", z=1).sha256


def test_a_work_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutOfResource, match="hint: --work DIR"):
        made(Stages(tmp_path / "file" / "work", lambda stage: None, lambda outcome: None))


def test_a_full_disk_inside_a_stage_is_out_of_resource(stages: Stages) -> None:
    def fail(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OutOfResource, match="No space left on device; hint: --work DIR"):
        stages.run("stage one", {}, fail)
    assert not list(stages.root.iterdir())


def test_what_a_killed_run_left_behind_is_swept_and_a_living_ones_is_not(stages: Stages) -> None:
    stages.root.mkdir(parents=True)
    (stages.root / ".making-999999999-x").mkdir()
    (stages.root / f".making-{os.getpid()}-x").mkdir()
    made(stages)
    left = sorted(path.name for path in stages.root.iterdir() if path.name.startswith("."))
    assert left == [f".making-{os.getpid()}-x"]


def test_of_two_runs_at_once_the_faster_ones_stage_stays(stages: Stages) -> None:
    def meanwhile(folder: Path) -> None:
        made(stages)
        (folder / "out.txt").write_text("a")

    assert stages.run("stage one", {"x": 1}, meanwhile).read("out.txt") == b"a"
    assert made(stages).cached


def test_a_second_process_waits_for_the_first_and_says_so(tmp_path: Path) -> None:
    waited: list[str] = []
    order: list[str] = []

    def second() -> None:
        with locked(tmp_path, on_wait=lambda: waited.append("yes")):
            order.append("second")

    with locked(tmp_path, on_wait=lambda: waited.append("never")):
        thread = threading.Thread(target=second)
        thread.start()
        while not waited:
            time.sleep(0.01)
        order.append("first")
    thread.join()
    assert (waited, order) == (["yes"], ["first", "second"])


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_recipe_is_a_job(name: str) -> None:
    job = read_job(name)
    assert job.name == name
    assert [each.how.flavor for each in job.engine] == ["tensorrt-rtx", "tensorrt"]
    assert job.prune is not None
    assert job.distill is not None


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        ("name = ]", InputRefused, "is not TOML: .*line 1"),
        ("name = 'x'\ndata = 'digits'", UsageError, "field 'train' is missing"),
        (
            "[train]\nnetwork = 'x'\nhow = { epoch = 3 }",
            UsageError,
            "unknown field 'epoch'; hint: did you mean 'epochs'",
        ),
        ("[train]\nnetwork = 'x'\nhow = { epochs = 'three' }", UsageError, "expected int, got str"),
        ("[prune]\nratio = 1.5", UsageError, "ratio is 1.5"),
        ("[quantize]\nrecipes = ['int3']", UsageError, "precision 'int3' is not known"),
        ("[quantize]\nrecipes = ['int8', 'int8']", UsageError, "each once"),
        ("[quantize]\nrecipes = ['fp32']", UsageError, "fp32 comes by itself"),
        ("[quantize]\nsamples = 0", UsageError, "samples is 0"),
        ("[compare]\nbatches = [0]", UsageError, r"compare.batches is \[0\]"),
        ("[compare]\nruntimes = ['tvm']", UsageError, "runtime 'tvm' is not known"),
        ("[[engine]]\nprecisions = ['fp7']\nhow = { flavor = 'tensorrt', targets = ['local'] }", UsageError, "'fp7'"),
        (
            "[[engine]]\nhow = { flavor = 'tensorrt', targets = ['local'], batches = [[1, 8]] }",
            UsageError,
            "3 values, got 2",
        ),
        (
            "name = '../x'\ndata = 'digits'\n[train]\nnetwork = 'ds_cnn'\nhow = { epochs = 1 }",
            UsageError,
            "name is '../x'",
        ),
        ("[[engine]]\nhow = { flavor = 'tensorrt-rtx', targets = ['sm99'] }", UsageError, "sm99"),
    ],
)
def test_a_wrong_recipe_is_refused_with_the_place(tmp_path: Path, text: str, kind: type, said: str) -> None:
    path = tmp_path / "job.toml"
    base = "" if "name" in text else "name = 'x'\ndata = 'digits'\n"
    base += "" if "[train]" in text or "name" in text else "train = { network = 'ds_cnn', how = { epochs = 1 } }\n"
    path.write_text(base + text)
    with pytest.raises(kind, match=said):
        read_job(str(path))


def test_a_recipe_that_does_not_exist_names_those_that_do() -> None:
    with pytest.raises(InputRefused, match=r"recipe 'nope' is no file; hint: one of digits, mnist, or a TOML file"):
        read_job("nope")
