"""Training: the loop that dense training, fine-tuning after pruning, and distillation share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from memopt.errors import AnswerIsNo, InputRefused, UsageError
from memopt.memory import read_host_memory
from memopt.strict_json import to_plain
from memopt.tensors import Array, show_shape
from memopt_models import networks
from memopt_models.checkpoint import Checkpoint, snapshot
from memopt_models.dataset import DataSet
from memopt_models.evaluate import device_of, measure, score
from memopt_models.feed import Feeder

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class TrainSettings:
    """How to train."""

    epochs: int
    batch_size: int = 64
    learning_rate: float = 1e-3  # the highest one, of a schedule
    optimizer: str = "adam"
    seed: int = 0
    schedule: str = "constant"  # or "onecycle"
    shift: int = 0  # pixels; each train picture is moved by up to so many in each direction
    threads: int = 0  # of torch; 0 lets it choose. Small networks want 1, and the last bits of the weights depend on it

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("shift", 0), ("seed", 0), ("threads", 0)):
            number = getattr(self, name)
            if number < least:
                raise UsageError(f"{name} is {number}, at least {least} is needed")
        if not 0 < self.learning_rate < math.inf:
            raise UsageError(f"learning_rate is {self.learning_rate}, a positive number is needed")
        for name, table in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in table:
                raise UsageError(f"{name} {getattr(self, name)!r} is not known", hint=", ".join(table))


@dataclass(frozen=True)
class Progress:
    """Where a training stands after one step. What is only known when the epoch ends is None before."""

    stage: str
    epoch: int  # from 1
    epochs: int
    step: int  # in this epoch, from 1
    steps: int
    loss: float  # mean over the epoch so far
    validation_top1: float | None = None  # 0 to 1
    peak_bytes: int | None = None  # highest RSS of the process so far


OnStep = Callable[[Progress], None]
Loss = Callable[["torch.Tensor", "torch.Tensor", "torch.Tensor"], "torch.Tensor"]


def train(
    network: str,
    settings: Mapping[str, Any],
    data: DataSet,
    how: TrainSettings,
    *,
    start: Checkpoint | None = None,
    on_step: OnStep | None = None,
) -> Checkpoint:
    """A checkpoint of the epoch that was best on validation; on a CPU the same arguments give the same weights.

    Args:
        network: see `networks.build`.
        settings: of the network; classes, channels and size of the data are filled in.
        data: what to learn.
        how: epochs, optimizer, seed.
        start: weights to go on from, of the same network; its preprocessing is kept.
        on_step: called after every step.

    Raises:
        UsageError: no such network, or `start` is another one.
        InputRefused: `start` does not fit the data.
        AnswerIsNo: the training diverged.
    """
    first = begin(network, settings, data, how, start=start)
    data = data_for(first, data)
    module = first.module()
    fit_module(module, data, how, cross_entropy, on_step, stage="train")
    used = {"network": network, "settings": first.settings, **asdict(how), **describe(data)}
    parents = () if start is None else (start.sha256,)
    return first.advance("train", module, settings=used, metrics=measure(module, data), parents=parents)


def begin(
    network: str, settings: Mapping[str, Any], data: DataSet, how: TrainSettings, *, start: Checkpoint | None
) -> Checkpoint:
    """The checkpoint before the first step: fresh weights drawn with the seed, or `start`."""
    if start is None:
        _, channels, height, width = data.input_spec.at_batch(1)
        full = networks.complete(network, settings, classes=len(data.classes), shape=(channels, height, width))
        with _seeded(how.seed):
            state = snapshot(networks.build(network, full))
        return Checkpoint(network, full, state, (data.input_spec,), data.classes, data.preprocess, (), {}, how.seed)
    if start.network != network:
        raise UsageError(f"the start is a {start.network}, not a {network}", hint=f"--network {start.network}")
    asked = to_plain(dict(settings))
    differing = [name for name in asked if start.settings.get(name) != asked[name]]
    if differing:
        raise UsageError(
            f"the start has {differing[0]} {start.settings.get(differing[0])}, not {settings[differing[0]]}"
        )
    return replace(start, seed=how.seed)


def data_for(checkpoint: Checkpoint, data: DataSet) -> DataSet:
    """The data as the checkpoint sees it, prepared by its own steps.

    Raises:
        InputRefused: pictures or classes do not fit.
    """
    wanted, got = checkpoint.inputs[0], data.input_spec
    if wanted.shape[1:] != got.shape[1:]:
        raise InputRefused(
            f"the checkpoint takes {show_shape(wanted.shape)}, data {data.name!r} gives {show_shape(got.shape)}"
        )
    if checkpoint.labels != data.classes:
        theirs, ours = (", ".join(names) for names in (checkpoint.labels, data.classes))
        raise InputRefused(f"the checkpoint knows the classes {theirs}; data {data.name!r} has {ours}")
    return replace(data, preprocess=checkpoint.preprocess)


def describe(data: DataSet) -> dict[str, str]:
    """What a lineage says of the data: its name, its fingerprint, and the SPEC that opens it, where it has one."""
    spec = {} if data.spec is None else {"spec": data.spec}
    return {"data": data.name, "data_fingerprint": data.fingerprint} | spec


def fit_module(
    module: nn.Module,
    data: DataSet,
    how: TrainSettings,
    loss_function: Loss,
    on_step: OnStep | None = None,
    *,
    stage: str,
) -> float:
    """Validation top-1 of the best epoch, the later one of equals; the module has its weights afterwards.

    Args:
        module: trained in place, left in evaluation mode.
        data: train and validation are used, test is not.
        how: epochs, optimizer, seed.
        loss_function: (logits, labels, inputs) -> a scalar.
        on_step: called after every step.
        stage: how the progress calls it.

    Raises:
        AnswerIsNo: the loss is no longer finite.
    """
    report = on_step or _ignore
    steps = math.ceil(len(data.train) / how.batch_size)
    rng = np.random.default_rng(how.seed)
    take_step = _stepper(module, data, how, loss_function, rng=rng, steps=how.epochs * steps)
    best, weights = -1.0, snapshot(module)
    with _seeded(how.seed), _threads(how.threads):  # the seed is for dropout and its like
        for epoch in range(1, how.epochs + 1):
            module.train()
            batches = np.array_split(rng.permutation(len(data.train)), steps)
            for progress in _run_epoch(take_step, batches, Progress(stage, epoch, how.epochs, 0, steps, math.inf)):
                if progress.step < steps:
                    report(progress)
            top1 = score(module, data.validation, data.preprocess)
            if top1 >= best:
                best, weights = top1, snapshot(module)
            report(replace(progress, validation_top1=top1, peak_bytes=read_host_memory().peak_bytes))
    module.load_state_dict(weights)
    module.eval()
    return best


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """The loss of plain training."""
    from torch.nn import functional

    return functional.cross_entropy(logits, labels)


def _adam(module: nn.Module, how: TrainSettings) -> torch.optim.Optimizer:
    import torch

    return torch.optim.Adam(module.parameters(), lr=how.learning_rate)


OPTIMIZERS: dict[str, Callable[[nn.Module, TrainSettings], torch.optim.Optimizer]] = {"adam": _adam}


def _constant(optimizer: torch.optim.Optimizer, how: TrainSettings, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    import torch

    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


def _onecycle(optimizer: torch.optim.Optimizer, how: TrainSettings, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Up to the learning rate in the first third, then down to nothing (Smith, Topin, https://arxiv.org/abs/1708.07120)."""
    import torch

    return torch.optim.lr_scheduler.OneCycleLR(optimizer, how.learning_rate, total_steps=steps)


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer, TrainSettings, int], torch.optim.lr_scheduler.LRScheduler]] = {
    "constant": _constant,
    "onecycle": _onecycle,
}


def _stepper(
    module: nn.Module, data: DataSet, how: TrainSettings, loss_function: Loss, *, rng: np.random.Generator, steps: int
) -> Callable[[Array], float]:
    """A function that takes one optimizer step on these rows of the train split and returns the loss."""
    optimizer = OPTIMIZERS[how.optimizer](module, how)
    scheduler = SCHEDULES[how.schedule](optimizer, how, steps)
    feeder = Feeder(data.train, data.preprocess, batch_size=how.batch_size, device=device_of(module), shift=how.shift)

    def take_step(rows: Array) -> float:
        inputs, labels = feeder.batch(np.sort(rows), rng)  # sorted: a mapped file is read from front to back
        loss = loss_function(module(inputs), labels, inputs)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimizer.step()
        scheduler.step()
        return loss.item()

    return take_step


def _run_epoch(take_step: Callable[[Array], float], batches: list[Array], progress: Progress) -> Iterator[Progress]:
    """Takes one step for each batch; yields the progress after it, with the mean loss so far."""
    total = 0.0
    for step, rows in enumerate(batches, start=1):
        total += take_step(rows)
        if not math.isfinite(total):
            raise AnswerIsNo(
                f"{progress.stage} diverged: the loss is {total} in epoch {progress.epoch}, step {step}",
                hint="a tenth of the learning rate",
            )
        yield replace(progress, step=step, loss=total / step)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The global generator of torch starts from the seed inside, and goes on as if nothing happened outside."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Inside, torch computes with so many threads; 0 changes nothing."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _ignore(progress: Progress) -> None:
    """What is called when nobody watches."""
