"""From a float graph to a smaller one, by the method that the recipe names."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from memopt.errors import InputRefused, UsageError
from memopt_export.graph import Graph, is_quantized, label
from memopt_export.means import UNLIMITED, Means, Step
from memopt_export.provenance import provenance
from memopt_export.quantize import dynamic_int8, fp8, half, static_int8, weight_only
from memopt_export.quantize.quantized import Quantized
from memopt_export.recipe import Recipe
from memopt_export.simplify import simplify

if TYPE_CHECKING:
    from memopt_models.data import Pictures, Samples

__all__ = ["METHODS", "Means", "Quantized", "Step", "quantize", "to_quantize", "with_provenance"]

METHODS: dict[str, Callable[..., Quantized]] = {
    "fp16": half.convert,
    "bf16": half.convert,
    "int8": static_int8.quantize,
    "fp8": fp8.quantize,
    "int8-dynamic": dynamic_int8.quantize,
    "int8-weights": weight_only.quantize,
    "int4-weights": weight_only.quantize,
}


def quantize(graph: Graph, recipe: Recipe, samples: Samples | Pictures | None, means: Means = UNLIMITED) -> Quantized:
    """The graph in the recipe's precision, named after it; inputs and outputs stay, unless it converts them.

    Args:
        graph: a float32 graph; it is left untouched, and simplified first.
        recipe: what to make of it.
        samples: what to calibrate on. fp16 and bf16 do without, but then what leaves their range is not seen; weights
            alone and int8-dynamic need none.
        means: what the quantization may use, and whom to tell.

    Raises:
        UsageError: the recipe has no method, needs samples, or excludes or includes what is not there.
        InputRefused: the graph is not float32.
        AnswerIsNo: nothing in it can be quantized.
    """
    ready = to_quantize(graph, recipe)
    return with_provenance(METHODS[recipe.precision](ready, recipe, samples, means), recipe, samples)


def with_provenance(done: Quantized, recipe: Recipe, samples: Samples | Pictures | None) -> Quantized:
    """The same, with a graph that tells what quantized it; samples that nobody looked at are left out."""
    told = provenance(recipe, samples if done.ranges is not None else None)
    return replace(done, graph=replace(done.graph, quantization=told))


def to_quantize(graph: Graph, recipe: Recipe) -> Graph:
    """The graph as methods take it: simplified, after all that can be refused before a sample is looked at.

    Raises:
        UsageError, InputRefused: as by `quantize`.
    """
    if recipe.precision not in METHODS:
        raise UsageError(f"{recipe.precision} is not made by quantizing", hint="--precision " + "|".join(METHODS))
    _refuse_quantized(graph)
    graph = simplify(graph)
    _refuse_unknown(graph, recipe)
    return graph


def _refuse_quantized(graph: Graph) -> None:
    if graph.precision != "fp32" or is_quantized(graph.model):
        what = graph.precision if graph.precision != "fp32" else "quantized"
        raise InputRefused(f"the graph is already {what}", hint="start from the fp32 graph")


def _refuse_unknown(graph: Graph, recipe: Recipe) -> None:
    names = [label(node) for node in graph.model.graph.node]
    known = {*names, *(node.op_type for node in graph.model.graph.node)}
    for option, wanted in (("exclude", recipe.exclude), ("include", recipe.include)):
        for name in wanted:
            if name not in known:
                alike = difflib.get_close_matches(name, names, n=3, cutoff=0)
                raise UsageError(f"the graph has no node {name!r} to {option}", hint=f"--{option} {' or '.join(alike)}")
