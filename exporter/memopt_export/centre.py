"""Channels moved to the middle of their ranges by the biases before them, and back by the biases behind.

The graph computes the same. A range around zero is as short as it can be, so its steps are: a channel between 1 and 5
needs 10 units of steps to both sides of zero as it stands, and 4 when 3 is taken away from it. With signed symmetric
integers all that a Relu writes is such a channel, and half of the integers are never used.

1. What a layer writes, and sums of it: each channel on its own, by the layer's bias. Middles of sums are those of the
   summands, so they are chosen together, by least squares.
2. What a Relu or a Clip from zero writes behind a layer: all channels alike, for symmetric integers. The function
   becomes a Clip from below, min(max(x, 0), high) - m = min(max(x - m, -m), high - m), and the layer's bias is lower.

Padding adds zeros, which would have to move too, so the layers that read must not pad.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from memopt.tensors import Array
from memopt_export.channels import (
    ChannelSet,
    Rules,
    Statistics,
    Weights,
    channel_sets,
    is_layer,
    keeps_channels,
    known_of,
)
from memopt_export.graph import Wiring, attribute
from memopt_export.patches import pads
from memopt_export.placement import is_absorbed

if TYPE_CHECKING:
    import onnx


def linear_sets(wiring: Wiring) -> Iterator[ChannelSet]:
    """Sets that layers write."""
    rules = Rules(
        writes=lambda index: is_layer(wiring.nodes[index], wiring),
        reads=lambda index: _is_unpadded(wiring.nodes[index], wiring),
        commutes=_commutes,
    )
    return channel_sets(wiring, rules)


def clipped_sets(wiring: Wiring) -> Iterator[ChannelSet]:
    """Sets that a Relu or a Clip from zero writes, each alone behind a layer."""
    rules = Rules(
        writes=lambda index: _is_behind_a_layer(index, wiring),
        reads=lambda index: _is_unpadded(wiring.nodes[index], wiring),
        commutes=_commutes,
    )
    return channel_sets(wiring, rules)


def centre_linear(each: ChannelSet, statistics: dict[str, Statistics], wiring: Wiring, weights: Weights) -> None:
    """Moves each channel on its own; weights and statistics are changed in place."""
    known = known_of(each, statistics, weights)
    if not known:
        return
    counts = counts_of(each, wiring)
    middles = np.array([(found.low + found.high) / 2 for found in known.values()], np.float64)
    spans = [np.ptp([found.low, found.high]) for found in known.values()]
    equal = 1 / np.maximum(spans, np.finfo(np.float32).tiny)[:, None]  # a step of each counts the same
    written = np.linalg.lstsq(np.array([counts[tensor] for tensor in known]) * equal, middles * equal, rcond=None)[0]
    for writer, lower in zip(each.writers, written, strict=True):
        weights.raise_outputs(writer, -lower)
    for reader in each.readers:
        weights.raise_inputs(reader, counts[wiring.nodes[reader].input[0]] @ written)
    for tensor, found in known.items():
        statistics[tensor] = found.lowered(counts[tensor] @ written)


def centre_clipped(
    each: ChannelSet, statistics: Mapping[str, Statistics], wiring: Wiring, weights: Weights
) -> dict[int, float]:
    """Moves all channels of what each writer writes alike, by half of the largest value: what is taken away, by the
    writer's index. Weights are changed in place, the functions are still to be (`put_clips`).
    """
    outputs = [wiring.nodes[writer].output[0] for writer in each.writers]
    if not all(output in statistics for output in outputs):
        return {}
    lower = np.array([float(statistics[output].high.max()) / 2 for output in outputs])
    counts = counts_of(each, wiring)
    for writer, by in zip(each.writers, lower, strict=True):
        layer = wiring.writer[wiring.nodes[writer].input[0]]
        weights.raise_outputs(layer, np.full(weights.channels(layer), -by))
    for reader in each.readers:
        weights.raise_inputs(reader, np.array([counts[wiring.nodes[reader].input[0]] @ lower]))
    return dict(zip(each.writers, lower.tolist(), strict=True))


def put_clips(model: onnx.ModelProto, wiring: Wiring, lowered: Mapping[int, float]) -> None:
    """Makes every Relu and Clip that is named a Clip that is lower by so much. In place."""
    from onnx import helper, numpy_helper

    for index, by in lowered.items():
        node = model.graph.node[index]
        high = wiring.scalar(node.input[2]) if len(node.input) > 2 else None
        ends = [-by] if high is None else [-by, high - by]
        names = [f"{node.output[0]}.{end}" for end in ("low", "high")][: len(ends)]
        model.graph.initializer.extend(
            numpy_helper.from_array(np.asarray(end, np.float32), name) for name, end in zip(names, ends, strict=True)
        )
        node.CopyFrom(helper.make_node("Clip", [node.input[0], *names], list(node.output), name=node.name))


def _commutes(node: onnx.NodeProto, activations: Sequence[str], wiring: Wiring) -> bool:
    """Whether moving commutes with it: means do not where they count padding."""
    counted = node.op_type == "AveragePool" and attribute(node, "count_include_pad", 0) and pads(node)
    return keeps_channels(node, activations, wiring) and not counted


def _is_unpadded(node: onnx.NodeProto, wiring: Wiring) -> bool:
    return is_layer(node, wiring) and not pads(node)


def _is_behind_a_layer(index: int, wiring: Wiring) -> bool:
    """Whether the node is a Relu or a Clip from zero that alone reads what a layer writes."""
    node = wiring.nodes[index]
    writer = wiring.writer.get(node.input[0]) if is_absorbed(node, wiring) else None
    return writer is not None and is_layer(wiring.nodes[writer], wiring) and wiring.sole_reader(node.input[0]) == index


def counts_of(each: ChannelSet, wiring: Wiring) -> dict[str, Array]:
    """How often what each writer writes is in each tensor, (writers,)."""
    own = np.eye(len(each.writers))
    counts = {wiring.nodes[writer].output[0]: row for writer, row in zip(each.writers, own, strict=True)}
    for index in sorted(each.between):
        node = wiring.nodes[index]
        counts[node.output[0]] = sum((counts[name] for name in node.input if name in counts), np.zeros(len(own)))
    return counts
