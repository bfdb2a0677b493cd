"""The cache of optimized graphs: filled beside, trusted only where it may be, and never wrong."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import memopt
from memopt import ort_runtime, specialization
from memopt.bundle import open_bundle
from memopt.errors import BackendError, IntegrityError, MemoptError, OutOfResource, UsageError
from memopt.files import locked
from memopt.manifest import Variant
from memopt.model import Model
from memopt.specialization import Cache, Source, default_cache, source_of, specialize
from memopt.tensors import Array


@pytest.fixture(scope="module")
def filled(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """A cache with one entry, made by a child process."""
    cache = Cache(tmp_path_factory.mktemp("cache") / "filled")
    bundle = open_bundle(tiny_bundle)
    specialize(bundle, bundle.manifest.variant("large"), source(tiny_bundle), cache)
    return cache


@pytest.fixture
def cache(filled: Cache, tmp_path: Path) -> Cache:
    """A copy of it."""
    shutil.copytree(filled.folder, tmp_path / "cache")
    return Cache(tmp_path / "cache")


def source(path: Path, variant: str = "large") -> Source:
    bundle = open_bundle(path)
    found = source_of(bundle, bundle.manifest.variant(variant), ort_runtime.version())
    assert isinstance(found, Source)
    return found


def load(path: Path, cache: Cache, **options: object) -> Model:
    return memopt.load(path, device="cpu", variant="large", cache=cache, **options)  # type: ignore[arg-type]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_entry_is_three_files_named_by_what_it_was_made_from(filled: Cache, tiny_bundle: Path) -> None:
    (folder,) = filled.folder.iterdir()
    assert folder.name == source(tiny_bundle).key
    assert names(folder) == ["entry.json", "graph.onnx", "weights.data"]
    assert filled.folder.stat().st_mode & 0o777 == 0o700


def test_a_later_load_maps_the_optimized_graph_and_says_so(cache: Cache, tiny_bundle: Path, tiny_inputs: Array) -> None:
    with memopt.load(tiny_bundle, device="cpu", variant="large") as portable, load(tiny_bundle, cache) as model:
        assert model.why[-1] == f"large: optimized for this processor, from {cache.folder}"
        assert model.variant == "large"
        artifact = model._session._artifact  # type: ignore[attr-defined]
        assert artifact.path == cache.folder / source(tiny_bundle).key / "graph.onnx"
        np.testing.assert_allclose(model(tiny_inputs), portable(tiny_inputs), rtol=1e-4, atol=1e-5)
        assert model.inputs == portable.inputs


def test_the_portable_graph_serves_until_the_other_one_is_there(
    tmp_path: Path, tiny_bundle: Path, tiny_inputs: Array
) -> None:
    with load(tiny_bundle, Cache(tmp_path / "cache")) as model:
        assert "large: being optimized for this processor, for" in model.why[-1]
        before = model(tiny_inputs)
        assert model._better is not None
        model._better.made.result(timeout=60)
        np.testing.assert_allclose(model(tiny_inputs), before, rtol=1e-4, atol=1e-5)
        assert model.why[-1] == "large: optimized for this processor from now on"
        assert model._session._artifact.cpu is not None  # type: ignore[attr-defined]


def test_off_leaves_no_trace(tmp_path: Path, tiny_bundle: Path, tiny_inputs: Array) -> None:
    with load(tiny_bundle, Cache(tmp_path / "cache"), specialize="off") as model:
        assert model(tiny_inputs).shape == (32, 3)
        assert not any("optimized" in line for line in model.why)
    assert not (tmp_path / "cache").exists()
    with pytest.raises(UsageError, match="specialize is 'maybe'; hint: cache, wait, off"):
        load(tiny_bundle, Cache(tmp_path / "cache"), specialize="maybe")


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _link(path: Path) -> None:
    other = path.with_name("elsewhere")
    path.rename(other)
    path.symlink_to(other)


@pytest.mark.parametrize("damage", [_flip, _cut, _link, Path.unlink], ids=["flip", "cut", "link", "missing"])
@pytest.mark.parametrize("name", ["entry.json", "graph.onnx", "weights.data"])
def test_a_damaged_entry_is_found_and_removed(
    cache: Cache, tiny_bundle: Path, name: str, damage: Callable[[Path], None]
) -> None:
    folder = cache.folder / source(tiny_bundle).key
    damage(folder / name)
    with pytest.raises(IntegrityError, match=f"{folder} was damaged and is removed"):
        cache.find(source(tiny_bundle), "large")
    assert not folder.exists()


def test_what_was_damaged_is_made_again(cache: Cache, tiny_bundle: Path, tiny_inputs: Array) -> None:
    _flip(cache.folder / source(tiny_bundle).key / "weights.data")
    with load(tiny_bundle, cache) as model:
        assert "was damaged and is removed: the sha256 of weights.data" in model.why[-2]
        assert model._better is not None
        model._better.made.result(timeout=60)
        assert model(tiny_inputs).shape == (32, 3)
    with load(tiny_bundle, cache) as model:
        assert model.why[-1].endswith(f"from {cache.folder}")


def test_an_entry_under_the_name_of_another_is_refused(cache: Cache, tiny_bundle: Path) -> None:
    have = source(tiny_bundle)
    for other in (
        replace(have, graph_sha256="0" * 64),
        replace(have, weights_sha256="0" * 64),
        replace(have, cpu=replace(have.cpu, onnxruntime="0.9")),
        replace(have, cpu=replace(have.cpu, isa=("sse2",))),
    ):
        assert cache.find(other, "large") is None
        shutil.copytree(cache.folder / have.key, cache.folder / other.key)
        with pytest.raises(IntegrityError, match=r"entry\.json speaks of something else"):
            cache.find(other, "large")


def test_a_cache_that_others_can_write_to_is_not_used(cache: Cache, tiny_bundle: Path, tiny_inputs: Array) -> None:
    cache.folder.chmod(0o777)
    with load(tiny_bundle, cache) as model:
        assert f"hint: chmod 700 {cache.folder}" in model.why[-1]
        assert model._better is None
        assert model(tiny_inputs).shape == (32, 3)
    with pytest.raises(IntegrityError, match="only this user can write to"), cache.making(source(tiny_bundle)):
        pass


def test_only_one_makes_an_entry(tmp_path: Path, tiny_bundle: Path) -> None:
    cache, key = Cache(tmp_path / "cache"), source(tiny_bundle).key
    cache.folder.mkdir(mode=0o700)
    with locked(cache.folder / f"{key}.lock") as ours, cache.making(source(tiny_bundle)) as folder:
        assert ours
        assert folder is None
    with cache.making(source(tiny_bundle)) as folder:
        assert folder is not None
        (folder / "entry.json").write_text("{}")
    assert names(cache.folder) == [key]


def test_nothing_is_left_of_an_entry_that_failed(tmp_path: Path, tiny_bundle: Path) -> None:
    cache = Cache(tmp_path / "cache")
    with pytest.raises(RuntimeError), cache.making(source(tiny_bundle)) as folder:
        assert folder is not None
        (folder / "graph.onnx").write_bytes(b"half")
        raise RuntimeError
    assert [name for name in names(cache.folder) if not name.endswith(".lock")] == []


def test_the_least_recently_used_entries_go_when_the_cache_is_full(tmp_path: Path, tiny_bundle: Path) -> None:
    cache, have = Cache(tmp_path / "cache", limit_bytes=2500), source(tiny_bundle)
    made = [replace(have, graph_sha256=f"{i:064x}") for i in range(4)]
    for age, each in enumerate(made[:3]):
        with cache.making(each) as folder:
            assert folder is not None
            (folder / "entry.json").write_bytes(bytes(700))
        os.utime(cache.folder / each.key / "entry.json", (age, age))
    os.utime(cache.folder / made[0].key / "entry.json", (9, 9))  # used again
    with cache.making(made[3]) as folder:
        assert folder is not None
        (folder / "entry.json").write_bytes(bytes(700))
    assert names(cache.folder) == sorted(each.key for each in (made[0], made[2], made[3]))


def test_the_child_keeps_to_its_memory(tmp_path: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(specialization, "MEMORY_BYTES", 24 * 2**20)
    bundle = open_bundle(tiny_bundle)
    with pytest.raises((OutOfResource, BackendError), match="large"):
        specialize(bundle, bundle.manifest.variant("large"), source(tiny_bundle), Cache(tmp_path / "cache"))


def test_a_child_that_takes_too_long_is_stopped(tmp_path: Path, tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    with pytest.raises(OutOfResource, match=r"large was not optimized within 0\.01 s"):
        specialize(
            bundle, bundle.manifest.variant("large"), source(tiny_bundle), Cache(tmp_path / "cache"), timeout_s=0.01
        )


@pytest.mark.parametrize("python", ["/nowhere/python", None])
def test_without_a_python_to_start_the_portable_graph_serves(
    tmp_path: Path, tiny_bundle: Path, tiny_inputs: Array, monkeypatch: pytest.MonkeyPatch, python: str | None
) -> None:
    monkeypatch.setattr("sys.executable", python)
    with load(tiny_bundle, Cache(tmp_path / "cache"), specialize="wait") as model:
        assert "large: not optimized for this processor: python cannot be started" in model.why[-1]
        assert model(tiny_inputs).shape == (32, 3)


def _request(path: Path, cache: Cache, **unlike: str) -> specialization._Request:
    return specialization._Request(
        str(path), "large", replace(source(path), **unlike), str(cache.folder), cache.limit_bytes, 2**30
    )


def test_an_optimized_graph_that_computes_something_else_is_no_entry(
    tmp_path: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, write, other = Cache(tmp_path / "cache"), ort_runtime.write_optimized, open_bundle(tiny_bundle)

    def wrongly(artifact: object, path: Path, *, weights_name: str) -> None:
        write(other.artifact("small"), path, weights_name=weights_name)
        (path.parent / weights_name).touch()

    monkeypatch.setattr(ort_runtime, "write_optimized", wrongly)
    with pytest.raises(BackendError, match=r"large differs by .* once it is optimized, .* is allowed"):
        specialization._make(_request(tiny_bundle, cache))
    assert cache.find(source(tiny_bundle), "large") is None


def test_a_bundle_that_has_changed_meanwhile_makes_no_entry(tmp_path: Path, tiny_bundle: Path) -> None:
    with pytest.raises(IntegrityError, match="has changed meanwhile"):
        specialization._make(_request(tiny_bundle, Cache(tmp_path / "cache"), weights_sha256="0" * 64))


@pytest.mark.parametrize(
    ("unlike", "said"),
    [
        ({"precision": "int8"}, "int8 weights are packed anew at every load"),
        ({"weights": None}, "its weights are too small to be mapped"),
        ({"source": "small", "engine": "x"}, "it is made for one machine already"),
    ],
)
def test_what_gains_nothing_is_left_as_it_is(tiny_bundle: Path, unlike: dict[str, object], said: str) -> None:
    bundle = open_bundle(tiny_bundle)
    variant: Variant = replace(bundle.manifest.variant("large"), **unlike)  # type: ignore[arg-type]
    assert said in str(source_of(bundle, variant, "1.31.1"))


def test_why_a_graph_could_not_be_optimized_is_said(
    tmp_path: Path, tiny_bundle: Path, tiny_inputs: Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoptError("the disk is full")

    monkeypatch.setattr(specialization, "specialize", fail)
    with load(tiny_bundle, Cache(tmp_path / "cache")) as model:
        assert model._better is not None
        assert model._better.made.exception(timeout=20) is not None
        assert model(tiny_inputs).shape == (32, 3)
        assert model.why[-1] == "large: not optimized for this processor: the disk is full"


def test_where_the_cache_is_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert default_cache() is None  # "off", for all tests
    monkeypatch.setenv("MEMOPT_CACHE", str(tmp_path))
    assert default_cache() == Cache(tmp_path / "specializations")
    monkeypatch.delenv("MEMOPT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert default_cache() == Cache(Path("/xdg/memopt/specializations"))
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert default_cache() == Cache(Path("/home/somebody/.cache/memopt/specializations"))
