from __future__ import annotations

import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from memopt.bundle import MANIFEST, Bundle, open_bundle
from memopt.errors import InputRefused, IntegrityError, MemoptError, UsageError
from memopt.preprocess import prepare
from memopt_export.pack import Contents, pack


@pytest.fixture
def folder(tmp_path: Path, tiny_contents: Contents) -> Path:
    path = tmp_path / "tiny"
    pack(tiny_contents, path, form="dir")
    return path


def test_file_and_folder_hold_the_same(tiny_bundle: Path, folder: Path) -> None:
    one, other = open_bundle(tiny_bundle), open_bundle(folder)
    assert one.manifest == other.manifest
    assert {name: bytes(view) for name, view in one.entries.items()} == {n: bytes(v) for n, v in other.entries.items()}


def test_bundle_is_unchanged_when_the_file_moves(tiny_bundle: Path, tmp_path: Path) -> None:
    moved = shutil.copy(tiny_bundle, tmp_path / "elsewhere.mopt")
    assert open_bundle(moved).manifest == open_bundle(tiny_bundle).manifest


def test_a_device_can_hold_its_preprocessing_against_the_golden_pictures() -> None:
    bundle = open_bundle(Path(__file__).parent / "golden" / "schema-1.3.mopt")
    pictures = bundle.golden_pictures()
    assert pictures is not None
    assert np.array_equal(prepare(pictures, bundle.manifest.preprocess), bundle.golden_inputs()["input"])
    assert open_bundle(Path(__file__).parent / "golden" / "schema-1.2.mopt").golden_pictures() is None


def test_labels_and_golden_samples_are_read(tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    assert bundle.labels == ("zero", "one", "two")
    assert bundle.golden_inputs()["input"].shape == (4, 1, 8, 8)
    assert bundle.golden_outputs("small")[0].shape == (4, 3)


def test_weights_start_on_a_page(tiny_bundle: Path) -> None:
    weights = open_bundle(tiny_bundle).artifact("large").weights
    assert weights is not None
    assert np.frombuffer(weights, np.uint8).ctypes.data % 4096 == 0


def test_every_damaged_byte_of_a_listed_file_is_found(tiny_bundle: Path, tmp_path: Path, flipped: Callable) -> None:
    data = tiny_bundle.read_bytes()
    copy = tmp_path / "damaged.mopt"
    rng = np.random.default_rng(0)
    for position in (0, 40, len(data) // 2, len(data) - 1, *rng.integers(0, len(data), 150).tolist()):
        copy.write_bytes(flipped(data, position, int(rng.integers(8))))
        with pytest.raises(MemoptError) as caught:
            open_bundle(copy)
        assert caught.value.exit_code in (3, 4)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], Bundle]:
    """A function that opens the bundle in these bytes, without a file."""

    def open_(data: bytes) -> Bundle:
        monkeypatch.setattr("memopt.bundle.map_file", lambda path: memoryview(data))
        return open_bundle("x.mopt")

    return open_


def test_every_truncation_and_every_changed_byte_of_a_bundle_is_refused(opened: Callable[[bytes], Bundle]) -> None:
    data = (Path(__file__).parent / "golden" / "schema-1.0.mopt").read_bytes()
    assert opened(data).labels == ("zero", "one", "two")
    for length in range(1, len(data)):
        with pytest.raises(MemoptError):
            opened(data[:length])
    for position, byte in enumerate(data):
        changed = data[:position] + bytes([byte ^ (1 << position % 8)]) + data[position + 1 :]
        with pytest.raises(MemoptError):
            opened(changed)


def test_a_damaged_file_is_named(tiny_bundle: Path, tmp_path: Path, flipped: Callable) -> None:
    bundle = open_bundle(tiny_bundle)
    data = tiny_bundle.read_bytes()
    position = data.index(bytes(bundle.entries["variants/large/weights.data"])) + 100
    copy = tmp_path / "damaged.mopt"
    copy.write_bytes(flipped(data, position, 0))
    with pytest.raises(IntegrityError, match=r"variants/large/weights\.data is damaged"):
        open_bundle(copy)
    assert open_bundle(copy, verify="off").manifest == bundle.manifest


def test_folder_with_a_missing_a_hidden_or_a_linked_file_is_refused(folder: Path) -> None:
    (folder / "extra.bin").write_bytes(b"x")
    with pytest.raises(IntegrityError, match=r"extra\.bin is in the bundle but not in its manifest"):
        open_bundle(folder)
    (folder / "extra.bin").unlink()
    (folder / "link").symlink_to("/etc/passwd")
    with pytest.raises(IntegrityError, match="is not safe, or a link"):
        open_bundle(folder)
    (folder / "link").unlink()
    (folder / "assets" / "labels.txt").unlink()
    with pytest.raises(IntegrityError, match=r"assets/labels\.txt is missing"):
        open_bundle(folder)


@pytest.mark.parametrize(
    ("make", "kind", "said"),
    [
        (lambda path: None, InputRefused, "does not exist"),
        (lambda path: path.write_bytes(b""), InputRefused, "is empty"),
        (lambda path: path.write_bytes(b"<html>"), InputRefused, "is not a memopt bundle"),
        (lambda path: path.mkdir(), InputRefused, f"without {MANIFEST}"),
        (lambda path: shutil.make_archive(str(path.with_suffix("")), "zip", path.parent), InputRefused, "not exist"),
    ],
    ids=["missing", "empty", "html", "folder", "other-ending"],
)
def test_what_is_no_bundle_is_refused(tmp_path: Path, make: Callable, kind: type, said: str) -> None:
    path = tmp_path / "x.mopt"
    make(path)
    with pytest.raises(kind, match=said):
        open_bundle(path)


def test_an_unknown_way_to_verify_is_refused(tiny_bundle: Path) -> None:
    with pytest.raises(UsageError, match="verify is 'Full'; hint: full, lazy, off"):
        open_bundle(tiny_bundle, verify="Full")


def test_a_huge_manifest_is_refused_before_it_is_read(folder: Path) -> None:
    with (folder / MANIFEST).open("wb") as file:
        file.truncate(700 * 2**20)
    tracemalloc.start()
    with pytest.raises(IntegrityError, match="its manifest has 734003200 bytes"):
        open_bundle(folder)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_labels_that_are_no_text_are_refused(folder: Path) -> None:
    (folder / "assets" / "labels.txt").write_bytes(b"zero\none\n\xfftw\n"[:13])
    bundle = open_bundle(folder, verify="off")
    with pytest.raises(IntegrityError, match="is not UTF-8"):
        _ = bundle.labels


def test_preprocessing_that_could_never_run_is_refused_at_once(folder: Path) -> None:
    manifest = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(manifest.replace('"op": "resize"', '"op": "explode"'))
    with pytest.raises(IntegrityError, match="explode"):
        open_bundle(folder)


def test_the_manifest_itself_is_checked(folder: Path) -> None:
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text().replace('"tiny"', '"tiny", "x": 1', 1))
    with pytest.raises(IntegrityError, match="unknown field 'x'"):
        open_bundle(folder)
