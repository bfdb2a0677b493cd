"""One artifact in one fresh process: its memory bill, its latency, its outputs.

`measure` starts a fresh Python, which imports the runtime, takes the baseline, opens the artifact, runs it, and only
after all memory is read computes the outputs for the samples: nothing but the artifact's cost is in the bill.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from memopt import errors
from memopt.artifact import Artifact, open_artifact
from memopt.bundle import open_bundle
from memopt.errors import BackendError, InputRefused, MemoptError, OutOfResource
from memopt.memory import Bill, DeviceMemory, HostMemory, give_back, read_host_memory, reset_peak
from memopt.runtimes import RUNTIMES
from memopt.session import Session
from memopt.strict_json import from_json, to_json
from memopt.tensors import Array

WARMUP_RUNS = 3
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
    outputs: str | None = None  # where the first output for all samples goes, as .npy


@dataclass(frozen=True)
class Measurement:
    """What one process found."""

    bill: Bill
    placement: str
    load_ms: float
    p50_ms: float
    p95_ms: float
    runs: int


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


def _measure_here(request: Request) -> Measurement:
    runtime = RUNTIMES[request.runtime]
    samples = {name: np.load(path, mmap_mode="r") for name, path in request.inputs.items()}
    feeds = {name: _first(array, request.batch) for name, array in samples.items()}
    artifact = open_any(Path(request.path), request.variant)
    runtime.load_library()
    device_before = _device_used(request.device)
    give_back()
    peak_is_new = reset_peak()
    baseline = read_host_memory()
    started = time.perf_counter()
    session = runtime.open(artifact, device=request.device, threads=request.threads)
    load_ms = (time.perf_counter() - started) * 1e3
    phases = {"import": baseline, "load": _above(baseline, peak_is_new=peak_is_new)}
    session.run(feeds)
    phases["first run"] = _above(baseline, peak_is_new=peak_is_new)
    times = _time(session, feeds, request)
    phases["steady"] = _above(baseline, peak_is_new=peak_is_new)
    bill = Bill(phases, _device_memory(request.device, device_before))
    if request.outputs is not None:
        _write_outputs(session, samples, request)
    session.close()
    p95 = statistics.quantiles(times, n=20, method="inclusive")[-1]
    return Measurement(bill, session.placement, load_ms, statistics.median(times), p95, len(times))


def _above(baseline: HostMemory, *, peak_is_new: bool) -> HostMemory:
    """What has come since the baseline; the peak is unknown where it may be that of the import before it."""
    memory = read_host_memory().above(baseline)
    return memory if peak_is_new else replace(memory, peak_bytes=None)


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


def _write_outputs(session: Session, samples: Mapping[str, Array], request: Request) -> None:
    """The first output for all samples, as .npy; nothing where it has no row for each sample, as a detector's."""
    pieces = []
    total = len(next(iter(samples.values())))
    for start in range(0, total, request.batch):
        have = min(request.batch, total - start)
        # A short last batch is filled up, because an engine's profile may not take it.
        full = {name: _first(array[start : start + request.batch], request.batch) for name, array in samples.items()}
        output = session.run(full)[0]
        if output.ndim == 0 or len(output) != request.batch:
            return
        pieces.append(output[:have])
    if len({piece.shape[1:] for piece in pieces}) == 1:
        np.save(str(request.outputs), np.concatenate(pieces))


def _device_used(device: str) -> int | None:
    if device != "cuda":
        return None
    from memopt.cuda_driver import open_driver

    free, total = open_driver().mem_info()
    return total - free


def _device_memory(device: str, before: int | None) -> DeviceMemory:
    after = _device_used(device)
    if after is None or before is None:
        return DeviceMemory()
    return DeviceMemory(used_bytes=after - before, method="cuMemGetInfo, after minus before")


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
    kinds = {
        name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, MemoptError)
    }
    return kinds.get(failure.kind, BackendError)(failure.problem, hint=failure.hint)
