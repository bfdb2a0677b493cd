"""What a training holds at its peak, measured in a fresh process: on Linux one that asks for too much is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from memopt import errors
from memopt.child import command, main_of
from memopt.errors import BackendError, IntegrityError, MemoptError, first_line
from memopt.memory import capped, settled_resident
from memopt.strict_json import from_json, to_json
from memopt_models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from memopt_models.dataset import DataSet, Split
from memopt_models.factories import load_factory
from memopt_models.networks import find_factory
from memopt_models.out_of_memory import means_out_of_memory, release_at_once
from memopt_models.train import Loss, Progress, TrainSettings, cross_entropy, fit_module

if TYPE_CHECKING:
    from torch import nn

STEPS = 2  # Adam's state comes at the end of the first step, and meets the activations in the second
TOO_FEW = "Expected more than 1 value per channel"  # torch's BatchNorm, when it gets one sample of 1x1 features


@dataclass(frozen=True)
class Subject:
    """What is trained, as a fresh process can make it again.

    `make` is `pkg.mod:function` of ours; it takes the first checkpoint, then the others and the arguments by name, and
    returns the module with its loss.
    """

    first: Checkpoint
    make: str = "memopt_models.training_probe:plain"
    others: Mapping[str, Checkpoint] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Peak:
    """What a training adds at its peak to what the process held before its module was made; None: not known."""

    host_bytes: int | None = None
    device_bytes: int | None = None  # as torch's allocator counts it


@dataclass(frozen=True)
class Refusal:
    """Why there is no peak."""

    why: str  # "too much" memory, or "too few" samples for the network's BatchNorm


@dataclass(frozen=True)
class _Request:
    checkpoints: dict[str, str]  # name -> path; the first is ""
    networks: dict[str, str]
    make: str
    arguments: dict[str, Any]
    how: TrainSettings
    cap_bytes: int | None


@dataclass(frozen=True)
class _Answer:
    peak: Peak | None = None
    refused: str | None = None
    error: str | None = None  # the class of ours
    problem: str = ""
    hint: str | None = None


def measure_peak(
    subject: Subject, how: TrainSettings, *, cap_bytes: int | None, timeout_s: float = 600.0
) -> Peak | Refusal:
    """The peak of two optimizer steps, each of at least two parts where the batch is cut, on pictures made up.

    Args:
        subject: what is trained.
        how: settled; of its batches only the size of a part counts.
        cap_bytes: what the child may have in all; None: whatever the machine gives.
        timeout_s: for the child as a whole.

    Raises:
        MemoptError: whatever the child refused, of the same class.
        BackendError: the child crashed.
    """
    parts = min(how.accumulate, 2)
    how = replace(
        how, epochs=1, batch_size=parts * how.micro_batch, accumulate=parts, shift=0, learning_rate=1e-6,
        max_memory_bytes=None, max_device_memory_bytes=None,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="memopt-probe-") as folder:
        checkpoints = {"": subject.first, **subject.others}
        paths = {name: str(Path(folder) / f"{i}.safetensors") for i, name in enumerate(checkpoints)}
        for name, checkpoint in checkpoints.items():
            save_checkpoint(replace(checkpoint, lineage=()), Path(paths[name]))
        networks = {name: checkpoint.network for name, checkpoint in checkpoints.items()}
        request = _Request(paths, networks, subject.make, dict(subject.arguments), how, cap_bytes)
        return _ask(request, timeout_s)


def plain(first: Checkpoint) -> tuple[nn.Module, Loss]:
    """The subject of plain training and fine-tuning."""
    return first.module(), cross_entropy


def main() -> int:
    """The child: a request on standard input, an answer on standard output; what libraries print goes to stderr."""
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        answer = _measure_here(from_json(_Request, sys.stdin.buffer.read(), where="request"))
    except MemoptError as error:
        answer = _Answer(error=type(error).__name__, problem=error.problem, hint=error.hint)
    with os.fdopen(stdout, "w") as file:
        file.write(to_json(answer))
    return 0


def _ask(request: _Request, timeout_s: float) -> Peak | Refusal:
    arguments = command(main_of(__name__))
    try:
        child = subprocess.run(
            arguments, input=to_json(request).encode(), capture_output=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise errors.OutOfResource(
            f"a probe of {request.how.micro_batch} samples took longer than {timeout_s:g} s", hint="--accumulate N"
        ) from error
    except OSError as error:
        raise BackendError(f"python cannot be started to measure a training: {first_line(error)}") from error
    if child.returncode == -signal.SIGKILL:
        return Refusal("too much")
    try:
        answer = from_json(_Answer, child.stdout, where="the probe's answer")
    except IntegrityError as error:
        last = (child.stderr.decode(errors="replace").strip().splitlines() or [f"code {child.returncode}"])[-1]
        raise BackendError(f"measuring a training crashed: {last}") from error
    if answer.error is not None:
        raise errors.by_name().get(answer.error, BackendError)(answer.problem, hint=answer.hint)
    return answer.peak if answer.peak is not None else Refusal(str(answer.refused))


def _measure_here(request: _Request) -> _Answer:
    release_at_once()
    first, *others = (
        load_checkpoint(Path(path), network=request.networks[name]) for name, path in request.checkpoints.items()
    )
    data = _made_up(first, request.how)
    make: Callable[..., tuple[nn.Module, Loss]] = load_factory(request.make)
    named = dict(zip(list(request.checkpoints)[1:], others, strict=True))
    for network in set(request.networks.values()):
        find_factory(network)  # imports what this process's parent has imported already
    held = settled_resident()
    seen: list[Progress] = []
    try:
        with nullcontext() if request.cap_bytes is None else capped(request.cap_bytes):
            module, loss = make(first, **named, **request.arguments)
            del first, named, others  # as whoever trains does
            fit_module(module, data, request.how, loss, seen.append, stage="probe")
    except Exception as error:  # what libraries make of a refused allocation has no class of its own
        if means_out_of_memory(error) or means_out_of_memory(error.__cause__):
            return _Answer(refused="too much")
        if TOO_FEW in str(error):
            return _Answer(refused="too few")
        raise
    peak_bytes = seen[-1].peak_bytes
    return _Answer(Peak(None if peak_bytes is None else peak_bytes - held, seen[-1].peak_device_bytes))


def _made_up(checkpoint: Checkpoint, how: TrainSettings) -> DataSet:
    """Noise of the shapes that the checkpoint takes: two batches to train on, one part to validate on."""
    _, channels, height, width = checkpoint.inputs[0].at_batch(1)
    rng = np.random.default_rng(0)
    classes = len(checkpoint.labels)

    def split(samples: int) -> Split:
        images = rng.integers(0, 256, (samples, height, width, channels), np.uint8)
        if not checkpoint.preprocess:  # it takes float32 as it is
            images = rng.standard_normal((samples, channels, height, width), np.float32)
        return Split(images, rng.integers(0, classes, samples))

    few = split(how.micro_batch)
    return DataSet("noise", split(STEPS * how.batch_size), few, few, checkpoint.labels, checkpoint.preprocess)
