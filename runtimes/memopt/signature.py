"""Who vouches for a bundle: detached ed25519 signatures over the exact bytes of its manifest.

    key -> signature over memopt.json -> files[].sha256 -> bytes

Keys and signatures have minisign's file formats (https://jedisct1.github.io/minisign/#signature-format), so that
`minisign -Vm memopt.json -x signatures/ID.minisig -p KEY.pub` checks a bundle folder as well. The prehashed kind is
read and written: ed25519 over BLAKE2b-512. A second signature covers the first and the trusted comment.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from memopt.errors import BackendError, InputRefused, IntegrityError, printable

FOLDER = "signatures/"
MAX_SIGNATURES = 8
MAX_SIGNATURE_BYTES = 4096
MAX_KEY_BYTES = 4096
KEY_ALGORITHM = b"Ed"
ALGORITHM = b"ED"  # prehashed; the legacy kind is written "Ed"
UNTRUSTED = "untrusted comment: "
TRUSTED = "trusted comment: "
HASH_BYTES = 64
_ID_BYTES, _KEY_BYTES, _SIGNATURE_BYTES = 8, 32, 64
_ENTRY = re.compile(r"signatures/[0-9A-F]{16}\.minisig")
_PRIVATE = ("PRIVATE KEY", "secret key")


@dataclass(frozen=True)
class PublicKey:
    """A key whose signatures are believed. `key_id` is written as minisign writes it: 16 hex digits."""

    key_id: str
    raw: bytes

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9A-F]{16}", self.key_id) or len(self.raw) != _KEY_BYTES:
            raise IntegrityError(f"public key {self.key_id!r} has no 16 hex digits and {_KEY_BYTES} bytes")


@dataclass(frozen=True)
class Signature:
    """What a signature file holds."""

    key_id: str
    over_hash: bytes
    comment: bytes  # the trusted one
    over_comment: bytes  # over `over_hash` and `comment`


def read_public_key(path: Path | str) -> PublicKey:
    """The public key in the file that `memopt-export keygen` or minisign wrote.

    Raises:
        InputRefused: the file cannot be read.
        IntegrityError: it holds no public key, or a private one.
    """
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_KEY_BYTES + 1)
    except OSError as error:
        raise InputRefused(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        return parse_public_key(data.decode())
    except (UnicodeDecodeError, IntegrityError) as error:
        problem = error.problem if isinstance(error, IntegrityError) else "no public key"
        raise IntegrityError(f"{path}: {problem}", hint="memopt-export keygen -o KEY writes KEY.pub") from error


def parse_public_key(text: str) -> PublicKey:
    r"""The public key in the text of a key file, or in its last line alone.

    >>> parse_public_key("RWQf6LRCGA9i53mlYecO4IzT51TGPpvWucNSCh1CBM0QTaLn73Y7GFO3").key_id
    'E7620F1842B4E81F'
    """
    if any(mark in text for mark in _PRIVATE):
        raise IntegrityError("this is a private key, the public one is asked for")
    lines = text.strip().splitlines()
    if not lines or len(lines) > 2 or len(text) > MAX_KEY_BYTES:
        raise IntegrityError("no public key")
    raw = _base64(lines[-1], "public key", len(KEY_ALGORITHM) + _ID_BYTES + _KEY_BYTES)
    if raw[:2] != KEY_ALGORITHM:
        raise IntegrityError(f"public key of the unknown algorithm {printable(raw[:2].decode('latin-1'))!r}")
    return PublicKey(show_key_id(raw[2:10]), raw[10:])


def show_key_id(raw: bytes) -> str:
    """The id of a key as people read it.

    >>> show_key_id(bytes.fromhex("1fe8b442180f62e7"))
    'E7620F1842B4E81F'
    """
    return raw[::-1].hex().upper()


def entry_of(key_id: str) -> str:
    """Where in a bundle the signature by this key lies."""
    return f"{FOLDER}{key_id}.minisig"


def is_signature(name: str) -> bool:
    """Whether a bundle's entry of this name is a signature."""
    return _ENTRY.fullmatch(name) is not None


def parse_signature(data: bytes) -> Signature:
    """The signature in the bytes of a signature file; IntegrityError when it is cut, or of another kind."""
    if len(data) > MAX_SIGNATURE_BYTES:
        raise IntegrityError(f"the signature has {len(data)} bytes, at most {MAX_SIGNATURE_BYTES} are read")
    try:
        lines = data.decode().removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise IntegrityError("the signature is not text") from error
    if len(lines) != 4 or not lines[0].startswith(UNTRUSTED) or not lines[2].startswith(TRUSTED):
        raise IntegrityError("the signature is cut, or none of minisign's")
    raw = _base64(lines[1], "signature", len(ALGORITHM) + _ID_BYTES + _SIGNATURE_BYTES)
    if raw[:2] != ALGORITHM:
        named = printable(raw[:2].decode("latin-1"))
        raise IntegrityError(f"the signature is of the unknown algorithm {named!r}", hint="minisign -S -H writes 'ED'")
    over_comment = _base64(lines[3], "signature", _SIGNATURE_BYTES)
    return Signature(show_key_id(raw[2:10]), raw[10:], lines[2].removeprefix(TRUSTED).encode(), over_comment)


def verify(manifest: bytes, signature: bytes, keys: Sequence[PublicKey]) -> str:
    """The id of the key among `keys` that signed exactly these bytes.

    Raises:
        IntegrityError: the signature is cut or of an unknown algorithm, by another key, or of another manifest.
        BackendError: the library that checks signatures is missing.
    """
    signed = parse_signature(signature)
    candidates = [key for key in keys if key.key_id == signed.key_id]
    if not candidates:
        trusted = ", ".join(key.key_id for key in keys) or "none"
        raise IntegrityError(f"signed by key {signed.key_id}, trusted: {trusted}")
    digest = hash_of(manifest)
    for key in candidates:
        if _holds(key, signed.over_hash, digest):
            if not _holds(key, signed.over_comment, signed.over_hash + signed.comment):
                raise IntegrityError(f"the comment in the signature by key {signed.key_id} is not the one signed")
            return key.key_id
    raise IntegrityError(f"the signature by key {signed.key_id} does not hold: another manifest, or another key")


def hash_of(manifest: bytes) -> bytes:
    """What is signed for a manifest."""
    return hashlib.blake2b(manifest, digest_size=HASH_BYTES).digest()


def _holds(key: PublicKey, signature: bytes, message: bytes) -> bool:
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    except ImportError as error:
        raise BackendError("signatures need cryptography", hint="pip install 'memopt[signing]'") from error
    try:
        Ed25519PublicKey.from_public_bytes(key.raw).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def _base64(text: str, what: str, size: int) -> bytes:
    """The bytes behind the text, which is the only one that stands for them."""
    try:
        raw = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise IntegrityError(f"the {what} is cut or damaged: not base64") from error
    if len(raw) != size or base64.b64encode(raw).decode() != text:
        raise IntegrityError(f"the {what} is cut or damaged: {len(raw)} bytes, expected {size}")
    return raw
