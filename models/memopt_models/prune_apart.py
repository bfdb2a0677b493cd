"""Channels taken out in a child process, with limits: the dependency graph of some networks takes gigabytes and hours.

    with cutter_apart(Limits()) as cut: state = cut(checkpoint, Cut(ratio=0.5), None)

The child gets checkpoints as files and answers with files; it serves until its standard input ends. Memory, time, a
crash or a kill become NotThisWay here, and nothing of it hurts the process that asked.
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from memopt import errors
from memopt.child import command as python_command
from memopt.child import main_of
from memopt.errors import BackendError, IntegrityError, MemoptError, UsageError, printable
from memopt.memory import limit_process
from memopt.sizes import show_size
from memopt.strict_json import from_json, to_json
from memopt_models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from memopt_models.ranking import Cut, NotThisWay

if TYPE_CHECKING:
    import torch

Cutter = Callable[[Checkpoint, Cut, "Mapping[str, torch.Tensor] | None"], "dict[str, torch.Tensor]"]

_MEMORY_PER_BYTE = 8  # beside Limits.memory_bytes, for each byte of the weights
_EXIT_S = 5.0  # in which a child that has closed its output has to end
_CHILD = main_of(__name__)


@dataclass(frozen=True)
class Limits:
    """What the child may take."""

    memory_bytes: int = 4 * 2**30  # private memory, torch's own included; more for large networks
    seconds: float = 300.0  # for one network

    def __post_init__(self) -> None:
        if self.memory_bytes < 2**30:
            raise UsageError(
                f"{show_size(self.memory_bytes)} are too little for torch alone", hint="--analysis-memory 4GiB"
            )
        if not 0 < self.seconds < math.inf:
            raise UsageError(f"the time is {self.seconds} s", hint="--analysis-seconds 300")


@dataclass(frozen=True)
class _Request:
    checkpoint: str
    network: str
    cut: Cut
    gradients: str | None
    output: str
    memory_bytes: int
    seconds: int


@dataclass(frozen=True)
class _Answer:
    error: str | None = None  # the name of an error's class
    problem: str = ""
    hint: str | None = None


@contextlib.contextmanager
def cutter_apart(limits: Limits, *, command: str = _CHILD) -> Iterator[Cutter]:
    """A function that takes channels out as `channels.cut_channels` does, in a child that lives as long as the context.

    Args:
        limits: of the child.
        command: what the child executes, in Python.

    Raises:
        BackendError: no child can be started.
    """
    with tempfile.TemporaryDirectory(prefix="memopt-prune-") as folder, (Path(folder) / "stderr").open("w+b") as stderr:
        arguments = python_command(command)
        pipe = subprocess.PIPE
        try:
            child = subprocess.Popen(arguments, stdin=pipe, stdout=pipe, stderr=stderr)
        except (OSError, TypeError) as error:  # TypeError: an interpreter in a program that does not know where it is
            raise BackendError(f"python cannot be started to prune: {errors.first_line(error)}") from error
        try:
            yield partial(_ask, child, stderr, Path(folder), limits)
        finally:
            child.kill()
            child.communicate()


def main() -> int:
    """The child: a line with a _Request on standard input, one with an _Answer on standard output, again and again."""
    import torch

    stdout = os.dup(1)
    os.dup2(2, 1)  # what libraries print
    limit_process(resource.RLIMIT_CORE, 0)
    os.nice(5)
    torch.set_num_threads(1)  # sums of one thread are the same on every machine of a kind
    with os.fdopen(stdout, "w") as answers:
        for line in sys.stdin.buffer:
            answers.write(_line(_serve(from_json(_Request, line, where="the request"))))
            answers.flush()
    return 0


def _ask(
    child: subprocess.Popen[bytes], stderr: IO[bytes], folder: Path, limits: Limits,
    checkpoint: Checkpoint, cut: Cut, gradients: Mapping[str, torch.Tensor] | None,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """The weights that the child makes of the checkpoint."""
    import safetensors.torch

    weights_bytes = sum(tensor.nbytes for tensor in checkpoint.state.values())
    memory_bytes = limits.memory_bytes + _MEMORY_PER_BYTE * weights_bytes
    path, output = folder / f"{checkpoint.sha256}.safetensors", folder / "cut.safetensors"
    if not path.exists():
        save_checkpoint(replace(checkpoint, lineage=()), path)  # whose weights may have been trained on meanwhile
    slopes = folder / "gradients.safetensors"
    if gradients is not None:
        safetensors.torch.save_file(dict(gradients), slopes)
    request = _Request(
        str(path), checkpoint.network, cut, None if gradients is None else str(slopes), str(output), memory_bytes,
        math.ceil(limits.seconds),
    )  # fmt: skip
    line, late = _exchange(child, _line(request), limits.seconds)
    if late:
        raise NotThisWay(f"the dependency graph was not done within {limits.seconds:g} s")
    try:
        answer = from_json(_Answer, line, where="the child's answer")
    except IntegrityError as error:
        raise NotThisWay(_how_it_ended(child, stderr, memory_bytes)) from error
    if answer.error == "MemoryError":
        raise NotThisWay(f"the dependency graph needs more than {show_size(memory_bytes)} of memory")
    if answer.error is not None:
        raise {**errors.by_name(), "NotThisWay": NotThisWay}[answer.error](answer.problem, hint=answer.hint)
    return safetensors.torch.load(output.read_bytes())


def _exchange(child: subprocess.Popen[bytes], request: str, seconds: float) -> tuple[bytes, bool]:
    """The line that answers the request, and whether its time was up, which ends the child; b"" where it has ended."""
    assert child.stdin is not None
    assert child.stdout is not None
    late = threading.Event()

    def stop() -> None:
        late.set()
        child.kill()

    timer = threading.Timer(seconds, stop)
    timer.start()
    try:
        with contextlib.suppress(BrokenPipeError):  # it has ended; why, is found when nothing can be read
            child.stdin.write(request.encode())
            child.stdin.flush()
        return child.stdout.readline(), late.is_set()
    finally:
        timer.cancel()


def _line(value: _Request | _Answer) -> str:
    """JSON in one line; a line break within a string is written as one of its escapes."""
    return to_json(value).replace("\n", "") + "\n"


def _how_it_ended(child: subprocess.Popen[bytes], stderr: IO[bytes], memory_bytes: int) -> str:
    try:
        code = child.wait(_EXIT_S)
    except subprocess.TimeoutExpired:
        return "what follows the dependency graph did not answer what it was asked"
    stderr.seek(0)
    last = printable((stderr.read().decode(errors="replace").strip().splitlines() or ["it left no message"])[-1])
    name = signal.Signals(-code).name if code < 0 else f"code {code}"
    if name == "SIGXCPU":
        return "the dependency graph took all the time it may have"
    if name == "SIGKILL" or "bad_alloc" in last or "MemoryError" in last:
        return f"the dependency graph needs more than {show_size(memory_bytes)} of memory, or than there is ({name})"
    return f"the dependency graph crashed with {name}: {last}"


def _serve(request: _Request) -> _Answer:
    import safetensors.torch

    from memopt_models.channels import cut_channels

    # Heap and private mappings, not the files that are mapped (getrlimit(2), RLIMIT_DATA since Linux 4.7). The time is
    # for the case that nobody is left who would end this process.
    limit_process(resource.RLIMIT_DATA, request.memory_bytes)
    limit_process(resource.RLIMIT_CPU, math.ceil(sum(os.times()[:2])) + request.seconds)
    try:
        checkpoint = load_checkpoint(Path(request.checkpoint), network=request.network)
        gradients: Any = None
        if request.gradients is not None:
            gradients = safetensors.torch.load_file(request.gradients)
        safetensors.torch.save_file(cut_channels(checkpoint, request.cut, gradients), request.output)
    except MemoptError as error:
        return _Answer(type(error).__name__, error.problem, error.hint)
    except MemoryError:
        return _Answer("MemoryError")
    except RuntimeError as error:
        if "allocate memory" not in str(error):
            raise
        return _Answer("MemoryError")
    return _Answer()
