import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from traced import Run

from memopt.errors import InputRefused
from memopt_export.graph import Graph, save_graph
from memopt_export.hollow import as_executed, as_written
from memopt_export.plan import largest_batch, plan
from memopt_export.quantize import quantize
from memopt_export.recipe import parse

onnx = pytest.importorskip("onnx")


@pytest.fixture(scope="module")
def chain(net):
    """(batch, 3, 8, 8) -> conv, relu, pool, flatten, fc -> (batch, 10); 4 bytes a value.

    x 768 (the caller's), conv 2048, relu in place, pool 512, flatten a view, fc 40.
    """
    drawn = net(3, 8, 8)
    drawn.conv(8, name="conv")
    drawn.op("Relu", name="relu")
    drawn.op("MaxPool", name="pool", kernel_shape=[2, 2], strides=[2, 2])
    drawn.op("Flatten", name="flatten")
    drawn.gemm(128, 10)
    return drawn.graph()


def test_chain_by_hand(chain):
    found = plan(as_written(chain), threads=0)
    assert found.steps == (("conv", 2048), ("relu", 2048), ("pool", 2560), ("flatten", 512), ("fc", 552))
    assert (found.activation_bytes, found.peak_node) == (2560, "pool")
    assert found.peak_tensors == (("conv.out", 2048), ("pool.out", 512))
    assert (found.input_bytes, found.output_bytes) == (768, 40)
    assert found.weights_bytes == 4 * (8 * 27 + 8 + 1280 + 10)
    assert found.total_bytes == found.weights_bytes + 768 + 2560


def test_residual_keeps_its_skip_alive(net):
    drawn = net(4, 8, 8)  # every tensor 1024 bytes
    skip = drawn.conv(4, name="skip")
    drawn.conv(4, name="a")
    drawn.conv(4, name="b")
    drawn.op("Add", drawn.last, skip, name="add")
    assert plan(as_written(drawn.graph()), threads=0).steps == (("skip", 1024), ("a", 2048), ("b", 3072), ("add", 3072))


def test_an_output_lives_to_the_end(net):
    drawn = net(4, 8, 8)
    early = drawn.conv(4, name="early")
    drawn.op("GlobalAveragePool", name="mean")
    drawn.op("Flatten", name="flatten")
    found = plan(as_written(drawn.graph(early, "flatten.out")), threads=0)
    assert found.steps == (("early", 1024), ("mean", 1040), ("flatten", 1056))  # an output is no view
    assert found.output_bytes == 1040


def test_a_result_that_nobody_reads_lives_for_one_step(net):
    drawn = net(4, 8, 8)
    drawn.conv(4, read="x", name="dead")
    drawn.conv(4, read="x", name="live")
    assert plan(as_written(drawn.graph()), threads=0).steps == (("dead", 1024), ("live", 1024))


def test_relu_needs_memory_where_its_input_is_read_again(net):
    drawn = net(4, 8, 8)
    conv = drawn.conv(4, name="conv")
    drawn.op("Relu", name="relu")
    drawn.op("Add", drawn.last, conv, name="add")
    assert plan(as_written(drawn.graph()), threads=0).steps == (("conv", 1024), ("relu", 2048), ("add", 3072))


def test_relu_does_not_write_over_the_caller_s_input(net):
    drawn = net(4, 8, 8)
    drawn.op("Relu", name="relu")
    assert plan(as_written(drawn.graph()), threads=0).steps == (("relu", 1024),)


def test_relu_does_not_write_over_a_view_of_what_is_read_again(net):
    drawn = net(4, 8, 8)
    conv = drawn.conv(4, name="conv")
    drawn.op("Flatten", name="flat")
    drawn.op("Relu", name="relu")
    drawn.op("Flatten", conv, name="again")
    drawn.op("Add", "relu.out", "again.out", name="add")
    assert [live for _, live in plan(as_written(drawn.graph()), threads=0).steps] == [1024, 1024, 2048, 2048, 3072]


@pytest.mark.parametrize("kind", ["Reshape", "Flatten", "Identity", "Squeeze", "Unsqueeze"])
def test_views_need_no_memory(net, kind):
    drawn = net(4, 8, 1)
    drawn.op("Tanh", name="tanh")  # 128 bytes
    extra = {"Reshape": [0, -1], "Squeeze": [3], "Unsqueeze": [1]}.get(kind)
    drawn.op(kind, drawn.last, *([] if extra is None else [drawn.constant("extra", np.asarray(extra))]), name="view")
    drawn.op("Tanh", name="last")
    assert plan(as_written(drawn.graph()), threads=0).steps == (("tanh", 128), ("view", 128), ("last", 256))


def test_a_view_of_the_input_is_the_caller_s_too(net):
    drawn = net(4, 8, 8)
    drawn.op("Flatten", name="flatten")
    drawn.gemm(256, 10)
    assert plan(as_written(drawn.graph()), threads=0).steps == (("flatten", 0), ("fc", 40))


def test_shapes_are_followed_through_shape_arithmetic(net):
    """What exporters write for x.view(x.size(0), -1)."""
    drawn = net(4, 8, 8)
    drawn.conv(4, name="conv")
    drawn.op("Shape", "x", name="shape")
    drawn.op("Gather", drawn.last, drawn.constant("first", np.asarray([0])), name="size")
    drawn.op("Concat", drawn.last, drawn.constant("rest", np.asarray([-1])), axis=0, name="target")
    drawn.op("Reshape", "conv.out", drawn.last, name="view")
    drawn.op("Tanh", name="last")
    found = plan(as_written(drawn.graph()), batch=3, threads=0)
    assert (found.peak_node, found.activation_bytes) == ("last", 2 * 3072)


def test_int8_needs_a_quarter_of_what_is_alive(chain, samples_of):
    small = plan(quantize(chain, parse("int8"), samples_of(chain)).graph, threads=0)
    assert small.peak_tensors[0][1] == 512  # the convolution's output, in integers
    assert small.activation_bytes < plan(chain, threads=0).activation_bytes


def test_fp16_is_planned_as_a_cpu_runs_it_in_float32(graph, samples_of):
    small = plan(quantize(graph, parse("fp16"), None).graph)
    assert small.weights_bytes == plan(graph).weights_bytes / 2
    assert small.activation_bytes >= plan(graph).activation_bytes
    assert (small.input_bytes, small.output_bytes) == (plan(graph).input_bytes, plan(graph).output_bytes)


def test_weights_are_counted_in_bits(net):
    drawn = net(4)
    drawn.op("Relu")
    model = drawn.model()
    model.graph.initializer.append(onnx.helper.make_tensor("w", onnx.TensorProto.INT4, [3, 5], np.zeros(15, np.int8)))
    assert plan(Graph(model, "0" * 64)).weights == {"int4": 8}


def test_weights_of_constant_nodes_are_counted(net):
    drawn = net(3)
    drawn.op("Tanh")
    model = drawn.model()
    value = onnx.numpy_helper.from_array(np.ones((5, 3), np.float16))
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["constant"], value=value))
    assert plan(Graph(model, "0" * 64)).weights == {"float16": 30}


@pytest.mark.parametrize("written", [True, False], ids=["as written", "as executed"])
def test_a_branch_writes_into_the_output_and_needs_what_it_keeps_beside(net, written):
    drawn = net(64)
    drawn.choice("choice")
    taken = drawn.model()
    taken.graph.initializer.remove(next(each for each in taken.graph.initializer if each.name == "yes"))
    taken.graph.input.append(onnx.helper.make_tensor_value_info("yes", onnx.TensorProto.BOOL, []))
    graph = Graph(taken, "0" * 64)
    found = plan(as_written(graph) if written else as_executed(graph), batch=10)
    assert dict(found.steps)["choice"] == 10 * 64 * 4 + (4 if written else 0)  # 1.0 is a constant once it is optimized
    assert not found.unknown


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_activations_are_linear_in_the_batch(graph, samples_of, precision):
    if precision != "fp32":
        graph = quantize(graph, parse(precision), samples_of(graph)).graph
    one, two, nine = (plan(graph, batch=batch, threads=0).activation_bytes for batch in (100, 101, 108))
    assert nine - one == 8 * (two - one)


PRECISIONS = ("fp16", "int8", "int8-dynamic", "int8-weights")


@pytest.fixture(scope="module")
def variants(graph, samples_of):
    """Precision -> graph."""
    drawn = samples_of(graph)
    made = {name: quantize(graph, parse(name), drawn).graph for name in PRECISIONS}
    return {"fp32": graph, **made}


def test_plan_is_what_onnx_runtime_allocates_at_its_peak(variants, tracing, tmp_path):
    runs, planned = [], []
    for precision, graph in variants.items():
        save_graph(graph, tmp_path / f"{precision}.onnx")
        for batch in (1, 8, 32):
            runs.append(Run(str(tmp_path / f"{precision}.onnx"), batch))
            planned.append(plan(graph, batch=batch, threads=1).activation_bytes)
    for run, traced, expected in zip(runs, tracing(runs), planned, strict=True):
        assert traced == pytest.approx(expected, rel=0.03), run


@settings(max_examples=30, deadline=None)
@given(budget=st.integers(1, 10**6))
def test_largest_batch_is_the_last_that_fits(chain, budget):
    batch = largest_batch(chain, budget)
    if batch is None:
        assert plan(chain).total_bytes > budget
    else:
        assert plan(chain, batch=batch).total_bytes <= budget < plan(chain, batch=batch + 1).total_bytes


def test_largest_batch_where_the_peak_moves_as_the_batch_grows(net):
    """A table of 4 kB without a batch is the peak at first, the wide layer later."""
    drawn = net(16)
    drawn.op("Expand", drawn.constant("one", np.float32([1])), drawn.constant("size", np.asarray([1024])), name="table")
    drawn.op("ReduceMax", drawn.last, keepdims=0, name="largest")
    drawn.op("Add", "x", drawn.last, name="add")
    drawn.gemm(16, 100)
    graph = drawn.graph()
    for budget in range(12_000, 40_000, 1777):
        batch = largest_batch(graph, budget)
        assert plan(graph, batch=batch).total_bytes <= budget < plan(graph, batch=batch + 1).total_bytes


def test_a_fixed_batch_is_the_largest_if_it_fits(net):
    model = net(4)
    model.op("Tanh")
    model = model.model()
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = 6
    assert largest_batch(Graph(model, "0" * 64), 10_000) == 6
    assert largest_batch(Graph(model, "0" * 64), 100) is None


def test_graph_is_unchanged(graph):
    before = graph.model.SerializeToString(deterministic=True)
    plan(graph, batch=3)
    assert graph.model.SerializeToString(deterministic=True) == before


# --- refusals


def test_what_depends_on_values_is_named_and_not_counted(net):
    drawn = net(4)
    drawn.op("NonZero", name="nonzero")
    drawn.op("Cast", to=onnx.TensorProto.FLOAT)
    found = plan(as_written(drawn.graph()))
    assert found.unknown[0] == "nonzero.out" and found.activation_bytes == 0
    with pytest.raises(InputRefused, match=r"what fits cannot be told: the size of nonzero\.out, .* is not known"):
        largest_batch(drawn.graph(), 10_000)


def test_a_batch_built_into_a_reshape_is_refused_at_another(net):
    drawn = net(4, 8)
    drawn.op("Reshape", "x", drawn.constant("shape", np.asarray([2, 16])), name="baked")
    graph = drawn.graph()
    assert plan(graph, batch=1).output_bytes == 128
    with pytest.raises(InputRefused, match="'baked' has the batch built in: it makes 128 bytes of 384"):
        plan(graph, batch=3)


def test_a_batch_that_does_not_meet_a_weight_is_refused(net):
    drawn = net(4)
    drawn.op("Add", "x", drawn.constant("two", np.ones((2, 4), np.float32)))
    graph = drawn.graph()
    assert plan(graph, batch=2).output_bytes == 32
    with pytest.raises(InputRefused, match="the graph has no shapes at batch 3: "):
        plan(graph, batch=3)


def test_a_batch_of_nothing_is_refused(chain):
    with pytest.raises(InputRefused, match="batch is 0; hint: --batch 1"):
        plan(chain, batch=0)


def looping(*, before):
    """Three turns of sqrt, exp, concat, slice over a state of 256 KiB a sample; what begins is the input, or not."""
    from onnx import TensorProto, helper, numpy_helper

    def value(name, kind=TensorProto.FLOAT, shape=None):
        return helper.make_tensor_value_info(name, kind, shape)

    body = helper.make_graph(
        [helper.make_node("Sqrt", ["state"], ["a"]), helper.make_node("Exp", ["a"], ["b"]),
         helper.make_node("Concat", ["b", "b"], ["c"], axis=1),
         helper.make_node("Slice", ["c", "zero", "width", "one"], ["made"]),
         helper.make_node("Identity", ["go"], ["on"])],
        "body",
        [value("turn", TensorProto.INT64, []), value("go", TensorProto.BOOL, []), value("state")],
        [value("on", TensorProto.BOOL, []), value("made")],
    )  # fmt: skip
    nodes = [helper.make_node("Abs", ["x"], ["begin"])] if before else []
    nodes.append(
        helper.make_node("Loop", ["turns", "yes", "begin" if before else "x"], ["end"], body=body, name="loop")
    )
    nodes.append(helper.make_node("Log", ["end"], ["y"]))
    constants = {"turns": 3, "yes": True, "zero": [0], "width": [65536], "one": [1]}
    graph = helper.make_graph(
        nodes, "looping", [value("x", shape=["batch", 65536])], [value("y")],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )  # fmt: skip
    return Graph(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), "0" * 64)


def test_a_loop_takes_what_its_body_does_and_the_state_of_the_turn_before(tracing, tmp_path):
    graphs = [looping(before=False), looping(before=True)]
    for index, graph in enumerate(graphs):
        save_graph(graph, tmp_path / f"{index}.onnx")
    traced = tracing([Run(str(tmp_path / f"{index}.onnx"), 2) for index in range(2)])
    for graph, measured in zip(graphs, traced, strict=True):
        found = plan(graph, batch=2, threads=1)
        assert (found.activation_bytes, found.unknown) == (measured, ())
    assert traced == [8 * 2**18, 10 * 2**18]  # two states, and b and c of the body; begin beside them
