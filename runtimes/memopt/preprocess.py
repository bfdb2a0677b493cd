"""From a picture to a model's input, by the steps the manifest lists: one numpy code for training and device.

The steps, in this order, each at most once:

    {"op": "decode", "color": "gray" | "rgb"}           channels of the uint8 picture
    {"op": "resize", "size": [height, width]}           bilinear with antialiasing, uint8 to uint8
    {"op": "resize", "shorter": pixels}                 the same, keeping the ratio of the sides
    {"op": "crop", "size": [height, width]}             the middle of the picture
    {"op": "scale", "factor": 0.00392…}                 float32(x) * factor
    {"op": "normalize", "mean": [...], "std": [...]}    per channel
    {"op": "layout", "to": "NCHW"}                      channels first
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from memopt.errors import InputRefused, IntegrityError
from memopt.image import MAX_PIXELS, MAX_SIDE, check_size, read_image, to_color
from memopt.tensors import Array

Step = Mapping[str, Any]
_Function = Callable[[Array], Array]

_CHANNELS = {"gray": 1, "rgb": 3}
_UINT8_OPS = ("decode", "resize", "crop")  # uint8 in, uint8 out
_LARGEST, _SMALLEST = 1e9, 1e-9  # of a number in a step: products of all steps stay finite in float32
_STRIP_BYTES = 16 * 2**20  # of float32 that `resize` holds at once


def check_steps(steps: Sequence[Step]) -> None:
    """Raises IntegrityError for steps that no picture could pass: unknown, incomplete, impossible or out of order."""
    _functions(steps)


def prepare(images: Array, steps: Sequence[Step]) -> Array:
    """Model input from pictures.

    Args:
        images: uint8, (n, height, width, channels), of any size.
        steps: the manifest's `preprocess`.

    Returns:
        float32 (n, channels, height, width) for the usual steps; C-contiguous.

    Raises:
        IntegrityError: as `check_steps`, or a mean for another number of channels than the pictures have.
        InputRefused: the pictures have neither one channel nor three, or are too large.
    """
    for function in _functions(steps):
        images = function(images)
    return np.ascontiguousarray(images)


def split_steps(steps: Sequence[Step]) -> tuple[tuple[Step, ...], tuple[Step, ...]]:
    """The steps that leave a picture uint8, and those that make a model's numbers of it.

    >>> split_steps([{"op": "decode", "color": "gray"}, {"op": "scale", "factor": 0.5}, {"op": "layout", "to": "NCHW"}])
    (({'op': 'decode', 'color': 'gray'},), ({'op': 'scale', 'factor': 0.5}, {'op': 'layout', 'to': 'NCHW'}))

    Raises:
        IntegrityError: as `check_steps`.
    """
    check_steps(steps)
    count = sum(step["op"] in _UINT8_OPS for step in steps)
    return tuple(steps[:count]), tuple(steps[count:])


def without_numbers(steps: Sequence[Step]) -> tuple[dict[str, Any], ...]:
    """The steps for a model that takes uint8: without scale and normalize.

    >>> without_numbers([{"op": "scale", "factor": 0.5}, {"op": "layout", "to": "NCHW"}])
    ({'op': 'layout', 'to': 'NCHW'},)
    """
    return tuple(dict(step) for step in steps if step["op"] not in ("scale", "normalize"))


def prepare_file(path: Path, steps: Sequence[Step]) -> Array:
    """Model input of batch 1 from a picture file; see `memopt.image.read_image` for the formats."""
    return prepare(read_image(path)[None], steps)


def resize(images: Array, size: tuple[int, int]) -> Array:
    """Pictures brought to `size`, (height, width): bilinear, and when shrinking the triangle widens with the ratio.

    The filter is the one Pillow and torchvision use with antialias=True (a separable triangle, half-pixel centres,
    edges renormalised); computed in float32 and rounded once at the end. A strip of rows is computed at a time, so that
    memory beyond input and output stays small.

    Args:
        images: uint8 (n, height, width, channels).
        size: height and width of the result.

    Raises:
        InputRefused: the pictures or the result are too large.
    """
    count, height, width, channels = images.shape
    if (height, width) == size:
        return images
    check_size(width, height)
    check_size(size[1], size[0])
    if height * size[1] < size[0] * width:  # the axis first that leaves less to do for the other
        return np.ascontiguousarray(resize(images.swapaxes(1, 2), size[::-1]).swapaxes(1, 2))
    resized = np.empty((count, *size, channels), np.uint8)
    rows, columns = _taps(height, size[0]), _taps(width, size[1])
    strip = max(1, _STRIP_BYTES // max(1, 4 * count * max(width, size[1]) * channels))
    for start in range(0, size[0], strip):
        part = _resample(images, rows[0][start : start + strip], rows[1][start : start + strip], axis=1)
        part = _resample(part, *columns, axis=2)
        resized[:, start : start + strip] = np.rint(part, out=part).clip(0, 255)
    return resized


def _resample(images: Array, indices: Array, weights: Array, *, axis: int) -> Array:
    """One axis resampled in float32: the sum over the taps."""
    shape = [len(indices) if i == axis else size for i, size in enumerate(images.shape)]
    along = [-1 if i == axis else 1 for i in range(images.ndim)]
    resampled = np.zeros(shape, np.float32)
    for index, weight in zip(indices.T, weights.T, strict=True):
        resampled += images[(slice(None),) * axis + (index,)] * weight.reshape(along)  # `take` copies what is swapped
    return resampled


@lru_cache(maxsize=4)
def _taps(have: int, want: int) -> tuple[Array, Array]:
    """Which of the `have` samples make each of `want`, and with what weight: two (want, taps); weights sum to one."""
    ratio = have / want
    support = max(ratio, 1.0)
    centres = ((np.arange(want) + 0.5) * ratio - 0.5)[:, None]
    indices = np.ceil(centres - support).astype(np.int64) + np.arange(int(2 * support) + 1)
    weights = np.clip(1.0 - np.abs(indices - centres) / support, 0.0, None)
    weights[(indices < 0) | (indices >= have)] = 0.0
    weights /= weights.sum(axis=1, keepdims=True)
    return indices.clip(0, have - 1), weights.astype(np.float32)


def _functions(steps: Sequence[Step]) -> list[_Function]:
    """What the steps do, in order, each checked."""
    functions: list[_Function] = []
    known = list(_OPS)
    last = -1
    for step in steps:
        op = step.get("op")
        if not isinstance(op, str) or op not in _OPS:
            raise IntegrityError(f"preprocessing step {_show(step)} is not understood", hint=", ".join(known))
        make, form = _OPS[op]
        if known.index(op) <= last:
            raise IntegrityError(f"preprocessing step {_show(step)} comes too late", hint=", ".join(known))
        try:
            functions.append(make(step))
        except ValueError as error:
            raise IntegrityError(f"preprocessing step {_show(step)} is not understood: {error}", hint=form) from error
        last = known.index(op)
    _check_channels(steps)
    return functions


def _check_channels(steps: Sequence[Step]) -> None:
    fields = {key: value for step in steps for key, value in step.items() if key in ("color", "mean")}
    if len(fields) == 2 and _CHANNELS[fields["color"]] != len(fields["mean"]):
        raise IntegrityError(f"a {fields['color']} picture cannot be normalized by {len(fields['mean'])} means")


def _decode(step: Step) -> _Function:
    color = step.get("color")
    if not isinstance(color, str) or color not in _CHANNELS:
        raise ValueError("no such color")
    return lambda images: to_color(images, color)


def _resize(step: Step) -> _Function:
    if ("size" in step) == ("shorter" in step):
        raise ValueError("it has neither or both of size and shorter")
    if "size" in step:
        size = _size(step["size"])
        return lambda images: resize(images, size)
    shorter, _ = _size([step["shorter"], 1])
    return lambda images: resize(images, _sides(images.shape[1], images.shape[2], shorter))


def _sides(height: int, width: int, shorter: int) -> tuple[int, int]:
    """Height and width with the shorter side so long; the longer one is rounded down, as by torchvision.

    >>> _sides(480, 640, 256), _sides(500, 300, 30)
    ((256, 341), (50, 30))
    """
    least = min(height, width)
    return (height * shorter // least, width * shorter // least)


def _crop(step: Step) -> _Function:
    height, width = _size(step.get("size"))

    def crop(images: Array) -> Array:
        top, left = (_margin(have, want) for have, want in zip(images.shape[1:3], (height, width), strict=True))
        return images[:, top : top + height, left : left + width]

    return crop


def _margin(have: int, want: int) -> int:
    """Pixels before the middle: half of what is left, to the even number where that lies between two."""
    if want > have:
        raise InputRefused(f"a picture of {have} pixels has no middle of {want}", hint="resize before crop")
    return round((have - want) / 2)


def _size(value: Any) -> tuple[int, int]:
    if not isinstance(value, (list, tuple)) or len(value) != 2 or any(type(side) is not int for side in value):
        raise ValueError("size is not two whole numbers")
    height, width = value
    if not (0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE and height * width <= MAX_PIXELS):
        raise ValueError(f"a side has 1 to {MAX_SIDE} pixels, all together are at most {MAX_PIXELS}")
    return height, width


def _scale(step: Step) -> _Function:
    factor = _number(step.get("factor"), "factor")
    return lambda images: images.astype(np.float32) * factor


def _normalize(step: Step) -> _Function:
    mean, std = (_numbers(step.get(key), key) for key in ("mean", "std"))
    if len(mean) != len(std):
        raise ValueError(f"{len(mean)} means and {len(std)} deviations")
    if std.min() < _SMALLEST:
        raise ValueError("a standard deviation is not above zero")

    def normalize(images: Array) -> Array:
        if images.shape[-1] != len(mean):
            raise IntegrityError(f"pictures with {images.shape[-1]} channels cannot be normalized by {len(mean)} means")
        return (images.astype(np.float32) - mean) / std

    return normalize


def _layout(step: Step) -> _Function:
    if step.get("to") != "NCHW":
        raise ValueError("no such layout")
    return lambda images: images.transpose(0, 3, 1, 2)


def _numbers(values: Any, name: str) -> Array:
    if not isinstance(values, (list, tuple)) or len(values) not in _CHANNELS.values():
        raise ValueError(f"{name} is not a list of one number or three")
    return np.array([_number(value, name) for value in values], np.float32)


def _number(value: Any, name: str) -> np.float32:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= _LARGEST:
        raise ValueError(f"{name} is not a number within ±{_LARGEST:g}")
    return np.float32(value)


def _show(step: Step) -> str:
    """The step in one short line, whatever is in it."""
    return reprlib.repr(dict(step))


# In the order in which they may stand: what makes each, and what it looks like.
_OPS: dict[str, tuple[Callable[[Step], _Function], str]] = {
    "decode": (_decode, '{"op": "decode", "color": "gray" or "rgb"}'),
    "resize": (_resize, '{"op": "resize", "size": [height, width]} or "shorter": pixels'),
    "crop": (_crop, '{"op": "crop", "size": [height, width]}'),
    "scale": (_scale, '{"op": "scale", "factor": 0.00392}'),
    "normalize": (_normalize, '{"op": "normalize", "mean": [0.5], "std": [0.25]}'),
    "layout": (_layout, '{"op": "layout", "to": "NCHW"}'),
}
