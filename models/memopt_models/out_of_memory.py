"""Memory that a training is denied: how libraries say so, what it is told as, and how freed memory goes back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from memopt.errors import OutOfResource, first_line
from memopt.memory import capped, return_blocks_from
from memopt.sizes import show_size

if TYPE_CHECKING:
    import torch

# What RuntimeErrors say of a refused allocation: torch's allocator, C++'s, oneDNN's.
_PHRASES = ("can't allocate memory", "bad_alloc", "could not create a memory object", "out of memory")
_AT_ONCE_BYTES, _LATER_BYTES = 2**20, 32 * 2**20  # the second is where glibc ends by itself


@contextmanager
def limited(device: torch.device, *, host_bytes: int | None, device_bytes: int | None) -> Iterator[None]:
    """Keeps this process within the limits: the kernel, and torch's allocator on a GPU, refuse what goes beyond them.

    Args:
        device: that is trained on; `device_bytes` counts on a GPU alone.
        host_bytes: of the process as a whole; None: no limit of ours.
        device_bytes: of what torch allocates; None: no limit of ours.

    Raises:
        OutOfResource: something needed more, than the limits or than there is.
    """
    with ExitStack() as stack:
        if host_bytes is not None:
            release_at_once()
            stack.callback(return_blocks_from, _LATER_BYTES)
            stack.enter_context(capped(host_bytes))
        if device_bytes is not None and device.type == "cuda":
            stack.enter_context(_device_capped(device, device_bytes))
        try:
            yield
        except Exception as error:
            if not means_out_of_memory(error):
                raise
            limits = " and ".join(
                f"{show_size(limit)} {where}"
                for limit, where in ((host_bytes, "of the host"), (device_bytes, "of the device"))
                if limit is not None
            )
            raise OutOfResource(
                f"the training ran out of memory{f' within {limits}' if limits else ''}: {first_line(error)}",
                hint="smaller parts of a batch, such as --accumulate 16, --checkpointing blocks, or a higher limit",
            ) from error


def means_out_of_memory(error: BaseException | None) -> bool:
    """Whether an exception says that memory was refused.

    >>> means_out_of_memory(RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"))
    True
    >>> means_out_of_memory(MemoryError()), means_out_of_memory(RuntimeError("shapes differ"))
    (True, False)
    """
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in _PHRASES)
    )


def release_at_once() -> None:
    """From now on tensors of 1 MiB and more go back to the system when they are freed.

    glibc raises its threshold to 32 MiB by itself and keeps what is smaller in a heap full of holes: measured on
    resnet18 (16 pictures of 224x224, Adam), the peak is 727 MiB with holes and 533 MiB without. It costs time, about a
    third there, because the kernel clears the pages each time. Elsewhere than with glibc nothing changes.
    """
    return_blocks_from(_AT_ONCE_BYTES)


@contextmanager
def _device_capped(device: torch.device, limit_bytes: int) -> Iterator[None]:
    import torch

    total_bytes = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(limit_bytes / total_bytes, 1.0), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
