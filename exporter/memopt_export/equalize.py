"""Channels brought to similar ranges by scaling them up in the layer that writes and down in the layers that read.

The graph computes the same (M. Nagel et al. 2019, https://arxiv.org/abs/1906.04721, section 4.1). There it evens out
weights; here weights have a scale for each channel anyway, and what has one scale for all channels is the activation:
a channel that uses a tenth of the range is rounded in ten times too large steps. So scales follow from activations on
real samples, up to where rounding the scaled weights would cost more than it saves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from memopt.tensors import Array
from memopt_export.bodies import captured
from memopt_export.graph import Graph, Wiring, attribute, wire
from memopt_export.patches import Geometry
from memopt_export.placement import Placement, is_absorbed, is_plain_gemm
from memopt_export.simplify import drop_unused_initializers
from memopt_export.walk import watch_all

if TYPE_CHECKING:
    import onnx

# f(scale * x) = scale * f(x) for every channel alone.
_HOMOGENEOUS = frozenset({"Relu", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool", "Identity"})
_LARGEST_SCALE = 64.0
# Part of the way to equal ranges, in the exponent. The largest value of a channel is known from samples only, and the
# whole way would clip what no sample has shown.
_PART = 0.5
_LEVELS = 255  # of an activation
_WEIGHT_LEVELS = 127


def equalize(
    graph: Graph, placement: Placement, batches: Sequence[Mapping[str, Array]], *, cuts: Sequence[int] = ()
) -> Graph:
    """The graph with other weights and the same outputs on the samples, up to rounding.

    Scaled are channels of tensors that layers write, and that only layers read, through operations that commute with
    scaling: Relu, LeakyRelu, poolings, means over height and width, sums of two such tensors, Flatten before a Gemm. A
    Clip from zero is taken for one: it then cuts a scaled channel off lower, but above all that a sample has shown.

    Args:
        graph: the float graph.
        placement: says which tensors are quantized, at any rate.
        batches: samples to run.
        cuts: nodes before which they wait, see `collect_ranges`.
    """
    wiring = wire(graph.model)
    sets = list(_channel_sets(wiring))
    wanted = [tensor for each in sets for tensor in each.tensors if tensor in placement.ranges_of]
    statistics = _look(graph, wanted, batches, cuts)
    weights = _Weights(wiring)
    for each in sets:
        known = [statistics[tensor] for tensor in each.tensors if tensor in statistics]
        channels = weights.channels(each.writers[0])
        known = [found for found in known if len(found.largest) == channels]
        if known and all(weights.channels(writer) == channels for writer in each.writers):
            scale = _scale(each, known, weights, channels)
            for writer in each.writers:
                weights.scale_outputs(writer, scale)
            for reader in each.readers:
                weights.scale_inputs(reader, 1 / scale)
    return graph.with_model(weights.put_into(graph.copy_model()))


@dataclass
class _ChannelSet:
    """Tensors whose channels have to be scaled alike; the layers that write them, and those that read them."""

    tensors: list[str] = field(default_factory=list)
    writers: list[int] = field(default_factory=list)
    readers: list[int] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class _Statistics:
    """Of the channels of a tensor on the samples, (channels,)."""

    largest: Array  # magnitude
    squares: Array  # the mean over a sample, added up
    samples: int

    @property
    def square(self) -> Array:
        """Mean over all samples."""
        return np.asarray(self.squares / self.samples)


def _channel_sets(wiring: Wiring) -> Iterator[_ChannelSet]:
    """The sets in the order of the graph, without those that something else than layers writes or reads."""
    home: dict[str, _ChannelSet] = {}
    blocked: list[str] = list(wiring.outputs)

    def set_of(tensor: str) -> _ChannelSet:
        if tensor not in home:
            home[tensor] = _ChannelSet([tensor])
            if tensor not in wiring.writer:
                blocked.append(tensor)
        return home[tensor]

    def join(first: str, second: str) -> None:
        one, other = set_of(first), set_of(second)
        if one is not other:
            for part in ("tensors", "writers", "readers"):
                getattr(one, part).extend(getattr(other, part))
            home.update(dict.fromkeys(other.tensors, one))

    for index, node in enumerate(wiring.nodes):
        blocked += captured(node)
        activations = [name for name in node.input if name and not wiring.is_constant(name)]
        if _is_layer(node, wiring):
            set_of(node.input[0]).readers.append(index)
            set_of(node.output[0]).writers.append(index)
        elif _commutes(node, activations, wiring):
            for name in activations:
                join(name, node.output[0])
        else:
            blocked += [*activations, *node.output]
            for name in (*activations, *node.output):
                set_of(name)
    closed = {id(home[name]) for name in blocked if name in home}
    for key, found in {id(each): each for each in home.values()}.items():
        if key not in closed and found.writers and found.readers:
            yield found


def _is_layer(node: onnx.NodeProto, wiring: Wiring) -> bool:
    """Whether the node is a Conv or a plain Gemm with float32 constants, and channels along the second axis."""
    plain = node.op_type == "Conv" or (node.op_type == "Gemm" and is_plain_gemm(node))
    constants = [wiring.initializers.get(name) for name in node.input[1:] if name]
    return plain and bool(constants) and all(each is not None and each.data_type == 1 for each in constants)


def _commutes(node: onnx.NodeProto, activations: Sequence[str], wiring: Wiring) -> bool:
    if node.op_type in ("Add", "Sum"):
        return len(activations) == len(node.input) == 2
    if node.op_type == "ReduceMean":
        return set(_axes(node, wiring)) in ({2, 3}, {-2, -1})
    if node.op_type == "Flatten":
        return int(attribute(node, "axis", 1)) == 1
    if node.op_type == "Clip":
        return is_absorbed(node, wiring)
    return node.op_type in _HOMOGENEOUS


def _axes(node: onnx.NodeProto, wiring: Wiring) -> list[int]:
    from onnx import numpy_helper

    if len(node.input) > 1 and node.input[1] in wiring.initializers:
        return [int(axis) for axis in numpy_helper.to_array(wiring.initializers[node.input[1]])]
    return list(attribute(node, "axes", []))


def _look(
    graph: Graph, tensors: Sequence[str], batches: Sequence[Mapping[str, Array]], cuts: Sequence[int]
) -> dict[str, _Statistics]:
    found: dict[str, _Statistics] = {}
    for name, array in watch_all(graph.model, batches, tensors, cuts=cuts):
        for sample in array:  # one by one, so that no sum depends on how many run at once
            found[name] = _joined(found.get(name), _statistics(sample))
    return found


def _statistics(sample: Array) -> _Statistics:
    flat = sample.reshape(len(sample), -1)
    largest = np.maximum(flat.max(axis=1), -flat.min(axis=1))
    return _Statistics(largest, np.square(flat).mean(axis=1, dtype=np.float64), 1)


def _joined(first: _Statistics | None, second: _Statistics) -> _Statistics:
    if first is None:
        return second
    return _Statistics(
        np.maximum(first.largest, second.largest),
        first.squares + second.squares,
        first.samples + second.samples,
    )


def _scale(each: _ChannelSet, known: Sequence[_Statistics], weights: _Weights, channels: int) -> Array:
    """What each channel is multiplied by, (channels,), at least 1.

    A channel could be scaled until its largest value is that of the tensor. Rounding it with a step of its tensor then
    errs by step² / 12 times what the readers make of it, and falls with scale²; rounding the readers' weights errs by
    what their steps, of weights that are not scaled down, make of its values, and rises with scale².
    """
    room = np.full(channels, _LARGEST_SCALE)
    from_activations, from_weights = np.zeros(channels), np.zeros(channels)
    step = float(np.max([found.largest for found in known])) / _LEVELS
    square = np.mean([found.square for found in known], axis=0)
    for found in known:
        end = np.maximum(found.largest.max(), np.finfo(np.float32).tiny)
        room = np.minimum(room, (end / np.maximum(found.largest, end / _LARGEST_SCALE)) ** _PART)
    for reader in each.readers:
        power, steps = weights.reading(reader, channels)
        from_activations += power * step**2
        from_weights += steps * square
    best = (from_activations / np.maximum(from_weights, np.finfo(np.float32).tiny)) ** 0.25
    return np.asarray(np.maximum(np.minimum(room, best), 1.0))


class _Weights:
    """The weights of layers, changed by scaling; each layer gets its own, though they were shared."""

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
        factors = self._spread(scale, geometry, matrix)
        self._changed[index] = [geometry.unfold(matrix * factors, weight), *bias]

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
            for slot, array in enumerate(arrays, 1):
                name = node.input[slot]
                if len(self._wiring.readers[name]) > 1:
                    name = node.input[slot] = f"{node.output[0]}.{name}"
                    stored[name] = model.graph.initializer.add()
                stored[name].CopyFrom(numpy_helper.from_array(array.astype(np.float32), name))
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

    def _spread(self, scale: Array, geometry: Geometry, matrix: Array) -> Array:
        """One factor for each input, (groups, 1, inputs): a channel's inputs lie together."""
        each = matrix.shape[0] * matrix.shape[2] // len(scale)
        return np.repeat(scale, each).reshape(geometry.groups, 1, -1)
