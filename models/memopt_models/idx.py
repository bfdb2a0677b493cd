"""MNIST and Fashion-MNIST from their idx files (http://yann.lecun.com/exdb/mnist), mapped and not read."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from memopt.errors import InputRefused
from memopt.tensors import Array
from memopt_models.dataset import Split

PARTS = ("train", "t10k")
_IMAGES, _LABELS = "images-idx3-ubyte", "labels-idx1-ubyte"
_UINT8 = 0x08


def has_idx_files(folder: Path) -> bool:
    """Whether the four files lie in `folder`, uncompressed."""
    return all((folder / f"{part}-{what}").is_file() for part in PARTS for what in (_IMAGES, _LABELS))


def map_split(folder: Path, part: str) -> Split:
    """The pictures and labels of one part, "train" or "t10k".

    Raises:
        InputRefused: a file is missing or damaged.
    """
    images = map_idx(folder / f"{part}-{_IMAGES}", ndim=3)
    return Split(images[..., None], map_idx(folder / f"{part}-{_LABELS}", ndim=1).astype(np.int64))


def map_idx(path: Path, *, ndim: int) -> Array:
    """The uint8 array in an idx file: file-backed pages, which the kernel can drop at any time.

    Args:
        path: the file.
        ndim: 3 for pictures (n, height, width), 1 for labels (n,).

    Raises:
        InputRefused: cannot be read, another kind of file, or of another length than its header says.
    """
    start = 4 + 4 * ndim
    try:
        with path.open("rb") as file:
            header = file.read(start)
        size_bytes = path.stat().st_size
    except OSError as error:
        raise InputRefused(f"{path} cannot be read: {error.strerror}") from error
    if len(header) < start or header[:4] != bytes([0, 0, _UINT8, ndim]):
        raise InputRefused(f"{path} is not an idx file of uint8 with {ndim} dimensions")
    shape = struct.unpack(f">{ndim}I", header[4:])
    needed = start + int(np.prod(shape, dtype=object))  # object: hostile dimensions must not overflow
    if size_bytes != needed or 0 in shape:
        raise InputRefused(f"{path} has {size_bytes} bytes, its header {shape} needs {needed}")
    return np.memmap(path, np.uint8, mode="r", offset=start, shape=shape)
