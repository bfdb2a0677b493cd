"""What quantized a graph, as the graph's own metadata tells it: the recipe, and the samples by their indices."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from memopt.errors import IntegrityError, UsageError
from memopt.strict_json import from_plain, to_plain
from memopt.tensors import Array
from memopt_export.recipe import Recipe

if TYPE_CHECKING:
    from memopt_models.data import Pictures, Samples

_LARGEST_BYTES = 2**24  # of unpacked indices; a file may claim anything


@dataclass(frozen=True)
class Provenance:
    """How a graph was quantized, and on what.

    Attributes:
        recipe: what was asked for.
        source: where the samples come from, such as "digits/train"; None where none was looked at.
        fingerprint: sha256 of the samples.
        samples: how many.
        seed: with which they were drawn; None: not known.
        packed_rows: which samples of the source they are, by `pack_rows`; None: not known.
        trained: whether the weights and ranges were trained for it, so that nothing was calibrated.
    """

    recipe: Recipe
    source: str | None = None
    fingerprint: str | None = None
    samples: int = 0
    seed: int | None = None
    packed_rows: str | None = None
    trained: bool = False

    def __post_init__(self) -> None:
        _ = self.rows  # refused here, when they are none

    @property
    def rows(self) -> Array | None:
        """Which samples of the source they are, int64 (samples,), ascending; None: not known."""
        return None if self.packed_rows is None else unpack_rows(self.packed_rows, self.samples)


def provenance(recipe: Recipe, samples: Samples | Pictures | None) -> Provenance:
    """What there is to tell of a graph that was quantized by this recipe on these samples."""
    if samples is None:
        return Provenance(recipe)
    packed = None if samples.rows is None else pack_rows(samples.rows)
    return Provenance(recipe, samples.source, samples.fingerprint, len(samples), packed_rows=packed)


def to_card(told: Provenance) -> dict[str, Any]:
    """Plain values for a metadata entry; what is as by default is left out, as there are graphs of 16 KiB.

    >>> to_card(Provenance(Recipe("int8", weight_bits=7)))
    {'recipe': {'precision': 'int8', 'weight_bits': 7}}
    """
    card = _unlike_default(told)
    return {**card, "recipe": _unlike_default(told.recipe)}


def from_card(card: Any) -> Provenance | None:
    """What `to_card` told; None for what it did not write, because a file may say anything."""
    if not isinstance(card, Mapping):
        return None
    try:
        return from_plain(Provenance, card, where="quantization")
    except (IntegrityError, UsageError):
        return None


def pack_rows(rows: Array) -> str | None:
    """Different indices as text, about 1.5 bytes each for 256 out of 50,000; None for those that repeat.

    The indices in ascending order; of each the gap to the one before (the first: to -1), less one; a gap's lower `k`
    bits stand as they are, the rest as that many 0 and a 1 (a Rice code). All rests come first, then all lower bits,
    the most significant first. Before them a byte with `k`; zlib around them; base85 (RFC 1924) around that.
    """
    ascending = np.unique(rows).astype(np.int64)
    if not len(ascending) or len(ascending) < len(rows) or ascending[0] < 0:
        return None
    gaps = np.diff(ascending, prepend=-1) - 1
    k = int(np.log2(gaps.mean() + 1))
    rests = np.zeros(int((gaps >> k).sum()) + len(gaps), np.uint8)
    rests[np.cumsum((gaps >> k) + 1) - 1] = 1
    lower = (gaps[:, None] >> np.arange(k)[::-1]) & 1  # (gaps, k)
    bits = np.packbits(np.concatenate([rests, lower.ravel().astype(np.uint8)]))
    return base64.b85encode(zlib.compress(bytes([k]) + bits.tobytes(), 9)).decode()


def unpack_rows(text: str, count: int) -> Array:
    """The indices that `pack_rows` packed, ascending.

    Raises:
        IntegrityError: it packed no such thing.

    >>> unpack_rows(pack_rows(np.array([3, 5, 900])), 3)
    array([  3,   5, 900])
    """
    try:
        unpacked = zlib.decompressobj().decompress(base64.b85decode(text), _LARGEST_BYTES)
    except (ValueError, zlib.error) as error:
        raise IntegrityError(f"the indices of the samples cannot be unpacked: {error}") from error
    k, bits = unpacked[0] if unpacked else 64, np.unpackbits(np.frombuffer(unpacked[1:], np.uint8))
    ends = np.flatnonzero(bits)[:count] if count > 0 else bits[:0]
    if not len(ends) or len(ends) < count or k > 40 or len(bits) < ends[-1] + 1 + count * k:
        raise IntegrityError(f"the indices of the samples are not {count}")
    lower = bits[ends[-1] + 1 :][: count * k].reshape(count, k).astype(np.int64)
    gaps = (np.diff(ends, prepend=-1) - 1 << k) + (lower << np.arange(k)[::-1]).sum(axis=1)
    rows: Array = np.cumsum(gaps + 1) - 1
    return rows


def _unlike_default(value: Any) -> dict[str, Any]:
    given = {field.name: getattr(value, field.name) for field in fields(value)}
    defaults = {field.name: field.default for field in fields(value)}
    return {name: to_plain(item) for name, item in given.items() if item != defaults[name]}
