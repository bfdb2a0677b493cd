"""A job: what a recipe file (TOML) asks the pipeline to do, checked before anything runs."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from memopt.archive import is_safe_name
from memopt.errors import InputRefused, IntegrityError, UsageError
from memopt.runtimes import runtime
from memopt.strict_json import from_plain, nearest_field
from memopt_export.recipe import Recipe, parse
from memopt_export.tensorrt_engine import EngineSettings
from memopt_models.distill import DistillSettings
from memopt_models.networks import find_factory
from memopt_models.prune import PruneSettings
from memopt_models.prune_apart import Limits
from memopt_models.targets import Target
from memopt_models.train import TrainSettings


@dataclass(frozen=True)
class TrainJob:
    """The dense network and how it is trained."""

    network: str
    how: TrainSettings
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DistillJob:
    """The student and how it learns from the dense network."""

    network: str
    how: DistillSettings
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class QuantizeJob:
    """Which precisions every network is brought to, and how many training samples calibrate them."""

    recipes: tuple[str, ...] = ("fp16", "int8")
    samples: int = 256
    seed: int = 0  # of the draw of the samples

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UsageError(f"quantize.samples is {self.samples}, at least 1 is needed")
        names = [recipe.name for recipe in self.parsed]
        if "fp32" in names or len(set(names)) < len(names):
            raise UsageError(f"quantize.recipes is {list(self.recipes)}", hint="each once, and fp32 comes by itself")

    @property
    def parsed(self) -> tuple[Recipe, ...]:
        """The recipes as values; UsageError for an unknown one."""
        return tuple(parse(name) for name in self.recipes)


@dataclass(frozen=True)
class EngineJob:
    """Which graphs become TensorRT engines, and how they are built."""

    how: EngineSettings
    precisions: tuple[str, ...] = ("fp32", "fp16")

    def __post_init__(self) -> None:
        for name in self.precisions:
            parse(name)


@dataclass(frozen=True)
class CompareJob:
    """Which batches are measured, on which runtimes; none named means all."""

    batches: tuple[int, ...] = (1, 32)
    runtimes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.batches or min(self.batches) < 1:
            raise UsageError(f"compare.batches is {list(self.batches)}", hint="[1, 32]")
        for name in self.runtimes:
            runtime(name)


@dataclass(frozen=True)
class Job:
    """Everything between the data and the report. Sections that are left out are not done."""

    name: str
    data: str
    train: TrainJob
    prune: PruneSettings | None = None
    distill: DistillJob | None = None
    quantize: QuantizeJob = QuantizeJob()
    engine: tuple[EngineJob, ...] = ()
    compare: CompareJob = CompareJob()
    license: str | None = None

    def __post_init__(self) -> None:
        if not is_safe_name(self.name) or "/" in self.name:
            raise UsageError(f"the job's name is {self.name!r}", hint="letters, digits, . _ and -, as it names files")
        flavors = [each.how.flavor for each in self.engine]
        if len(set(flavors)) < len(flavors):
            raise UsageError(f"engines are asked for in {flavors}", hint="one [[engine]] for each flavor")
        for network in (self.train.network, *((self.distill.network,) if self.distill else ())):
            find_factory(network)


# The dataclasses whose fields are a recipe file's keys.
_SECTIONS = (
    Job, TrainJob, DistillJob, QuantizeJob, EngineJob, CompareJob, TrainSettings, DistillSettings, PruneSettings,
    Target, Limits, EngineSettings,
)  # fmt: skip


def read_job(recipe: str) -> Job:
    """The job in the recipe of this name that memopt ships, or in the TOML file at this path.

    Raises:
        InputRefused: no such file, or not TOML.
        UsageError: an unknown key or an impossible value, named.
    """
    text, where = _read_text(recipe)
    try:
        plain = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputRefused(f"{where} is not TOML: {error}") from error
    try:
        return from_plain(Job, plain, where=where)
    except IntegrityError as error:
        raise UsageError(error.problem, hint=nearest_field(error.problem, *_SECTIONS)) from error


def shipped() -> list[str]:
    """The names of the recipes that memopt ships."""
    folder = resources.files("memopt_export") / "recipes"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def _read_text(recipe: str) -> tuple[str, str]:
    if recipe in shipped():
        name = f"{recipe}.toml"
        return (resources.files("memopt_export") / "recipes" / name).read_text(), name
    path = Path(recipe)
    if not path.is_file():
        raise InputRefused(f"recipe {recipe!r} is no file", hint="one of " + ", ".join(shipped()) + ", or a TOML file")
    try:
        return path.read_text(), str(path)
    except (OSError, UnicodeDecodeError) as error:
        raise InputRefused(f"{recipe} cannot be read: {error}") from error
