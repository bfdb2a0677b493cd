"""Weights and activations in floats of 8 bits (E4M3) for TensorRT, with ranges calibrated on samples."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from memopt.sizes import show_size
from memopt_export.graph import Graph
from memopt_export.means import Means
from memopt_export.quantize import static_int8
from memopt_export.quantize.quantized import Quantized
from memopt_export.recipe import Recipe

if TYPE_CHECKING:
    from memopt_models.data import Pictures, Samples


def quantize(graph: Graph, recipe: Recipe, samples: Samples | Pictures | None, means: Means) -> Quantized:
    """The graph with Q/DQ where TensorRT wants them for int8, to float8e4m3fn and back.

    Raises:
        UsageError, InputRefused: as by static int8.
    """
    done = static_int8.quantize(graph, recipe, samples, means)
    small, large = (show_size(sum(each.weights_bytes().values())) for each in (done.graph, graph))
    notes = (
        f"weights take {small} instead of {large}, in the file and in an engine, which needs a GPU from sm89 on",
        "an engine of TensorRT-RTX plans no less memory for activations than fp32; read what `engine` reports",
    )
    return replace(done, notes=notes)
