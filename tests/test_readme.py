"""What the README tells people to type works, in the order in which it stands there."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from memopt_export.cli import cli, main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SH, PYTHON = (re.findall(rf"^```{kind}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL) for kind in ("sh", "python"))
COMMANDS = [line for block in SH for line in block.splitlines() if line]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands run, with a picture of a seven."""
    from PIL import Image
    from sklearn.datasets import load_digits

    path = tmp_path_factory.mktemp("readme")
    (path / "words.txt").write_text("secret words")
    Image.fromarray((load_digits().images[7] * 255 / 16).astype(np.uint8)).save(path / "seven.png")
    return path


@pytest.fixture(scope="module")
def typed(folder: Path) -> dict[str, str]:
    """Every command with what it printed; epochs are cut to two and threads to one, for time."""
    printed = {}
    with contextlib.chdir(folder):
        for line in COMMANDS:
            words = shlex.split(re.sub(r"--epochs \d+", "--epochs 2 --threads 1", line), comments=True)
            code, out, err = _alone(words) if re.search("--(memory-limit|max-memory) ", line) else _here(words)
            assert not code, f"{line}\n{err}"
            printed[line] = out
    return printed


def _here(words: list[str]) -> tuple[object, str, str]:
    """Exit code, stdout and stderr of a command in this process, which saves starting one."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
        main(words[1:])
    return ended.value.code, out.getvalue(), err.getvalue()


def _alone(words: list[str]) -> tuple[object, str, str]:
    """The same in a process of its own: a limit of memory counts all that a process holds, and this one runs tests."""
    command = [sys.executable, "-m", "memopt_export", *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def test_every_command_of_the_readme_runs(typed: dict[str, str], folder: Path) -> None:
    said = {" ".join(shlex.split(line, comments=True)[1:3]): text for line, text in typed.items()}
    assert "golden outputs hold" in said["verify digits.mopt"]
    assert "signature holds" in said["verify signed.mopt"]
    assert said["run digits.mopt"].startswith("seven.png")
    assert (folder / "digits.mopt").is_file()


def test_the_readme_shows_every_command_but_the_pipeline_that_make_runs() -> None:
    shown = {shlex.split(line, comments=True)[1] for line in COMMANDS}
    assert shown == set(cli.commands) - {"pipeline"}


@pytest.mark.usefixtures("typed")
def test_the_embedding_examples_run(folder: Path) -> None:
    example = "\n".join(PYTHON)
    prologue = "import numpy as np\nx = np.zeros((3, 1, 28, 28), np.float32)\n"
    epilogue = "\nprint(logits.shape, len(best[0]), fit.batch, sorted(bill.phases))"
    command = [sys.executable, "-c", prologue + example + epilogue]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("(3, 10) 3 ")


def test_every_file_that_the_readme_links_exists() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert "://" in target or (ROOT / target).exists(), target


def test_shell_completion_is_as_documented() -> None:
    program = Path(sys.executable).with_name("memopt-export")
    environment = os.environ | {"_MEMOPT_EXPORT_COMPLETE": "bash_source"}
    done = subprocess.run([program], env=environment, capture_output=True, text=True, check=False)
    assert "_memopt_export_completion" in done.stdout
