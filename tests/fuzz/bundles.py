"""Fuzzes the bundle reader, with an independent judge of what it accepts.

Every case is a good bundle that was changed: bytes anywhere, fields of headers, entries, or values of the manifest with
all digests made to fit again. A bundle is wrongly accepted when it is not what `write_archive` writes, when Python's
zipfile and hashlib find other bytes in it than the reader, or when nobody signed it though a key was asked for.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import random
import struct
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from changes import change_bytes
from graphs import make_model
from tally import Tally

from memopt import archive, bundle
from memopt.archive import Entry, read_archive, write_archive
from memopt.bundle import MANIFEST, UNLISTED, Bundle, open_bundle
from memopt.errors import InputRefused
from memopt.signature import PublicKey, is_signature, parse_public_key
from memopt_export.graph import Graph
from memopt_export.pack import Contents, OnnxPart, pack
from memopt_export.signing import generate

GOLDEN = Path(__file__).parent.parent / "runtimes" / "golden"
WIDE_FROM = archive._WIDE_FROM
STRANGE = (
    None, True, -1, 0, 1.5, 2**53, 10**40, "", "x", "../x", "/x", "\x00", "a" * 300, "2.0", [], {}, [[]], [1, "a"]
)  # fmt: skip


def fuzz(rng: random.Random, tally: Tally, done: Callable[[], bool]) -> None:
    """Opens changed bundles, unsigned and signed, with numbers of 32 bits and, from a low threshold, of 64."""
    seeds = Seeds.make()
    mapper = bundle.map_file
    try:
        while not done():
            archive._WIDE_FROM = WIDE_FROM
            entries = rng.choice(seeds.bundles)
            if rng.random() < 0.3:
                archive._WIDE_FROM = rng.choice((1, 100, 500, 5000))
            data = rng.choice(CHANGES)(rng, entries)
            keys = [seeds.key] if rng.random() < 0.3 else []
            tally.count(data, lambda data, keys=keys: _open(data, keys, seeds))
    finally:
        archive._WIDE_FROM, bundle.map_file = WIDE_FROM, mapper


@dataclass(frozen=True)
class Seeds:
    """Good bundles, by their entries; one of them signed by the key."""

    bundles: tuple[dict[str, bytes], ...]
    key: PublicKey
    signed: bytes  # the manifest

    @classmethod
    def make(cls) -> Seeds:
        key = generate()
        paths = sorted(GOLDEN.glob("schema-*.mopt"))
        with tempfile.TemporaryDirectory() as name:
            signed = Path(name) / "signed.mopt"
            pack(Contents("tiny", (OnnxPart("a", "tiny", Graph(make_model(), "0" * 64)),)), signed, sign=key)
            bundles = tuple(entries_of(path.read_bytes()) for path in (*paths, signed))
        return cls(bundles, parse_public_key(key.public_file().decode()), bundles[-1][MANIFEST])


def entries_of(data: bytes) -> dict[str, bytes]:
    spans = read_archive(memoryview(data))
    return {name: data[span.offset : span.offset + span.size_bytes] for name, span in spans.items()}


def change_archive(rng: random.Random, entries: dict[str, bytes]) -> bytes:
    """The bytes of the file."""
    return change_bytes(rng, _written(rng, entries))


def change_entries(rng: random.Random, entries: dict[str, bytes]) -> bytes:
    """An entry changed, dropped, renamed or added, with or without its digest, or all in another order."""
    name = rng.choice(list(entries))
    changed = change_bytes(rng, entries[name] or b"x")
    return _written(rng, rng.choice((
        entries | {name: changed},
        _fitting(entries, name, changed),
        {key: data for key, data in entries.items() if key != name},
        {(name + "x" if key == name else key): data for key, data in entries.items()},
        entries | {rng.choice(("x", "LICENSE2", "signatures/x", name.swapcase(), name + ".x")): changed},
        dict(rng.sample(list(entries.items()), len(entries))),
    )))  # fmt: skip


def change_manifest(rng: random.Random, entries: dict[str, bytes]) -> bytes:
    """Values of the manifest replaced, removed or doubled."""
    document = {"": json.loads(entries[MANIFEST])}
    for _ in range(rng.choice((1, 1, 2, 3))):
        place: Any = document
        key: Any = ""
        while isinstance(place[key], (dict, list)) and place[key] and (key == "" or rng.random() < 0.8):
            place = place[key]
            key = rng.choice(sorted(place)) if isinstance(place, dict) else rng.randrange(len(place))
        how = rng.randrange(4)
        if how == 0 and isinstance(place, dict) and place is not document:
            del place[key]
        elif how == 1 and isinstance(place, list):
            place.append(copy.deepcopy(place[key]))
        elif how == 2 and isinstance(place[key], str):
            place[key] = rng.choice((place[key].upper(), place[key] + "x", place[key][:-1]))
        else:
            place[key] = copy.deepcopy(rng.choice(STRANGE))
    return _written(rng, entries | {MANIFEST: json.dumps(document[""]).encode()})


def change_json(rng: random.Random, entries: dict[str, bytes]) -> bytes:
    """The text of the manifest."""
    return _written(rng, entries | {MANIFEST: change_bytes(rng, entries[MANIFEST])})


CHANGES = (change_archive, change_archive, change_archive, change_entries, change_manifest, change_json)


def _open(data: bytes, keys: list[PublicKey], seeds: Seeds) -> tuple[str, str | None]:
    """Opens the bundle, and reads all that a program may ask of it."""
    if not data:
        raise InputRefused("is empty")  # what map_file says
    bundle.map_file = lambda path: memoryview(data)
    opened = open_bundle(Path("fuzzed.mopt"), trusted_keys=keys)
    for variant in opened.manifest.variants:
        opened.artifact(variant.id)
        opened.golden_outputs(variant.id)
    opened.golden_inputs()
    return "accepted", _wrong(data, opened, seeds.signed if keys else None)


def _wrong(data: bytes, opened: Bundle, signed: bytes | None) -> str | None:
    """Why these bytes should not have been accepted."""
    entries = {name: bytes(view) for name, view in opened.entries.items()}
    if _written_alike(data, entries) != data:
        return "our writer writes other bytes"
    with zipfile.ZipFile(io.BytesIO(data)) as found:
        if {name: found.read(name) for name in found.namelist()} != entries:
            return "zipfile reads other entries"
    listed = {file.path: file for file in opened.manifest.files}
    if sorted(listed) != sorted(name for name in entries if name not in UNLISTED and not is_signature(name)):
        return "the manifest lists other files"
    if any(hashlib.sha256(entries[name]).hexdigest() != file.sha256 for name, file in listed.items()):
        return "a digest is not that of the bytes"
    if signed is not None and entries[MANIFEST] != signed:
        return "nobody signed this manifest"
    return None


def _written_alike(data: bytes, entries: dict[str, bytes]) -> bytes:
    """The entries as our writer writes them, each aligned as its header in `data` says."""
    buffer, position, aligned = io.BytesIO(), 0, []
    for name, content in entries.items():
        extra = position + 30 + len(name)
        padding = extra + (20 if len(content) >= archive._WIDE_FROM else 0)
        aligned.append(Entry(name, content, struct.unpack_from("<H", data, padding + 4)[0]))
        (length,) = struct.unpack_from("<H", data, position + 28)
        position = extra + length + len(content)
    write_archive(buffer, aligned)
    return buffer.getvalue()


def _fitting(entries: dict[str, bytes], name: str, data: bytes) -> dict[str, bytes]:
    """An entry changed, and its size and digest in the manifest with it."""
    manifest = json.loads(entries[MANIFEST])
    for file in manifest["files"]:
        if file["path"] == name:
            file["size_bytes"], file["sha256"] = len(data), hashlib.sha256(data).hexdigest()
    return entries | {MANIFEST: json.dumps(manifest).encode(), name: data}


def _written(rng: random.Random, entries: dict[str, bytes]) -> bytes:
    """The entries in an archive; the first, which has to stand at its place, is aligned as usual, the others anyhow."""
    aligns = [64, *(rng.choice((64, 64, 128, 4096)) for _ in entries)]
    buffer = io.BytesIO()
    write_archive(buffer, [Entry(*item, align) for item, align in zip(entries.items(), aligns, strict=False)])
    return buffer.getvalue()
