"""Models, data and bundles that several rooms test with; small, real, made once a session."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

from memopt.manifest import MemoryPoint
from memopt.tensors import Array
from memopt_export.graph import Graph
from memopt_export.pack import Contents, OnnxPart, pack

# The same examples in every run: a law that fails is found by whoever breaks it, not by the next one's luck.
settings.register_profile("memopt", derandomize=True)
settings.load_profile("memopt")

# No test writes to the user's cache, or starts a process to fill it, without having asked for it.
os.environ["MEMOPT_CACHE"] = "off"

CLASSES = ("zero", "one", "two")
SHAPE = (1, 8, 8)
STEPS = (
    {"op": "decode", "color": "gray"},
    {"op": "resize", "size": [8, 8]},
    {"op": "scale", "factor": 1 / 255},
    {"op": "layout", "to": "NCHW"},
)


def make_graph(seed: int = 0, *, hidden: int = 64) -> Graph:
    """Conv, ReLU, two fully connected layers: (batch, 1, 8, 8) -> (batch, 3), weights drawn with the seed."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(seed)
    weights = {
        "conv.weight": rng.normal(0, 0.4, (8, 1, 3, 3)),
        "conv.bias": rng.normal(0, 0.1, 8),
        "fc1.weight": rng.normal(0, 0.06, (hidden, 512)),
        "fc1.bias": rng.normal(0, 0.1, hidden),
        "fc2.weight": rng.normal(0, 0.2, (3, hidden)),
        "fc2.bias": rng.normal(0, 0.1, 3),
    }
    nodes = [
        helper.make_node("Conv", ["input", "conv.weight", "conv.bias"], ["c"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"], name="relu"),
        helper.make_node("Flatten", ["r"], ["f"], name="flatten"),
        helper.make_node("Gemm", ["f", "fc1.weight", "fc1.bias"], ["g"], name="fc1", transB=1),
        helper.make_node("Relu", ["g"], ["h"], name="relu1"),
        helper.make_node("Gemm", ["h", "fc2.weight", "fc2.bias"], ["logits"], name="fc2", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", *SHAPE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    return Graph(model, f"{seed:064x}")


@pytest.fixture(scope="session")
def tiny_graph() -> Graph:
    """A small graph whose weights are large enough to stand in a file of their own."""
    return make_graph()


@pytest.fixture(scope="session")
def tiny_inputs() -> Array:
    """32 inputs of the tiny graph."""
    return np.random.default_rng(1).normal(size=(32, *SHAPE)).astype(np.float32)


@pytest.fixture(scope="session")
def tiny_contents(tiny_inputs: Array) -> Contents:
    """Two variants: an accurate one that needs 8 MiB, and one that needs 2 MiB and is two points worse."""

    def points(fixed: int) -> tuple[MemoryPoint, ...]:
        return tuple(
            MemoryPoint(batch, fixed * 2**20 + batch * 2**16, 0, 0, "by hand", "onnxruntime") for batch in (1, 32)
        )

    parts = (
        OnnxPart("large", "tiny", make_graph(0), {"validation_top1": 0.97}, points(8)),
        OnnxPart("small", "tiny", make_graph(1, hidden=8), {"validation_top1": 0.95}, points(2)),
    )
    return Contents("tiny", parts, CLASSES, STEPS, {"input": tiny_inputs[:4]}, license="Apache-2.0")


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory, tiny_contents: Contents) -> Path:
    """A packed bundle of `tiny_contents`."""
    path = tmp_path_factory.mktemp("bundle") / "tiny.mopt"
    pack(tiny_contents, path)
    return path


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grey PNG, written by Pillow."""
    from PIL import Image

    path = tmp_path_factory.mktemp("pictures") / "picture.png"
    Image.fromarray(np.arange(100, dtype=np.uint8).reshape(10, 10)).save(path)
    return path


@pytest.fixture
def flipped() -> Callable[[bytes, int, int], bytes]:
    """A function that flips one bit of some bytes."""

    def flip(data: bytes, position: int, bit: int) -> bytes:
        return data[:position] + bytes([data[position] ^ (1 << bit)]) + data[position + 1 :]

    return flip
