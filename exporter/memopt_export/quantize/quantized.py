"""What quantization returns."""

from __future__ import annotations

from dataclasses import dataclass

from memopt_export.calibrate import Ranges
from memopt_export.graph import Graph


@dataclass(frozen=True)
class Quantized:
    """A quantized graph and how it came about.

    `ranges` is None where no sample was looked at. `fused` counts the layers that ONNX Runtime computes in integers,
    and all of them; None where it is not the target. `kept_float` names the layers that stayed in float32; in
    float16 every node that did. `notes` say what the method saves, and where.
    """

    graph: Graph
    ranges: Ranges | None
    fused: tuple[int, int] | None
    kept_float: tuple[str, ...]
    notes: tuple[str, ...] = ()
