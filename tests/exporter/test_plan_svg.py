import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memopt_export.plan import Block, Plan, plan
from memopt_export.plan_svg import _lay_out, draw

NAMESPACE = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def planned(cnn):
    return plan(cnn().graph(), batch=4, threads=2)


def parsed(found, title="net.onnx"):
    return ElementTree.fromstring(draw(found, title=title))


def test_every_block_is_drawn_with_its_name_size_and_steps(planned):
    told = [each.text for each in parsed(planned).iter(f"{NAMESPACE}title")]
    for block in planned.blocks:
        assert any(text.startswith(f"{block.tensor}: ") for text in told)


def test_the_peak_is_marked_with_size_and_node(planned):
    texts = [each.text for each in parsed(planned).iter(f"{NAMESPACE}text")]
    assert any(text and text.startswith("peak ") and text.endswith(planned.peak_node) for text in texts)


def test_names_from_strangers_are_text(planned):
    picture = draw(planned, title="<script>alert(1)</script>&.onnx")
    assert "<script>" not in picture
    ElementTree.fromstring(picture)


def test_a_graph_without_memory_is_a_picture_too():
    nothing = Plan(1, 0, 0, 0, 0, "", (), (), (), (), "nobody")
    parsed(nothing)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12)
)  # fmt: skip
def test_no_two_blocks_lie_over_each_other(drawn):
    blocks = tuple(Block(f"t{i}", size, min(a, b), max(a, b)) for i, (size, a, b) in enumerate(drawn))
    steps = tuple((f"n{i}", sum(b.size_bytes for b in blocks if b.first <= i <= b.last)) for i in range(10))
    found = Plan(1, 0, max(s for _, s in steps), 0, 0, "n0", (), steps, (0,) * 10, blocks, "by hand")
    placed = _lay_out(found)
    assert len(placed) == len(blocks)
    for index, (one, low) in enumerate(placed):
        for other, start in placed[:index]:
            apart = one.last < other.first or other.last < one.first
            assert apart or low >= start + other.size_bytes or start >= low + one.size_bytes
