"""What belongs to this very processor, made on it: optimized graphs in one content-addressed cache.

A bundle's portable graph is optimized anew by ONNX Runtime at every load, and its weights are copied into the layout of
the processor. Here that is done once, in a child process with a memory cap: the optimized graph and its weights, packed
where kernels want them so, are written to files that later loads map as they lie.

    CACHE/0123…ef/              an entry, named by what it was made from and for
        entry.json              what that is, and the sha256 of the other files
        graph.onnx, weights.data
    CACHE/89ab…01/              an engine built anew on this machine (see `memopt.engine_rebuild`)
    CACHE/4567…cd.kernels       what TensorRT-RTX has compiled (see `memopt.kernel_file`)
    CACHE/0123…ef.lock          whoever makes the entry has it locked

Nothing is taken from a cache that others could write to, from an entry that was made for something else, or from files
that are not those that were written: what is damaged is removed and made again. The least recently used entries go when
the cache grows beyond its limit; a process that has one mapped keeps it.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from memopt import errors
from memopt.accuracy import max_difference
from memopt.artifact import Artifact, map_file
from memopt.bundle import Bundle, open_bundle
from memopt.child import beside, command, main_of
from memopt.cpu import CpuTarget, this_cpu
from memopt.errors import BackendError, InputRefused, IntegrityError, MemoptError, OutOfResource, first_line
from memopt.files import atomic_folder, drop_least_recent, is_private, locked, sha256_file
from memopt.manifest import File, Variant
from memopt.memory import limit_process
from memopt.ort_options import READ_IN_PLACE
from memopt.strict_json import from_json, to_json
from memopt.tensors import Array, TensorSpec

if TYPE_CHECKING:
    from memopt.ort_runtime import OrtSession

LIMIT_BYTES = 4 * 2**30
TIMEOUT_S = 600.0
MEMORY_BYTES, MEMORY_PER_BYTE = 512 * 2**20, 6  # what the child may take: so much, and so often its graph's size
_SCHEMA = "1"  # of an entry; another one is another key
_ENTRY, _GRAPH, _WEIGHTS = "entry.json", "graph.onnx", "weights.data"
_MAX_ENTRY_BYTES = 64 * 2**10
_TOLERANCE = 1e-3  # of the largest output, where the bundle does not say how far machines may differ
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """What an entry is made from, and for which processor and library: equal sources have equal entries."""

    graph_sha256: str
    weights_sha256: str
    cpu: CpuTarget
    schema: str = _SCHEMA

    @property
    def key(self) -> str:
        """The entry's name."""
        return hashlib.sha256(to_json(self).encode()).hexdigest()


class Keyed(Protocol):
    """Whatever names an entry."""

    @property
    def key(self) -> str:
        """64 hex digits."""


@dataclass(frozen=True)
class _Entry:
    """What stands in entry.json."""

    source: Source
    precision: str
    files: tuple[File, ...]


@dataclass(frozen=True)
class Cache:
    """The entries in one folder of this user's."""

    folder: Path
    limit_bytes: int = LIMIT_BYTES

    def find(self, source: Source, name: str, *, verify: str = "full") -> Artifact | None:
        """The optimized graph, mapped, under the name `name`; None when there is none.

        Args:
            source: what it has to be made from and for.
            name: of the variant.
            verify: "full" checks the sha256 of all files, else that of the weights is left out.

        Raises:
            IntegrityError: others can write here, or the entry was damaged, and has been removed.
        """
        with self.reading(source) as folder:
            return _read_entry(folder, source, name, verify=verify) if folder is not None else None

    @contextlib.contextmanager
    def reading(self, source: Keyed) -> Iterator[Path | None]:
        """The folder of the entry; None when there is none. What turns out damaged in the block is removed.

        Raises:
            IntegrityError: others can write here, or the entry was damaged.
        """
        folder = self.folder / source.key
        if not folder.exists():
            yield None
            return
        self._check_owner()
        try:
            yield folder
        except (IntegrityError, InputRefused, OSError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise IntegrityError(f"{folder} was damaged and is removed: {first_line(error)}") from error
        with contextlib.suppress(OSError):  # a read-only cache has no order of use
            os.utime(folder / _ENTRY)

    @contextlib.contextmanager
    def making(self, source: Keyed) -> Iterator[Path | None]:
        """A folder to write the entry's files into, which becomes the entry; None when somebody else makes it.

        Raises:
            IntegrityError: others can write to the cache.
        """
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._check_owner()
        folder, lock = self.folder / source.key, self.folder / f"{source.key}.lock"
        with locked(lock) as ours:
            if not ours or folder.exists():
                yield None
                return
            with atomic_folder(folder, mode=0o700, is_ours=lambda _: False) as beside:
                yield beside
            lock.unlink(missing_ok=True)
        self._evict(keep=folder)

    def _check_owner(self) -> None:
        if not is_private(self.folder):
            raise IntegrityError(
                f"cache {self.folder} is not a folder that only this user can write to",
                hint=f"chmod 700 {self.folder}, or MEMOPT_CACHE=DIR",
            )

    def _evict(self, *, keep: Path) -> None:
        """Removes entries, the least recently used first, until the others are within the limit."""
        entries = []
        for entry in self.folder.glob(f"[0-9a-f]*/{_ENTRY}"):  # not those being made, which begin with a dot
            with contextlib.suppress(OSError):  # another process may evict as well
                size_bytes = sum(file.stat().st_size for file in entry.parent.iterdir())
                entries.append((entry.stat().st_mtime_ns, size_bytes, entry.parent))
        for kernels in self.folder.glob("[0-9a-f]*.kernels"):  # see memopt.kernel_file
            with contextlib.suppress(OSError):
                status = kernels.stat()
                entries.append((status.st_mtime_ns, status.st_size, kernels))
        drop_least_recent(entries, limit_bytes=self.limit_bytes, keep=keep)


def default_cache() -> Cache | None:
    """The cache that `memopt.load` uses unless it is given one, in `cache_folder`; None where there is none."""
    folder = cache_folder("specializations")
    return None if folder is None else Cache(folder)


def cache_folder(kind: str) -> Path | None:
    """The folder of this kind in `$MEMOPT_CACHE`, by default the user's cache folder; None where that is "off".

    The only place where the runtime reads the environment.
    """
    named = os.environ.get("MEMOPT_CACHE")
    if named == "off":
        return None
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (Path(named) if named else base / "memopt") / kind


def gains_nothing(precision: str) -> str | None:
    """Why an optimized graph of this precision would take as much memory as the portable one; None if it takes less."""
    if precision in READ_IN_PLACE:
        return None
    return f"not specialized: {precision} weights are packed anew at every load, optimized or not"


def source_of(bundle: Bundle, variant: Variant, onnxruntime: str | None) -> Source | str:
    """What an optimized graph of this variant is made from; or why there is no use in one, or no way to make it."""
    if not variant.is_portable:
        return "not specialized: it is made for one machine already"
    if variant.weights is None:
        return "not specialized: its weights are too small to be mapped"
    reason = gains_nothing(variant.precision)
    if reason is not None:
        return reason
    cpu = this_cpu(onnxruntime or "")
    if cpu is None:
        return "not specialized: the features of this processor cannot be read"
    digests = {file.path: file.sha256 for file in bundle.manifest.files}
    return Source(digests[variant.model], digests[variant.weights], cpu)


@dataclass(frozen=True)
class _Request:
    bundle: str
    variant: str
    source: Source
    folder: str
    limit_bytes: int
    memory_bytes: int


@dataclass(frozen=True)
class _Answer:
    error: str | None = None  # the name of an error's class
    problem: str = ""


def specialize(bundle: Bundle, variant: Variant, source: Source, cache: Cache, *, timeout_s: float = TIMEOUT_S) -> None:
    """Makes the entry for this variant, in a child process that goes on should this one end.

    Raises:
        BackendError: ONNX Runtime cannot, what it makes computes something else, or it crashed.
        OutOfResource: it ran out of memory, disk or time.
        IntegrityError: the bundle has changed, or the cache is not to be trusted.
    """
    memory_bytes = MEMORY_BYTES + MEMORY_PER_BYTE * bundle.size_bytes(variant)
    request = _Request(
        str(bundle.path.absolute()), variant.id, source, str(cache.folder.absolute()), cache.limit_bytes, memory_bytes
    )
    arguments, pipe = command(main_of(__name__)), subprocess.PIPE
    try:
        child = subprocess.Popen(arguments, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)
    except (OSError, TypeError) as error:  # TypeError: an interpreter in a program that does not know where it is
        raise BackendError(f"python cannot be started to optimize {variant.id}: {first_line(error)}") from error
    try:
        stdout, stderr = child.communicate(to_json(request).encode(), timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        child.kill()
        child.communicate()
        raise OutOfResource(f"{variant.id} was not optimized within {timeout_s:g} s") from error
    try:
        answer = from_json(_Answer, stdout, where="the child's answer")
    except IntegrityError as error:
        last = (stderr.decode(errors="replace").strip().splitlines() or [f"code {child.returncode}"])[-1]
        raise BackendError(f"optimizing {variant.id} crashed: {last}") from error
    if answer.error is not None:
        raise errors.by_name()[answer.error](answer.problem)


def specialize_beside(bundle: Bundle, variant: Variant, source: Source, cache: Cache) -> Future[Artifact]:
    """The optimized graph, as `specialize` makes it, or its error; a process that ends does not wait for it."""

    def make() -> Artifact:
        specialize(bundle, variant, source, cache)
        found = cache.find(source, variant.id)
        if found is None:
            raise BackendError("another process is at it")
        return found

    return beside(make, name="memopt-specialize")


def main() -> int:
    """The child: a _Request on standard input, an _Answer on standard output; what libraries print goes to stderr."""
    stdout = os.dup(1)
    os.dup2(2, 1)
    request = from_json(_Request, sys.stdin.buffer.read(), where="the request")
    # Heap and private mappings, not the files that are mapped (getrlimit(2), RLIMIT_DATA since Linux 4.7).
    limit_process(resource.RLIMIT_DATA, request.memory_bytes)
    limit_process(resource.RLIMIT_CORE, 0)
    os.nice(10)
    try:
        _make(request)
        answer = _Answer()
    except MemoptError as error:
        answer = _Answer(type(error).__name__, str(error))
    except MemoryError:
        answer = _Answer("OutOfResource", f"{request.variant} needs more memory to be optimized than it may have")
    with os.fdopen(stdout, "w") as file, contextlib.suppress(BrokenPipeError):  # nobody may wait for it any more
        file.write(to_json(answer))
    return 0


def _make(request: _Request) -> None:
    from memopt import ort_runtime

    bundle = open_bundle(request.bundle, verify="off")
    variant, source = bundle.manifest.variant(request.variant), request.source
    if source_of(bundle, variant, ort_runtime.version()) != source:
        raise IntegrityError(f"{bundle.path} has changed meanwhile")
    for file in bundle.manifest.files:
        if file.path in (variant.model, variant.weights):
            bundle.verify(file)
    with Cache(Path(request.folder), request.limit_bytes).making(source) as folder:
        if folder is None:
            return
        portable = bundle.artifact(variant.id)
        ort_runtime.write_optimized(portable, folder / _GRAPH, weights_name=_WEIGHTS)
        files = tuple(
            File(name, (folder / name).stat().st_size, sha256_file(folder / name)) for name in (_GRAPH, _WEIGHTS)
        )
        (folder / _ENTRY).write_text(to_json(_Entry(source, variant.precision, files)))
        optimized = ort_runtime.open(_read_entry(folder, source, variant.id, verify="off"), threads=1)
        _refuse_unlike(optimized, ort_runtime.open(portable, threads=1), bundle, variant)


def _refuse_unlike(optimized: OrtSession, portable: OrtSession, bundle: Bundle, variant: Variant) -> None:
    """Raises BackendError unless both promise the same, and compute the same on golden inputs, or else random ones."""
    if _promise(optimized) != _promise(portable):
        raise BackendError(f"{variant.id} has other inputs or outputs once it is optimized")
    feeds = bundle.golden_inputs() or {spec.name: _random(spec) for spec in portable.inputs}
    try:
        expected = portable.run(feeds)
    except (BackendError, InputRefused) as error:
        _log.info("%s is not compared with the portable graph, which refuses random inputs: %s", variant.id, error)
        return
    golden = bundle.manifest.golden
    largest = max((float(np.abs(array).max(initial=0)) for array in expected), default=0)
    allowed = golden.atol[variant.id] if golden is not None else _TOLERANCE * max(largest, 1.0)
    worst = max(max_difference(one, other) for one, other in zip(optimized.run(feeds), expected, strict=True))
    if not worst <= allowed:
        raise BackendError(f"{variant.id} differs by {worst:.3g} once it is optimized, {allowed:.3g} is allowed")


def _promise(session: OrtSession) -> list[tuple[str, str, int]]:
    return [(spec.name, spec.dtype, len(spec.shape)) for spec in (*session.inputs, *session.outputs)]


def _random(spec: TensorSpec) -> Array:
    shape = spec.at_batch(1)
    if spec.dtype in ("float16", "float32", "float64"):
        return np.random.default_rng(0).normal(size=shape).astype(spec.dtype)
    return np.zeros(shape, spec.dtype)


def _read_entry(folder: Path, source: Source, name: str, *, verify: str) -> Artifact:
    """The entry in this folder, if it is what it has to be; IntegrityError or InputRefused if not."""
    for file_name in (_ENTRY, _GRAPH, _WEIGHTS):
        if (folder / file_name).is_symlink():
            raise IntegrityError(f"{file_name} is a link")
    text = map_file(folder / _ENTRY)
    if len(text) > _MAX_ENTRY_BYTES:
        raise IntegrityError(f"{_ENTRY} has {len(text)} bytes")
    entry = from_json(_Entry, bytes(text), where=_ENTRY)
    if entry.source != source or [file.path for file in entry.files] != [_GRAPH, _WEIGHTS]:
        raise IntegrityError(f"{_ENTRY} speaks of something else")
    for file in entry.files:
        path = folder / file.path
        if path.stat().st_size != file.size_bytes:
            raise IntegrityError(f"{file.path} has not {file.size_bytes} bytes")
        if (verify == "full" or (verify == "lazy" and file.path == _GRAPH)) and sha256_file(path) != file.sha256:
            raise IntegrityError(f"the sha256 of {file.path} is not the one that was written down")
    return Artifact(
        name=name,
        kind="onnx",
        data=map_file(folder / _GRAPH),
        size_bytes=sum(file.size_bytes for file in entry.files),
        path=folder / _GRAPH,
        cpu=source.cpu,
        precision=entry.precision,
        packed=True,
    )
