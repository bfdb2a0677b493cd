from __future__ import annotations

import base64
import logging
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import memopt
from memopt.bundle import MANIFEST, open_bundle
from memopt.choice import choose
from memopt.errors import BackendError, InputRefused, IntegrityError, MemoptError
from memopt.manifest import EngineInfo, Profile
from memopt.signature import PublicKey, entry_of, parse_public_key, parse_signature, read_public_key, verify
from memopt_export.pack import Contents, EnginePart, pack
from memopt_export.signing import SigningKey, generate, load_key, save_key

# Written by minisign itself: the test vector of the minisign-verify crate, over the four bytes "test".
MINISIGN_KEY = (
    "untrusted comment: minisign public key E7620F1842B4E81F\n"
    "RWQf6LRCGA9i53mlYecO4IzT51TGPpvWucNSCh1CBM0QTaLn73Y7GFO3\n"
)
MINISIGN_SIGNATURE = (
    b"untrusted comment: signature from minisign secret key\n"
    b"RUQf6LRCGA9i559r3g7V1qNyJDApGip8MfqcadIgT9CuhV3EMhHoN1mGTkUidF/z7SrlQgXdy8ofjb7bNJJylDOocrCo8KLzZwo=\n"
    b"trusted comment: timestamp:1556193335\tfile:test\n"
    b"y/rUw2y8/hOUYjZU71eHp/Wo1KZ40fGy2VJEDl34XMJM+TX48Ss/17u3IvIfbVR1FkZZSNCisQbuQY+bHwhEBg==\n"
)


@pytest.fixture(scope="module")
def key() -> SigningKey:
    return generate()


@pytest.fixture(scope="module")
def public(key: SigningKey) -> PublicKey:
    return parse_public_key(key.public_file().decode())


@pytest.fixture(scope="module")
def contents(tiny_contents: Contents) -> Contents:
    """The tiny variants, and an engine."""
    shapes = {"input": (1, 1, 8, 8)}
    source = tiny_contents.graphs[0]
    info = EngineInfo(
        "tensorrt-rtx", "1.7.1.116", ("sm86",), "linux", "x86_64", (Profile(shapes, shapes, shapes, 4096),), 1000,
        source.graph.sha256,
    )  # fmt: skip
    engine = EnginePart("large-rtx", source.network, "fp32", b"engine bytes", info, source.id)
    return replace(tiny_contents, parts=(*tiny_contents.parts, engine))


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory, contents: Contents, key: SigningKey) -> Path:
    path = tmp_path_factory.mktemp("signed") / "signed.mopt"
    pack(contents, path, sign=key)
    return path


@pytest.fixture
def folder(tmp_path: Path, contents: Contents, key: SigningKey) -> Path:
    pack(contents, tmp_path / "signed", form="dir", sign=key)
    return tmp_path / "signed"


def test_what_minisign_signed_holds() -> None:
    trusted = parse_public_key(MINISIGN_KEY)
    assert verify(b"test", MINISIGN_SIGNATURE, [trusted]) == trusted.key_id == "E7620F1842B4E81F"


def test_the_trusted_comment_is_signed_too() -> None:
    other = MINISIGN_SIGNATURE.replace(b"file:test", b"file:tess")
    with pytest.raises(IntegrityError, match="comment in the signature by key E7620F1842B4E81F is not the one signed"):
        verify(b"test", other, [parse_public_key(MINISIGN_KEY)])


def test_every_flipped_bit_of_a_signature_is_found_but_those_of_the_untrusted_comment(
    flipped: Callable, key: SigningKey, public: PublicKey
) -> None:
    signature = key.sign(b"manifest")
    assert verify(b"manifest", signature, [public]) == key.key_id
    for position in range(signature.index(b"\n"), len(signature)):
        for bit in range(8):
            with pytest.raises(IntegrityError):
                verify(b"manifest", flipped(signature, position, bit), [public])


def test_a_signature_cut_anywhere_is_refused(key: SigningKey, public: PublicKey) -> None:
    signature = key.sign(b"manifest").removesuffix(b"\n")
    for size in range(len(signature)):
        with pytest.raises(IntegrityError, match=r"cut|none of minisign's"):
            verify(b"manifest", signature[:size], [public])


def _with_algorithm(signature: bytes, algorithm: bytes) -> bytes:
    lines = signature.split(b"\n")
    lines[1] = base64.b64encode(algorithm + base64.b64decode(lines[1])[2:])
    return b"\n".join(lines)


def test_each_reason_is_named(key: SigningKey, public: PublicKey) -> None:
    signature, stranger = key.sign(b"manifest"), parse_public_key(generate().public_file().decode())
    with pytest.raises(IntegrityError, match=f"signed by key {key.key_id}, trusted: {stranger.key_id}"):
        verify(b"manifest", signature, [stranger])
    with pytest.raises(IntegrityError, match="does not hold: another manifest, or another key"):
        verify(b"another", signature, [public])
    with pytest.raises(IntegrityError, match="does not hold: another manifest, or another key"):
        verify(b"manifest", signature, [replace(stranger, key_id=key.key_id)])  # an id is no proof
    with pytest.raises(IntegrityError, match="of the unknown algorithm 'Ed'"):
        verify(b"manifest", _with_algorithm(signature, b"Ed"), [public])
    with pytest.raises(IntegrityError, match=r"has 5000 bytes, at most 4096"):
        parse_signature(b"x" * 5000)
    with pytest.raises(IntegrityError, match="is not text"):
        parse_signature(b"\xff\n\n\n\n")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"-----BEGIN ENCRYPTED PRIVATE KEY-----\nx\n", "this is a private key"),
        (b"untrusted comment: minisign encrypted secret key\nRWRTY0Iy\n", "this is a private key"),
        (b"", "no public key"),
        (b"\xff\xfe", "no public key"),
        (b"a\nb\nc\n", "no public key"),
        (b"x" * 5000, "no public key"),
        (b"RWQf6LRCGA9i53mlYecO4IzT51TG\n", "public key is cut"),
        (base64.b64encode(b"XX" + bytes(40)), "unknown algorithm 'XX'"),
    ],
)
def test_what_is_no_public_key_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "k.pub").write_bytes(content)
    with pytest.raises(IntegrityError, match=rf"k\.pub: .*{said}"):
        read_public_key(tmp_path / "k.pub")


def test_a_public_key_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=r"none\.pub cannot be read: No such file"):
        read_public_key(tmp_path / "none.pub")


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.asymmetric.ed25519", None)
    with pytest.raises(BackendError, match=r"hint: pip install 'memopt\[signing\]'"):
        verify(b"test", MINISIGN_SIGNATURE, [parse_public_key(MINISIGN_KEY)])
    with pytest.raises(BackendError, match=r"hint: pip install 'memopt\[signing\]'"):
        generate()


def test_a_signed_bundle_opens_with_the_key_and_without(signed: Path, public: PublicKey, tmp_path: Path) -> None:
    assert open_bundle(signed).signed_by is None
    assert open_bundle(signed).signatures == (public.key_id,)
    assert open_bundle(signed, trusted_keys=[public]).signed_by == public.key_id


def test_equal_contents_signed_give_equal_bytes(
    signed: Path, contents: Contents, key: SigningKey, tmp_path: Path
) -> None:
    pack(contents, tmp_path / "again.mopt", sign=key)
    assert (tmp_path / "again.mopt").read_bytes() == signed.read_bytes()


def test_unsigned_bundles_and_strangers_are_refused_by_trusted_keys(
    tiny_bundle: Path, signed: Path, public: PublicKey, tmp_path: Path
) -> None:
    (tmp_path / "stranger.pub").write_bytes(generate().public_file())
    with pytest.raises(IntegrityError, match=r"tiny\.mopt: it is not signed"):
        memopt.load(tiny_bundle, trusted_keys=[public])
    with pytest.raises(IntegrityError, match=rf"signed\.mopt: signed by key {public.key_id}, trusted: "):
        memopt.load(signed, trusted_keys=[tmp_path / "stranger.pub"])


def test_a_manifest_changed_after_signing_is_refused(folder: Path, public: PublicKey) -> None:
    manifest = folder / MANIFEST
    manifest.write_text(manifest.read_text().replace('"Apache-2.0"', '"MIT"'))
    assert open_bundle(folder).signed_by is None
    with pytest.raises(IntegrityError, match="does not hold"):
        open_bundle(folder, trusted_keys=[public])


def test_one_of_several_signatures_is_enough_but_a_false_one_by_a_trusted_key_is_not(
    folder: Path, key: SigningKey, public: PublicKey
) -> None:
    second = generate()
    other = parse_public_key(second.public_file().decode())
    place = folder / entry_of(second.key_id)
    place.write_bytes(second.sign((folder / MANIFEST).read_bytes()))
    for keys in ([public], [other], [other, public]):
        assert open_bundle(folder, trusted_keys=keys).signed_by in [key.key_id for key in keys]
    place.write_bytes(second.sign(b"another manifest"))
    assert open_bundle(folder, trusted_keys=[public]).signed_by == public.key_id
    with pytest.raises(IntegrityError, match="does not hold"):
        open_bundle(folder, trusted_keys=[public, other])


def test_only_signatures_lie_among_the_signatures(folder: Path, key: SigningKey) -> None:
    place = folder / entry_of(key.key_id)
    stranger = generate()
    for name, data, said in (
        (entry_of(stranger.key_id), place.read_bytes(), f"is a signature by key {key.key_id}"),
        (entry_of(stranger.key_id), b"x" * 5000, "at most 4096"),
        (entry_of(stranger.key_id), b"payload", "none of minisign's"),
        ("signatures/payload.bin", b"x", "in the bundle but not in its manifest"),
        ("signatures/0123.minisig", b"x", "in the bundle but not in its manifest"),
    ):
        (folder / name).write_bytes(data)
        with pytest.raises(IntegrityError, match=said):
            open_bundle(folder)
        (folder / name).unlink()
    for each in (generate() for _ in range(8)):
        (folder / entry_of(each.key_id)).write_bytes(each.sign(b""))
    with pytest.raises(IntegrityError, match="it has 9 signatures, at most 8"):
        open_bundle(folder)


def test_a_damaged_signature_in_a_file_is_found_without_keys(signed: Path, tmp_path: Path, flipped: Callable) -> None:
    data = signed.read_bytes()
    start = data.index(b"untrusted comment: ")
    for position in range(start, start + 250, 7):
        (tmp_path / "x.mopt").write_bytes(flipped(data, position, 3))
        with pytest.raises(MemoptError) as caught:
            open_bundle(tmp_path / "x.mopt")
        assert caught.value.exit_code == 4


def test_engines_run_only_when_somebody_vouches_for_them(
    signed: Path, tmp_path: Path, contents: Contents, public: PublicKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    from memopt.runtimes import RUNTIMES

    rtx = RUNTIMES["tensorrt-rtx"]
    monkeypatch.setattr(type(rtx), "unavailable", lambda self, device: None)  # as if there were a GPU
    monkeypatch.setattr(type(rtx), "refuses", lambda self, artifact: None)
    plain = tmp_path / "plain.mopt"
    pack(contents, plain)
    for path, keys, trust, taken in (
        (plain, [], False, False),
        (plain, [], True, True),
        (signed, [], False, False),  # signed, but by nobody we know
        (signed, [public], False, True),
    ):
        bundle = open_bundle(path, trusted_keys=keys)
        found = choose(bundle, device="auto", trust_engines=trust)
        assert (found.variant.id == "large-rtx") is taken
        assert any(line.startswith("large-rtx: engines are code: no trusted key") for line in found.why) is not taken
    with pytest.raises(BackendError, match="large-rtx: engines are code"):
        memopt.load(plain, variant="large-rtx")


def test_a_model_tells_who_signed_it(signed: Path, public: PublicKey) -> None:
    with memopt.load(signed, device="cpu", trusted_keys=[public]) as model:
        assert model.signed_by == public.key_id


def test_a_private_key_is_locked_and_for_its_owner_alone(
    key: SigningKey, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "my.key"
    save_key(key, path, "secret words")
    assert path.stat().st_mode & 0o777 == 0o600
    assert b"ENCRYPTED PRIVATE KEY" in path.read_bytes()
    assert read_public_key(tmp_path / "my.key.pub").key_id == key.key_id
    assert load_key(path, "secret words").sign(b"x") == key.sign(b"x")
    assert not caplog.records
    path.chmod(0o644)
    with caplog.at_level(logging.WARNING):
        load_key(path, "secret words")
    assert "my.key can be read by others; hint: chmod 600" in caplog.text


def test_keys_that_cannot_be_used_are_refused(key: SigningKey, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    path = tmp_path / "my.key"
    with pytest.raises(MemoptError, match="the passphrase is empty; hint: --passphrase-file"):
        save_key(key, path, "")
    assert not list(tmp_path.iterdir())
    save_key(key, path, "secret words")
    with pytest.raises(MemoptError, match=r"my\.key exists; hint: --force"):
        save_key(key, path, "secret words")
    for passphrase in ("other words", None, ""):
        with pytest.raises(InputRefused, match=r"my\.key cannot be unlocked"):
            load_key(path, passphrase)
    with pytest.raises(InputRefused, match=r"my\.key\.pub is no private key"):
        load_key(tmp_path / "my.key.pub", "secret words")
    with pytest.raises(InputRefused, match="none cannot be read"):
        load_key(tmp_path / "none", "x")
    pem = X25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.write_bytes(pem)
    path.chmod(0o600)
    with pytest.raises(InputRefused, match=r"my\.key is no ed25519 key"):
        load_key(path, None)


def test_an_engine_of_an_unsigned_bundle_is_not_measured(contents: Contents, tmp_path: Path) -> None:
    from memopt.compare import cells, subjects

    pack(contents, tmp_path / "x.mopt")
    for trust in (False, True):
        found = cells(subjects([tmp_path / "x.mopt"], trust_engines=trust), batches=(1,))
        (reason,) = [cell.reason for cell in found if cell.subject.variant == "large-rtx"]
        assert (reason is not None and reason.startswith("engines are code")) is not trust


def test_a_bundle_folder_is_signed_again_elsewhere(folder: Path, key: SigningKey, public: PublicKey) -> None:
    """A signature may come later, from another machine: nothing in the bundle has to change for it."""
    place = folder / entry_of(key.key_id)
    elsewhere = shutil.move(place, folder.parent / "later.minisig")
    with pytest.raises(IntegrityError, match="is not signed"):
        open_bundle(folder, trusted_keys=[public])
    shutil.move(elsewhere, place)
    assert open_bundle(folder, trusted_keys=[public]).signed_by == public.key_id
