"""From a checkpoint to a graph, with the proof that both compute the same."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from memopt.accuracy import agreement, max_difference
from memopt.errors import AnswerIsNo, InputRefused, first_line
from memopt.strict_json import to_json
from memopt.tensors import Array, TensorSpec, show_shape
from memopt.torch_runtime import SPECS
from memopt_export import compact as compacting
from memopt_export import grids
from memopt_export.graph import Graph, run_graph
from memopt_export.provenance import Provenance
from memopt_export.recipe import Recipe
from memopt_export.simplify import simplify
from memopt_export.views import graph_seen_from
from memopt_models import pt2e, ste
from memopt_models.checkpoint import Checkpoint
from memopt_models.qat import deployed, views_of
from memopt_models.trace import quiet, trace
from memopt_models.views import check_views, seen_from

if TYPE_CHECKING:
    import torch

OPSET = 21
PARITY_SAMPLES = 64  # as many as prove parity, unless told otherwise
# Two float32 programs for the same network differ by rounding; ten times what is seen on our networks.
RELATIVE_TOLERANCE = 1e-4
# Where activations are rounded to 8 bits, a difference in the last bit moves a few of them by a whole step.
ROUNDED_TOLERANCE = 0.05


@dataclass(frozen=True)
class Parity:
    """How far the graph's outputs are from torch's on real samples."""

    samples: int
    max_difference: float
    largest_output: float
    agreement: (
        float | None
    )  # share of samples with the same top class; None for outputs that are not (samples, classes)
    # Root of the mean square of the differences, as a share of that of torch's outputs; None where no activation is
    # rounded, and the largest difference counts.
    noise: float | None = None

    @property
    def holds(self) -> bool:
        """Whether the difference is rounding; outputs that are not finite never agree."""
        if self.noise is not None:
            return self.noise <= ROUNDED_TOLERANCE
        return self.max_difference <= RELATIVE_TOLERANCE * max(self.largest_output, 1.0) < math.inf


@dataclass(frozen=True)
class Exported:
    """A graph with its proof, and the exported program (`.pt2`) that torch itself runs."""

    graph: Graph
    parity: Parity
    program: bytes


def export(checkpoint: Checkpoint, samples: Array, *, compact: bool = False, views: int | None = None) -> Exported:
    """The checkpoint as an ONNX graph with a free batch dimension.

    Args:
        checkpoint: what to export.
        samples: real inputs, (samples, ...), at least two; parity is proved on them.
        compact: whether the graph is brought to few bytes, see `compact.compact`.
        views: places that every picture is seen from; None: from as many as it was trained for.

    Raises:
        InputRefused: torch cannot export the network, or there are no samples.
        AnswerIsNo: the graph's outputs are not torch's.
    """
    import torch

    if len(samples) < 2:
        raise InputRefused("parity is proved on at least two samples", hint="--data SPEC")
    if views is None:
        views = views_of(checkpoint)
    check_views(views)
    module = deployed(checkpoint)
    whole = seen_from(module, views)
    inputs = torch.from_numpy(np.ascontiguousarray(samples))
    try:
        with torch.inference_mode():
            expected = whole(inputs)
    except (RuntimeError, ValueError, TypeError) as error:
        shape = show_shape(inputs.shape)
        raise InputRefused(f"{checkpoint.network} cannot run on {shape}: {first_line(error)}") from error
    if not isinstance(expected, torch.Tensor):
        raise InputRefused(f"{checkpoint.network} returns {type(expected).__name__}, one tensor is expected")
    with quiet():
        program = trace(module, inputs[:2], checkpoint.network)
        graph = simplify(_to_graph(program, inputs[:2], checkpoint))
    method = checkpoint.quantization.get("method")
    if method is not None:
        graph = _ROUNDED[method](graph, checkpoint, module)
    if views > 1:
        graph = graph_seen_from(graph, views)
        with quiet():
            program = trace(whole, inputs[:2], checkpoint.network)
    if compact:
        graph = compacting.compact(graph)
    parity = prove_parity(graph, samples, expected.numpy(), rounded=method == pt2e.METHOD)
    if not parity.holds:
        raise AnswerIsNo(f"the graph differs from torch by {parity.max_difference:.3g} on {parity.samples} samples")
    if method == pt2e.METHOD:
        with quiet():
            program = pt2e.without_torchao(program)
    return Exported(graph, parity, serialize(program, graph))


def draft(checkpoint: Checkpoint) -> Graph:
    """The checkpoint as a graph whose outputs nobody has compared with torch's: for plans, not to be run.

    Raises:
        InputRefused: torch cannot export the network.
    """
    import torch

    example = torch.zeros(checkpoint.inputs[0].at_batch(2))
    with quiet():
        program = trace(checkpoint.module(), example, checkpoint.network)
        return simplify(_to_graph(program, example, checkpoint))


def prove_parity(graph: Graph, samples: Array, expected: Array, *, rounded: bool = False) -> Parity:
    """The graph's outputs in ONNX Runtime, unoptimized, against torch's; `rounded`: it has activations in 8 bits."""
    (got,) = run_graph(graph, {graph.inputs[0].name: samples}, optimized=False)
    return Parity(
        samples=len(samples),
        max_difference=max_difference(got, expected),
        largest_output=float(np.abs(expected).max()),
        agreement=agreement(got, expected) if got.ndim == 2 else None,
        noise=_share(got - expected, expected) if rounded else None,
    )


def _share(differences: Array, values: Array) -> float:
    squares = [float((np.asarray(array, np.float64) ** 2).mean()) for array in (differences, values)]
    return math.sqrt(squares[0] / squares[1]) if squares[1] else math.inf


def _to_graph(program: torch.export.ExportedProgram, example: torch.Tensor, checkpoint: Checkpoint) -> Graph:
    import torch

    converted = torch.onnx.export(
        program.run_decompositions({torch.ops.aten.adaptive_avg_pool2d.default: _pool}),
        (example,),
        dynamo=True,
        opset_version=OPSET,
        input_names=[checkpoint.inputs[0].name],
        output_names=["logits"],
        verbose=False,
    )
    if converted is None:
        raise InputRefused(f"torch.onnx could not convert {checkpoint.network}")
    return Graph(converted.model_proto, checkpoint.sha256, preprocess=checkpoint.preprocess)


def _pool(x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Adaptive average pooling, a plain mean where it pools everything.

    torch's own decomposition restores the memory format with as_strided, which becomes a dozen index nodes in ONNX for
    pictures with one channel, whose format is ambiguous.
    """
    import torch

    if list(size) == [1, 1]:
        return x.mean((-2, -1), keepdim=True)
    pooled: torch.Tensor = torch.ops.aten._adaptive_avg_pool2d(x, size)
    return pooled


def _named_int8(graph: Graph, checkpoint: Checkpoint, _module: torch.nn.Module) -> Graph:
    """The graph, which knows what it is."""
    recipe = Recipe("int8", str(checkpoint.quantization.get("target")))
    named = graph.with_model(graph.model, precision=recipe.name)
    return replace(named, quantization=Provenance(recipe, trained=True))


# By method: what makes a graph of the network that was traced a graph of the network that was trained to be rounded.
_ROUNDED: dict[str, Callable[[Graph, Checkpoint, torch.nn.Module], Graph]] = {
    pt2e.METHOD: _named_int8,
    ste.METHOD: grids.store_integers,
}


def serialize(program: torch.export.ExportedProgram, graph: Graph) -> bytes:
    """The `.pt2` archive, without example inputs, with the names that `memopt.torch_runtime` reads."""
    import torch

    specs: dict[str, tuple[TensorSpec, ...]] = {"inputs": graph.inputs, "outputs": graph.outputs}
    program.example_inputs = None
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={SPECS: to_json(specs)})
    return buffer.getvalue()
