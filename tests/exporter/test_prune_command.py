"""`memopt-export prune` as a user types it, on a real network and real pictures."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from memopt.sizes import parse_size
from memopt_export import cli
from memopt_export.planned_memory import planner
from memopt_models.checkpoint import load_checkpoint, save_checkpoint
from memopt_models.data import open_data
from memopt_models.train import TrainSettings, train

HERE = ("--way", "channels-here", "--epochs", "0")  # without the child, which has tests of its own


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prune") / "dense.safetensors"
    digits = open_data("digits")
    how = TrainSettings(epochs=1, batch_size=256, learning_rate=3e-3, threads=1)
    save_checkpoint(train("simple_cnn", {"hidden": 64}, digits, how), path)
    return path


@pytest.fixture
def prune(capsys: pytest.CaptureFixture[str], dense: Path, tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    """Types the command with these options; its exit code, what it says, and what it complains of."""

    def type_(*options: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(["prune", str(dense), *options, "-o", str(tmp_path / "out.safetensors")])
        captured = capsys.readouterr()
        return int(ended.value.code or 0), " ".join(captured.out.split()), captured.err

    return type_


def test_command_says_what_went_and_what_is_left(prune: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    code, said, _ = prune("--ratio", "0.5", "--epochs", "1", "--threads", "1", "--method", "taylor")
    assert code == 0
    assert "pruned 50.0% of channels, with all that depend on each other, ranked by taylor, scope layer" in said
    assert "conv2 1 32 → 16 4640 → 1168 903k → 226k" in said
    assert load_checkpoint(tmp_path / "out.safetensors").lineage[-1].settings["way"] == "channels"  # by the child


def test_planned_memory_is_asked_for_and_kept(
    prune: Callable[..., tuple[int, str, str]], dense: Path, tmp_path: Path
) -> None:
    before = planner()(load_checkpoint(dense), 8)
    code, said, _ = prune("--target-memory", "700KiB", "--batch", "8", *HERE)
    assert code == 0
    assert re.search(r"planned memory at batch 8 6\d\d KiB, 700 KiB allowed, \S+ [MK]iB before", said)
    after = planner()(load_checkpoint(tmp_path / "out.safetensors"), 8)
    assert after <= parse_size("700KiB") < before


def test_way_that_was_not_gone_is_named_with_its_reason(
    prune: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memopt_models.channels.remove_channels", lambda *_, **__: 1 // 0)
    code, said, _ = prune(*HERE, "--way", "hidden", "--target-macs", "0.6")
    assert code == 0
    assert (
        "not by channels-here torch-pruning: ZeroDivisionError: integer division or modulo by zero; what was done "
        "instead: the features hidden between two layers"
    ) in said
    assert re.search(r"macs \S+k, \S+k allowed, \S+M before", said)


def test_zeros_say_what_they_save_and_what_not(prune: Callable[..., tuple[int, str, str]]) -> None:
    code, said, _ = prune("--sparsity", "0.8", "--epochs", "0")
    assert code == 0
    assert re.search(r"zeros 79\.\d\d% of the parameters, in 4 layers compressed \S+ KiB, before \S+ KiB", said)
    assert "saves a compressed file, nothing else: zeros are stored and computed with like any other number" in said


def test_pattern_says_what_it_saves_and_who_has_none(prune: Callable[..., tuple[int, str, str]]) -> None:
    code, said, _ = prune("--pattern", "2:4", "--epochs", "0")
    assert code == 0
    assert "left dense conv1" in said
    assert "saves time in TensorRT from sm80 on where the pattern is 2:4, and a compressed file; nothing else" in said


def test_json_has_all_of_it(
    capsys: pytest.CaptureFixture[str], prune: Callable[..., tuple[int, str, str]], dense: Path, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["prune", str(dense), *HERE, "--json", "-o", str(tmp_path / "out.safetensors")])
    answer = json.loads(capsys.readouterr().out)
    assert answer["pruned"]["note"]["ratios"] == [0.5]
    assert answer["pruned"]["parts"][0]["before"] == {"outputs": 16, "parameters": 160, "macs": 112896}
    assert answer["metrics"]["macs"] == answer["pruned"]["parts"][-1]["after"]["macs"]


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--ratio", "0.5", "--target-macs", "0.5"), 2, "--ratio and --target-macs say how much goes, one of them is"),
        (("--sparsity", "0.5", "--pattern", "2:4"), 2, "--sparsity and --pattern say how much goes"),
        (("--target-params", "many"), 2, "'many' is neither a share nor a number; hint: 0.5, 300k, 1.2M or 2G"),
        (("--target-memory", "big"), 2, "'big' is not a size"),
        (("--pattern", "2/4"), 2, "'2/4' is no pattern; hint: --pattern 2:4"),
        (("--protect", "fc9", *HERE), 2, "no layer is called 'fc9'; hint: --protect conv1"),
        (("--steps", "3", "--epochs", "2"), 2, "2 epochs of fine-tuning cannot be divided between 3 steps"),
        (("--way", "graph"), 2, "ways of pruning are ['graph']; hint: channels, channels-here, hidden"),
        (("--analysis-memory", "1MiB"), 2, "1.00 MiB are too little for torch alone; hint: --analysis-memory 4GiB"),
        (("--target-params", "50", *HERE), 1, "the target is 50 parameters; the least that can be reached is 90 param"),
        (
            ("--target-memory", "9KiB", *HERE), 1,
            "the target is 9.00 KiB of planned memory at batch 1; the least that can be reached is ",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line_and_leaves_nothing(
    prune: Callable[..., tuple[int, str, str]], tmp_path: Path, options: tuple[str, ...], code: int, said: str
) -> None:
    answered, _, err = prune(*options)
    lines = [line for line in err.splitlines() if line.startswith("memopt-export: error:")]
    assert (answered, len(lines)) == (code, 1)
    assert said in lines[0]
    assert list(tmp_path.iterdir()) == []
