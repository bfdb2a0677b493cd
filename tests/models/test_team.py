from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from memopt.errors import UsageError
from memopt_models.checkpoint import Checkpoint, load_checkpoint
from memopt_models.data import DataSet
from memopt_models.team import ALONE, Team

sys.path.append(str(Path(__file__).parent))
import team_member as member  # found through the line above

WHOLE = [name for name, case in member.CASES.items() if case.stop_after is None and case.network == "simple_cnn"]


@pytest.fixture(scope="module")
def data() -> DataSet:
    return member.few_digits()


@pytest.fixture(scope="module")
def begun(data: DataSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes are to go on with: one alone has begun it, and was cut off after the first epoch."""
    folder = tmp_path_factory.mktemp("team")
    for name in ("ddp", "fsdp2"):
        assert member.run(f"{name}-cut-off", data, folder) is None
        (folder / f"{name}-cut-off.safetensors.train.resume").rename(
            folder / f"{name}-gone-on.safetensors.train.resume"
        )
    return folder


@pytest.fixture(scope="module")
def together(begun: Path) -> Path:
    """All the cases, by two processes."""
    command = [sys.executable, str(Path(member.__file__))]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONWARNINGS": "error::UserWarning"}
    second = subprocess.Popen([*command, "1", str(begun)], env=environment)
    first = subprocess.run([*command, "0", str(begun)], env=environment, check=False, timeout=300)
    assert (first.returncode, second.wait(timeout=60)) == (0, 0)
    return begun


def settings(checkpoint: Checkpoint) -> dict[str, object]:
    """What the lineage says, but for the memory that was measured."""
    return {name: value for name, value in checkpoint.lineage[0].settings.items() if name != "memory"}


def difference(one: Checkpoint, other: Checkpoint) -> float:
    return max((one.state[name] - other.state[name]).abs().max().item() for name in one.state)


@pytest.mark.parametrize("name", WHOLE)
def test_two_processes_give_what_one_gives(name: str, data: DataSet, together: Path, tmp_path: Path) -> None:
    alone, made = member.run(name, data, tmp_path), load_checkpoint(together / f"{name}.safetensors")
    assert alone is not None
    assert difference(alone, made) <= 1e-6
    assert made.metrics == pytest.approx(alone.metrics, abs=1 / 63)
    assert settings(made) == settings(alone)


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_one_process_goes_on_with_what_two_have_begun(name: str, data: DataSet, together: Path, tmp_path: Path) -> None:
    uninterrupted = member.run(f"{name}-gone-on", data, tmp_path)
    shutil.copy(
        together / f"{name}-cut-off.safetensors.train.resume",
        tmp_path / f"{name}-gone-on.safetensors.train.resume",
    )
    said: list[str] = []
    made = member.run(f"{name}-gone-on", data, tmp_path, say=said.append)
    assert "goes on after epoch 1, kept in " in said[0]
    assert uninterrupted is not None
    assert made is not None
    assert difference(uninterrupted, made) <= 1e-6


def test_batch_statistics_are_of_each_process_and_one_network_comes_out(together: Path) -> None:
    made = load_checkpoint(together / "ddp-batchnorm.safetensors")
    assert made.metrics.keys() >= {"validation_top1", "test_top1"}


@pytest.mark.parametrize("rows", [1, 2, 5, 64])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_row_of_a_batch_is_one_process_s(rows: int, size: int) -> None:
    numbers = np.arange(rows)
    parts = [numbers[Team(rank, size).part(numbers)] for rank in range(size)]
    np.testing.assert_array_equal(np.concatenate(parts), numbers)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_one_process_needs_nobody() -> None:
    assert ALONE.is_first
    assert ALONE.add(0.5) == 0.5
    assert ALONE.share("text", {}) == ("text", {})


def test_impossible_teams_are_refused(data: DataSet) -> None:
    with pytest.raises(UsageError, match="rank 2 is none of 2 processes"):
        Team(2, 2)
    with pytest.raises(UsageError, match="parallel 'horovod' is not known; hint: ddp, fsdp2"):
        Team(parallel="horovod")
