"""Training: the loop that dense training, fine-tuning after pruning, and distillation share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from memopt.errors import AnswerIsNo, BackendError, InputRefused, UsageError
from memopt.memory import PeakMeter
from memopt.strict_json import to_plain
from memopt.tensors import Array, show_shape
from memopt_models import networks
from memopt_models.best_weights import BestWeights
from memopt_models.checkpoint import Checkpoint, digest_state, snapshot
from memopt_models.dataset import DataSet
from memopt_models.evaluate import measure, score
from memopt_models.factories import source_digest
from memopt_models.feed import Feeder, draw_moves
from memopt_models.out_of_memory import limited
from memopt_models.recompute import recomputed
from memopt_models.resume import Keep
from memopt_models.team import ALONE, Team

if TYPE_CHECKING:
    import torch
    from torch import nn


AUTO = 0  # of a number: what the data and the limits allow
PRECISIONS = ("fp32", "bf16", "fp16")
CHECKPOINTING = ("off", "blocks")
DEVICES = ("cpu", "cuda", "auto")
_DEFAULT_BATCH, _LEAST_STEPS = 64, 8  # of `batch_size` AUTO: so many samples, unless an epoch had fewer steps than that
_EVALUATED_AT_ONCE = 256


@dataclass(frozen=True)
class TrainSettings:
    """How to train."""

    epochs: int
    batch_size: int = 64  # samples of one optimizer step; AUTO: 64, or the power of two that leaves 8 steps in an epoch
    learning_rate: float = 1e-3  # the highest one, of a schedule
    optimizer: str = "adam"
    seed: int = 0
    schedule: str = "constant"  # or "onecycle"
    shift: int = 0  # pixels; each train picture is moved by up to so many in each direction
    threads: int = 0  # of torch; 0 lets it choose. Small networks want 1, and the last bits of the weights depend on it
    weight_decay: float = 0.0
    momentum: float = 0.9  # of "sgd"
    precision: str = "fp32"  # in which layers compute; weights, gradients and the optimizer's state stay float32
    accumulate: int = AUTO  # parts of a batch whose gradients are summed before the step; AUTO: as few as limits allow
    checkpointing: str = "off"  # or "blocks": activations inside blocks are computed again instead of held
    channels_last: bool = False  # how tensors lie in memory
    device: str = "cpu"  # or "cuda", or "auto": cuda where there is one
    max_memory_bytes: int | None = None  # of the whole process, which is held to it; None: no limit
    max_device_memory_bytes: int | None = None  # of what torch allocates on a GPU

    def __post_init__(self) -> None:
        leasts = (
            ("epochs", 1), ("batch_size", 0), ("shift", 0), ("seed", 0), ("threads", 0), ("accumulate", 0),
        )  # fmt: skip
        for name, least in leasts:
            number = getattr(self, name)
            if number < least:
                raise UsageError(f"{name} is {number}, at least {least} is needed")
        if not 0 < self.learning_rate < math.inf:
            raise UsageError(f"learning_rate is {self.learning_rate}, a positive number is needed")
        if not 0 <= self.weight_decay < math.inf:
            raise UsageError(f"weight_decay is {self.weight_decay}, 0 or a positive number is needed")
        if not 0 <= self.momentum < 1:
            raise UsageError(f"momentum is {self.momentum}, it lies between 0 and 1")
        tables = (
            ("optimizer", OPTIMIZERS), ("schedule", SCHEDULES), ("precision", PRECISIONS),
            ("checkpointing", CHECKPOINTING), ("device", DEVICES),
        )  # fmt: skip
        for name, table in tables:
            if getattr(self, name) not in table:
                raise UsageError(f"{name} {getattr(self, name)!r} is not known", hint=", ".join(table))
        for name in ("max_memory_bytes", "max_device_memory_bytes"):
            limit = getattr(self, name)
            if limit is not None and limit < 1:
                raise UsageError(f"{name} is {limit}, a positive number is needed")
        if self.max_device_memory_bytes is not None and self.device == "cpu":
            raise UsageError("max_device_memory_bytes limits a GPU, and device is cpu", hint="--device cuda")
        if self.batch_size and self.accumulate > self.batch_size:
            raise UsageError(
                f"accumulate is {self.accumulate}, a batch of {self.batch_size} has not so many parts",
                hint=f"--accumulate {self.batch_size}",
            )

    def settled(self, samples: int) -> TrainSettings:
        """The same with a number for each AUTO, for so many samples in the train split.

        >>> [TrainSettings(1, batch_size=AUTO).settled(samples).batch_size for samples in (60000, 100, 5)]
        [64, 8, 1]
        """
        small = 2 ** int(math.log2(max(samples // _LEAST_STEPS, 1)))
        batch = self.batch_size or min(_DEFAULT_BATCH, small)
        return replace(self, batch_size=batch, accumulate=self.accumulate or 1)

    @property
    def has_limit(self) -> bool:
        """Whether memory of any kind is limited."""
        return self.max_memory_bytes is not None or self.max_device_memory_bytes is not None

    @property
    def micro_batch(self) -> int:
        """Samples in memory at once: the largest part of a batch. Both numbers have to be settled."""
        return -(-self.batch_size // self.accumulate)


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
    peak_bytes: int | None = None  # highest RSS of the process in this epoch
    peak_device_bytes: int | None = None  # the same of what torch has allocated on a GPU
    note: str = ""  # what a person should know, instead of a step; one that ends in "…" is what is being done


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
    keep: Keep | None = None,
    team: Team = ALONE,
) -> Checkpoint:
    """A checkpoint of the epoch that was best on validation; on a CPU the same arguments give the same weights.

    Args:
        network: see `networks.build`.
        settings: of the network; classes, channels and size of the data are filled in.
        data: what to learn.
        how: epochs, optimizer, seed.
        start: weights to go on from, of the same network; its preprocessing is kept.
        on_step: called after every step.
        keep: where it lies after every epoch, to go on from there when it is killed.
        team: the processes that train together; the first one's checkpoint is the one with metrics.

    Raises:
        UsageError: no such network, `start` is another one, or what was kept is another training.
        InputRefused: `start` does not fit the data.
        AnswerIsNo: the training diverged.
        OutOfResource: it does not fit into the limits.
    """
    from memopt_models.training_memory import Ledger, settle  # which are built on what is here
    from memopt_models.training_probe import Subject

    first = begin(network, settings, data, how, start=start)
    data, ledger, given = data_for(first, data), Ledger(on_step), identify(first)
    how = settle(Subject(first), data, how, ledger, stage="train", keep=keep, team=team)
    module, first = first.module(), replace(first, state={})  # the module has it now
    fit_module(module, data, how, cross_entropy, ledger, stage="train", keep=keep, made_from=given, team=team)
    used = {"network": network, "settings": first.settings, **asdict(how), **describe(data), "memory": ledger.memory}
    parents = () if start is None else (start.sha256,)
    metrics = measure(module, data) if team.is_first else {}
    return first.advance("train", module, settings=used, metrics=metrics, parents=parents)


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


def identify(checkpoint: Checkpoint) -> dict[str, Any]:
    """What its network is built of, beside the weights: name, settings, and the user's own code."""
    return {
        "network": checkpoint.network,
        "settings": checkpoint.settings,
        "code": source_digest(checkpoint.network),
    }


@dataclass
class Training:
    """All that a training carries from one step to the next. Of the global generator it holds nothing."""

    module: nn.Module
    how: TrainSettings
    device: torch.device
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler  # of fp16; it does nothing for other precisions
    rng: np.random.Generator  # of the order of the samples, and of their augmentation; a new one in each epoch
    best: BestWeights
    team: Team
    worker: nn.Module  # what goes forward and is optimized: the module itself, or what stands for it in a team
    ended: list[Progress] = field(default_factory=list)  # how each epoch done has ended
    best_top1: float = -1.0

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return len(self.ended)


def fit_module(
    module: nn.Module,
    data: DataSet,
    how: TrainSettings,
    loss_function: Loss,
    on_step: OnStep | None = None,
    *,
    stage: str,
    keep: Keep | None = None,
    made_from: Mapping[str, Any] = MappingProxyType({}),
    team: Team = ALONE,
) -> float:
    """Validation top-1 of the best epoch, the later one of equals; the module has its weights afterwards.

    Args:
        module: trained in place, left in evaluation mode on the device it was trained on.
        data: train and validation are used, test is not.
        how: epochs, optimizer, seed.
        loss_function: (logits, labels, inputs) -> a scalar, the mean over the samples.
        on_step: called after every step.
        stage: how the progress calls it.
        keep: where it lies after every epoch, to go on from there when it is killed; None keeps nothing.
        made_from: what the result depends on beside the weights now, the data and `how`: whatever is in the loss.
        team: the processes that train together, all of which call this.

    Raises:
        AnswerIsNo: the loss is no longer finite.
        BackendError: there is no such device.
        UsageError: what was kept is another training, or a batch is too small for the team.
        OutOfResource: there is not enough memory, or the limits would be passed.
    """
    report = on_step or _ignore
    how = how.settled(len(data.train))
    steps = math.ceil(len(data.train) / how.batch_size)
    if len(data.train) // steps < team.size:
        raise UsageError(f"a batch of {len(data.train) // steps} cannot be divided among {team.size} processes")
    with ExitStack() as stack:
        stack.enter_context(_seeded(how.seed))  # for dropout and its like
        stack.enter_context(_threads(how.threads))
        device, limits = find_device(how.device), (how.max_memory_bytes, how.max_device_memory_bytes)
        stack.enter_context(limited(device, host_bytes=limits[0], device_bytes=limits[1]))
        meter = stack.enter_context(PeakMeter())
        training = stack.enter_context(_begin_training(module, how, team, steps=how.epochs * steps))
        kept = None
        if keep is not None:
            kept = keep.training(stage, {**_depends_on(module, data, how), **made_from}, team=team)
            note = kept.restore(training)
            if note:
                report(Progress(stage, training.epoch, how.epochs, 0, 0, math.nan, note=note))
            for progress in training.ended:
                report(progress)
        while training.epoch < how.epochs:
            meter.restart()
            for progress in _run_epoch(
                training, data, loss_function, Progress(stage, training.epoch + 1, how.epochs, 0, steps, math.inf)
            ):
                if progress.step < steps:
                    report(progress)
            top1, peak_device_bytes = _end_epoch(training, data), _device_peak(training.device)
            progress = replace(
                progress, validation_top1=top1, peak_bytes=meter.read(), peak_device_bytes=peak_device_bytes
            )
            training.ended.append(progress)
            if kept is not None:
                kept.store(training)
            report(progress)
        training.best.restore(module)
    module.eval()
    return training.best_top1


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """The loss of plain training."""
    from torch.nn import functional

    return functional.cross_entropy(logits, labels)


def _adam(module: nn.Module, how: TrainSettings) -> torch.optim.Optimizer:
    import torch

    return torch.optim.Adam(module.parameters(), lr=how.learning_rate, weight_decay=how.weight_decay)


def _adamw(module: nn.Module, how: TrainSettings) -> torch.optim.Optimizer:
    """The decay apart from the gradient (Loshchilov, Hutter, https://arxiv.org/abs/1711.05101)."""
    import torch

    return torch.optim.AdamW(module.parameters(), lr=how.learning_rate, weight_decay=how.weight_decay)


def _sgd(module: nn.Module, how: TrainSettings) -> torch.optim.Optimizer:
    import torch

    return torch.optim.SGD(
        module.parameters(), lr=how.learning_rate, momentum=how.momentum, weight_decay=how.weight_decay
    )


OPTIMIZERS: dict[str, Callable[[nn.Module, TrainSettings], torch.optim.Optimizer]] = {
    "adam": _adam,
    "adamw": _adamw,
    "sgd": _sgd,
}


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


@contextmanager
def _begin_training(module: nn.Module, how: TrainSettings, team: Team, *, steps: int) -> Iterator[Training]:
    """The training before its first step; afterwards the module lies in memory as it did, and has no gradients."""
    import torch

    device = find_device(how.device)
    layout = torch.channels_last if how.channels_last else torch.contiguous_format
    module.to(device).to(memory_format=layout)
    worker = team.divide(module)
    optimizer = OPTIMIZERS[how.optimizer](worker, how)
    scheduler = SCHEDULES[how.schedule](optimizer, how, steps)
    scaler = torch.amp.GradScaler(device.type, enabled=how.precision == "fp16")
    rng = np.random.default_rng(how.seed)
    with BestWeights() as best, recomputed(worker) if how.checkpointing == "blocks" else nullcontext():
        yield Training(module, how, device, optimizer, scheduler, scaler, rng, best, team, worker)
    module.zero_grad(set_to_none=True)
    module.to(memory_format=torch.contiguous_format)


def _run_epoch(training: Training, data: DataSet, loss_function: Loss, progress: Progress) -> Iterator[Progress]:
    """Takes one step for each batch; yields the progress after it, with the mean loss so far."""
    total = 0.0
    training.team.release(training.module, training.worker)
    training.worker.train()
    _seed_epoch(training)
    feeder = _feeder(training, data)
    batches = np.array_split(training.rng.permutation(len(data.train)), progress.steps)
    for step, rows in enumerate(batches, start=1):
        total += _take_step(training, feeder, rows, loss_function)
        if not math.isfinite(total):
            raise AnswerIsNo(
                f"{progress.stage} diverged: the loss is {total} in epoch {progress.epoch}, step {step}",
                hint="a tenth of the learning rate",
            )
        yield replace(progress, step=step, loss=total / step)


def _depends_on(module: nn.Module, data: DataSet, how: TrainSettings) -> dict[str, Any]:
    """What decides the result of a training, as far as it can be seen here: of limits it is independent.

    The weights are copied: a tensor that numpy has seen can no longer be resized, and torchao's observers are, later.
    """
    unlimited = replace(how, max_memory_bytes=None, max_device_memory_bytes=None)
    return {"how": asdict(unlimited), **describe(data), "start": digest_state(snapshot(module))}


def _seed_epoch(training: Training) -> None:
    """All that is random in an epoch follows from the seed and its number: whoever goes on needs no state of it.

    The order of the samples and their augmentation are those of every process of a team, dropout and its like are not.
    """
    import torch

    number = training.epoch + 1
    training.rng = np.random.default_rng((training.how.seed, number))
    own = np.random.SeedSequence((training.how.seed, number, training.team.rank)).generate_state(1, np.uint64)
    torch.manual_seed(int(own[0]))


def _take_step(training: Training, feeder: Feeder, rows: Array, loss_function: Loss) -> float:
    """One optimizer step on these rows of the train split; their mean loss.

    A part of a batch counts by its samples, so that the gradient is that of the whole batch, whatever its parts. (Where
    a network looks at several samples at once, as BatchNorm does, it sees those of a part.)
    """
    import torch

    team = training.team
    total = torch.zeros((), device=training.device)
    for inputs, labels, last in _micro_batches(training, feeder, rows):
        share = team.size * len(labels) / len(rows)  # a team takes the mean of its gradients
        with team.step(training.worker, last=last):
            with _computing_in(training.how.precision, training.device):
                loss = loss_function(training.worker(inputs).float(), labels, inputs) * share
            training.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        total += loss.detach()
    scale = training.scaler.get_scale()
    training.scaler.step(training.optimizer)
    training.scaler.update()
    training.optimizer.zero_grad()  # at once: gradients are not held while the next batch goes forward
    if training.scaler.get_scale() >= scale:  # else the gradients were not finite, and there was no step
        training.scheduler.step()
    return team.add(total.item()) / team.size


def _feeder(training: Training, data: DataSet) -> Feeder:
    """What gives parts of batches, laid out as the network is."""
    import torch

    how = training.how
    layout = torch.channels_last if how.channels_last else torch.contiguous_format
    size = -(-how.micro_batch // training.team.size) + (training.team.size > 1)  # one more where rows divide unevenly
    return Feeder(data.train, data.preprocess, batch_size=size, device=training.device, layout=layout)


def _micro_batches(
    training: Training, feeder: Feeder, rows: Array
) -> Iterator[tuple[torch.Tensor, torch.Tensor, bool]]:
    """Inputs and labels of each part of a batch that is this process's, on the device, and whether it is the last one.

    How pictures move does not hang on the parts.
    """
    rows = np.sort(rows)  # a mapped file is read from front to back
    moves = draw_moves(len(rows), training.how.shift, training.rng)
    own = np.arange(len(rows))[training.team.part(rows)]
    parts = np.array_split(own, min(training.how.accumulate, len(rows) // training.team.size))
    for number, part in enumerate(parts, start=1):
        yield *feeder.batch(rows[part], moves[part]), number == len(parts)


def _end_epoch(training: Training, data: DataSet) -> float:
    """Keeps the weights of the epoch if they are the best so far; their validation top-1."""
    training.team.gather(training.worker, training.module)
    top1 = _validate(training, data)
    if top1 >= training.best_top1:
        training.best_top1 = top1
        training.best.keep(training.module)
    return top1


def _validate(training: Training, data: DataSet) -> float:
    """Top-1 on the validation split, of which each process of a team judges its part."""
    size = min(training.how.micro_batch, _EVALUATED_AT_ONCE)
    own = data.validation.pick(training.team.part(data.validation.labels))
    right = round(score(training.module, own, data.preprocess, batch_size=size) * len(own)) if len(own) else 0
    return training.team.add(right) / len(data.validation)


def find_device(name: str) -> torch.device:
    """The device of this name; "auto" is cuda where there is one.

    Raises:
        BackendError: cuda is asked for and torch sees none.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise BackendError(f"torch {torch.__version__} sees no CUDA device", hint="--device cpu")
    return torch.device(name)


def _computing_in(precision: str, device: torch.device) -> torch.autocast:
    """Inside, convolutions and products compute in this precision, with float32 weights rounded for each use."""
    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


def _device_peak(device: torch.device) -> int | None:
    """The most that torch has held on the GPU since the last call; None for a CPU."""
    import torch

    if device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak


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
