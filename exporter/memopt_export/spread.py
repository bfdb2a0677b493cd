"""A command in several processes of this machine: they are started, watched, and what ends one of them ends all.

What they do together is in `memopt_models.team`. Each is the same command line again, and learns its place from the
environment, in which `torchrun` puts it as well.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from memopt.errors import BackendError, MemoptError, OutOfResource, UsageError, by_name
from memopt.strict_json import from_json, to_json
from memopt_models.team import Lost, Team, joined

FOLDER = "MEMOPT_TEAM"  # in the environment of a process that was started here: where all of them meet
_LOOK_S = 0.05
_GO_ON = "the same command goes on after the last epoch"


def run(arguments: Sequence[str], *, size: int) -> None:
    """Runs this command line in `size` processes; the first one has this one's stdout and stderr.

    Raises:
        MemoptError: what the first of them that failed has raised.
        OutOfResource: one was killed. BackendError: one crashed. The others are killed too, so that none waits for it.
    """
    with tempfile.TemporaryDirectory(prefix="memopt-team-") as name:
        folder = Path(name)
        members = [_start(arguments, Team(rank, size), folder) for rank in range(size)]
        try:
            while not any(member.poll() for member in members) and any(member.poll() is None for member in members):
                time.sleep(_LOOK_S)
        finally:
            codes = [member.poll() for member in members]
            for member in members:
                with member:  # waits for its end, and closes its pipe
                    member.kill()
        failed = {rank: code for rank, code in enumerate(codes) if code}
        if failed:
            _raise(failed, size, folder)


@contextmanager
def membership(environment: Mapping[str, str], *, asked: int, parallel: str) -> Iterator[Team]:
    """The team that this process belongs to, by its environment; a team of one where that says nothing.

    Args:
        environment: of the process: RANK, WORLD_SIZE and LOCAL_RANK, by torchrun or by `run`.
        asked: so many processes were asked for.
        parallel: see Team.

    Raises:
        UsageError: the environment says something else, or nothing that makes sense.
    """
    folder = environment.get(FOLDER)
    place = _place(environment)
    if place is None:
        yield Team(parallel=parallel)
        return
    rank, size, local = place
    if folder is None and asked not in (1, size):
        raise UsageError(
            f"--nproc {asked} among the {size} processes that torchrun has started", hint="without --nproc"
        )
    team = Team(rank, size, parallel)
    if folder is None:
        with joined(team, meeting="env://", gpu=local):
            yield team
        return
    _end_with_parent()
    try:
        with joined(team, meeting=f"file://{folder}/meeting", gpu=local):
            yield team
    except MemoptError as error:
        failure = _Failure(type(error).__name__, error.problem, error.hint)
        _answer(Path(folder), rank).write_text(to_json(failure))
        raise SystemExit(error.exit_code) from error


@dataclass(frozen=True)
class _Failure:
    """The error with which a process ended."""

    kind: str
    problem: str
    hint: str | None


def _start(arguments: Sequence[str], team: Team, folder: Path) -> subprocess.Popen[bytes]:
    """A process in a session of its own, so that Ctrl-C reaches the watching one alone."""
    place = {"RANK": str(team.rank), "LOCAL_RANK": str(team.rank), "WORLD_SIZE": str(team.size), FOLDER: str(folder)}
    threads = max(1, len(os.sched_getaffinity(0)) // team.size)
    defaults = {"OMP_NUM_THREADS": str(threads), "GLOO_SOCKET_IFNAME": "lo"}  # all of them are here
    with _errors(folder, team.rank).open("wb") as errors:
        return subprocess.Popen(
            [sys.executable, "-m", "memopt_export", *arguments],
            env={**defaults, **os.environ, **place},
            stdin=subprocess.PIPE,  # which is never written to: it ends when this process does
            stdout=None if team.is_first else subprocess.DEVNULL,
            stderr=None if team.is_first else errors,
            start_new_session=True,
        )


def _raise(failed: Mapping[int, int], size: int, folder: Path) -> NoReturn:
    """Raises what the first process that failed by itself has raised; one that has lost another one did not."""
    failures = {rank: _read(folder, rank) for rank in failed}
    rank = next((rank for rank, failure in failures.items() if failure is None or failure.kind != Lost.__name__), None)
    if rank is None:
        rank = min(failed)
    code, failure, who = failed[rank], failures[rank], f"process {rank} of {size}"
    if code == -signal.SIGKILL:
        raise OutOfResource(f"{who} was killed by SIGKILL, as the system does where memory is short", hint=_GO_ON)
    if code < 0:
        raise BackendError(f"{who} was killed by {signal.Signals(-code).name}", hint=_GO_ON)
    if failure is not None:
        raise by_name().get(failure.kind, BackendError)(failure.problem, hint=failure.hint)
    if rank > 0:
        sys.stderr.write(_errors(folder, rank).read_text(errors="replace"))
    raise SystemExit(code)  # it has told by itself


def _place(environment: Mapping[str, str]) -> tuple[int, int, int] | None:
    """Rank, size and number on this machine; None outside of a team."""
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return None
    try:
        rank, size, local = (int(environment.get(name, "0")) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    except ValueError as error:
        raise UsageError(f"RANK, WORLD_SIZE and LOCAL_RANK have to be numbers: {error}") from error
    return (rank, size, local) if size > 1 else None


def _end_with_parent() -> None:
    """Ends this process at once when the one that watches it is gone, whatever killed it."""

    def wait() -> None:
        while os.read(0, 1):
            pass
        os._exit(BackendError.exit_code)

    threading.Thread(target=wait, daemon=True).start()


def _answer(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.json"


def _errors(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.stderr"


def _read(folder: Path, rank: int) -> _Failure | None:
    path = _answer(folder, rank)
    return from_json(_Failure, path.read_bytes(), where=path.name) if path.is_file() else None
