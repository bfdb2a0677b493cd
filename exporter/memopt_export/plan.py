"""The static memory plan: what a graph needs at a batch, and where its peak is, without running it."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING

from memopt.errors import InputRefused
from memopt_export.graph import Graph, Wiring, label, refuse_subgraphs, tensor_spec, wire
from memopt_export.placement import INTEGER_KERNELS, PASS_THROUGH, WEIGHTED

if TYPE_CHECKING:
    import onnx

# Operations whose output is their first input under another shape.
_VIEWS = frozenset({"Reshape", "Flatten", "Identity", "Squeeze", "Unsqueeze"})
# Operations that write over their input where nothing else reads it, or are computed with the layer before them.
_IN_PLACE = frozenset({"Relu", "Clip"})
# A larger initializer is nobody's shape.
_LARGEST_SHAPE_BYTES = 4096


@dataclass(frozen=True)
class Plan:
    """What a graph needs at a batch, in bytes.

    Activations are what nodes write, the outputs included; the inputs are the caller's and are counted apart. The peak
    is the largest sum of activations alive at one time: `peak_node` runs then, on `peak_tensors`, the largest first.
    `steps` holds that sum for each node in order.
    """

    batch: int
    weights_bytes: int
    activation_bytes: int
    input_bytes: int
    output_bytes: int
    peak_node: str
    peak_tensors: tuple[tuple[str, int], ...]
    steps: tuple[tuple[str, int], ...]

    @property
    def total_bytes(self) -> int:
        """Weights, inputs and the peak of activations together."""
        return self.weights_bytes + self.input_bytes + self.activation_bytes


def plan(graph: Graph, *, batch: int = 1) -> Plan:
    """The plan of the graph, executed in the file's order, with every free dimension set to `batch`.

    A tensor is alive from the node that writes it to the last one that reads it; an output to the end. No memory of
    their own have
    1. what Reshape, Flatten, Identity, Squeeze and Unsqueeze return,
    2. what Relu and Clip return, where nothing else reads their input,
    3. float tensors between an integer kernel and its Q/DQ: kernels read and write the integers.

    Raises:
        InputRefused: the graph has subgraphs, or a tensor whose shape does not follow from the inputs'.
    """
    refuse_subgraphs(graph, "plan")
    if batch < 1:
        raise InputRefused(f"batch is {batch}", hint="--batch 1")
    model = _inferred(graph, batch)
    sizes = _sizes(model)
    buffers = _buffers(wire(model), sizes)
    live = [
        [buffer for buffer in buffers if buffer.first <= step <= buffer.last] for step in range(len(model.graph.node))
    ]
    totals = [sum(buffer.size_bytes for buffer in alive) for alive in live]
    peak = max(range(len(totals)), key=totals.__getitem__)
    names = [label(node) for node in model.graph.node]
    return Plan(
        batch=batch,
        weights_bytes=sum(graph.weights_bytes().values()),
        activation_bytes=totals[peak],
        input_bytes=sum(spec.nbytes(batch) for spec in graph.inputs),
        output_bytes=sum(sizes[spec.name] for spec in graph.outputs),
        peak_node=names[peak],
        peak_tensors=tuple(
            (b.tensor, b.size_bytes) for b in sorted(live[peak], key=lambda b: (-b.size_bytes, b.first))
        ),
        steps=tuple(zip(names, totals, strict=True)),
    )


def tensor_sizes(graph: Graph, *, batch: int = 1) -> dict[str, int]:
    """Bytes of each tensor whose shape follows from the inputs', with every free dimension set to `batch`.

    Raises:
        InputRefused: shapes contradict each other.
    """
    return _sizes(_inferred(graph, batch))


def largest_batch(graph: Graph, budget_bytes: int) -> int | None:
    """The largest batch whose weights, inputs and activation peak fit together; None where not even 1 does.

    The need of each step is linear in the batch, the peak is the largest of them. So two plans give a bound that no
    larger batch can keep, mostly the answer itself; a third plan tells.
    """

    def need(batch: int) -> int:
        return plan(graph, batch=batch).total_bytes

    one, two = need(1), need(2)
    if one > budget_bytes:
        return None
    if one == two:
        return _fixed_batch(graph)
    bound = 1 + (budget_bytes - one) // (two - one)
    return bound if need(bound) <= budget_bytes else bisect_right(range(1, bound), budget_bytes, key=need)


def _fixed_batch(graph: Graph) -> int:
    first = graph.inputs[0].shape[:1] if graph.inputs else ()
    return first[0] if first and isinstance(first[0], int) else 1


def _inferred(graph: Graph, batch: int) -> onnx.ModelProto:
    """The model with all shapes at this batch, and without its weights' data."""
    from onnx import shape_inference

    model = _skeleton(graph.model)
    for value in model.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if not dim.HasField("dim_value"):
                dim.dim_value = batch
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    try:
        return shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    except shape_inference.InferenceError as error:
        raise InputRefused(f"the graph has no shapes at batch {batch}: {_first_line(error)}") from error


def _skeleton(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with only those initializers filled that may be shapes: copying and inference stay cheap."""
    import onnx

    skeleton = onnx.ModelProto(ir_version=model.ir_version)
    skeleton.opset_import.extend(model.opset_import)
    skeleton.graph.name = model.graph.name
    skeleton.graph.node.extend(model.graph.node)
    skeleton.graph.input.extend(model.graph.input)
    skeleton.graph.output.extend(model.graph.output)
    for tensor in model.graph.initializer:
        small = tensor.ByteSize() <= _LARGEST_SHAPE_BYTES
        bare = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        skeleton.graph.initializer.append(tensor if small else bare)
    return skeleton


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _sizes(model: onnx.ModelProto) -> dict[str, int]:
    """Bytes of each tensor whose shape is known; refuses a view that is not as large as what it views."""
    values = [*model.graph.input, *model.graph.value_info, *model.graph.output]
    sizes = {value.name: tensor_spec(value).nbytes(1) for value in values if _has_shape(value)}
    for node in model.graph.node:
        if node.op_type in _VIEWS:
            before, after = sizes.get(node.input[0]), sizes.get(node.output[0])
            if before is not None and after is not None and before != after:
                raise InputRefused(f"{label(node)!r} has the batch built in: it makes {after} bytes of {before}")
    return sizes


def _has_shape(value: onnx.ValueInfoProto) -> bool:
    tensor = value.type.tensor_type
    return tensor.HasField("shape") and all(dim.HasField("dim_value") for dim in tensor.shape.dim)


@dataclass(frozen=True)
class _Buffer:
    """Memory that a node writes into, alive from step `first` to step `last`; named after its first tensor."""

    tensor: str
    size_bytes: int
    first: int
    last: int


def _buffers(wiring: Wiring, sizes: dict[str, int]) -> list[_Buffer]:
    """All buffers, in the order in which they are written."""
    tenants: dict[str, list[str]] = {}  # of each buffer, by its first tensor
    home: dict[str, str] = {}  # tensor -> its buffer; inputs and weights have none of ours
    for node in wiring.nodes:
        host = _host(node, wiring, home, tenants)
        for tensor in filter(None, node.output):
            buffer = tensor if host is None else home.get(host)
            if buffer is not None:
                home[tensor] = buffer
                tenants.setdefault(buffer, []).append(tensor)
    return [_buffer(tensors, wiring, sizes) for tensors in tenants.values()]


def _buffer(tensors: list[str], wiring: Wiring, sizes: dict[str, int]) -> _Buffer:
    """The buffer that these tensors share; an integer kernel's is as large as the integers."""
    first = wiring.writer[tensors[0]]
    reads = [index for tensor in tensors for index, _ in wiring.readers.get(tensor, ())]
    returned = not wiring.outputs.isdisjoint(tensors)
    size_of = _integers_of(tensors[0], wiring) or tensors[0]
    if size_of not in sizes:
        raise InputRefused(f"the shape of {size_of!r} does not follow from the inputs'; it cannot be planned")
    return _Buffer(tensors[0], sizes[size_of], first, len(wiring.nodes) if returned else max([first, *reads]))


def _host(node: onnx.NodeProto, wiring: Wiring, home: dict[str, str], tenants: dict[str, list[str]]) -> str | None:
    """The input whose memory the node's output takes; None where it needs its own."""
    if not node.input:
        return None
    source = str(node.input[0])
    buffer = home.get(source)
    if node.op_type in _VIEWS:
        return source
    if node.op_type in _IN_PLACE and buffer is not None:
        return source if all(wiring.sole_reader(tensor) is not None for tensor in tenants[buffer]) else None
    if node.op_type == "QuantizeLinear" and buffer is not None:
        return source if _integers_of(buffer, wiring) == node.output[0] else None
    if node.op_type == "DequantizeLinear":
        readers = [wiring.nodes[index] for index, _ in wiring.readers.get(node.output[0], ())]
        read_as_integers = bool(readers) and all(_is_integer(reader, wiring) for reader in readers)
        return source if read_as_integers and node.output[0] not in wiring.outputs else None
    return None


def _integers_of(tensor: str, wiring: Wiring) -> str | None:
    """What an integer kernel writes where the graph says `tensor`: the output of the QuantizeLinear behind it."""
    if not _is_integer(wiring.nodes[wiring.writer[tensor]], wiring):
        return None
    reader = wiring.sole_reader(tensor)
    if reader is not None and wiring.nodes[reader].op_type in _IN_PLACE:
        reader = wiring.sole_reader(wiring.nodes[reader].output[0])
    if reader is None or wiring.nodes[reader].op_type != "QuantizeLinear":
        return None
    return str(wiring.nodes[reader].output[0])


def _is_integer(node: onnx.NodeProto, wiring: Wiring) -> bool:
    """Whether a runtime computes the node in integers: all that it reads is dequantized, its weight too."""
    if node.op_type not in WEIGHTED | INTEGER_KERNELS | PASS_THROUGH:
        return False
    activations = [name for name in node.input if name and not wiring.is_constant(name)]
    weights = node.input[1:2] if node.op_type in WEIGHTED else []
    return all(_is_dequantized(name, wiring) for name in (*activations, *weights))


def _is_dequantized(tensor: str, wiring: Wiring) -> bool:
    writer = wiring.writer.get(tensor)
    return writer is not None and wiring.nodes[writer].op_type == "DequantizeLinear"
