"""The commands that make checkpoints: train, prune, distill."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from memopt_export.options import (
    Command,
    Size,
    as_json_option,
    data_root_option,
    factory_option,
    force_option,
    output_option,
    read_settings,
    seed_option,
    training_data_option,
)

if TYPE_CHECKING:
    from memopt_export.training_commands import Means


class NumberOrAuto(click.ParamType[int]):
    """A positive number, or auto, which is AUTO inside."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number; 0 for auto."""
        if isinstance(value, int):
            return value
        if value == "auto":
            return 0
        if not str(value).isdigit() or int(value) < 1:
            self.fail(f"{value!r} is neither a positive number nor auto", param, ctx)
        return int(value)


def _training(command: Command) -> Command:
    """The options of everything that trains."""
    for option in (*_LEARNING, *_MEMORY, seed_option):
        command = option(command)
    return command


def _surviving(command: Command) -> Command:
    """The options of what is kept after every epoch, and may be divided among processes."""
    for option in (
        click.option(
            "--restart", is_flag=True,
            help="Drop what a killed run has kept beside the output; without, the same command goes on from there.",
        ),
        click.option(
            "--nproc", type=click.IntRange(min=1), default=1, show_default=True,
            help="Processes on this machine that share each batch. torchrun may start them instead, on several.",
        ),
        click.option(
            "--parallel", default="ddp", show_default=True,
            help="ddp: each process has the whole network; fsdp2: its training state is divided among them.",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


@contextmanager
def _means(output: Path, *, restart: bool, nproc: int, parallel: str) -> Iterator[Means]:
    """By what a command trains. Where other processes are to do it, it ends here when they have."""
    from memopt_export import console, spread, training_commands
    from memopt_models.resume import Keep

    if nproc > 1 and "RANK" not in os.environ:
        spread.run(click.get_current_context().obj, size=nproc)
        raise SystemExit(0)
    with (
        spread.membership(os.environ, asked=nproc, parallel=parallel) as team,
        console.training(quiet=not team.is_first) as on_step,
    ):
        keep = Keep(output)
        if restart and team.is_first:
            keep.forget()
        yield training_commands.Means(on_step, keep, team)


_LEARNING = (
    click.option("--epochs", type=int, default=10, show_default=True, help="Passes over the training split."),
    click.option(
        "--batch-size", type=NumberOrAuto(), default=64, show_default=True, metavar="N|auto",
        help="Samples of one optimizer step; auto: 64, or fewer where an epoch would have less than 8 steps.",
    ),
    click.option("--learning-rate", type=float, default=1e-3, show_default=True, help="The highest one."),
    click.option("--schedule", default="constant", show_default=True, help="constant or onecycle."),
    click.option("--optimizer", default="adam", show_default=True, help="adam, adamw or sgd."),
    click.option("--weight-decay", type=float, default=0.0, show_default=True, help="Of the optimizer."),
    click.option("--momentum", type=float, default=0.9, show_default=True, help="Of sgd."),
    click.option("--shift", type=int, default=0, show_default=True, help="Pixels by which pictures are moved."),
    click.option("--threads", type=int, default=0, show_default=True, help="Of torch; 0 lets torch choose."),
)  # fmt: skip
_MEMORY = (
    click.option("--device", default="cpu", show_default=True, help="cpu, cuda, or auto: cuda where there is one."),
    click.option(
        "--precision", default="fp32", show_default=True,
        help="In which layers compute: fp32, bf16 or fp16; weights stay fp32. A CPU is slow in fp16.",
    ),
    click.option(
        "--checkpointing", default="off", show_default=True,
        help="blocks: activations inside of blocks are computed again instead of held.",
    ),
    click.option(
        "--accumulate", type=NumberOrAuto(), default="auto", show_default=True, metavar="N|auto",
        help="Parts of a batch, one in memory at a time; auto: as few as the limits allow, measured.",
    ),
    click.option("--channels-last", is_flag=True, help="Tensors lie channels last in memory."),
    click.option(
        "--max-memory", "max_memory_bytes", type=Size(), metavar="SIZE",
        help="What this process may hold, torch's 600 MiB or so included; kept.",
    ),
    click.option(
        "--max-device-memory", "max_device_memory_bytes", type=Size(), metavar="SIZE",
        help="What torch may allocate on the GPU; kept.",
    ),
)  # fmt: skip


@click.command()
@click.option(
    "--network",
    default="simple_cnn",
    show_default=True,
    help="simple_cnn, ds_cnn, a torchvision classifier, or pkg.mod:factory.",
)
@click.option(
    "--setting", "settings", multiple=True, metavar="NAME=VALUE", help="Of the network; may be given several times."
)
@training_data_option
@_training
@_surviving
@click.option("--classes", type=click.IntRange(min=1), help="Outputs of the network; refused if the data has others.")
@click.option("--in-channels", type=click.IntRange(min=1), help="Of the input; refused if the data has others.")
@click.option("--start", type=click.Path(path_type=Path), help="Checkpoint to go on from.")
@click.option(
    "--weights",
    metavar="FILE|imagenet",
    help="Weights to start from: a state dict (.safetensors, or torch.save's), or torchvision's.",
)
@output_option
@data_root_option
@force_option
@as_json_option
def train(
    network: str, settings: Sequence[str], data: str, classes: int | None, in_channels: int | None,
    start: Path | None, weights: str | None, output: Path, data_root: Path | None,
    force: bool, as_json: bool, restart: bool, nproc: int, parallel: str, **how: Any,
) -> None:  # fmt: skip
    """Train a dense checkpoint, or fine-tune one.

    Weights for another number of classes lose their last layer, for another number of channels the first convolution is
    averaged; both are said.
    """
    from memopt_export import console, training_commands
    from memopt_models.train import TrainSettings

    with _means(output, restart=restart, nproc=nproc, parallel=parallel) as means:
        saved = training_commands.train(
            network, read_settings(settings), data, TrainSettings(**how), output,
            origin=training_commands.Origin(start, weights, classes, in_channels),
            data_root=data_root, force=force, means=means,
        )  # fmt: skip
    if saved is not None:
        console.show(saved, as_json=as_json)


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@factory_option
@click.option("--ratio", type=float, default=0.5, show_default=True, help="Share of the channels that goes.")
@click.option("--method", default="l2", show_default=True, help="l1 or l2: the norm by which channels are ranked.")
@click.option("--round-to", type=int, default=1, show_default=True, help="Channel numbers become multiples of this.")
@training_data_option
@_training
@_surviving
@output_option
@data_root_option
@force_option
@as_json_option
def prune(
    checkpoint: Path, network: str | None, ratio: float, method: str, round_to: int, data: str, output: Path,
    data_root: Path | None, force: bool, as_json: bool, restart: bool, nproc: int, parallel: str, **how: Any,
) -> None:  # fmt: skip
    """Take channels out of CHECKPOINT, so that its tensors shrink, and fine-tune it (--epochs 0: not)."""
    from memopt_export import console, training_commands
    from memopt_models.prune import PruneSettings
    from memopt_models.train import TrainSettings

    finetune = TrainSettings(**how) if how["epochs"] else None
    settings = PruneSettings(ratio=ratio, method=method, round_to=round_to, finetune=finetune)
    with _means(output, restart=restart, nproc=nproc, parallel=parallel) as means:
        saved = training_commands.prune(
            checkpoint, data, settings, output, network=network, data_root=data_root, force=force, means=means
        )  # fmt: skip
    if saved is not None:
        console.show(saved, as_json=as_json)


@click.command()
@click.option("--teacher", type=click.Path(path_type=Path), required=True, help="Checkpoint that teaches.")
@factory_option
@click.option("--student", default="ds_cnn", show_default=True, help="A network's name, or a checkpoint to go on from.")
@click.option("--setting", "settings", multiple=True, metavar="NAME=VALUE", help="Of the student's network.")
@click.option(
    "--temperature", type=float, default=4.0, show_default=True, help="The higher, the more wrong classes count."
)
@click.option("--alpha", type=float, default=0.5, show_default=True, help="Weight of the teacher's answer, 0 to 1.")
@training_data_option
@_training
@_surviving
@output_option
@data_root_option
@force_option
@as_json_option
def distill(
    teacher: Path, network: str | None, student: str, settings: Sequence[str], temperature: float, alpha: float,
    data: str, output: Path, data_root: Path | None, force: bool, as_json: bool, restart: bool, nproc: int,
    parallel: str, **how: Any,
) -> None:  # fmt: skip
    """Train a small student from a teacher; the better of with and without the teacher is kept."""
    from memopt_export import console, training_commands
    from memopt_models.distill import DistillSettings
    from memopt_models.train import TrainSettings

    asked = DistillSettings(TrainSettings(**how), temperature=temperature, alpha=alpha)
    with _means(output, restart=restart, nproc=nproc, parallel=parallel) as means:
        saved = training_commands.distill(
            teacher, student, read_settings(settings), data, asked, output,
            network=network, data_root=data_root, force=force, means=means,
        )  # fmt: skip
    if saved is not None:
        console.show(saved, as_json=as_json)


COMMANDS = (train, prune, distill)
