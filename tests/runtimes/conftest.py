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
