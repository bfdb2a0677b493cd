from __future__ import annotations

import ctypes
import json
import subprocess
import sys

import pytest

from memopt import memory
from memopt.memory import HostMemory, read_host_memory

MIB = 2**20

# Runs in a fresh process: allocates known amounts and prints what the bill finds.
KNOWN = """
import json, mmap, tempfile
from memopt.memory import read_host_memory, reset_peak

MIB = 2**20
file = tempfile.TemporaryFile()
file.write(bytes(24 * MIB)); file.flush()
assert reset_peak()
before = read_host_memory()
held = bytearray(b"x") * (40 * MIB)
private = read_host_memory().above(before)
mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
untouched = read_host_memory().above(before)
sum(mapped[i] for i in range(0, 24 * MIB, 4096))
touched = read_host_memory().above(before)
del held
after = read_host_memory().above(before)
values = dict(private=private, untouched=untouched, touched=touched, after=after)
print(json.dumps({n: [v.private_bytes, v.file_backed_bytes, v.peak_bytes] for n, v in values.items()}))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, list[int]]:
    child = subprocess.run([sys.executable, "-c", KNOWN], capture_output=True, check=True)
    return json.loads(child.stdout)


@pytest.mark.skipif(read_host_memory().private_bytes is None, reason="this system has no /proc/self/smaps_rollup")
def test_known_amounts_are_found_within_a_mebibyte(found: dict[str, list[int]]) -> None:
    assert found["private"][0] == pytest.approx(40 * MIB, abs=MIB)
    assert found["private"][1] == pytest.approx(0, abs=MIB)
    assert found["untouched"][1] == pytest.approx(0, abs=MIB)
    assert found["touched"][0] == pytest.approx(40 * MIB, abs=MIB)
    assert found["touched"][1] == pytest.approx(24 * MIB, abs=MIB)


@pytest.mark.skipif(read_host_memory().private_bytes is None, reason="this system has no /proc/self/smaps_rollup")
def test_the_peak_outlives_what_was_freed(found: dict[str, list[int]]) -> None:
    assert found["after"][0] == pytest.approx(0, abs=MIB)
    assert found["after"][2] == pytest.approx(64 * MIB, abs=2 * MIB)


FREED = """
import sys
from memopt.memory import give_back, read_host_memory
freed = [bytes(2000) for _ in range(10_000)]  # 20 MB of heap, then holes
kept = freed[::100]
del freed
if sys.argv[1] == "yes": give_back()
before = read_host_memory()
held = [bytes(2000) for _ in range(9_000)]
print(read_host_memory().above(before).private_bytes)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="this libc has no malloc_trim")
def test_room_left_by_what_was_freed_hides_nothing_after_it_is_given_back() -> None:
    command = [sys.executable, "-c", FREED]
    hidden, found = (int(subprocess.check_output([*command, word])) for word in ("no", "yes"))
    assert hidden < 4 * MIB
    assert found > 14 * MIB


def test_what_cannot_be_read_is_unknown_and_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_ROLLUP", memory.Path("/nonexistent"))
    unknown = read_host_memory()
    assert unknown.private_bytes is None
    assert unknown.method.startswith("unknown")
    assert unknown.above(HostMemory(1, 1, 1, 1, "by hand")).private_bytes is None
    assert unknown.resident_bytes is None
