"""The command line as a user types it: what it answers, on which stream, with which exit code."""

from __future__ import annotations

import hashlib
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from memopt_export import cli
from memopt_export.graph import Graph, save_graph
from memopt_export.pack import Contents, pack
from memopt_export.signing import generate
from memopt_models.checkpoint import read_metadata


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str


@pytest.fixture
def type_(capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """Types a command in this process and returns the answer."""

    def run(*words: object) -> Answer:
        with pytest.raises(SystemExit) as ended:
            cli.main([str(word) for word in words])
        captured = capsys.readouterr()
        return Answer(int(ended.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_graph: Graph, tiny_bundle: Path) -> Path:
    """A folder with a model, its data, a bundle, and things that are none."""
    path = tmp_path_factory.mktemp("cli")
    save_graph(tiny_graph, path / "tiny.onnx")
    rng = np.random.default_rng(0)
    np.savez(path / "data.npz", input=rng.normal(size=(40, 1, 8, 8)).astype(np.float32), labels=rng.integers(0, 3, 40))
    (path / "tiny.mopt").write_bytes(tiny_bundle.read_bytes())
    (path / "empty.onnx").write_bytes(b"")
    (path / "page.onnx").write_bytes(b"<html>not found</html>")
    (path / "lfs.onnx").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    (path / "cut.onnx").write_bytes((path / "tiny.onnx").read_bytes()[:1000])
    (path / "cut.mopt").write_bytes(tiny_bundle.read_bytes()[:-100])
    (path / "other.txt").write_text("text")
    (path / "binary").write_bytes(b"\xff")
    (path / "stranger.pub").write_bytes(generate().public_file())
    (path / "bad\x1b[31m.onnx").write_bytes(b"x")
    return path


COMMANDS = (
    "compare", "distill", "doctor", "engine", "export", "inspect", "keygen", "pack", "pipeline", "plan", "prune", "qat",
    "quantize", "run", "simplify", "train", "verify",
)  # fmt: skip


def test_every_command_is_there_and_helps(type_: Callable[..., Answer]) -> None:
    listed = re.findall(r"^  (\w+)  ", type_("--help").out, re.MULTILINE)
    assert tuple(listed) == COMMANDS
    for command in COMMANDS:
        answer = type_(command, "--help")
        assert answer.code == 0
        assert "--json" in answer.out


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys; sys.argv = ['memopt-export', 'quantize', '--help']\n"
        "from memopt_export.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'onnx', 'onnxruntime', 'numpy', 'rich', 'sklearn') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


REFUSED = [
    (("inspect", "none.onnx"), 3, "none.onnx does not exist"),
    (("inspect", "empty.onnx"), 3, "empty.onnx is not a valid ONNX model"),
    (("inspect", "page.onnx"), 3, "page.onnx is not a valid ONNX model"),
    (("inspect", "cut.onnx"), 3, "cut.onnx is not a valid ONNX model"),
    (("inspect", "lfs.onnx"), 3, "lfs.onnx is not a valid ONNX model"),
    (("inspect", "other.txt"), 3, "other.txt cannot be inspected; hint: one of *.onnx"),
    (("inspect", "."), 3, "is a folder without memopt.json"),
    (("inspect", "cut.mopt"), 4, "cut.mopt: not a bundle, or its end is missing"),
    (("verify", "tiny.onnx"), 3, "tiny.onnx is not a memopt bundle"),
    (("verify", "cut.mopt"), 4, "cut.mopt"),
    (("verify", "tiny.mopt", "--key", "none.pub"), 3, "none.pub cannot be read"),
    (("verify", "tiny.mopt", "--key", "other.txt"), 4, "other.txt: the public key is cut or damaged"),
    (("verify", "tiny.mopt", "--key", "stranger.pub"), 4, "tiny.mopt: it is not signed"),
    (("verify", "tiny.mopt", "--require-signature"), 2, "without a key proves nothing; hint: --key KEY.pub"),
    (("run", "tiny.mopt", "none.png", "--key", "stranger.pub"), 4, "tiny.mopt: it is not signed"),
    (("keygen", "-o", "my.key"), 2, "the passphrase is empty; hint: --passphrase-file"),
    (("keygen", "-o", "other.txt", "--passphrase-file", "stranger.pub"), 2, "other.txt exists"),
    (("keygen", "-o", "my.key", "--passphrase-file", "empty.onnx"), 2, "the passphrase is empty"),
    (("keygen", "-o", "my.key", "--passphrase-file", "binary"), 3, "binary cannot be read as text"),
    (("pack", "tiny.onnx", "-o", "x.mopt", "--sign", "stranger.pub"), 3, "stranger.pub is no private key"),
    (("pack", "tiny.onnx", "-o", "x.mopt", "--sign", "none.key"), 3, "none.key cannot be read"),
    (("plan", "page.onnx"), 3, "not a valid ONNX model"),
    (("plan", "tiny.onnx", "--batch", "0"), 2, "'0' is no list of batches"),
    (("plan", "tiny.onnx", "--budget", "12QB"), 2, "'12QB' is not a size"),
    (("plan", "tiny.onnx", "--budget", "1KiB"), 1, "tiny.onnx does not fit into the budget"),
    (("plan", "tiny.onnx", "--bathc", "1"), 2, "No such option '--bathc'"),
    (("plan", "tiny.onnx", "--dim", "length"), 2, "'length' is no size of a dimension; type sequence=128"),
    (("plan", "tiny.onnx", "--dim", "length=4"), 2, "no input has a free dimension called 'length'; hint: batch"),
    (("plan", "tiny.onnx", "--reorder", "other.onnx"), 1, "no order of tiny.onnx is known that needs less"),
    (("plan", "tiny.onnx", "--svg", "page.onnx"), 2, "page.onnx exists"),
    (("plna",), 2, "No such command 'plna'"),
    (("plan",), 2, "Missing argument 'MODEL'"),
    (("quantize", "tiny.onnx", "-o", "q.onnx"), 2, "--data SPEC"),
    (("quantize", "tiny.onnx", "-o", "q.onnx", "--data", "imagenot"), 2, "'imagenot' is not known"),
    (("quantize", "tiny.onnx", "-o", "q.onnx", "--data", "digits"), 3, "(batch, 1, 8, 8)"),
    (("quantize", "tiny.onnx", "-o", "q.onnx", "--precision", "int3"), 2, "precision 'int3' is not known"),
    (("quantize", "tiny.onnx", "-o", "tiny.onnx", "--data", "data.npz"), 2, "tiny.onnx exists; hint: --force"),
    (("quantize", "tiny.onnx", "-o", "q.onnx", "--target", "gpu"), 2, "target 'gpu' is not known; hint: one of cpu"),
    (("quantize", "tiny.onnx", "-o", "q.onnx", "--correction", "gtpq"), 2, "correction 'gtpq' is not known"),
    (("quantize", "tiny.onnx", "-o", "q.onnx", "--weight-bits", "4"), 2, "weight_bits is 4; hint: 8, or 7"),
    (
        ("quantize", "tiny.onnx", "-o", "q.onnx", "--percentile", "99"),
        2,
        "calibration mse; hint: --calibration percent",
    ),
    (("quantize", "tiny.onnx", "-o", "q.onnx", "--max-drop", "1"), 2, "--max-drop needs samples; hint: --data SPEC"),
    (("quantize", "tiny.onnx", "-o", "q.onnx", "--min-sqnr", "30"), 2, "--min-sqnr needs samples; hint: --data SPEC"),
    (("quantize", "tiny.onnx", "-o", "q.onnx", "--sensitivity"), 2, "--sensitivity needs samples; hint: --data SPEC"),
    (("quantize", "tiny.onnx", "-o", "q.onnx", "--memory-limit", "1GiB"), 2, "--memory-limit needs samples"),
    (("quantize", "tiny.onnx", "-o", "q.onnx", "--memory-limit", "much"), 2, "'much' is not a size"),
    (("quantize", "tiny.onnx", "-o", "q.onnx", "--data", "data.npz", "--exclude", "cnov"), 2, "no node 'cnov'"),
    (("quantize", "tiny.onnx", "-o", "q.onnx", "--data", "data.npz", "--include", "cnov"), 2, "no node 'cnov'"),
    (("quantize", "tiny.onnx", "-o", "q.onnx", "--recipe", "none.toml"), 3, "recipe none.toml cannot be read"),
    (("quantize", "tiny.onnx", "-o", "q.onnx", "--recipe", "other.txt"), 3, "other.txt is not TOML"),
    (("quantize", "tiny.onnx", "-o", "q.onnx", "--save-recipe", "other.txt"), 2, "other.txt exists; hint: --force"),
    (("quantize", "tiny.onnx", "-o", "q.onnx", "--save-recipe", "q.onnx"), 2, "q.onnx is named twice"),
    (("engine", "tiny.onnx", "-o", "e.engine", "--target", "sm99"), 2, "sm99"),
    (("engine", "tiny.onnx", "-o", "e.engine", "--target", "sm75"), 1, "no target can take"),
    (("engine", "tiny.onnx", "-o", "e.engine", "--batch", "1,2"), 2, "--batch 1,2 is no profile"),
    (("pack", "other.txt", "-o", "x.mopt"), 2, "other.txt cannot be packed"),
    (("pack", "page.onnx", "-o", "x.mopt"), 3, "not a valid ONNX model"),
    (("run", "tiny.mopt", "other.txt"), 3, "other.txt"),
    (("run", "tiny.mopt", "none.png"), 3, "'none.png' cannot be read"),
    (("run", "tiny.mopt", "none.png", "--device", "npu"), 2, "device 'npu' is not known"),
    (("run", "tiny.mopt", "none.png", "--device", "tensorrt"), 5, "nothing that runs on tensorrt"),
    (("run", "tiny.mopt", "none.png", "--memory-limit", "1MiB"), 6, "large needs 8.06 MiB at batch 1, limit 1.00 MiB"),
    (("compare", "tiny.onnx", "--runtimes", "tvm", "--data", "data.npz"), 2, "runtime 'tvm' is not known"),
    (("compare", "tiny.onnx", "--data", "none.npz"), 3, "none.npz"),
    (("compare", "tiny.onnx", "--data", "data.npz", "--devices", "gpu"), 2, "device 'gpu' is not known"),
    (("pack", "tiny.onnx", "--labels", "other.txt", "-o", "x.mopt"), 3, "1 labels for 3 classes"),
    (("export", "none.safetensors", "-o", "x.onnx"), 3, "none.safetensors"),
    (("export", "other.txt", "-o", "x.onnx"), 3, "other.txt"),
    (("export", "no.such:module", "--data", "digits", "-o", "x.onnx"), 2, "no.such"),
    (("train", "--network", "simple_cmn", "-o", "x.safetensors"), 2, "simple_cnn"),
    (("train", "--epochs", "0", "-o", "x.safetensors"), 2, "epochs is 0"),
    (("train", "--batch-size", "some", "-o", "x.safetensors"), 2, "'some' is neither a positive number nor auto"),
    (("train", "--accumulate", "65", "-o", "x.safetensors"), 2, "a batch of 64 has not so many parts"),
    (("train", "--precision", "fp8", "-o", "x.safetensors"), 2, "precision 'fp8' is not known"),
    (("train", "--max-memory", "much", "-o", "x.safetensors"), 2, "'much' is not a size"),
    (("train", "--setting", "width", "-o", "x.safetensors"), 2, "--setting 'width' is not NAME=VALUE"),
    (("train", "--classes", "3", "-o", "x.safetensors"), 2, "data 'digits' has 10 classes, not 3; hint: --classes 10"),
    (("train", "--in-channels", "3", "-o", "x.safetensors"), 2, "has 1 channels, not 3; hint: --in-channels 1"),
    (("train", "--weights", "none.pt", "-o", "x.safetensors"), 3, "none.pt does not exist; hint: --weights FILE, or"),
    (("train", "--weights", "other.txt", "-o", "x.safetensors"), 3, "other.txt"),
    (("train", "--weights", "imagenet", "-o", "x.safetensors"), 2, "network 'simple_cnn' has no ImageNet weights"),
    (("train", "--weights", "a", "--start", "b", "-o", "x.safetensors"), 2, "hint: either --start or --weights"),
    (("prune", "none.safetensors", "--ratio", "1.5", "-o", "x.safetensors"), 2, "ratio is 1.5"),
    (("pipeline", "nope"), 3, "recipe 'nope' is no file"),
]


@pytest.mark.parametrize(("words", "code", "said"), REFUSED, ids=[" ".join(words) for words, _, _ in REFUSED])
def test_a_bad_request_gets_one_line_and_its_exit_code_and_leaves_nothing(
    type_: Callable[..., Answer], folder: Path, monkeypatch: pytest.MonkeyPatch,
    words: Sequence[str], code: int, said: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(folder)
    before = sorted(path.name for path in folder.iterdir())
    answer = type_(*words)
    lines = [line for line in answer.err.splitlines() if line.startswith("memopt-export: error:")]
    assert answer.code == code
    assert len(lines) == 1
    assert said in lines[0]
    assert "Traceback" not in answer.err
    assert sorted(path.name for path in folder.iterdir()) == before


def test_control_characters_of_a_file_name_do_not_reach_the_terminal(
    type_: Callable[..., Answer], folder: Path
) -> None:
    answer = type_("inspect", folder / "bad\x1b[31m.onnx")
    assert answer.code == 3
    assert "\x1b" not in answer.err
    assert "\\x1b[31m.onnx" in answer.err


def test_an_error_with_json_is_a_document_too(type_: Callable[..., Answer]) -> None:
    answer = type_("inspect", "none.onnx", "--json")
    assert json.loads(answer.out) == {"error": {"exit_code": 3, "problem": "none.onnx does not exist"}}


def test_a_bug_keeps_its_traceback(type_: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ZeroDivisionError("by hand")

    monkeypatch.setattr("memopt_export.commands.doctor", fail)
    answer = type_("doctor")
    assert answer.code == 70
    assert "Traceback" in answer.err
    assert "this is a bug of memopt" in answer.err


def test_the_way_of_one_model(type_: Callable[..., Answer], folder: Path, tmp_path: Path) -> None:
    """quantize, engine, pack, inspect, verify, run, compare: each with --json, each on what the last one made."""
    data, model = ("--data", folder / "data.npz"), tmp_path / "tiny.onnx"
    model.write_bytes((folder / "tiny.onnx").read_bytes())

    def document(*words: object) -> dict:
        answer = type_(*words, "--json")
        assert answer.code == 0, answer.err
        return json.loads(answer.out)

    quantized = document("quantize", model, *data, "--samples", 32, "-o", tmp_path / "int8.onnx")
    verdict = quantized["verdict"]
    assert verdict["size_bytes"] == (tmp_path / "int8.onnx").stat().st_size
    assert verdict["float_bytes"] == model.stat().st_size
    assert verdict["fused"][0] == verdict["fused"][1]
    assert verdict["sqnr_db"] > 15
    assert {verdict["samples"], verdict["source"]} == {20, "data.npz/validation"}
    assert verdict["measured"]["p50_ms"] / verdict["float_measured"]["p50_ms"] == verdict["latency_ratio"]
    half = document("quantize", model, "--precision", "fp16", "-o", tmp_path / "fp16.onnx")
    assert half["precision"] == "fp16"
    built = document("engine", tmp_path / "fp16.onnx", "--target", "sm86,sm75", "-o", tmp_path / "fp16.engine")
    assert built["info"]["targets"] == ["sm86", "sm75"]
    planned = document("plan", model, "--batch", "1,8", "--budget", "4MiB", "--svg", tmp_path / "plan.svg", "--measure")
    for each, (batch, measured) in zip(planned["plans"], planned["measured"], strict=True):
        assert each["batch"] == batch
        assert 0.9 * measured <= each["activation_bytes"] <= measured + max(each["scratch"]) + 4096
    one, eight = (each["activation_bytes"] - max(each["scratch"]) for each in planned["plans"])
    assert 7 * one < eight <= 8 * one + max(planned["plans"][0]["scratch"])
    assert planned["largest_batch"] >= 8
    assert (tmp_path / "plan.svg").read_text().startswith("<svg")
    parts = (model, tmp_path / "int8.onnx", tmp_path / "fp16.onnx", tmp_path / "fp16.engine")
    packed = document("pack", *parts, "--name", "tiny", *data, "-o", tmp_path / "tiny.mopt")
    assert packed["variants"] == ["tiny", "int8", "fp16", "fp16-rtx"]
    assert document("inspect", tmp_path / "tiny.mopt")["kind"] == "memopt bundle"
    verified = document("verify", tmp_path / "tiny.mopt", "--run")
    held = [replay["variant"] for replay in verified["replays"] if not replay["excused"]]
    assert set(held) >= {"tiny", "int8", "fp16"}
    words = ("compare", tmp_path / "tiny.mopt", *data, "--batch", 2, "--runtimes", "onnxruntime", "--devices", "cpu")
    compared = document(*words)
    *measured, engine = compared["rows"]
    assert [row["name"] for row in measured] == ["tiny", "int8", "fp16"]
    assert all(row["private_bytes"] and row["p50_ms"] for row in measured)
    assert engine["reason"] == "tensorrt-rtx was not asked for"


@pytest.mark.parametrize("secret", ["file", "environment"])
def test_a_bundle_is_signed_and_checked(
    type_: Callable[..., Answer], folder: Path, tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch,
    secret: str,
) -> None:  # fmt: skip
    key, bundle, public = tmp_path / "my.key", tmp_path / "x.mopt", tmp_path / "my.key.pub"
    (tmp_path / "words").write_text("secret words\n")
    words = ("--passphrase-file", tmp_path / "words") if secret == "file" else ()
    if secret == "environment":
        monkeypatch.setenv("MEMOPT_PASSPHRASE", "secret words")
    made = json.loads(type_("keygen", "-o", key, *words, "--json").out)
    assert key.stat().st_mode & 0o777 == 0o600
    data = ("--data", folder / "data.npz")
    packed = type_("pack", folder / "tiny.onnx", *data, "-o", bundle, "--sign", key, *words)
    assert f"by key {made['key_id']}" in packed.out
    assert f"signature holds, by key {made['key_id']}" in type_(
        "verify", bundle, "--key", public, "--key", folder / "stranger.pub", "--require-signature", "--run"
    ).out  # fmt: skip
    assert f"signed by {made['key_id']}, not checked" in type_("verify", bundle).out
    assert json.loads(type_("inspect", bundle, "--json").out)["facts"]["signed"].startswith(f"by {made['key_id']}")
    refused = type_("run", bundle, picture, "--key", folder / "stranger.pub")
    assert refused.code == 4
    answer = type_("verify", bundle, "--key", folder / "stranger.pub")
    assert answer.code == 4
    assert f"signed by key {made['key_id']}, trusted: " in answer.err
    assert type_("verify", bundle, "--key", key).code == 4
    assert "not signed" in type_("verify", folder / "tiny.mopt").out


def test_every_format_is_packed_inspected_and_told_apart_by_verify(
    type_: Callable[..., Answer], folder: Path, tmp_path: Path
) -> None:
    from memopt_export.formats import FORMATS

    kinds = {"mopt": "memopt bundle", "dir": "memopt bundle", "triton": "Triton model repository",
             "ort": "ONNX Runtime model package"}  # fmt: skip
    assert tuple(kinds) == FORMATS
    assert f"[{'|'.join(FORMATS)}]" in type_("pack", "--help").out
    for form, kind in kinds.items():
        path = tmp_path / f"tiny.{form}"
        packed = type_("pack", folder / "tiny.onnx", "--specialize", "local", "--format", form, "-o", path)
        assert packed.code == 0, packed.err
        ours = kind == "memopt bundle"
        assert (": left out, " in packed.out) is not ours
        assert f"next: memopt-export {'verify' if ours else 'inspect'} {path}" in packed.out
        assert f", {kind}, " in type_("inspect", path).out
        verified = type_("verify", path)
        assert verified.code == (0 if ours else 3)
        assert ours or "is a folder without memopt.json, so not a bundle" in verified.err


def test_a_specialized_bundle_holds_here(type_: Callable[..., Answer], folder: Path, tmp_path: Path) -> None:
    words = ("--data", folder / "data.npz", "--specialize", "local", "-o", tmp_path / "x.mopt")
    (name, made) = json.loads(type_("pack", folder / "tiny.onnx", *words, "--json").out)["variants"]
    parts = {part["variant"]: part for part in json.loads(type_("inspect", tmp_path / "x.mopt", "--json").out)["parts"]}
    assert parts[name]["only_on"] is None
    assert parts[made]["only_on"].startswith(made.removeprefix("tiny-"))
    replays = json.loads(type_("verify", tmp_path / "x.mopt", "--run", "--json").out)["replays"]
    assert {replay["variant"] for replay in replays if "max_difference" in replay} == {name, made}


def test_what_gains_nothing_is_not_specialized_and_said(
    type_: Callable[..., Answer], folder: Path, tmp_path: Path
) -> None:
    data = ("--data", folder / "data.npz")
    assert type_("quantize", folder / "tiny.onnx", *data, "-o", tmp_path / "int8.onnx").code == 0
    words = ("pack", folder / "tiny.onnx", tmp_path / "int8.onnx", *data, "--specialize", "local", "-o")
    packed = json.loads(type_(*words, tmp_path / "x.mopt", "--json").out)
    assert [name.partition("-")[0] for name in packed["variants"]] == ["tiny", "int8", "tiny"]
    why = "not specialized: int8 weights are packed anew at every load, optimized or not"
    assert packed["left_out"] == {"int8": why}
    assert f"int8: {why}" in type_(*words, tmp_path / "y.mopt").out


def test_a_licence_file_is_packed(type_: Callable[..., Answer], folder: Path, tmp_path: Path) -> None:
    words = ("pack", folder / "tiny.onnx", "--license", "MIT", "-o", tmp_path / "x.mopt")
    assert type_(*words, "--license-file", folder / "other.txt").code == 0
    assert json.loads(type_("inspect", tmp_path / "x.mopt", "--json").out)["facts"]["license"] == "MIT, text included"
    assert type_(*words, "--force", "--license-file", folder / "binary").code == 3


def test_a_wrong_passphrase_leaves_no_bundle(type_: Callable[..., Answer], folder: Path, tmp_path: Path) -> None:
    (tmp_path / "words").write_text("secret words")
    (tmp_path / "other").write_text("other words")
    type_("keygen", "-o", tmp_path / "my.key", "--passphrase-file", tmp_path / "words")
    bundle = tmp_path / "x.mopt"
    answer = type_(
        "pack", folder / "tiny.onnx", "-o", bundle, "--sign", tmp_path / "my.key", "--passphrase-file",
        tmp_path / "other",
    )  # fmt: skip
    assert answer.code == 3
    assert "my.key cannot be unlocked" in answer.err
    assert not bundle.exists()


def test_a_graph_that_the_preflight_refuses_keeps_a_row_and_is_not_opened(
    type_: Callable[..., Answer], folder: Path
) -> None:
    words = ("compare", folder / "tiny.onnx", folder / "page.onnx", "--data", folder / "data.npz", "--batch", 1)
    answer = type_(*words, "--json")
    assert answer.code == 0
    measured, refused = json.loads(answer.out)["rows"]
    assert measured["p50_ms"] > 0
    assert "page.onnx is not a valid ONNX model" in refused["reason"]


def test_pictures_are_classified(type_: Callable[..., Answer], folder: Path, picture: Path) -> None:
    answer = type_("run", folder / "tiny.mopt", picture, "--device", "cpu")
    assert answer.code == 0
    assert re.match(rf"{re.escape(str(picture))}  (zero|one|two) \d+\.\d%", answer.out)
    assert "on onnxruntime cpu" in answer.err


def test_verification_that_differs_exits_with_one(
    type_: Callable[..., Answer], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from memopt.bundle import Bundle

    golden = Bundle.golden_outputs
    monkeypatch.setattr(Bundle, "golden_outputs", lambda self, name: [array + 1 for array in golden(self, name)])
    answer = type_("verify", folder / "tiny.mopt", "--run")
    assert answer.code == 1
    assert "outputs differ" in answer.out
    assert "gives other outputs here" in answer.err


def test_a_variant_that_cannot_be_opened_does_not_hold(
    type_: Callable[..., Answer], tiny_contents: Contents, tmp_path: Path
) -> None:
    pack(tiny_contents, tmp_path / "x", form="dir")
    graph = tmp_path / "x" / "variants" / "small" / "graph.onnx"
    garbage = bytes(len(graph.read_bytes()))
    before = hashlib.sha256(graph.read_bytes()).hexdigest()
    graph.write_bytes(garbage)
    manifest = tmp_path / "x" / "memopt.json"
    manifest.write_text(manifest.read_text().replace(before, hashlib.sha256(garbage).hexdigest()))
    answer = type_("verify", tmp_path / "x", "--run")
    assert answer.code == 1
    assert "onnxruntime cannot open small" in answer.out


def test_what_a_bundle_holds_does_not_steer_the_terminal(
    type_: Callable[..., Answer], tiny_contents: Contents, tmp_path: Path, picture: Path
) -> None:
    labels = ("\x1b]0;owned\x07", "\x1b[31mred", "two")
    pack(replace(tiny_contents, labels=labels), tmp_path / "x.mopt")
    for words in (("run", tmp_path / "x.mopt", picture, "--device", "cpu"), ("inspect", tmp_path / "x.mopt")):
        answer = type_(*words)
        assert answer.code == 0
        assert "\x1b" not in answer.out + answer.err


def test_a_no_without_a_result_is_a_document_with_json(
    type_: Callable[..., Answer], folder: Path, tmp_path: Path
) -> None:
    words = (
        "train",
        "--learning-rate",
        "1e30",
        "--epochs",
        1,
        "--threads",
        1,
        "-o",
        tmp_path / "x.safetensors",
        "--json",
    )
    answer = type_(*words)
    assert answer.code == 1
    assert json.loads(answer.out)["error"]["exit_code"] == 1


def test_a_training_says_what_it_holds_and_its_checkpoint_how_it_was_made(
    type_: Callable[..., Answer], tmp_path: Path
) -> None:
    output = tmp_path / "x.safetensors"
    options = ("--batch-size", "auto", "--accumulate", 2, "--precision", "bf16", "--checkpointing", "blocks")
    answer = type_("train", "--epochs", 1, "--threads", 1, *options, "--max-memory", "64GiB", "-o", output)
    assert answer.code == 0
    assert re.search(r"train epoch 1/1  loss .* validation .*  peak \d+", answer.err)
    (stage,) = read_metadata(output)["lineage"]
    used = stage["settings"]
    assert (used["batch_size"], used["accumulate"], used["precision"], used["checkpointing"]) == (
        64,
        2,
        "bf16",
        "blocks",
    )
    assert used["max_memory_bytes"] == 64 * 2**30
    assert len(used["memory"]["peak_bytes"]["train"]) == 1


def test_a_checkpoint_cannot_name_code_to_run(type_: Callable[..., Answer], tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "canary.py").write_text("import pathlib\npathlib.Path('sung').touch()\ndef data(): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert type_("train", "--epochs", 1, "--threads", 1, "-o", "x.safetensors").code == 0
    data = (tmp_path / "x.safetensors").read_bytes()
    named = data.replace(b'\\"digits\\"', b'\\"a:bcde\\"')
    assert named != data
    (tmp_path / "x.safetensors").write_bytes(named)
    answer = type_("export", "x.safetensors", "-o", "x.onnx")
    assert answer.code == 2
    assert "names no data set; hint: --data SPEC" in answer.err


@pytest.fixture
def fixed(folder: Path, tiny_graph: Graph, tmp_path: Path) -> Path:
    """The tiny graph with a batch of four, as exporters without dynamic shapes write it."""
    model = tiny_graph.copy_model()
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = 4
    save_graph(tiny_graph.with_model(model), tmp_path / "fixed.onnx")
    return tmp_path / "fixed.onnx"


def test_a_graph_of_a_fixed_batch_is_quantized_and_packed(
    type_: Callable[..., Answer], folder: Path, fixed: Path
) -> None:
    data = ("--data", folder / "data.npz")
    answer = type_("quantize", fixed, *data, "-o", fixed.with_name("int8.onnx"))
    assert answer.code == 0, answer.err
    assert "on 20 samples of data.npz/validation" in answer.out
    assert type_("pack", fixed, *data, "-o", fixed.with_suffix(".mopt")).code == 0


def test_an_output_never_replaces_what_it_is_made_from(type_: Callable[..., Answer], folder: Path, fixed: Path) -> None:
    before = fixed.read_bytes()
    for words in (("quantize", fixed, "--precision", "fp16"), ("pack", fixed)):
        answer = type_(*words, "-o", fixed, "--force")
        assert answer.code == 2
        assert "is what it would be made from; hint: -o fixed-new.onnx" in answer.err
    assert fixed.read_bytes() == before


def test_doctor_says_what_works_and_why_another_does_not(type_: Callable[..., Answer]) -> None:
    found = json.loads(type_("doctor", "--json").out)
    assert found["runtimes"]["onnxruntime"].get("cpu") is None
    for devices in found["runtimes"].values():
        assert all(reason is None or len(reason) > 10 for reason in devices.values())
    assert "works" in type_("doctor").out


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_it_with_its_code_and_leaves_no_half_file(tmp_path: Path, number: int, code: int) -> None:
    words = ["train", "--epochs", "1000", "-o", str(tmp_path / "x.safetensors")]
    command = [sys.executable, "-m", "memopt_export", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        next(line for line in child.stderr if "epoch 1/" in line)
        child.send_signal(number)
        started = time.monotonic()
        rest = child.stderr.read()
    assert child.returncode == code
    assert time.monotonic() - started < 10
    assert "memopt-export: error: " in rest
    assert "Traceback" not in rest
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors.train.resume"]  # the same command goes on


def test_a_reader_that_has_seen_enough_is_no_error(folder: Path) -> None:
    command = f"{sys.executable} -m memopt_export inspect {folder / 'tiny.onnx'} --json | head -c 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""
