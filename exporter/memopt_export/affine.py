"""Affine quantization: real = (integer - zero_point) * scale. Arithmetic only, on numpy arrays."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from memopt.tensors import Array

# TensorRT refuses a scale of 0, which an all-zero channel or a silent tensor would give. The product of two of these,
# the scale of a bias, is still a normal float32.
SMALLEST_SCALE = np.float32(2.0**-60)
_LARGEST_BIAS = 2**30
LARGEST_FLOAT8 = np.float32(448)  # of E4M3, which has no infinity


@dataclass(frozen=True, eq=False)
class Affine:
    """One scale and zero point for a whole tensor, or one for each channel along `axis`.

    `scale` is float32 and above zero, `zero_point` has the integers' dtype; both are () or (channels,).
    """

    scale: Array
    zero_point: Array
    axis: int | None = None

    def quantize(self, values: Array) -> Array:
        """The nearest integers, ties to even, saturated at the dtype's ends, as ONNX's QuantizeLinear does.

        Where the zero point is a float of 8 bits, the nearest of these.
        """
        scale, zero_point = self._along(self.scale, values), self._along(self.zero_point, values)
        if self.zero_point.dtype.kind not in "iu":
            shares = np.asarray(values, np.float32) / scale
            return shares.clip(-LARGEST_FLOAT8, LARGEST_FLOAT8).astype(self.zero_point.dtype)
        integers = np.iinfo(self.zero_point.dtype)
        steps: Array = np.rint(np.asarray(values, np.float32) / scale) + zero_point
        return steps.clip(integers.min, integers.max).astype(self.zero_point.dtype)

    def dequantize(self, integers: Array) -> Array:
        """The float32 values that the integers stand for."""
        scale, zero_point = self._along(self.scale, integers), self._along(self.zero_point, integers)
        if self.zero_point.dtype.kind not in "iu":
            return np.asarray(integers.astype(np.float32) * scale)
        return (integers.astype(np.int32) - zero_point.astype(np.int32)).astype(np.float32) * scale

    def _along(self, parameter: Array, values: Array) -> Array:
        """The parameter shaped to meet `values`: its channels along the axis."""
        if self.axis is None:
            return parameter
        return parameter.reshape([-1 if axis == self.axis else 1 for axis in range(np.ndim(values))])


def asymmetric_uint8(minimum: float, maximum: float) -> Affine:
    """256 steps from `minimum` to `maximum`, widened so that zero is among them.

    The steps never reach past the range where it starts at zero: ONNX Runtime drops a Clip before a QuantizeLinear
    only then (its ClipQuantFusion compares scale * 255 with the upper limit).

    >>> affine = asymmetric_uint8(-1.0, 4.1)
    >>> float(affine.scale), int(affine.zero_point)
    (0.019999999552965164, 50)
    """
    low, high = min(minimum, 0.0), max(maximum, 0.0)
    span = high - low
    scale = max(np.float32(span / 255), SMALLEST_SCALE)
    if scale * np.float32(255) > np.float32(span):
        scale = max(np.nextafter(scale, np.float32(0)), SMALLEST_SCALE)
    zero_point = np.rint(-low / span * 255) if span else 0
    return Affine(np.asarray(scale), np.asarray(zero_point, np.uint8))


def symmetric_int8(minimum: float, maximum: float) -> Affine:
    """Steps of one size to both sides of zero, 127 up to the farther end; the zero point is 0.

    >>> float(symmetric_int8(-1.0, 2.54).scale)
    0.019999999552965164
    """
    scale = max(np.float32(max(abs(minimum), abs(maximum)) / 127), SMALLEST_SCALE)
    return Affine(np.asarray(scale), np.asarray(0, np.int8))


def symmetric_int8_channels(weight: Array, *, axis: int, largest: int = 127) -> Affine:
    """For each channel of `weight` along `axis`, `largest` steps to its own largest magnitude; an all-zero one gets the
    smallest steps.

    >>> symmetric_int8_channels(np.float32([[127.0, -3.0], [0.0, 0.0]]), axis=0).scale.tolist()
    [1.0, 8.673617379884035e-19]
    """
    others = tuple(other for other in range(weight.ndim) if other != axis)
    scale = np.maximum(np.abs(weight).max(axis=others).astype(np.float32) / np.float32(largest), SMALLEST_SCALE)
    return Affine(scale, np.zeros(scale.shape, np.int8), axis)


def float8(minimum: float, maximum: float) -> Affine:
    """Floats of 8 bits (E4M3), the largest of which stands for the farther end.

    >>> affine = float8(-1.0, 448.0)
    >>> float(affine.scale), affine.dequantize(affine.quantize(np.float32([1.0, 1.06, -500.0]))).tolist()
    (1.0, [1.0, 1.0, -448.0])
    """
    scale = max(np.float32(max(abs(minimum), abs(maximum)) / LARGEST_FLOAT8), SMALLEST_SCALE)
    return Affine(np.asarray(scale), np.zeros((), _float8_dtype()))


def float8_channels(weight: Array, *, axis: int, largest: int = 127) -> Affine:
    """The same for each channel of `weight` along `axis`; `largest` is for integers and means nothing."""
    integers = symmetric_int8_channels(weight, axis=axis, largest=127)
    scale = np.maximum(integers.scale * np.float32(127) / LARGEST_FLOAT8, SMALLEST_SCALE)
    return Affine(scale, np.zeros(scale.shape, _float8_dtype()), axis)


def _float8_dtype() -> np.dtype[Any]:
    import ml_dtypes

    dtype: np.dtype[Any] = np.dtype(ml_dtypes.float8_e4m3fn)
    return dtype


def bias_scale(input_affine: Affine, weight_affine: Affine) -> Array:
    """The scale of a bias in an integer kernel, (channels,): it is added to products of inputs and weights."""
    return np.asarray(input_affine.scale * weight_affine.scale, np.float32)


def quantize_bias(bias: Array, scale: Array) -> Array:
    """The bias in int32 steps of `scale`; its zero point is 0.

    >>> quantize_bias(np.float32([0.5, -0.25]), np.float32([0.125, 0.125])).tolist()
    [4, -2]
    """
    steps = np.rint(np.asarray(bias, np.float64) / scale)
    return np.clip(steps, -_LARGEST_BIAS, _LARGEST_BIAS).astype(np.int32)


def with_room_for_bias(weight_affine: Affine, bias: Array, input_affine: Affine) -> Affine:
    """The same affine with larger steps in channels whose bias would overflow int32, their weights being near zero."""
    needed = np.abs(bias).astype(np.float32) / (input_affine.scale * np.float32(_LARGEST_BIAS))
    return replace(weight_affine, scale=np.maximum(weight_affine.scale, needed.astype(np.float32)))
