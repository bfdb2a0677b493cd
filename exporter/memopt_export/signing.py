"""Makes keys and signs manifests with them; `memopt.signature` says what is written and checks it."""

from __future__ import annotations

import base64
import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from memopt.errors import BackendError, InputRefused, UsageError, first_line
from memopt.files import refuse_to_overwrite, write_together
from memopt.signature import ALGORITHM, KEY_ALGORITHM, MAX_KEY_BYTES, TRUSTED, UNTRUSTED, hash_of, show_key_id

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

_COMMENT = "memopt.json of a memopt bundle"  # constant, so that equal contents give equal bytes
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SigningKey:
    """A private key, unlocked. Its id is derived from the public key, so that the private file need not hold it."""

    private: Ed25519PrivateKey

    @property
    def public(self) -> bytes:
        """The 32 bytes of the public key."""
        return self.private.public_key().public_bytes_raw()

    @property
    def key_id(self) -> str:
        """16 hex digits."""
        return show_key_id(self._id)

    def public_file(self) -> bytes:
        """The public key as minisign writes it."""
        encoded = base64.b64encode(KEY_ALGORITHM + self._id + self.public).decode()
        return f"{UNTRUSTED}minisign public key {self.key_id}\n{encoded}\n".encode()

    def sign(self, manifest: bytes) -> bytes:
        """The signature file over these bytes; equal bytes give equal signatures."""
        over_hash = self.private.sign(hash_of(manifest))
        over_comment = self.private.sign(over_hash + _COMMENT.encode())
        first, second = (base64.b64encode(raw).decode() for raw in (ALGORITHM + self._id + over_hash, over_comment))
        return f"{UNTRUSTED}signature by key {self.key_id}\n{first}\n{TRUSTED}{_COMMENT}\n{second}\n".encode()

    @property
    def _id(self) -> bytes:
        return hashlib.blake2b(self.public, digest_size=8).digest()


def generate() -> SigningKey:
    """A new key."""
    _require_cryptography()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return SigningKey(Ed25519PrivateKey.generate())


def public_path(path: Path) -> Path:
    """Where the public key lies: beside the private one."""
    return path.with_name(path.name + ".pub")


def save_key(key: SigningKey, path: Path, passphrase: str, *, force: bool = False) -> None:
    """Writes the private key, locked and readable by its owner alone, and the public key beside it.

    Raises:
        UsageError: one of the files exists, or the passphrase is empty.
    """
    from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat

    for each in (path, public_path(path)):
        refuse_to_overwrite(each, force=force)
    if not passphrase:
        raise UsageError("the passphrase is empty", hint="--passphrase-file FILE")
    locked = BestAvailableEncryption(passphrase.encode())
    pem = key.private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, locked)
    write_together({path: (pem, 0o600), public_path(path): (key.public_file(), 0o644)}, force=force)


def load_key(path: Path, passphrase: str | None) -> SigningKey:
    """The private key in the file that `save_key` wrote. One that others can read is used, with a warning.

    Raises:
        InputRefused: no private ed25519 key, or locked by another passphrase.
    """
    _require_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        with path.open("rb") as file:
            pem = file.read(MAX_KEY_BYTES)
        open_to_others = path.stat().st_mode & 0o077
    except OSError as error:
        raise InputRefused(f"{path} cannot be read: {error.strerror or error}") from error
    if b"PRIVATE KEY-----" not in pem:
        raise InputRefused(f"{path} is no private key", hint="memopt-export keygen -o KEY")
    if open_to_others:
        _log.warning("%s can be read by others; hint: chmod 600 %s", path, path)
    try:
        private = load_pem_private_key(pem, passphrase.encode() if passphrase and b"ENCRYPTED" in pem else None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise InputRefused(f"{path} cannot be unlocked: {first_line(error)}", hint="--passphrase-file FILE") from error
    if not isinstance(private, Ed25519PrivateKey):
        raise InputRefused(f"{path} is no ed25519 key", hint="memopt-export keygen -o KEY")
    return SigningKey(private)


def _require_cryptography() -> None:
    try:
        import cryptography.hazmat.primitives.asymmetric.ed25519  # noqa: F401  # asked for, to be told apart from a bug
    except ImportError as error:
        raise BackendError("signatures need cryptography", hint="pip install 'memopt[signing]'") from error
