"""The static memory plan: what a graph needs at a batch, and where its peak is, without running it."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from memopt.errors import InputRefused
from memopt_export.bodies import captured, node_label, subgraphs
from memopt_export.graph import Graph
from memopt_export.hollow import Executed, as_executed, as_written
from memopt_export.kernels import VIEWS, Call, overwritten, scratch_bytes
from memopt_export.loop_shapes import loop_states
from memopt_export.tensor_rules import size_bytes
from memopt_export.twins import infer, specs

if TYPE_CHECKING:
    import onnx

_LISTED = 8  # tensors of unknown size that an error names


@dataclass(frozen=True)
class Block:
    """Memory of one or more tensors, named after the first of them, alive from step `first` to step `last`."""

    tensor: str
    size_bytes: int
    first: int
    last: int


@dataclass(frozen=True)
class Plan:
    """What a graph needs at a batch, in bytes.

    Activations are what nodes write, the outputs included, and what kernels take while they run; the inputs are the
    caller's and are counted apart. The peak is the largest sum alive at one time: `peak_node` runs then, on
    `peak_tensors`, the largest first, and what its kernel takes. `steps` holds that sum for each node in order,
    `scratch` what its kernel takes of it.
    The size of what `unknown` names depends on values: it is not counted, and the plan is a lower bound.
    """

    batch: int
    weights_bytes: int
    activation_bytes: int
    input_bytes: int
    output_bytes: int
    peak_node: str
    peak_tensors: tuple[tuple[str, int], ...]
    steps: tuple[tuple[str, int], ...]
    scratch: tuple[int, ...]  # of each step
    blocks: tuple[Block, ...]
    by: str  # whose nodes these are, such as "onnxruntime 1.31.1"
    weights: dict[str, int] = field(default_factory=dict)  # dtype -> bytes
    unknown: tuple[str, ...] = ()

    @property
    def total_bytes(self) -> int:
        """Weights, inputs and the peak of activations together."""
        return self.weights_bytes + self.input_bytes + self.activation_bytes

    @property
    def peak_scratch_bytes(self) -> int:
        """What the kernel at the peak takes beside its tensors."""
        return self.scratch[self.peak_step] if self.scratch else 0

    @property
    def peak_step(self) -> int:
        """The index of the node at the peak."""
        return max(range(len(self.steps)), key=lambda step: self.steps[step][1], default=0)


def plan(
    graph: Graph | Executed, *, batch: int = 1, dims: Mapping[str, int] | None = None, threads: int | None = None
) -> Plan:
    """The plan of the graph as ONNX Runtime executes it, or of nodes given as Executed, in their order.

    A tensor is alive from the node that writes it to the last one that reads it; an output to the end. No memory of
    their own have
    1. what Reshape, Flatten, Identity, Squeeze and Unsqueeze return,
    2. what a kernel writes over an input that nothing else reads (see `kernels`);
    but an output of the graph always has its own. A branch or a loop's body needs its own peak while its node runs.

    Args:
        graph: what is planned.
        batch: what free dimensions of the inputs are.
        dims: free dimensions by name that are something else, such as {"sequence": 128}.
        threads: of the session; each takes some room in convolutions. None: as many as there are processors.

    Raises:
        InputRefused: the graph has no shapes at this batch.
    """
    if batch < 1:
        raise InputRefused(f"batch is {batch}", hint="--batch 1")
    executed = graph if isinstance(graph, Executed) else as_executed(graph)
    source, weights = executed.source, executed.source.weights_bytes()
    threads = len(os.sched_getaffinity(0)) if threads is None else threads
    inferred = infer(executed.model, batch=batch, dims=dims)
    body = _Body(executed.model.graph, inferred.graph, executed.symbolic.graph, threads)
    body.check_views()
    peak = max(range(len(body.totals)), key=body.totals.__getitem__, default=0)
    names = [node_label(node) for node in executed.model.graph.node]
    alive = [block for block in body.blocks if block.first <= peak <= block.last and block.size_bytes]
    return Plan(
        batch=batch,
        weights_bytes=sum(weights.values()),
        weights=weights,
        activation_bytes=max(body.totals, default=0),
        input_bytes=sum(body.size_bytes(spec.name) for spec in source.inputs),
        output_bytes=sum(body.size_bytes(spec.name) for spec in source.outputs),
        peak_node=names[peak] if names else "",
        peak_tensors=tuple(
            (b.tensor, b.size_bytes) for b in sorted(alive, key=lambda block: (-block.size_bytes, block.first))
        ),
        steps=tuple(zip(names, body.totals, strict=True)),
        scratch=tuple(body.scratch),
        blocks=tuple(body.blocks),
        by=executed.by,
        unknown=tuple(body.unknown),
    )


def tensor_sizes(graph: Graph, *, batch: int = 1) -> dict[str, int]:
    """Bytes of each tensor of the graph as written whose shape follows from the inputs' at this batch.

    Raises:
        InputRefused: shapes contradict each other.
    """
    known = specs(infer(as_written(graph).model, batch=batch).graph)
    return {name: spec.nbytes(1) for name, spec in known.items() if spec.is_fixed}


def largest_batch(graph: Graph | Executed, budget_bytes: int, *, dims: Mapping[str, int] | None = None) -> int | None:
    """The largest batch whose weights, inputs and activation peak fit together; None where not even 1 does.

    The need of each step is linear in the batch, the peak is the largest of them. So two plans give a bound that no
    larger batch can keep, mostly the answer itself; a third plan tells.

    Raises:
        InputRefused: the size of a tensor depends on values, so that no batch is known to fit.
    """
    executed = graph if isinstance(graph, Executed) else as_executed(graph)

    def need(batch: int) -> int:
        found = plan(executed, batch=batch, dims=dims)
        if found.unknown:
            raise InputRefused(
                f"what fits cannot be told: the size of {', '.join(found.unknown[:_LISTED])} is not known"
            )
        return found.total_bytes

    one = need(1)
    if one > budget_bytes:
        return None
    if executed.source.fixed_batch is not None:
        return executed.source.fixed_batch
    two = need(2)
    if one == two:
        return 1
    bound = 1 + (budget_bytes - one) // (two - one)
    return bound if need(bound) <= budget_bytes else bisect_right(range(1, bound), budget_bytes, key=need)


class _Body:
    """A graph, or the body of a branch or loop, with all blocks of memory and the sum alive at each of its nodes."""

    def __init__(
        self,
        graph: onnx.GraphProto,
        inferred: onnx.GraphProto,
        symbolic: onnx.GraphProto,
        threads: int,
        *,
        outputs_outside: bool = False,
    ) -> None:
        self._nodes, self._inferred, self._symbolic = graph.node, inferred, symbolic
        self._threads = threads
        self._specs = specs(inferred)
        self._symbols = {value.name: value for value in (*symbolic.input, *symbolic.value_info, *symbolic.output)}
        self._outputs = {value.name for value in graph.output}
        self._outside = self._outputs if outputs_outside else set()
        self.unknown: dict[str, None] = {}
        self.blocks = self._place()
        inner = [self._inner_bytes(node) for node in self._nodes]
        own = [scratch_bytes(Call(node, self._specs, threads)) for node in self._nodes]
        self.scratch = [sum(pair) for pair in zip(own, inner, strict=True)]
        self.totals = [sum(pair) for pair in zip(_alive(self.blocks, len(own)), self.scratch, strict=True)]

    def size_bytes(self, tensor: str) -> int:
        """Bytes of the tensor; 0, and a note in `unknown`, where they depend on values."""
        spec = self._specs.get(tensor)
        if spec is None or not spec.is_fixed:
            self.unknown[tensor] = None
            return 0
        return spec.nbytes(1)

    def check_views(self) -> None:
        """Raises InputRefused where a view is not as large as what it views."""
        for node in self._nodes:
            before, after = (self._specs.get(names[0]) if names else None for names in (node.input, node.output))
            if node.op_type not in VIEWS or before is None or after is None:
                continue
            if before.is_fixed and after.is_fixed and before.nbytes(1) != after.nbytes(1):
                made = f"it makes {after.nbytes(1)} bytes of {before.nbytes(1)}"
                raise InputRefused(f"{node_label(node)!r} has the batch built in: {made}")

    def _place(self) -> list[Block]:
        """All blocks, in the order in which they are written."""
        uses = Counter(name for node in self._nodes for name in node_reads(node))
        uses.update(self._outputs)
        home: dict[str, str] = {}  # tensor -> its block; inputs, weights and what lies outside have none
        left: dict[str, int] = {}  # block -> reads still to come
        first: dict[str, int] = {}
        last: dict[str, int] = {}
        for step, node in enumerate(self._nodes):
            for slot, name in enumerate(node.output):
                if not name or name in self._outside:
                    continue
                host = self._host(node, slot, home, left)
                if host is None:
                    home[name], first[name], left[name] = name, step, 0
                elif host in home:
                    home[name] = home[host]
                if name in home:
                    left[home[name]] += uses[name]
            for name in (*node_reads(node), *filter(None, node.output)):
                if name in home:
                    left[home[name]] -= name not in node.output
                    if left[home[name]] == 0:
                        last[home[name]] = step
        end = len(self._nodes) - 1
        return [Block(name, self.size_bytes(name), start, last.get(name, end)) for name, start in first.items()]

    def _host(self, node: onnx.NodeProto, slot: int, home: Mapping[str, str], left: Mapping[str, int]) -> str | None:
        """The tensor whose memory this output takes; None where it needs its own."""
        if slot or node.output[0] in self._outputs or not node.input:
            return None
        if node.op_type in VIEWS:
            return str(node.input[0])
        source = overwritten(node)
        if source is None or source not in home or left[home[source]] != 1:
            return None
        return source if _same_size(self._symbols.get(source), self._symbols.get(node.output[0])) else None

    def _inner_bytes(self, node: onnx.NodeProto) -> int:
        """What the node's branches or its loop's body take beside its outputs, at the most.

        A branch writes into the outputs. A loop's body reads the states that its last turn made while it makes new
        ones, of which the last become the outputs.
        """
        states = list(loop_states(node))
        peaks = [0]
        for graph, inferred, symbolic in zip(
            subgraphs(node), _bodies_of(self._inferred, node), _bodies_of(self._symbolic, node), strict=False
        ):
            body = _Body(graph, inferred, symbolic, self._threads, outputs_outside=node.op_type == "If")
            self.unknown.update(body.unknown)
            peaks.append(max(body.totals, default=0))
        before = sum(self.size_bytes(name) for _, name in states)
        returned = sum(self.size_bytes(node.output[slot]) for slot, _ in states if node.output[slot])
        return max(0, max(peaks) + before - returned)


def node_reads(node: onnx.NodeProto) -> Iterator[str]:
    """The tensors that a node reads, those of its branches and bodies included."""
    yield from filter(None, node.input)
    yield from captured(node)


def _bodies_of(graph: onnx.GraphProto, node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """The bodies of the same node in another form of the graph."""
    twin = next((each for each in graph.node if each.op_type == node.op_type and each.input == node.input), None)
    return list(subgraphs(twin)) if twin is not None else []


def _alive(blocks: Sequence[Block], steps: int) -> list[int]:
    """Bytes alive at each step."""
    change = [0] * (steps + 1)
    for block in blocks:
        change[block.first] += block.size_bytes
        change[block.last + 1] -= block.size_bytes
    alive, total = [], 0
    for step in range(steps):
        total += change[step]
        alive.append(total)
    return alive


def _same_size(one: onnx.ValueInfoProto | None, other: onnx.ValueInfoProto | None) -> bool:
    """Whether both have elements of one size, and dims that are the same number or the same symbol."""
    if one is None or other is None:
        return False
    a, b = one.type.tensor_type, other.type.tensor_type
    if not (a.HasField("shape") and b.HasField("shape")) or len(a.shape.dim) != len(b.shape.dim):
        return False
    if size_bytes(a.elem_type, (8,)) != size_bytes(b.elem_type, (8,)):
        return False
    return all(
        p.dim_value == q.dim_value if p.HasField("dim_value") and q.HasField("dim_value")
        else bool(p.dim_param) and p.dim_param == q.dim_param
        for p, q in zip(a.shape.dim, b.shape.dim, strict=True)
    )  # fmt: skip
