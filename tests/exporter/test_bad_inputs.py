"""Bad inputs as people and attackers hand them in: one line that names the thing, its exit code, nothing left behind.

The numbers are those of the list of bad inputs for version 1. 3 to 47 are models, in test_preflight; 48 to 54
checkpoints, in test_checkpoint; here stand bundles (55 to 75), data and requests (76 to 87), and what no command shows.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import memopt
from memopt.archive import Entry, read_archive, write_archive
from memopt.bundle import MANIFEST, MIMETYPE, MIMETYPE_BYTES, open_bundle
from memopt.errors import BackendError, IntegrityError, MemoptError
from memopt.manifest import EngineInfo, Profile
from memopt_export import cli
from memopt_export.graph import save_graph
from memopt_export.pack import Contents, EnginePart, pack
from memopt_export.signing import generate

CENTRAL = b"PK\x01\x02"
SHAPES = {"input": (1, 1, 8, 8)}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, tiny_contents: Contents) -> Path:
    """A signed bundle with an engine, as one file and as a folder, beside models and data."""
    folder = tmp_path_factory.mktemp("good")
    source = tiny_contents.graphs[0]
    profile = Profile(SHAPES, SHAPES, SHAPES, 4096)
    info = EngineInfo("tensorrt-rtx", "1.7.1.116", ("sm86",), "linux", "x86_64", (profile,), 1000, source.graph.sha256)
    engine = EnginePart("large-rtx", source.network, "fp32", b"engine bytes", info, source.id)
    contents = replace(tiny_contents, parts=(*tiny_contents.parts, engine))
    key = generate()
    (folder / "key.pub").write_bytes(key.public_file())
    (folder / "other.pub").write_bytes(generate().public_file())
    pack(contents, folder / "b.mopt", sign=key)
    pack(contents, folder / "b", form="dir", sign=key)
    save_graph(source.graph, folder / "m.onnx")
    rng = np.random.default_rng(0)
    np.savez(folder / "data.npz", input=rng.normal(size=(8, 1, 8, 8)).astype(np.float32), labels=np.arange(8) % 3)
    return folder


@dataclass(frozen=True)
class Whole:
    """A bundle taken to pieces, to be put together wrongly."""

    data: bytes
    entries: dict[str, bytes]

    def zipped(self, **changed: bytes | None) -> bytes:
        """The archive with entries changed, added or, for None, left out; written by our own writer."""
        items = {name: data for name, data in (self.entries | changed).items() if data is not None}
        buffer = io.BytesIO()
        write_archive(buffer, [Entry(name, data) for name, data in items.items()])
        return buffer.getvalue()

    def listed(self, **changed: Any) -> bytes:
        """The archive with files changed and their sizes and digests in the manifest kept up to date."""
        manifest = json.loads(self.entries[MANIFEST])
        for name, data in changed.items():
            file = next(file for file in manifest["files"] if file["path"] == name)
            file["size_bytes"], file["sha256"] = len(data), hashlib.sha256(data).hexdigest()
        return self.zipped(**changed, **{MANIFEST: json.dumps(manifest).encode()})

    def manifest(self, change: Callable[[dict[str, Any]], object]) -> bytes:
        """The archive with a changed manifest."""
        manifest = json.loads(self.entries[MANIFEST])
        change(manifest)
        return self.zipped(**{MANIFEST: json.dumps(manifest).encode()})

    def directory(self, position: int, form: str, *values: int, entry: int = 2) -> bytes:
        """The archive with fields of one entry of its central directory changed."""
        at = -1
        for _ in range(entry + 1):
            at = self.data.index(CENTRAL, at + 1)
        out = bytearray(self.data)
        struct.pack_into(form, out, at + position, *values)
        return bytes(out)

    def flipped(self, name: str) -> bytes:
        """The archive with a bit in the middle of an entry flipped."""
        span = read_archive(memoryview(self.data))[name]
        out = bytearray(self.data)
        out[span.offset + span.size_bytes // 2] ^= 1
        return bytes(out)


@pytest.fixture(scope="module")
def whole(good: Path) -> Whole:
    data = (good / "b.mopt").read_bytes()
    spans = read_archive(memoryview(data))
    return Whole(data, {name: data[s.offset : s.offset + s.size_bytes] for name, s in spans.items()})


def foreign(**options: Any) -> bytes:
    """A zip file that another program wrote."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(MIMETYPE, MIMETYPE_BYTES)
        archive.writestr(zipfile.ZipInfo(MANIFEST), b"{}", **options)
    return buffer.getvalue()


def overlapping(whole: Whole) -> bytes:
    """Two entries of the directory that speak of the same bytes."""
    first = whole.data.index(CENTRAL)
    second = whole.data.index(CENTRAL, first + 1)
    out = bytearray(whole.data)
    out[second + 42 : second + 46] = out[first + 42 : first + 46]
    return bytes(out)


def many_entries() -> bytes:
    """100 000 empty entries, by another program."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for i in range(100_000):
            archive.writestr(f"f{i}", b"")
    return buffer.getvalue()


def npy_of_objects() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([Canary()], object), allow_pickle=True)
    return buffer.getvalue()


def npy_bomb() -> bytes:
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000), }"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(64)


class Canary:
    """Sings when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("sung"),))


def variant(manifest: dict[str, Any], i: int = 0) -> dict[str, Any]:
    return manifest["variants"][i]


def fallback_cycle(manifest: dict[str, Any]) -> None:
    manifest["variants"][0]["source"], manifest["variants"][1]["source"] = "small", "large-rtx"


SMALL = "variants/small/graph.onnx"
WEIGHTS = "variants/large/weights.data"
ENGINE = "variants/large-rtx/model.engine"
LABELS = "assets/labels.txt"
GOLDEN = "assets/golden/input-0.npy"
# Name -> how the file is made from a good one, exit code, what the one line says.
BUNDLES: dict[str, tuple[Callable[[Whole], bytes], int, str]] = {
    "55 cut at the last byte": (lambda w: w.data[:-1], 4, "not a bundle, or its end is missing"),
    "55 cut at 64 KiB": (lambda w: w.data[: 2**16], 4, "not a bundle, or its end is missing"),
    "55 cut at 128 KiB": (lambda w: w.data[: 2**17], 4, "not a bundle, or its end is missing"),
    "55 nothing": (lambda w: b"", 3, "is empty"),
    "55 its first bytes": (lambda w: w.data[:3], 3, "is not a memopt bundle"),
    "57 weights": (lambda w: w.flipped(WEIGHTS), 4, f"{WEIGHTS} is damaged"),
    "57 graph": (lambda w: w.flipped(SMALL), 4, f"{SMALL} is damaged"),
    "57 labels": (lambda w: w.flipped(LABELS), 4, f"{LABELS} is damaged"),
    "58 engine": (lambda w: w.flipped(ENGINE), 4, f"{ENGINE} is damaged"),
    "59 extra entry": (lambda w: w.zipped(extra=b"x"), 4, "extra is in the bundle but not in its manifest"),
    "60 missing entry": (lambda w: w.zipped(**{LABELS: None}), 4, f"{LABELS} is missing"),
    "60 no manifest": (lambda w: w.zipped(**{MANIFEST: None}), 4, f"it has no {MANIFEST}"),
    "60 no mimetype": (lambda w: w.zipped(**{MIMETYPE: None}), 3, "is a zip file, but not a memopt bundle"),
    "60 another mimetype": (lambda w: w.zipped(**{MIMETYPE: b"application/zip"}), 3, "but not a memopt bundle"),
    "60 mimetype by another name": (
        lambda w: w.data.replace(b"mimetype", b"mimetypf"), 4, "its first entry is not mimetype"),
    "61 twice": (
        lambda w: w.data.replace(SMALL.encode(), b"variants/large/graph.onnx"), 4, "large/graph.onnx' stands twice"),
    "62 twice, but for case": (lambda w: w.zipped(**{"ASSETS/labels.txt": b"x"}), 4, "stands twice"),
    "63 above": (lambda w: w.data.replace(b"assets/labels.txt", b"../../labels.txts"), 4, "is not safe"),
    "63 absolute": (lambda w: w.data.replace(b"assets/labels.txt", b"/etc/labels.txtss"), 4, "is not safe"),
    "63 drive": (lambda w: w.data.replace(b"assets/labels.txt", b"C:\\sets/labels.txt"[:17]), 4, "is not safe"),
    "63 NUL": (lambda w: w.data.replace(b"assets/labels.txt", b"assets/label\x00.txt"), 4, "is not safe"),
    "63 ESC": (lambda w: w.data.replace(b"assets/labels.txt", b"assets/\x1b[31m.txt1"), 4, r"assets/\x1b[31m"),
    "63 turned around": (
        lambda w: w.data.replace(b"assets/labels.txt", "assets/\u202etxt.exe".encode()[:17]), 4, "is not safe"),
    "64 link": (lambda w: w.directory(38, "<I", 0o120777 << 16), 4, "is not the one that memopt writes"),
    "64 folder": (lambda w: w.directory(38, "<I", 0o040755 << 16), 4, "is not the one that memopt writes"),
    "65 compressed": (lambda w: foreign(compress_type=zipfile.ZIP_DEFLATED), 3, "is a zip file, but not a memopt"),
    "65 compressed, one of ours": (lambda w: w.directory(10, "<H", 8), 4, "is not the one that memopt writes"),
    "66 overlapping": (overlapping, 4, "is not the one that memopt writes"),
    "67 another size in the directory": (lambda w: w.directory(20, "<2I", 7, 7), 4, "another header"),
    "67 another checksum in the directory": (lambda w: w.directory(16, "<I", 7), 4, "another header"),
    "68 encrypted": (lambda w: w.directory(8, "<H", 1), 4, "is not the one that memopt writes"),
    "69 data descriptor": (lambda w: w.directory(8, "<H", 8), 4, "is not the one that memopt writes"),
    "70 junk before": (lambda w: b"#!/bin/sh\n" + w.data, 3, "is not a memopt bundle"),
    "70 junk before, a zip's": (lambda w: b"PK\x03\x04" + w.data, 3, "is a zip file, but not a memopt"),
    "70 junk after": (lambda w: w.data + b"junk", 4, "not a bundle, or its end is missing"),
    "70 a second end": (lambda w: w.data + w.data[-22:], 4, "is not the one that memopt writes"),
    "70 two bundles": (lambda w: w.data + w.data, 4, "not the one|another header|alignment"),
    "71 100 000 entries": (lambda w: many_entries(), 3, "is a zip file, but not a memopt bundle"),
    "71 more entries than are read": (lambda w: w.data[:-14] + b"\xff\x7f" * 2 + w.data[-10:], 4, "at most 4096"),
    "72 64 bits that lie": (lambda w: w.directory(20, "<2I", 2**32 - 1, 2**32 - 1), 4, "alignment|another header"),
    "72 a directory nowhere": (lambda w: w.data[:-6] + b"\xff" * 4 + w.data[-2:], 4, "is not safe|behind its end"),
    "72 a directory far away": (lambda w: w.data[:-6] + b"\xfe" * 4 + w.data[-2:], 4, "behind its end"),
    "73 twice a key": (lambda w: w.zipped(**{MANIFEST: b'{"name": "a", "name": "b"}'}), 4, "'name' stands twice"),
    "73 NaN": (lambda w: w.zipped(**{MANIFEST: b'{"name": NaN}'}), 4, "NaN is not a number"),
    "73 1e999": (lambda w: w.zipped(**{MANIFEST: b'{"name": 1e999}'}), 4, "1e999 is not a number"),
    "73 deep": (lambda w: w.zipped(**{MANIFEST: b'{"x":' * 100_000}), 4, "JSON"),
    "73 deep lists": (lambda w: w.zipped(**{MANIFEST: b"[" * 100_001}), 4, "too many nested values"),
    "73 a number of a million digits": (lambda w: w.zipped(**{MANIFEST: b"1" * 10**6}), 4, "not valid JSON"),
    "73 BOM": (lambda w: w.zipped(**{MANIFEST: b"\xef\xbb\xbf{}"}), 4, "not valid JSON"),
    "73 UTF-16": (lambda w: w.zipped(**{MANIFEST: "{}".encode("utf-16")}), 4, "not valid JSON"),
    "73 half a character": (lambda w: w.manifest(lambda m: m.update(name="\ud800")), 4, "not valid JSON"),
    "73 schema 2.0": (lambda w: w.manifest(lambda m: m.update(schema="2.0")), 4, "schema is 2.0, this memopt reads"),
    "73 unknown field": (lambda w: w.manifest(lambda m: m.update(x=1)), 4, "unknown field 'x'"),
    "73 wrong type": (lambda w: w.manifest(lambda m: m.update(name=3)), 4, "expected str, got int"),
    "73 true for a number": (lambda w: w.manifest(lambda m: m["files"][0].update(size_bytes=True)), 4, "got bool"),
    "73 no variant's file": (lambda w: w.manifest(lambda m: variant(m).update(model="none")), 4, "not among its files"),
    "73 fallback cycle": (lambda w: w.manifest(fallback_cycle), 4, "which is no portable variant"),
    "73 twice a variant": (lambda w: w.manifest(lambda m: variant(m).update(id="small")), 4, "'small' stands twice"),
    "73 twice a file": (lambda w: w.manifest(lambda m: m["files"].append(m["files"][0])), 4, "stands twice"),
    "73 bad sha256": (lambda w: w.manifest(lambda m: m["files"][0].update(sha256="abc")), 4, "no valid size and sha"),
    "73 sizes that disagree": (
        lambda w: w.manifest(lambda m: m["files"][0].update(size_bytes=1)), 4, "bytes, 1 were promised"),
    "73 a negative size": (lambda w: w.manifest(lambda m: m["files"][0].update(size_bytes=-1)), 4, "no valid size"),
    "73 a path as labels": (lambda w: w.manifest(lambda m: m.update(labels="../../etc/passwd")), 4, "not among its"),
    "73 labels that are no text": (lambda w: w.listed(**{LABELS: b"zero\n\xff\ntwo\n"}), 4, "is not UTF-8"),
    "73 too few labels": (lambda w: w.listed(**{LABELS: b"zero\none\n"}), 4, "has 2 labels for 3 classes"),
    "73 too many labels": (lambda w: w.listed(**{LABELS: b"a\n" * 3_000_000}), 4, "has more than 4194304 bytes"),
    "73 steps that never run": (
        lambda w: w.manifest(lambda m: m.update(preprocess=[{"op": "exec"}])), 4, "exec"),
    "73 optimized for nothing": (
        lambda w: w.manifest(lambda m: variant(m, 1).update(
            source="large", cpu={"os": "linux", "arch": "x86_64", "isa": [], "onnxruntime": "1"})),
        4, "but not for which features"),
    "74 a signature cut": (
        lambda w: w.zipped(**{name: data[:-20] for name, data in w.entries.items() if name.endswith(".minisig")}),
        4, "signature is cut"),
    "74 payload as a signature": (lambda w: w.zipped(**{"signatures/" + "0" * 16 + ".minisig": b"x"}), 4, "minisign"),
}  # fmt: skip


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str
    seconds: float


@pytest.fixture
def type_(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Answer]:
    """Types a command in an empty folder and returns the answer."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> Answer:
        started = time.perf_counter()
        with pytest.raises(SystemExit) as ended:
            cli.main([str(word) for word in words])
        captured = capsys.readouterr()
        return Answer(int(ended.value.code or 0), captured.out, captured.err, time.perf_counter() - started)

    return run


def assert_refused(answer: Answer, code: int, said: str, names: str) -> None:
    """One line on stderr that names the file and the problem, in time, and nothing else."""
    (line,) = answer.err.splitlines()
    assert line.startswith("memopt-export: error: ")
    assert line.isprintable()
    assert any(each in line for each in said.split("|")), line
    assert names in line
    assert (answer.code, answer.out) == (code, "")
    assert answer.seconds < 5
    assert len(line) < 600


@pytest.mark.parametrize("name", BUNDLES)
def test_a_bad_bundle_is_refused_in_one_line_and_little_memory(
    type_: Callable[..., Answer], tmp_path: Path, whole: Whole, name: str
) -> None:
    make, code, said = BUNDLES[name]
    (tmp_path / "x.mopt").write_bytes(make(whole))
    tracemalloc.start()
    answer = type_("verify", "x.mopt")
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert_refused(answer, code, said, "x.mopt")
    assert peak_bytes < 64 * 2**20
    assert [path.name for path in tmp_path.iterdir()] == ["x.mopt"]
    for words in (("inspect", "x.mopt"), ("run", "x.mopt", "none.png", "--device", "cpu")):
        assert type_(*words).code == code


def test_the_good_bundle_is_good(type_: Callable[..., Answer], good: Path, tmp_path: Path) -> None:
    """What the table above damages holds before."""
    for form in ("b.mopt", "b"):
        assert type_("verify", good / form, "--key", good / "key.pub", "--run").code == 0


GOLDEN_BAD = {
    "75 objects": (npy_of_objects, "it holds Python objects"),
    "75 a bomb": (npy_bomb, "its header speaks of 4000000000000"),
    "75 a zip bomb": (lambda: foreign(compress_type=zipfile.ZIP_DEFLATED), "not those of a .npy file"),
    "75 nothing": (lambda: b"", "not those of a .npy file"),
    "75 cut": (lambda: npy_bomb()[:9], "unpack"),
}


@pytest.mark.parametrize("name", GOLDEN_BAD)
def test_bad_golden_samples_are_refused(type_: Callable[..., Answer], tmp_path: Path, whole: Whole, name: str) -> None:
    make, said = GOLDEN_BAD[name]
    (tmp_path / "x.mopt").write_bytes(whole.listed(**{GOLDEN: make()}))
    assert_refused(type_("verify", "x.mopt", "--run"), 4, said, GOLDEN)
    assert [path.name for path in tmp_path.iterdir()] == ["x.mopt"]


def _link(folder: Path) -> None:
    (folder / "assets" / "link").symlink_to("/etc/passwd")


def _linked_folder(folder: Path) -> None:
    (folder / "linked").symlink_to("/etc")


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "57 weights": (lambda f: _flip(f / WEIGHTS), f"{WEIGHTS} is damaged"),
    "58 engine": (lambda f: _flip(f / ENGINE), f"{ENGINE} is damaged"),
    "59 extra": (lambda f: (f / "extra").write_bytes(b""), "is empty"),
    "59 extra, not empty": (lambda f: (f / "extra").write_bytes(b"x"), "extra is in the bundle but not in its"),
    "60 missing": (lambda f: (f / LABELS).unlink(), f"{LABELS} is missing"),
    "62 case": (lambda f: (f / "ASSETS").mkdir() or (f / "ASSETS/labels.txt").write_bytes(b"x"), "not in its manifest"),
    "63 hidden": (lambda f: (f / ".hidden").write_bytes(b"x"), "'.hidden' is not safe"),
    "63 backslash": (lambda f: (f / "a\\b").write_bytes(b"x"), "is not safe"),
    "63 newline": (lambda f: (f / "a\nb").write_bytes(b"x"), "is not safe"),
    "63 long": (lambda f: (f / ("a" * 201)).write_bytes(b"x"), "is not safe"),
    "64 link": (_link, "is not safe, or a link"),
    "64 linked folder": (_linked_folder, "is not safe, or a link"),
    "64 fifo": (lambda f: os.mkfifo(f / "fifo"), "is not safe, or a link"),
    "73 a huge manifest": (lambda f: os.truncate(f / MANIFEST, 700 * 2**20), "has 734003200 bytes, at most"),
}


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_bad_bundle_folder_is_refused_in_one_line(
    type_: Callable[..., Answer], tmp_path: Path, tiny_contents: Contents, good: Path, name: str
) -> None:
    import shutil

    change, said = FOLDERS[name]
    shutil.copytree(good / "b", tmp_path / "x")
    change(tmp_path / "x")
    answer = type_("verify", "x")
    assert_refused(answer, 3 if said == "is empty" else 4, said, "x")


def test_the_case_of_names_does_not_tell_files_apart(tiny_contents: Contents, tmp_path: Path) -> None:
    """62: on a file system that ignores case one would be the other."""
    pack(tiny_contents, tmp_path / "x", form="dir")
    manifest = json.loads((tmp_path / "x" / MANIFEST).read_text())
    first = manifest["files"][0]
    manifest["files"].append(first | {"path": first["path"].upper()})
    (tmp_path / "x" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(IntegrityError, match="stands twice"):
        open_bundle(tmp_path / "x")


@pytest.mark.parametrize("verify", ["full", "lazy", "off"])
def test_a_damaged_engine_never_reaches_the_library(
    whole: Whole, tmp_path: Path, verify: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """58: whatever else is left unchecked, an engine's bytes are code."""
    from memopt.runtimes import RUNTIMES

    rtx = type(RUNTIMES["tensorrt-rtx"])
    monkeypatch.setattr(rtx, "unavailable", lambda self, device: None)  # as if there were a GPU
    for name in ("refuses", "open"):
        monkeypatch.setattr(rtx, name, lambda self, artifact, **_: pytest.fail("its bytes went to the library"))
    (tmp_path / "x.mopt").write_bytes(whole.flipped(ENGINE))
    with pytest.raises(IntegrityError, match=f"{ENGINE} is damaged"):
        memopt.load(tmp_path / "x.mopt", verify=verify, variant="large-rtx", trust_engines=True)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ((), 0, ""),
        (("--key", "key.pub"), 0, ""),
        (("--require-signature",), 2, "proves nothing"),
        (("--key", "other.pub"), 4, "signed by key "),
        (("--key", "m.onnx"), 4, "no public key|is cut"),
        (("--key", "none.pub"), 3, "cannot be read"),
    ],
)
def test_signatures_are_asked_for_by_key(
    type_: Callable[..., Answer], good: Path, monkeypatch: pytest.MonkeyPatch,
    words: Sequence[str], code: int, said: str,
) -> None:  # fmt: skip
    """74, on the command line; the rest is in test_signature."""
    monkeypatch.chdir(good)
    answer = type_("verify", "b.mopt", *words)
    assert answer.code == code
    if code:
        assert_refused(answer, code, said, "b.mopt" if code == 4 and "signed" in said else "")


REQUESTS: dict[str, tuple[tuple[str, ...], int, str]] = {
    "1 missing": (("verify", "none.mopt"), 3, "none.mopt does not exist"),
    "1 missing picture": (("run", "b.mopt", "none.png"), 3, "none.png"),
    "2 folder for a file": (("pack", "b", "-o", "x.mopt"), 2, "b cannot be packed"),
    "2 fifo for a file": (("verify", "fifo"), 3, "fifo is no ordinary file"),
    "2 device for a file": (("verify", "/dev/zero"), 3, "/dev/zero is no ordinary file"),
    "44 bundle for a model": (("quantize", "b.mopt", "-o", "q.onnx", "--precision", "fp16"), 3, "a zip archive"),
    "46 no batch": (("compare", "m.onnx", "--data", "data.npz", "--batch", "0"), 2, "'0' is no list of batches"),
    "49 pickled checkpoint": (("export", "c.pt", "-o", "x.onnx"), 3, "c.pt is not a safetensors file"),
    "76 no pictures": (("quantize", "m.onnx", "--data", "images:empty", "-o", "q.onnx"), 3, "empty"),
    "76 no folder": (("quantize", "m.onnx", "--data", "images:none", "-o", "q.onnx"), 3, "none"),
    "77 no picture": (("run", "b.mopt", "text.png"), 3, "text.png is not a picture that can be read"),
    "79 no samples": (("quantize", "m.onnx", "--data", "data.npz", "--samples", "0", "-o", "q.onnx"), 2, "samples|0"),
    "80 TOML": (("pipeline", "bad.toml"), 3, "bad.toml is not TOML"),
    "80 unknown format": (("pack", "m.onnx", "--format", "zip", "-o", "x"), 2, "'zip' is not one of"),
    "80 unknown machine": (("pack", "m.onnx", "--specialize", "sm90", "-o", "x"), 2, "'sm90' is not 'local'"),
    "80 no size": (("plan", "m.onnx", "--budget", "12QB"), 2, "'12QB' is not a size"),
    "80 negative size": (("run", "b.mopt", "x.png", "--memory-limit", "-1"), 2, "-1"),
    "81 signed for Triton": (
        ("pack", "m.onnx", "--format", "triton", "--sign", "my.key", "-o", "x"), 2, "has no signatures"),
    "82 exists": (("pack", "m.onnx", "-o", "b.mopt"), 2, "b.mopt exists; hint: --force"),
    "82 folder exists": (("pack", "m.onnx", "--format", "dir", "-o", "b"), 2, "b exists; hint: --force"),
    "82 folder for a file": (("pack", "m.onnx", "-o", "b", "--force"), 2, "b is a directory"),
    "82 file for a folder": (("pack", "m.onnx", "--format", "dir", "-o", "b.mopt", "--force"), 2, "b.mopt exists"),
    "83 read-only": (("pack", "m.onnx", "-o", "/proc/x.mopt"), 3, "/proc/x.mopt cannot be written"),
    "84 output is input": (("pack", "m.onnx", "-o", "m.onnx", "--force"), 2, "is what it would be made from"),
    "85 dash": (("verify", "-b.mopt"), 2, "No such option"),
    "85 dash, meant so": (("verify", "--", "-b.mopt"), 3, "-b.mopt does not exist"),
    "86 bytes that are no text": (("verify", os.fsdecode(b"\xff.mopt")), 3, r"\udcff.mopt does not exist"),
    "86 name beyond the limit": (("verify", "n" * 300), 3, "n: File name too long"),
    "86 name that leads to itself": (("inspect", "ring/x.onnx"), 3, "ring/x.onnx does not exist"),
    "87 budget": (("run", "b.mopt", "p.png", "--memory-limit", "1KiB"), 6, "smallest variant: small 2.06 MiB"),
    "87 plan": (("plan", "m.onnx", "--budget", "1KiB"), 1, "does not fit into the budget"),
    "89 no GPU library": (("run", "b.mopt", "p.png", "--device", "tensorrt"), 5, "nothing that runs on tensorrt"),
    "90 an engine of others": (("run", "b.mopt", "p.png", "--variant", "large-rtx"), 5, "engines are code"),
}  # fmt: skip


@pytest.fixture
def workplace(good: Path, tmp_path: Path) -> Path:
    """A folder of its own with good and bad things."""
    import shutil

    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "ring").symlink_to("ring")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "bad.toml").write_text("name = ]")
    (tmp_path / "c.pt").write_bytes(pickle.dumps(Canary()))
    from memopt_export.signing import save_key

    save_key(generate(), tmp_path / "my.key", "words")
    return tmp_path


@pytest.mark.parametrize("name", REQUESTS)
def test_a_bad_request_is_refused_in_one_line(
    type_: Callable[..., Answer], workplace: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    words, code, said = REQUESTS[name]
    monkeypatch.setenv("MEMOPT_PASSPHRASE", "words")
    before = sorted(path.relative_to(workplace) for path in workplace.rglob("*"))
    answer = type_(*words)
    if name != "87 plan":  # which shows its answer, no
        assert_refused(answer, code, said, "")
    assert answer.code == code
    assert said.partition("|")[0] in answer.err or said.rpartition("|")[2] in answer.err
    assert sorted(path.relative_to(workplace) for path in workplace.rglob("*")) == before


@pytest.mark.parametrize("ending", ["onnx", "safetensors", "pt", "pt2", "mopt", "engine", "npz", "npy", "png", "pub"])
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_no_command_unpickles_whatever_the_file_is_called(
    type_: Callable[..., Answer], good: Path, tmp_path: Path, ending: str, protocol: int
) -> None:
    """48: the canary must not sing."""
    evil = tmp_path / f"evil.{ending}"
    evil.write_bytes(pickle.dumps(Canary(), protocol))
    commands = [
        ("inspect", evil), ("verify", evil), ("pack", evil, "-o", "x.mopt"), ("export", evil, "-o", "x.onnx"),
        ("quantize", evil, "-o", "q.onnx", "--precision", "fp16"), ("run", evil, good / "m.onnx"),
        ("run", good / "b.mopt", evil), ("verify", good / "b.mopt", "--key", evil),
        ("compare", evil, "--data", good / "data.npz"),
        ("quantize", good / "m.onnx", "-o", "q.onnx", "--data", evil),
        ("pack", good / "m.onnx", "-o", "x.mopt", "--sign", evil),
    ]  # fmt: skip
    for words in commands:
        answer = type_(*words)
        assert answer.code in (2, 3, 4), (words, answer)
        assert len(answer.err.splitlines()) == 1
        assert "Traceback" not in answer.err
    assert [path.name for path in tmp_path.iterdir()] == [evil.name]


def test_the_canary_sings_when_it_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Canary()))
    assert (tmp_path / "sung").exists()


def test_a_checksum_is_no_digest(whole: Whole, tmp_path: Path) -> None:
    """57: with the zip's own checksum made to fit, the sha256 still tells."""
    changed = bytearray(whole.entries[WEIGHTS])
    changed[100] ^= 1
    (tmp_path / "x.mopt").write_bytes(whole.zipped(**{WEIGHTS: bytes(changed)}))
    spans = read_archive(memoryview((tmp_path / "x.mopt").read_bytes()))
    assert spans[WEIGHTS].crc32 == zlib.crc32(changed)
    with pytest.raises(IntegrityError, match=f"{WEIGHTS} is damaged"):
        open_bundle(tmp_path / "x.mopt")


def test_a_file_of_bytes_that_are_no_text_is_packed_and_read(type_: Callable[..., Answer], good: Path) -> None:
    """86: a name that is no UTF-8 is a name."""
    name = os.fsdecode(b"\xff\xfe.mopt")
    for words in (("pack", good / "m.onnx", "--name", "x", "-o", name), ("verify", name), ("inspect", name, "--json")):
        answer = type_(*words)
        assert answer.code == 0, answer.err


LOADS = """
import json, pathlib, sys
import numpy as np
import memopt
from memopt.memory import give_back, read_host_memory

x = np.zeros((32, 1, 8, 8), np.float32)

def cycles(count):
    for _ in range(count):
        with memopt.load(sys.argv[1], device="cpu", variant="large") as model:
            model(x)
    give_back()
    return read_host_memory().private_bytes, len(list(pathlib.Path("/proc/self/fd").iterdir()))

print(json.dumps([cycles(10), cycles(100)]))
"""


def test_a_hundred_loads_leave_nothing_open_and_little_memory(good: Path) -> None:
    """B.3, 11."""
    done = subprocess.run([sys.executable, "-c", LOADS, good / "b.mopt"], capture_output=True, check=True)
    (bytes_before, open_before), (bytes_after, open_after) = json.loads(done.stdout)
    assert bytes_after - bytes_before < 5 * 2**20
    assert open_after == open_before


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("TZ", "Asia/Kathmandu"),
        ("LC_ALL", "C"),
        ("COLUMNS", "20"),
        ("NO_COLOR", "1"),
        ("HOME", ""),
        ("TMPDIR", "/none"),
    ],
)
def test_neither_clock_nor_locale_nor_terminal_shows_in_a_bundle(
    good: Path, tmp_path: Path, name: str, content: str
) -> None:
    """B.3, 10 and 13."""
    words = ["pack", str(good / "m.onnx"), "--data", str(good / "data.npz"), "--json", "-o"]
    done = subprocess.run(
        [sys.executable, "-m", "memopt_export", *words, "x.mopt"], cwd=tmp_path, env={**os.environ, name: content},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    with pytest.raises(SystemExit):
        cli.main([*words, str(tmp_path / "y" / "x.mopt")])
    assert (tmp_path / "x.mopt").read_bytes() == (tmp_path / "y" / "x.mopt").read_bytes()


def test_what_a_device_lacks_is_said_with_what_to_install(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """89."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(
        BackendError, match=r"onnxruntime cannot be imported: .*hint: pip install 'memopt\[onnxruntime\]'"
    ):
        memopt.load(good / "b.mopt", device="cpu")


def test_every_error_has_a_documented_exit_code() -> None:
    def kinds(of: type[MemoptError]) -> set[int]:
        return {of.exit_code} | {code for kind in of.__subclasses__() for code in kinds(kind)}

    assert kinds(MemoptError) <= {0, 1, 2, 3, 4, 5, 6, 70}
