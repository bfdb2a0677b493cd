"""A recipe: which precision, for which target, made how. Its name and its TOML are written and read here alone."""

from __future__ import annotations

from dataclasses import dataclass

from memopt.errors import UsageError

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int8-dynamic", "int8-weights", "int4-weights")
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
    target = "cpu" if precision == name else "tensorrt"
    return Recipe(precision, target, group_size=default_group_size(precision))


def default_group_size(precision: str) -> int:
    """The group size where nobody chose one.

    >>> default_group_size("int4-weights"), default_group_size("int8-weights")
    (32, 0)
    """
    return _GROUP_SIZE.get(precision, 0)
