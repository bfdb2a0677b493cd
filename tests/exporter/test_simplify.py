import numpy as np
import pytest

from memopt_export.graph import CAPTURED, Graph, wire
from memopt_export.simplify import simplify

onnx = pytest.importorskip("onnx")


def note(proto):
    entry = proto.metadata_props.add()
    entry.key, entry.value = "pkg.torch.onnx.stack_trace", "/home/someone/model.py" * 10


@pytest.fixture(scope="module")
def littered(net):
    """All that exporters leave behind: notes, Constants, repeated and unused weights, idle nodes, a BatchNorm."""
    drawn = net(3, 8, 8)
    drawn.conv(8, name="first", bias=False)
    for name, values in {"gamma": (0.5, 1.5), "beta": (-0.5, 0.5), "mean": (-0.5, 0.5), "variance": (0.5, 2)}.items():
        drawn.constant(name, drawn.rng.uniform(*values, 8).astype(np.float32))
    drawn.op("BatchNormalization", drawn.last, "gamma", "beta", "mean", "variance", name="norm", epsilon=1e-3)
    drawn.op("Identity", name="idle")
    drawn.op("Dropout", name="dropout")
    drawn.op("Relu", name="relu")
    for name in ("same1", "same2", "unused"):
        drawn.constant(name, np.full((1, 8, 1, 1), 0.25, np.float32))
    drawn.op("Mul", drawn.last, "same1", name="mul1")
    drawn.op("Mul", drawn.last, "same2", name="mul2")
    drawn.nodes.append(onnx.helper.make_node("Constant", [], ["shape"], name="constant", value_ints=[0, -1]))
    drawn.op("Reshape", drawn.last, "shape", name="reshape")
    drawn.gemm(512, 4)
    model = onnx.shape_inference.infer_shapes(drawn.model())
    typed = onnx.helper.make_tensor(
        "same2", onnx.TensorProto.FLOAT, (1, 8, 1, 1), [0.25] * 8
    )  # float_data, not raw_data
    next(tensor for tensor in model.graph.initializer if tensor.name == "same2").CopyFrom(typed)
    model.graph.input.append(
        onnx.helper.make_tensor_value_info("same1", onnx.TensorProto.FLOAT, (1, 8, 1, 1))
    )  # as before IR 4
    for part in (model, model.graph, *model.graph.node, *model.graph.initializer, *model.graph.value_info):
        note(part)
        part.doc_string = "exported"
    for value in (*model.graph.input, *model.graph.output):
        note(value)
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_param = "s31"
    return Graph(model, "0" * 64)


@pytest.fixture(scope="module")
def cleaned(littered):
    return simplify(littered)


def test_outputs_are_equal(littered, cleaned, samples_of, run):
    samples = samples_of(littered)
    expected = run(littered, samples, optimize=False)
    np.testing.assert_allclose(run(cleaned, samples, optimize=False), expected, rtol=1e-5, atol=1e-5)


def test_outputs_are_equal_bit_by_bit_without_batch_norm(net, samples_of, run):
    drawn = net(3, 8, 8)
    drawn.conv(8)
    drawn.op("Identity")
    drawn.op("Relu")
    graph = drawn.graph()
    samples = samples_of(graph)
    np.testing.assert_array_equal(run(simplify(graph), samples), run(graph, samples))


def test_no_notes_are_left(cleaned):
    graph = cleaned.model.graph
    parts = (cleaned.model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output)
    assert not any(part.metadata_props or part.doc_string for part in parts)
    assert not graph.value_info
    assert b"someone" not in cleaned.data


def test_free_dimension_is_called_batch(cleaned):
    assert cleaned.inputs[0].shape == ("batch", 3, 8, 8)
    assert cleaned.outputs[0].shape == ("batch", 4)


def test_names_of_a_person_s_choice_are_kept(net):
    drawn = net(3, 8, 8)
    drawn.op("Relu")
    model = drawn.model()
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_param = "frames"
    assert simplify(Graph(model, "0" * 64)).inputs[0].shape[0] == "frames"


def test_only_working_nodes_are_left(cleaned):
    assert [node.op_type for node in cleaned.model.graph.node] == ["Conv", "Relu", "Mul", "Mul", "Reshape", "Gemm"]


def test_initializers_are_raw_used_and_stored_once(cleaned):
    tensors = cleaned.model.graph.initializer
    used = {name for node in cleaned.model.graph.node for name in node.input}
    assert {tensor.name for tensor in tensors} == used - {spec.name for spec in cleaned.inputs} - {
        name for node in cleaned.model.graph.node for name in node.output
    }
    assert all(tensor.HasField("raw_data") for tensor in tensors)
    contents = [(tensor.data_type, tuple(tensor.dims), tensor.raw_data) for tensor in tensors]
    assert len(set(contents)) == len(contents)


def test_simplifying_twice_changes_nothing_more(cleaned):
    assert simplify(cleaned).data == cleaned.data


def test_given_graph_is_unchanged_and_lineage_kept(littered, cleaned):
    assert any(node.op_type == "BatchNormalization" for node in littered.model.graph.node)
    assert cleaned.weights_sha256 == littered.weights_sha256
    onnx.checker.check_model(cleaned.model, full_check=True)


@pytest.mark.parametrize("second_reader", [True, False])
def test_batch_norm_is_folded_only_where_nobody_else_reads_the_convolution(net, second_reader):
    drawn = net(3, 8, 8)
    conv = drawn.conv(8)
    ones = [drawn.constant(name, np.ones(8, np.float32)) for name in ("gamma", "beta", "mean", "variance")]
    norm = drawn.op("BatchNormalization", conv, *ones)
    graph = drawn.graph(norm, *([conv] if second_reader else []))
    kinds = [node.op_type for node in simplify(graph).model.graph.node]
    assert kinds == (["Conv", "BatchNormalization"] if second_reader else ["Conv"])


def test_an_identity_that_names_an_output_stays(net, samples_of, run):
    drawn = net(3)
    drawn.op("Relu")
    drawn.op("Identity", name="named")
    graph = simplify(drawn.graph())
    assert [spec.name for spec in graph.outputs] == ["named.out"]
    assert run(graph, samples_of(graph)).shape == (32, 3)


def draw_branches(net):
    """An If whose branches read, from around them: an idle node's output, repeated weights, a folded node's output."""
    from onnx import TensorProto, helper

    drawn = net(3, 8, 8)
    drawn.conv(8, name="first", bias=False)
    ones = [drawn.constant(name, np.ones(8, np.float32)) for name in ("gamma", "beta", "mean", "variance")]
    drawn.op("BatchNormalization", drawn.last, *ones, name="norm")
    drawn.op("Identity", name="idle")
    for name in ("same1", "same2", "unused"):
        drawn.constant(name, np.full((1, 8, 1, 1), 0.25, np.float32))
    drawn.op("Mul", drawn.last, "same1", name="mul")
    branches = {}
    for branch, weight in (("then_branch", "same1"), ("else_branch", "same2")):
        scale = helper.make_node("Mul", ["idle.out", weight], [f"{branch}.scaled"], doc_string="exported")
        inner = helper.make_graph(
            [helper.make_node("Add", [f"{branch}.scaled", "norm.out"], [f"{branch}.inner"])], "inner", [],
            [helper.make_tensor_value_info(f"{branch}.inner", TensorProto.FLOAT, None)],
        )  # fmt: skip
        nested = helper.make_node("If", ["yes"], [f"{branch}.out"], then_branch=inner, else_branch=inner)
        returned = helper.make_tensor_value_info(f"{branch}.out", TensorProto.FLOAT, None)
        branches[branch] = helper.make_graph([scale, nested], branch, [], [returned], doc_string="exported")
        inner.node[0].name = f"{branch}.add"
    for graph in branches.values():
        for value in graph.output:
            value.type.tensor_type.shape.dim.add().dim_param = "batch"
    drawn.op("If", drawn.constant("yes", np.asarray(True)), name="choice", **branches)
    drawn.op("Add", drawn.last, "mul.out", name="sum")
    return drawn


def test_what_subgraphs_read_is_simplified_around_them(net, samples_of, run):
    drawn = draw_branches(net)
    graph = Graph(unchecked(drawn), "0" * 64)
    cleaned = simplify(graph)
    samples = samples_of(graph)
    assert [node.op_type for node in cleaned.model.graph.node] == ["Conv", "Mul", "If", "Add"]
    names = {tensor.name for tensor in cleaned.model.graph.initializer}
    assert names == {"norm.out.weight", "norm.out.bias", "same1", "yes"}
    assert b"exported" not in cleaned.data
    np.testing.assert_allclose(run(cleaned, samples), run(graph, samples), rtol=1e-5, atol=1e-5)


def unchecked(drawn):
    """The model without inferred shapes, which nested branches do not give."""
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        drawn.nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, drawn.shape)],
        [helper.make_tensor_value_info(drawn.last, TensorProto.FLOAT, ("batch", 8, 8, 8))],
        [numpy_helper.from_array(array, name) for name, array in drawn.arrays.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", drawn.opset)], ir_version=8)


def test_a_batch_norm_stays_where_a_subgraph_reads_the_convolution(net):
    drawn = net(3, 8, 8)
    conv = drawn.conv(8, name="first")
    ones = [drawn.constant(name, np.ones(8, np.float32)) for name in ("gamma", "beta", "mean", "variance")]
    drawn.op("BatchNormalization", conv, *ones, name="norm")
    drawn.op("If", drawn.constant("yes", np.asarray(True)), **{
        branch: onnx.helper.make_graph(
            [onnx.helper.make_node("Neg", [conv], [branch])], branch, [],
            [onnx.helper.make_tensor_value_info(branch, onnx.TensorProto.FLOAT, None)],
        )
        for branch in ("then_branch", "else_branch")
    })  # fmt: skip
    drawn.op("Add", drawn.last, "norm.out")
    kinds = [node.op_type for node in simplify(Graph(unchecked(drawn), "0" * 64)).model.graph.node]
    assert kinds == ["Conv", "BatchNormalization", "If", "Add"]


def test_a_read_within_a_subgraph_counts_as_one_by_its_node(net):
    drawn = draw_branches(net)
    wiring = wire(unchecked(drawn))
    (choice,) = [index for index, node in enumerate(wiring.nodes) if node.op_type == "If"]
    assert wiring.readers["idle.out"] == ((choice - 1, 0), (choice, CAPTURED))
    assert wiring.readers["norm.out"] == ((choice - 2, 0), (choice, CAPTURED))
    assert wiring.readers["same2"] == ((choice, CAPTURED),)
    assert wiring.sole_reader("idle.out") is None
    assert "then_branch.scaled" not in wiring.readers


def test_local_functions_are_written_out(samples_of, run):
    twice = onnx.helper.make_function(
        "own",
        "Twice",
        ["a"],
        ["b"],
        [onnx.helper.make_node("Add", ["a", "a"], ["b"])],
        [onnx.helper.make_opsetid("", 21)],
    )
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Twice", ["x"], ["y"], domain="own")],
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 3])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", 3])],
    )
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("own", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, functions=[twice], ir_version=10)
    cleaned = simplify(Graph(model, "0" * 64))
    assert not cleaned.model.functions
    samples = samples_of(cleaned)
    np.testing.assert_array_equal(run(cleaned, samples), 2 * samples.feeds["x"])
