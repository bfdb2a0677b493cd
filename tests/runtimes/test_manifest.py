from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memopt.cpu import CpuTarget
from memopt.errors import IntegrityError, MemoptError, UsageError
from memopt.manifest import (
    EngineInfo,
    File,
    Golden,
    Manifest,
    MemoryPoint,
    Profile,
    Stage,
    Variant,
    VariantMemory,
    decode,
    encode,
)
from memopt.tensors import DTYPE_BITS, TensorSpec

SHA = "0" * 64
PROFILE = Profile({"x": (1, 3)}, {"x": (1, 3)}, {"x": (8, 3)}, 4096)
ENGINE = EngineInfo("tensorrt-rtx", "1.7.1.116", ("sm86",), "linux", "x86_64", (PROFILE,), 10, SHA)
MEMORY = VariantMemory(10, 8, 4, (MemoryPoint(1, 5, None, 7, "by hand", "onnxruntime"),))
PLAIN = Variant("a", "dense", "fp32", "onnxruntime", "a.onnx", SHA, MEMORY, metrics={"test_top1": 0.5})
BUILT = Variant("b", "dense", "fp16", "tensorrt-rtx", "b.engine", SHA, MEMORY, engine=ENGINE, source="a")
FULL = Manifest(
    name="m",
    inputs=(TensorSpec("x", "float32", ("batch", 3)),),
    outputs=(TensorSpec("y", "float32", ("batch", 2)),),
    variants=(PLAIN, BUILT),
    files=(File("a.onnx", 10, SHA), File("b.engine", 10, SHA), File("g.npy", 1, SHA), File("h.npy", 1, SHA)),
    preprocess=({"op": "resize", "size": [2, 2]},),
    golden=Golden({"x": "g.npy"}, {"a": {"y": "h.npy"}, "b": {"y": "h.npy"}}, {"a": 0.1, "b": 0.2}),
    lineage=(Stage("train", SHA, (), {"epochs": 3}),),
)


def changed(**fields: object) -> bytes:
    plain = json.loads(encode(FULL))
    return json.dumps({key: value for key, value in (plain | fields).items() if value is not ...}).encode()


def test_a_manifest_survives_the_way_to_json_and_back() -> None:
    assert decode(encode(FULL)) == FULL
    assert encode(decode(encode(FULL))) == encode(FULL)


@given(st.text(max_size=20), st.dictionaries(st.text(max_size=8), st.floats(-1e6, 1e6), max_size=4))
def test_any_name_and_metrics_survive(name: str, metrics: dict[str, float]) -> None:
    manifest = replace(FULL, name=name, variants=(replace(PLAIN, metrics=metrics), BUILT))
    assert decode(encode(manifest)) == manifest


texts = st.text(max_size=8)
sizes = st.integers(0, 2**53)
digests = st.text("0123456789abcdef", min_size=64, max_size=64)
numbers = st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
specs = st.builds(TensorSpec, texts, st.sampled_from(list(DTYPE_BITS)), st.lists(sizes | texts, max_size=4).map(tuple))
memories = st.builds(
    VariantMemory, sizes, st.none() | sizes, st.none() | sizes,
    st.lists(
        st.builds(MemoryPoint, sizes, st.none() | sizes, st.none() | sizes, st.none() | sizes, texts, texts, texts),
        max_size=2,
    ).map(tuple),
)  # fmt: skip
shapes = st.dictionaries(texts, st.lists(sizes, min_size=1, max_size=3).map(tuple), min_size=1, max_size=2)
profiles = st.builds(lambda one, most: Profile(one, one, one, most), shapes, st.none() | sizes)
engines = st.builds(
    EngineInfo, texts, texts, st.lists(texts, max_size=2).map(tuple), texts, texts,
    st.lists(profiles, max_size=2).map(tuple), st.none() | sizes, digests, st.booleans(), st.none() | numbers,
    st.none() | sizes,
)  # fmt: skip
targets = st.builds(CpuTarget, texts, texts, st.lists(texts, min_size=1, max_size=3).map(tuple), texts)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    """Any manifest that says no nonsense: a portable variant, an engine and an optimized graph made from it."""
    paths = draw(st.lists(texts, min_size=5, max_size=8, unique_by=str.lower))
    ids = draw(st.lists(texts, min_size=3, max_size=3, unique=True))

    def variant(i: int, **made: object) -> Variant:
        return Variant(
            ids[i], *(draw(texts) for _ in range(3)), draw(st.sampled_from(paths)), draw(digests), draw(memories),
            weights=draw(st.none() | st.sampled_from(paths)), metrics=draw(st.dictionaries(texts, numbers, max_size=2)),
            **made,
        )  # fmt: skip

    inputs, outputs = (draw(st.lists(specs, max_size=2, unique_by=lambda spec: spec.name)) for _ in range(2))
    golden = Golden(
        {spec.name: draw(st.sampled_from(paths)) for spec in inputs},
        {name: {spec.name: draw(st.sampled_from(paths)) for spec in outputs} for name in ids},
        {name: draw(numbers) for name in ids},
    )
    made = {"source": ids[0]}
    return Manifest(
        name=draw(texts),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        variants=(variant(0), variant(1, engine=draw(engines), **made), variant(2, cpu=draw(targets), **made)),
        files=tuple(File(path, draw(sizes), draw(digests)) for path in paths),
        labels=draw(st.none() | st.sampled_from(paths)),
        preprocess=tuple(draw(st.lists(st.dictionaries(texts, json_values, max_size=2), max_size=2))),
        golden=draw(st.none() | st.just(golden)),
        lineage=tuple(
            draw(st.lists(st.builds(Stage, texts, texts, st.lists(texts, max_size=2).map(tuple)), max_size=2))
        ),
        producer=draw(st.dictionaries(texts, texts, max_size=2)),
        license=draw(st.none() | texts),
    )


@given(manifests())
def test_any_manifest_survives_the_way_to_json_and_back(manifest: Manifest) -> None:
    data = encode(manifest)
    assert decode(data) == manifest
    assert encode(decode(data)) == data


@settings(max_examples=300)
@given(st.data(), json_values)
def test_any_value_anywhere_is_read_or_refused(data: st.DataObject, strange: object) -> None:
    document = json.loads(encode(FULL))
    place, key = {"": document}, ""
    while isinstance(place[key], (dict, list)) and place[key] and data.draw(st.booleans() | st.just(True)):
        place = place[key]
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
    place[key] = strange
    try:
        manifest = decode(json.dumps(document).encode())
    except MemoptError as error:
        assert error.exit_code in (3, 4)
    else:
        assert decode(encode(manifest)) == manifest


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "not valid JSON"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        ("{}".encode("utf-16"), "not valid JSON"),
        (b"[]", "expected dict, got list"),
        (b"{}", "field 'name' is missing"),
        (b'{"name": "a", "name": "b"}', "'name' stands twice"),
        (b'{"name": NaN}', "NaN is not a number"),
        (b'{"name": 1e999}', "1e999 is not a number"),
        (b"[" * 100_000, "JSON"),
        (b"1" * 5000, "not valid JSON"),
        (b" " * (4 * 2**20 + 1), "at most"),
        (changed(name=3), "memopt.json.name: expected str, got int"),
        (changed(hidden=1), "unknown field 'hidden'"),
        (changed(format="zip"), "format is 'zip'"),
        (changed(schema="2.0"), "schema is 2.0"),
        (changed(files=[]), "not among its files"),
        (changed(files=[{"path": "a.onnx", "size_bytes": 1, "sha256": "abc"}]), "not among|no valid"),
        (changed(labels="none.txt"), "'none.txt', which is not among its files"),
        (changed(inputs=[{"name": "x", "dtype": "float33", "shape": []}]), "float33"),
        (changed(inputs=[{"name": "x", "dtype": "float32", "shape": [True]}]), "none of"),
    ],
)
def test_what_is_no_manifest_is_refused_with_the_reason(data: bytes, said: str) -> None:
    with pytest.raises(MemoptError, match=said) as caught:
        decode(data)
    assert caught.value.exit_code in (3, 4)


def test_variants_and_files_are_unique_and_sources_exist() -> None:
    with pytest.raises(IntegrityError, match="variant id 'a' stands twice"):
        replace(FULL, variants=(PLAIN, PLAIN))
    with pytest.raises(IntegrityError, match=r"file 'a\.onnx' stands twice"):
        replace(FULL, files=(*FULL.files, FULL.files[0]))
    with pytest.raises(IntegrityError, match="comes from 'z'"):
        replace(FULL, variants=(PLAIN, replace(BUILT, source="z")))
    with pytest.raises(IntegrityError, match="golden outputs are not those of the variants"):
        replace(FULL, golden=Golden({}, {}, {}))
    with pytest.raises(UsageError, match="no variant 'z'; hint: one of a, b"):
        FULL.variant("z")


def test_a_later_minor_schema_still_loads() -> None:
    assert decode(changed(schema="1.7")).schema == "1.7"
