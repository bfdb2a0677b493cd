"""As few layers in float as keep the loss of accuracy within a budget, and what each of them would give and cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from memopt.accuracy import sqnr_db, top1
from memopt.errors import InputRefused, UsageError
from memopt.tensors import Array
from memopt_export import plan as planning
from memopt_export.calibrate import batches_for
from memopt_export.graph import Graph, Wiring, label, run_batches, wire
from memopt_export.means import Means
from memopt_export.placement import has_weight
from memopt_export.quantize import Quantized, quantize, static_int8, to_quantize, with_provenance
from memopt_export.recipe import Recipe

if TYPE_CHECKING:
    from memopt_models.data import Batches, Pictures, Samples

_RANKING_SAMPLES = 128  # enough to order layers; the budget itself is judged on all
_MORE_TRIES = 3  # whole quantizations, with one more layer in float each


@dataclass(frozen=True)
class Budget:
    """What may be lost against the float graph on judged samples: points of top-1, and how much noise."""

    max_drop_points: float | None = None
    min_sqnr_db: float | None = None

    def __post_init__(self) -> None:
        if self.max_drop_points is not None and not 0 <= self.max_drop_points <= 100:
            raise UsageError(f"max-drop is {self.max_drop_points:g} points", hint="--max-drop 0.5")

    def holds(self, found: Reached) -> bool:
        """Whether the budget is kept."""
        enough = self.min_sqnr_db is None or found.sqnr_db >= self.min_sqnr_db
        return enough and (self.max_drop_points is None or found.drop_points <= self.max_drop_points)


@dataclass(frozen=True)
class Reached:
    """What a graph reaches beside the float one."""

    sqnr_db: float
    top1: float | None = None
    drop_points: float = 0.0

    def __str__(self) -> str:
        drop = "" if self.top1 is None else f", top-1 {100 * self.top1:.2f}% ({self.drop_points:+.2f} points lost)"
        return f"SQNR {self.sqnr_db:.2f} dB{drop}"


@dataclass(frozen=True)
class Sensitivity:
    """What the whole graph reaches when this layer alone stays float, and the bytes that this costs."""

    layer: str
    operator: str
    sqnr_db: float
    top1: float | None
    weights_bytes: int
    activation_bytes: int


@dataclass(frozen=True)
class Kept:
    """A quantized graph with as few layers in float as the budget needs, or the best there was."""

    quantized: Quantized
    recipe: Recipe
    ranking: tuple[Sensitivity, ...]
    holds: bool
    reached: str


def within(
    graph: Graph, recipe: Recipe, calibration: Samples | Pictures | None, judged: Samples, budget: Budget, means: Means
) -> Kept:
    """The quantized graph that keeps to the budget; `holds` is false where not even the best does.

    Args:
        graph: a float32 graph.
        recipe: how it is quantized; what is kept in float is added to what it excludes.
        calibration: what to calibrate on.
        judged: other samples, which the budget is held against; with labels for a drop.
        budget: what may be lost.
        means: what the quantization may use, and whom to tell.

    Raises:
        UsageError: a drop is limited and no labels are known.
        InputRefused: as by `quantize`.
    """
    judge = _Judge.of(graph, judged, means, needs_labels=budget.max_drop_points is not None)
    variants = _Variants.of(graph, recipe, calibration, means)
    done = variants.whole()
    reached = judge(done.graph)
    if budget.holds(reached):
        return Kept(done, recipe, (), holds=True, reached=str(reached))
    ranking = _rank(variants, recipe, _ranking_judge(graph, judged, means), means)

    def without(count: int) -> Recipe:
        return replace(recipe, exclude=(*recipe.exclude, *(each.layer for each in ranking[:count])))

    enough = _smallest(lambda count: budget.holds(judge(variants.make(without(count)))), len(ranking) - 1)
    best = done, recipe, reached
    for count in range(enough, min(enough + _MORE_TRIES, len(ranking))):  # corrections differ with what is left out
        made = quantize(graph, without(count), calibration, means)
        found = judge(made.graph)
        if budget.holds(found):
            return Kept(made, without(count), ranking, holds=True, reached=str(found))
        if found.sqnr_db > best[2].sqnr_db:
            best = made, without(count), found
    return Kept(best[0], best[1], ranking, holds=False, reached=str(best[2]))


def rank(
    graph: Graph, recipe: Recipe, calibration: Samples | Pictures | None, judged: Samples, means: Means
) -> tuple[Sensitivity, ...]:
    """Every layer that is quantized, the one first that gives most when it alone stays float."""
    variants = _Variants.of(graph, recipe, calibration, means)
    return _rank(variants, recipe, _ranking_judge(graph, judged, means), means)


def _rank(variants: _Variants, recipe: Recipe, judge: _Judge, means: Means) -> tuple[Sensitivity, ...]:
    layers = _layers(variants.wiring, recipe)
    weights, activations = _planned(variants.make(recipe))
    found = []
    for done, index in enumerate(layers, 1):
        node = variants.wiring.nodes[index]
        left = variants.make(replace(recipe, exclude=(*recipe.exclude, label(node))))
        reached, needed = judge(left), _planned(left)
        more = needed[0] - weights, needed[1] - activations
        found.append(Sensitivity(label(node), node.op_type, reached.sqnr_db, reached.top1, *more))
        means.tell("rank layers", done, len(layers))
    return tuple(sorted(found, key=lambda each: -each.sqnr_db))


def _ranking_judge(graph: Graph, judged: Samples, means: Means) -> _Judge:
    some = max(graph.fixed_batch or 0, _RANKING_SAMPLES)
    return _Judge.of(graph, judged.pick(slice(some)), means, needs_labels=False)


def _smallest(holds: Callable[[int], bool], most: int) -> int:
    """The smallest count from 1 to `most` that holds, where more always hold better; `most` where none does."""
    low, high = 0, 1
    while high < most and not holds(high):
        low, high = high, high * 2
    high = min(high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


@dataclass(frozen=True, eq=False)
class _Variants:
    """A graph quantized by recipes that differ in what they exclude.

    For static int8 all that samples tell is found out once, and only where Q/DQ stand changes.
    """

    wiring: Wiring  # of the graph whose layers are ranked
    make: Callable[[Recipe], Graph]
    whole: Callable[[], Quantized]  # by the recipe as it is, the same as by `quantize`

    @classmethod
    def of(cls, graph: Graph, recipe: Recipe, calibration: Samples | Pictures | None, means: Means) -> _Variants:
        float_graph = to_quantize(graph, recipe)
        if recipe.precision != "int8":
            return cls(
                wire(float_graph.model),
                lambda other: quantize(graph, other, calibration, means).graph,
                lambda: quantize(graph, recipe, calibration, means),
            )
        prepared = static_int8.prepare(float_graph, recipe, calibration, means)
        return cls(
            wire(prepared.graph.model),
            prepared.assembled,
            lambda: with_provenance(prepared.quantized(recipe), recipe, calibration),
        )


def _layers(wiring: Wiring, recipe: Recipe) -> list[int]:
    """The nodes with weights that the recipe does not leave alone."""
    return [
        index
        for index, node in enumerate(wiring.nodes)
        if has_weight(node, wiring)
        and recipe.includes(label(node), node.op_type)
        and not recipe.excludes(label(node), node.op_type)
    ]


def _planned(graph: Graph) -> tuple[int, int]:
    """Bytes of weights and of planned activations at batch 1."""
    try:
        found = planning.plan(graph, batch=graph.fixed_batch or 1)
        return found.weights_bytes, found.activation_bytes
    except InputRefused:
        return sum(graph.weights_bytes().values()), 0


@dataclass(frozen=True, eq=False)
class _Judge:
    """Holds graphs against the float graph's outputs."""

    batches: Batches
    expected: Array
    top1: float | None

    @classmethod
    def of(cls, graph: Graph, samples: Samples, means: Means, *, needs_labels: bool) -> _Judge:
        batches = batches_for(graph, samples, means)
        expected = _outputs(graph, batches)
        if needs_labels and (samples.labels is None or expected.ndim != 2):
            raise UsageError("--max-drop needs labelled samples and class scores", hint="--min-sqnr DB")
        known = samples.labels is not None and expected.ndim == 2
        return cls(batches, expected, _top1(expected, batches) if known else None)

    def __call__(self, graph: Graph) -> Reached:
        got = _outputs(graph, self.batches)
        if self.top1 is None:
            return Reached(sqnr_db(got, self.expected))
        reached = _top1(got, self.batches)
        return Reached(sqnr_db(got, self.expected), reached, 100 * (self.top1 - reached))


def _outputs(graph: Graph, batches: Batches) -> Array:
    """The first output for all samples."""
    if not len(batches):
        raise InputRefused(f"{batches.samples.source} is less than one batch of the graph", hint="--data with more")
    return np.concatenate([outputs[0] for outputs in run_batches(graph, batches)])


def _top1(outputs: Array, batches: Batches) -> float:
    assert batches.samples.labels is not None
    return top1(outputs, batches.samples.labels)
