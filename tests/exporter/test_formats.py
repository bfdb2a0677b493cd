"""Formats of others that `pack` writes: held against the libraries that read them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import text_format

from memopt.errors import InputRefused, UsageError
from memopt.manifest import EngineInfo, Profile
from memopt.tensors import Array
from memopt_export import pbtxt
from memopt_export.formats import FOREIGN, FORMATS, write
from memopt_export.graph import Graph, load_graph, run_graph
from memopt_export.inspection import inspect
from memopt_export.ort_package import is_package, read_package
from memopt_export.pack import Contents, EnginePart, OnnxPart
from memopt_export.signing import generate
from memopt_export.specialize import specialize
from memopt_export.triton import is_repository, read_repository

SHAPES = [{"input": (batch, 1, 8, 8)} for batch in (1, 2, 4)]


@pytest.fixture(scope="module")
def contents(tiny_contents: Contents) -> Contents:
    """The tiny variants, one optimized for this processor, and an engine of each flavor."""
    large, small = tiny_contents.graphs
    info = EngineInfo(
        "tensorrt", "11.4.0.106", ("sm90",), "linux", "x86_64", (Profile(*SHAPES, 4096),), 1000, large.graph.sha256
    )
    engines = [
        EnginePart(f"large-{ending}", "tiny", "fp32", b"engine bytes", replace(info, flavor=flavor), "large")
        for ending, flavor in (("trt", "tensorrt"), ("rtx", "tensorrt-rtx"))
    ]
    return replace(tiny_contents, parts=(large, small, specialize(large), *engines))


@pytest.fixture(scope="module")
def repository(contents: Contents, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("triton") / "models"
    write("triton", contents, path)
    return path


@pytest.fixture(scope="module")
def package(contents: Contents, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ort") / "package"
    write("ort", contents, path)
    return path


def files_of(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_repository_has_a_versioned_folder_for_each_model(repository: Path) -> None:
    assert sorted(files_of(repository)) == [
        "large-trt/1/model.plan", "large-trt/LICENSE", "large-trt/config.pbtxt", "large-trt/labels.txt",
        "large/1/model.onnx", "large/1/weights.data", "large/LICENSE", "large/config.pbtxt", "large/labels.txt",
        "small/1/model.onnx", "small/LICENSE", "small/config.pbtxt", "small/labels.txt",
    ]  # fmt: skip
    assert (repository / "small" / "labels.txt").read_text() == "zero\none\ntwo\n"


@pytest.mark.parametrize(
    ("model", "backend", "file", "largest"),
    [
        ("large", "onnxruntime", "model.onnx", 32),
        ("small", "onnxruntime", "model.onnx", 32),
        ("large-trt", "tensorrt", "model.plan", 4),
    ],
)
def test_triton_reads_the_configuration(repository: Path, model: str, backend: str, file: str, largest: int) -> None:
    from tritonclient.grpc import model_config_pb2 as triton

    config = text_format.Parse((repository / model / "config.pbtxt").read_text(), triton.ModelConfig())
    assert (config.name, config.backend, config.default_model_filename) == (model, backend, file)
    assert (config.max_batch_size, config.HasField("dynamic_batching")) == (largest, True)
    (given,), (returned,) = config.input, config.output
    assert (given.name, given.data_type, list(given.dims)) == ("input", triton.TYPE_FP32, [1, 8, 8])
    assert (returned.name, returned.data_type, list(returned.dims)) == ("logits", triton.TYPE_FP32, [3])
    assert returned.label_filename == "labels.txt"
    assert (repository / model / "1" / config.default_model_filename).is_file()


def test_tensors_that_are_no_batch_keep_their_dims(net: Callable, tmp_path: Path) -> None:
    from tritonclient.grpc import model_config_pb2 as triton

    part = OnnxPart("fixed", "x", Graph(_of_two(net), "0" * 64))
    write("triton", Contents("x", (part,)), tmp_path / "models")
    config = text_format.Parse((tmp_path / "models/fixed/config.pbtxt").read_text(), triton.ModelConfig())
    assert (config.max_batch_size, config.HasField("dynamic_batching")) == (0, False)
    assert list(config.input[0].dims) == [2, 3, 8, 8]
    assert not config.output[0].label_filename


def _of_two(net: Callable):
    drawn = net(3, 8, 8)
    drawn.conv(4)
    model = drawn.model()
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = 2
    return model


@pytest.mark.parametrize("form", FOREIGN)
def test_the_graphs_that_are_written_compute_the_same(
    form: str, repository: Path, package: Path, contents: Contents, tiny_inputs: Array
) -> None:
    for part in contents.graphs[:2]:
        path = repository / part.id / "1" if form == "triton" else package / "tiny" / part.id
        graph = load_graph(path / "model.onnx")  # a foreign file, weights beside it: it passes the pre-flight
        got, expected = (run_graph(each, {"input": tiny_inputs})[0] for each in (graph, part.graph))
        assert np.array_equal(got, expected)


def test_a_package_names_its_variants_the_reference_first(package: Path, contents: Contents) -> None:
    assert list(files_of(package)) == [
        "manifest.json", "tiny/LICENSE", "tiny/component.json", "tiny/large/model.onnx", "tiny/large/weights.data",
        "tiny/small/model.onnx",
    ]  # fmt: skip
    manifest = json.loads((package / "manifest.json").read_text())
    assert (manifest["schema_version"], manifest["layout"], manifest["components"]) == (
        "1.0", "portable", {"tiny": "tiny"}
    )  # fmt: skip
    component = json.loads((package / "tiny" / "component.json").read_text())
    assert list(component["variants"]) == ["large", "small", "large-cuda", "small-cuda"]
    for variant in component["variants"].values():
        model = variant["executor_info"]["ort"]["model_file"]
        assert (package / "tiny" / variant["variant_directory"] / model).is_file()
    assert component["additional_metadata"]["labels"] == ["zero", "one", "two"]


def test_what_a_format_cannot_hold_is_left_out_with_the_reason(contents: Contents, tmp_path: Path) -> None:
    optimized = contents.parts[2].id
    triton, ort = (write(form, contents, tmp_path / form) for form in ("triton", "ort"))
    assert triton.variants == ("large", "small", "large-trt")
    assert triton.left_out == {
        optimized: "left out, a server may have another processor",
        "large-rtx": "left out, Triton has no backend for tensorrt-rtx",
    }
    assert ort.variants == ("large", "small", "large-cuda", "small-cuda")
    assert ort.left_out == {
        "large-trt": "left out, a model package holds no TensorRT engines",
        "large-rtx": "left out, a model package holds no TensorRT engines",
        optimized: "left out, ONNX Runtime would take it on any CPU",
    }


@pytest.mark.parametrize("form", FORMATS)
def test_equal_contents_give_equal_bytes_and_are_replaced_as_a_whole(
    form: str, contents: Contents, tmp_path: Path
) -> None:
    target = tmp_path / "a"
    write(form, contents, target)
    before = files_of(tmp_path)
    with pytest.raises(UsageError, match=r"exists; hint: --force"):
        write(form, contents, target)
    write(form, contents, target, force=True)
    assert files_of(tmp_path) == before
    write(form, replace(contents, labels=("a", "b", "c")), target, force=True)
    assert files_of(tmp_path) != before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("form", FOREIGN)
def test_a_folder_of_another_kind_is_never_replaced(
    form: str, contents: Contents, repository: Path, package: Path, tmp_path: Path
) -> None:
    (tmp_path / "precious").write_text("a user's own file")
    for folder in (tmp_path, package if form == "triton" else repository):
        before = files_of(folder)
        with pytest.raises(UsageError, match="and nothing else"):
            write(form, contents, folder, force=True)
        assert files_of(folder) == before


@pytest.mark.parametrize("form", FOREIGN)
def test_only_bundles_are_signed(form: str, contents: Contents, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"--format {form} has no signatures, only a bundle has"):
        write(form, contents, tmp_path / "x", sign=generate())
    assert not list(tmp_path.iterdir())


def test_inspect_tells_the_forms_apart(repository: Path, package: Path) -> None:
    served, packaged = inspect(repository), inspect(package)
    assert (served.kind, packaged.kind) == ("Triton model repository", "ONNX Runtime model package")
    assert served.parts[0] == {
        "model": "large",
        "backend": "onnxruntime",
        "largest batch": "32",
        "inputs": "input TYPE_FP32 (1, 8, 8)",
        "outputs": "logits TYPE_FP32 (3)",
    }
    assert packaged.parts[0] == {
        "variant": "large", "component": "tiny", "provider": "CPUExecutionProvider", "device": "cpu"
    }  # fmt: skip
    for found, folder in ((served, repository), (packaged, package)):
        assert found.size_bytes == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        assert found.facts["digests"] == "none, so nothing to verify"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b'name: "x', "line 1 is no text of protobuf"),
        (b"input {", "it is cut: '}' is missing"),
        (b"input [ {name: 'a'} ", "it is cut"),
        (b"name:", "it is cut"),
        (b"name: }", "'}' stands where a value has to"),
        (b": 3", "':' stands where a field's name has to"),
        (b"a: 1 }", "'}' stands where a field's name has to"),
        (b"a {" * 100_000, "nested deeper than 32"),
        (b"a: [" * 100_000, "':' stands where a value has to"),
        (b"a: " + b"[" * 100_000, "'[' stands where a value has to"),
        (b"\xff", "it cannot be read as text"),
        (b"#" * (2**20 + 1), "more than 1048576 bytes"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_configuration_that_is_none_is_refused(tmp_path: Path, text: bytes, said: str) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.pbtxt").write_bytes(text)
    assert is_repository(tmp_path)
    with pytest.raises(InputRefused, match=r"config\.pbtxt: ") as caught:
        read_repository(tmp_path)
    assert said in str(caught.value)


def test_text_of_protobuf_is_read_as_protobuf_reads_it() -> None:
    from tritonclient.grpc import model_config_pb2 as triton

    text = """
    # as people write it
    name: 'it\\'s' "\\"two\\"" ; platform: "onnxruntime_onnx"
    input [ { name: "a", data_type: TYPE_FP32, dims: [ -1, 3 ] }, < name: "b" dims: 4 > ]
    output { name: "c" } output { name: "d" }
    """
    ours, theirs = pbtxt.read(text), text_format.Parse(text, triton.ModelConfig())
    assert ours["name"] == [theirs.name] == ['it\'s"two"']
    assert [[*map(int, each["dims"])] for each in ours["input"]] == [list(each.dims) for each in theirs.input]
    assert [each["name"][0] for each in ours["output"]] == [each.name for each in theirs.output]


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        (b"[]", "expected dict"),
        (b"{", "not valid JSON"),
        (b'{"schema_version": "1.0", "components": {}, "x": 1}', "unknown field 'x'"),
        (b'{"schema_version": "2.0", "components": {}}', "schema 2.0 is not known"),
        (b'{"schema_version": "1.0", "components": {"m": "../m"}}', "outside the package"),
        (b'{"schema_version": "1.0", "components": {"m": "/etc"}}', "outside the package"),
        (b'{"schema_version": "1.0", "components": {"m": "link"}}', "outside the package"),
        (b'{"schema_version": "1.0", "components": {"m": "m"}}', "cannot be read"),
        (b'{"schema_version": "1.0", "components": {"m": 3}}', "expected dict, got int"),
        (b" " * (2**20 + 1), "more than 1048576 bytes"),
    ],
)
def test_a_package_that_is_none_is_refused(tmp_path: Path, manifest: bytes, said: str) -> None:
    (tmp_path / "link").symlink_to("/")
    (tmp_path / "manifest.json").write_bytes(manifest)
    assert not is_package(tmp_path)
    with pytest.raises(InputRefused, match=said):
        read_package(tmp_path)


def test_a_component_may_be_written_out_in_the_manifest(tmp_path: Path) -> None:
    inline = {"schema_version": "1.3", "components": {"m": {"variants": {"cpu": {"ep": "CPUExecutionProvider"}}}}}
    (tmp_path / "manifest.json").write_text(json.dumps(inline))
    assert inspect(tmp_path).parts[0]["provider"] == "CPUExecutionProvider"


def test_names_that_cannot_be_folders_are_refused(contents: Contents, tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=r"'\.\./x' cannot name a folder"):
        write("ort", replace(contents, name="../x"), tmp_path / "x")
    with pytest.raises(InputRefused, match="which Triton does not know"):
        write("triton", _with_an_odd_type(contents), tmp_path / "x")
    assert not list(tmp_path.iterdir())


def _with_an_odd_type(contents: Contents) -> Contents:
    from onnx import TensorProto

    model = contents.graphs[0].graph.copy_model()
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT8E4M3FN
    return Contents("x", (OnnxPart("odd", "x", contents.graphs[0].graph.with_model(model)),))
