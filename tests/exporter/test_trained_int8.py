"""Networks trained to be rounded, as the graphs that are made of them: one contract for all targets."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from memopt.artifact import open_artifact
from memopt.errors import AnswerIsNo, InputRefused
from memopt.preprocess import prepare
from memopt.runtimes import runtime
from memopt.tensors import Array, TensorSpec
from memopt_export import from_torch
from memopt_export.execution import fused_counts
from memopt_export.from_torch import Exported, Parity, export
from memopt_export.graph import Graph, load_graph, run_graph, save_graph
from memopt_export.placement import place
from memopt_export.quantize import quantize
from memopt_export.recipe import Recipe
from memopt_models.checkpoint import QUANTIZATION, Checkpoint, save_checkpoint, snapshot
from memopt_models.data import DataSet, open_data
from memopt_models.networks import build
from memopt_models.qat import QatSettings, train_rounded
from memopt_models.train import TrainSettings, train

torch = pytest.importorskip("torch")

TARGETS = ("cpu", "tensorrt")


@dataclass(frozen=True)
class Case:
    dense: Checkpoint
    rounded: Checkpoint
    samples: Array
    labels: Array
    exported: Exported


@pytest.fixture(scope="module")
def few() -> DataSet:
    digits = open_data("digits")
    sizes = {"train": 512, "validation": 64, "test": 64}
    return replace(digits, **{name: split.pick(slice(sizes[name])) for name, split in digits.splits.items()})


@pytest.fixture(scope="module")
def dense(few: DataSet) -> Checkpoint:
    return train("simple_cnn", {"hidden": 32}, few, TrainSettings(epochs=5, learning_rate=2e-3, threads=1))


@pytest.fixture(scope="module", params=TARGETS)
def case(request, dense: Checkpoint, few: DataSet) -> Case:
    how = QatSettings(TrainSettings(epochs=1, learning_rate=1e-4, threads=1), target=request.param)
    rounded = train_rounded(dense, few, how)
    samples = prepare(few.test.images, few.preprocess)
    return Case(dense, rounded, samples, few.test.labels, export(rounded, samples))


def observed(network: str, target: str = "cpu") -> Checkpoint:
    """Fresh weights, BatchNorms after two steps, ranges of two: what fuses does not hang on what was learned."""
    from memopt_models import pt2e

    torch.manual_seed(0)
    settings = {"classes": 10, "in_channels": 3}
    module = build(network, settings).train()
    with torch.no_grad():
        for _ in range(2):
            module(torch.randn(4, 3, 64, 64))
    spec = TensorSpec("input", "float32", ("batch", 3, 64, 64))
    plain = Checkpoint(network, settings, snapshot(module), (spec,), tuple("0123456789"), (), (), {}, 0)
    made = pt2e.rounded(plain, target)
    made.module.train()
    with torch.no_grad():
        for _ in range(2):
            made.module(torch.randn(4, 3, 64, 64))
    scales = {f"{QUANTIZATION}{name}": tensor for name, tensor in made.ranges().items()}
    return replace(plain, state=made.state() | scales, quantization={"method": "pt2e", "target": target})


def weights(graph: Graph) -> dict[str, str]:
    """The dtype in which each Conv and Gemm stores its weights."""
    model = graph.model
    stored = {tensor.name: numpy_helper.to_array(tensor).dtype.name for tensor in model.graph.initializer}
    writers = {node.output[0]: node for node in model.graph.node}
    layers = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm")]
    return {node.name: stored[writers[node.input[1]].input[0]] for node in layers}


def test_rounded_graph_is_about_as_right_as_the_float_network(case: Case) -> None:
    (logits,) = run_graph(case.exported.graph, {"input": case.samples})
    right = float((logits.argmax(1) == case.labels).mean())
    assert right == pytest.approx(case.rounded.metrics["test_top1"], abs=1 / 64)
    assert right >= case.dense.metrics["test_top1"] - 0.05


def test_every_layer_stores_int8(case: Case) -> None:
    assert set(weights(case.exported.graph).values()) == {"int8"}
    assert len(weights(case.exported.graph)) == 4
    assert len(case.exported.graph.data) < 0.35 * 4 * case.dense.parameters


def test_graph_computes_what_torch_does(case: Case) -> None:
    parity = case.exported.parity
    assert parity.holds
    assert parity.noise is not None
    assert parity.noise < 0.01
    assert parity.agreement >= 63 / 64


@pytest.mark.parametrize("case", ["cpu"], indirect=True)
def test_same_checkpoint_gives_the_same_bytes_in_a_new_process(case: Case, tmp_path: Path) -> None:
    save_checkpoint(case.rounded, tmp_path / "q.safetensors")
    command = ["export", "q.safetensors", "--data", "digits", "-o", "q.onnx", "--json"]
    child = subprocess.run(
        [sys.executable, "-m", "memopt_export", *command], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    told = json.loads(child.stdout)
    assert told["sha256"] == case.exported.graph.sha256
    assert told["precision"] == case.exported.graph.precision


def test_program_runs_without_torchao_and_answers_as_the_graph(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "q.pt2"
    path.write_bytes(case.exported.program)
    session = runtime("torch").open(open_artifact(path))
    (got,) = session.run({"input": case.samples})
    session.close()
    (expected,) = run_graph(case.exported.graph, {"input": case.samples}, optimized=False)
    np.testing.assert_allclose(got, expected, atol=0.02 * np.abs(expected).max())
    program = torch.export.load(path)
    held = [*program.state_dict.values(), *program.constants.values()]
    assert {tensor.dtype for tensor in held if tensor.ndim > 1} == {torch.int8}  # it holds no float weights


def test_graph_knows_that_it_was_trained_and_is_not_quantized_again(case: Case, tmp_path: Path) -> None:
    save_graph(case.exported.graph, tmp_path / "q.onnx")
    loaded = load_graph(tmp_path / "q.onnx")
    recipe = Recipe("int8", case.rounded.quantization["target"])
    assert loaded.precision == recipe.name
    assert loaded.quantization is not None
    assert (loaded.quantization.trained, loaded.quantization.recipe) == (True, recipe)
    with pytest.raises(InputRefused, match="the graph is already int8"):
        quantize(loaded, recipe, None)


def test_places_are_those_of_the_exporters_own_quantizer(case: Case) -> None:
    float_graph = export(case.dense, case.samples).graph
    expected = place(float_graph, Recipe("int8", case.rounded.quantization["target"]))
    nodes = Counter(node.op_type for node in case.exported.graph.model.graph.node)
    assert nodes["QuantizeLinear"] == len(expected.ranges_of)


@pytest.mark.parametrize(
    ("network", "layers"), [("resnet18", 21), pytest.param("mobilenet_v2", 53, marks=pytest.mark.slow)]
)
def test_every_layer_of_a_residual_network_is_fused(network: str, layers: int) -> None:
    checkpoint = observed(network)
    samples = torch.randn(4, 3, 64, 64).numpy()
    graph = export(checkpoint, samples).graph
    assert fused_counts(graph.data) == (layers, layers)
    assert set(weights(graph).values()) == {"int8"}
    assert not any(node.op_type == "BatchNormalization" for node in graph.model.graph.node)
    float_graph = export(replace(checkpoint, quantization={}), samples).graph
    nodes = Counter(node.op_type for node in graph.model.graph.node)
    assert nodes["QuantizeLinear"] == len(place(float_graph, Recipe("int8")).ranges_of)


@pytest.mark.parametrize("case", ["cpu"], indirect=True)
def test_every_layer_for_the_cpu_is_fused(case: Case) -> None:
    assert fused_counts(case.exported.graph.data) == (4, 4)


def test_graph_with_another_scale_is_refused(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the proof is of outputs, it has to see a single step that is wrong by a fifth."""
    right = from_torch.simplify

    def wrong(graph: Graph) -> Graph:
        model = right(graph).copy_model()
        scale = next(node.input[1] for node in model.graph.node if node.op_type == "DequantizeLinear")
        tensor = next(each for each in model.graph.initializer if each.name == scale)
        tensor.CopyFrom(numpy_helper.from_array(np.float32(1.2) * numpy_helper.to_array(tensor), scale))
        return graph.with_model(model)

    monkeypatch.setattr(from_torch, "simplify", wrong)
    with pytest.raises(AnswerIsNo, match="the graph differs from torch by"):
        export(case.rounded, case.samples)


def test_noise_has_a_limit() -> None:
    parity = Parity(samples=2, max_difference=0.5, largest_output=1.0, agreement=1.0, noise=0.04)
    assert parity.holds
    assert not replace(parity, noise=0.06).holds
    assert not replace(parity, noise=float("nan")).holds
    assert not replace(parity, noise=None).holds


def test_checker_accepts_it(case: Case) -> None:
    onnx.checker.check_model(case.exported.graph.model, full_check=True)
