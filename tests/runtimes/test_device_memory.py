"""A GPU's memory by three accounts, against a fake libcuda and a fake NVML that count what is held."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from memopt import cuda_driver, probe
from memopt.cuda_driver import DeviceBuffer, Driver
from memopt.device_memory import read_device_memory
from memopt.memory import IMPORT
from memopt.tensors import Array, TensorSpec

pynvml = pytest.importorskip("pynvml")

MIB = 2**20
CONTEXT, OTHERS = 300 * MIB, 50 * MIB
DRIVER_NOT_LOADED = 9
UUID = "abababab-abab-abab-abab-abababababab"


@pytest.fixture
def driver(fake_libcuda: Path, tmp_path: Path) -> Driver:
    """On a fake device of its own, on which another process holds memory already."""
    library = str(shutil.copy(fake_libcuda, tmp_path))
    opened = Driver(library)
    opened.device_buffer(OTHERS)
    return opened


@pytest.fixture
def nvml(fake_libnvml: Path, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    """NVML as it is on a machine where this process is listed with its context."""
    loaded = ctypes.CDLL(str(fake_libnvml))
    loaded.fake_add.argtypes = loaded.fake_hold.argtypes = (ctypes.c_uint, ctypes.c_ulonglong)
    monkeypatch.setattr(pynvml, "nvmlLib", loaded)
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    loaded.fake_reset(f"GPU-{UUID}".encode(), 0)
    loaded.fake_add(os.getpid() + 1, OTHERS)
    loaded.fake_add(os.getpid(), CONTEXT)
    return loaded


class Session:
    """Holds weights from the start and activations from the first run, on the fake device."""

    inputs = (TensorSpec("x", "float32", ("batch", 2)),)
    outputs = inputs
    placement, device_method = "the fake", "by hand"

    def __init__(self, driver: Driver, nvml: ctypes.CDLL) -> None:
        self._driver, self._nvml, self._held = driver, nvml, list[DeviceBuffer]()
        self._hold(40 * MIB)

    @property
    def device_bytes(self) -> int:
        return sum(buffer.size_bytes for buffer in self._held)

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        if len(self._held) == 1:
            self._hold(8 * MIB)
        return [feeds["x"]]

    def trim(self) -> None:
        self._driver.free(self._held.pop())
        self._nvml.fake_hold(os.getpid(), CONTEXT + self.device_bytes)

    def close(self) -> None:
        """Nothing more to free."""

    def _hold(self, size_bytes: int) -> None:
        self._held.append(self._driver.device_buffer(size_bytes))
        self._nvml.fake_hold(os.getpid(), CONTEXT + self.device_bytes)


def test_each_account_is_read_with_its_method(driver: Driver, nvml: ctypes.CDLL) -> None:
    found = read_device_memory(driver)
    assert (found.process_bytes, found.used_bytes, found.allocator_bytes) == (CONTEXT, OTHERS, None)
    assert found.methods["process_bytes"] == "NVML, nvmlDeviceGetComputeRunningProcesses"
    assert found.methods["used_bytes"].startswith("cuMemGetInfo")
    session = Session(driver, nvml)
    held = read_device_memory(driver, session)
    assert (held.process_bytes, held.used_bytes) == (CONTEXT + 40 * MIB, OTHERS + 40 * MIB)
    assert (held.allocator_bytes, held.methods["allocator_bytes"]) == (40 * MIB, "by hand")
    assert nvml.fake_open() == 0  # every reading shuts NVML down again


def test_a_slice_of_a_device_is_found_by_its_own_name(driver: Driver, nvml: ctypes.CDLL) -> None:
    nvml.fake_reset(f"MIG-{UUID}".encode(), 0)
    nvml.fake_add(os.getpid(), 7)
    assert read_device_memory(driver).process_bytes == 7


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda nvml: nvml.fake_reset(b"GPU-another", 0), "unknown: NVML says: "),
        (lambda nvml: nvml.fake_reset(b"", DRIVER_NOT_LOADED), "unknown: NVML says: Driver Not Loaded"),
        (lambda nvml: nvml.fake_reset(f"GPU-{UUID}".encode(), 0), "unknown: NVML does not list this process"),
        (lambda nvml: nvml.fake_hold(os.getpid(), 2**64 - 1), "unknown: the driver counts no single processes"),
    ],
)
def test_what_nvml_cannot_tell_is_unknown_with_the_reason(
    driver: Driver, nvml: ctypes.CDLL, spoil: Callable[[ctypes.CDLL], None], said: str
) -> None:
    spoil(nvml)
    found = read_device_memory(driver)
    assert found.process_bytes is None
    assert found.methods["process_bytes"].startswith(said)
    assert found.best[0] == OTHERS  # the device's account is still there


def test_without_nvidia_ml_py_the_reason_can_be_typed(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    found = read_device_memory(driver)
    assert found.process_bytes is None
    assert "pip install 'memopt[measure]'" in found.methods["process_bytes"]


def test_the_bill_tells_context_weights_activations_and_trim_apart(
    driver: Driver, nvml: ctypes.CDLL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path
) -> None:
    class Fake:
        def load_library(self) -> None:
            """Nothing to import."""

        def open(self, artifact: object, *, device: str, threads: int) -> Session:
            return Session(driver, nvml)

    monkeypatch.setitem(probe.RUNTIMES, "fake", Fake())
    monkeypatch.setattr(cuda_driver, "open_driver", lambda: driver)
    np.save(tmp_path / "x.npy", np.zeros((4, 2), np.float32))
    request = probe.Request(
        str(tiny_bundle), "fake", "cuda", 2, {"x": str(tmp_path / "x.npy")}, "large", runs=5, seconds=0.1
    )
    device = probe._measure_here(request).bill.device
    assert device[IMPORT].process_bytes == CONTEXT
    accounts = {name: (each.process_bytes, each.used_bytes, each.allocator_bytes) for name, each in device.items()}
    del accounts[IMPORT]
    assert accounts == {
        "load": (40 * MIB,) * 3,
        "first run": (48 * MIB,) * 3,
        "steady": (48 * MIB,) * 3,
        "after trim": (40 * MIB,) * 3,
    }
