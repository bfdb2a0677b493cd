"""From a picture to a model's input, by the steps the manifest lists: one numpy code for training and device.

The steps, in order:

    {"op": "decode", "color": "gray" | "rgb"}           channels of the uint8 picture
    {"op": "resize", "size": [height, width]}           bilinear with antialiasing, uint8 to uint8
    {"op": "scale", "factor": 0.00392…}                 float32(x) * factor
    {"op": "normalize", "mean": [...], "std": [...]}    per channel
    {"op": "layout", "to": "NCHW"}                      channels first
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from memopt.errors import IntegrityError
from memopt.image import read_image, to_color
from memopt.tensors import Array

Step = Mapping[str, Any]


def prepare(images: Array, steps: Sequence[Step]) -> Array:
    """Model input from pictures.

    Args:
        images: uint8, (n, height, width, channels), of any size.
        steps: the manifest's `preprocess`.

    Returns:
        float32 (n, channels, height, width) for the usual steps; C-contiguous.

    Raises:
        IntegrityError: a step that does not exist or lacks a field.
    """
    for step in steps:
        try:
            images = _OPS[step["op"]](images, step)
        except KeyError as error:
            raise IntegrityError(f"preprocessing step {dict(step)} is not understood", hint=", ".join(_OPS)) from error
    return np.ascontiguousarray(images)


def prepare_file(path: Path, steps: Sequence[Step]) -> Array:
    """Model input of batch 1 from a picture file; see `memopt.image.read_image` for the formats."""
    return prepare(read_image(path)[None], steps)


def resize(images: Array, size: tuple[int, int]) -> Array:
    """Pictures brought to `size`, (height, width): bilinear, and when shrinking the triangle widens with the ratio.

    The filter is the one Pillow and torchvision use with antialias=True (a separable triangle, half-pixel centres,
    edges renormalised); computed in float32 over the rows, then the columns, and rounded once at the end.

    Args:
        images: uint8 (n, height, width, channels).
        size: height and width of the result.
    """
    if images.shape[1:3] == size:
        return images
    rows, columns = _weights(images.shape[1], size[0]), _weights(images.shape[2], size[1])
    resized: Array = np.einsum("yh,nhwc->nywc", rows, images.astype(np.float32), optimize=True)
    resized = np.einsum("xw,nywc->nyxc", columns, resized, optimize=True)
    return np.rint(resized).clip(0, 255).astype(np.uint8)


@lru_cache(maxsize=64)
def _weights(have: int, want: int) -> Array:
    """The (want, have) matrix that resamples one axis; each row sums to one."""
    ratio = have / want
    support = max(ratio, 1.0)
    centres = (np.arange(want) + 0.5) * ratio - 0.5
    distance = np.abs(np.arange(have)[None, :] - centres[:, None]) / support
    weights = np.clip(1.0 - distance, 0.0, None)
    rows: Array = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    return rows


def _decode(images: Array, step: Step) -> Array:
    return to_color(images, step["color"])


def _resize(images: Array, step: Step) -> Array:
    height, width = step["size"]
    return resize(images, (height, width))


def _scale(images: Array, step: Step) -> Array:
    return images.astype(np.float32) * np.float32(step["factor"])


def _normalize(images: Array, step: Step) -> Array:
    mean, std = (np.asarray(step[key], np.float32) for key in ("mean", "std"))
    return (images.astype(np.float32) - mean) / std


def _layout(images: Array, step: Step) -> Array:
    if step["to"] != "NCHW":
        raise KeyError(step["to"])
    return images.transpose(0, 3, 1, 2)


_OPS: dict[str, Callable[[Array, Step], Array]] = {
    "decode": _decode,
    "resize": _resize,
    "scale": _scale,
    "normalize": _normalize,
    "layout": _layout,
}
