"""What ONNX Runtime executes of a model on this CPU: the graph after the library's own optimizations."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from memopt.ort_options import PROVIDERS
from memopt_export.bodies import bodies
from memopt_export.graph import Wiring, label, stored_bytes, wire
from memopt_export.placement import has_weight
from memopt_export.tensor_rules import size_bytes

if TYPE_CHECKING:
    import onnx
    import onnxruntime

# What ONNX Runtime calls a layer that it computes in integers.
FUSED = frozenset({
    "QLinearConv", "QLinearMatMul", "QGemm", "ConvInteger", "MatMulInteger", "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul", "DynamicQuantizeLSTM",
})  # fmt: skip
# Initializers smaller than this are written into the optimized graph, whose others are not read.
_SMALL_BYTES = 1024
_NOWHERE = "nowhere"
_SHOWN = 32  # names that travel with a count


@dataclass(frozen=True)
class Left:
    """DequantizeLinear nodes that ONNX Runtime executes as they stand, and the floats that there are because of them.

    Attributes:
        count: of DequantizeLinear.
        readers: how many nodes compute in float on what is dequantized.
        nodes: the first of these, as "Conv 'name'".
        float_bytes: of such floats, the most that are alive at one time, every free dimension being 1.
        unsized: how many of these tensors have a size that is not known, and are left out of `float_bytes`.
    """

    count: int = 0
    readers: int = 0
    nodes: tuple[str, ...] = ()
    float_bytes: int = 0
    unsized: int = 0


@dataclass(frozen=True)
class Execution:
    """What one session executes.

    Attributes:
        operators: how many nodes there are of each, subgraphs included.
        providers: how many nodes each execution provider took, before they were fused.
        held_bytes: weights by dtype, as the session holds them.
        fused: how many layers it computes in integers, of how many Conv, Gemm and MatMul with constant weights.
        activations: DequantizeLinear left between a quantized activation and floats that are quantized again.
        weights: DequantizeLinear left behind stored weights, which so become floats in every run.
    """

    operators: dict[str, int] = field(default_factory=dict)
    providers: dict[str, int] = field(default_factory=dict)
    held_bytes: dict[str, int] = field(default_factory=dict)
    fused: tuple[int, int] = (0, 0)
    activations: Left = Left()
    weights: Left = Left()


def options() -> onnxruntime.SessionOptions:
    """Options under which a session says which provider took what."""
    import onnxruntime

    made = onnxruntime.SessionOptions()
    made.log_severity_level = 4  # it warns that the result is for this machine: it is meant to be
    made.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return made


def executed(source: str | bytes, made: onnxruntime.SessionOptions) -> tuple[onnx.ModelProto, dict[str, int]]:
    """The graph that a session executes, without the data of its large weights, and how many nodes a provider took.

    Args:
        source: path of an .onnx file, or its bytes.
        made: by `options`, and what else the session shall have.

    Raises:
        one of `memopt.ort_runtime.library_errors`: ONNX Runtime cannot open it.
    """
    optimized, session = open_optimized(source, made)
    taken: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        taken[part.ep_name] += len(part.get_nodes())
    return optimized, dict(taken)


def open_optimized(
    source: str | bytes, made: onnxruntime.SessionOptions
) -> tuple[onnx.ModelProto, onnxruntime.InferenceSession]:
    """A session, and the graph that it executes, without the data of its large weights; see `executed`."""
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory(prefix="memopt-execution-") as folder:
        made.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        prefix = "session.optimized_model_external_initializers_"
        made.add_session_config_entry(f"{prefix}file_name", _NOWHERE)
        made.add_session_config_entry(f"{prefix}min_size_in_bytes", str(_SMALL_BYTES))
        # Large weights are not read, so they go nowhere; where this link cannot be, they go into the folder.
        with contextlib.suppress(OSError):
            (Path(folder) / _NOWHERE).symlink_to(os.devnull)
        session = onnxruntime.InferenceSession(source, made, providers=[PROVIDERS["cpu"]])
        return onnx.load(made.optimized_model_filepath, load_external_data=False), session


def read(
    optimized: onnx.ModelProto, providers: Mapping[str, int], *, layers: int, sizes: Mapping[str, int]
) -> Execution:
    """What there is to tell of an optimized graph.

    Args:
        optimized: what is executed, see `executed`.
        providers: as `executed` gives them.
        layers: of the model that it was made from, see `count_layers`.
        sizes: bytes of that model's tensors, where they are known.
    """
    wiring = wire(optimized)
    return Execution(
        operators=dict(Counter(node.op_type for body in bodies(optimized) for node in body.graph.node).most_common()),
        providers=dict(providers),
        held_bytes={dtype: size for dtype, size in stored_bytes(optimized).items() if dtype != "string"},
        fused=(_fused(optimized), layers),
        activations=_activations_left(wiring, sizes),
        weights=_weights_left(wiring),
    )


def fused_counts(data: bytes) -> tuple[int, int]:
    """How many layers of a serialized model ONNX Runtime computes in integers on the CPU, and how many it has.

    A layer is a Conv, Gemm or MatMul with a constant weight. Read from the model that ONNX Runtime writes after its
    own optimizations.
    """
    import onnx

    return _fused(executed(data, options())[0]), count_layers(onnx.load_from_string(data))


def count_layers(model: onnx.ModelProto) -> int:
    """How many Conv, Gemm and MatMul with a constant weight a model has, those included that compute in integers."""
    wiring = wire(model)
    return sum(
        node.op_type in FUSED or (has_weight(node, wiring) and node.op_type != "ConvTranspose") for node in wiring.nodes
    )


def _fused(optimized: onnx.ModelProto) -> int:
    return sum(node.op_type in FUSED for node in optimized.graph.node)


def _weights_left(wiring: Wiring) -> Left:
    dequantizers = [index for index in _dequantizers(wiring) if wiring.nodes[index].input[0] in wiring.initializers]
    floats: dict[str, int | None] = {}
    for index in dequantizers:
        node = wiring.nodes[index]
        scale = wiring.initializers.get(node.input[1])
        floats[node.output[0]] = (
            None
            if scale is None
            else size_bytes(scale.data_type, (math.prod(wiring.initializers[node.input[0]].dims),))
        )
    readers = {reader for name in floats for reader, _ in wiring.readers.get(name, ())}
    return _left(dequantizers, readers, floats, wiring)


def _activations_left(wiring: Wiring, sizes: Mapping[str, int]) -> Left:
    """Those from which floats lead to a QuantizeLinear; what leads to an output alone has to be float there."""
    found: list[int] = []
    between: set[int] = set()
    for index in _dequantizers(wiring):
        node = wiring.nodes[index]
        if node.input[0] in wiring.initializers:
            continue
        behind = set(_float_nodes_behind(node.output[0], wiring))
        if any(wiring.nodes[each].op_type == "QuantizeLinear" for each in behind) or _is_requantized(node, wiring):
            found.append(index)
            between |= {each for each in behind if wiring.nodes[each].op_type != "QuantizeLinear"}
    names = [name for index in (*found, *between) for name in wiring.nodes[index].output if name]
    return _left(found, between, {name: _size(name, sizes) for name in names}, wiring)


def _dequantizers(wiring: Wiring) -> Iterator[int]:
    return (index for index, node in enumerate(wiring.nodes) if node.op_type == "DequantizeLinear")


def _is_requantized(node: onnx.NodeProto, wiring: Wiring) -> bool:
    """Whether the DequantizeLinear undoes a QuantizeLinear that was executed just for it, of floats that were there."""
    writer = wiring.writer.get(node.input[0])
    return writer is not None and wiring.nodes[writer].op_type == "QuantizeLinear"


def _float_nodes_behind(tensor: str, wiring: Wiring) -> Iterator[int]:
    """All nodes that compute on the tensor, each once, to the next quantizers and those included."""
    seen, todo = set[int](), [tensor]
    while todo:
        for index, _ in wiring.readers.get(todo.pop(), ()):
            node = wiring.nodes[index]
            if index in seen or node.op_type in FUSED or node.op_type.startswith("QLinear"):
                continue
            seen.add(index)
            yield index
            if node.op_type != "QuantizeLinear":
                todo.extend(node.output)


def _size(name: str, sizes: Mapping[str, int]) -> int | None:
    """Bytes of a tensor of the optimized graph: its own, or those of the one after which the library has named it."""
    stems = (name[:end] for end in range(len(name), 0, -1))
    return next((sizes[stem] for stem in stems if stem in sizes), None)


def _left(
    dequantizers: Iterable[int], readers: Iterable[int], floats: Mapping[str, int | None], wiring: Wiring
) -> Left:
    named = [f"{wiring.nodes[index].op_type} {label(wiring.nodes[index])!r}" for index in sorted(readers)]
    known = {name: size for name, size in floats.items() if size is not None}
    return Left(
        len(list(dequantizers)), len(named), tuple(named[:_SHOWN]), _most_alive(known, wiring), len(floats) - len(known)
    )


def _most_alive(sizes: Mapping[str, int], wiring: Wiring) -> int:
    """The largest sum of these tensors that are alive at one time, in the order in which the nodes are executed."""
    changes: Counter[int] = Counter()
    for name, size in sizes.items():
        last = max((reader for reader, _ in wiring.readers.get(name, ())), default=wiring.writer[name])
        changes[wiring.writer[name]] += size
        changes[last + 1] -= size
    alive = most = 0
    for step in sorted(changes):
        alive += changes[step]
        most = max(most, alive)
    return most
