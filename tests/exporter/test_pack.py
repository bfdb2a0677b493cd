from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

import memopt
from memopt.archive import PAGE
from memopt.bundle import open_bundle
from memopt.errors import InputRefused, IntegrityError, UsageError
from memopt.manifest import EngineInfo, Profile
from memopt.preprocess import prepare
from memopt.tensors import Array
from memopt_export.external_weights import SMALLEST_FILE_BYTES, split
from memopt_export.graph import Graph, load_graph, run_graph
from memopt_export.pack import Contents, EnginePart, OnnxPart, pack

PROFILE = Profile({"input": (1, 1, 8, 8)}, {"input": (1, 1, 8, 8)}, {"input": (4, 1, 8, 8)}, 4096)


def engine_part(source: OnnxPart) -> EnginePart:
    info = EngineInfo("tensorrt-rtx", "1.7.1.116", ("sm86",), "linux", "x86_64", (PROFILE,), 1000, source.graph.sha256)
    return EnginePart(f"{source.id}-rtx", source.network, "fp32", b"engine bytes", info, source.id)


def test_equal_contents_give_equal_bytes(tiny_contents: Contents, tiny_bundle: Path, tmp_path: Path) -> None:
    pack(tiny_contents, tmp_path / "again.mopt")
    assert (tmp_path / "again.mopt").read_bytes() == tiny_bundle.read_bytes()


def test_every_variant_says_where_it_comes_from_and_what_it_needs(tiny_bundle: Path, tiny_graph: Graph) -> None:
    variant = open_bundle(tiny_bundle).manifest.variant("large")
    assert variant.weights_sha256 == tiny_graph.weights_sha256
    assert variant.memory.weights_bytes == sum(tiny_graph.weights_bytes().values())
    assert variant.memory.activation_bytes is not None
    assert variant.memory.activation_bytes > 0
    assert len(variant.memory.measured) == 2


def test_weights_that_variants_share_are_stored_once(
    tiny_contents: Contents, tiny_bundle: Path, tiny_inputs: Array, tmp_path: Path
) -> None:
    large, small = tiny_contents.graphs
    model = large.graph.copy_model()
    model.graph.node[-1].name = "renamed"  # another graph on the same weights
    twin = replace(large, id="twin", graph=large.graph.with_model(model))
    pack(replace(tiny_contents, parts=(large, small, twin)), tmp_path / "x.mopt")
    bundle = open_bundle(tmp_path / "x.mopt")
    paths = [bundle.manifest.variant(name).weights for name in ("large", "twin", "small")]
    weights = split(large.graph, "weights.data")[1]
    assert paths[0] == paths[1] == f"shared/sha256-{hashlib.sha256(weights).hexdigest()[:16]}.data"
    assert paths[2] is None
    assert (tmp_path / "x.mopt").stat().st_size < tiny_bundle.stat().st_size + len(weights) / 4
    expected = run_graph(large.graph, {"input": tiny_inputs})[0]
    for name in ("large", "twin"):
        with memopt.load(tmp_path / "x.mopt", device="cpu", variant=name) as opened:
            np.testing.assert_allclose(opened(tiny_inputs), expected, rtol=1e-5)


def test_the_licence_travels_as_text(tiny_contents: Contents, tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    assert bundle.manifest.license_file == "LICENSE"
    assert b"Apache License" in bytes(bundle.entries["LICENSE"])
    pack(replace(tiny_contents, license="MIT", license_text="You may.\n"), tmp_path / "own.mopt")
    assert bytes(open_bundle(tmp_path / "own.mopt").entries["LICENSE"]) == b"You may.\n"
    pack(replace(tiny_contents, license="MIT"), tmp_path / "none.mopt")
    assert open_bundle(tmp_path / "none.mopt").manifest.license_file is None


def test_the_bill_of_materials_names_model_files_and_tools(tiny_contents: Contents, tmp_path: Path) -> None:
    tools = {"torch": "2.15.0+cpu", "onnx": "1.23.2"}
    pack(replace(tiny_contents, tools=tools), tmp_path / "x.mopt")
    bundle = open_bundle(tmp_path / "x.mopt")
    bill = json.loads(bytes(bundle.entries[bundle.manifest.sbom]))
    assert (bill["bomFormat"], bill["specVersion"], bill["version"]) == ("CycloneDX", "1.6", 1)
    assert re.fullmatch(r"urn:uuid:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", bill["serialNumber"])
    assert "timestamp" not in bill["metadata"]
    model = bill["metadata"]["component"]
    assert (model["name"], model["licenses"]) == ("tiny", [{"license": {"id": "Apache-2.0"}}])
    listed = {tool["name"]: tool["purl"] for tool in bill["metadata"]["tools"]["components"]}
    assert listed["torch"] == "pkg:pypi/torch@2.15.0%2Bcpu"
    assert listed.keys() == {"memopt", "torch", "onnx"}
    hashes = {f["name"]: f["hashes"][0]["content"] for each in bill["components"] for f in each["components"]}
    promised = {file.path: file.sha256 for file in bundle.manifest.files if file.path.startswith("variants/")}
    assert hashes == promised
    references = [c["bom-ref"] for each in bill["components"] for c in (each, *each["components"])]
    assert len(references) == len(set(references))
    assert set(bill["dependencies"][0]["dependsOn"]) <= set(references)


def test_a_licence_expression_is_no_id(tiny_contents: Contents, tmp_path: Path) -> None:
    pack(replace(tiny_contents, license="MIT OR Apache-2.0"), tmp_path / "x.mopt")
    bill = json.loads(bytes(open_bundle(tmp_path / "x.mopt").entries["sbom.cdx.json"]))
    assert bill["metadata"]["component"]["licenses"] == [{"expression": "MIT OR Apache-2.0"}]


def test_weights_of_one_variant_lie_beside_its_graph(tiny_bundle: Path) -> None:
    assert open_bundle(tiny_bundle).manifest.variant("large").weights == "variants/large/weights.data"


def test_an_engine_is_packed_with_the_graph_it_comes_from(tiny_contents: Contents, tmp_path: Path) -> None:
    engine = engine_part(tiny_contents.graphs[0])
    pack(replace(tiny_contents, parts=(*tiny_contents.parts, engine)), tmp_path / "x.mopt")
    bundle = open_bundle(tmp_path / "x.mopt")
    assert bytes(bundle.artifact("large-rtx").data) == b"engine bytes"
    assert bundle.manifest.variant("large-rtx").source == "large"
    assert np.array_equal(bundle.golden_outputs("large-rtx")[0], bundle.golden_outputs("large")[0])


def test_engines_without_their_graph_are_refused(tiny_contents: Contents, tmp_path: Path) -> None:
    engine = engine_part(tiny_contents.graphs[0])
    with pytest.raises(UsageError, match="at least one ONNX variant"):
        Contents("x", (engine,))
    alone = replace(tiny_contents, parts=(tiny_contents.parts[1], engine))
    with pytest.raises(InputRefused, match="was built from large, which is not packed"):
        pack(alone, tmp_path / "x.mopt")
    other = replace(engine, info=replace(engine.info, onnx_sha256="0" * 64))
    with pytest.raises(InputRefused, match="from another graph than large"):
        pack(replace(tiny_contents, parts=(*tiny_contents.parts, other)), tmp_path / "x.mopt")
    assert not list(tmp_path.iterdir())


def test_variants_have_the_same_inputs_and_safe_names(tiny_contents: Contents, tiny_graph: Graph) -> None:
    model = tiny_graph.copy_model()
    model.graph.output[0].name = model.graph.node[-1].output[0] = "scores"
    with pytest.raises(InputRefused, match="other has other inputs or outputs than large"):
        replace(tiny_contents, parts=(tiny_contents.parts[0], OnnxPart("other", "tiny", tiny_graph.with_model(model))))
    with pytest.raises(UsageError, match="cannot name a variant"):
        Contents("x", (OnnxPart("../x", "tiny", tiny_graph),))


def test_labels_are_as_many_as_classes_and_variants_are_called_once(tiny_contents: Contents) -> None:
    with pytest.raises(InputRefused, match="2 labels for 3 classes"):
        replace(tiny_contents, labels=("zero", "one"))
    with pytest.raises(InputRefused, match=r"label 'o\\nne' has more than one line"):
        replace(tiny_contents, labels=("zero", "o\nne", "two"))
    with pytest.raises(UsageError, match="two variants are called 'large'; hint: rename one"):
        replace(tiny_contents, parts=(tiny_contents.parts[0], tiny_contents.parts[0]))


def test_an_engines_bytes_are_checked_even_when_verification_is_off(
    tiny_contents: Contents, tmp_path: Path, flipped: Callable
) -> None:
    path = tmp_path / "x.mopt"
    pack(replace(tiny_contents, parts=(*tiny_contents.parts, engine_part(tiny_contents.graphs[0]))), path)
    data = path.read_bytes()
    path.write_bytes(flipped(data, data.index(b"engine bytes"), 0))
    bundle = open_bundle(path, verify="off")
    with pytest.raises(IntegrityError, match=r"large-rtx/model\.engine is damaged"):
        bundle.artifact("large-rtx")


def test_an_output_that_exists_is_kept(tiny_contents: Contents, tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exists; hint: --force"):
        pack(tiny_contents, tiny_bundle)
    (tmp_path / "precious").write_text("a user's own file")
    with pytest.raises(UsageError, match="and nothing else"):
        pack(tiny_contents, tmp_path, form="dir", force=True)
    assert (tmp_path / "precious").exists()


def test_a_folder_may_be_replaced_by_a_folder(tiny_contents: Contents, tmp_path: Path) -> None:
    for _ in range(2):
        pack(tiny_contents, tmp_path / "x", form="dir", force=True)
    assert open_bundle(tmp_path / "x").manifest.name == "tiny"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


def test_split_weights_are_aligned_complete_and_compute_the_same(
    tiny_graph: Graph, tiny_inputs: Array, tmp_path: Path
) -> None:
    model, weights = split(tiny_graph, "weights.data")
    (tmp_path / "x.onnx").write_bytes(model)
    (tmp_path / "weights.data").write_bytes(weights)
    whole = load_graph(tmp_path / "x.onnx")
    assert np.array_equal(run_graph(whole, {"input": tiny_inputs})[0], run_graph(tiny_graph, {"input": tiny_inputs})[0])
    lean = onnx.load_model_from_string(model)
    external = [tensor for tensor in lean.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    offsets = {t.name: int({e.key: e.value for e in t.external_data}["offset"]) for t in external}
    assert offsets["fc1.weight"] % PAGE == 0
    assert len(model) < 4096
    assert len(tiny_graph.model.graph.initializer[2].raw_data) == 64 * 512 * 4  # the graph itself is untouched


def test_a_graph_with_little_to_move_stays_whole(tiny_contents: Contents) -> None:
    small = tiny_contents.graphs[1].graph
    assert sum(small.weights_bytes().values()) < SMALLEST_FILE_BYTES
    assert split(small, "weights.data") == (small.data, b"")


def test_pictures_that_are_not_those_of_the_inputs_are_refused(tiny_contents: Contents, tmp_path: Path) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (4, 9, 9, 1)).astype(np.uint8)
    with pytest.raises(InputRefused, match="does not make the golden inputs of the golden pictures"):
        pack(replace(tiny_contents, golden_pictures=pictures), tmp_path / "x.mopt")
    inputs = {"input": prepare(pictures, tiny_contents.preprocess)}
    pack(replace(tiny_contents, golden_pictures=pictures, golden_inputs=inputs), tmp_path / "x.mopt")
    assert np.array_equal(open_bundle(tmp_path / "x.mopt").golden_pictures(), pictures)
