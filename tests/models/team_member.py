"""One of the processes of test_team.py: it goes through all the cases, and the first one saves what came out."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from memopt_models.checkpoint import Checkpoint, save_checkpoint
from memopt_models.data import DataSet, open_data
from memopt_models.resume import Keep
from memopt_models.team import ALONE, Team, joined
from memopt_models.train import Progress, TrainSettings, train


@dataclass(frozen=True)
class Case:
    """A training, and after which epoch it is cut off."""

    how: TrainSettings
    parallel: str = "ddp"
    network: str = "simple_cnn"
    stop_after: int | None = None


ONE = TrainSettings(epochs=1, batch_size=32, learning_rate=1e-2, threads=1)  # 129 samples: 4 batches of 26, one of 25
LONG = replace(ONE, epochs=2, schedule="onecycle", optimizer="sgd")
CASES = {
    "ddp": Case(ONE),
    "ddp-moved-in-parts": Case(replace(ONE, shift=2, accumulate=3, optimizer="adamw")),
    "ddp-in-single-samples": Case(replace(ONE, batch_size=9, accumulate=5, optimizer="sgd")),
    "fsdp2": Case(ONE, "fsdp2"),
    "fsdp2-in-single-samples": Case(replace(ONE, batch_size=9, accumulate=5, optimizer="sgd"), "fsdp2"),
    "fsdp2-moved-in-parts": Case(replace(LONG, shift=2, accumulate=2), "fsdp2"),
    "fsdp2-checkpointing": Case(replace(ONE, checkpointing="blocks"), "fsdp2"),
    "ddp-batchnorm": Case(replace(ONE, precision="bf16"), network="ds_cnn"),
    "ddp-cut-off": Case(LONG, stop_after=1),
    "fsdp2-cut-off": Case(replace(LONG, optimizer="adam"), "fsdp2", stop_after=1),
    "ddp-gone-on": Case(LONG),  # what one process has begun, two go on with
    "fsdp2-gone-on": Case(replace(LONG, optimizer="adam"), "fsdp2"),
}
SETTINGS = {"simple_cnn": {"channels": (2, 4), "hidden": 8}, "ds_cnn": {"width": 4, "depth": 2}}


class CutOffError(Exception):
    """The training is over before its end."""


def few_digits() -> DataSet:
    """Sizes that two processes cannot divide evenly."""
    digits, sizes = open_data("digits"), {"train": 129, "validation": 63, "test": 8}
    return replace(digits, **{name: split.pick(slice(sizes[name])) for name, split in digits.splits.items()})


def run(
    name: str, data: DataSet, folder: Path, team: Team = ALONE, *, say: Callable[[str], None] = lambda text: None
) -> Checkpoint | None:
    """The checkpoint of a case; None where it was cut off. What it keeps lies in the folder."""
    case = CASES[name]

    def on_step(progress: Progress) -> None:
        if progress.note:
            say(progress.note)
        if case.stop_after is not None and progress.epoch > case.stop_after:
            raise CutOffError

    keep = Keep(folder / f"{name}.safetensors")
    try:
        return train(
            case.network, SETTINGS[case.network], data, case.how,
            on_step=on_step, keep=keep, team=replace(team, parallel=case.parallel),
        )  # fmt: skip
    except CutOffError:
        return None


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    data = few_digits()
    with joined(Team(rank, 2), meeting=f"file://{folder}/meeting") as team:
        for name in CASES:
            made = run(name, data, folder, team)
            if made is not None and team.is_first:
                save_checkpoint(made, folder / f"{name}.safetensors")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
