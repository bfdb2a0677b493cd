"""The graph as ONNX Runtime executes it: fused, laid out anew for the processor, in the library's own order.

The library optimizes a graph when it opens it. It is let do so with weights that are all zero and lie nowhere, as what
becomes of nodes follows from their operators, shapes and small constants: that takes a tenth of a second and next to no
memory where the real weights would take seconds and gigabytes, and no node is run.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from memopt.errors import OutOfResource, first_line
from memopt.ort_runtime import library_errors, version
from memopt_export.execution import open_optimized
from memopt_export.graph import Graph, copy_fields
from memopt_export.tensor_rules import dtype_name, size_bytes
from memopt_export.twins import infer

if TYPE_CHECKING:
    import onnx

# Initializers below this keep their values: they may be shapes, or what a fusion looks for.
_HOLLOW_BYTES = 2**18
_ZEROS = "zeros"


@dataclass(frozen=True)
class Executed:
    """A graph with its nodes in the order in which they run. Large weights have no data."""

    model: onnx.ModelProto
    source: Graph
    by: str  # who runs them so, such as "onnxruntime 1.31.1"

    @cached_property
    def symbolic(self) -> onnx.ModelProto:
        """The shapes by which ONNX Runtime tells tensors of one size: those of no batch in particular."""
        return infer(self.model, batch=None)


def as_written(graph: Graph, *, because: str | None = None) -> Executed:
    """The graph's own nodes, in the file's order: what a runtime that changes nothing executes."""
    return Executed(_hollow(graph.model), graph, "the file's own nodes" + (f": {because}" if because else ""))


def as_executed(graph: Graph) -> Executed:
    """What ONNX Runtime makes of the graph on this CPU; the graph as written, with the reason, where it cannot open it.

    Any other processor, or version of the library, may fuse otherwise.

    Raises:
        OutOfResource: the folder for temporary files is full, or cannot be written.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="memopt-") as name:
            optimized = _optimize(graph, Path(name))
    except OSError as error:
        raise OutOfResource(f"no room for temporary files: {first_line(error)}") from error
    except library_errors() as error:
        return as_written(graph, because=f"onnxruntime cannot open it: {first_line(error)}")
    return Executed(optimized, graph, f"onnxruntime {version()}")


def _optimize(graph: Graph, folder: Path) -> onnx.ModelProto:
    import onnxruntime

    (folder / "graph.onnx").write_bytes(_hollow(graph.model, folder / _ZEROS).SerializeToString())
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # it warns that what it writes fits this processor alone
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.disable_prepacking", "1")
    optimized, _ = open_optimized(str(folder / "graph.onnx"), options)
    return optimized


def _hollow(model: onnx.ModelProto, zeros: Path | None = None) -> onnx.ModelProto:
    """A copy whose large initializers, and tensors of Constant nodes, have dtype and dims only.

    With `zeros` they all lie in that file, which takes no room on the disk.
    """
    import onnx

    hollow = onnx.ModelProto()
    copy_fields(model, hollow, without="graph")
    copy_fields(model.graph, hollow.graph, without="initializer")
    large = [tensor for tensor in model.graph.initializer if _is_large(tensor)]
    hollow.graph.initializer.extend(tensor for tensor in model.graph.initializer if not _is_large(tensor))
    hollow.graph.ClearField("node")
    for node in model.graph.node:
        value = _value(node)
        if value is not None and _is_large(value):
            large.append(onnx.TensorProto(name=node.output[0], data_type=value.data_type, dims=value.dims))
        else:
            hollow.graph.node.append(node)
    sizes = [size_bytes(tensor.data_type, tensor.dims) for tensor in large]
    for tensor, size in zip(large, sizes, strict=True):
        bare = hollow.graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        if zeros is not None:
            bare.data_location = onnx.TensorProto.EXTERNAL
            for key, entry in (("location", zeros.name), ("offset", "0"), ("length", str(size))):
                bare.external_data.add(key=key, value=entry)
    if zeros is not None:
        zeros.touch()
        os.truncate(zeros, max(sizes, default=0))
    return hollow


def _is_large(tensor: onnx.TensorProto) -> bool:
    return dtype_name(tensor.data_type) != "STRING" and size_bytes(tensor.data_type, tensor.dims) >= _HOLLOW_BYTES


def _value(node: onnx.NodeProto) -> onnx.TensorProto | None:
    """The tensor of a Constant node."""
    if node.op_type != "Constant" or not node.output:
        return None
    return next((attribute.t for attribute in node.attribute if attribute.name == "value"), None)
