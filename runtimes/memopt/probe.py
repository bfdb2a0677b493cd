"""One artifact in one fresh process: its memory bill, its latency, its outputs.

`measure` starts a fresh Python, which imports the runtime, takes the baseline, opens the artifact, runs it, watches
whether it grows, and only after all memory is read computes the outputs for the samples: nothing but the artifact's
cost is in the bill.
"""

from __future__ import annotations

import itertools
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from memopt import errors
from memopt.artifact import Artifact, open_artifact
from memopt.bundle import open_bundle
from memopt.errors import BackendError, InputRefused, MemoptError, OutOfResource
from memopt.memory import (
    AFTER_TRIM,
    FIRST_RUN,
    IMPORT,
    LOAD,
    START,
    STEADY,
    AllocatorUse,
    Bill,
    DeviceMemory,
    HostMemory,
    PeakMeter,
    give_back,
    read_host_memory,
)
from memopt.ort_allocator import allocator_use
from memopt.runtimes import RUNTIMES
from memopt.session import Session
from memopt.strict_json import from_json, to_json
from memopt.tensors import Array

WARMUP_RUNS = 3
SOAK_BLOCKS, LEAST_SOAK_RUNS = 7, 56  # of a soak, in which memory is read after each block
LEAST_GROWTH_BYTES = 2**18  # over all of a soak; less comes and goes in any process, however many runs it stands for
# `python -m` and `python -c` put the current folder first on sys.path, where a user's statistics.py would be imported.
_CHILD = "import sys; sys.path = [p for p in sys.path if p]; from memopt.probe import main; sys.exit(main())"


@dataclass(frozen=True)
class Request:
    """What to measure. `inputs` maps input names to .npy files with samples along the first axis."""

    path: str
    runtime: str
    device: str
    batch: int
    inputs: dict[str, str]
    variant: str | None = None
    threads: int = 0
    runs: int = 50
    seconds: float = 2.0  # timing ends after this long, with at least five runs
    soak_runs: int = 0  # watched for growth; fewer, or none, where they would take longer than twice `seconds`
    soak_always: bool = False  # however long they take
    allocator: bool = False  # whether the runtime's own allocator is asked, for which it is opened once more
    outputs: str | None = None  # folder for the outputs for all samples, as 0.npy, 1.npy, ...


@dataclass(frozen=True)
class Measurement:
    """What one process found. `leak_bytes_per_1000_runs` is None where too few runs were watched, see `growth`."""

    bill: Bill
    placement: str
    load_ms: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    runs: int
    leak_bytes_per_1000_runs: int | None = None
    soak_runs: int = 0


@dataclass(frozen=True)
class _Failure:
    kind: str
    problem: str
    hint: str | None = None


def measure(request: Request, *, timeout_s: float = 300.0) -> Measurement:
    """Runs the request in a fresh process.

    Raises:
        MemoptError: whatever the child refused, of the same class.
        BackendError: the child crashed.
        OutOfResource: it took too long, or the kernel killed it.
    """
    try:
        child = subprocess.run(
            [sys.executable, "-c", _CHILD],
            input=to_json(request).encode(),
            capture_output=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise OutOfResource(f"{request.runtime} took longer than {timeout_s:g} s") from error
    if child.returncode == 0:
        return from_json(Measurement, child.stdout, where="the probe's answer")
    raise _failure(request, child)


def open_any(path: Path, variant: str | None) -> Artifact:
    """The artifact at `path`: a model file, or the named variant of a bundle."""
    return open_bundle(path, verify="off").artifact(variant) if variant is not None else open_artifact(path)


def main() -> int:
    """Reads a Request from stdin, writes a Measurement, or a failure with its exit code, to stdout.

    Nothing else is written there: what libraries print goes to stderr.
    """
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        answer: object = _measure_here(from_json(Request, sys.stdin.buffer.read(), where="request"))
        code = 0
    except MemoptError as error:
        answer = _Failure(type(error).__name__, error.problem, error.hint)
        code = error.exit_code
    except MemoryError:
        answer = _Failure("OutOfResource", "the process ran out of memory")
        code = OutOfResource.exit_code
    with os.fdopen(stdout, "w") as file:
        file.write(to_json(answer))
    return code


def growth(private: Sequence[int | None], runs: int) -> int | None:
    """Private memory that 1,000 runs add, from readings before the first and after each of equal blocks of `runs` runs.

    It is the median of what the blocks add: a buffer that grows once, or twice, is no leak, and what grows in most
    blocks is. Where all blocks together would add less than LEAST_GROWTH_BYTES, it is 0. None where a reading is
    unknown.

    >>> growth([0, 10**6, 2 * 10**6, 3 * 10**6], 50), growth([0, 10**6, 10**6, 10**6], 50)
    (20000000, 0)
    """
    known = [value for value in private if value is not None]
    if len(known) < len(private) or len(known) < 2:
        return None
    added = statistics.median(after - before for before, after in itertools.pairwise(known))
    return round(1000 / runs * added) if abs(added) * (len(known) - 1) >= LEAST_GROWTH_BYTES else 0


def _measure_here(request: Request) -> Measurement:
    runtime = RUNTIMES[request.runtime]
    samples = {name: np.load(path, mmap_mode="r") for name, path in request.inputs.items()}
    feeds = {name: _first(array, request.batch) for name, array in samples.items()}
    artifact = open_any(Path(request.path), request.variant)
    with PeakMeter() as peak:
        account = _Account(request.device, peak)
        account.start()
        runtime.load_library()
        account.start_model()
        started = time.perf_counter()
        session = runtime.open(artifact, device=request.device, threads=request.threads)
        load_ms = (time.perf_counter() - started) * 1e3
        account.enter(LOAD, session)
        session.run(feeds)
        account.enter(FIRST_RUN, session)
        times = _time(session, feeds, request)
        account.enter(STEADY, session)
        leak, soak_runs = _soak(session, feeds, request, run_ms=statistics.median(times))
        session.trim()
        give_back()
        account.enter(AFTER_TRIM, session)
    if request.outputs is not None:
        _write_outputs(session, samples, request)
    session.close()
    allocator = _allocator_use(request, artifact, feeds) if request.allocator else None
    p50, p95, p99 = (float(np.percentile(times, share)) for share in (50, 95, 99))
    bill = Bill(account.phases, account.device, allocator)
    return Measurement(bill, session.placement, load_ms, p50, p95, p99, len(times), leak, soak_runs)


class _Account:
    """Reads the bill, phase by phase, each with the peak since the last."""

    def __init__(self, device: str, peak: PeakMeter) -> None:
        self.phases: dict[str, HostMemory] = {}
        self.device: dict[str, DeviceMemory] = {}
        self._on_device = device == "cuda"
        self._peak = peak

    def start(self) -> None:
        """The process before the runtime's import."""
        give_back()
        self.phases[START] = self._read()

    def start_model(self) -> None:
        """The process with the library, and on a GPU with a context: the baseline of all that follows."""
        if self._on_device:
            self.device[IMPORT] = self._read_device(None)
        give_back()
        self.phases[IMPORT] = self._read()

    def enter(self, phase: str, session: Session) -> None:
        """What has come since the baseline, at the end of this phase."""
        self.phases[phase] = self._read().above(self.phases[IMPORT])
        if self._on_device:
            self.device[phase] = self._read_device(session).above(self.device[IMPORT])

    def _read(self) -> HostMemory:
        """Now, with the peak since the last reading. What the reading itself takes is in neither."""
        peak_bytes = self._peak.read()
        memory = read_host_memory()
        memory = replace(memory, peak_bytes=peak_bytes, method=f"{memory.method}; peak: {self._peak.method}")
        self._peak.restart()
        return memory

    def _read_device(self, session: Session | None) -> DeviceMemory:
        from memopt.cuda_driver import open_driver
        from memopt.device_memory import read_device_memory

        return read_device_memory(open_driver(), session)


def _first(samples: Array, batch: int) -> Array:
    """The first `batch` samples, repeated when there are fewer; a copy, so that no file page is counted later."""
    if not len(samples):
        raise InputRefused("there are no samples to run")
    return np.ascontiguousarray(samples[np.arange(batch) % len(samples)])


def _time(session: Session, feeds: Mapping[str, Array], request: Request) -> list[float]:
    """Milliseconds of each run, after a warm-up."""
    for _ in range(WARMUP_RUNS):
        session.run(feeds)
    times: list[float] = []
    end = time.perf_counter() + request.seconds
    while len(times) < request.runs and (len(times) < 5 or time.perf_counter() < end):
        started = time.perf_counter()
        session.run(feeds)
        times.append((time.perf_counter() - started) * 1e3)
    return times


def _soak(session: Session, feeds: Mapping[str, Array], request: Request, *, run_ms: float) -> tuple[int | None, int]:
    """`growth` over as many more runs as there is time for, and how many they were; None where they are too few."""
    in_time = int(2 * request.seconds * 1e3 / max(run_ms, 1e-3))
    runs = request.soak_runs if request.soak_always else min(request.soak_runs, in_time)
    block = runs // SOAK_BLOCKS
    if block * SOAK_BLOCKS < LEAST_SOAK_RUNS:
        return None, 0
    private = [read_host_memory().private_bytes]
    for _ in range(SOAK_BLOCKS):
        for _ in range(block):
            session.run(feeds)
        private.append(read_host_memory().private_bytes)
    return growth(private, block), block * SOAK_BLOCKS


def _allocator_use(request: Request, artifact: Artifact, feeds: Mapping[str, Array]) -> AllocatorUse | None:
    """The runtime's own account of a run, after all else was read; None where it has none."""
    ask = _ALLOCATORS.get(request.runtime)
    return ask(artifact, feeds, device=request.device, threads=request.threads) if ask is not None else None


# Runtimes whose allocators can be asked what they hold on the host as well.
_ALLOCATORS = {"onnxruntime": allocator_use}


def _write_outputs(session: Session, samples: Mapping[str, Array], request: Request) -> None:
    """Every output for all samples, as .npy; none that has no row for each sample, as a detector's may not."""
    pieces: dict[int, list[Array]] = {}
    total = len(next(iter(samples.values())))
    for start in range(0, total, request.batch):
        have = min(request.batch, total - start)
        # A short last batch is filled up, because an engine's profile may not take it.
        full = {name: _first(array[start : start + request.batch], request.batch) for name, array in samples.items()}
        for i, output in enumerate(session.run(full)):
            if output.ndim and len(output) == request.batch:
                pieces.setdefault(i, []).append(output[:have])
    for i, rows in pieces.items():
        if sum(map(len, rows)) == total and len({piece.shape[1:] for piece in rows}) == 1:
            np.save(Path(str(request.outputs)) / f"{i}.npy", np.concatenate(rows))


def _failure(request: Request, child: subprocess.CompletedProcess[bytes]) -> MemoptError:
    if child.returncode < 0:
        name = signal.Signals(-child.returncode).name
        kind = OutOfResource if name == "SIGKILL" else BackendError
        return kind(f"{request.runtime} was killed by {name} while it ran {request.variant or request.path}")
    try:
        failure = from_json(_Failure, child.stdout, where="the probe's answer")
    except errors.IntegrityError:
        last = child.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
        return BackendError(f"{request.runtime} failed in {request.variant or request.path}: {last[0]}")
    return errors.by_name().get(failure.kind, BackendError)(failure.problem, hint=failure.hint)
