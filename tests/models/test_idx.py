from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from memopt.errors import InputRefused
from memopt_models.idx import has_idx_files, map_idx, map_split


def idx(*shape: int, kind: int = 8, values: int | None = None) -> bytes:
    count = int(np.prod(shape)) if values is None else values
    return struct.pack(f">BBBB{len(shape)}I", 0, 0, kind, len(shape), *shape) + bytes(range(count % 256)) * 1


def test_file_is_mapped_and_not_read(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(idx(2, 3, 4))
    array = map_idx(tmp_path / "x", ndim=3)
    assert isinstance(array, np.memmap)
    assert not array.flags.owndata
    assert not array.flags.writeable
    assert array.tolist() == np.arange(24).reshape(2, 3, 4).tolist()


def test_split_keeps_its_pictures_mapped(small_mnist: Path) -> None:
    split = map_split(small_mnist / "MNIST" / "raw", "train")
    assert isinstance(split.pick(slice(3, 9)).images, np.memmap)
    assert split.images.shape == (120, 28, 28, 1)
    assert split.labels.dtype == np.int64


def test_all_four_files_are_needed(small_mnist: Path) -> None:
    raw = small_mnist / "MNIST" / "raw"
    assert has_idx_files(raw)
    (raw / "t10k-labels-idx1-ubyte").unlink()
    assert not has_idx_files(raw)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not an idx file of uint8 with 3 dimensions"),
        (b"\x1f\x8b\x08\x00 gzip of something, as long as a header", "is not an idx file"),
        (idx(24), "is not an idx file of uint8 with 3 dimensions"),
        (idx(2, 3, 4, kind=13), "is not an idx file"),
        (idx(2, 3, 4)[:-1], "has 39 bytes, its header (2, 3, 4) needs 40"),
        (idx(2, 3, 4) + b"!", "has 41 bytes, its header (2, 3, 4) needs 40"),
        (idx(0, 3, 4), "has 16 bytes, its header (0, 3, 4) needs 16"),
        (idx(*[2**32 - 1] * 3, values=0), f"needs {16 + (2**32 - 1) ** 3}"),
    ],
)
def test_damaged_file_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(InputRefused) as raised:
        map_idx(tmp_path / "x", ndim=3)
    assert message in str(raised.value)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="x cannot be read: No such file or directory"):
        map_idx(tmp_path / "x", ndim=1)
