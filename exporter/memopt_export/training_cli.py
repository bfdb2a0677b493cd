"""The commands that make checkpoints: train, prune, distill, qat."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


def _training(command: Command) -> Command:
    """The options of everything that trains."""
    for option in (
        click.option("--epochs", type=int, default=10, show_default=True, help="Passes over the training split."),
        click.option("--batch-size", type=int, default=64, show_default=True, help="Samples in one step."),
        click.option("--learning-rate", type=float, default=1e-3, show_default=True, help="The highest one."),
        click.option("--schedule", default="constant", show_default=True, help="constant or onecycle."),
        click.option("--shift", type=int, default=0, show_default=True, help="Pixels by which pictures are moved."),
        click.option("--threads", type=int, default=0, show_default=True, help="Of torch; 0 lets torch choose."),
        seed_option,
    ):
        command = option(command)
    return command


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
@click.option("--start", type=click.Path(path_type=Path), help="Checkpoint to go on from.")
@output_option
@data_root_option
@force_option
@as_json_option
def train(
    network: str, settings: Sequence[str], data: str, start: Path | None, output: Path, data_root: Path | None,
    force: bool, as_json: bool, **how: Any,
) -> None:  # fmt: skip
    """Train a dense checkpoint, or fine-tune one."""
    from memopt_export import console, training_commands
    from memopt_models.train import TrainSettings

    with console.training() as on_step:
        saved = training_commands.train(
            network, read_settings(settings), data, TrainSettings(**how), output,
            start=start, data_root=data_root, force=force, on_step=on_step,
        )  # fmt: skip
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
@output_option
@data_root_option
@force_option
@as_json_option
def prune(
    checkpoint: Path, network: str | None, data: str, output: Path, data_root: Path | None, force: bool,
    as_json: bool, **how: Any,
) -> None:  # fmt: skip
    """Make CHECKPOINT smaller, and fine-tune what is left (--epochs 0: not).

    Channels that depend on each other leave all tensors that have them (way "channels"), or, in networks whose graph
    is not understood, features between two layers (way "hidden"). --sparsity and --pattern set single weights to
    zero instead, which shrinks no tensor: compressed files get smaller, TensorRT gets faster with 2:4.
    """
    from memopt_export import console, training_commands

    settings = training_commands.pruning_settings(**how)
    with console.training() as on_step:
        saved = training_commands.prune(
            checkpoint, data, settings, output, network=network, data_root=data_root, force=force, on_step=on_step
        )  # fmt: skip
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
@output_option
@data_root_option
@force_option
@as_json_option
def distill(
    teacher: Path, network: str | None, student: str, settings: Sequence[str], temperature: float, alpha: float,
    data: str, output: Path, data_root: Path | None, force: bool, as_json: bool, **how: Any,
) -> None:  # fmt: skip
    """Train a small student from a teacher; the better of with and without the teacher is kept."""
    from memopt_export import console, training_commands
    from memopt_models.distill import DistillSettings
    from memopt_models.train import TrainSettings

    asked = DistillSettings(TrainSettings(**how), temperature=temperature, alpha=alpha)
    with console.training() as on_step:
        saved = training_commands.distill(
            teacher, student, read_settings(settings), data, asked, output,
            network=network, data_root=data_root, force=force, on_step=on_step,
        )  # fmt: skip
    console.show(saved, as_json=as_json)


@click.command(context_settings={"default_map": {"epochs": 3, "learning_rate": 1e-4}})
@click.argument("checkpoint", type=click.Path(path_type=Path))
@factory_option
@click.option("--precision", default="int8", show_default=True, help="To which the weights are rounded: int8.")
@click.option("--target", default="cpu", show_default=True, help="Who computes it: cpu (ONNX Runtime) or tensorrt.")
@training_data_option
@_training
@output_option
@data_root_option
@force_option
@as_json_option
def qat(
    checkpoint: Path, network: str | None, precision: str, target: str, data: str, output: Path,
    data_root: Path | None, force: bool, as_json: bool, **how: Any,
) -> None:  # fmt: skip
    """Train CHECKPOINT on, its weights and activations rounded as the deployed network rounds them.

    `memopt-export export` makes the rounded ONNX graph of the result: nothing is left to quantize.
    """
    from memopt_export import console, training_commands
    from memopt_models.qat import QatSettings
    from memopt_models.train import TrainSettings

    asked = QatSettings(TrainSettings(**how), precision=precision, target=target)
    with console.training() as on_step:
        saved = training_commands.qat(
            checkpoint, data, asked, output, network=network, data_root=data_root, force=force, on_step=on_step
        )  # fmt: skip
    console.show(saved, as_json=as_json)


COMMANDS = (train, prune, distill, qat)
