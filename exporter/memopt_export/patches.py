"""A layer as a matrix product: its weights by groups, and rows of what it reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from memopt.tensors import Array
from memopt_export.graph import attribute

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class Geometry:
    """How a Conv, Gemm or MatMul multiplies.

    Its output at one position is weight (groups, outputs, inputs) times a row (groups, inputs). `channel_axis` is the
    weight's axis of output channels; the rest is the convolution's own, empty for a product.
    """

    groups: int
    channel_axis: int
    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()  # begins, then ends
    auto_pad: str = "NOTSET"

    @classmethod
    def of(cls, node: onnx.NodeProto, weight: Array, channel_axis: int) -> Geometry:
        """Read from the node's attributes, with ONNX's defaults."""
        if node.op_type != "Conv":
            return cls(1, channel_axis)
        spatial = weight.ndim - 2
        auto_pad = attribute(node, "auto_pad", b"NOTSET").decode()
        return cls(
            groups=attribute(node, "group", 1),
            channel_axis=channel_axis,
            kernel=weight.shape[2:],
            strides=tuple(attribute(node, "strides", [1] * spatial)),
            dilations=tuple(attribute(node, "dilations", [1] * spatial)),
            pads=tuple(attribute(node, "pads", [0] * 2 * spatial)),
            auto_pad=auto_pad,
        )

    def matrix(self, weight: Array) -> Array:
        """The weight as (groups, outputs, inputs); a view where that is possible."""
        first = np.moveaxis(weight, self.channel_axis, 0)
        return first.reshape(self.groups, len(first) // self.groups, -1)

    def unfold(self, matrix: Array, like: Array) -> Array:
        """The inverse of `matrix`, for a weight shaped as `like`."""
        first = np.moveaxis(like, self.channel_axis, 0)
        return np.moveaxis(matrix.reshape(first.shape), 0, self.channel_axis)

    def positions(self, read: Array) -> int:
        """How many rows a tensor that the layer reads gives."""
        if not self.kernel:
            return int(np.prod(read.shape[:-1], dtype=np.int64))
        return len(read) * int(np.prod(self._windows(read[:1]).shape[2 : 2 + len(self.kernel)], dtype=np.int64))

    def rows(self, read: Array, positions: Array) -> Array:
        """The rows at these positions, (groups, positions, inputs)."""
        if not self.kernel:
            return read.reshape(-1, read.shape[-1])[positions][None]
        windows = self._windows(read)
        spatial = windows.shape[2 : 2 + len(self.kernel)]
        sample, *place = np.unravel_index(positions, (len(read), *spatial))
        found = np.moveaxis(windows, 1, -1)[(sample, *place)]  # (positions, kernel..., channels)
        inputs = read.shape[1] // self.groups * int(np.prod(self.kernel))
        found = np.moveaxis(found, -1, 1).reshape(len(positions), self.groups, inputs)
        return np.ascontiguousarray(found.transpose(1, 0, 2))

    def _windows(self, read: Array) -> Array:
        """A view of (samples, channels, output places..., kernel...)."""
        spatial = len(self.kernel)
        begins, ends = self._pads(read.shape[2:])
        padded = _padded(read, begins, ends)
        extents = [d * (k - 1) + 1 for d, k in zip(self.dilations, self.kernel, strict=True)]
        windows = np.lib.stride_tricks.sliding_window_view(padded, extents, axis=tuple(range(2, 2 + spatial)))
        strided = tuple(slice(None, None, step) for step in self.strides)
        dilated = tuple(slice(None, None, step) for step in self.dilations)
        view: Array = windows[(slice(None), slice(None), *strided, *dilated)]
        return view

    def _pads(self, size: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        half = len(self.kernel)
        if self.auto_pad in ("NOTSET", "VALID"):
            pads = self.pads if self.auto_pad == "NOTSET" else (0,) * 2 * half
            return pads[:half], pads[half:]
        totals = [
            max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0)
            for n, s, d, k in zip(size, self.strides, self.dilations, self.kernel, strict=True)
        ]
        smaller, larger = tuple(t // 2 for t in totals), tuple(t - t // 2 for t in totals)
        return (smaller, larger) if self.auto_pad == "SAME_UPPER" else (larger, smaller)


def pads(node: onnx.NodeProto) -> bool:
    """Whether a convolution or a pooling reads zeros around its input, or may: SAME depends on the size."""
    return any(attribute(node, "pads", [])) or attribute(node, "auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID")


def _padded(read: Array, begins: tuple[int, ...], ends: tuple[int, ...]) -> Array:
    """Zeros around the places of (samples, channels, places...); np.pad does more, and takes its time for that."""
    if not any((*begins, *ends)):
        return read
    places = [b + n + e for b, n, e in zip(begins, read.shape[2:], ends, strict=True)]
    padded = np.zeros((*read.shape[:2], *places), read.dtype)
    inside = [slice(b, b + n) for b, n in zip((0, 0, *begins), read.shape, strict=True)]
    padded[tuple(inside)] = read
    return padded
