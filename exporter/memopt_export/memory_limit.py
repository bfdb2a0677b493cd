"""What a quantization will hold in memory, told first; made to fit a limit; and the limit kept by the kernel."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from memopt.errors import OutOfResource
from memopt.memory import capped, settled_resident
from memopt.sizes import show_size
from memopt_export import correct
from memopt_export.calibrate import SMALLEST_RUN, run_size, sample_bytes
from memopt_export.graph import Graph, attribute, wire
from memopt_export.means import Means
from memopt_export.placement import place
from memopt_export.recipe import Recipe

if TYPE_CHECKING:
    from memopt_models.data import Pictures, Samples

MIB = 2**20
# Measured on resnet18, mobilenet_v2 and vit_b_16; what is held at the same time, in copies.
_GRAPH_COPIES = 4  # simplified, equalized, being changed, and quantized
_PIECE_COPIES = 4  # a piece as it is written, as it is parsed, and the session's own weights, packed and not
_RUN_COPIES = 2  # a run's tensors, and what is counted or stored of them
_LAYER_COPIES = 10  # a layer's weights in float64, rounded, their errors
_MOMENT_COPIES = 4  # float64: sums, damped, ordered, factor
_ROW_COPIES, _OUTPUT_COPIES = 2, 8  # of the compared rows: as they are collected; what an activation makes of them
_THREADS_BYTES = 32 * MIB  # stacks and heaps of the library's threads


@dataclass(frozen=True)
class Need:
    """What a quantization holds at its peak, in bytes, beyond what the process holds when it begins."""

    weights_bytes: int  # copies of the graph
    piece_bytes: int  # of the largest piece of the graph that is run
    run_bytes: int  # of one run's tensors
    layer_bytes: int  # of choosing the weights of the largest layer

    @property
    def total_bytes(self) -> int:
        """The peak: pieces run, or a layer's weights are chosen, not both at once."""
        return self.weights_bytes + max(self.piece_bytes + self.run_bytes, self.layer_bytes) + _THREADS_BYTES

    def text(self) -> str:
        """For people, before the work begins."""
        return (
            f"at most {show_size(self.total_bytes)} more memory: copies of the graph {show_size(self.weights_bytes)}, "
            f"a piece being run {show_size(self.piece_bytes)}, its tensors {show_size(self.run_bytes)}; or choosing a "
            f"layer's weights {show_size(self.layer_bytes)}"
        )


def estimate(graph: Graph, recipe: Recipe, samples: Samples | Pictures | None, means: Means) -> Need:
    """What the quantization will hold at its peak. Nothing is run."""
    weights = sum(graph.weights_bytes().values())
    if samples is None:
        return Need(_GRAPH_COPIES * weights, 0, 0, 0)
    layers = _layers(graph, recipe)
    largest = max((layer.weights for layer in layers), default=0)
    piece = weights if means.piece_bytes is None else min(weights, max(means.piece_bytes, largest))
    each = sample_bytes(graph)
    batch = max(SMALLEST_RUN, min(means.batch_size, run_size(graph, means.run_bytes)))
    chosen = max((layer.bytes(recipe) for layer in layers), default=0)
    return Need(_GRAPH_COPIES * weights, _PIECE_COPIES * piece, _RUN_COPIES * batch * each, chosen)


def fit(graph: Graph, recipe: Recipe, samples: Samples | Pictures | None, means: Means, limit_bytes: int) -> Means:
    """Means by which the quantization stays within what is left of the limit on the whole process.

    The graph is cut into pieces, and fewer samples run at once. Ranges do not depend on either.

    Raises:
        OutOfResource: not even the smallest pieces and runs fit; the hint says what would.
    """
    held = settled_resident()
    for run_bytes in (means.run_bytes, 64 * MIB, 32 * MIB, 16 * MIB, 8 * MIB, 0):
        for piece_bytes in (means.piece_bytes, 64 * MIB, 16 * MIB, 4 * MIB, 0):
            tried = replace(means, run_bytes=min(run_bytes, means.run_bytes), piece_bytes=piece_bytes)
            need = estimate(graph, recipe, samples, tried)
            if held + need.total_bytes <= limit_bytes:
                return tried
    least = held + need.total_bytes
    raise OutOfResource(
        f"the limit is {show_size(limit_bytes)}; the process holds {show_size(held)} and needs {need.text()}",
        hint=f"--memory-limit {-(-least // MIB)}MiB",
    )


@contextmanager
def hard_cap(limit_bytes: int) -> Iterator[None]:
    """Lets this process have no more private memory than leaves it within the limit: the kernel refuses the rest.

    Raises:
        OutOfResource: something needed more.
    """
    from google.protobuf.message import EncodeError

    try:
        with capped(limit_bytes):
            yield
    except (MemoryError, EncodeError) as error:  # protobuf has no other word for it
        raise OutOfResource(
            f"more than {show_size(limit_bytes)} were needed", hint=f"--memory-limit {2 * limit_bytes // MIB}MiB"
        ) from error


@dataclass(frozen=True)
class _Layer:
    """What choosing a layer's weights works with, in bytes."""

    weights: int
    moments: int  # of its inputs
    rows: int  # of inputs and outputs that are compared

    def bytes(self, recipe: Recipe) -> int:
        if recipe.correction == "none":
            return 2 * self.weights
        moments = _MOMENT_COPIES * self.moments if recipe.correction == "gptq" else 0
        return _LAYER_COPIES * self.weights + self.rows + moments


def _layers(graph: Graph, recipe: Recipe) -> list[_Layer]:
    if recipe.precision not in ("int8", "fp8"):
        return []
    wiring = wire(graph.model)
    found = []
    for layer in place(graph, recipe).layers:
        node = wiring.nodes[layer.index]
        dims = wiring.initializers[node.input[1]].dims
        outputs = dims[layer.axis]
        inputs = math.prod(dims) // outputs
        groups = attribute(node, "group", 1) if node.op_type == "Conv" else 1
        parts = correct.parts_of(inputs) or 1
        rows = correct.compared_rows(groups * inputs)
        compared = 4 * rows * (_ROW_COPIES * groups * inputs + _OUTPUT_COPIES * outputs)
        found.append(_Layer(4 * math.prod(dims), 8 * groups * parts * (inputs // parts) ** 2, compared))
    return found
