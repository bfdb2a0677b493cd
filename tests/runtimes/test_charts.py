"""Scales, the line of the best, and what a picture does with foreign texts."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memopt.charts import Point, Scale, Segment, Tick, bar, frontier, scale_for, scatter, text

SIZES = st.floats(min_value=1e-3, max_value=1e6)


def draw(points: list[Point]) -> ET.Element:
    svg = scatter(points, x_title="MiB", y_title="Top-1", show_x=str, show_y=str)
    return ET.fromstring(svg)


@given(st.lists(SIZES, min_size=1, max_size=9), st.booleans())
def test_every_value_lies_within_its_scale_in_order(values: list[float], from_zero: bool) -> None:
    scale = scale_for(values, from_zero=from_zero)
    shares = [scale.share(value) for value in sorted(values)]
    assert all(0 <= share <= 1 for share in shares)
    assert shares == sorted(shares)


def test_far_apart_is_logarithmic_and_beyond_a_scale_is_its_edge() -> None:
    assert scale_for([1.0, 1000.0]).logarithmic
    assert not scale_for([1.0, 10.0]).logarithmic
    assert not scale_for([-5.0, 1000.0]).logarithmic
    assert (Scale(0, 10).share(-3), Scale(0, 10).share(30), Scale(5, 5).share(5)) == (0.0, 1.0, 0.5)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12))
def test_no_point_beats_one_of_the_best_and_each_other_is_beaten(places: list[tuple[int, int]]) -> None:
    points = [Point(x, y, str(i), "") for i, (x, y) in enumerate(places)]
    best = frontier(points)

    def beats(one: Point, two: Point) -> bool:
        return one.x <= two.x and one.y >= two.y and (one.x, one.y) != (two.x, two.y)

    for point in points:
        assert (point in best) == (not any(beats(other, point) for other in points))


@given(st.lists(st.tuples(SIZES, st.floats(0, 1)), min_size=1, max_size=30))
def test_any_points_make_one_well_formed_picture(places: list[tuple[float, float]]) -> None:
    svg = draw([Point(x, y, f"model {i}", "") for i, (x, y) in enumerate(places)])
    assert len(svg.findall("g")) == len(places)
    for circle in svg.iter("circle"):
        assert 0 <= float(circle.attrib["cx"]) <= 560
        assert 0 <= float(circle.attrib["cy"]) <= 340


def test_names_cover_neither_each_other_nor_points() -> None:
    cluster = [Point(100 + i / 50, 0.9 + i / 1000, f"a-long-name-{i}", "") for i in range(12)]
    crowded = draw([*cluster, Point(900, 0.5, "far", "")])
    apart = draw([Point(10 * i, 0.5 + i / 10, f"name-{i}", "") for i in range(1, 5)])
    named = [len([each for each in svg.findall("text") if each.get("class") == "name"]) for svg in (crowded, apart)]
    assert named[0] < 12
    assert named[1] == 4


@pytest.mark.parametrize(
    "hostile", ["</title><script>alert(1)</script>", "\" onload='x'", "a\x1b[31m\u202eb\x00", "&lt;"]
)
def test_foreign_texts_stay_texts(hostile: str) -> None:
    svg = draw([Point(1, 1, hostile, hostile), Point(2, 2, "b", "b")])
    assert {each.tag for each in svg.iter()} <= {"svg", "g", "text", "title", "line", "path", "circle"}
    assert text(hostile).isprintable()
    piece = ET.fromstring(bar([Segment(0, 0.5, "load", hostile)], [Tick(0.5, "peak", hostile)], label=hostile))
    assert {each.tag for each in piece.iter()} == {"svg", "rect", "line", "title"}
    assert all("onload" not in each.attrib for each in (*svg.iter(), *piece.iter()))


def test_a_piece_of_no_width_is_not_drawn() -> None:
    assert "<rect" not in bar([Segment(0.2, 0.2, "load", "")], label="nothing")
