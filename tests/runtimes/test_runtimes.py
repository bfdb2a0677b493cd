"""One contract for all runtimes: what `memopt.session` promises holds for each that runs on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from memopt.arena import MemoryPool
from memopt.artifact import Artifact, open_artifact
from memopt.batching import run_in_batches
from memopt.bundle import open_bundle
from memopt.errors import BackendError, InputRefused, UsageError
from memopt.runtimes import RUNTIMES, runtime
from memopt.session import Runtime, Session
from memopt.tensors import Array, TensorSpec, check_feeds
from memopt_export.graph import Graph, run_graph, save_graph


class FakeSession:
    """The tiny graph's shape, computed by numpy: the sum of each sample, times one, two, three."""

    inputs = (TensorSpec("input", "float32", ("batch", 1, 8, 8)),)
    outputs = (TensorSpec("logits", "float32", ("batch", 3)),)
    placement = "numpy"
    device_bytes: int | None = None
    device_method = "unknown: it holds nothing"
    closed = False

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        if self.closed:
            raise BackendError("the fake is closed")
        check_feeds(self.inputs, feeds)
        return [feeds["input"].sum(axis=(1, 2, 3))[:, None] * np.array([[1, 2, 3]], np.float32)]

    def trim(self) -> None:
        """It holds nothing."""

    def close(self) -> None:
        self.closed = True


@dataclass
class FakeRuntime:
    """A runtime that runs everywhere."""

    NAME: str = "fake"
    DEVICES: tuple[str, ...] = ("cpu",)

    def version(self) -> str | None:
        return "1.0"

    def load_library(self) -> None:
        pass

    def unavailable(self, device: str) -> str | None:
        return None if device == "cpu" else f"no {device} for the fake"

    def refuses(self, artifact: Artifact) -> str | None:
        return None

    def open(
        self, artifact: Artifact, *, device: str = "cpu", threads: int = 0, profile: str = "balanced",
        pool: MemoryPool | None = None,
    ) -> Session:  # fmt: skip
        reason = self.unavailable(device)
        if reason:
            raise BackendError(reason)
        return FakeSession()


@pytest.fixture(scope="session")
def onnx_file(tmp_path_factory: pytest.TempPathFactory, tiny_graph: Graph) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "tiny.onnx"
    save_graph(tiny_graph, path)
    return path


@pytest.fixture(scope="session")
def torch_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of the tiny graph's shape as an exported program, as the exporter writes it."""
    import torch

    from memopt.strict_json import to_json
    from memopt.torch_runtime import SPECS

    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3)).eval()
    shapes = ({0: torch.export.Dim("batch", min=1, max=1024)},)
    program = torch.export.export(module, (torch.zeros(2, 1, 8, 8),), dynamic_shapes=shapes)
    path = tmp_path_factory.mktemp("torch") / "tiny.pt2"
    specs = {"inputs": FakeSession.inputs, "outputs": FakeSession.outputs}
    torch.export.save(program, path, extra_files={SPECS: to_json(specs)})
    return path


def _open_onnx(request: pytest.FixtureRequest) -> tuple[Runtime, Artifact]:
    return RUNTIMES["onnxruntime"], open_artifact(request.getfixturevalue("onnx_file"))


def _open_mapped(request: pytest.FixtureRequest) -> tuple[Runtime, Artifact]:
    return RUNTIMES["onnxruntime"], open_bundle(request.getfixturevalue("tiny_bundle")).artifact("large")


def _open_torch(request: pytest.FixtureRequest) -> tuple[Runtime, Artifact]:
    return RUNTIMES["torch"], open_artifact(request.getfixturevalue("torch_program"))


def _open_fake(request: pytest.FixtureRequest) -> tuple[Runtime, Artifact]:
    return FakeRuntime(), open_artifact(request.getfixturevalue("onnx_file"))


CASES: dict[str, Callable[[pytest.FixtureRequest], tuple[Runtime, Artifact]]] = {
    "fake": _open_fake,
    "onnxruntime": _open_onnx,
    "onnxruntime-mapped": _open_mapped,
    "torch": _open_torch,
}


@pytest.fixture(params=CASES)
def opened(request: pytest.FixtureRequest) -> tuple[Runtime, Artifact]:
    return CASES[request.param](request)


@pytest.fixture
def session(opened: tuple[Runtime, Artifact]) -> Iterator[Session]:
    kind, artifact = opened
    made = kind.open(artifact, device="cpu", threads=1)
    yield made
    made.close()


def test_specs_name_what_goes_in_and_out(session: Session) -> None:
    assert session.inputs == FakeSession.inputs
    assert session.outputs == FakeSession.outputs
    assert session.placement


@pytest.mark.parametrize("batch", [1, 5, 32])
def test_any_batch_runs_and_the_outputs_are_the_callers(session: Session, tiny_inputs: Array, batch: int) -> None:
    first = session.run({"input": tiny_inputs[:batch]})
    kept = first[0].copy()
    session.run({"input": -tiny_inputs[:batch]})
    assert first[0].shape == (batch, 3)
    assert first[0].dtype == np.float32
    assert np.array_equal(first[0], kept)


def test_a_trimmed_session_runs_as_before(session: Session, tiny_inputs: Array) -> None:
    before = session.run({"input": tiny_inputs})
    session.trim()
    assert np.array_equal(session.run({"input": tiny_inputs})[0], before[0])
    session.trim()
    session.trim()


def test_what_is_held_on_a_device_is_told_with_a_method_or_a_reason(session: Session) -> None:
    assert session.device_bytes is not None or session.device_method.startswith("unknown: ")


def test_a_split_run_equals_a_whole_one(session: Session, tiny_inputs: Array) -> None:
    whole = session.run({"input": tiny_inputs})
    split = run_in_batches(session, {"input": tiny_inputs}, batch=7)
    np.testing.assert_allclose(split[0], whole[0], rtol=1e-5, atol=1e-6)


def test_eight_threads_share_one_session(session: Session, tiny_inputs: Array) -> None:
    expected = [session.run({"input": tiny_inputs[i : i + 1]})[0] for i in range(32)]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda i: session.run({"input": tiny_inputs[i % 32 : i % 32 + 1]})[0], range(128)))
    assert all(np.array_equal(got[i], expected[i % 32]) for i in range(128))


def test_arrays_that_are_not_contiguous_run(session: Session, tiny_inputs: Array) -> None:
    flipped = tiny_inputs[::-1]
    assert not flipped.flags.c_contiguous
    np.testing.assert_allclose(
        session.run({"input": flipped})[0], session.run({"input": tiny_inputs})[0][::-1], rtol=1e-5
    )


@pytest.mark.parametrize(
    ("feeds", "said"),
    [
        ({"input": [[1.0]]}, "expects an array, got list"),
        ({"input": np.zeros((1, 1, 8, 8), ">f4")}, "has the other byte order, >f4"),
        ({}, r"inputs are \[\], the model expects \['input'\]"),
        ({"x": np.zeros((1, 1, 8, 8), np.float32)}, r"inputs are \['x'\]"),
        ({"input": np.zeros((1, 1, 8, 8))}, "expects float32, got float64"),
        ({"input": np.zeros((1, 8, 8), np.float32)}, r"expects shape \(batch, 1, 8, 8\), got \(1, 8, 8\)"),
        ({"input": np.zeros((1, 1, 8, 9), np.float32)}, r"got \(1, 1, 8, 9\)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(session: Session, feeds: dict[str, Array], said: str) -> None:
    with pytest.raises(InputRefused, match=said):
        session.run(feeds)


def test_use_after_close_is_refused(opened: tuple[Runtime, Artifact], tiny_inputs: Array) -> None:
    kind, artifact = opened
    made = kind.open(artifact)
    made.close()
    made.close()
    with pytest.raises(BackendError, match="is closed"):
        made.run({"input": tiny_inputs})


def test_a_device_that_is_not_there_is_refused_and_never_replaced(opened: tuple[Runtime, Artifact]) -> None:
    kind, artifact = opened
    reason = kind.unavailable("cuda")
    if reason is None:
        pytest.skip("this machine has a working CUDA device, so nothing is refused")
    with pytest.raises(BackendError) as caught:
        kind.open(artifact, device="cuda")
    assert str(caught.value) == reason


def test_a_silent_fallback_of_the_library_is_found_out(
    onnx_file: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from memopt import ort_runtime

    if ort_runtime.unavailable("cuda") is None:
        pytest.skip("this machine has a working CUDA device, so nothing falls back")
    monkeypatch.setattr(ort_runtime, "unavailable", lambda device: None)  # as if the driver were there
    for device in ("cuda", "tensorrt"):
        with pytest.raises(BackendError, match=r"fell back to CPUExecutionProvider, .*ExecutionProvider was asked for"):
            ort_runtime.open(open_artifact(onnx_file), device=device)


def test_mapped_and_inlined_weights_compute_the_same(
    onnx_file: Path, tiny_bundle: Path, tiny_graph: Graph, tiny_inputs: Array
) -> None:
    mapped = RUNTIMES["onnxruntime"].open(open_bundle(tiny_bundle).artifact("large"))
    inlined = RUNTIMES["onnxruntime"].open(open_artifact(onnx_file))
    assert np.array_equal(mapped.run({"input": tiny_inputs})[0], inlined.run({"input": tiny_inputs})[0])
    np.testing.assert_allclose(
        mapped.run({"input": tiny_inputs})[0], run_graph(tiny_graph, {"input": tiny_inputs})[0], rtol=1e-5
    )


def test_an_older_onnxruntime_reads_the_weights_from_files_that_vanish(
    tiny_bundle: Path, tiny_inputs: Array, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    artifact = open_bundle(tiny_bundle).artifact("large")
    expected = RUNTIMES["onnxruntime"].open(artifact).run({"input": tiny_inputs})[0]
    monkeypatch.delattr(onnxruntime.SessionOptions, "add_external_initializers_from_files_in_memory")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    session = RUNTIMES["onnxruntime"].open(artifact)
    assert not list(tmp_path.iterdir())
    assert np.array_equal(session.run({"input": tiny_inputs})[0], expected)


def test_runtimes_refuse_what_they_do_not_open(onnx_file: Path, torch_program: Path) -> None:
    assert RUNTIMES["onnxruntime"].refuses(open_artifact(torch_program)) == "onnxruntime opens .onnx, not .pt2"
    assert RUNTIMES["torch"].refuses(open_artifact(onnx_file)) == "torch opens .pt2, not .onnx"
    with pytest.raises(BackendError, match=r"opens \.onnx"):
        RUNTIMES["onnxruntime"].open(open_artifact(torch_program))


def test_a_broken_model_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"not a model")
    with pytest.raises(BackendError, match=r"onnxruntime cannot open x\.onnx") as caught:
        RUNTIMES["onnxruntime"].open(open_artifact(tmp_path / "x.onnx"))
    assert "\n" not in str(caught.value)
    (tmp_path / "x.pt2").write_bytes(b"not a program")
    with pytest.raises(InputRefused, match="does not name its inputs"):
        RUNTIMES["torch"].open(open_artifact(tmp_path / "x.pt2"))


@pytest.mark.slow
def test_a_compiled_program_computes_what_an_eager_one_does(torch_program: Path, tiny_inputs: Array) -> None:
    artifact = open_artifact(torch_program)
    eager = RUNTIMES["torch"].open(artifact)
    compiled = RUNTIMES["torch"].open(artifact, profile="fast")
    assert (eager.placement, compiled.placement) == ("torch cpu", "torch cpu, compiled")
    for batch in (1, 7, 32):
        feeds = {"input": tiny_inputs[:batch]}
        np.testing.assert_allclose(compiled.run(feeds)[0], eager.run(feeds)[0], rtol=1e-4, atol=1e-5)


def test_an_unknown_profile_is_refused_by_every_runtime(torch_program: Path, onnx_file: Path) -> None:
    for name, path in (("torch", torch_program), ("onnxruntime", onnx_file)):
        with pytest.raises(UsageError, match="profile 'slow' is not known"):
            RUNTIMES[name].open(open_artifact(path), profile="slow")


def test_an_unknown_runtime_is_refused_with_the_names() -> None:
    with pytest.raises(UsageError, match="'tvm' is not known; hint: one of torch, onnxruntime"):
        runtime("tvm")
