"""From a float graph to a smaller one, by the method that the recipe names."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from memopt.errors import InputRefused, UsageError
from memopt_export.calibrate import OnStep
from memopt_export.graph import Graph, is_quantized, label, refuse_subgraphs
from memopt_export.quantize import float16, static_int8
from memopt_export.quantize.quantized import Quantized
from memopt_export.recipe import Recipe
from memopt_export.simplify import simplify

if TYPE_CHECKING:
    from memopt_models.data import Samples

__all__ = ["METHODS", "Quantized", "quantize"]

METHODS: dict[str, Callable[..., Quantized]] = {
    "fp16": float16.convert,
    "int8": static_int8.quantize,
}


def quantize(
    graph: Graph,
    recipe: Recipe,
    samples: Samples | None,
    *,
    batch_size: int = 8,
    exclude: Collection[str] = (),
    on_step: OnStep | None = None,
) -> Quantized:
    """The graph in the recipe's precision, named after the recipe; inputs and outputs stay as they are.

    Args:
        graph: a float32 graph; it is left untouched, and simplified first.
        recipe: what to make of it.
        samples: what to calibrate on. fp16 does without, but then an overflow is not seen.
        batch_size: samples in one calibration run, where the graph leaves it free.
        exclude: names of nodes to leave in float32.
        on_step: told the number of samples seen, after each calibration run.

    Raises:
        UsageError: the recipe has no method, needs samples, or `exclude` names no node.
        InputRefused: the graph is not float32, has subgraphs, or nothing in it can be quantized.
    """
    if recipe.precision not in METHODS:
        raise UsageError(f"{recipe.precision} is not made by quantizing", hint="--precision " + "|".join(METHODS))
    _refuse_quantized(graph)
    refuse_subgraphs(graph, "quantize")
    graph = simplify(graph)
    _refuse_unknown(exclude, graph)
    method = METHODS[recipe.precision]
    return method(graph, recipe, samples, batch_size=batch_size, exclude=exclude, on_step=on_step)


def _refuse_quantized(graph: Graph) -> None:
    if graph.precision != "fp32" or is_quantized(graph.model):
        what = graph.precision if graph.precision != "fp32" else "quantized"
        raise InputRefused(f"the graph is already {what}", hint="start from the fp32 graph")


def _refuse_unknown(exclude: Collection[str], graph: Graph) -> None:
    names = [label(node) for node in graph.model.graph.node]
    for name in exclude:
        if name not in names:
            alike = difflib.get_close_matches(name, names, n=3, cutoff=0)
            raise UsageError(f"the graph has no node {name!r} to exclude", hint=f"--exclude {' or '.join(alike)}")
