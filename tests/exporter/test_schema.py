from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import memopt
from memopt.bundle import MANIFEST, open_bundle
from memopt.errors import MemoptError
from memopt.manifest import SCHEMA, decode, encode
from memopt_export.schema import schema

OLD = Path(__file__).parent.parent / "runtimes" / "golden"
# Manifests of every schema there was, each packed by the memopt of its time.
BUNDLES = sorted(OLD.glob("schema-*.mopt"))


@pytest.fixture(scope="module")
def validator() -> Any:
    from jsonschema import Draft202012Validator

    document = json.loads(resources.files("memopt").joinpath("memopt.schema.json").read_text())
    Draft202012Validator.check_schema(document)
    return Draft202012Validator(document)


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    """A manifest with an engine, golden samples and a lineage, as JSON values."""
    return json.loads(bytes(open_bundle(OLD / "schema-1.0.mopt").entries[MANIFEST]))


def test_the_published_schema_is_the_generated_one() -> None:
    published = resources.files("memopt").joinpath("memopt.schema.json").read_text()
    assert published == schema(), "python -m memopt_export.schema > runtimes/memopt/memopt.schema.json"


def test_what_is_packed_is_valid(tiny_bundle: Path, validator: Any) -> None:
    validator.validate(json.loads(bytes(open_bundle(tiny_bundle).entries[MANIFEST])))


@pytest.mark.parametrize("path", BUNDLES, ids=[path.stem for path in BUNDLES])
def test_bundles_of_old_schemas_are_valid_and_run(path: Path, validator: Any) -> None:
    bundle = open_bundle(path)
    validator.validate(json.loads(bytes(bundle.entries[MANIFEST])))
    assert decode(encode(bundle.manifest)) == bundle.manifest
    with memopt.load(path, device="cpu") as model:
        assert (model.variant, model.labels) == ("plain", ("zero", "one", "two"))
        (got,) = model.run(None, bundle.golden_inputs())
    np.testing.assert_allclose(got, bundle.golden_outputs("plain")[0], rtol=1e-5)


def test_the_first_schema_and_todays_have_their_fixture() -> None:
    assert BUNDLES[0].name == "schema-1.0.mopt"
    assert f"schema-{SCHEMA}.mopt" in [path.name for path in BUNDLES]
    assert sum(path.stat().st_size for path in BUNDLES) < 60_000


GONE = object()
BAD: list[tuple[tuple[str | int, ...], Any]] = [
    (("name",), GONE),
    (("name",), 3),
    (("name",), None),
    (("hidden",), 1),
    (("format",), "zip"),
    (("schema",), "2.0"),
    (("schema",), "10.0"),
    (("inputs",), {}),
    (("inputs", 0, "dtype"), "float33"),
    (("inputs", 0, "shape"), ["batch", -1]),
    (("inputs", 0, "shape"), ["batch", 1.5]),
    (("inputs", 0, "shape"), ["batch", True]),
    (("inputs", 0, "scale"), 1),
    (("files", 0, "sha256"), "abc"),
    (("files", 0, "sha256"), "A" * 64),
    (("files", 0, "size_bytes"), -1),
    (("files", 0, "size_bytes"), "1"),
    (("files", 0, "size_bytes"), GONE),
    (("labels",), 1),
    (("preprocess",), [1]),
    (("producer",), {"onnx": 1}),
    (("golden",), {}),
    (("golden", "atol", "plain"), "small"),
    (("golden", "outputs", "plain", "logits"), 1),
    (("lineage", 0, "parents"), "a"),
    (("lineage", 0, "settings"), []),
    (("variants", 0, "memory"), GONE),
    (("variants", 0, "memory", "file_bytes"), 1.5),
    (("variants", 0, "memory", "measured", 0, "batch"), True),
    (("variants", 0, "metrics", "validation_top1"), "good"),
    (("variants", 0, "weights"), 5),
    (("variants", 0, "weights_sha256"), GONE),
    (("variants", 1, "engine", "targets"), "sm86"),
    (("variants", 1, "engine", "upper_bound"), 1),
    (("variants", 1, "engine", "plugins"), ["x.so"]),
    (("variants", 1, "engine", "profiles", 0, "min"), {}),
    (("variants", 1, "engine", "profiles", 0, "min", "input"), [-1]),
    (("variants", 1, "engine", "profiles", 0, "min", "input"), []),
]


@pytest.mark.parametrize(("path", "value"), BAD, ids=[f"{path} {value!r}"[:60] for path, value in BAD])
def test_reader_and_schema_refuse_the_same(
    plain: dict[str, Any], validator: Any, path: tuple[str | int, ...], value: Any
) -> None:
    assert validator.is_valid(plain)
    document = json.loads(json.dumps(plain))
    place: Any = document
    for step in path[:-1]:
        place = place[step]
    if value is GONE:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    assert not validator.is_valid(document)
    with pytest.raises(MemoptError) as caught:
        decode(json.dumps(document).encode())
    assert caught.value.exit_code in (3, 4)


@pytest.mark.parametrize("name", ["labels", "golden", "license"])
def test_reader_and_schema_take_null_where_nothing_is_known(plain: dict[str, Any], validator: Any, name: str) -> None:
    document = plain | {name: None}
    assert validator.is_valid(document)
    assert getattr(decode(json.dumps(document).encode()), name) is None
