from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from memopt.errors import InputRefused, UsageError
from memopt_models.factories import load_factory, source_digest


def test_name_stands_for_the_function() -> None:
    assert load_factory("json:dumps")([1]) == json.dumps([1])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "nowhere:f",
            "'nowhere:f' cannot be imported: No module named 'nowhere'; hint: pkg.mod:function, with pkg on PYTHONPATH",
        ),
        ("..relative:f", "'..relative:f' cannot be imported"),
        (":f", "':f' cannot be imported"),
        ("json:", "module 'json' has no ''"),
        ("json:dump:s", "module 'json' has no 'dump:s'"),
        ("math:e", "'math:e' is a float, not a function"),
    ],
)
def test_what_is_no_function_is_refused(name: str, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        load_factory(name)
    assert message in str(raised.value)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An importable package `shop` with a module `nets`, which would raise, were it imported."""
    folder = tmp_path / "shop"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "nets.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    sys.modules.pop("shop", None)


def test_digest_is_that_of_the_file_which_is_not_imported(package: Path) -> None:
    first = source_digest("shop.nets:make")
    assert first == hashlib.sha256((package / "nets.py").read_bytes()).hexdigest()
    assert "shop.nets" not in sys.modules
    (package / "nets.py").write_text("raise RuntimeError('imported')  # another one")
    assert source_digest("shop.nets:make") != first


def test_digest_of_an_imported_module_is_that_of_its_file_too() -> None:
    assert source_digest("json:dumps") == hashlib.sha256(Path(json.__file__).read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["simple_cnn", "resnet18", "digits", "itertools:chain"])
def test_what_lies_in_no_file_of_the_user_has_no_digest(name: str) -> None:
    assert source_digest(name) == ""


@pytest.mark.parametrize("name", ["nowhere:f", "nowhere.at.all:f", "json.nothing:f", "..relative:f", ":f"])
def test_digest_of_code_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"'{name}' cannot be imported: .*; hint: pkg.mod:function"):
        source_digest(name)


def test_what_the_users_code_raises_names_the_users_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "theirs.py").write_text("def boom(): raise ZeroDivisionError('by hand')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputRefused, match="theirs:boom raised ZeroDivisionError: by hand"):
        load_factory("theirs:boom")()


def test_a_factory_keeps_its_signature() -> None:
    assert list(inspect.signature(load_factory("shutil:copy")).parameters) == ["src", "dst", "follow_symlinks"]
