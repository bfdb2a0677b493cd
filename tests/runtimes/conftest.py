"""What the tests of the CUDA driver and of the TensorRT runtimes share."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def fake_libcuda(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A libcuda.so.1 of our own, compiled from fake_cuda.c; each test loads a copy."""
    return _compiled(tmp_path_factory.mktemp("fake_cuda") / "libcuda.so.1", "fake_cuda.c")


@pytest.fixture(scope="session")
def fake_libnvml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A libnvidia-ml.so.1 of our own, compiled from fake_nvml.c."""
    return _compiled(tmp_path_factory.mktemp("fake_nvml") / "libnvidia-ml.so.1", "fake_nvml.c")


def _compiled(library: Path, source: str) -> Path:
    if shutil.which("gcc") is None:
        pytest.skip(f"gcc is not installed, so {source} cannot be compiled")
    path = Path(__file__).with_name(source)
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-pthread", path, "-o", library], check=True)
    return library


@pytest.fixture(scope="session")
def chain_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """(batch, 1, 128, 128) through three nodes that cannot work in place: two pictures of 64 KiB live at once."""
    from onnx import TensorProto, helper

    names = ["input", "a", "b", "logits"]
    nodes = [
        helper.make_node("Pad", [names[i], "pads"], [names[i + 1]], name=f"n{i}", mode="reflect") for i in range(3)
    ]
    ends = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 1, 128, 128]) for name in ("input", "logits")
    )
    pads = helper.make_tensor("pads", TensorProto.INT64, [8], [0, 0, 1, 0, 0, 0, -1, 0])
    graph = helper.make_graph(nodes, "chain", *([each] for each in ends), [pads])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path = tmp_path_factory.mktemp("chain") / "chain.onnx"
    path.write_bytes(model.SerializeToString())
    return path
