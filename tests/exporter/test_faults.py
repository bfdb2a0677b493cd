"""Disks that fill up, signals, kills: whoever writes leaves the old or the whole new state, and nothing beside it."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import memopt
from memopt import files
from memopt.bundle import open_bundle
from memopt.errors import InputRefused, MemoptError, OutOfResource
from memopt.files import write_atomically, write_folder
from memopt.manifest import EngineInfo, Profile
from memopt.tensors import Array
from memopt_export import cli
from memopt_export.formats import FORMATS, write
from memopt_export.graph import Graph, save_graph
from memopt_export.hollow import as_written
from memopt_export.pack import Contents, pack
from memopt_export.signing import generate, load_key, save_key
from memopt_export.specialize import specialize
from memopt_export.tensorrt_engine import Engine, save_engine

SHAPES = {"input": (1, 1, 8, 8)}
INFO = EngineInfo(
    "tensorrt-rtx", "1.7.1.116", ("sm86",), "linux", "x86_64", (Profile(SHAPES, SHAPES, SHAPES, 1),), 9, "0" * 64
)
SECRET = "secret words"
PAIRS = ("key pair", "engine")
NAMES = (*(f"pack {form}" for form in FORMATS), "graph", *PAIRS)
FULL, BROKEN, INTERRUPTED = (
    OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()
)  # fmt: skip


@pytest.fixture(autouse=True)
def no_temporary_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a plan writes for ONNX Runtime to read at once is no result."""
    monkeypatch.setattr("memopt_export.pack.as_executed", as_written)


@dataclass
class Fault:
    """Raises `error` at the k-th call that asks the system for something while a result is written."""

    at: int
    error: BaseException
    calls: int = 0
    struck: str | None = None

    def strike(self, what: str) -> None:
        self.calls += 1
        if self.calls == self.at:
            self.struck = what
            raise self.error

    def arm(self, patch: pytest.MonkeyPatch) -> None:
        """Puts itself into everything that `memopt.files` asks the system for, but for what cleans up."""
        for owner, name in (
            (Path, "mkdir"), (Path, "chmod"), (Path, "replace"), (Path, "rename"), (tempfile, "mkstemp"),
            (tempfile, "mkdtemp"), (os, "fsync"), (fcntl, "flock"), (files, "_exchange"),
        ):  # fmt: skip
            patch.setattr(owner, name, self._striking(name, getattr(owner, name)))
        opened = Path.open

        def open_(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            file = opened(path, mode, *args, **kwargs)
            return FaultyFile(file, self) if "w" in mode else file

        patch.setattr(Path, "open", open_)

    def _striking(self, name: str, function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.strike(name)
            return function(*args, **kwargs)

        return call


class FaultyFile:
    """A file whose writes and flushes may fail; half of what was to be written is there then, as on a full disk."""

    def __init__(self, file: Any, fault: Fault) -> None:
        self._file, self._fault = file, fault

    def write(self, data: bytes) -> int:
        try:
            self._fault.strike("write")
        except BaseException:
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            raise
        return self._file.write(data)

    def flush(self) -> None:
        self._fault.strike("flush")
        self._file.flush()

    def fileno(self) -> int:
        return self._file.fileno()

    def __enter__(self) -> FaultyFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def state(folder: Path) -> dict[str, str]:
    """Everything in the folder, hidden things included, with its content; of a private key, which is never written
    twice alike, its id.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        content = load_key(path, SECRET).key_id.encode() if path.suffix == ".key" else b""
        content = content or (path.read_bytes() if path.is_file() else b"folder")
        found[path.relative_to(folder).as_posix()] = hashlib.sha256(content).hexdigest()
    return found


@pytest.fixture(scope="module")
def light(tiny_contents: Contents) -> list[Contents]:
    """Two contents of few bytes, which no library has to run."""
    small = tiny_contents.graphs[1]
    return [Contents("tiny", (small,), (name, "b", "c"), license="MIT") for name in ("old", "new")]


@pytest.fixture(scope="module")
def writers(light: list[Contents], tiny_contents: Contents) -> dict[str, Callable[[Path, int], object]]:
    """All of ours that write a result, each as write(folder, which of two contents)."""
    keys, graphs = [generate(), generate()], [part.graph for part in tiny_contents.graphs]

    def packer(form: str) -> Callable[[Path, int], object]:
        return lambda folder, i: write(form, light[i], folder / "x", force=True)

    def engine(folder: Path, i: int) -> None:
        built = Engine(f"engine {i}".encode(), replace(INFO, weights_bytes=i))
        save_engine(built, folder / "x.engine", force=True)

    return {
        **{f"pack {form}": packer(form) for form in FORMATS},
        "graph": lambda folder, i: save_graph(graphs[i], folder / "x.onnx", force=True),
        "key pair": lambda folder, i: save_key(keys[i], folder / "x.key", SECRET, force=True),
        "engine": engine,
    }


def strike_everywhere(run: Callable[[Path, int], object], folder: Path, error: BaseException, *, pair: bool) -> int:
    """Lets the error strike at every call in turn, with nothing there and over an old state; returns how many."""
    run(folder / "whole", 1)
    whole = state(folder / "whole")
    strikes = 0
    for old in (False, True):
        k = 0
        while True:
            k += 1
            target = folder / f"{old}-{k}"
            if old:
                run(target, 0)
            before, fault = state(target), Fault(k, error)
            with pytest.MonkeyPatch.context() as patch:
                fault.arm(patch)
                try:
                    run(target, 1)
                except (MemoptError, KeyboardInterrupt) as raised:
                    assert raised is error or f"{target}/x" in str(raised)
            allowed = [before, whole]
            if pair and fault.struck == "replace":  # the first alone, never with what belongs to its predecessor
                allowed += [dict(list(each.items())[:1]) for each in (before, whole)]
            assert state(target) in allowed, (k, fault.struck)
            if fault.struck is None:
                assert state(target) == whole
                break
            strikes += 1
    return strikes


@pytest.mark.parametrize("error", [FULL, INTERRUPTED], ids=["full", "interrupted"])
@pytest.mark.parametrize("name", NAMES)
def test_whichever_call_fails_the_old_or_the_whole_new_state_is_left(
    name: str, error: BaseException, writers: dict[str, Callable], tmp_path: Path
) -> None:
    assert strike_everywhere(writers[name], tmp_path, error, pair=name in PAIRS) > 12


@pytest.mark.parametrize(
    ("number", "kind", "code"),
    [
        (errno.ENOSPC, OutOfResource, 6), (errno.EDQUOT, OutOfResource, 6), (errno.EFBIG, OutOfResource, 6),
        (errno.EIO, InputRefused, 3), (errno.EROFS, InputRefused, 3), (errno.EACCES, InputRefused, 3),
    ],
)  # fmt: skip
def test_each_reason_has_its_exit_code_and_names_the_file(
    tmp_path: Path, number: int, kind: type[MemoptError], code: int
) -> None:
    fault = Fault(6, OSError(number, os.strerror(number)))
    with pytest.MonkeyPatch.context() as patch:
        fault.arm(patch)
        with pytest.raises(kind, match=str(tmp_path / "x")) as caught:
            write_atomically(tmp_path / "x", b"data")
    assert fault.struck is not None
    assert caught.value.exit_code == code
    assert not state(tmp_path)


@pytest.fixture
def folder(tmp_path: Path, tiny_graph: Graph) -> Path:
    """A folder with a model and its data."""
    save_graph(tiny_graph, tmp_path / "tiny.onnx")
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "data.npz", input=rng.normal(size=(4, 1, 8, 8)).astype(np.float32), labels=np.arange(4) % 3)
    return tmp_path


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (FULL, 6, "no space left to write x"),
        (BROKEN, 3, "x cannot be written: Input/output error"),
        (INTERRUPTED, 130, "interrupted"),
        (cli._Terminated(), 143, "terminated"),
    ],
    ids=["full", "broken", "SIGINT", "SIGTERM"],
)
@pytest.mark.parametrize("form", FORMATS)
def test_pack_answers_with_one_line_and_its_exit_code_and_leaves_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    form: str, error: BaseException, code: int, said: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(folder)
    monkeypatch.setattr("memopt_export.preflight.open_apart", lambda *args, **options: None)  # it needs no disk
    before = state(folder)
    for k in (1, 3, 5, 6, 8):
        fault = Fault(k, error)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
            fault.arm(patch)
            cli.main(["pack", "tiny.onnx", "--format", form, "-o", "x"])
        assert (fault.struck is not None, ended.value.code) == (True, code)
        (line,) = filter(None, capsys.readouterr().err.split("\n"))  # click ends the line of a ^C first
        assert line == f"memopt-export: error: {said}"
        assert state(folder) == before


WAITING = """
import pathlib, time
def data():
    pathlib.Path("inside").touch()
    time.sleep(60)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_pack_with_its_code_and_leaves_nothing(folder: Path, number: int, code: int) -> None:
    (folder / "waiting.py").write_text(WAITING)
    words = ["pack", "tiny.onnx", "--data", "waiting:data", "-o", "x.mopt"]
    command = [sys.executable, "-m", "memopt_export", *words]
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True) as child:
        while not (folder / "inside").exists():
            assert child.poll() is None, child.stderr
            time.sleep(0.02)
        child.send_signal(number)
        started = time.monotonic()
        _, said = child.communicate(timeout=20)
    assert child.returncode == code
    assert time.monotonic() - started < 2
    assert said.strip() == f"memopt-export: error: {'interrupted' if code == 130 else 'terminated'}"
    assert {path.name for path in folder.iterdir()} - {"__pycache__"} == {
        "data.npz", "inside", "tiny.onnx", "waiting.py"
    }  # fmt: skip


# Packs over and over in children that are killed, or may write files of a certain size only, and looks at what is left.
APART = """
import json, os, pathlib, pickle, random, resource, signal, sys, time
from memopt.bundle import open_bundle
from memopt.errors import MemoptError
from memopt_export import formats
from memopt_export.ort_package import read_package
from memopt_export.triton import read_repository

sys.path.insert(0, sys.argv[4])
from conftest import make_graph
from memopt_export.pack import Contents, OnnxPart

what, form, target = sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3])
graph = make_graph(1, hidden=48)
graph.data
part = OnnxPart("a", "tiny", graph)
contents = [Contents("tiny", (part,), (name, "b", "c"), license="MIT") for name in ("old", "new")]
READ = {"triton": read_repository, "ort": read_package}

def apart(do):
    child = os.fork()
    if not child:
        try:
            do()
        except MemoptError as error:
            os._exit(error.exit_code)
        os._exit(0)
    return child

def over_and_over():
    for i in range(10_000):
        formats.write(form, contents[i % 2], target, force=True)

def whole():
    if form in READ:
        return len(READ[form](target)) == 1
    return open_bundle(target).labels[0] in ("old", "new")

formats.write(form, contents[0], target)
files = sorted(str(path.relative_to(target)) for path in target.rglob("*"))
rng, found = random.Random(0), {"runs": 0, "whole": 0, "left": 0, "codes": []}
ends = time.monotonic() + 4
if what == "kill":
    while time.monotonic() < ends and found["runs"] < 60:
        child = apart(over_and_over)
        time.sleep(rng.uniform(0.001, 0.04))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found["runs"] += 1
        found["whole"] += whole() and files == sorted(str(path.relative_to(target)) for path in target.rglob("*"))
        found["left"] += len(list(target.parent.iterdir())) - 1
else:
    for size in (0, 1, 100, 4096, 5000, 20_000, 60_000, 90_000, 10_000_000):
        def limited():
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            formats.write(form, contents[1], target, force=True)
        found["codes"].append(os.waitstatus_to_exitcode(os.waitpid(apart(limited), 0)[1]))
        found["runs"] += 1
        found["whole"] += whole() and len(list(target.parent.iterdir())) == 1
formats.write(form, contents[1], target, force=True)
found["finally"] = [path.name for path in target.parent.iterdir()]
print(json.dumps(found))
"""


def apart(what: str, form: str, folder: Path) -> dict[str, Any]:
    tests = Path(__file__).parent.parent
    words = [what, form, str(folder / "x"), str(tests)]
    done = subprocess.run(
        [sys.executable, "-c", APART, *words], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("form", FORMATS)
def test_killed_at_any_moment_the_target_is_whole_and_the_next_run_sweeps(form: str, tmp_path: Path) -> None:
    found = apart("kill", form, tmp_path)
    assert found["runs"] >= 20
    assert found["whole"] == found["runs"]
    assert found["left"] >= 1  # some were killed while they wrote
    assert found["finally"] == ["x"]


@pytest.mark.parametrize("form", FORMATS)
def test_a_real_limit_of_the_file_size_is_a_full_disk(form: str, tmp_path: Path) -> None:
    found = apart("full", form, tmp_path)
    assert set(found["codes"]) == {0, 6}
    assert found["codes"] == sorted(found["codes"], reverse=True)
    assert found["whole"] == found["runs"]


def test_a_file_system_that_cannot_exchange_names_gets_two_renames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    for content in (b"old", b"new"):
        write_folder({"a/b": content}, tmp_path / "x", force=True, is_ours=lambda path: True)
        assert (tmp_path / "x" / "a" / "b").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_what_a_living_writer_is_writing_is_not_swept(tmp_path: Path) -> None:
    with files.atomic_file(tmp_path / "x") as file:
        file.write(b"slow")
        write_atomically(tmp_path / "x", b"fast", force=True)
        assert len(list(tmp_path.iterdir())) == 2
    assert (tmp_path / "x").read_bytes() == b"slow"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_file_system_without_locks_is_written_and_nothing_is_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", without)
    (tmp_path / ".x.abcdefgh.memopt-tmp").write_bytes(b"who knows whose")
    write_atomically(tmp_path / "x", b"data")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".x.abcdefgh.memopt-tmp", "x"]


def test_files_of_others_that_look_alike_are_left_alone(tmp_path: Path) -> None:
    for name in (".x.tmp", ".x.abcdefgh.tmp", ".y.abcdefgh.memopt-tmp", ".x", "x.memopt-tmp"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / ".x.abcdefgh.memopt-tmp").write_bytes(b"")
    write_atomically(tmp_path / "x", b"data")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".x", ".x.abcdefgh.tmp", ".x.tmp", ".y.abcdefgh.memopt-tmp", "x", "x.memopt-tmp"
    ]  # fmt: skip


@pytest.mark.parametrize("form", FORMATS)
def test_a_place_that_cannot_be_written_is_said(form: str, light: list[Contents]) -> None:
    with pytest.raises(InputRefused, match="/proc/x cannot be written"):
        write(form, light[0], Path("/proc/x"))


@pytest.mark.parametrize("form", ["mopt", "dir"])
@pytest.mark.parametrize("variant", ["large", "optimized"])
def test_a_bundle_in_use_is_replaced_and_the_open_session_goes_on(
    form: str, variant: str, tiny_contents: Contents, tiny_inputs: Array, tmp_path: Path
) -> None:
    large, small = tiny_contents.graphs
    optimized = specialize(large)
    path, name = tmp_path / "x", {"large": "large", "optimized": optimized.id}[variant]
    pack(replace(tiny_contents, parts=(large, optimized, small)), path, form=form)
    with memopt.load(path, device="cpu", variant=name) as model:
        before = model(tiny_inputs)
        pack(replace(tiny_contents, parts=(small,)), path, form=form, force=True)
        assert np.array_equal(model(tiny_inputs), before)
        assert model.labels == tiny_contents.labels
        assert [v.id for v in open_bundle(path).manifest.variants] == ["small"]


# One of several processes that want the same stage: takes the lock, finds the stage or makes it, and says which.
BUILDER = """
import pathlib, sys, time
from memopt_export.stages import Stages, locked

root = pathlib.Path(sys.argv[1])

def make(folder):
    with (root / "builds").open("a") as file:
        file.write("built\\n")
    if len(sys.argv) > 2:
        print("inside", flush=True)
        time.sleep(60)
    time.sleep(0.2)
    (folder / "out.txt").write_text("out")

with locked(root, on_wait=lambda: None):
    outcome = Stages(root, lambda stage: None, lambda outcome: None).run("stage one", {"x": 1}, make)
print(outcome.cached, outcome.read("out.txt").decode())
"""


def builder(root: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", BUILDER, str(root), *words], stdout=subprocess.PIPE, text=True)


def test_of_several_builders_of_one_key_one_builds_and_the_others_take_it(tmp_path: Path) -> None:
    builders = [builder(tmp_path) for _ in range(4)]
    said = sorted(each.communicate(timeout=60)[0].strip() for each in builders)
    assert said == ["False out", "True out", "True out", "True out"]
    assert (tmp_path / "builds").read_text() == "built\n"


def test_the_lock_of_a_builder_that_was_killed_is_taken_over_and_its_rest_swept(tmp_path: Path) -> None:
    with builder(tmp_path, "forever") as killed:
        assert killed.stdout is not None
        assert killed.stdout.readline() == "inside\n"
        assert len(list(tmp_path.glob(".making-*"))) == 1
        killed.kill()
    started = time.monotonic()
    assert builder(tmp_path).communicate(timeout=60)[0] == "False out\n"
    assert time.monotonic() - started < 20
    assert not list(tmp_path.glob(".making-*"))
