"""What the tests of the CUDA driver and of the TensorRT runtimes share."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def fake_libcuda(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A libcuda.so.1 of our own, compiled from fake_cuda.c; each test loads a copy."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed, so the fake libcuda cannot be compiled")
    library = tmp_path_factory.mktemp("fake_cuda") / "libcuda.so.1"
    source = Path(__file__).with_name("fake_cuda.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-pthread", source, "-o", library], check=True)
    return library
