"""Graphs optimized for this processor: the same answers, almost no private memory, and only where they belong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import memopt
from memopt import ort_runtime
from memopt.archive import PAGE
from memopt.bundle import open_bundle
from memopt.choice import choose
from memopt.compare import cells, subjects
from memopt.cpu import CpuTarget, this_cpu
from memopt.errors import BackendError, InputRefused, IntegrityError, UsageError
from memopt.manifest import decode, encode
from memopt.probe import Request, measure
from memopt.tensors import Array
from memopt_export.graph import Graph, run_graph
from memopt_export.pack import Contents, OnnxPart, pack
from memopt_export.recipe import Recipe
from memopt_export.specialize import optimize, specialize

OTHERS = {
    "another library": {"onnxruntime": "0.9"},
    "a smaller processor": {"isa": ("sse2",)},
    "another system": {"os": "plan9"},
}


@pytest.fixture(scope="module")
def contents(tiny_contents: Contents) -> Contents:
    """The tiny variants, the accurate one optimized for this processor too."""
    large, small = tiny_contents.graphs
    return replace(tiny_contents, parts=(large, specialize(large), small))


@pytest.fixture(scope="module")
def bundle(contents: Contents, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("specialized") / "x.mopt"
    pack(contents, path)
    return path


@pytest.fixture(scope="module")
def here() -> CpuTarget:
    target = this_cpu(ort_runtime.version() or "")
    assert target is not None
    return target


def elsewhere(contents: Contents, path: Path, **unlike: object) -> Path:
    """A bundle whose optimized graph was made on another machine."""
    parts = [
        replace(part, cpu=replace(part.cpu, **unlike)) if isinstance(part, OnnxPart) and part.cpu else part
        for part in contents.parts
    ]
    pack(replace(contents, parts=tuple(parts)), path)
    return path


def test_the_optimized_graph_is_taken_where_it_belongs_and_says_why(
    bundle: Path, here: CpuTarget, tiny_inputs: Array
) -> None:
    with memopt.load(bundle, device="cpu") as model:
        assert model.variant == f"large-{here.key}"
        assert model.why[-1].endswith("optimized for this processor")
        got = model(tiny_inputs)
        assert model.fit_batch("64MiB").batch == 32  # as far as the portable graph was measured
    with memopt.load(bundle, device="cpu", variant="large") as portable:
        np.testing.assert_allclose(got, portable(tiny_inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("unlike", OTHERS.values(), ids=OTHERS.keys())
def test_elsewhere_the_portable_graph_serves_and_why_says_so(
    contents: Contents, tmp_path: Path, unlike: dict[str, object], here: CpuTarget, tiny_inputs: Array
) -> None:
    path = elsewhere(contents, tmp_path / "x.mopt", **unlike)
    with memopt.load(path, device="cpu") as model:
        assert model.variant == "large"
        assert any(line.startswith(f"large-{here.key}: optimized ") for line in model.why)
        assert model(tiny_inputs).shape == (32, 3)
    with pytest.raises(BackendError, match="optimized"):
        memopt.load(path, device="cpu", variant=f"large-{here.key}")


def test_it_is_opened_as_it_is_with_its_weights_mapped(bundle: Path, here: CpuTarget, tiny_inputs: Array) -> None:
    artifact = open_bundle(bundle).artifact(f"large-{here.key}")
    assert artifact.weights is not None
    assert np.frombuffer(artifact.weights, np.uint8).ctypes.data % PAGE == 0
    session = ort_runtime.open(artifact)
    options = session._opened.session.get_session_options()
    assert options.graph_optimization_level.name == "ORT_DISABLE_ALL"
    assert options.get_session_config_entry("session.disable_prepacking") == "1"
    assert session.run({"input": tiny_inputs})[0].shape == (32, 3)


def test_int8_is_packed_anew_at_load_for_its_kernels_read_no_plain_weights(
    cnn: Callable, samples_of: Callable, tmp_path: Path
) -> None:
    from memopt_export.quantize import quantize

    graph = cnn().graph()
    samples = samples_of(graph)
    part = OnnxPart("int8", "cnn", quantize(graph, Recipe("int8", "cpu"), samples).graph)
    made = specialize(part)
    pack(Contents("x", (part, made), golden_inputs=samples.feeds), tmp_path / "x.mopt")
    session = ort_runtime.open(open_bundle(tmp_path / "x.mopt").artifact(made.id))
    entries = session._opened.session.get_session_options()
    with pytest.raises(RuntimeError, match="disable_prepacking"):
        entries.get_session_config_entry("session.disable_prepacking")
    got, expected = session.run(samples.feeds)[0], run_graph(part.graph, samples.feeds)[0]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_it_holds_less_private_memory_than_the_portable_graph(
    net: Callable, samples_of: Callable, tmp_path: Path, here: CpuTarget
) -> None:
    wide = net(64, 8, 8)
    for _ in range(4):
        wide.conv(512)
    graph = wide.graph()  # 7 MiB and more of weights, which the portable graph copies into another layout
    part = OnnxPart("wide", "wide", graph)
    pack(Contents("wide", (part, specialize(part))), tmp_path / "x.mopt")
    np.save(tmp_path / "x.npy", samples_of(graph, 1).feeds["x"])
    request = Request(
        str(tmp_path / "x.mopt"), "onnxruntime", "cpu", 1, {"x": str(tmp_path / "x.npy")}, variant="wide", runs=3
    )
    portable, optimized = (
        measure(replace(request, variant=name)).bill.phases["load"].private_bytes
        for name in ("wide", f"wide-{here.key}")
    )
    weights = sum(graph.weights_bytes().values())
    assert portable is not None
    assert optimized is not None
    assert portable > weights
    assert optimized < weights / 4


def test_optimizing_is_deterministic_and_keeps_what_the_graph_promises(tiny_graph: Graph) -> None:
    one, other = optimize(tiny_graph), optimize(tiny_graph)
    assert one.data == other.data
    assert (one.inputs, one.outputs, one.weights_sha256) == (
        tiny_graph.inputs, tiny_graph.outputs, tiny_graph.weights_sha256
    )  # fmt: skip
    assert one.data != tiny_graph.data


def test_what_cannot_be_optimized_is_refused(tiny_graph: Graph) -> None:
    model = tiny_graph.copy_model()
    model.graph.node[0].op_type = "Conw"
    with pytest.raises(InputRefused, match="onnxruntime cannot optimize the graph"):
        optimize(tiny_graph.with_model(model))


def test_without_a_known_processor_there_is_nothing_to_specialize_for(
    tiny_contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memopt_export.specialize.this_cpu", lambda version: None)
    with pytest.raises(BackendError, match="cannot be read; hint: pack without --specialize"):
        specialize(tiny_contents.graphs[0])


def test_an_optimized_graph_stands_beside_its_portable_one_and_computes_the_same(
    contents: Contents, tmp_path: Path, tiny_inputs: Array
) -> None:
    large, made, small = contents.graphs
    with pytest.raises(UsageError, match="is packed without large"):
        replace(contents, parts=(small, made))
    wrong = replace(made, graph=optimize(small.graph))
    with pytest.raises(InputRefused, match=r"differs from large by .*, .* is allowed"):
        pack(replace(contents, parts=(large, wrong)), tmp_path / "x.mopt")
    assert not list(tmp_path.iterdir())


def test_the_manifest_carries_the_target_and_refuses_one_without_a_source(bundle: Path, here: CpuTarget) -> None:
    manifest = open_bundle(bundle).manifest
    variant = manifest.variant(f"large-{here.key}")
    assert (variant.cpu, variant.source) == (here, "large")
    assert decode(encode(manifest)) == manifest
    document = json.loads(encode(manifest))
    document["variants"][1].pop("source")
    with pytest.raises(IntegrityError, match="is optimized for a processor, but is no graph with a source"):
        decode(json.dumps(document).encode())
    document["variants"][1]["source"] = variant.id
    with pytest.raises(IntegrityError, match="which is no portable variant of the bundle"):
        decode(json.dumps(document).encode())


def test_it_never_runs_on_a_gpu(bundle: Path, here: CpuTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_runtime, "unavailable", lambda device: None)  # as if there were a GPU
    opened = open_bundle(bundle)
    chosen = choose(opened, device="cuda")
    assert chosen.variant.id == "large"
    assert f"large-{here.key}: not for cuda" in chosen.why
    with pytest.raises(BackendError, match="is optimized for a processor and does not run on cuda"):
        ort_runtime.open(opened.artifact(f"large-{here.key}"), device="cuda")
    todo = cells(subjects([bundle]), batches=(1,), runtimes=["onnxruntime"])
    assert [cell.device for cell in todo if cell.subject.variant == f"large-{here.key}"] == ["cpu"]


def test_elsewhere_it_keeps_its_row_in_a_comparison_with_the_reason(
    contents: Contents, tmp_path: Path, here: CpuTarget, tiny_inputs: Array
) -> None:
    from memopt.compare import Given, compare
    from memopt.judgement import Judgement

    path = elsewhere(contents, tmp_path / "x.mopt", onnxruntime="0.9")
    todo = cells(subjects([path]), batches=(1,), devices=["cpu"], runtimes=["onnxruntime"])
    rows = {row.name: row for row in compare(todo, Given({"input": tiny_inputs}), Judgement()).rows}
    assert rows["large"].p50_ms
    assert "optimized by onnxruntime 0.9" in (rows[f"large-{here.key}"].reason or "")
