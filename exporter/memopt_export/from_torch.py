"""From a checkpoint to a graph, with the proof that both compute the same."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from memopt.accuracy import agreement, max_difference
from memopt.errors import AnswerIsNo, InputRefused, first_line
from memopt.strict_json import to_json
from memopt.tensors import Array, TensorSpec, show_shape
from memopt.torch_runtime import SPECS
from memopt_export.graph import Graph, run_graph
from memopt_export.simplify import simplify
from memopt_models.checkpoint import Checkpoint

if TYPE_CHECKING:
    import torch

OPSET = 21
LARGEST_BATCH = 2**16
PARITY_SAMPLES = 64  # as many as prove parity, unless told otherwise
# Two float32 programs for the same network differ by rounding; ten times what is seen on our networks.
RELATIVE_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Parity:
    """How far the graph's outputs are from torch's on real samples."""

    samples: int
    max_difference: float
    largest_output: float
    agreement: (
        float | None
    )  # share of samples with the same top class; None for outputs that are not (samples, classes)

    @property
    def holds(self) -> bool:
        """Whether the difference is rounding; outputs that are not finite never agree."""
        return self.max_difference <= RELATIVE_TOLERANCE * max(self.largest_output, 1.0) < math.inf


@dataclass(frozen=True)
class Exported:
    """A graph with its proof, and the exported program (`.pt2`) that torch itself runs."""

    graph: Graph
    parity: Parity
    program: bytes


def export(checkpoint: Checkpoint, samples: Array) -> Exported:
    """The checkpoint as an ONNX graph with a free batch dimension.

    Args:
        checkpoint: what to export.
        samples: real inputs, (samples, ...), at least two; parity is proved on them.

    Raises:
        InputRefused: torch cannot export the network, or there are no samples.
        AnswerIsNo: the graph's outputs are not torch's.
    """
    import torch

    if len(samples) < 2:
        raise InputRefused("parity is proved on at least two samples", hint="--data SPEC")
    module = checkpoint.module()
    inputs = torch.from_numpy(np.ascontiguousarray(samples))
    try:
        with torch.inference_mode():
            expected = module(inputs)
    except (RuntimeError, ValueError, TypeError) as error:
        shape = show_shape(inputs.shape)
        raise InputRefused(f"{checkpoint.network} cannot run on {shape}: {first_line(error)}") from error
    if not isinstance(expected, torch.Tensor):
        raise InputRefused(f"{checkpoint.network} returns {type(expected).__name__}, one tensor is expected")
    with _quiet():
        program = _export_program(module, inputs[:2], checkpoint.network)
        graph = simplify(_to_graph(program, inputs[:2], checkpoint))
    parity = prove_parity(graph, samples, expected.numpy())
    if not parity.holds:
        raise AnswerIsNo(f"the graph differs from torch by {parity.max_difference:.3g} on {parity.samples} samples")
    return Exported(graph, parity, serialize(program, graph))


def prove_parity(graph: Graph, samples: Array, expected: Array) -> Parity:
    """The graph's outputs in ONNX Runtime, unoptimized, against torch's."""
    (got,) = run_graph(graph, {graph.inputs[0].name: samples}, optimized=False)
    return Parity(
        samples=len(samples),
        max_difference=max_difference(got, expected),
        largest_output=float(np.abs(expected).max()),
        agreement=agreement(got, expected) if got.ndim == 2 else None,
    )


def _export_program(module: torch.nn.Module, example: torch.Tensor, network: str) -> torch.export.ExportedProgram:
    import torch

    batch = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
    try:
        return torch.export.export(module, (example,), dynamic_shapes=({0: batch},))
    except (RuntimeError, ValueError, TypeError) as error:
        raise InputRefused(f"torch.export cannot trace {network}: {first_line(error)}") from error


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


def serialize(program: torch.export.ExportedProgram, graph: Graph) -> bytes:
    """The `.pt2` archive, without example inputs, with the names that `memopt.torch_runtime` reads."""
    import torch

    specs: dict[str, tuple[TensorSpec, ...]] = {"inputs": graph.inputs, "outputs": graph.outputs}
    program.example_inputs = None
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={SPECS: to_json(specs)})
    return buffer.getvalue()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporter's own log lines and deprecation warnings off the terminal."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
