import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from traced import Run

from memopt import ort_runtime
from memopt.artifact import open_artifact
from memopt.cpu import this_cpu
from memopt_export.graph import Graph, run_graph, save_graph
from memopt_export.hollow import Executed, as_executed, as_written
from memopt_export.order import least_peak, reorder
from memopt_export.plan import plan
from memopt_export.specialize import optimize

onnx = pytest.importorskip("onnx")


def cell(net, names, *, cells=1):
    """Cells of two branches that meet: "narrow" passes through many channels and leaves few, "wide" leaves many.

    The branches are written in the order of `names`.
    """
    drawn = net(16, 24, 24)
    for number in range(cells):
        read = drawn.conv(16, name=f"stem{number}")
        ends = {}
        for name in names:
            wide = drawn.conv(96 if name == "narrow" else 48, read=read, name=f"{name}{number}.a")
            ends[name] = drawn.conv(16 if name == "narrow" else 48, read=wide, name=f"{name}{number}.b")
        drawn.op("Concat", ends["narrow"], ends["wide"], axis=1, name=f"meet{number}")
        drawn.channels[drawn.last] = 64
    drawn.conv(16, name="last")
    return drawn.graph()


@pytest.fixture(scope="module", params=["narrow first", "wide first"])
def branched(request, net):
    names = ["narrow", "wide"] if request.param == "narrow first" else ["wide", "narrow"]
    return cell(net, names, cells=2)


def test_whichever_branch_is_written_first_the_peak_ends_equally_low(branched, net):
    found = reorder(branched)
    other = reorder(cell(net, ["wide", "narrow"], cells=2))
    assert found.after_bytes == other.after_bytes <= found.before_bytes
    assert found.helps == (found.after_bytes < found.before_bytes)


def test_a_lower_peak_is_planned_and_is_what_is_allocated(net, tracing, tmp_path):
    graphs = [cell(net, names, cells=2) for names in (["narrow", "wide"], ["wide", "narrow"])]
    found = [reorder(graph) for graph in graphs]
    assert any(each.helps for each in found)
    runs = []
    for index, (graph, each) in enumerate(zip(graphs, found, strict=True)):
        for name, drawn in (("before", graph), ("after", each.graph)):
            save_graph(drawn, tmp_path / f"{index}-{name}.onnx")
            runs += [Run(str(tmp_path / f"{index}-{name}.onnx"), batch) for batch in (1, 8)]
    traced = tracing(runs)
    for each, before, after in zip(found, (traced[:2], traced[4:6]), (traced[2:4], traced[6:8]), strict=True):
        assert all(now <= was for now, was in zip(after, before, strict=True))
        if each.helps:
            assert after[0] == pytest.approx(each.after_bytes, rel=0.03)
            assert after[1] < 0.95 * before[1]


def test_the_result_is_the_same(branched, samples_of):
    samples = samples_of(branched, 4).feeds
    np.testing.assert_array_equal(run_graph(reorder(branched).graph, samples)[0], run_graph(branched, samples)[0])


def test_a_chain_has_one_order_and_stays_as_it_is(net):
    drawn = net(3, 8, 8)
    drawn.conv(8)
    drawn.conv(4)
    graph = drawn.graph()
    found = reorder(graph)
    assert found.graph is graph and not found.helps
    assert least_peak(as_written(graph)).exact


def brute_force(graph):
    """The lowest peak over all orders."""
    best = None
    nodes = list(graph.model.graph.node)
    for order in itertools.permutations(range(len(nodes))):
        written = set(graph.model.graph.input[0].name.split()) | {each.name for each in graph.model.graph.initializer}
        for index in order:
            if not written.issuperset(nodes[index].input):
                break
            written.update(nodes[index].output)
        else:
            model = as_written(graph).model
            moved = type(model.graph)(node=[model.graph.node[index] for index in order])
            model.graph.ClearField("node")
            model.graph.node.extend(moved.node)
            peak = plan(Executed(model, graph, "test"), threads=0).activation_bytes
            best = peak if best is None else min(best, peak)
    return best


@settings(max_examples=15, deadline=None)
@given(widths=st.lists(st.integers(1, 9), min_size=4, max_size=4), data=st.data())
def test_an_exact_order_is_as_low_as_any(net, widths, data):
    drawn = net(4, 4, 4)
    made = [drawn.conv(4, name="stem")]
    for index, width in enumerate(widths):
        made.append(drawn.conv(width, read=data.draw(st.sampled_from(made)), name=f"n{index}"))
    drawn.op("Concat", *made, axis=1, name="all")
    drawn.op("GlobalAveragePool", drawn.last, name="mean")
    graph = drawn.graph()
    found = least_peak(as_written(graph))
    assert found.exact
    assert found.peak_bytes == brute_force(graph)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_no_graph_gets_worse(net, seed):
    rng = np.random.default_rng(seed)
    drawn = net(16, 8, 8)
    made = [drawn.conv(16, name="stem")]
    for index in range(8):
        read = made[rng.integers(len(made))]
        made.append(drawn.conv(16 * int(rng.integers(1, 5)), read=read, name=f"n{index}"))
    drawn.op("Concat", *made[-4:], axis=1, name="all")
    graph = drawn.graph()
    found = reorder(graph)
    for batch in (1, 8):
        now, was = (plan(as_executed(g), batch=batch, threads=0).activation_bytes for g in (found.graph, graph))
        assert now <= was


def test_a_beam_gives_an_order_too(net):
    graph = cell(net, ["wide", "narrow"], cells=3)
    narrow = least_peak(as_written(graph), width=1)
    assert sorted(narrow.nodes) == list(range(len(graph.model.graph.node)))
    assert narrow.peak_bytes >= least_peak(as_written(graph)).peak_bytes


def test_a_branch_of_an_if_is_read_where_it_runs(net):
    drawn = net(3)
    drawn.choice()
    assert not reorder(Graph(drawn.model(), "0" * 64)).helps


def test_an_optimized_graph_is_executed_in_its_own_least_order(net, tmp_path):
    """Cells whose optimized form the library orders as it likes; without an arena the file's order is kept."""
    drawn = net(8, 24, 24)
    last = drawn.conv(8, name="stem")
    for cell in range(3):
        wide = drawn.conv(40, read=drawn.conv(40, read=last, name=f"w{cell}.a"), name=f"w{cell}.b")
        narrow = drawn.conv(8, read=drawn.conv(88, read=last, name=f"n{cell}.a"), name=f"n{cell}.b")
        drawn.op("Concat", wide, narrow, axis=1, name=f"meet{cell}")
        drawn.channels[drawn.last] = 48
        last = drawn.conv(8, name=f"last{cell}")
    graph = optimize(drawn.graph())
    written = plan(as_written(graph), threads=0).activation_bytes
    assert written == least_peak(as_written(graph)).peak_bytes
    save_graph(graph, tmp_path / "net.onnx")
    artifact = replace(open_artifact(tmp_path / "net.onnx"), cpu=this_cpu(ort_runtime.version()))
    session = ort_runtime.open(artifact, profile="minimum", record=tmp_path / "record")
    session.run({"x": np.zeros((1, 8, 24, 24), np.float32)})
    events = json.loads(session.end_record().read_bytes())
    started = sorted((event["ts"], event["name"]) for event in events if event["name"].endswith("_kernel_time"))
    ran = [name.removesuffix("_kernel_time") for _, name in started]
    assert ran == [node.name for node in graph.model.graph.node]
