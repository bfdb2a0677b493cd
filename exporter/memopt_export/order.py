"""An order of nodes that needs less memory at its peak, with the same result.

Every order in which each node comes after those it reads from computes the same. Which tensors are alive together
depends on it where branches meet: one that leaves little behind should come before one that leaves much.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from memopt.errors import InputRefused
from memopt_export.graph import Graph, set_nodes
from memopt_export.hollow import Executed, as_executed, as_written
from memopt_export.kernels import VIEWS, Call, overwritten, scratch_bytes
from memopt_export.plan import node_reads, plan
from memopt_export.twins import infer, specs

if TYPE_CHECKING:
    import onnx

WIDTH = 256  # sets of nodes that are kept at each step
_OPENINGS = 3
_BATCHES = (1, 8, 32)  # at which no order may be worse


@dataclass(frozen=True)
class Order:
    """Nodes by their index, and the peak of activations when they run so, in bytes.

    `exact` says that no order of these nodes has a lower one.
    """

    nodes: tuple[int, ...]
    peak_bytes: int
    exact: bool


@dataclass(frozen=True)
class Reordered:
    """The graph in the order found, or as it was where none is better, with the peaks that it has when executed."""

    graph: Graph
    before_bytes: int
    after_bytes: int

    @property
    def helps(self) -> bool:
        """Whether the peak is lower."""
        return self.after_bytes < self.before_bytes


def reorder(graph: Graph, *, batch: int = 1) -> Reordered:
    """The graph with its nodes in an order of which ONNX Runtime makes a lower peak; the graph itself where none does.

    The library fuses nodes and then walks the graph its own way: back from the outputs, of a node's inputs the one that
    was written last goes first. So besides the order that is best for the nodes as written, its mirror is tried too,
    in which of two branches that one stands last which is to run first, and what the library makes of each decides.

    Raises:
        InputRefused: the graph has no shapes at these batches.
    """
    batches = tuple(dict.fromkeys((batch, *_BATCHES))) if graph.fixed_batch is None else (1,)
    before = _peaks(graph, batches, of=min)
    best, least = graph, before
    order = least_peak(as_written(graph), batch=batch)
    for nodes in (order.nodes, _mirrored(graph.model, order.nodes)):
        candidate = _with_nodes(graph, nodes)
        peaks = _peaks(candidate, batches, of=max)
        if peaks[0] < least[0] and all(now <= was for now, was in zip(peaks, before, strict=True)):
            best, least = candidate, peaks
    return Reordered(best, before[0], least[0])


def in_least_order(graph: Graph, *, batch: int = 1) -> Graph:
    """The graph with its own nodes in the order with the lowest peak, for a session that executes it as it stands.

    The graph itself where no lower one was found, or where shapes are not known.
    """
    written = as_written(graph)
    try:
        order, before = least_peak(written, batch=batch), plan(written, batch=batch, threads=0)
        model = _with_nodes(graph, order.nodes)
        helps = plan(as_written(model), batch=batch, threads=0).activation_bytes < before.activation_bytes
    except InputRefused:
        return graph
    return model if helps else graph


def least_peak(executed: Executed, *, batch: int = 1, width: int = WIDTH) -> Order:
    """The order of these nodes with the lowest peak that was found.

    What is alive depends only on which nodes have run. So orders are grown node by node, and of those that have run the
    same nodes the one with the lowest peak is kept (dynamic programming over the graph's downsets). Where more than
    `width` sets are open, those with the lowest peaks, then the least alive, go on, and the order found may not be the
    best: a beam search.
    """
    nodes = _Nodes(executed.model, batch)
    open_: dict[int, _Partial] = {0: _Partial(0, 0, nodes.first, None, -1)}
    exact = True
    for _ in executed.model.graph.node:
        grown: dict[int, _Partial] = {}
        for done, partial in open_.items():
            for node in _members(partial.ready):
                after, now = done | 1 << node, nodes.run(node, done, partial)
                if after not in grown or now.peak_bytes < grown[after].peak_bytes:
                    grown[after] = now
        if len(grown) > width:
            exact = False
            kept = sorted(grown.items(), key=lambda each: (each[1].peak_bytes, each[1].alive_bytes))[:width]
            grown = dict(kept)
        open_ = grown
    (last,) = open_.values()
    return Order(tuple(last.path())[::-1], last.peak_bytes, exact)


@dataclass(frozen=True)
class _Partial:
    """An order as far as it goes: what is alive at its end, its peak, what may run next, and the node that ran last."""

    alive_bytes: int
    peak_bytes: int
    ready: int  # a set of nodes
    before: _Partial | None
    node: int

    def path(self) -> Iterator[int]:
        """The nodes, the last one first."""
        here: _Partial = self
        while here.before is not None:
            yield here.node
            here = here.before


class _Nodes:
    """What running each node of a graph takes and frees. Sets of nodes are integers, a bit for each."""

    def __init__(self, model: onnx.ModelProto, batch: int) -> None:
        known = specs(infer(model, batch=batch).graph)
        nodes = model.graph.node
        needs = _needs(nodes)
        self.first = sum(1 << index for index, needed in enumerate(needs) if not needed)
        self._needs = [sum(1 << other for other in needed) for needed in needs]
        self._readers: list[list[int]] = [[] for _ in nodes]
        for index, needed in enumerate(needs):
            for other in needed:
                self._readers[other].append(index)
        calls = [Call(node, known, 0) for node in nodes]
        home = _homes(nodes, {value.name for value in model.graph.output})
        self._scratch = [scratch_bytes(call) for call in calls]
        self._takes = [
            sum(call.size_bytes(name) for name in call.node.output if home.get(name) == name) for call in calls
        ]
        touching: dict[str, set[int]] = {}  # block -> the nodes that write or read it
        for index, node in enumerate(nodes):
            for name in (*node_reads(node), *filter(None, node.output)):
                if name in home:
                    touching.setdefault(home[name], set()).add(index)
        sizes = {name: call.size_bytes(name) for call in calls for name in call.node.output}
        kept = {home[value.name] for value in model.graph.output if value.name in home}
        self._touches: list[list[tuple[int, int]]] = [[] for _ in nodes]  # of each node: (who, bytes) of its blocks
        for name in touching.keys() - kept:
            who, size = sum(1 << index for index in touching[name]), sizes[name]
            for index in touching[name]:
                self._touches[index].append((who, size))

    def run(self, node: int, done: int, partial: _Partial) -> _Partial:
        """What is alive after the node too."""
        alive = partial.alive_bytes + self._takes[node]
        after = done | 1 << node
        freed = sum(size for who, size in self._touches[node] if who & after == who)
        ready = partial.ready ^ 1 << node
        for reader in self._readers[node]:
            if self._needs[reader] & after == self._needs[reader]:
                ready |= 1 << reader
        return _Partial(alive - freed, max(partial.peak_bytes, alive + self._scratch[node]), ready, partial, node)


def _members(nodes: int) -> Iterator[int]:
    """The nodes of a set, in their order.

    >>> list(_members(0b1101))
    [0, 2, 3]
    """
    while nodes:
        lowest = nodes & -nodes
        yield lowest.bit_length() - 1
        nodes ^= lowest


def _needs(nodes: Sequence[onnx.NodeProto]) -> list[set[int]]:
    """Of each node, those that write what it reads."""
    writer = {name: index for index, node in enumerate(nodes) for name in node.output if name}
    return [{writer[name] for name in node_reads(node) if name in writer} for node in nodes]


def _homes(nodes: Sequence[onnx.NodeProto], outputs: set[str]) -> dict[str, str]:
    """The block that each tensor lies in, by its first tensor; what is written over has one reader in any order."""
    readers: dict[str, int] = {}
    for node in nodes:
        for name in node_reads(node):
            readers[name] = readers.get(name, 0) + 1
    home: dict[str, str] = {}
    for node in nodes:
        for slot, name in enumerate(node.output):
            host = None
            if slot == 0 and name not in outputs and node.input:
                over = overwritten(node)
                host = node.input[0] if node.op_type in VIEWS else over if over and readers[over] == 1 else None
            if name and host is None:
                home[name] = name
            elif host in home:
                home[name] = home[host]
    return home


def _peaks(graph: Graph, batches: Iterable[int], *, of: Callable[[Iterable[int]], int]) -> tuple[int, ...]:
    """The peak at each batch, the lowest or highest of a few openings: the library does not always order alike."""
    opened = [as_executed(graph) for _ in range(_OPENINGS)]
    return tuple(of(plan(each, batch=batch, threads=0).activation_bytes for each in opened) for batch in batches)


def _mirrored(model: onnx.ModelProto, order: Sequence[int]) -> tuple[int, ...]:
    """An order in which, of nodes that may run next, the one that comes last in `order` goes first."""
    needs = _needs(model.graph.node)
    left, mirrored = list(order), list[int]()
    while left:
        index = next(index for index in reversed(left) if needs[index].issubset(mirrored))
        left.remove(index)
        mirrored.append(index)
    return tuple(mirrored)


def _with_nodes(graph: Graph, order: Sequence[int]) -> Graph:
    model = graph.copy_model()
    set_nodes(model.graph, [model.graph.node[index] for index in order])
    return graph.with_model(model)
