"""int8 weights and activations, with ranges calibrated on samples (W8A8)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memopt.errors import InputRefused, UsageError
from memopt_export.calibrate import Ranges, batches_for, calibrate, count, cuts, narrow
from memopt_export.correct import choose_weights
from memopt_export.graph import Graph
from memopt_export.means import Means
from memopt_export.opset import PER_CHANNEL, at_least_opset
from memopt_export.placement import Placement, place
from memopt_export.qdq import FORMATS, fused_counts, insert
from memopt_export.quantize.quantized import Quantized
from memopt_export.recipe import Recipe

if TYPE_CHECKING:
    from memopt_models.data import Pictures, Samples


def quantize(graph: Graph, recipe: Recipe, samples: Samples | None, means: Means) -> Quantized:
    """The graph with int8 layers for the recipe's target.

    Raises:
        UsageError: there are no samples to calibrate on.
        InputRefused: nothing can be quantized, or calibration refuses the samples.
    """
    if samples is None:
        raise UsageError("static int8 needs samples to calibrate on", hint="--data SPEC")
    graph = at_least_opset(graph, PER_CHANNEL)
    placement = place(graph, recipe)
    if not placement.layers:
        raise InputRefused("the graph has no Conv, Gemm or MatMul that int8 could serve", hint="--precision fp16")
    ranges = _ranges(graph, placement, samples, recipe, means)
    chosen = choose_weights(graph, placement, ranges, batches_for(graph, samples, means.batch_size), recipe, means)
    quantized = insert(graph, placement, ranges, chosen)
    quantized = quantized.with_model(quantized.model, precision=recipe.name)
    fused = fused_counts(quantized.data) if recipe.target == "cpu" else None
    return Quantized(quantized, ranges, fused, placement.kept_float)


def _ranges(graph: Graph, placement: Placement, samples: Samples | Pictures, recipe: Recipe, means: Means) -> Ranges:
    """The range of every quantized tensor, as the recipe's calibration chooses it."""
    ranges = calibrate(graph, placement.tensors, samples, means)
    if recipe.calibration == "minmax":
        return ranges
    histograms = count(graph, ranges, batches_for(graph, samples, means.batch_size), cuts=cuts(graph, means))
    return narrow(ranges, histograms, recipe, FORMATS[placement.target].activations)
