"""Activation memory on a device that several engines use in turn: as much as the hungriest of them needs, not the sum.

TensorRT allows contexts to share memory as long as they never run at once (NVIDIA/TensorRT#3276), so an arena is also
the turn that its engines take.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from memopt.cuda_driver import DeviceBuffer, Driver, HostBuffer
from memopt.errors import OutOfResource
from memopt.sizes import show_size

Buffer = TypeVar("Buffer", DeviceBuffer, HostBuffer)


class DeviceArena:
    """One memory for the activations of all engines that are members; it grows to the largest and goes with the last.

    Args:
        driver: of the device.
        limit_bytes: what it may take at most; None sets none.
    """

    def __init__(self, driver: Driver, limit_bytes: int | None = None) -> None:
        self._memory = Grown(driver, driver.device_buffer)
        self._limit_bytes = limit_bytes
        self._lock = threading.RLock()
        self._members = 0

    @property
    def size_bytes(self) -> int:
        """Bytes held on the device."""
        return self._memory.size_bytes

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Keeps other engines of this arena from running meanwhile."""
        with self._lock:
            yield

    @contextmanager
    def member(self) -> Iterator[None]:
        """An engine that uses the arena: with the last one the memory is freed."""
        with self._lock:
            self._members += 1
        try:
            yield
        finally:
            with self._lock:
                self._members -= 1
                if self._members == 0:
                    self._memory.free()

    def at_least(self, size_bytes: int) -> DeviceBuffer:
        """The memory. A larger one is another buffer than before; to be asked for in one's turn.

        Raises:
            OutOfResource: beyond the limit, or the device has no more.
        """
        if self._limit_bytes is not None and size_bytes > self._limit_bytes:
            raise OutOfResource(
                f"{show_size(size_bytes)} of activations are needed, the pool's limit is {show_size(self._limit_bytes)}"
            )
        return self._memory.at_least(size_bytes)

    def free(self) -> None:
        """Gives the memory back; the next run of each engine takes it again."""
        self._memory.free()


class Grown(Generic[Buffer]):
    """One buffer, replaced by a larger one when more is asked for than it holds."""

    def __init__(self, driver: Driver, take: Callable[[int], Buffer]) -> None:
        self._driver = driver
        self._take: Callable[[int], Buffer] = take
        self._buffer: Buffer | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes held; 0 before the first use."""
        return self._buffer.size_bytes if self._buffer else 0

    def at_least(self, size_bytes: int) -> Buffer:
        """The buffer. A larger one is taken after the smaller is freed, so that both never count at once."""
        if self._buffer is None or self._buffer.size_bytes < size_bytes:
            self.free()
            self._buffer = self._take(size_bytes)
        return self._buffer

    def free(self) -> None:
        """Gives the buffer back."""
        buffer, self._buffer = self._buffer, None
        if buffer is not None:
            self._driver.free(buffer)
