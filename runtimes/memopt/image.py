"""Pictures from files: PNG, PGM/PPM and .npy without any library, everything else through Pillow."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np

from memopt.errors import BackendError, InputRefused
from memopt.tensors import Array

MAX_PIXELS = 64 * 2**20  # a picture may not unpack to more; guards against decompression bombs
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type: gray, RGB, palette, gray + alpha, RGB + alpha


def read_image(path: Path) -> Array:
    """The picture as uint8 (height, width, channels), channels 1 or 3; transparency is dropped.

    Raises:
        InputRefused: missing, damaged, too large, or not a picture.
        BackendError: the format needs Pillow, which is not installed.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputRefused(f"{path} cannot be read: {error.strerror}") from error
    try:
        return _decode(path, data)
    except (ValueError, IndexError, EOFError, struct.error, zlib.error) as error:
        raise InputRefused(f"{path} is not a picture that can be read: {error}") from error


def to_color(images: Array, color: str) -> Array:
    """Pictures with one channel ("gray", ITU-R 601 luma as in Pillow) or three ("rgb").

    >>> to_color(np.full((1, 2, 2, 3), 100, np.uint8), "gray").shape
    (1, 2, 2, 1)
    """
    channels = images.shape[-1]
    if color == "gray" and channels == 3:
        luma = images.astype(np.uint32) @ np.array([19595, 38470, 7471], np.uint32)
        return ((luma + 0x8000) >> 16).astype(np.uint8)[..., None]
    if color == "rgb" and channels == 1:
        return np.repeat(images, 3, axis=-1)
    if (color, channels) not in (("gray", 1), ("rgb", 3)):
        raise InputRefused(f"{color!r} cannot be made from {channels} channels")
    return images


def _decode(path: Path, data: bytes) -> Array:
    if path.suffix == ".npy":
        return _checked(np.load(path, allow_pickle=False))
    if data[:2] in (b"P5", b"P6"):
        return _read_netpbm(data)
    if data.startswith(_PNG_MAGIC):
        image = _read_png(data)
        if image is not None:
            return image
    return _read_with_pillow(path)


def _checked(array: Array) -> Array:
    if array.ndim == 2:
        array = array[..., None]
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in (1, 3):
        raise InputRefused(
            f"the array is {array.dtype} {array.shape}", hint="uint8 (height, width) or (height, width, 3)"
        )
    return array


def _read_netpbm(data: bytes) -> Array:
    """Binary PGM (P5) or PPM (P6) with 8 bits."""
    fields: list[int] = []
    position = 2
    while len(fields) < 3:
        end = data.index(b"\n", position) if data[position : position + 1] == b"#" else position
        if end > position:
            position = end + 1
            continue
        if data[position : position + 1].isspace():
            position += 1
            continue
        stop = position
        while data[stop : stop + 1].isdigit():
            stop += 1
        fields.append(int(data[position:stop]))
        position = stop
    width, height, top = fields
    if top > 255:
        raise InputRefused("16-bit PGM/PPM is not supported", hint="save it with 8 bits")
    channels = 1 if data[:2] == b"P5" else 3
    _check_size(width, height)
    return np.frombuffer(data, np.uint8, width * height * channels, position + 1).reshape(height, width, channels)


def _read_png(data: bytes) -> Array | None:
    """A PNG (RFC 2083) with 8 bits a sample and no interlacing; None for the rarer kinds, which Pillow reads."""
    chunks = _png_chunks(data)
    width, height, depth, color, _, _, interlace = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    if depth != 8 or interlace or color not in _PNG_CHANNELS:
        return None
    _check_size(width, height)
    channels = _PNG_CHANNELS[color]
    length = height * (1 + width * channels)
    raw = zlib.decompressobj().decompress(chunks[b"IDAT"], length)
    if len(raw) != length:
        raise ValueError(f"PNG data has {len(raw)} bytes, {length} expected")
    pixels = _unfilter(np.frombuffer(raw, np.uint8).reshape(height, -1), channels).reshape(height, width, channels)
    if color == 3:
        palette: Array = np.frombuffer(chunks[b"PLTE"], np.uint8).reshape(-1, 3)
        return palette[pixels[..., 0]]
    return pixels[..., : 1 if color in (0, 4) else 3]


def _png_chunks(data: bytes) -> dict[bytes, bytes]:
    chunks: dict[bytes, bytes] = {b"IDAT": b""}
    position = len(_PNG_MAGIC)
    while position < len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        body = data[position + 8 : position + 8 + length]
        (crc,) = struct.unpack_from(">I", data, position + 8 + length)
        if crc != zlib.crc32(kind + body):
            raise ValueError(f"PNG chunk {kind!r} is damaged")
        chunks[kind] = chunks[kind] + body if kind == b"IDAT" else body
        position += 12 + length
    if b"IHDR" not in chunks:
        raise ValueError("PNG has no header")
    return chunks


def _unfilter(lines: Array, channels: int) -> Array:
    """Undoes the five PNG line filters; `lines` is (height, 1 + width * channels), the filter type first."""
    pixels = np.zeros((lines.shape[0] + 1, lines.shape[1] - 1 + channels), np.uint8)  # a zero line above, zeros left
    for row, line in enumerate(lines, start=1):
        kind, values = int(line[0]), line[1:]
        out, above = pixels[row], pixels[row - 1]
        if kind == 0:
            out[channels:] = values
        elif kind == 2:
            out[channels:] = values + above[channels:]
        elif kind == 1:
            out[channels:] = np.cumsum(values.reshape(-1, channels), axis=0, dtype=np.uint8).ravel()
        elif kind in (3, 4):
            _unfilter_by_neighbours(kind, values, out, above, channels)
        else:
            raise ValueError(f"PNG line filter {kind} does not exist")
    return pixels[1:, channels:]


def _unfilter_by_neighbours(kind: int, values: Array, out: Array, above: Array, channels: int) -> None:
    """Filters 3 (average) and 4 (Paeth): each byte needs its left neighbour, so plain integers in a loop."""
    line, top = [0] * channels, above.tolist()
    for i, value in enumerate(values.tolist()):
        left, up, corner = line[i], top[i + channels], top[i]
        line.append((value + ((left + up) // 2 if kind == 3 else _paeth(left, up, corner))) & 255)
    out[:] = line


def _paeth(left: int, up: int, corner: int) -> int:
    estimate = left + up - corner
    by_left, by_up, by_corner = abs(estimate - left), abs(estimate - up), abs(estimate - corner)
    if by_left <= by_up and by_left <= by_corner:
        return left
    return up if by_up <= by_corner else corner


def _read_with_pillow(path: Path) -> Array:
    try:
        from PIL import Image
    except ImportError as error:
        raise BackendError(f"{path} is not an 8-bit PNG, PGM, PPM or .npy", hint="pip install pillow") from error
    try:
        with Image.open(path) as image:
            _check_size(*image.size)
            return _checked(np.asarray(image.convert("L" if image.mode in ("1", "L", "LA", "I;16") else "RGB")))
    except (OSError, Image.DecompressionBombError) as error:
        raise InputRefused(f"{path} is not a picture that can be read: {error}") from error


def _check_size(width: int, height: int) -> None:
    if not 0 < width * height <= MAX_PIXELS:
        raise InputRefused(f"the picture has {width} x {height} pixels", hint=f"1 to {MAX_PIXELS} pixels")
