import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memopt.errors import InputRefused, OutOfResource
from memopt_export.calibrate import collect_ranges
from memopt_export.graph import Graph
from memopt_export.placement import place
from memopt_export.qdq import insert
from memopt_export.recipe import Recipe
from memopt_export.walk import Walk

onnx = pytest.importorskip("onnx")


def batches_of(graph, *sizes, seed=0):
    """Batches of these sizes, standard normal."""
    rng = np.random.default_rng(seed)
    return [
        {spec.name: rng.normal(size=(size, *spec.at_batch(1)[1:])).astype(np.float32) for spec in graph.inputs}
        for size in sizes
    ]


def at_once(graph, batches, names):
    """The tensors of each batch, from one run of the whole model."""
    import onnxruntime as ort

    model = graph.copy_model()
    del model.graph.output[:]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [session.run(names, batch) for batch in batches]


def written(graph):
    return [name for node in graph.model.graph.node for name in node.output]


def walk_in(graph, batches, folder, stops, names):
    """The tensors of each batch, from a walk with these stops, in the order of `names`."""
    walk = Walk(graph.model, batches, folder)
    found = [{} for _ in batches]
    for stop in stops:
        own = [name for name in names if walk.position <= walk.writer(name) < stop]
        for index, values in enumerate(walk.advance(stop, own)):
            found[index] |= dict(zip(own, values, strict=True))
    return [[each[name] for name in names] for each in found]


def assert_same(found, expected):
    for batch, other in zip(found, expected, strict=True):
        for array, value in zip(batch, other, strict=True):
            assert array.dtype == value.dtype
            np.testing.assert_array_equal(array, value)


@pytest.fixture(scope="module")
def batches(graph):
    return batches_of(graph, 3, 3, 2)


@pytest.fixture(scope="module")
def whole(graph, batches):
    return at_once(graph, batches, written(graph))


@pytest.fixture(scope="module")
def quantized(graph, batches):
    placement = place(graph, Recipe("int8"))
    return insert(graph, placement, collect_ranges(graph, placement.tensors, batches, source="r", fingerprint="0"))


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_stops_give_what_one_run_gives(graph, batches, whole, tmp_path_factory, data):
    last = len(graph.model.graph.node)
    stops = [*sorted(data.draw(st.lists(st.integers(0, last), max_size=5))), last]
    found = walk_in(graph, batches, tmp_path_factory.mktemp("walk"), stops, written(graph))
    assert_same(found, whole)


def test_a_stop_before_every_node_gives_what_one_run_gives_of_a_quantized_graph(quantized, batches, tmp_path):
    names = written(quantized)
    stops = range(1, len(quantized.model.graph.node) + 1)
    assert_same(walk_in(quantized, batches, tmp_path, stops, names), at_once(quantized, batches, names))


def test_what_a_dequantizer_gives_waits_as_integers(quantized, batches, tmp_path):
    """Behind the residual, one tensor of 32 channels of 8x8 is all that is read ahead: a byte for each number."""
    walk = Walk(quantized.model, batches, tmp_path)
    nodes = quantized.model.graph.node
    read = next(node.input[0] for node in nodes if node.name == "wide")
    assert nodes[walk.writer(read)].op_type == "DequantizeLinear"
    walk.pass_to(walk.writer(read) + 1)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == 8 * 32 * 8 * 8
    assert_same(list(walk.read(read)), at_once(quantized, batches, [read]))


def test_files_vanish_when_nobody_ahead_reads_them(graph, batches, tmp_path):
    """Of the largest tensors, at most two wait at any time; at the end the graph's own output."""
    walk = Walk(graph.model, batches, tmp_path)
    waiting = []
    for stop in range(1, len(graph.model.graph.node) + 1):
        walk.pass_to(stop)
        waiting.append(sum(path.stat().st_size for path in tmp_path.iterdir()))
    stem, pooled, head = 8 * 32 * 16 * 16 * 4, 8 * 32 * 8 * 8 * 4, 8 * 64 * 4
    wide = 2 * pooled
    assert waiting == [
        stem, stem, pooled,  # conv, Relu, MaxPool
        2 * pooled, 2 * pooled, 2 * pooled,  # beside the skip: depthwise, Clip, pointwise
        pooled, pooled, wide, wide,  # Add, Relu, wide, Relu
        head, head, 8 * 10 * 4,  # GlobalAveragePool, Flatten, Gemm
    ]  # fmt: skip


def test_inputs_wait_nowhere(net, tmp_path):
    drawn = net(3)
    drawn.op("Relu")
    drawn.op("Add", drawn.last, "x")
    graph = drawn.graph()
    batches = batches_of(graph, 2)
    walk = Walk(graph.model, batches, tmp_path)
    walk.pass_to(0)
    assert list(tmp_path.iterdir()) == []
    assert_same(list(walk.read("x", "x")), [[batches[0]["x"]] * 2])


def test_an_input_that_is_read_late_is_there(net, tmp_path):
    drawn = net(3)
    for _ in range(3):
        drawn.op("Relu")
    drawn.op("Sub", drawn.last, "x")
    graph = drawn.graph()
    batches = batches_of(graph, 2, 1)
    assert_same(walk_in(graph, batches, tmp_path, [1, 2, 4], written(graph)), at_once(graph, batches, written(graph)))


def test_several_inputs_are_told_apart(net, tmp_path):
    drawn = net(3)
    drawn.op("Neg", "x")
    drawn.op("Add", drawn.last, "y")
    drawn.op("Mul", drawn.last, "x")
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        drawn.nodes,
        "two",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ("batch", 3)) for name in ("x", "y")],
        [helper.make_tensor_value_info(drawn.last, TensorProto.FLOAT, None)],
    )
    graph = Graph(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=8), "0" * 64)
    batches = batches_of(graph, 2, 3)
    assert_same(walk_in(graph, batches, tmp_path, [1, 2, 3], written(graph)), at_once(graph, batches, written(graph)))


def test_what_a_subgraph_reads_from_around_it_waits_for_it(net, tmp_path):
    from onnx import TensorProto, helper

    drawn = net(3)
    early = drawn.op("Neg", "x")
    drawn.op("Relu", "x")
    branches = {}
    for branch in ("then_branch", "else_branch"):
        add = helper.make_node("Add", [early, "x"], [f"{branch}.out"])
        value = helper.make_tensor_value_info(f"{branch}.out", TensorProto.FLOAT, None)
        branches[branch] = helper.make_graph([add], branch, [], [value])
    chosen = drawn.op("If", drawn.constant("yes", np.asarray(True)), **branches)
    drawn.op("Add", chosen, "relu1.out")
    graph = drawn.graph()
    batches = batches_of(graph, 2, 2)
    found = walk_in(graph, batches, tmp_path, [1, 2, 3, 4], written(graph))
    assert_same(found, at_once(graph, batches, written(graph)))


def test_outputs_of_the_graph_wait_to_the_end(graph, batches, tmp_path, cnn, whole):
    shown = cnn().graph("stem.out", "fc.out")
    walk = Walk(shown.model, batches, tmp_path)
    for stop in (2, 5, len(shown.model.graph.node)):
        walk.pass_to(stop)
    names = written(graph)
    expected = [[values[names.index(name)] for name in ("stem.out", "fc.out")] for values in whole]
    assert_same(list(walk.read("stem.out", "fc.out")), expected)


def test_a_tensor_may_be_watched_when_it_was_written_long_ago(graph, batches, tmp_path, whole):
    """The skip of the residual, while the walk passes the branch beside it."""
    walk = Walk(graph.model, batches, tmp_path)
    walk.pass_to(4)
    skip = graph.model.graph.node[2].output[0]
    found = list(walk.advance(6, [skip]))
    assert_same(found, [[values[written(graph).index(skip)]] for values in whole])


# --- change


def test_a_change_has_effect_ahead_only(graph, batches, tmp_path, whole):
    walk = Walk(graph.model, batches, tmp_path)
    names = written(graph)
    wide = next(index for index, node in enumerate(graph.model.graph.node) if node.name == "wide")
    walk.pass_to(wide)
    stem = next(tensor for tensor in graph.model.graph.initializer if tensor.name == "stem.w")
    walk.change("stem.w", np.zeros_like(onnx.numpy_helper.to_array(stem)))
    walk.change("fc.w", np.zeros((10, 64), np.float32))
    bias = onnx.numpy_helper.to_array(next(t for t in graph.model.graph.initializer if t.name == "fc.b"))
    found = list(walk.advance(len(names), ["wide.out", "fc.out"]))
    for (wide_out, fc_out), values in zip(found, whole, strict=True):
        np.testing.assert_array_equal(wide_out, values[names.index("wide.out")])
        np.testing.assert_array_equal(fc_out, np.broadcast_to(bias, fc_out.shape))


def test_the_model_that_is_walked_is_left_as_it_is(graph, batches, tmp_path):
    before = graph.model.SerializeToString(deterministic=True)
    walk = Walk(graph.model, batches, tmp_path)
    walk.change("fc.w", np.zeros((10, 64), np.float32))
    walk.pass_to(len(graph.model.graph.node))
    assert graph.model.SerializeToString(deterministic=True) == before


# --- refusals


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"x": np.zeros((1, 3, 16, 17), np.float32)}, r"input 'x' expects shape \(batch, 3, 16, 16\), got"),
        ({"x": np.zeros((1, 3, 16, 16))}, "input 'x' expects float32, got float64"),
        ({"y": np.zeros((1, 3, 16, 16), np.float32)}, r"inputs are \['y'\], the model expects \['x'\]"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(graph, batches, tmp_path, batch, message):
    with pytest.raises(InputRefused, match=message):
        Walk(graph.model, [*batches, batch], tmp_path).pass_to(3)


def test_a_model_that_cannot_run_on_its_batch_is_refused(net, tmp_path):
    drawn = net(6)
    drawn.op("Reshape", "x", drawn.constant("shape", np.asarray([2, 6])))
    graph = drawn.graph()
    with pytest.raises(InputRefused, match="onnxruntime cannot run it: "):
        Walk(graph.model, batches_of(graph, 2, 3), tmp_path).pass_to(1)


def test_no_room_for_what_waits_is_told_with_the_folder(graph, batches, tmp_path, monkeypatch):
    import errno

    def full(*_args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("memopt_export.walk._Stored.append", full)
    with pytest.raises(OutOfResource, match="has no room for activations: No space left on device; hint: TMPDIR=DIR"):
        Walk(graph.model, batches, tmp_path).pass_to(1)


# --- sizes


@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_batches_may_differ_in_size(graph, tmp_path_factory, sizes):
    batches = batches_of(graph, *sizes)
    names = ["depthwise.out", "fc.out"]
    found = walk_in(graph, batches, tmp_path_factory.mktemp("walk"), [4, 5, 13], names)
    assert_same(found, at_once(graph, batches, names))


def test_batches_may_differ_in_a_free_dimension(net, tmp_path):
    drawn = net(3, "height", "width")
    drawn.conv(4)
    drawn.op("Relu")
    drawn.conv(4)
    graph = drawn.graph()
    rng = np.random.default_rng(0)
    batches = [{"x": rng.normal(size=shape).astype(np.float32)} for shape in ((2, 3, 8, 9), (1, 3, 12, 4))]
    assert_same(walk_in(graph, batches, tmp_path, [1, 2, 3], written(graph)), at_once(graph, batches, written(graph)))


def test_batches_are_made_once_for_each_piece(graph, batches, tmp_path):
    """They may be pictures that are prepared when they are read."""
    made = []

    class Counted(list):
        def __getitem__(self, index):
            made.append(index)
            return super().__getitem__(index)

    Walk(graph.model, Counted(batches), tmp_path).pass_to(2)
    assert made == [0, 1, 2]
