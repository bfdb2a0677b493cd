"""A graph's opset: the version of ONNX's operators that it is written in, raised where a method needs a newer one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memopt.errors import InputRefused, first_line
from memopt_export.graph import Graph

if TYPE_CHECKING:
    import onnx

# The first whose DequantizeLinear knows one scale for each channel.
PER_CHANNEL = 13
# The first whose DequantizeLinear knows blocks, and 4-bit integers.
BLOCKWISE = 21


def opset_of(model: onnx.ModelProto) -> int:
    """The version of ONNX's own operators; 0 where the model imports none."""
    return next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)


def at_least_opset(graph: Graph, opset: int) -> Graph:
    """The graph in that opset, where its own is older.

    Raises:
        InputRefused: onnx cannot convert it.
    """
    from onnx import version_converter

    current = opset_of(graph.model)
    if current >= opset:
        return graph
    try:
        model = version_converter.convert_version(graph.model, opset)
    except (version_converter.ConvertError, RuntimeError) as error:
        raise InputRefused(
            f"the graph has opset {current}, {opset} is needed, and onnx cannot convert it: {first_line(error)}",
            hint=f"export it again with opset {opset} or newer",
        ) from error
    raise_ir_version(model)
    del model.graph.value_info[:]  # types as they were, which a method may be about to change
    return graph.with_model(model)


def import_domain(model: onnx.ModelProto, domain: str) -> None:
    """Declares the operators of a domain other than ONNX's own, in its first version. In place."""
    from onnx import helper

    if not any(entry.domain == domain for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid(domain, 1))


def raise_ir_version(model: onnx.ModelProto) -> None:
    """The IR version that the opset asks for, where the model's is older. In place."""
    from onnx import helper

    standard = [helper.make_opsetid("", opset_of(model))]
    model.ir_version = max(model.ir_version, helper.find_min_ir_version_for(standard))
