"""Every run of the tests fuzzes a little; `make fuzz` does so for as long as it is told."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parent / "fuzz" / "fuzz.py"


def test_a_thousand_cases_of_each_target_neither_crash_nor_are_wrongly_accepted(tmp_path: Path) -> None:
    words = [sys.executable, FUZZ, "--cases", "1000", "--seed", "1"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["bundle", "graph"]
    for line in lines:
        assert ": 1000 cases " in line
        assert line.endswith("; 0 crashes, 0 wrong acceptances")
    accepted, refused = (int(re.search(rf"{what} (\d+)", lines[0])[1]) for what in ("accepted", "refused with 4"))
    assert min(accepted, refused) > 20  # the judge has something to judge


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("archive._read_head = None", "TypeError"),
        ("bundle.Bundle.verify = lambda self, file: None", "a digest is not that of the bytes"),
        ("bundle._check_entries = lambda entries, files: None", "the manifest lists other files|KeyError"),
        ("bundle._signed_by = lambda entries, keys: keys[0].key_id", "nobody signed this manifest"),
    ],
)
def test_the_fuzzer_finds_a_reader_that_was_broken(tmp_path: Path, broken: str, said: str) -> None:
    program = f"""
import runpy, sys
from memopt import archive, bundle
{broken}
sys.path.insert(0, {str(FUZZ.parent)!r})
sys.argv = ["fuzz.py", "--cases", "400"]
runpy.run_path({str(FUZZ)!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert re.search(said, done.stderr)
