"""Children of the same Python, and work beside."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from memopt.child import beside, command, main_of


def test_a_child_finds_modules_where_this_process_does_and_not_in_its_folder(tmp_path: Path) -> None:
    (tmp_path / "statistics.py").write_text("raise SystemExit('a file of the user')")
    code = "import sys; sys.path = sys.argv[1:]; import memopt, statistics; print(statistics.mean([1, 3]))"
    done = subprocess.run(command(code), cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("2\n", "")


def test_a_child_runs_the_main_of_a_module() -> None:
    assert main_of("pkg.mod").endswith("from pkg.mod import main; sys.exit(main())")


def test_work_beside_gives_what_it_returns_or_raises() -> None:
    assert beside(lambda: 7, name="seven").result(timeout=10) == 7

    def fail() -> int:
        raise KeyError("no")

    assert isinstance(beside(fail, name="fails").exception(timeout=10), KeyError)
    with pytest.raises(KeyError):
        beside(fail, name="fails").result(timeout=10)
