"""Narrow tensors stored twice, half a step apart: the mean of both has steps of half the size, one more bit.

The layer that writes has every output channel twice, the second time with half a step added to its bias; the layers
that read have half of each weight for either, and a bias that takes the rest back. The float graph computes the same.
It is what R. Zhao et al. 2019, https://arxiv.org/abs/1901.09504, section 3.3 do to the outliers of a tensor, done to
all of it for the sake of the steps.

Linear bottlenecks are worth it: all that a network knows passes through few channels, without a function behind that
would forgive an error. In mobilenet_v2 the first three widths of bottlenecks hold 2% of the weights and make half of
the noise of rounded activations; twofold, the network's output has 1.7 dB less noise, for 2% of bytes and 3 to 6% of
time.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from memopt.tensors import Array
from memopt_export.centre import counts_of
from memopt_export.channels import LEVELS, ChannelSet, Statistics, Weights, known_of
from memopt_export.graph import Wiring, attribute

_PRICE = 0.03  # of all weights, which may be added
_WIDER = 2  # at least so many times the channels are written by the layers that read: the tensor is not a large one
_CANDIDATES = np.arange(-4, 4) + 0.5  # steps between the two, for a layer whose output is added to others


def worth_two(
    sets: Sequence[ChannelSet], layers: Collection[int], statistics: Mapping[str, Statistics], weights: Weights,
    wiring: Wiring,
) -> list[ChannelSet]:  # fmt: skip
    """The cheapest of sets of linear tensors, as many as may be stored twice. They have the fewest channels, which
    stand for the most; `layers` are those that are quantized.
    """
    most = _PRICE * sum(weights.size(index) for index in layers)
    priced = sorted(
        (sum(weights.size(index) for index in (*each.writers, *each.readers)), order)
        for order, each in enumerate(sets)
        if _is_narrow(each, layers, statistics, weights, wiring)
    )
    spent = itertools.accumulate(price for price, _ in priced)
    return [sets[order] for total, (_, order) in zip(spent, priced, strict=True) if total <= most]


def store_twice(each: ChannelSet, statistics: Mapping[str, Statistics], weights: Weights, wiring: Wiring) -> None:
    """Doubles the channels of a set, in the weights, which are changed in place."""
    counts = counts_of(each, wiring)
    steps = {
        tensor: 2 * float(statistics[tensor].largest.max()) / LEVELS for tensor in each.tensors if tensor in statistics
    }
    apart = _half_steps([(counts[tensor], step) for tensor, step in steps.items() if step > 0], len(each.writers))
    for writer, offset in zip(each.writers, apart, strict=True):
        weights.double_outputs(writer, offset)
    for reader in each.readers:
        weights.double_inputs(reader, float(counts[wiring.nodes[reader].input[0]] @ apart))


def _is_narrow(
    each: ChannelSet, layers: Collection[int], statistics: Mapping[str, Statistics], weights: Weights, wiring: Wiring
) -> bool:
    quantized = all(index in layers for index in (*each.writers, *each.readers))
    whole = all(attribute(wiring.nodes[index], "group", 1) == 1 for index in (*each.writers, *each.readers))
    widened = min(map(weights.channels, each.readers)) >= _WIDER * weights.channels(each.writers[0])
    return quantized and whole and widened and bool(known_of(each, statistics, weights))


def _half_steps(tensors: Sequence[tuple[Array, float]], writers: int) -> Array:
    """How far apart each writer's two are, so that the two of each tensor differ by an odd number of half steps, or
    nearly so where it is a sum.

    A writer after the other chooses for the tensors that wait for no later one. `tensors` are given by how often each
    writer is in it, and its step.
    """
    apart = np.zeros(writers)
    for writer in range(writers):
        mine = [(counts, step) for counts, step in tensors if counts[writer] and not counts[writer + 1 :].any()]
        if not mine:
            continue
        tried = _CANDIDATES * min(step for _, step in mine)
        steps = np.array([(counts @ apart + counts[writer] * tried) / step for counts, step in mine])
        missed = np.square(steps - np.floor(steps) - 0.5).sum(axis=0) + 1e-6 * tried**2
        apart[writer] = tried[missed.argmin()]
    return apart
