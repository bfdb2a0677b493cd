"""A recipe: which precision, for which target, made how. Its name and its TOML are written and read here alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from memopt.errors import InputRefused, IntegrityError, UsageError, first_line
from memopt.files import write_atomically
from memopt.strict_json import from_plain, nearest_field
from memopt_export.means import UNLIMITED

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int8-dynamic", "int8-weights", "int4-weights", "fp8")
TARGETS = ("cpu", "tensorrt")
CALIBRATIONS = ("mse", "minmax", "percentile", "entropy")
CORRECTIONS = ("gptq", "bias", "none")
# Precisions whose graph depends on the target.
_TARGETED = frozenset({"int8", "int8-dynamic", "int8-weights", "int4-weights"})
# Weights that may share a scale; 0: a whole channel.
GROUP_SIZES = (0, 16, 32, 64, 128, 256)
# Precisions for which a recipe known by name alone has groups: 4 bits are too few for a whole channel.
_GROUP_SIZE = {"int4-weights": 32}


@dataclass(frozen=True)
class Recipe:
    """How a graph is quantized.

    Attributes:
        precision: one of PRECISIONS.
        target: who computes it. "cpu" (ONNX Runtime: unsigned asymmetric activations) or "tensorrt" (signed symmetric
            ones) decides where Q/DQ stand and which integers they use; it means nothing for floating-point precisions.
        calibration: how a tensor's range follows from its values on the samples, one of CALIBRATIONS.
        percentile: of the values that "percentile" keeps within the range, 50 to 100.
        correction: what is done about the error of rounded weights: "bias" shifts each channel's mean back, "gptq"
            rounds each weight so that it makes up for the ones before, and shifts too; "none" rounds to nearest.
        equalize: whether channels are first brought to similar ranges and to the middle of them, and narrow tensors are
            stored twice; the float graph computes the same.
        weight_bits: of integer layers: 8, or 7 for CPUs without VNNI, whose 16-bit sums saturate.
        exclude: names of nodes, or operators, that stay float.
        include: names of layers, or operators; where there are any, all other layers stay float.
        group_size: of weight-only precisions: inputs that share a scale, one of GROUP_SIZES; 0 is a whole channel, or
            what comes nearest to it where the target's kernels know blocks only.
        convert_io: of fp16 and bf16: whether the graph's own inputs and outputs become halves too.
    """

    precision: str
    target: str = "cpu"
    calibration: str = "mse"
    percentile: float = 99.999
    correction: str = "gptq"
    equalize: bool = True
    weight_bits: int = 8
    exclude: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    group_size: int = 0
    convert_io: bool = False

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise UsageError(f"{name} {getattr(self, name)!r} is not known", hint="one of " + ", ".join(known))
        if self.precision == "int8-dynamic" and self.target != "cpu":
            raise UsageError(
                f"int8-dynamic has no form for {self.target}", hint="--target cpu, or --precision int8-weights"
            )
        if self.precision == "fp8" and self.target != "tensorrt":
            raise UsageError(f"fp8 has no kernels on {self.target}", hint="--target tensorrt, for GPUs from sm89 on")
        if not 50 <= self.percentile <= 100:
            raise UsageError(f"percentile is {self.percentile:g}", hint="50 to 100, such as 99.999")
        if self.group_size not in GROUP_SIZES:
            raise UsageError(f"group_size is {self.group_size}", hint="one of " + ", ".join(map(str, GROUP_SIZES)))
        if self.weight_bits not in (7, 8):
            raise UsageError(f"weight_bits is {self.weight_bits}", hint="8, or 7 for CPUs without VNNI")

    @property
    def name(self) -> str:
        """The name by which variants carry it.

        >>> Recipe("int8").name, Recipe("int8", "tensorrt").name, Recipe("fp16", "tensorrt").name
        ('int8', 'int8-tensorrt', 'fp16')
        """
        return (
            f"{self.precision}-tensorrt"
            if self.target == "tensorrt" and self.precision in _TARGETED
            else self.precision
        )

    @property
    def form(self) -> str:
        """Where Q/DQ stand and what they make: "cpu", "tensorrt" or "fp8"."""
        return "fp8" if self.precision == "fp8" else self.target

    def text(self) -> str:
        """What it asks for, in words; of the rest, what is as by default is left out.

        >>> Recipe("int8", weight_bits=7, exclude=("stem", "Gemm")).text(), Recipe("fp16").text()
        ('int8 for cpu, mse, gptq, weight_bits 7, exclude stem Gemm', 'fp16')
        """
        said = [f"{self.precision} for {self.target}" if self.precision in _TARGETED else self.precision]
        said += [self.calibration, self.correction] if self.precision in ("int8", "fp8") else []
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("precision", "target", "calibration", "correction") and value != field.default:
                said.append(f"{field.name} {' '.join(value) if isinstance(value, tuple) else value}")
        return ", ".join(said)

    def excludes(self, name: str, operator: str) -> bool:
        """Whether the node of this name and operator stays float in any case."""
        return name in self.exclude or operator in self.exclude

    def includes(self, name: str, operator: str) -> bool:
        """Whether the layer of this name and operator is one of those to change."""
        return not self.include or name in self.include or operator in self.include


_CHOICES = {"precision": PRECISIONS, "target": TARGETS, "calibration": CALIBRATIONS, "correction": CORRECTIONS}


def parse(name: str) -> Recipe:
    """The recipe with this name and all else by default; UsageError for an unknown one.

    >>> parse("int8-tensorrt").target, parse("int8").target
    ('tensorrt', 'cpu')
    """
    precision = name.removesuffix("-tensorrt")
    target = "cpu" if precision == name != "fp8" else "tensorrt"
    return Recipe(precision, target, group_size=default_group_size(precision))


def default_group_size(precision: str) -> int:
    """The group size where nobody chose one.

    >>> default_group_size("int4-weights"), default_group_size("int8-weights")
    (32, 0)
    """
    return _GROUP_SIZE.get(precision, 0)


@dataclass(frozen=True)
class RecipeFile:
    """What a recipe file (TOML) says: the recipe, and how the samples for it are drawn and run.

    Attributes:
        recipe: see there; its fields are keys of the file like the others.
        data: SPEC of the samples; None: there are none, or the command line names them.
        samples: of the train split, how many calibrate.
        seed: with which they are drawn.
        batch_size: samples in one run. It decides in which order sums are rounded, and so the last bits of a range.
    """

    recipe: Recipe
    data: str | None = None
    samples: int = 256
    seed: int = 0
    batch_size: int = UNLIMITED.batch_size

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("seed", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} is {getattr(self, name)}", hint=f"at least {least}")

    def changed(self, given: Mapping[str, Any]) -> RecipeFile:
        """The same with other values, of the recipe or of the samples; what is None or empty was not given.

        >>> changed = RecipeFile(Recipe("int8")).changed({"samples": 64, "target": "tensorrt", "data": None})
        >>> changed.samples, changed.recipe.name
        (64, 'int8-tensorrt')
        """
        said = {name: value for name, value in given.items() if value is not None and value != ()}
        own = {name: said.pop(name) for name in _OWN_KEYS if name in said}
        return replace(self, recipe=replace(self.recipe, **said), **own)

    def to_toml(self) -> str:
        """The file, with what may stand in each place.

        Raises:
            UsageError: a name in it is no text, such as a path whose bytes are no UTF-8.
        """
        values = {**vars(self.recipe), **{name: getattr(self, name) for name in _OWN_KEYS}}
        lines = [_HEADER]
        for name, value in values.items():
            lines.append(f"# {_COMMENTS[name]}\n")
            lines.append(f'# {name} = "SPEC"\n\n' if value is None else f"{name} = {_toml(value)}\n\n")
        return "".join(lines).rstrip() + "\n"


# What a recipe file has besides the fields of the recipe.
_OWN_KEYS = tuple(field.name for field in fields(RecipeFile) if field.name != "recipe")
_HEADER = """\
# How memopt-export quantizes a graph. Edit it, then:
#   memopt-export quantize MODEL.onnx --recipe THIS.toml -o OUT.onnx
# A key that is left out has its default. An option on the command line goes before what stands here.

"""
_COMMENTS = {
    "precision": "One of " + ", ".join(name for name in PRECISIONS if name != "fp32") + ".",
    "target": "Who computes it: cpu (ONNX Runtime) or tensorrt.",
    "calibration": "How a range follows from the values seen: " + ", ".join(CALIBRATIONS) + ".",
    "percentile": 'Of the values that calibration "percentile" keeps within the range, 50 to 100.',
    "correction": "What makes up for rounded weights: " + ", ".join(CORRECTIONS) + ".",
    "equalize": "Whether channels are brought to similar ranges around zero first, narrow tensors twice.",
    "weight_bits": "Of integer layers: 8, or 7 for CPUs without VNNI.",
    "group_size": "Inputs that share a scale in weight-only precisions: "
    + ", ".join(map(str, GROUP_SIZES))
    + "; 0 is a whole channel.",
    "convert_io": "Whether fp16 and bf16 make halves of the graph's own inputs and outputs too.",
    "exclude": 'Nodes by name, or operators such as "MatMul", that stay float.',
    "include": "Layers by name, or operators; where there are any, all others stay float.",
    "data": "Where the samples come from. A file's path counts from where the command is typed.",
    "samples": "How many of the train split calibrate.",
    "seed": "With which they are drawn.",
    "batch_size": "Samples in one run.",
}


def read_recipe(path: Path) -> RecipeFile:
    """What the recipe file (TOML) at this path says.

    Raises:
        InputRefused: it cannot be read, or is not TOML.
        UsageError: an unknown key or an impossible value, named.
    """
    import tomllib

    try:
        plain = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputRefused(f"recipe {path} cannot be read: {first_line(error)}") from error
    except tomllib.TOMLDecodeError as error:
        raise InputRefused(f"{path} is not TOML: {error}") from error
    own = {name: plain.pop(name) for name in _OWN_KEYS if name in plain}
    plain = {"group_size": default_group_size(str(plain.get("precision")))} | plain
    try:
        return from_plain(RecipeFile, {"recipe": plain, **own}, where=str(path))
    except IntegrityError as error:
        problem = error.problem.replace(f"{path}.recipe", str(path), 1)
        raise UsageError(problem, hint=nearest_field(problem, Recipe, RecipeFile)) from error
    except UsageError as error:
        raise UsageError(f"{path}: {error.problem}", hint=error.hint) from error


def save_recipe(file: RecipeFile, path: Path, *, force: bool = False) -> None:
    """Writes the recipe file, atomically."""
    write_atomically(path, file.to_toml().encode(), force=force)


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return _toml_text(value)
    if isinstance(value, tuple):
        return "[\n" + "".join(f"  {_toml(item)},\n" for item in value) + "]" if value else "[]"
    return repr(value)


def _toml_text(text: str) -> str:
    """A basic string of TOML: quotes, backslashes and control characters escaped."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{text!r} cannot stand in a TOML file", hint="a name in UTF-8") from error
    escaped = (f"\\u{ord(c):04x}" if ord(c) < 0x20 or ord(c) == 0x7F else f"\\{c}" if c in '"\\' else c for c in text)
    return '"' + "".join(escaped) + '"'
