"""A quantized graph held against the float one: what is told of it, what is not known and why, and what is flagged."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from memopt.accuracy import agreement, kl_divergence, sqnr_db, top1
from memopt.errors import BackendError
from memopt.memory import Bill, HostMemory
from memopt.probe import Measurement
from memopt_export import judge as judging
from memopt_export.graph import Graph, run_graph
from memopt_export.judge import Verdict, judge, measured
from memopt_export.means import Means
from memopt_export.quantize import Quantized, quantize
from memopt_export.recipe import Recipe
from memopt_models.data import Samples

onnx = pytest.importorskip("onnx")
INT8 = Recipe("int8", correction="none", calibration="minmax")
MIB = 2**20


@pytest.fixture(scope="module")
def held_out(graph, samples_of) -> Samples:
    labels = np.random.default_rng(0).integers(0, 10, 33)
    return replace(samples_of(graph, 33, seed=9), labels=labels, source="random/validation")


@pytest.fixture(scope="module")
def quantized(graph, samples_of) -> Quantized:
    return quantize(graph, INT8, samples_of(graph))


@pytest.fixture(scope="module")
def verdict(graph, quantized, held_out) -> Verdict:
    return judge(graph, quantized, INT8, held_out)


def test_numbers_are_those_of_all_samples_at_once(graph, quantized, held_out, verdict) -> None:
    got, expected = run_graph(quantized.graph, held_out.feeds)[0], run_graph(graph, held_out.feeds)[0]
    assert verdict.samples == 33
    assert verdict.source == "random/validation"
    assert verdict.sqnr_db == pytest.approx(sqnr_db(got, expected))
    assert verdict.kl_divergence == pytest.approx(kl_divergence(got, expected))
    assert verdict.agreement == agreement(got, expected)
    assert (verdict.top1, verdict.float_top1) == (top1(got, held_out.labels), top1(expected, held_out.labels))
    assert (verdict.float_bytes, verdict.size_bytes) == (len(graph.data), len(quantized.graph.data))
    assert verdict.fused == quantized.fused
    assert verdict.reasons == verdict.flags == ()


def test_without_labels_there_is_no_top1(graph, quantized, held_out) -> None:
    found = judge(graph, quantized, INT8, replace(held_out, labels=None))
    assert found.top1 is found.float_top1 is None
    assert found.agreement is not None


def test_without_samples_the_reason_is_told(graph, quantized) -> None:
    found = judge(graph, quantized, INT8, None)
    assert found.sqnr_db is found.source is None
    assert found.reasons == ("outputs are not compared: there are no samples; --data SPEC names some",)
    assert measured(found, graph, quantized.graph, INT8, None).reasons[1:] == (
        "latency and memory are not measured: there are no samples to run",
    )


def test_progress_reaches_all_samples(graph, quantized, held_out) -> None:
    steps = []
    judge(graph, quantized, INT8, held_out, Means(batch_size=16, on_step=steps.append))
    assert [(step.done, step.total) for step in steps] == [(15, 33), (30, 33), (33, 33)]  # none alone in a run


def test_a_fixed_batch_is_judged_in_whole_batches(graph, held_out) -> None:
    model = graph.copy_model()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    fixed = graph.with_model(model)
    done = quantize(fixed, INT8, held_out)
    found = judge(fixed, done, INT8, held_out)
    assert found.samples == 32
    assert found.sqnr_db is not None
    few = judge(fixed, done, INT8, held_out.pick(slice(3)))
    assert few.reasons == ("outputs are not compared: random/validation is less than one batch",)


def drawn(nodes, inputs, outputs, **arrays) -> Graph:
    """A graph of these nodes; inputs and outputs map names to (type, shape)."""
    from onnx import helper, numpy_helper

    values = [[helper.make_tensor_value_info(n, *spec) for n, spec in specs.items()] for specs in (inputs, outputs)]
    stored = [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()]
    drawing = helper.make_graph(nodes, "net", *values, stored)
    return Graph(helper.make_model(drawing, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), "0" * 64)


FLOAT, INT = 1, 7


def scaled(scale: float, kind: str = "Mul") -> Graph:
    node = onnx.helper.make_node(kind, ["x", "scale"], ["y"])
    return drawn([node], {"x": (FLOAT, ["batch", 4])}, {"y": (FLOAT, ["batch", 4])}, scale=np.float32(scale))


def compared(before: Graph, after: Graph, samples: Samples) -> Verdict:
    return judge(before, Quantized(after, None, None, ()), Recipe("int8"), samples)


ROWS = Samples({"x": np.arange(1, 21, dtype=np.float32).reshape(5, 4)}, None, "rows")


def test_equal_outputs_have_no_sqnr_and_are_not_smaller() -> None:
    found = compared(scaled(2), scaled(2), ROWS)
    assert found.sqnr_db is None
    assert found.kl_divergence == 0
    assert found.reasons == ("outputs are equal: no SQNR",)
    assert [flag.split(":")[0] for flag in found.flags] == ["not smaller on disk"]


def test_below_ten_decibels_is_flagged() -> None:
    assert "below 10 dB: the SQNR is 6.0 dB" in compared(scaled(2), scaled(3), ROWS).flags
    assert not any("dB" in flag for flag in compared(scaled(2), scaled(2.1), ROWS).flags)


def test_outputs_that_are_all_zero_are_flagged_and_told() -> None:
    found = compared(scaled(0), scaled(1), ROWS)
    assert found.reasons == ("the float graph's outputs are all 0: no SQNR",)
    assert "below 10 dB: the SQNR is -inf dB" in found.flags


def test_what_is_not_finite_is_told_and_flagged_where_float_is_finite() -> None:
    with np.errstate(over="ignore"):
        broken = compared(scaled(1), scaled(np.inf), ROWS)
        own = compared(scaled(np.inf), scaled(1), ROWS)
    assert broken.sqnr_db is own.sqnr_db is None
    assert "output 'y' is not finite, where the float graph's is" in broken.flags
    assert own.reasons == ("outputs are not compared: 'y' of the float graph is not finite",)
    assert not any("finite" in flag for flag in own.flags)


def test_fp16_shows_its_overflow(net, samples_of) -> None:
    """On a CPU, ONNX Runtime would compute it in float32, and all would look well."""
    drawing = net(4)
    for name, gain in (("up", 1e4), ("more", 1e4), ("down", 1e-3)):
        drawing.op("MatMul", drawing.last, drawing.weight(f"{name}.w", 4, 4), name=name)
        drawing.arrays[f"{name}.w"] = (gain * drawing.arrays[f"{name}.w"]).astype(np.float32)
    graph = drawing.graph()
    found = judge(graph, quantize(graph, Recipe("fp16"), None), Recipe("fp16"), samples_of(graph))
    assert any("is not finite, where the float graph's is" in flag for flag in found.flags)


def test_shapes_that_follow_values_are_not_set_side_by_side() -> None:
    def above(limit):
        nodes = [
            onnx.helper.make_node("Greater", ["x", "limit"], ["m"]),
            onnx.helper.make_node("NonZero", ["m"], ["y"]),
        ]
        return drawn(nodes, {"x": (FLOAT, ["batch", 4])}, {"y": (INT, [2, "n"])}, limit=np.float32(limit))

    found = compared(above(3), above(4), ROWS)
    assert found.reasons == ("outputs are not compared: the shape of 'y' follows its values",)
    assert found.sqnr_db is found.agreement is None


def test_integers_agree_where_they_are_equal() -> None:
    def largest(scale):
        nodes = [
            onnx.helper.make_node("Mul", ["x", "scale"], ["z"]),
            onnx.helper.make_node("ArgMax", ["z"], ["y"], axis=1, keepdims=0),
        ]
        return drawn(nodes, {"x": (FLOAT, ["batch", 4])}, {"y": (INT, ["batch"])}, scale=np.float32(scale))

    found = compared(largest([1, 1, 1, 1]), largest([1, 1, 3, 1]), ROWS)
    assert (found.agreement, found.sqnr_db, found.kl_divergence) == (0.0, None, None)
    assert found.reasons == ("the first output is not of floating point: no SQNR",)


def test_tokens_are_judged_too() -> None:
    node = onnx.helper.make_node("Gather", ["table", "ids"], ["y"])
    table = np.random.default_rng(0).normal(size=(50, 64)).astype(np.float32)
    graph = drawn([node], {"ids": (INT, ["batch", 6])}, {"y": (FLOAT, ["batch", 6, 64])}, table=table)
    samples = Samples({"ids": np.arange(60, dtype=np.int64).reshape(10, 6) % 50}, None, "tokens")
    found = judge(graph, quantize(graph, Recipe("int8-weights"), None), Recipe("int8-weights"), samples)
    assert found.sqnr_db is not None
    assert found.sqnr_db > 35
    assert found.kl_divergence is found.agreement is None


def test_bf16_is_emulated_and_not_measured_on_this_cpu(graph, held_out) -> None:
    recipe = Recipe("bf16")
    done = quantize(graph, recipe, None)
    found = measured(judge(graph, done, recipe, held_out), graph, done.graph, recipe, held_out)
    assert found.sqnr_db is not None
    assert found.sqnr_db > 25
    assert found.latency_ratio is None
    (memory,) = found.reasons
    assert memory.startswith("latency and memory are not measured: onnxruntime cannot open ")
    assert found.size_bytes < found.float_bytes


def test_what_this_cpu_cannot_run_is_told() -> None:
    model = scaled(2).copy_model()
    model.graph.node[0].domain = "elsewhere"
    model.opset_import.add(domain="elsewhere", version=1)
    found = compared(scaled(2), scaled(2).with_model(model), ROWS)
    assert found.reasons[0].startswith("outputs are not compared: onnxruntime cannot run the graph: ")
    assert found.sqnr_db is None


def test_converted_inputs_are_fed_as_halves(graph, held_out) -> None:
    recipe = Recipe("fp16", convert_io=True)
    done = quantize(graph, recipe, None)
    assert done.graph.inputs[0].dtype == "float16"
    found = judge(graph, done, recipe, held_out)
    assert found.sqnr_db is not None
    assert found.sqnr_db > 40


def test_what_the_checker_refuses_is_flagged() -> None:
    bad = scaled(1)
    model = bad.copy_model()
    model.graph.node[0].attribute.append(onnx.helper.make_attribute("no_such", 1))
    assert any(
        flag.startswith("ONNX's checker refuses it: ") for flag in compared(bad, bad.with_model(model), ROWS).flags
    )


# --- fused layers


def test_layers_that_are_not_fused_are_flagged(graph, quantized) -> None:
    few = replace(quantized, fused=(3, 5))
    assert "only 3 of 5 layers fused by ONNX Runtime" in judge(graph, few, INT8, None).flags


@pytest.mark.parametrize("choice", [{"exclude": ("wide",)}, {"exclude": ("Gemm",)}, {"include": ("Conv",)}])
def test_layers_that_the_recipe_leaves_float_are_no_fault(graph, samples_of, choice) -> None:
    recipe = replace(INT8, **choice)
    done = quantize(graph, recipe, samples_of(graph))
    assert done.fused is not None
    assert done.fused[0] == done.fused[1] - 1
    assert judge(graph, done, recipe, None).flags == ()


# --- time and memory


def measurement(p50_ms: float, private_bytes: int | None) -> Measurement:
    steady = HostMemory(private_bytes, 0, None, None, "by hand")
    return Measurement(Bill({"steady": steady}), "CPU", 1.0, p50_ms, p50_ms, p50_ms, 5)


MEASURED = [
    ((1.0, 10 * MIB), (0.4, 6 * MIB), []),
    ((1.0, 10 * MIB), (1.05, 10 * MIB), []),  # what two measurements of one model may lie apart
    ((1.0, 10 * MIB), (2.5, 10 * MIB), ["slower than float: 2.50x (1 ms -> 2.5 ms)"]),
    ((1.0, 10 * MIB), (1.0, 12 * MIB), ["larger in private memory than float: 10.0 MiB -> 12.0 MiB"]),
    ((1.0, None), (1.0, None), []),
]


@pytest.mark.parametrize(("before", "after", "flags"), MEASURED)
def test_slower_and_larger_are_flagged(
    graph, quantized, held_out, verdict, monkeypatch, before, after, flags
) -> None:  # fmt: skip
    answers = iter([measurement(*before), measurement(*after)])
    monkeypatch.setattr(judging, "measure_file", lambda request: next(answers))
    found = measured(verdict, graph, quantized.graph, INT8, held_out)
    assert list(found.flags) == flags
    assert found.latency_ratio == after[0] / before[0]
    assert found.batch == 1


def test_both_are_measured_in_fresh_processes(graph, quantized, held_out, verdict) -> None:
    found = measured(verdict, graph, quantized.graph, INT8, held_out)
    assert found.measured is not None
    assert found.float_measured is not None
    assert found.latency_ratio == found.measured.p50_ms / found.float_measured.p50_ms
    assert {"load", "steady"} <= set(found.measured.bill.phases)


def test_what_cannot_be_measured_is_told(graph, quantized, held_out, verdict, monkeypatch) -> None:
    def fail(request):
        raise BackendError("onnxruntime was killed by SIGSEGV")

    monkeypatch.setattr(judging, "measure_file", fail)
    found = measured(verdict, graph, quantized.graph, INT8, held_out)
    assert found.reasons == ("latency and memory are not measured: onnxruntime was killed by SIGSEGV",)
    assert found.latency_ratio is None


def test_another_target_is_not_measured_here(graph, quantized, held_out, verdict) -> None:
    recipe = Recipe("int8", "tensorrt")
    found = measured(verdict, graph, quantized.graph, recipe, held_out)
    assert "it is made for tensorrt" in found.reasons[0]
