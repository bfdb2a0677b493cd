from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memopt.accuracy import sqnr_db, top1
from memopt.errors import UsageError
from memopt_export.budget import Budget, Reached, _smallest, rank, within
from memopt_export.means import UNLIMITED, Means
from memopt_export.quantize import quantize
from memopt_export.recipe import Recipe, parse
from memopt_models.data import Samples

LAYERS = ["stem", "depthwise", "pointwise", "wide", "fc"]
PLAIN = Recipe("int8", correction="none")


@pytest.fixture(scope="module")
def graph(cnn):
    """With one layer that a single step for each of its inputs serves badly."""
    drawn = cnn()
    drawn.arrays["depthwise.w"] *= np.logspace(-2.5, 0, 32, dtype=np.float32)[:, None, None, None]
    return drawn.graph()


@pytest.fixture(scope="module")
def calibration(graph, samples_of):
    return samples_of(graph, 24)


@pytest.fixture(scope="module")
def judged(graph, samples_of, run):
    """Other samples; their labels are what the float graph says."""
    unlabelled = samples_of(graph, 48, seed=2)
    return Samples(unlabelled.feeds, run(graph, unlabelled).argmax(axis=1), "random/validation")


@pytest.fixture(scope="module")
def ranking(graph, calibration, judged):
    return rank(graph, PLAIN, calibration, judged, UNLIMITED)


@pytest.fixture(scope="module")
def reached(graph, calibration, judged, run):
    """A function: recipe -> SQNR on the judged samples of what it makes, once for each."""
    known = {}

    def reach(recipe):
        if recipe not in known:
            made = quantize(graph, recipe, calibration).graph
            known[recipe] = sqnr_db(run(made, judged), run(graph, judged))
        return known[recipe]

    return reach


def without(ranking, count, recipe=PLAIN):
    return replace(recipe, exclude=tuple(each.layer for each in ranking[:count]))


# --- the ranking


def test_every_layer_is_ranked_by_what_it_gives(ranking):
    assert sorted(each.layer for each in ranking) == sorted(LAYERS)
    assert [each.sqnr_db for each in ranking] == sorted((each.sqnr_db for each in ranking), reverse=True)


def test_what_a_layer_gives_is_what_leaving_it_out_reaches(ranking, reached):
    """Not to the bit: a whole quantization evens out channels and corrects weights for the layers that are left."""
    for each in ranking:
        assert each.sqnr_db == pytest.approx(reached(replace(PLAIN, exclude=(each.layer,))), abs=1.0)
    assert ranking[0].sqnr_db > reached(PLAIN)


def test_what_a_layer_costs_is_what_its_weights_gain_in_bytes(ranking):
    """3 more bytes for each weight; scales and zero points of 8 bytes a channel are saved, as others may be."""
    weights = {"stem": 32 * 27, "depthwise": 32 * 9, "pointwise": 32 * 32, "wide": 64 * 32 * 9, "fc": 640}
    channels = {"stem": 32, "depthwise": 32, "pointwise": 32, "wide": 64, "fc": 10}
    for each in ranking:
        assert abs(each.weights_bytes - 3 * weights[each.layer]) <= 16 * channels[each.layer] + 16
    assert {each.layer: each.operator for each in ranking} == dict.fromkeys(LAYERS, "Conv") | {"fc": "Gemm"}


def test_top1_is_told_where_labels_are_known(graph, ranking, calibration, judged):
    assert all(0 <= each.top1 <= 1 for each in ranking)
    unlabelled = replace(judged, labels=None)
    assert {each.top1 for each in rank(graph, PLAIN, calibration, unlabelled, UNLIMITED)} == {None}


@pytest.mark.parametrize("recipe", [replace(PLAIN, exclude=("wide", "Gemm")), replace(PLAIN, include=("stem", "fc"))])
def test_what_the_recipe_keeps_float_is_not_ranked(graph, calibration, judged, recipe):
    ranked = rank(graph, recipe, calibration, judged, UNLIMITED)
    expected = {"stem", "fc"} if recipe.include else {"stem", "depthwise", "pointwise"}
    assert {each.layer for each in ranked} == expected


def test_progress_counts_ranked_layers(graph, calibration, judged):
    seen = []
    rank(graph, replace(PLAIN, include=("stem", "fc")), calibration, judged, Means(on_step=seen.append))
    assert [(step.done, step.total) for step in seen if step.what == "rank layers"] == [(1, 2), (2, 2)]


def test_precisions_without_samples_are_ranked_too(graph, judged):
    ranked = rank(graph, parse("int4-weights"), None, judged, UNLIMITED)
    assert {each.layer for each in ranked} <= set(LAYERS)
    assert [each.sqnr_db for each in ranked] == sorted((each.sqnr_db for each in ranked), reverse=True)


# --- the budget


def test_a_budget_that_holds_at_once_keeps_no_layer_float(graph, calibration, judged, reached):
    kept = within(graph, PLAIN, calibration, judged, Budget(min_sqnr_db=reached(PLAIN) - 1), UNLIMITED)
    assert (kept.holds, kept.recipe, kept.ranking) == (True, PLAIN, ())
    assert kept.reached.startswith(f"SQNR {reached(PLAIN):.2f} dB, top-1 ")


@pytest.mark.parametrize("count", [1, 2])
def test_the_fewest_layers_of_the_ranking_are_kept_float(graph, calibration, judged, ranking, reached, count):
    wanted = (reached(without(ranking, count - 1)) + reached(without(ranking, count))) / 2
    kept = within(graph, PLAIN, calibration, judged, Budget(min_sqnr_db=wanted), UNLIMITED)
    assert kept.holds
    assert kept.recipe.exclude == without(ranking, count).exclude
    assert set(kept.quantized.kept_float) == set(kept.recipe.exclude)
    assert [each.layer for each in kept.ranking] == [each.layer for each in ranking]


def test_the_recipe_makes_the_graph_again_byte_for_byte(graph, calibration, judged, ranking, reached):
    recipe = Recipe("int8", correction="bias")
    wanted = reached(recipe) + 0.5
    kept = within(graph, recipe, calibration, judged, Budget(min_sqnr_db=wanted), UNLIMITED)
    assert kept.holds
    assert kept.recipe.exclude
    assert quantize(graph, kept.recipe, calibration).graph.data == kept.quantized.graph.data
    assert reached(kept.recipe) >= wanted


def test_what_the_recipe_excluded_stays_excluded(graph, calibration, judged, ranking, reached):
    recipe = replace(PLAIN, exclude=(ranking[0].layer,))
    kept = within(graph, recipe, calibration, judged, Budget(min_sqnr_db=reached(recipe) + 0.5), UNLIMITED)
    assert kept.recipe.exclude[0] == ranking[0].layer
    assert len(kept.recipe.exclude) == len(set(kept.recipe.exclude)) > 1


def test_what_cannot_be_reached_is_told_with_the_best_there_was(graph, calibration, judged, reached, run):
    kept = within(graph, PLAIN, calibration, judged, Budget(min_sqnr_db=200), UNLIMITED)
    assert not kept.holds
    best = sqnr_db(run(kept.quantized.graph, judged), run(graph, judged))
    assert reached(PLAIN) < best < 200
    assert kept.reached.startswith(f"SQNR {best:.2f} dB")


def test_a_drop_is_counted_in_points_against_the_labels(graph, calibration, judged, run):
    kept = within(graph, PLAIN, calibration, judged, Budget(max_drop_points=100), UNLIMITED)
    share = top1(run(kept.quantized.graph, judged), judged.labels)
    assert kept.holds
    assert f"top-1 {100 * share:.2f}% ({100 - 100 * share:+.2f} points lost)" in kept.reached


def test_a_drop_without_labels_is_refused(graph, calibration, judged):
    with pytest.raises(UsageError, match=r"--max-drop needs labelled samples and class scores; hint: --min-sqnr DB"):
        within(graph, PLAIN, calibration, replace(judged, labels=None), Budget(max_drop_points=1), UNLIMITED)


def test_a_drop_without_class_scores_is_refused(net, samples_of):
    drawn = net(3, 8, 8)
    drawn.conv(4)
    graph = drawn.graph()
    samples = replace(samples_of(graph), labels=np.zeros(32, np.int64))
    with pytest.raises(UsageError, match="--max-drop needs labelled samples and class scores"):
        within(graph, PLAIN, samples, samples, Budget(max_drop_points=1), UNLIMITED)


@pytest.mark.parametrize("points", [-0.1, 100.5, float("nan")])
def test_a_drop_that_is_none_is_refused(points):
    with pytest.raises(UsageError, match=r"max-drop is .* points; hint: --max-drop 0\.5"):
        Budget(max_drop_points=points)


@pytest.mark.parametrize(
    ("budget", "found", "holds"),
    [
        (Budget(), Reached(-3), True),
        (Budget(min_sqnr_db=30), Reached(30), True),
        (Budget(min_sqnr_db=30), Reached(29.99), False),
        (Budget(min_sqnr_db=30), Reached(float("nan")), False),
        (Budget(max_drop_points=0.5), Reached(5, 0.9, 0.5), True),
        (Budget(max_drop_points=0.5), Reached(50, 0.9, 0.6), False),
        (Budget(max_drop_points=0), Reached(50, 0.9, -0.2), True),
        (Budget(max_drop_points=0.5, min_sqnr_db=30), Reached(31, 0.9, 0.6), False),
        (Budget(max_drop_points=0.5, min_sqnr_db=30), Reached(29, 0.9, 0.1), False),
        (Budget(max_drop_points=0.5, min_sqnr_db=30), Reached(31, 0.9, 0.1), True),
    ],
)
def test_budgets_by_hand(budget, found, holds):
    assert budget.holds(found) is holds


@given(most=st.integers(1, 60), enough=st.integers(1, 80))
def test_the_smallest_count_is_found_in_few_tries(most, enough):
    tried = []

    def holds(count):
        tried.append(count)
        return count >= enough

    assert _smallest(holds, most) == min(enough, most)
    assert len(tried) <= 2 * most.bit_length() + 1
