"""Sizes in bytes, as people type and read them."""

from __future__ import annotations

import re

from memopt.errors import UsageError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str | int) -> int:
    """Bytes from "64MiB", "1.5 GB" or a plain number.

    Raises:
        UsageError: not a positive size.

    >>> parse_size("64MiB"), parse_size("1.5 KB"), parse_size(512)
    (67108864, 1500, 512)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or float(match[1]) == 0:
        raise UsageError(f"{text!r} is not a size", hint="a number with B, KB, MB, GB, KiB, MiB or GiB, such as 64MiB")
    return round(float(match[1]) * unit)


def parse_amount(text: str) -> float:
    """A share or a number with an optional k, M or G.

    Raises:
        UsageError: neither.

    >>> parse_amount("0.5"), parse_amount("1.2M"), parse_amount("300000")
    (0.5, 1200000.0, 300000.0)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMG]?)\s*", text)
    if match is None or not float(match[1]):
        raise UsageError(f"{text!r} is neither a share nor a number", hint="0.5, 300k, 1.2M or 2G")
    return float(match[1]) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}[match[2]]


def show_size(size_bytes: float | None) -> str:
    """The size with three digits and a binary unit; "unknown" when it is not known.

    >>> show_size(67108864), show_size(212770), show_size(-2048), show_size(None)
    ('64.0 MiB', '208 KiB', '-2.00 KiB', 'unknown')
    """
    if size_bytes is None:
        return "unknown"
    value, unit = float(size_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1000:
            break
        value, unit = value / 1024, larger
    if unit == "B":
        return f"{value:.0f} B"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f} {unit}"


def show_count(number: float) -> str:
    """The number with three digits, from ten thousand on in thousands, millions or billions.

    >>> show_count(640), show_count(11181642), show_count(280145)
    ('640', '11.2M', '280k')
    """
    value, unit = float(number), ""
    if value < 10_000:
        return f"{value:.0f}"
    for larger in ("k", "M", "G", "T"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    digits = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f}{unit}"
