from __future__ import annotations

import itertools
import struct
import time
import tracemalloc
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from memopt.errors import InputRefused
from memopt.image import MAX_FILE_BYTES, MAX_SIDE, read_image, to_color
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


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    width: int, height: int, *, depth: int = 8, body: bytes = b"\0", color: int = 0, palette: bytes = b"", cut: int = 0
) -> bytes:
    """A PNG from its parts; `cut` is the most bytes of one IDAT chunk, 0 for a single chunk."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    packed = zlib.compress(body)
    bodies = (packed[i : i + (cut or len(packed))] for i in range(0, len(packed), cut or len(packed)))
    chunks = [chunk(b"IHDR", header), palette, *(chunk(b"IDAT", part) for part in bodies), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def npy(header: str, *, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header.encode() + data


@contextmanager
def little_memory(limit_bytes: int) -> Iterator[None]:
    """Fails when the block allocates more at once."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit_bytes
    finally:
        tracemalloc.stop()


HOSTILE = {
    "empty": b"",
    "text": b"not a picture",
    "bomb": png(100_000, 100_000),
    "no-width": png(0, 5),
    "thin": png(1, MAX_SIDE + 1),
    "short": png(4, 4),
    "filter": png(1, 1, body=b"\x09\x00"),
    "cut": png(1, 1, body=b"\0\0")[:-20],
    "crc": png(1, 1, body=b"\0\0").replace(b"IDAT", b"IDAX"),
    "no-palette": png(1, 1, color=3, body=b"\0\0"),
    "palette-cut": png(1, 1, color=3, body=b"\0\0", palette=chunk(b"PLTE", b"\1\2\3\4")),
    "palette-empty": png(1, 1, color=3, body=b"\0\0", palette=chunk(b"PLTE", b"")),
    "palette-index": png(1, 1, color=3, body=b"\0\1", palette=chunk(b"PLTE", b"\1\2\3")),
    "crumbs": png(300, 300, body=np.random.default_rng(0).bytes(300 * 301), cut=1),
    "pgm-bomb": b"P5 99999 99999 255\n",
    "pgm-short": b"P5 2 2 255\n\0",
    "pgm-no-levels": b"P5 1 1 0\n\0",
    "pgm-16-bit": b"P5 1 1 65535\n\0\0",
    "pgm-no-header": b"P5" + b" " * 100,
    "pgm-comments": b"P5" + b"#\n" * 2**20,
    "pgm-digits": b"P5 " + b"9" * 2**20,
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_a_damaged_or_monstrous_picture_is_refused_in_one_line(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(data)
    with little_memory(16 * 2**20), pytest.raises(InputRefused) as caught:
        read_image(path)
    assert "\n" not in str(caught.value)


HOSTILE_ARRAYS = {
    "terabytes": npy("{'descr': '|u1', 'fortran_order': False, 'shape': (1000000, 1000000), }"),
    "more-than-there-is": npy("{'descr': '|u1', 'fortran_order': False, 'shape': (100, 100), }", data=bytes(9999)),
    "no-pixels": npy("{'descr': '|u1', 'fortran_order': False, 'shape': (0, 5), }"),
    "negative": npy("{'descr': '|u1', 'fortran_order': False, 'shape': (-1, -1), }", data=b"\0"),
    "many-channels": npy("{'descr': '|u1', 'fortran_order': False, 'shape': (1, 1, 4), }", data=bytes(4)),
    "floats": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1, 1), }", data=bytes(4)),
    "record": npy("{'descr': [('a', '|u1')], 'fortran_order': False, 'shape': (1, 1), }", data=b"\0"),
    "digits": npy("{'descr': '|u1', 'fortran_order': False, 'shape': (" + "9" * 60_000 + ",), }"),
    "nested": npy("-" * 60_000 + "1"),
    "brackets": npy("(" * 60_000),
    "python-2": npy("{'descr': '|u1', 'fortran_order': False, 'shape': (1L, 1L), }", data=b"\0"),
    "text": b"not an array",
    "cut": b"\x93NUMPY\x01\0\xff",
}


@pytest.mark.parametrize("data", HOSTILE_ARRAYS.values(), ids=HOSTILE_ARRAYS)
def test_a_damaged_or_monstrous_array_is_refused_in_one_line(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.npy"
    path.write_bytes(data)
    with little_memory(2**20), pytest.raises(InputRefused) as caught:
        read_image(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_an_array_is_read_as_numpy_wrote_it(tmp_path: Path, order: str, version: tuple[int, int]) -> None:
    array = np.asarray(smooth(5, 4, 3), order=order)
    with (tmp_path / "x.npy").open("wb") as file:
        np.lib.format.write_array(file, array, version=version)
    assert np.array_equal(read_image(tmp_path / "x.npy"), array)


def test_a_huge_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "x.png").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with little_memory(2**20), pytest.raises(InputRefused, match=r"at most 256 MiB are read$"):
        read_image(tmp_path / "x.png")


@pytest.mark.parametrize("name", ["missing.png", ".", "a\0b"])
def test_what_cannot_be_read_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputRefused, match="cannot be read"):
        read_image(tmp_path / name)


def test_a_device_that_never_ends_is_refused() -> None:
    with pytest.raises(InputRefused, match="is no file"):
        read_image(Path("/dev/zero"))


def test_a_png_in_many_pieces_is_read_in_linear_time(tmp_path: Path) -> None:
    """40000 chunks of 100 bytes, which take 80 GB of copies when each is appended to all before."""
    pixels = np.random.default_rng(0).integers(0, 256, (2000, 2000)).astype(np.uint8)
    body = np.pad(pixels, ((0, 0), (1, 0))).tobytes()
    (tmp_path / "x.png").write_bytes(png(2000, 2000, body=body, cut=100))
    started = time.perf_counter()
    assert np.array_equal(read_image(tmp_path / "x.png")[..., 0], pixels)
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize(("kind", "top"), list(itertools.product(("P5", "P6"), (1, 15, 100, 254))))
def test_levels_below_255_are_spread_as_pillow_spreads_them(tmp_path: Path, kind: str, top: int) -> None:
    samples = bytes(range(top + 1)) * 3 + bytes([255] * 3)  # the last are above the top
    (tmp_path / "x.ppm").write_bytes(
        b"%s\n%d 1\n%d\n" % (kind.encode(), len(samples) // (3 if kind == "P6" else 1), top) + samples
    )
    expected = np.asarray(PIL.open(tmp_path / "x.ppm"))
    got = read_image(tmp_path / "x.ppm")
    assert np.array_equal(got, expected.reshape(got.shape))
    assert got.min() == 0
    assert got.max() == 255


def test_formats_that_run_other_programs_are_not_opened(tmp_path: Path) -> None:
    """Pillow hands EPS to Ghostscript; only plain picture formats are asked for."""
    PIL.fromarray(smooth(4, 4, 3)).save(tmp_path / "x.eps")
    with pytest.raises(InputRefused, match="is not a picture"):
        read_image(tmp_path / "x.eps")


@pytest.mark.parametrize("ending", ["jpg", "webp", "bmp", "gif", "tiff"])
def test_a_damaged_file_of_any_format_is_refused(tmp_path: Path, ending: str) -> None:
    """Every prefix of a file, and the file with any of its first bytes changed, is a picture or is refused."""
    PIL.fromarray(smooth(5, 4, 3)).save(tmp_path / f"x.{ending}")
    whole = (tmp_path / f"x.{ending}").read_bytes()
    damaged = [whole[:size] for size in range(0, len(whole), 7)]
    damaged += [whole[:i] + bytes([whole[i] ^ 0xFF]) + whole[i + 1 :] for i in range(0, min(len(whole), 200), 3)]
    for data in damaged:
        (tmp_path / f"y.{ending}").write_bytes(data)
        try:
            assert read_image(tmp_path / f"y.{ending}").dtype == np.uint8
        except InputRefused as error:
            assert "\n" not in str(error)


def test_a_pickle_in_an_npy_is_not_loaded(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputRefused, match="not a picture"):
        read_image(tmp_path / "x.npy")


def test_gray_is_pillows_luma() -> None:
    picture = smooth(16, 16, 3)
    assert np.array_equal(to_color(picture, "gray")[..., 0], np.asarray(PIL.fromarray(picture).convert("L")))
