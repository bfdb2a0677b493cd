"""int8 weights and activations, with ranges calibrated on samples (W8A8)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from memopt.errors import AnswerIsNo, UsageError
from memopt_export.calibrate import Ranges, batches_for, calibrate, count, cuts, narrow
from memopt_export.correct import choose_weights
from memopt_export.equalize import equalize
from memopt_export.execution import fused_counts
from memopt_export.graph import Graph
from memopt_export.means import Means
from memopt_export.opset import FLOAT8, PER_CHANNEL, at_least_opset
from memopt_export.placement import place
from memopt_export.qdq import FORMATS, Stored, insert
from memopt_export.quantize.quantized import Quantized
from memopt_export.recipe import Recipe

if TYPE_CHECKING:
    from memopt_models.data import Pictures, Samples


@dataclass(frozen=True, eq=False)
class Prepared:
    """All that has been found out from the samples: the graph, equalized, the ranges, and what each layer stores."""

    graph: Graph
    ranges: Ranges
    stored: dict[int, Stored]

    def quantized(self, recipe: Recipe) -> Quantized:
        """The graph with int8 layers, those left out that the recipe keeps float."""
        graph = self.assembled(recipe)
        fused = fused_counts(graph.data) if recipe.target == "cpu" else None
        return Quantized(graph, self.ranges, fused, place(self.graph, recipe).kept_float)

    def assembled(self, recipe: Recipe) -> Graph:
        """The same graph, without a look at what ONNX Runtime makes of it."""
        graph = insert(self.graph, place(self.graph, recipe), self.ranges, self.stored)
        return graph.with_model(graph.model, precision=recipe.name)


def quantize(graph: Graph, recipe: Recipe, samples: Samples | Pictures | None, means: Means) -> Quantized:
    """The graph with int8 layers for the recipe's target.

    Raises:
        UsageError: there are no samples to calibrate on.
        AnswerIsNo: nothing can be quantized.
        InputRefused: calibration refuses the samples.
    """
    return prepare(graph, recipe, samples, means).quantized(recipe)


def prepare(graph: Graph, recipe: Recipe, samples: Samples | Pictures | None, means: Means) -> Prepared:
    """What `quantize` finds out before it writes the graph.

    Raises:
        UsageError, InputRefused: as by `quantize`.
    """
    if samples is None:
        raise UsageError("static int8 needs samples to calibrate on", hint="--data SPEC")
    graph = at_least_opset(graph, FLOAT8 if recipe.precision == "fp8" else PER_CHANNEL)
    placement = place(graph, recipe)
    if not placement.layers:
        raise AnswerIsNo(
            "the graph has no Conv, Gemm or MatMul that int8 could serve, so it stays float", hint="--precision fp16"
        )
    batches = batches_for(graph, samples, means)
    pieces = cuts(graph, means.piece_bytes)
    if recipe.equalize:
        graph = equalize(graph, placement, batches, cuts=pieces)
    ranges = calibrate(graph, placement.tensors, samples, means)
    if recipe.calibration != "minmax":
        histograms = count(graph, ranges, batches, cuts=pieces)
        ranges = narrow(ranges, histograms, recipe, FORMATS[placement.form].activations)
    return Prepared(graph, ranges, choose_weights(graph, placement, ranges, batches, recipe, means))
