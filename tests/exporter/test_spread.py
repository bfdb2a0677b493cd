"""Trainings that are killed, and trainings in several processes, as a user types them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from memopt.errors import BackendError, InputRefused, OutOfResource, UsageError
from memopt.strict_json import to_json
from memopt_export import cli, spread
from memopt_models.checkpoint import Checkpoint, load_checkpoint
from memopt_models.team import Lost

NETWORK = """
from torch import nn

def make(classes=10, **shapes):
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 16), nn.ReLU(), nn.Dropout(0.4), nn.Linear(16, classes))
"""
TRAIN = ("train", "--network", "drops:make", "--threads", "1", "-o", "out.safetensors", "--json")
RESUME = "out.safetensors.train.resume"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current one, with a network that drops at random."""
    (tmp_path / "drops.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@contextlib.contextmanager
def started(*words: str, module: tuple[str, ...] = ("memopt_export",)) -> Iterator[subprocess.Popen[str]]:
    """A command in a process of its own, which is gone after the block."""
    process = subprocess.Popen(
        [sys.executable, "-m", *module, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for_epoch(process: subprocess.Popen[str], epoch: int) -> None:
    """Reads what the command says until this epoch has ended: it is in the middle of the next one then."""
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if f"epoch {epoch}/" in line:
            return
    raise AssertionError("".join(said))


def type_(*words: str) -> tuple[int, str, str]:
    """A command in this process: exit code, stdout, stderr."""
    done = CliRunner().invoke(cli.cli, words, obj=words)
    assert done.exception is None, done.exception
    return done.exit_code, done.stdout, done.stderr


def children(process: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def facts(checkpoint: Checkpoint) -> tuple[object, ...]:
    """All but the memory that was measured."""
    (stage,) = checkpoint.lineage
    return checkpoint.sha256, checkpoint.metrics, stage.parents, {**stage.settings, "memory": None}


@pytest.mark.slow
def test_killed_training_goes_on_to_the_same_bits(folder: Path) -> None:
    words = (*TRAIN, "--epochs", "60")
    for epoch, number, code in ((5, signal.SIGKILL, -9), (15, signal.SIGTERM, 143)):
        with started(*words) as process:
            wait_for_epoch(process, epoch)
            process.send_signal(number)
            assert process.wait(timeout=60) == code
        assert [path.name for path in folder.glob("out*")] == [RESUME]
        assert not list(folder.glob(".*"))
    _, out, err = type_(*words)
    assert re.search(rf"train goes on after epoch \d+, kept in {RESUME}", err)
    assert err.count("epoch 60/60") == 1
    assert [path.name for path in folder.glob("out*")] == ["out.safetensors"]
    made = load_checkpoint(Path("out.safetensors"), network="drops:make")
    assert json.loads(out)["sha256"] == made.sha256
    type_(*words, "--force")
    assert facts(load_checkpoint(Path("out.safetensors"), network="drops:make")) == facts(made)


@pytest.mark.slow
def test_killed_process_ends_the_others_and_another_number_goes_on(folder: Path) -> None:
    words = (*TRAIN, "--epochs", "200")
    with started(*words, "--nproc", "2") as process:
        wait_for_epoch(process, 1)
        pids = children(process.pid)
        os.kill(pids[1], signal.SIGKILL)
        begun = time.monotonic()
        out, err = process.communicate(timeout=60)
        assert time.monotonic() - begun < 20
    problem = "process 1 of 2 was killed by SIGKILL, as the system does where memory is short"
    hint = "the same command goes on after the last epoch"
    assert process.returncode == OutOfResource.exit_code
    assert [line for line in err.splitlines() if "epoch" not in line or "error" in line] == [
        f"memopt-export: error: {problem}; hint: {hint}"
    ]
    assert json.loads(out) == {"error": {"problem": problem, "hint": hint, "exit_code": OutOfResource.exit_code}}
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert [path.name for path in folder.glob("out*")] == [RESUME]
    with started(*words) as process:
        wait_for_epoch(process, 3)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    assert [path.name for path in folder.glob("out*")] == [RESUME]


@pytest.mark.slow
def test_processes_end_with_the_one_that_watches_them(folder: Path) -> None:
    with started(*TRAIN, "--epochs", "5000", "--nproc", "2") as process:
        wait_for_epoch(process, 1)
        pids = children(process.pid)
        process.kill()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(pids) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.slow
def test_error_of_the_processes_is_told_once(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*TRAIN, "--batch-size", "1", "--nproc", "2"])
    assert ended.value.code == UsageError.exit_code
    out, err = capfd.readouterr()
    assert err == "memopt-export: error: a batch of 1 cannot be divided among 2 processes\n"
    assert json.loads(out)["error"]["exit_code"] == UsageError.exit_code
    assert not list(folder.glob("out*"))


@pytest.mark.slow
def test_torchrun_starts_the_processes_too(folder: Path) -> None:
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "memopt_export")
    words = ("train", "--network", "simple_cnn", "--setting", "hidden=8", "--epochs", "1", "--batch-size", "256",
             "--optimizer", "sgd", "--threads", "1", "--json")  # fmt: skip
    with started(*words, "--parallel", "fsdp2", "-o", "two.safetensors", module=torchrun) as process:
        out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    assert json.loads(out)["path"] == "two.safetensors"
    type_(*words, "-o", "one.safetensors")
    one, two = (load_checkpoint(Path(f"{name}.safetensors")) for name in ("one", "two"))
    assert max((one.state[name] - two.state[name]).abs().max().item() for name in one.state) <= 1e-6
    assert not list(folder.glob("*.resume"))


def test_another_training_is_refused_until_it_is_dropped(folder: Path) -> None:
    Path(RESUME).write_bytes(b"")
    _, _, err = type_(*TRAIN, "--epochs", "1")
    assert f"train starts anew: {RESUME} is damaged (" in err
    assert not Path(RESUME).exists()
    Path("out.safetensors").unlink()
    Path(RESUME).write_bytes(b"")
    assert "starts anew" not in type_(*TRAIN, "--epochs", "1", "--restart")[2]


@pytest.mark.parametrize(
    ("environment", "asked", "message"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, 1, "RANK, WORLD_SIZE and LOCAL_RANK have to be numbers: .*'x'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, 1, "rank 2 is none of 2 processes"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, 4, "--nproc 4 among the 2 processes that torchrun has started"),
    ],
)
def test_environment_that_makes_no_sense_is_refused(environment: dict[str, str], asked: int, message: str) -> None:
    with (
        pytest.raises(UsageError, match=message),
        spread.membership(environment, asked=asked, parallel="ddp"),
    ):
        pass


@pytest.mark.parametrize("environment", [{}, {"RANK": "0", "WORLD_SIZE": "1"}, {"WORLD_SIZE": "2"}])
def test_process_without_others_is_a_team_of_one(environment: dict[str, str]) -> None:
    with spread.membership(environment, asked=1, parallel="ddp") as team:
        assert (team.rank, team.size) == (0, 1)


FAILED = [
    ({0: 5, 1: -9}, {0: Lost("gone")}, OutOfResource, "process 1 of 3 was killed by SIGKILL"),
    ({1: -11}, {}, BackendError, "process 1 of 3 was killed by SIGSEGV"),
    ({0: 5, 2: 3}, {0: Lost("gone"), 2: InputRefused("bad data", hint="better")}, InputRefused, "bad data; hint"),
    ({0: 5, 1: 5}, {0: Lost("gone"), 1: Lost("gone too")}, BackendError, "gone"),
]  # fmt: skip


@pytest.mark.parametrize(("codes", "errors", "kind", "message"), FAILED)
def test_first_process_to_fail_is_blamed_and_not_those_that_lost_it(
    codes: dict[int, int], errors: dict[int, Exception], kind: type[Exception], message: str, tmp_path: Path
) -> None:
    for rank, error in errors.items():
        card = {"kind": type(error).__name__, "problem": error.problem, "hint": error.hint}
        (tmp_path / f"{rank}.json").write_text(to_json({name: value for name, value in card.items() if value}))
    with pytest.raises(kind, match=message):
        spread._raise(codes, 3, tmp_path)


def test_bug_of_another_process_is_shown_with_its_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "1.stderr").write_text("Traceback: it was like this\n")
    with pytest.raises(SystemExit) as ended:
        spread._raise({1: 70}, 2, tmp_path)
    assert ended.value.code == 70
    assert capsys.readouterr().err == "Traceback: it was like this\n"
