"""The commands that make checkpoints: train, prune, distill, qat."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from memopt_export.options import (
    Amount,
    Command,
    Memory,
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
    """The options of everything that trains floats."""
    for option in reversed((*_LEARNING, seed_option, *_MEMORY, *_FLOATS)):  # put on last, shown first
        command = option(command)
    return command


def _rounded_training(command: Command) -> Command:
    """Those of what trains a traced network, in float32 only: it has no blocks any more."""
    for option in reversed((*_LEARNING, seed_option, *_MEMORY)):  # the last one put on stands first in the help
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
        "--accumulate", type=NumberOrAuto(), default="auto", show_default=True, metavar="N|auto",
        help="Parts of a batch, one in memory at a time; auto: as few as the limits allow, measured.",
    ),
    click.option("--channels-last", is_flag=True, help="Tensors lie channels last in memory."),
    click.option(
        "--max-memory", "max_memory_bytes", type=Size(), metavar="SIZE",
        help="What this process may hold, torch's 700 MiB or so included; kept.",
    ),
    click.option(
        "--max-device-memory", "max_device_memory_bytes", type=Size(), metavar="SIZE",
        help="What torch may allocate on the GPU; kept.",
    ),
)  # fmt: skip

_FLOATS = (
    click.option(
        "--precision", default="fp32", show_default=True,
        help="In which layers compute: fp32, bf16 or fp16; weights stay fp32. A CPU is slow in fp16.",
    ),
    click.option(
        "--checkpointing", default="off", show_default=True,
        help="blocks: activations inside of blocks are computed again instead of held.",
    ),
)  # fmt: skip


@click.command()
@click.option(
    "--network",
    default="simple_cnn",
    show_default=True,
    help="simple_cnn, ds_cnn, tiny_cnn, a torchvision classifier, or pkg.mod:factory.",
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
@click.option("--ratio", type=float, help="Share of the channels that goes; 0.5 unless a target is given.")
@click.option("--target-macs", type=Amount(), metavar="N", help="Multiply-accumulates left: a share, or 300M.")
@click.option("--target-params", type=Amount(), metavar="N", help="Parameters left: a share, or 1.2M.")
@click.option(
    "--target-memory",
    type=Memory(),
    metavar="SIZE",
    help="Planned memory left at --batch, weights and peak of activations: a share, or 24MiB.",
)
@click.option("--batch", type=int, default=1, show_default=True, help="At which memory is planned.")
@click.option("--sparsity", type=float, metavar="SHARE", help="No channels: this share of the weights becomes zero.")
@click.option("--pattern", metavar="N:M", help="No channels: zeros so that N of every M weights stay, such as 2:4.")
@click.option(
    "--method", default="l2", show_default=True, help="By which channels rank: l1, l2, taylor, bn-scale, random."
)
@click.option("--scope", default="layer", show_default=True, help="Where they compete: layer or global.")
@click.option("--steps", type=int, default=1, show_default=True, help="In so many, --epochs divided between them.")
@click.option("--round-to", type=int, default=1, show_default=True, help="Channel numbers become multiples of this.")
@click.option("--protect", multiple=True, metavar="PATTERN", help="Layers that stay as they are, such as 'layer1.*'.")
@click.option(
    "--way",
    "ways",
    multiple=True,
    metavar="WAY",
    help="channels or hidden; both, one after the other, unless given.",
)
@click.option(
    "--analysis-memory", type=Size(), default="4GiB", show_default=True, help="Of the process that follows the graph."
)
@click.option("--analysis-seconds", type=float, default=300.0, show_default=True, help="Its time, for one network.")
@training_data_option
@_training
@_surviving
@output_option
@data_root_option
@force_option
@as_json_option
def prune(
    checkpoint: Path, network: str | None, data: str, output: Path, data_root: Path | None, force: bool,
    as_json: bool, restart: bool, nproc: int, parallel: str, **how: Any,
) -> None:  # fmt: skip
    """Make CHECKPOINT smaller, and fine-tune what is left (--epochs 0: not).

    Channels that depend on each other leave all tensors that have them (way "channels"), or, in networks whose graph
    is not understood, features between two layers (way "hidden"). --sparsity and --pattern set single weights to
    zero instead, which shrinks no tensor: compressed files get smaller, TensorRT gets faster with 2:4.
    """
    from memopt_export import console, training_commands

    settings = training_commands.pruning_settings(**how)
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
@click.option(
    "--features",
    multiple=True,
    metavar="STUDENT=TEACHER|auto",
    help="Layers of both to be like each other; auto: the last feature maps. May be given several times.",
)
@click.option("--beta", type=float, default=1.0, show_default=True, help="Weight of the features, on top.")
@training_data_option
@_training
@_surviving
@output_option
@data_root_option
@force_option
@as_json_option
def distill(
    teacher: Path, network: str | None, student: str, settings: Sequence[str], temperature: float, alpha: float,
    features: tuple[str, ...], beta: float, data: str, output: Path, data_root: Path | None, force: bool,
    as_json: bool, restart: bool, nproc: int, parallel: str, **how: Any,
) -> None:  # fmt: skip
    """Train a small student from a teacher; the better of with and without the teacher is kept."""
    from memopt_export import console, training_commands
    from memopt_models.distill import DistillSettings
    from memopt_models.train import TrainSettings

    asked = DistillSettings(
        TrainSettings(**how), temperature=temperature, alpha=alpha, features=features, beta=beta
    )  # fmt: skip
    with _means(output, restart=restart, nproc=nproc, parallel=parallel) as means:
        saved = training_commands.distill(
            teacher, student, read_settings(settings), data, asked, output,
            network=network, data_root=data_root, force=force, means=means,
        )  # fmt: skip
    if saved is not None:
        console.show(saved, as_json=as_json)


@click.command(context_settings={"default_map": {"epochs": 3, "learning_rate": 1e-4}})
@click.argument("checkpoint", type=click.Path(path_type=Path))
@factory_option
@click.option(
    "--precision",
    default="int8",
    show_default=True,
    help="int8, or of weights alone int8-weights, int4-weights, int2-weights.",
)
@click.option("--target", default="cpu", show_default=True, help="Who computes int8: cpu (ONNX Runtime) or tensorrt.")
@click.option(
    "--layer-bits",
    multiple=True,
    metavar="NAME=BITS",
    help="Of weights alone: 2, 4, 8, or 32 for float; may be repeated.",
)
@click.option(
    "--steps",
    default="layer",
    show_default=True,
    help="Of weights alone: who has a step of its own: each layer, each output channel, or the whole network.",
)
@click.option(
    "--views",
    type=int,
    default=1,
    show_default=True,
    help="Train for the mean over so many places that a picture is seen from, 1, 4 or 9; export follows.",
)
@training_data_option
@_rounded_training
@_surviving
@output_option
@data_root_option
@force_option
@as_json_option
def qat(
    checkpoint: Path, network: str | None, precision: str, target: str, layer_bits: Sequence[str], steps: str,
    views: int, data: str, output: Path, data_root: Path | None, force: bool, as_json: bool, restart: bool,
    nproc: int, parallel: str, **how: Any,
) -> None:  # fmt: skip
    """Train CHECKPOINT on, its weights and activations, or its weights alone, rounded as the deployed network is.

    `memopt-export export` makes the rounded ONNX graph of the result: nothing is left to quantize. Weights of few bits
    make the smallest files (export --compact), which are floats again in memory; int8 is small there too.
    """
    from memopt_export import console, training_commands
    from memopt_models.qat import QatSettings
    from memopt_models.train import TrainSettings

    asked = QatSettings(
        TrainSettings(**how),
        precision=precision,
        target=target,
        layer_bits=read_settings(layer_bits),
        steps=steps,
        views=views,
    )
    with _means(output, restart=restart, nproc=nproc, parallel=parallel) as means:
        saved = training_commands.qat(
            checkpoint, data, asked, output, network=network, data_root=data_root, force=force, means=means
        )  # fmt: skip
    if saved is not None:
        console.show(saved, as_json=as_json)


COMMANDS = (train, prune, distill, qat)
