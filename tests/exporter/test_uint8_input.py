from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from memopt.errors import InputRefused
from memopt.preprocess import prepare, without_numbers
from memopt_export import from_torch
from memopt_export.cli import cli
from memopt_export.graph import Graph, load_graph, run_graph, save_graph
from memopt_export.uint8_input import take_pictures, with_uint8_input
from memopt_models.checkpoint import save_checkpoint
from memopt_models.data import open_data
from memopt_models.train import TrainSettings, begin

STEPS = (
    {"op": "decode", "color": "rgb"},
    {"op": "resize", "size": [9, 7]},
    {"op": "scale", "factor": 1 / 255},
    {"op": "normalize", "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]},
    {"op": "layout", "to": "NCHW"},
)
PICTURES = np.random.default_rng(0).integers(0, 256, (6, 9, 7, 3), np.uint8)


def conv_graph(*, pads: list[int], group: int = 1, bias: bool = True, second: str | None = None) -> Graph:
    """One convolution of (batch, 3, 9, 7), and what else reads the input."""
    rng = np.random.default_rng(1)
    weights = {"w": rng.normal(size=(6, 3 // group, 3, 3)), "b": rng.normal(size=6)}
    nodes = [helper.make_node("Conv", ["input", "w", *(["b"] if bias else [])], ["c"], pads=pads, group=group)]
    outputs = ["c"]
    if second is not None:
        nodes.append(helper.make_node(second, ["input", *(["w"] if second == "Conv" else [])], ["s"]))
        outputs.append("s")
    graph = helper.make_graph(
        nodes,
        "conv",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, 9, 7])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(each.astype(np.float32), name) for name, each in weights.items()
         if bias or name == "w"],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return Graph(onnx.shape_inference.infer_shapes(model), "0" * 64, preprocess=STEPS)


def operators(graph: Graph) -> list[str]:
    return [node.op_type for node in graph.model.graph.node]


@pytest.mark.parametrize(
    ("graph", "expected"),
    [
        (conv_graph(pads=[0, 0, 0, 0]), ["Cast", "Conv"]),
        (conv_graph(pads=[0, 0, 0, 0], bias=False), ["Cast", "Conv"]),
        (conv_graph(pads=[0, 0, 0, 0], group=3), ["Cast", "Conv"]),
        (conv_graph(pads=[1, 1, 1, 1]), ["Cast", "Sub", "Conv"]),
        (conv_graph(pads=[0, 1, 0, 0], group=3, bias=False), ["Cast", "Sub", "Conv"]),
        (conv_graph(pads=[0, 0, 0, 0], second="Conv"), ["Cast", "Conv", "Conv"]),
        (conv_graph(pads=[0, 0, 0, 0], second="Relu"), ["Cast", "Sub", "Mul", "Conv", "Relu"]),
    ],
)
def test_what_is_left_computes_the_same(graph: Graph, expected: list[str]) -> None:
    taken = take_pictures(graph)
    onnx.checker.check_model(taken.model, full_check=True)
    assert operators(taken) == expected
    assert taken.inputs[0].dtype == "uint8"
    assert taken.preprocess == without_numbers(STEPS) == (STEPS[0], STEPS[1], STEPS[4])
    wanted = run_graph(graph, {"input": prepare(PICTURES, STEPS)}, optimized=False)
    got = run_graph(taken, {"input": prepare(PICTURES, taken.preprocess)}, optimized=False)
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)
    assert graph.inputs[0].dtype == "float32"  # untouched


def test_pictures_that_are_only_scaled_leave_nothing_but_a_cast() -> None:
    graph = replace(conv_graph(pads=[1, 1, 1, 1]), preprocess=(*STEPS[:3], STEPS[4]))
    assert operators(take_pictures(graph)) == ["Cast", "Conv"]


@pytest.mark.parametrize("steps", [None, (), (STEPS[0], STEPS[4])])
def test_a_network_of_which_no_numbers_are_known_is_refused(steps: tuple[dict[str, object], ...] | None) -> None:
    with pytest.raises(InputRefused, match="nothing makes numbers of this network's pictures; hint: without --uint8-i"):
        take_pictures(replace(conv_graph(pads=[0] * 4), preprocess=steps))


def test_pictures_cannot_be_taken_twice() -> None:
    taken = take_pictures(conv_graph(pads=[0] * 4))
    with pytest.raises(InputRefused):
        take_pictures(taken)
    with pytest.raises(InputRefused, match="uint8 input needs one float32 input"):
        take_pictures(replace(taken, preprocess=STEPS))


@pytest.mark.parametrize(("network", "settings"), [("simple_cnn", {"hidden": 8}), ("mynets:linear", {})])
def test_graph_and_program_answer_to_pictures_as_torch_does(
    network: str, settings: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "mynets", sys.modules[__name__])
    data = open_data("digits")
    checkpoint = begin(network, settings, data, TrainSettings(epochs=1), start=None)
    images = data.validation.images[:16]
    samples, pictures = prepare(images, data.preprocess), prepare(images, without_numbers(data.preprocess))
    exported = with_uint8_input(from_torch.export(checkpoint, samples), pictures, samples)
    assert exported.parity.holds
    program = torch.export.load(io.BytesIO(exported.program)).module()
    for count in (1, 16):  # the batch stays free
        expected = checkpoint.module()(torch.from_numpy(samples[:count])).detach().numpy()
        np.testing.assert_allclose(program(torch.from_numpy(pictures[:count])).detach().numpy(), expected, atol=1e-5)
        (got,) = run_graph(exported.graph, {"input": pictures[:count]})
        np.testing.assert_allclose(got, expected, atol=1e-4)


def linear(classes: int = 10) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, classes))


def test_a_graph_knows_its_preprocessing_when_it_is_loaded_again(tmp_path: Path) -> None:
    graph = conv_graph(pads=[0] * 4)
    save_graph(graph, tmp_path / "x.onnx")
    assert load_graph(tmp_path / "x.onnx").preprocess == STEPS
    assert load_graph(tmp_path / "x.onnx").with_model(graph.model, precision="int8").preprocess == STEPS


@pytest.mark.parametrize("steps", [{"op": "layout"}, [{"op": "explode"}], [1], "decode"])
def test_preprocessing_that_is_none_takes_nothing_else_of_the_card_with_it(steps: object, tmp_path: Path) -> None:
    graph = replace(conv_graph(pads=[0] * 4), precision="int8", preprocess=steps)
    (tmp_path / "x.onnx").write_bytes(_with_card(graph, steps))
    loaded = load_graph(tmp_path / "x.onnx")
    assert (loaded.preprocess, loaded.precision) == (None, "int8")


def _with_card(graph: Graph, steps: object) -> bytes:
    import json

    model = graph.copy_model()
    entry = model.metadata_props.add()
    entry.key, entry.value = "memopt", json.dumps({"precision": "int8", "weights": "0" * 64, "preprocess": steps})
    return bytes(model.SerializeToString())


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments: str) -> str:
        done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    return invoke


def test_a_bundle_of_uint8_input_predicts_what_the_float_one_does(
    run: Callable[..., str], tmp_path: Path
) -> None:  # fmt: skip
    import memopt

    checkpoint = begin("simple_cnn", {"hidden": 8}, open_data("digits"), TrainSettings(epochs=1), start=None)
    save_checkpoint(checkpoint, tmp_path / "x.safetensors")
    run("export", "x.safetensors", "--data", "digits", "-o", "float.onnx")
    run("export", "x.safetensors", "--data", "digits", "--uint8-input", "-o", "uint8.onnx")
    for name in ("float", "uint8"):
        run("pack", f"{name}.onnx", "--data", "digits", "-o", f"{name}.mopt")
        run("verify", f"{name}.mopt", "--run")
    pictures = list(open_data("digits").test.images[:5])
    with memopt.load("float.mopt") as one, memopt.load("uint8.mopt") as other:
        assert other.inputs[0].dtype == "uint8"
        for first, second in zip(one.predict(pictures, topk=3), other.predict(pictures, topk=3), strict=True):
            assert [each.label for each in first] == [each.label for each in second]
            assert [each.probability for each in first] == pytest.approx(
                [each.probability for each in second], abs=1e-5
            )


def test_uint8_input_is_quantized_on_pictures(run: Callable[..., str], tmp_path: Path) -> None:
    checkpoint = begin("simple_cnn", {"hidden": 8}, open_data("digits"), TrainSettings(epochs=1), start=None)
    save_checkpoint(checkpoint, tmp_path / "x.safetensors")
    run("export", "x.safetensors", "--data", "digits", "--uint8-input", "-o", "x.onnx")
    for precision in ("int8", "fp16"):
        run(
            "quantize",
            "x.onnx",
            "--data",
            "digits",
            "--precision",
            precision,
            "--no-measure",
            "-o",
            f"{precision}.onnx",
        )
        graph = load_graph(tmp_path / f"{precision}.onnx")
        assert graph.inputs[0].dtype == "uint8"
        assert graph.preprocess == without_numbers(checkpoint.preprocess)
        pictures = prepare(open_data("digits").test.images[:32], graph.preprocess)
        (got,), (wanted,) = (run_graph(each, {"input": pictures}) for each in (graph, load_graph(tmp_path / "x.onnx")))
        assert np.abs(got.astype(np.float32) - wanted).max() < 0.1 * np.abs(wanted).max()
