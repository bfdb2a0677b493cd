"""Channels that lie between layers: which of them change alike, what values they take, and the weights around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from memopt.tensors import Array
from memopt_export.bodies import captured
from memopt_export.graph import Graph, Wiring, attribute
from memopt_export.patches import Geometry
from memopt_export.placement import is_plain_gemm
from memopt_export.simplify import drop_unused_initializers
from memopt_export.walk import watch_all

if TYPE_CHECKING:
    import onnx

LEVELS = 255  # of an activation
_WEIGHT_LEVELS = 127


@dataclass
class ChannelSet:
    """Tensors whose channels change together; by the graph's indices the nodes that write them, those that read them,
    and those that lead from one to another.
    """

    tensors: list[str] = field(default_factory=list)
    writers: list[int] = field(default_factory=list)
    readers: list[int] = field(default_factory=list)
    between: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Rules:
    """What belongs to a channel set: questions about a node of the graph."""

    writes: Callable[[int], bool]  # what it writes can be changed
    reads: Callable[[int], bool]  # it can make up for the change
    commutes: Callable[[onnx.NodeProto, Sequence[str], Wiring], bool]  # the change goes through it; its activations


def channel_sets(wiring: Wiring, rules: Rules) -> Iterator[ChannelSet]:
    """The sets in the order of the graph, without those that something else writes or reads."""
    home: dict[str, ChannelSet] = {}
    blocked: list[str] = list(wiring.outputs)

    def set_of(tensor: str) -> ChannelSet:
        if tensor not in home:
            home[tensor] = ChannelSet([tensor])
            if tensor not in wiring.writer:
                blocked.append(tensor)
        return home[tensor]

    def join(first: str, second: str) -> None:
        one, other = set_of(first), set_of(second)
        if one is not other:
            for part in ("tensors", "writers", "readers", "between"):
                getattr(one, part).extend(getattr(other, part))
            home.update(dict.fromkeys(other.tensors, one))

    for index, node in enumerate(wiring.nodes):
        blocked += captured(node)
        activations = [name for name in node.input if name and not wiring.is_constant(name)]
        writes, reads = rules.writes(index), rules.reads(index)
        if not (writes or reads) and rules.commutes(node, activations, wiring):
            for name in activations:
                join(name, node.output[0])
            set_of(node.output[0]).between.append(index)
            continue
        if reads:
            set_of(node.input[0]).readers.append(index)
        if writes:
            set_of(node.output[0]).writers.append(index)
        blocked += [*([] if reads else activations), *([] if writes else node.output)]
        for name in (*activations, *node.output):
            set_of(name)
    closed = {id(home[name]) for name in blocked if name in home}
    for key, found in {id(each): each for each in home.values()}.items():
        if key not in closed and found.writers and found.readers:
            yield found


def is_layer(node: onnx.NodeProto, wiring: Wiring) -> bool:
    """Whether the node is a Conv or a plain Gemm with float32 constants, and channels along the second axis."""
    plain = node.op_type == "Conv" or (node.op_type == "Gemm" and is_plain_gemm(node))
    constants = [wiring.initializers.get(name) for name in node.input[1:] if name]
    return plain and bool(constants) and all(each is not None and each.data_type == 1 for each in constants)


def keeps_channels(node: onnx.NodeProto, activations: Sequence[str], wiring: Wiring) -> bool:
    """Whether each channel of the output is made of that channel of the inputs alone, as a mean, a choice or a sum."""
    if node.op_type in ("Add", "Sum"):
        return len(activations) == len(node.input) == 2
    if node.op_type == "ReduceMean":
        return set(_axes(node, wiring)) in ({2, 3}, {-2, -1})
    if node.op_type == "Flatten":
        return int(attribute(node, "axis", 1)) == 1
    return node.op_type in ("MaxPool", "AveragePool", "GlobalAveragePool", "Identity")


def _axes(node: onnx.NodeProto, wiring: Wiring) -> list[int]:
    from onnx import numpy_helper

    if len(node.input) > 1 and node.input[1] in wiring.initializers:
        return [int(axis) for axis in numpy_helper.to_array(wiring.initializers[node.input[1]])]
    return list(attribute(node, "axes", []))


# --- what values channels take


@dataclass(frozen=True, eq=False)
class Statistics:
    """Of the channels of a tensor on the samples, (channels,)."""

    low: Array
    high: Array
    sums: Array  # of each sample's mean
    squares: Array  # of each sample's mean of squares
    samples: int

    @classmethod
    def of_nothing(cls, channels: int) -> Statistics:
        """Before the first sample."""
        ends, zeros = np.full(channels, np.inf, np.float32), np.zeros(channels)
        return cls(ends, -ends, zeros, zeros, 0)

    def and_of(self, values: Array) -> Statistics:
        """Those of (samples, channels, places) more."""
        sums, squares = self.sums, self.squares
        for sample in values:  # one by one, so that no sum depends on how many run at once
            exact = sample.astype(np.float64)
            sums, squares = sums + exact.mean(axis=1), squares + np.square(exact).mean(axis=1)
        return Statistics(
            np.minimum(self.low, values.min(axis=(0, 2))),
            np.maximum(self.high, values.max(axis=(0, 2))),
            sums,
            squares,
            self.samples + len(values),
        )

    @property
    def largest(self) -> Array:
        """Magnitude."""
        return np.maximum(self.high, -self.low)

    @property
    def square(self) -> Array:
        """Mean of squares over all samples."""
        return np.asarray(self.squares / self.samples)

    def lowered(self, by: Array) -> Statistics:
        """Those of the tensor less a number for each channel."""
        squares = self.squares - 2 * by * self.sums + self.samples * np.square(by)
        return Statistics(self.low - by, self.high - by, self.sums - self.samples * by, squares, self.samples)


def look(
    graph: Graph, tensors: Sequence[str], batches: Sequence[Mapping[str, Array]], cuts: Sequence[int]
) -> dict[str, Statistics]:
    """The statistics of tensors, (n, channels, ...), on samples that wait before the nodes of `cuts`."""
    found: dict[str, Statistics] = {}
    for name, array in watch_all(graph.model, batches, tensors, cuts=cuts):
        values = array.reshape(*array.shape[:2], -1)
        found[name] = found.get(name, Statistics.of_nothing(values.shape[1])).and_of(values)
    return found


def known_of(each: ChannelSet, statistics: Mapping[str, Statistics], weights: Weights) -> dict[str, Statistics]:
    """What is known of the tensors that have the set's channels; nothing where layers write different numbers."""
    channels = {weights.channels(writer) for writer in each.writers}
    return {
        tensor: statistics[tensor]
        for tensor in each.tensors
        if tensor in statistics and {len(statistics[tensor].low)} == channels
    }


# --- weights


class Weights:
    """The weights of layers, being changed; each layer gets its own, though they were shared."""

    def __init__(self, wiring: Wiring) -> None:
        self._wiring = wiring
        self._changed: dict[int, list[Array]] = {}

    def channels(self, index: int) -> int:
        """Output channels of a layer."""
        return int(self._arrays(index)[0].shape[self._output_axis(index)])

    def scale_outputs(self, index: int, scale: Array) -> None:
        """Multiplies weights and bias."""
        weight, *bias = self._arrays(index)
        shape = [-1 if axis == self._output_axis(index) else 1 for axis in range(weight.ndim)]
        self._changed[index] = [weight * scale.reshape(shape), *(each * scale for each in bias)]

    def scale_inputs(self, index: int, scale: Array) -> None:
        """Multiplies the weights that read each channel."""
        weight, *bias = self._arrays(index)
        geometry, matrix = self._matrix(index)
        self._changed[index] = [geometry.unfold(matrix * _spread(scale, matrix), weight), *bias]

    def raise_outputs(self, index: int, by: Array) -> None:
        """Adds a number to each channel that a layer writes; it has a bias then."""
        weight, *bias = self._arrays(index)
        self._changed[index] = [weight, bias[0] + by if bias else by]

    def raise_inputs(self, index: int, by: Array) -> None:
        """Adds to the bias what the weights make of a number added to each channel that a layer reads, or of one for
        all.
        """
        matrix = self._matrix(index)[1].astype(np.float64)
        self.raise_outputs(index, (matrix * _spread(by, matrix)).sum(axis=2).reshape(-1))

    def double_outputs(self, index: int, apart: float) -> None:
        """Every channel that a layer writes twice, the second time with a number added; it has a bias then."""
        weight, *bias = self._arrays(index)
        once = bias[0] if bias else np.zeros(self.channels(index))
        axis = self._output_axis(index)
        self._changed[index] = [np.concatenate([weight, weight], axis=axis), np.concatenate([once, once + apart])]

    def double_inputs(self, index: int, apart: float) -> None:
        """Half of each weight for a channel and half for its double, which is so much larger; without groups."""
        self.raise_inputs(index, np.array([-apart / 2]))
        weight, bias = self._arrays(index)
        self._changed[index] = [np.concatenate([weight / 2, weight / 2], axis=1 - self._output_axis(index)), bias]

    def size(self, index: int) -> int:
        """How many numbers the weight of a layer is."""
        return int(self._arrays(index)[0].size)

    def reading(self, index: int, channels: int) -> tuple[Array, Array]:
        """Of each channel that a layer reads: the sum of its squared weights, and that of their squared steps."""
        geometry, matrix = self._matrix(index)
        power = (matrix**2).sum(axis=1)  # (groups, inputs)
        steps = ((np.abs(matrix).max(axis=2) / _WEIGHT_LEVELS) ** 2).sum(axis=1)  # (groups,)
        each = matrix.shape[0] * matrix.shape[2] // channels
        return power.reshape(channels, each).sum(axis=1), np.repeat(steps, channels // geometry.groups) * each

    def put_into(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """The model with all that was changed, under the names it had where nobody else reads it. In place."""
        from onnx import numpy_helper

        stored = {tensor.name: tensor for tensor in model.graph.initializer}
        for index, arrays in self._changed.items():
            node = model.graph.node[index]
            names = [*filter(None, node.input[1:]), f"{node.output[0]}.offset"][: len(arrays)]
            for slot, (name, array) in enumerate(zip(names, arrays, strict=True)):
                if name not in stored or len(self._wiring.readers[name]) > 1:
                    names[slot] = name if name not in stored else f"{node.output[0]}.{name}"
                    stored[names[slot]] = model.graph.initializer.add()
                stored[names[slot]].CopyFrom(numpy_helper.from_array(array.astype(np.float32), names[slot]))
            del node.input[1:]
            node.input.extend(names)
        drop_unused_initializers(model)
        return model

    def _arrays(self, index: int) -> list[Array]:
        from onnx import numpy_helper

        names = [name for name in self._wiring.nodes[index].input[1:] if name]
        return self._changed.get(index) or [numpy_helper.to_array(self._wiring.initializers[name]) for name in names]

    def _output_axis(self, index: int) -> int:
        node = self._wiring.nodes[index]
        return 0 if node.op_type == "Conv" or attribute(node, "transB", 0) else 1

    def _matrix(self, index: int) -> tuple[Geometry, Array]:
        weight = self._arrays(index)[0]
        geometry = Geometry.of(self._wiring.nodes[index], weight, self._output_axis(index))
        return geometry, geometry.matrix(weight)


def _spread(numbers: Array, matrix: Array) -> Array:
    """One number for each input, (groups, 1, inputs): a channel's inputs lie together."""
    each = matrix.shape[0] * matrix.shape[2] // len(numbers)
    return np.repeat(numbers, each).reshape(len(matrix), 1, -1)
