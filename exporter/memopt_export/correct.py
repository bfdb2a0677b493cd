"""Weights chosen layer by layer, so that each layer's outputs are those of the float graph on real samples.

Two walks go through the graph side by side: the float graph, and the quantized one with all layers before this one as
they have been chosen. A layer is rounded for what it will really read (`gptq`), then its bias takes back what the mean
of each channel has moved, counted only where the function behind lets it through. Without that mask, means are matched
where a ReLU6 discards the values.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from memopt.tensors import Array
from memopt_export.activation import Activation, behind
from memopt_export.affine import LARGEST_FLOAT8, Affine, bias_scale, quantize_bias, with_room_for_bias
from memopt_export.calibrate import Ranges
from memopt_export.gptq import round_in_order
from memopt_export.graph import Graph, Wiring, wire
from memopt_export.means import Means
from memopt_export.patches import Geometry
from memopt_export.placement import Layer, Placement
from memopt_export.qdq import FORMATS, Simulation, Stored, float_weights, input_affine, nearest, simulate
from memopt_export.recipe import Recipe
from memopt_export.walk import Walk

# Rows of a layer's inputs that give its moments: this many for each input, within these ends.
_ROWS_PER_INPUT, _FEWEST_ROWS, _MOST_ROWS = 4, 4096, 16384
# Rows on which outputs are compared, and what they may take.
_COMPARED_ROWS, _COMPARED_BYTES = 4096, 32 * 2**20
_BLOCK_ROWS = 1024  # whose moments are taken, and outputs computed, at once
# Inputs whose moments are taken together; a layer with more is rounded in parts, since the cost is their third power.
_MOST_INPUTS = 1536
_ROUNDS = 3  # of the correction of a bias; the function behind is not linear
_PRIOR_ROWS = 16  # rows without error that a channel's mean is weighed against


def choose_weights(
    graph: Graph,
    placement: Placement,
    ranges: Ranges,
    batches: Sequence[Mapping[str, Array]],
    recipe: Recipe,
    means: Means,
) -> dict[int, Stored]:
    """What each layer stores, by its index.

    Args:
        graph: the float graph.
        placement: where it is quantized.
        ranges: of all tensors in it that are.
        batches: samples to run.
        recipe: `correction` is "gptq", "bias" or "none".
        means: told after each layer.
    """
    largest = 2 ** (recipe.weight_bits - 1) - 1
    wiring = wire(graph.model)
    if recipe.correction == "none":
        return {layer.index: nearest(layer, wiring, placement, ranges, largest=largest) for layer in placement.layers}
    simulation = simulate(graph, placement, ranges)
    chosen = {}
    with tempfile.TemporaryDirectory(prefix="memopt-") as folder, tempfile.TemporaryDirectory(prefix="memopt-") as own:
        walks = _Walks(Walk(graph.model, batches, Path(folder)), Walk(simulation.graph.model, batches, Path(own)))
        for done, layer in enumerate(placement.layers, 1):
            walks.advance(layer.index, simulation)
            inputs = input_affine(layer, wiring, placement, ranges)
            start = nearest(layer, wiring, placement, ranges, largest=largest)
            work = _Work(layer, wiring, simulation, inputs, largest, int32_bias=FORMATS[placement.form].int32_bias)
            chosen[layer.index] = stored = _choose(
                work, walks, ranges.samples, start, rounds_in_order=recipe.correction == "gptq"
            )
            walks.quantized.change(simulation.weights[layer.index], stored.weight)
            if stored.bias is not None:
                walks.quantized.change(simulation.biases[layer.index], work.stored_bias(stored))
            means.tell("correct", done, len(placement.layers))
    return chosen


@dataclass(frozen=True)
class _Walks:
    """The float graph and the quantized one, at the same place."""

    plain: Walk
    quantized: Walk

    def advance(self, index: int, simulation: Simulation) -> None:
        """Takes both to the layer of this index."""
        self.plain.pass_to(index)
        self.quantized.pass_to(simulation.positions[index])


@dataclass(frozen=True)
class _Work:
    """One layer, and all that is known of it."""

    layer: Layer
    wiring: Wiring
    simulation: Simulation
    inputs: Affine
    largest: int
    int32_bias: bool

    def stored_bias(self, stored: Stored) -> Array:
        """The bias as the quantized layer adds it."""
        assert stored.bias is not None
        if not self.int32_bias:
            return stored.bias
        scale = bias_scale(self.inputs, stored.affine)
        return np.asarray(quantize_bias(stored.bias, scale) * scale, np.float32)


def _choose(work: _Work, walks: _Walks, samples: int, start: Stored, *, rounds_in_order: bool) -> Stored:
    """The layer's weights and bias; `start` has them rounded to nearest."""
    node = work.wiring.nodes[work.layer.index]
    weight, bias = float_weights(node, work.wiring)
    geometry = Geometry.of(node, weight, work.layer.axis)
    matrix = geometry.matrix(weight)
    bias = np.zeros(matrix.shape[0] * matrix.shape[1], np.float32) if bias is None else bias
    parts = parts_of(matrix.shape[2]) if rounds_in_order else None
    found = _look(work, walks, geometry, matrix, samples, parts)
    stored = start
    if parts is not None:
        rounded = _round(matrix, start.affine, found.moments, work.largest)
        stored = replace(start, integers=start.affine.quantize(geometry.unfold(rounded, weight)))
    if work.layer.index not in work.simulation.biases:
        return stored
    expected = found.expected + bias
    got = _multiply(found.rows, geometry.matrix(stored.weight)) + bias
    corrected = bias + _missing(expected, got, behind(work.layer.index, work.wiring))
    affine = with_room_for_bias(stored.affine, corrected, work.inputs) if work.int32_bias else stored.affine
    if (affine.scale != stored.affine.scale).any():  # a channel of next to nothing but bias
        stored = replace(stored, integers=affine.quantize(stored.weight), affine=affine)
    return replace(stored, bias=corrected.astype(np.float32))


@dataclass(frozen=True, eq=False)
class _Found:
    """What the samples say of a layer."""

    moments: Array  # (groups or parts, inputs, inputs), of what the quantized layer reads
    rows: Array  # some of it, (groups, rows, inputs)
    expected: Array  # the float layer's outputs at the same rows, without bias, (rows, channels)


def _look(work: _Work, walks: _Walks, geometry: Geometry, matrix: Array, samples: int, parts: int | None) -> _Found:
    """Drawn sample by sample and summed in blocks of samples, so that nothing depends on how many run at once."""
    groups, _, inputs = matrix.shape
    shape = (groups * (parts or 1), inputs // (parts or 1))
    moments = np.zeros((shape[0], shape[1], shape[1]) if parts else (0, 0, 0))
    sums, count = np.zeros(shape), 0
    wanted = min(max(_ROWS_PER_INPUT * inputs, _FEWEST_ROWS), _MOST_ROWS)
    kept = compared_rows(groups * inputs)
    rows, expected = [], []
    drawn = _draw(work, walks, geometry, wanted / samples if parts else 0, kept / samples)
    for read, some, plain in _in_blocks(drawn, max(_BLOCK_ROWS * samples // wanted, 1)):
        if parts:
            by_parts = read.reshape(groups, read.shape[1], parts, -1).swapaxes(1, 2)
            divided = by_parts.reshape(shape[0], read.shape[1], shape[1])
            moments += _second_moments(divided)
            sums += divided.sum(axis=1)
            count += read.shape[1]
        rows.append(some)
        expected.append(_multiply(plain, matrix))
    if parts:
        _shrink_chance(moments, sums, count)
    return _Found(moments, np.concatenate(rows, axis=1), np.concatenate(expected))


def _draw(
    work: _Work, walks: _Walks, geometry: Geometry, wanted: float, kept: float
) -> Iterator[tuple[Array, Array, Array]]:
    """Of each sample `wanted` rows that the quantized layer reads, `kept` of them, and the float layer's at the same
    places. A tensor that does not divide into the samples of its batch counts as one.
    """
    index = work.layer.index
    names = work.wiring.nodes[index].input[0], walks.quantized.reads(work.simulation.positions[index])
    both = zip(walks.plain.read(names[0]), walks.quantized.read(names[1]), strict=True)
    sample = 0
    for batch, ((plain,), (quantized,)) in enumerate(both):
        size = walks.plain.samples(batch)
        pieces = size if len(quantized) % size == 0 else 1
        there, share = geometry.positions(quantized) // pieces, size // pieces
        read, compared = (min(math.ceil(count * share), there) for count in (wanted, kept))
        most = max(read, compared)
        seeds = [(index, sample + share * piece) for piece in range(pieces)]
        drawn = np.array([np.random.default_rng(seed).choice(there, most, replace=False) for seed in seeds])
        order = np.argsort(drawn, axis=1)
        taken = np.take_along_axis(drawn, order, axis=1) + there * np.arange(pieces)[:, None]
        reads, compares = order < read, order < compared  # the first ones that were drawn
        rows = geometry.rows(quantized, taken.reshape(-1))
        found = rows[:, reads.reshape(-1)], rows[:, compares.reshape(-1)], geometry.rows(plain, taken[compares])
        yield from zip(*(np.split(each, pieces, axis=1) for each in found), strict=True)
        sample += size


def _in_blocks(drawn: Iterator[tuple[Array, ...]], size: int) -> Iterator[tuple[Array, ...]]:
    """The rows of so many draws, joined."""
    while block := list(itertools.islice(drawn, size)):
        yield tuple(np.concatenate(arrays, axis=1) for arrays in zip(*block, strict=True))


def compared_rows(inputs: int) -> int:
    """On how many rows of so many inputs, those of all groups together, a layer's outputs are compared."""
    return max(min(_COMPARED_ROWS, _COMPARED_BYTES // (4 * inputs)), 1)


def _second_moments(rows: Array) -> Array:
    return np.asarray(rows.swapaxes(1, 2) @ rows)


def _shrink_chance(moments: Array, sums: Array, count: int) -> None:
    """Makes moments, (groups, inputs, inputs), what more rows would give: covariances are shrunk by the part of them
    that so few rows show by chance. In place, since moments of many inputs are large.

    Without this, weights make up for errors of inputs that only seemed to go together: 192 inputs that have nothing in
    common lose 2 dB by GPTQ on 32 rows, and 0.7 dB on 600. The part is that of J. Schäfer and K. Strimmer 2005,
    https://doi.org/10.2202/1544-6115.1175, section 2.4 (target D), with the variance of a covariance as normal inputs
    have it. `sums`, (groups, inputs), and `count` are of the rows.
    """
    moments /= count
    for covariances, mean in zip(moments, sums / count, strict=True):
        both = np.outer(mean, mean)
        np.subtract(covariances, both, out=covariances)
        variances = np.diagonal(covariances).copy()
        squares = np.einsum("ij,ij->", covariances, covariances) - (variances**2).sum()
        chance = max((variances.sum() ** 2 - (variances**2).sum() + squares) / count, 0.0)
        np.multiply(covariances, 1 - min(chance / max(squares, np.finfo(np.float64).tiny), 1.0), out=covariances)
        np.fill_diagonal(covariances, variances)
        np.add(covariances, both, out=covariances)
    moments *= count


def parts_of(inputs: int) -> int | None:
    """Into how many equal parts a layer's inputs are divided; None where they are too many and do not divide."""
    least = -(-inputs // _MOST_INPUTS)
    return next((parts for parts in range(least, 4 * least + 1) if inputs % parts == 0), None)


def _round(matrix: Array, affine: Affine, moments: Array, largest: int) -> Array:
    """The weights that the chosen integers stand for, (groups, outputs, inputs)."""
    groups, outputs, inputs = matrix.shape
    parts = len(moments) // groups
    steps: Array = affine.scale.astype(np.float64).reshape(groups, 1, outputs, 1)
    scale = steps.repeat(parts, axis=1).reshape(-1, outputs, 1)

    dtype = affine.zero_point.dtype

    def store(weights: Array, _inputs: Array) -> Array:
        steps = weights / scale
        if dtype.kind in "iu":
            return np.asarray(steps.round().clip(-largest, largest) * scale)
        return np.asarray(steps.clip(-LARGEST_FLOAT8, LARGEST_FLOAT8).astype(dtype).astype(np.float64) * scale)

    split = matrix.reshape(groups, outputs, parts, -1).swapaxes(1, 2).reshape(groups * parts, outputs, -1)
    rounded = round_in_order(split, moments, store)
    return rounded.reshape(groups, parts, outputs, -1).swapaxes(1, 2).reshape(groups, outputs, inputs)


def _multiply(rows: Array, matrix: Array) -> Array:
    """The layer's outputs for these rows, (rows, channels)."""
    if matrix.shape[1] == 1:  # a depthwise convolution: many tiny products
        return np.asarray(np.einsum("gri,gi->rg", rows, matrix[:, 0].astype(np.float32)))
    products = rows @ matrix.astype(np.float32).swapaxes(1, 2)  # (groups, rows, outputs)
    return products.swapaxes(0, 1).reshape(products.shape[1], -1)


def _missing(expected: Array, got: Array, activation: Activation) -> Array:
    """What to add to each channel, (channels,), so that means behind the activation agree where it lets them through.

    A Gauss-Newton step over the rows where it lets `expected` or `got` through, weighed against _PRIOR_ROWS rows that
    have no error.
    """
    wanted, open_ = activation.of(expected), activation.slope(expected)
    missing = np.zeros(expected.shape[1], np.float32)
    for _ in range(_ROUNDS):
        now = got + missing
        slope = np.maximum(open_, activation.slope(now))
        missing += (slope * (wanted - activation.of(now))).sum(axis=0) / ((slope**2).sum(axis=0) + _PRIOR_ROWS)
    return missing
