"""The bill's readings, against amounts that a fresh process has allocated by hand."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Callable

import pytest

from memopt import memory
from memopt.memory import Bill, DeviceMemory, HostMemory, PeakMeter, read_host_memory

MIB = 2**20
PAGE = 4096

# Runs in a fresh process: takes and gives back known amounts, and prints what the bill finds after each.
KNOWN = """
import json, mmap, os, sys, tempfile
from memopt import memory
from memopt.memory import PeakMeter, read_host_memory

MIB, PAGE = 2**20, 4096
if sys.argv[1] in ("status", "psutil"): memory._READERS = (getattr(memory, "_by_" + sys.argv[1]),)
if sys.argv[2] == "sampled": memory._CLEAR_REFS = memory.Path("/nonexistent/file")

def touch(mapped, size):
    for i in range(0, size, PAGE): mapped[i:i + 1] = b"x"

def anonymous(size):
    mapped = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"): mapped.madvise(mmap.MADV_NOHUGEPAGE)  # else one touch takes 2 MiB
    return mapped

def file_of(size):
    file = tempfile.TemporaryFile(dir=sys.argv[3])
    for _ in range(size // MIB): file.write(os.urandom(MIB))
    file.flush()
    return file

found, one, two, shm = {}, file_of(24 * MIB), file_of(16 * MIB), file_of(12 * MIB)
with PeakMeter() as peak:
    before = read_host_memory()
    peak.restart()
    def note(name):
        now = read_host_memory().above(before)
        peak_bytes = peak.read() - before.resident_bytes
        found[name] = [now.private_bytes, now.file_backed_bytes, now.proportional_bytes, peak_bytes]
    held = anonymous(40 * MIB); touch(held, 40 * MIB); note("anonymous, touched")
    idle = anonymous(64 * MIB); note("anonymous, untouched")
    mapped = mmap.mmap(one.fileno(), 0, prot=mmap.PROT_READ); note("mapped, untouched")
    sum(mapped[i] for i in range(0, 24 * MIB, PAGE)); note("mapped, touched")
    copied = mmap.mmap(two.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    touch(copied, 16 * MIB); note("mapped, written to its own copy")
    held.close(); note("freed")
    mapped.close(); copied.close(); note("all freed")
    peak.restart(); note("peak restarted")
    method = peak.method
print(json.dumps(dict(found=found, methods=[read_host_memory().method, method])))
"""

STEPS = {  # step -> private and file-backed MiB above the start
    "anonymous, touched": (40, 0),
    "anonymous, untouched": (40, 0),
    "mapped, untouched": (40, 0),
    "mapped, touched": (40, 24),
    "mapped, written to its own copy": (56, 24),
    "freed": (16, 24),
    "all freed": (0, 0),
}

needs_proc = pytest.mark.skipif(
    read_host_memory().private_bytes is None, reason="this system has no /proc/self/smaps_rollup"
)


Found = tuple[dict[str, list[int | None]], list[str]]


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Found]:
    folder = tmp_path_factory.mktemp("known")

    def run(reader: str, peak: str) -> Found:
        command = [sys.executable, "-c", KNOWN, reader, peak, str(folder)]
        child = subprocess.run(command, capture_output=True, text=True, check=False)
        assert child.returncode == 0, child.stderr
        answer = json.loads(child.stdout)
        return answer["found"], answer["methods"]

    return run


@needs_proc
def test_known_amounts_are_found_within_a_mebibyte(known: Callable[[str, str], Found]) -> None:
    found, methods = known("rollup", "kernel")
    for step, (private, mapped) in STEPS.items():
        assert found[step][:2] == [pytest.approx(private * MIB, abs=MIB), pytest.approx(mapped * MIB, abs=MIB)], step
        assert found[step][2] == pytest.approx((private + mapped) * MIB, abs=MIB), step  # nobody else maps them
    assert found["all freed"][3] == pytest.approx(80 * MIB, abs=2 * MIB)  # the highest that was: 56 and 24
    assert found["peak restarted"][3] == pytest.approx(0, abs=2 * MIB)
    assert methods[0].startswith("smaps_rollup (Anonymous")
    assert methods[1] == "VmHWM, reset through clear_refs"


@needs_proc
def test_where_the_peak_cannot_be_reset_samples_find_it(known: Callable[[str, str], Found]) -> None:
    found, methods = known("status", "sampled")
    for step, (private, mapped) in STEPS.items():
        assert found[step][:2] == [pytest.approx(private * MIB, abs=MIB), pytest.approx(mapped * MIB, abs=MIB)], step
        assert found[step][2] is None
    assert found["all freed"][3] == pytest.approx(80 * MIB, abs=2 * MIB)
    assert found["peak restarted"][3] == pytest.approx(0, abs=2 * MIB)
    assert "PSS unknown" in methods[0]
    assert methods[1] == "RSS sampled every 1 ms"


@needs_proc
def test_psutil_finds_the_sum_and_says_what_it_cannot_tell(known: Callable[[str, str], Found]) -> None:
    found, methods = known("psutil", "kernel")
    for step, (private, mapped) in STEPS.items():
        assert sum(filter(None, found[step][:2])) == pytest.approx((private + mapped) * MIB, abs=2 * MIB), step
    assert found["mapped, touched"][0] == pytest.approx(64 * MIB, abs=2 * MIB)  # nobody else maps it: private to USS
    assert "cannot tell mapped pages that nobody else maps from private ones" in methods[0]


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
    for name in ("_ROLLUP", "STATUS", "_STATM", "_CLEAR_REFS"):
        monkeypatch.setattr(memory, name, memory.Path("/nonexistent/file"))
    monkeypatch.setitem(sys.modules, "psutil", None)
    unknown = read_host_memory()
    assert unknown.private_bytes is None
    assert unknown.method.startswith("unknown")
    assert "pip install 'memopt[measure]'" in unknown.method
    assert unknown.above(HostMemory(1, 1, 1, 1, "by hand")).private_bytes is None
    assert unknown.resident_bytes is None
    with PeakMeter() as peak:
        peak.restart()
        assert peak.read() is None


def host(private: int | None, peak: int | None) -> HostMemory:
    return HostMemory(private, 0, private, peak, "by hand")


def test_the_peak_of_a_bill_is_the_highest_of_its_phases_and_unknown_with_one() -> None:
    phases = {"start": host(9, 900), "import": host(90, 900), "load": host(5, 70), "steady": host(7, 30)}
    assert Bill(phases).peak_bytes == 70
    assert Bill({**phases, "first run": host(6, None)}).peak_bytes is None
    assert Bill({}).peak_bytes is None


def test_the_library_is_told_apart_from_the_model() -> None:
    library = Bill({"start": host(9, 9), "import": host(90, 95)}).library
    assert library is not None
    assert library.private_bytes == 81
    assert Bill({"import": host(90, 95)}).library is None


def test_the_best_account_of_a_device_is_the_most_exact_that_is_known() -> None:
    methods = {"process_bytes": "NVML", "used_bytes": "cuMemGetInfo", "allocator_bytes": "torch"}
    assert DeviceMemory(3, 2, 1, methods).best == (3, "NVML")
    assert DeviceMemory(None, 2, 1, methods).best == (2, "cuMemGetInfo")
    assert DeviceMemory(None, None, 1, methods).best == (1, "torch")
    assert DeviceMemory().best == (None, "unknown")
    above = DeviceMemory(30, None, 1, methods).above(DeviceMemory(10, 5, None, methods))
    assert (above.process_bytes, above.used_bytes, above.allocator_bytes) == (20, None, 1)
