"""Engines that do not fit this machine, built anew on it from the ONNX beside them in the bundle.

An engine belongs to one GPU generation and one release of the library. Where both have a successor here and memopt's
exporter is installed, its command builds another one, in a child process; it lies in the cache of specializations, and
later loads take it from there:

    CACHE/0123…ef/              named by the graph, the library's release, the GPU and the profiles
        entry.json              the sha256 of the others
        model.engine, model.engine.json
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import subprocess
import sys
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from memopt.artifact import Artifact, open_artifact
from memopt.batching import memory_curve
from memopt.bundle import Bundle
from memopt.child import beside
from memopt.choice import Choice
from memopt.errors import BackendError, IntegrityError, OutOfResource, first_line
from memopt.files import is_private, sha256_file
from memopt.manifest import Profile, Variant
from memopt.runtimes import RUNTIMES
from memopt.specialization import Cache
from memopt.strict_json import from_json, to_json
from memopt.trt_runtime import TrtRuntime

TIMEOUT_S = 1800.0
_ENGINE, _ENTRY = "model.engine", "entry.json"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rebuild:
    """What an engine is built from and for; equal ones have equal entries."""

    variant: str  # the engine that does not fit
    source: str  # the portable variant it was made from
    model_sha256: str
    weights_sha256: str | None
    flavor: str
    version: str
    target: str
    gpu: str
    profiles: tuple[Profile, ...]
    schema: str = "engine 1"

    @property
    def key(self) -> str:
        """The entry's name."""
        return hashlib.sha256(to_json(self).encode()).hexdigest()


@dataclass(frozen=True)
class _Entry:
    sha256: dict[str, str]  # file name -> digest


def find_stale(bundle: Bundle, wanted: str | None = None) -> Rebuild | None:
    """The first engine of the bundle, or the one wanted, that only has to be built anew to run here; None: none is."""
    for variant in bundle.manifest.variants:
        if wanted not in (None, variant.id):
            continue
        runtime = RUNTIMES.get(variant.runtime)
        if variant.engine is None or variant.source is None or not isinstance(runtime, TrtRuntime):
            continue
        if runtime.unavailable("cuda") is None and runtime.refuses(bundle.artifact(variant.id)) is not None:
            return _rebuild_of(bundle, variant, runtime)
    return None


def find(rebuild: Rebuild, cache: Cache) -> Artifact | None:
    """The engine from the cache; None where it has not been built, or was damaged, and has been removed.

    Raises:
        IntegrityError: others can write to the cache.
    """
    try:
        with cache.reading(rebuild) as folder:
            return _read(folder, rebuild) if folder is not None else None
    except IntegrityError as error:
        if not is_private(cache.folder):
            raise
        _log.info("%s", error)
        return None


def build(rebuild: Rebuild, bundle: Bundle, cache: Cache, *, timeout_s: float = TIMEOUT_S) -> None:
    """Makes the entry, by `memopt-export engine` in a child process.

    Raises:
        BackendError: the exporter is not installed here, or its command failed.
        OutOfResource: it was not done in time.
        IntegrityError: the cache is not to be trusted.
    """
    if importlib.util.find_spec("memopt_export") is None:
        raise BackendError("engines are built by memopt's exporter", hint="pip install 'memopt[export]'")
    with cache.making(rebuild) as folder, TemporaryDirectory(prefix="memopt-engine-") as beside:
        if folder is None:
            return
        model = _write_model(bundle, rebuild, Path(beside))
        _run(_command(rebuild, model, folder / _ENGINE), timeout_s)
        digests = {name: sha256_file(folder / name) for name in (_ENGINE, f"{_ENGINE}.json")}
        (folder / _ENTRY).write_text(to_json(_Entry(digests)))


def find_or_build(rebuild: Rebuild, bundle: Bundle, cache: Cache) -> Artifact:
    """The engine from the cache, built now where it is not there yet; raises what `find` and `build` raise."""
    found = find(rebuild, cache)
    if found is None:
        build(rebuild, bundle, cache)
        found = find(rebuild, cache)
    if found is None:
        raise BackendError(f"another process is building {rebuild.variant}")
    return found


def choice_of(bundle: Bundle, artifact: Artifact) -> Choice:
    """The variant that this engine stands for, with the engine's own figures."""
    old = bundle.manifest.variant(artifact.name)
    assert artifact.engine is not None
    memory = replace(old.memory, weights_bytes=artifact.engine.weights_bytes, measured=())
    variant = replace(old, engine=artifact.engine, memory=memory)
    curve = memory_curve(variant, runtime=old.runtime, device="cuda")
    return Choice(variant, old.runtime, "cuda", curve, (f"{old.id} on {old.runtime} cuda: built anew for this GPU",))


@dataclass(frozen=True)
class Underway:
    """An engine that is being built."""

    variant: str
    made: Future[Artifact]
    limit_bytes: int | None  # what it may need when it is there


def build_beside(rebuild: Rebuild, bundle: Bundle, cache: Cache, *, limit_bytes: int | None) -> Underway:
    """The engine, or the error, some time; a process that ends does not wait for it."""
    made = beside(lambda: find_or_build(rebuild, bundle, cache), name="memopt-engine")
    return Underway(rebuild.variant, made, limit_bytes)


def _rebuild_of(bundle: Bundle, variant: Variant, runtime: TrtRuntime) -> Rebuild | None:
    assert variant.engine is not None  # `find_stale` saw to it
    assert variant.source is not None
    source = bundle.manifest.variant(variant.source)
    flavor, target, gpu = runtime.local_target()
    if flavor != runtime.NAME:  # TensorRT-RTX knows nothing of this GPU
        return None
    digests = {file.path: file.sha256 for file in bundle.manifest.files}
    return Rebuild(
        variant.id, source.id, digests[source.model], digests[source.weights] if source.weights else None,
        flavor, runtime.version() or "", target, gpu, variant.engine.profiles,
    )  # fmt: skip


def _read(folder: Path, rebuild: Rebuild) -> Artifact:
    entry = from_json(_Entry, (folder / _ENTRY).read_bytes(), where=_ENTRY)
    for name in (_ENGINE, f"{_ENGINE}.json"):
        if (folder / name).is_symlink() or sha256_file(folder / name) != entry.sha256.get(name):
            raise IntegrityError(f"the sha256 of {name} is not the one that was written down")
    return replace(open_artifact(folder / _ENGINE), name=rebuild.variant)


def _write_model(bundle: Bundle, rebuild: Rebuild, folder: Path) -> Path:
    """The source graph as a file with its external initializers beside it, where the graph looks for them."""
    source = bundle.manifest.variant(rebuild.source)
    for file in bundle.manifest.files:
        if file.path in (source.model, source.weights):
            bundle.verify(file)
            (folder / PurePosixPath(file.path).name).write_bytes(bundle.entries[file.path])
    return folder / PurePosixPath(source.model).name


def _command(rebuild: Rebuild, model: Path, output: Path) -> list[str]:
    first = next(iter(rebuild.profiles[0].min))  # any input tells the batch
    batches = [
        option for profile in rebuild.profiles
        for option in ("--batch", ",".join(str(shapes[first][0]) for shapes in (profile.min, profile.opt, profile.max)))
    ]  # fmt: skip
    flavor = ["--flavor", rebuild.flavor, "--target", rebuild.target]
    return [sys.executable, "-P", "-m", "memopt_export", "engine", str(model), *flavor, *batches, "-o", str(output)]


def _run(command: list[str], timeout_s: float) -> None:
    """Runs the command at the lowest priority; it finds modules where this process does, not in the current folder."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(
            ["nice", *command], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, timeout=timeout_s, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise OutOfResource(f"the engine was not built within {timeout_s:g} s") from error
    except OSError as error:
        raise BackendError(f"the exporter cannot be started: {first_line(error)}") from error
    if done.returncode != 0:
        last = (done.stderr.decode(errors="replace").strip().splitlines() or [f"code {done.returncode}"])[-1]
        raise BackendError(f"the engine cannot be built: {last.removeprefix('memopt-export: error: ')}")
