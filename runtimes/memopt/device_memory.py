"""A GPU's memory by three accounts: the driver's of this process, the driver's of the device, the runtime's own.

The driver's account of one process comes from NVML (the package nvidia-ml-py) and counts everything: the context, the
library's kernels, the model. It is not there for a process inside a container, which has another number outside, nor
on Windows. The device's use is cuMemGetInfo's, of all processes together: right where nobody else comes or goes.
"""

from __future__ import annotations

import os
from typing import Any

from memopt.cuda_driver import Driver
from memopt.memory import DeviceMemory
from memopt.session import Session

_USED = "cuMemGetInfo, total minus free, all processes; a difference is right where no other process comes or goes"
_NVML = "NVML, nvmlDeviceGetComputeRunningProcesses"


def read_device_memory(driver: Driver, session: Session | None = None) -> DeviceMemory:
    """What the device holds now. The first call makes the context, so that it counts before any model does.

    Args:
        driver: of the device.
        session: whose own account is asked for; None before there is one.
    """
    free_bytes, total_bytes = driver.mem_info()
    process_bytes, process_method = _by_nvml(driver.uuid)
    methods = {"process_bytes": process_method, "used_bytes": _USED}
    if session is not None:
        methods["allocator_bytes"] = session.device_method
    allocator_bytes = session.device_bytes if session is not None else None
    return DeviceMemory(process_bytes, total_bytes - free_bytes, allocator_bytes, methods)


def _by_nvml(uuid: str) -> tuple[int | None, str]:
    """This process's bytes on the device with this UUID, with the method; None and the reason where it is unknown."""
    try:
        import pynvml
    except ImportError:
        return None, "unknown: nvidia-ml-py is not installed; hint: pip install 'memopt[measure]'"
    try:
        pynvml.nvmlInit()
        try:
            processes = pynvml.nvmlDeviceGetComputeRunningProcesses(_handle(pynvml, uuid))
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        return None, f"unknown: NVML says: {error}"
    own = [process.usedGpuMemory for process in processes if process.pid == os.getpid()]
    if not own:
        return None, "unknown: NVML does not list this process, as in a container with process numbers of its own"
    if own[0] is None:
        return None, "unknown: the driver counts no single processes on this system"
    return int(own[0]), _NVML


def _handle(pynvml: Any, uuid: str) -> Any:
    """The device, whole or a slice (MIG): CUDA gives the same 16 bytes for both, NVML wants to be told which."""
    try:
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except pynvml.NVMLError_NotFound:
        return pynvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")
