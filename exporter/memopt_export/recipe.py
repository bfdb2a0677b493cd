"""A recipe: which precision, for which target. Its name is written and read here and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass

from memopt.errors import UsageError

PRECISIONS = ("fp32", "fp16", "int8")
TARGETS = ("cpu", "tensorrt")


@dataclass(frozen=True)
class Recipe:
    """How a graph is quantized.

    `target` decides where Q/DQ stand and which integers they use: "cpu" (ONNX Runtime: unsigned asymmetric activations)
    or "tensorrt" (signed symmetric ones). It means nothing for floating-point precisions.
    """

    precision: str
    target: str = "cpu"

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise UsageError(f"precision {self.precision!r} is not known", hint="one of " + ", ".join(PRECISIONS))
        if self.target not in TARGETS:
            raise UsageError(f"target {self.target!r} is not known", hint="one of " + ", ".join(TARGETS))

    @property
    def name(self) -> str:
        """The name by which variants carry it.

        >>> Recipe("int8").name, Recipe("int8", "tensorrt").name, Recipe("fp16", "tensorrt").name
        ('int8', 'int8-tensorrt', 'fp16')
        """
        return (
            f"{self.precision}-{self.target}"
            if (self.precision, self.target) == ("int8", "tensorrt")
            else self.precision
        )


def parse(name: str) -> Recipe:
    """The recipe with this name; UsageError for an unknown one.

    >>> parse("int8-tensorrt")
    Recipe(precision='int8', target='tensorrt')
    """
    precision, _, target = name.partition("-")
    return Recipe(precision, target or "cpu")
