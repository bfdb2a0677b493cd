"""A bundle: what travels to the device. One file (`.mopt`) or a folder with the same tree, checked before use."""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from memopt.archive import MAX_ENTRIES, blocks, is_safe_name, read_archive
from memopt.artifact import Artifact, map_file, release_pages
from memopt.errors import InputRefused, IntegrityError, UsageError, first_line
from memopt.manifest import MAX_MANIFEST_BYTES, File, Manifest, Variant, decode
from memopt.npy import read_npy
from memopt.preprocess import check_steps
from memopt.signature import (
    FOLDER,
    MAX_SIGNATURE_BYTES,
    MAX_SIGNATURES,
    PublicKey,
    entry_of,
    is_signature,
    parse_signature,
    read_public_key,
)
from memopt.signature import verify as verify_signature
from memopt.tensors import Array

MANIFEST = "memopt.json"
MIMETYPE = "mimetype"
MIMETYPE_BYTES = b"application/vnd.memopt.bundle.v1"
_MAGIC_AT = 64  # where it stands in every single-file bundle, for programs that tell files by their bytes
UNLISTED = frozenset({MANIFEST, MIMETYPE})  # entries that the manifest does not list, besides signatures
VERIFY = ("full", "lazy", "off")
MAX_LABELS_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Bundle:
    """An open bundle. `entries` are read-only views of mapped files; nothing is extracted."""

    path: Path
    manifest: Manifest
    entries: Mapping[str, memoryview]
    signed_by: str | None = None  # the trusted key whose signature was checked and holds
    unchecked: frozenset[str] = frozenset()  # files whose sha256 somebody has still to check

    @property
    def signatures(self) -> tuple[str, ...]:
        """The ids of the keys that claim to have signed, whether trusted or not."""
        return tuple(name.removeprefix(FOLDER).partition(".")[0] for name in self.entries if is_signature(name))

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The classes' names, in the order of the outputs; empty when the bundle has none.

        Raises:
            IntegrityError: they are no text, or not as many as there are classes.
        """
        name = self.manifest.labels
        if name is None:
            return ()
        if len(self.entries[name]) > MAX_LABELS_BYTES:
            raise IntegrityError(f"{self.path}: {name} has more than {MAX_LABELS_BYTES} bytes")
        try:
            labels = tuple(bytes(self.entries[name]).decode().removesuffix("\n").split("\n"))
        except UnicodeDecodeError as error:
            raise IntegrityError(f"{self.path}: {name} is not UTF-8") from error
        classes = self.manifest.outputs[0].shape[-1:] if self.manifest.outputs else ()
        if classes and isinstance(classes[0], int) and classes[0] != len(labels):
            raise IntegrityError(f"{self.path}: {name} has {len(labels)} labels for {classes[0]} classes")
        return labels

    def artifact(self, variant_id: str) -> Artifact:
        """What a runtime opens for this variant.

        Raises:
            IntegrityError: no such variant, or an engine whose sha256 is not the manifest's.
        """
        variant = self.manifest.variant(variant_id)
        if variant.engine is not None:
            self.verify(next(file for file in self.manifest.files if file.path == variant.model))
        weights = self.entries[variant.weights] if variant.weights else None
        return Artifact(
            name=variant.id,
            kind="onnx" if variant.engine is None else "engine",
            data=self.entries[variant.model],
            size_bytes=self.size_bytes(variant),
            weights=weights,
            weights_location=Path(variant.weights).name if variant.weights else None,
            engine=variant.engine,
            cpu=variant.cpu,
            precision=variant.precision,
        )

    def distrusts(self, variant: Variant, *, trust_engines: bool) -> str | None:
        """Why the variant may not run: it is an engine, so code, and nobody vouches for it; None when it may."""
        if variant.engine is None or trust_engines or self.signed_by is not None:
            return None
        return "engines are code: no trusted key signed this bundle; hint: --trust-engines, or trust_engines=True"

    def size_bytes(self, variant: Variant) -> int:
        """Bytes of the variant in the bundle, external initializers included."""
        return len(self.entries[variant.model]) + (len(self.entries[variant.weights]) if variant.weights else 0)

    def golden_inputs(self) -> dict[str, Array]:
        """The samples on which every variant's outputs are known; empty when the bundle has none."""
        golden = self.manifest.golden
        return {name: self._array(path) for name, path in golden.inputs.items()} if golden is not None else {}

    def golden_pictures(self) -> Array | None:
        """The uint8 pictures, (n, height, width, channels), of which the first golden input was made; None: none."""
        golden = self.manifest.golden
        return self._array(golden.pictures) if golden is not None and golden.pictures is not None else None

    def golden_outputs(self, variant_id: str) -> list[Array]:
        """What this variant computed for them on the machine that packed, in order; empty without golden samples."""
        golden = self.manifest.golden
        if golden is None:
            return []
        return [self._array(golden.outputs[variant_id][spec.name]) for spec in self.manifest.outputs]

    def verify(self, file: File) -> None:
        """Raises IntegrityError unless this file has the sha256 that the manifest promises."""
        digest = hashlib.sha256()
        for block in blocks(self.entries[file.path]):
            digest.update(block)
        release_pages(self.entries[file.path])
        if digest.hexdigest() != file.sha256:
            raise IntegrityError(f"{self.path}: {file.path} is damaged, its sha256 is not the manifest's")

    def check_variant(self, variant: Variant) -> None:
        """Raises IntegrityError unless what is still `unchecked` of this variant has the sha256 promised."""
        for file in self.manifest.files:
            if file.path in self.unchecked and file.path in (variant.model, variant.weights):
                self.verify(file)

    def _array(self, name: str) -> Array:
        try:
            return read_npy(self.entries[name])
        except (ValueError, struct.error) as error:
            raise IntegrityError(f"{self.path}: {name} is not a plain .npy file: {first_line(error)}") from error


def open_bundle(
    path: Path | str, *, verify: str = "full", trusted_keys: Sequence[PublicKey | Path | str] = ()
) -> Bundle:
    """The bundle at `path`, a `.mopt` file or a folder.

    Args:
        path: where it is.
        verify: "full" checks the sha256 of every file first; "lazy" that of all but external weights, which are left
            in `unchecked` for `check_variant`; "off" checks the structure only, and an engine's sha256 when it is
            taken out: its bytes are code.
        trusted_keys: public keys, or files of such; when given, one of them must have signed the manifest.

    Raises:
        InputRefused: missing, or not a bundle at all.
        IntegrityError: damaged, not what its manifest says, or not signed by a trusted key.
        BackendError: keys are given, and the library that checks signatures is missing.
    """
    if verify not in VERIFY:
        raise UsageError(f"verify is {verify!r}", hint=", ".join(VERIFY))
    path = Path(path)
    keys = [key if isinstance(key, PublicKey) else read_public_key(key) for key in trusted_keys]
    entries = _entries_of_folder(path) if path.is_dir() else _entries_of_file(path)
    try:
        if MANIFEST not in entries:
            raise IntegrityError(f"it has no {MANIFEST}")
        if len(entries[MANIFEST]) > MAX_MANIFEST_BYTES:
            raise IntegrityError(
                f"its manifest has {len(entries[MANIFEST])} bytes, at most {MAX_MANIFEST_BYTES} are read"
            )
        _check_signatures(entries)
        signed_by = _signed_by(entries, keys) if keys else None
        manifest = decode(bytes(entries[MANIFEST]))
        check_steps(manifest.preprocess)
        _check_entries(entries, manifest.files)
    except IntegrityError as error:
        raise IntegrityError(f"{path}: {error.problem}", hint=error.hint) from error
    weights = frozenset(variant.weights for variant in manifest.variants if variant.weights is not None)
    bundle = Bundle(path, manifest, entries, signed_by, weights if verify == "lazy" else frozenset())
    for file in manifest.files if verify != "off" else ():
        if file.path not in bundle.unchecked:
            bundle.verify(file)
    if verify != "off":
        _ = bundle.labels  # refused here, when they are none
    return bundle


def is_bundle_folder(path: Path) -> bool:
    """Whether a folder is meant to be a bundle: it has a manifest."""
    return (path / MANIFEST).is_file()


def _entries_of_file(path: Path) -> dict[str, memoryview]:
    data = map_file(path)
    if bytes(data[:4]) != b"PK\x03\x04":
        raise InputRefused(f"{path} is not a memopt bundle", hint=f"memopt-export pack {path} -o {path.stem}.mopt")
    if data[_MAGIC_AT : _MAGIC_AT + len(MIMETYPE_BYTES)] != MIMETYPE_BYTES:
        raise InputRefused(f"{path} is a zip file, but not a memopt bundle")
    try:
        spans = read_archive(data)
    except IntegrityError as error:
        raise IntegrityError(f"{path}: {error.problem}") from error
    entries = {name: data[span.offset : span.offset + span.size_bytes] for name, span in spans.items()}
    if next(iter(entries), None) != MIMETYPE:
        raise IntegrityError(f"{path}: its first entry is not {MIMETYPE}")
    unlisted = [name for name in entries if name in UNLISTED or is_signature(name)]  # the others are checked by sha256
    for name in unlisted:
        if len(entries[name]) <= MAX_MANIFEST_BYTES and zlib.crc32(entries[name]) != spans[name].crc32:
            raise IntegrityError(f"{path}: {name} is damaged")
    return entries


def _entries_of_folder(path: Path) -> dict[str, memoryview]:
    if not is_bundle_folder(path):
        raise InputRefused(f"{path} is a folder without {MANIFEST}, so not a bundle")
    entries: dict[str, memoryview] = {}
    for count, file in enumerate(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        if file.is_symlink() or not is_safe_name(name) or not (file.is_file() or file.is_dir()):
            raise IntegrityError(f"{path}: entry name {name!r} is not safe, or a link")
        if count == 2 * MAX_ENTRIES:
            raise IntegrityError(f"{path}: more than {MAX_ENTRIES} files, and as many folders")
        if file.is_file():
            entries[name] = map_file(file)
    return dict(sorted(entries.items()))


def _check_signatures(entries: Mapping[str, memoryview]) -> None:
    """What is called a signature is one, and by the key in its name; whether it holds is asked with keys only."""
    names = [name for name in entries if is_signature(name)]
    if len(names) > MAX_SIGNATURES:
        raise IntegrityError(f"it has {len(names)} signatures, at most {MAX_SIGNATURES} are read")
    for name in names:
        key_id = parse_signature(bytes(entries[name][: MAX_SIGNATURE_BYTES + 1])).key_id
        if name != entry_of(key_id):
            raise IntegrityError(f"{name} is a signature by key {key_id}")


def _signed_by(entries: Mapping[str, memoryview], keys: Sequence[PublicKey]) -> str:
    """The first trusted key that signed; every signature that claims to be by a trusted key must hold."""
    trusted = [entry_of(key.key_id) for key in keys]
    claimed = [name for name in entries if is_signature(name)]
    if not claimed:
        raise IntegrityError("it is not signed, and a trusted key is asked for", hint="memopt-export pack --sign KEY")
    manifest = bytes(entries[MANIFEST])
    claimed = [name for name in claimed if name in trusted] or claimed[:1]
    held = [verify_signature(manifest, bytes(entries[name]), keys) for name in claimed]
    return held[0]


def _check_entries(entries: Mapping[str, memoryview], files: tuple[File, ...]) -> None:
    """Every listed file is there with its size, and nothing else is."""
    for file in files:
        if is_signature(file.path):
            raise IntegrityError(f"{file.path} is a signature, which no manifest can list")
        if file.path not in entries:
            raise IntegrityError(f"{file.path} is missing")
        if len(entries[file.path]) != file.size_bytes:
            raise IntegrityError(f"{file.path} has {len(entries[file.path])} bytes, {file.size_bytes} were promised")
    listed = {file.path for file in files}
    unknown = sorted(name for name in set(entries) - UNLISTED - listed if not is_signature(name))
    if unknown:
        raise IntegrityError(f"{unknown[0]} is in the bundle but not in its manifest")
