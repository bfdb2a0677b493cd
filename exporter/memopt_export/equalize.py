"""Channels brought to similar ranges by scaling them up in the layer that writes and down in the layers that read.

The graph computes the same (M. Nagel et al. 2019, https://arxiv.org/abs/1906.04721, section 4.1). There it evens out
weights; here weights have a scale for each channel anyway, and what has one scale for all channels is the activation:
a channel that uses a tenth of the range is rounded in ten times too large steps. So scales follow from activations on
real samples, up to where rounding the scaled weights would cost more than it saves. Before, channels are moved to the
middle of their ranges where that can be (`centre`), which makes them shorter; afterwards narrow tensors are stored
twice (`twofold`), which makes their steps finer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from memopt.tensors import Array
from memopt_export.centre import centre_clipped, centre_linear, clipped_sets, linear_sets, put_clips
from memopt_export.channels import (
    LEVELS,
    ChannelSet,
    Rules,
    Statistics,
    Weights,
    channel_sets,
    is_layer,
    keeps_channels,
    known_of,
    look,
)
from memopt_export.graph import Graph, Wiring, wire
from memopt_export.placement import Placement, is_absorbed
from memopt_export.twofold import store_twice, worth_two

if TYPE_CHECKING:
    import onnx

_LARGEST_SCALE = 64.0
# Part of the way to equal ranges, in the exponent. The largest value of a channel is known from samples only, and the
# whole way would clip what no sample has shown.
_PART = 0.5


def equalize(
    graph: Graph, placement: Placement, batches: Sequence[Mapping[str, Array]], *, cuts: Sequence[int] = ()
) -> Graph:
    """The graph with other weights and the same outputs on the samples, up to rounding.

    Scaled are channels of tensors that layers write, and that only layers read, through operations that commute with
    scaling: Relu, LeakyRelu, poolings, means over height and width, sums of two such tensors, Flatten before a Gemm. A
    Clip from zero is taken for one: it then cuts a scaled channel off lower, but above all that a sample has shown.

    Args:
        graph: the float graph, simplified, so that it says no shapes of tensors between its nodes.
        placement: says which tensors are quantized, at any rate.
        batches: samples to run.
        cuts: nodes before which they wait, see `collect_ranges`.
    """
    wiring = wire(graph.model)
    scaled = list(_scaled_sets(wiring))
    linear = list(linear_sets(wiring)) if placement.form != "fp8" else []  # floats are finest around zero as it is
    clipped = list(clipped_sets(wiring)) if placement.form == "tensorrt" else []
    tensors = dict.fromkeys(tensor for each in (*linear, *scaled, *clipped) for tensor in each.tensors)
    wanted = [tensor for tensor in tensors if tensor in placement.ranges_of]
    statistics = look(graph, wanted, batches, cuts)
    weights = Weights(wiring)
    for each in linear:
        centre_linear(each, statistics, wiring, weights)
    for each in scaled:
        if known := list(known_of(each, statistics, weights).values()):
            scale = _scale(each, known, weights)
            for writer in each.writers:
                weights.scale_outputs(writer, scale)
            for reader in each.readers:
                weights.scale_inputs(reader, 1 / scale)
    lowered: dict[int, float] = {}
    for each in clipped:  # last, since no scale goes through the Clips that it leaves, and none has moved the ends
        lowered |= centre_clipped(each, statistics, wiring, weights)
    layers = {layer.index for layer in placement.layers}
    for each in worth_two(linear, layers, statistics, weights, wiring):
        store_twice(each, statistics, weights, wiring)
    model = graph.copy_model()
    put_clips(model, wiring, lowered)
    return graph.with_model(weights.put_into(model))


def _scaled_sets(wiring: Wiring) -> Iterator[ChannelSet]:
    def layer(index: int) -> bool:
        return is_layer(wiring.nodes[index], wiring)

    return channel_sets(wiring, Rules(writes=layer, reads=layer, commutes=_commutes))


def _commutes(node: onnx.NodeProto, activations: Sequence[str], wiring: Wiring) -> bool:
    """Whether f(scale * x) = scale * f(x) for every channel alone."""
    if node.op_type == "Clip":
        return is_absorbed(node, wiring)
    return node.op_type in ("Relu", "LeakyRelu") or keeps_channels(node, activations, wiring)


def _scale(each: ChannelSet, known: Sequence[Statistics], weights: Weights) -> Array:
    """What each channel is multiplied by, (channels,), at least 1.

    A channel could be scaled until its largest value is that of the tensor. Rounding it with a step of its tensor then
    errs by step² / 12 times what the readers make of it, and falls with scale²; rounding the readers' weights errs by
    what their steps, of weights that are not scaled down, make of its values, and rises with scale².
    """
    channels = len(known[0].low)
    room = np.full(channels, _LARGEST_SCALE)
    from_activations, from_weights = np.zeros(channels), np.zeros(channels)
    step = float(np.max([found.largest for found in known])) / LEVELS
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
