from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from memopt.errors import InputRefused, IntegrityError
from memopt.image import read_image, to_color
from memopt.preprocess import prepare, prepare_file, resize
from memopt.tensors import Array

PIL = pytest.importorskip("PIL.Image", reason="Pillow, the reference for pictures, is not installed")


def smooth(height: int, width: int, channels: int) -> Array:
    """A picture whose neighbours are alike, so that every PNG line filter is used."""
    steps = np.random.default_rng(0).integers(-9, 10, (height, width, channels))
    return np.cumsum(steps, axis=0).astype(np.uint8)


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("LA", 2), ("RGB", 3), ("RGBA", 4), ("P", 1)])
def test_png_is_read_as_pillow_reads_it(tmp_path: Path, mode: str, channels: int) -> None:
    array = smooth(37, 23, channels)
    image = PIL.fromarray(array if channels > 1 else array[..., 0])
    image = image.convert("P") if mode == "P" else image
    image.save(tmp_path / "x.png")
    expected = np.asarray(image.convert("L" if mode in ("L", "LA") else "RGB"))
    assert np.array_equal(read_image(tmp_path / "x.png"), expected.reshape(37, 23, -1))


@pytest.mark.parametrize("ending", ["pgm", "ppm", "npy", "bmp"])
def test_other_formats_are_read(tmp_path: Path, ending: str) -> None:
    array = smooth(9, 7, 3 if ending in ("ppm", "bmp") else 1)
    path = tmp_path / f"x.{ending}"
    np.save(path, array) if ending == "npy" else PIL.fromarray(array.squeeze()).save(path)
    assert np.array_equal(read_image(path), array)


def test_a_comment_in_a_pgm_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "x.pgm").write_bytes(b"P5\n# made by hand\n2 1\n255\n\x01\x02")
    assert read_image(tmp_path / "x.pgm").tolist() == [[[1], [2]]]


def png(width: int, height: int, *, depth: int = 8, body: bytes = b"\0") -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a picture",
        png(100_000, 100_000),
        png(0, 5),
        png(4, 4),
        png(1, 1, body=b"\x09\x00"),
        png(1, 1, body=b"\0\0")[:-20],
        png(1, 1, body=b"\0\0").replace(b"IDAT", b"IDAX"),
        b"P5 99999 99999 255\n",
        b"P5 2 2 255\n\0",
    ],
    ids=["empty", "text", "bomb", "no-width", "short", "filter", "cut", "crc", "pgm-bomb", "pgm-short"],
)
def test_a_damaged_or_monstrous_picture_is_refused_in_one_line(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(data)
    with pytest.raises(InputRefused) as caught:
        read_image(path)
    assert "\n" not in str(caught.value)


def test_a_pickle_in_an_npy_is_not_loaded(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputRefused, match="not a picture"):
        read_image(tmp_path / "x.npy")


@pytest.mark.parametrize(("have", "want"), [((8, 8), (28, 28)), ((100, 60), (28, 28)), ((33, 57), (57, 33))])
def test_resize_is_pillows_to_one_level(have: tuple[int, int], want: tuple[int, int]) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (*have, 3)).astype(np.uint8)
    expected = np.asarray(PIL.fromarray(picture).resize(want[::-1], PIL.Resampling.BILINEAR)).astype(int)
    assert np.abs(resize(picture[None], want)[0] - expected).max() <= 1


def test_resize_keeps_a_flat_picture_flat() -> None:
    assert (resize(np.full((1, 5, 7, 1), 93, np.uint8), (31, 3)) == 93).all()


def test_gray_is_pillows_luma() -> None:
    picture = smooth(16, 16, 3)
    assert np.array_equal(to_color(picture, "gray")[..., 0], np.asarray(PIL.fromarray(picture).convert("L")))


def test_steps_are_applied_in_order(tmp_path: Path) -> None:
    steps = (
        {"op": "decode", "color": "gray"},
        {"op": "scale", "factor": 0.5},
        {"op": "normalize", "mean": [1.0], "std": [2.0]},
        {"op": "layout", "to": "NCHW"},
    )
    np.save(tmp_path / "x.npy", np.array([[4, 8]], np.uint8))
    assert prepare_file(tmp_path / "x.npy", steps).tolist() == [[[[0.5, 1.5]]]]


def test_one_picture_and_a_batch_are_prepared_alike() -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (5, 9, 9, 3)).astype(np.uint8)
    steps = ({"op": "decode", "color": "gray"}, {"op": "resize", "size": [6, 6]}, {"op": "scale", "factor": 1 / 255})
    together = prepare(pictures, steps)
    assert np.array_equal(together, np.concatenate([prepare(p[None], steps) for p in pictures]))


@pytest.mark.parametrize("step", [{"op": "rotate"}, {"op": "resize"}, {}, {"op": "layout", "to": "NHWC"}])
def test_an_unknown_step_is_refused(step: dict[str, object]) -> None:
    with pytest.raises(IntegrityError, match="is not understood"):
        prepare(np.zeros((1, 2, 2, 1), np.uint8), (step,))
