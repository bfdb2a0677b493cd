"""What an application embeds: a bundle opened on this device, within a limit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from memopt import engine_rebuild
from memopt.accuracy import softmax
from memopt.arena import MemoryPool, region_for
from memopt.artifact import Artifact
from memopt.batching import BatchFit, count_samples, largest_batch, run_in_batches
from memopt.bundle import Bundle, open_bundle
from memopt.choice import Choice, choose
from memopt.errors import BackendError, InputRefused, IntegrityError, MemoptError, OutOfResource, UsageError
from memopt.files import is_private
from memopt.manifest import Variant
from memopt.memory import IMPORT, LOAD, STEADY, Bill, DeviceMemory, give_back, read_host_memory
from memopt.ort_options import profile_named
from memopt.preprocess import prepare, prepare_file
from memopt.runtimes import RUNTIMES
from memopt.session import Runtime, Session
from memopt.signature import PublicKey
from memopt.sizes import parse_size, show_size
from memopt.specialization import Cache, default_cache, source_of, specialize_beside
from memopt.specialization import specialize as specialize_variant
from memopt.tensors import Array, TensorSpec
from memopt.trt_runtime import TrtRuntime

MOST_THREADS = 1024
SPECIALIZE = ("cache", "wait", "off")
_PICTURES_AT_ONCE = 32  # prepared and run together by `predict`


@dataclass(frozen=True)
class _Better:
    """What is being made for this machine, and how it is opened then."""

    name: str  # of the variant
    made: Future[Artifact]
    open: Callable[[Artifact], tuple[Choice, Session]]
    what: str


@dataclass(frozen=True)
class Prediction:
    """One class with its probability."""

    label: str
    probability: float


def load(
    path: Path | str,
    *,
    device: str = "auto",
    memory_limit: str | int | None = None,
    variant: str | None = None,
    max_drop: float = 1.0,
    threads: int = 0,
    profile: str = "balanced",
    pool: MemoryPool | None = None,
    specialize: str = "cache",
    cache: Cache | Path | str | None = None,
    verify: str = "full",
    trusted_keys: Sequence[PublicKey | Path | str] = (),
    trust_engines: bool = False,
) -> Model:
    """The bundle at `path`, open and ready to run.

    Args:
        path: a `.mopt` file or a bundle folder.
        device: "auto" (TensorRT, then CUDA, then the CPU), "tensorrt", "cuda" or "cpu". A named device is required.
        memory_limit: what the model may hold above the library's own, such as "64MiB": private host memory on the
            CPU, device memory on a GPU. It chooses variant and batch, the batch is tried once (see `Model.settle`), and
            the arena refuses what would need far more.
        variant: the id of the variant to take; None lets memory and accuracy choose (see `memopt.choice.choose`).
        max_drop: percentage points of validation accuracy that a smaller variant may lose against the best one.
        threads: threads within one operator, up to MOST_THREADS; 0 lets the library choose.
        profile: what it may cost: "fast", "balanced" or "minimum" memory (see `memopt.ort_options.PROFILES`).
        pool: the arena that it shares with other models; by default it has one to itself, with its memory limit.
        specialize: "cache" has the graph optimized for this processor at the first load, beside, and mapped from the
            cache from then on; "wait" does so before it returns; "off" does not.
        cache: where optimized graphs are kept; None: `$MEMOPT_CACHE`, nowhere when that is "off", else in the user's
            cache folder.
        verify: "full" checks the sha256 of every file first; "lazy" opens at once, checks the weights beside, and
            withholds the first result until they hold; "off" checks none.
        trusted_keys: public keys, or files of such; when given, one of them must have signed the bundle.
        trust_engines: also uses the engines of a bundle that no trusted key signed. Engines are code that runs with
            your rights: say so for bundles that you made yourself.

    Raises:
        InputRefused, IntegrityError: not a bundle, a damaged one, or one that no trusted key signed.
        BackendError: nothing in the bundle runs on the device.
        OutOfResource: no variant fits into the limit, as measured when the bundle was built or here.
    """
    if not isinstance(threads, int) or not 0 <= threads <= MOST_THREADS:
        raise UsageError(f"threads is {threads}", hint=f"0 to {MOST_THREADS}")
    if not max_drop >= 0:  # nor is NaN
        raise UsageError(f"max_drop is {max_drop}", hint="percentage points, 0 or more")
    if specialize not in SPECIALIZE:
        raise UsageError(f"specialize is {specialize!r}", hint=", ".join(SPECIALIZE))
    profile_named(profile)
    limit = parse_size(memory_limit) if memory_limit is not None else None
    bundle = open_bundle(path, verify=verify, trusted_keys=trusted_keys)
    if specialize == "off":
        cache = None
    elif not isinstance(cache, Cache):
        cache = Cache(Path(cache)) if cache is not None else default_cache()
    choice, engine = _choose(
        bundle, cache, wait=specialize == "wait", device=device, variant=variant, memory_limit=limit,
        max_drop=max_drop, trust_engines=trust_engines,
    )  # fmt: skip
    if pool is None and limit is not None:
        pool = _pool_within(limit, choice)
    model = Model(
        bundle, choice, threads=threads, profile=profile, pool=pool, cache=cache, wait=specialize == "wait",
        verify=verify, engine=engine,
    )  # fmt: skip
    if limit is not None:
        model.fit_batch(limit)
        model.settle(limit)
    return model


class Model:
    """An open bundle. `run` and calls may come from several threads; use it as a context manager, or `close` it."""

    def __init__(
        self, bundle: Bundle, choice: Choice, *, threads: int = 0, profile: str = "balanced",
        pool: MemoryPool | None = None, cache: Cache | None = None, wait: bool = False, verify: str = "full",
        engine: Artifact | engine_rebuild.Underway | None = None,
    ) -> None:  # fmt: skip
        runtime = _runtime(choice, cache)
        runtime.load_library()
        give_back()
        self._baseline = read_host_memory()
        self._bundle = bundle
        self._choice = choice
        self._why = list(choice.why)
        how: dict[str, Any] = {"threads": threads, "profile": profile, "pool": pool}
        self._open: Callable[[Artifact], Session] = lambda found: runtime.open(found, device=choice.device, **how)
        self._checked = _in_background(bundle, choice.variant) if bundle.unchecked else None
        self._better: _Better | None = None
        self._closed = False
        artifact = engine if isinstance(engine, Artifact) else bundle.artifact(choice.variant.id)
        if isinstance(engine, engine_rebuild.Underway):
            self._better = _Better(
                engine.variant,
                engine.made,
                partial(_open_engine, bundle, cache, how, engine.limit_bytes),
                "built anew for this GPU",
            )
        elif cache is not None and (choice.runtime, choice.device) == ("onnxruntime", "cpu"):
            artifact = self._optimized(cache, runtime.version(), wait=wait, verify=verify) or artifact
        self._session = self._open(artifact)
        self._loaded = replace(read_host_memory().above(self._baseline), peak_bytes=None)
        self._batch = self._engine_batch()  # samples at once; None: as many as are given

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What `run` expects."""
        return self._session.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What `run` returns, in order."""
        return self._session.outputs

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes' names."""
        return self._bundle.labels

    @property
    def variant(self) -> str:
        """The id of the variant that runs."""
        return self._choice.variant.id

    @property
    def placement(self) -> str:
        """Where it really runs, as the library says it."""
        return self._session.placement

    @property
    def signed_by(self) -> str | None:
        """The id of the trusted key that signed the bundle; None where no trusted keys were given."""
        return self._bundle.signed_by

    @property
    def why(self) -> tuple[str, ...]:
        """What was refused and why, why this variant was taken, and what has become of it since."""
        return tuple(self._why)

    def __call__(self, *arrays: Array) -> Array | tuple[Array, ...]:
        """The output for these inputs, in the model's order; a tuple when the model has several outputs."""
        if len(arrays) != len(self.inputs):
            raise InputRefused(f"the model has {len(self.inputs)} inputs, got {len(arrays)} arrays")
        outputs = self.run(None, {spec.name: array for spec, array in zip(self.inputs, arrays, strict=True)})
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def run(self, output_names: Sequence[str] | None, feeds: Mapping[str, Array]) -> list[Array]:
        """The outputs by name, all for None: onnxruntime's own signature. Inputs larger than the batch are split.

        Raises:
            InputRefused: names, dtypes or shapes do not fit.
            OutOfResource: there is no memory for the batch, nor for half of it.
            IntegrityError: the weights, which "lazy" has checked meanwhile, are not those promised.
        """
        if self._better is not None and self._better.made.done():
            self._take_over()
        outputs = self._run(feeds)
        if self._checked is not None:
            self._checked.result()
        if output_names is None:
            return outputs
        by_name = {spec.name: output for spec, output in zip(self.outputs, outputs, strict=True)}
        unknown = [name for name in output_names if name not in by_name]
        if unknown:
            raise InputRefused(f"output {unknown[0]!r} does not exist", hint=", ".join(by_name))
        return [by_name[name] for name in output_names]

    def predict(self, pictures: Sequence[Path | str | Array] | Path | str, *, topk: int = 5) -> list[list[Prediction]]:
        """The most probable classes of each picture, best first.

        Args:
            pictures: files, one file, or uint8 arrays (height, width) or (height, width, channels).
            topk: how many classes of each.
        """
        if topk < 1:
            raise UsageError(f"topk is {topk}, at least 1 is needed")
        if isinstance(pictures, (str, Path)):
            pictures = [pictures]
        found, at_once = [], min(self._batch or _PICTURES_AT_ONCE, _PICTURES_AT_ONCE)
        for start in range(0, len(pictures), at_once):
            prepared = np.concatenate([self._prepare(picture) for picture in pictures[start : start + at_once]])
            logits = self.run(None, {self.inputs[0].name: prepared})[0]
            found += [self._best(row, topk) for row in softmax(logits)]
        return found

    def fit_batch(self, limit: str | int) -> BatchFit:
        """The largest batch whose memory stays within `limit` (see `load`); from now on larger inputs are split.

        Raises:
            OutOfResource: not even batch 1 fits.
        """
        if self._choice.curve is None:
            raise OutOfResource(f"what {self.variant} needs is not known", hint="pack it again with measured memory")
        fit = largest_batch(self._choice.curve, parse_size(limit))
        self._batch = fit.batch
        return fit

    def settle(self, limit: str | int) -> None:
        """Runs the batch once, and lowers it until what is really held here is within `limit`; `why` says if it was.

        What was measured when the bundle was built was so on that machine, with what else it ran. Only on the CPU, and
        where nothing but the batch is free.

        Raises:
            OutOfResource: even one sample takes more; the model is closed.
        """
        limit_bytes = parse_size(limit)
        while (held_bytes := self._try_batch()) is not None and held_bytes > limit_bytes:
            batch, self._batch = self._batch or 1, max(1, (self._batch or 1) * limit_bytes // held_bytes)
            what = f"{self.variant} takes {show_size(held_bytes)} at batch {batch}, limit {show_size(limit_bytes)}"
            if batch == 1:
                self.close()
                raise OutOfResource(what, hint=f"memory_limit={held_bytes}")
            self._why.append(f"{what}: {self._batch} at once from now on")
            self.trim()

    def memory(self) -> Bill:
        """The bill of this session: host memory above what the process held before the model was opened.

        It counts whatever else the process has allocated since. The peak is unknown: it would be the process's, not
        the model's.
        """
        steady = replace(read_host_memory().above(self._baseline), peak_bytes=None)
        methods = {"allocator_bytes": self._session.device_method}
        device = DeviceMemory(allocator_bytes=self._session.device_bytes, methods=methods)
        return Bill({IMPORT: self._baseline, LOAD: self._loaded, STEADY: steady}, {STEADY: device})

    def trim(self) -> None:
        """Gives back what is not used between runs, for applications that wait: on the CPU all but some 2 MiB.

        The next run takes it again. Where the graph is optimized for this processor that costs some 15 ms, and a third
        of a second where hundreds of MiB of weights are packed; otherwise as much as loading it.
        """
        self._session.trim()
        give_back()

    def close(self) -> None:
        """Frees the session; a later run raises BackendError. Closing twice is harmless."""
        self._closed = True
        self._session.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, feeds: Mapping[str, Array]) -> list[Array]:
        """The outputs; a batch for which there is no memory is halved, once, and the batch stays so from then on."""
        session = self._session
        try:
            return run_in_batches(session, feeds, batch=self._batch) if self._batch else session.run(feeds)
        except OutOfResource as error:
            samples = count_samples(session.inputs, feeds)
            at_once = min(self._batch or samples, samples)
            if at_once < 2:
                raise
            self.trim()
            outputs = run_in_batches(session, feeds, batch=at_once // 2)
            self._batch = at_once // 2
            self._why.append(
                f"{self.variant}: no memory for batch {at_once}, {self._batch} from now on: {error.problem}"
            )
            return outputs

    def _try_batch(self) -> int | None:
        """Private bytes after a run of the batch on zeros; None where that cannot be tried."""
        free = [dim for spec in self.inputs for dim in spec.shape[1:] if isinstance(dim, str)]
        if self._choice.device != "cpu" or self._batch is None or free:
            return None
        self._run({spec.name: np.zeros(spec.at_batch(self._batch), spec.dtype) for spec in self.inputs})
        return read_host_memory().above(self._baseline).private_bytes

    def _optimized(self, cache: Cache, version: str | None, *, wait: bool, verify: str) -> Artifact | None:
        """The graph optimized for this processor, from the cache; None when there is none yet, or no use in one."""
        variant = self._choice.variant
        source = source_of(self._bundle, variant, version)
        if isinstance(source, str):
            return None
        try:
            found = cache.find(source, variant.id, verify=verify)
            if found is None and wait:
                specialize_variant(self._bundle, variant, source, cache)
                found = cache.find(source, variant.id, verify=verify)
        except IntegrityError as error:
            self._why.append(f"{variant.id}: {error}")
            found = None
            if not is_private(cache.folder):
                return None
        except MemoptError as error:
            self._why.append(f"{variant.id}: not optimized for this processor: {error}")
            return None
        if found is not None:
            self._why.append(f"{variant.id}: optimized for this processor, from {cache.folder}")
        else:
            self._why.append(f"{variant.id}: being optimized for this processor, for {cache.folder}")
            made = specialize_beside(self._bundle, variant, source, cache)
            same = self._choice
            self._better = _Better(
                variant.id, made, lambda graph: (same, self._open(graph)), "optimized for this processor"
            )
        return found

    def _take_over(self) -> None:
        """Goes on with what has been made for this machine meanwhile; runs under way end on what served until now."""
        better, self._better = self._better, None
        if better is None or self._closed:  # another thread has done it
            return
        try:
            self._choice, self._session = better.open(better.made.result())
            self._batch = self._engine_batch() or self._batch
            self._why.append(f"{better.name}: {better.what} from now on")
        except MemoptError as error:
            self._why.append(f"{better.name}: not {better.what}: {error}")
        if self._closed:
            self._session.close()

    def _engine_batch(self) -> int | None:
        engine = self._choice.variant.engine
        return max(profile.batches[1] for profile in engine.profiles) if engine else None

    def _prepare(self, picture: Path | str | Array) -> Array:
        steps = self._bundle.manifest.preprocess
        if not isinstance(picture, np.ndarray):
            return prepare_file(Path(picture), steps)
        if picture.dtype != np.uint8 or picture.ndim not in (2, 3):
            raise InputRefused(f"a picture is uint8 (height, width[, channels]), got {picture.dtype} {picture.shape}")
        return prepare(picture.reshape(1, *picture.shape[:2], -1), steps)

    def _best(self, probabilities: Array, topk: int) -> list[Prediction]:
        best = np.argsort(-probabilities, kind="stable")[:topk]
        labels = self.labels if len(self.labels) == len(probabilities) else [str(i) for i in range(len(probabilities))]
        return [Prediction(labels[i], float(probabilities[i])) for i in best]


def _choose(
    bundle: Bundle, cache: Cache | None, *, wait: bool, device: str, **asked: Any
) -> tuple[Choice, Artifact | engine_rebuild.Underway | None]:
    """The variant to run; and an engine to open in place of the bundle's, now or when it is built.

    An engine that does not fit this machine is built anew where that can be: beside, while another variant serves, or
    at once, where there is none to serve or the caller waits.
    """
    if cache is None or device not in ("auto", "tensorrt"):
        return choose(bundle, device=device, **asked), None
    try:
        choice = choose(bundle, device=device, **asked)
    except BackendError as error:
        stale = engine_rebuild.find_stale(bundle, asked["variant"])
        if stale is None:
            raise
        try:
            artifact = engine_rebuild.find_or_build(stale, bundle, cache)
        except MemoptError as failure:
            raise BackendError(f"{error.problem}; {stale.variant} cannot be built anew: {failure}") from error
        return _engine_within(bundle, artifact, asked["memory_limit"]), artifact
    stale = engine_rebuild.find_stale(bundle, asked["variant"]) if choice.variant.engine is None else None
    if stale is None:
        return choice, None
    try:
        found = engine_rebuild.find_or_build(stale, bundle, cache) if wait else engine_rebuild.find(stale, cache)
        if found is None:
            why = f"{stale.variant}: being built anew for {stale.gpu}, for {cache.folder}"
            underway = engine_rebuild.build_beside(stale, bundle, cache, limit_bytes=asked["memory_limit"])
            return replace(choice, why=(*choice.why, why)), underway
        rebuilt = _engine_within(bundle, found, asked["memory_limit"])
    except MemoptError as error:
        return replace(choice, why=(*choice.why, f"{stale.variant}: not built anew for this GPU: {error}")), None
    return replace(rebuilt, why=(*choice.why[:-1], *rebuilt.why)), found


def _engine_within(bundle: Bundle, artifact: Artifact, limit_bytes: int | None) -> Choice:
    """The choice of an engine that was built anew; OutOfResource if the limit does not hold it."""
    choice = engine_rebuild.choice_of(bundle, artifact)
    if limit_bytes is not None and (choice.need_bytes is None or choice.need_bytes > limit_bytes):
        raise OutOfResource(
            f"the new engine needs {show_size(choice.need_bytes)}, the limit is {show_size(limit_bytes)}"
        )
    return choice


def _runtime(choice: Choice, cache: Cache | None) -> Runtime:
    runtime = RUNTIMES[choice.runtime]
    return replace(runtime, kernels=cache.folder) if isinstance(runtime, TrtRuntime) and cache is not None else runtime


def _open_engine(
    bundle: Bundle, cache: Cache | None, how: Mapping[str, Any], limit_bytes: int | None, artifact: Artifact
) -> tuple[Choice, Session]:
    choice = _engine_within(bundle, artifact, limit_bytes)
    return choice, _runtime(choice, cache).open(artifact, device=choice.device, **how)


def _pool_within(limit_bytes: int, choice: Choice) -> MemoryPool | None:
    """An arena of twice what the limit leaves to activations, for room to place them; None where that is not known.

    A region that is just large enough for what is alive is too small for it in pieces (MobileNetV2 at batch 8: 47 MiB
    alive and 52 touched in a region of 128, but no run at all in one of 64). So the region is never smaller than the
    one in which the bundle was measured, and `settle` sees to what is touched of it.
    """
    if choice.curve is None:
        return None
    region_bytes = region_for(choice.variant.memory.file_bytes)
    return MemoryPool(max(2 * (limit_bytes - choice.curve.fixed_bytes), region_bytes), region_bytes=region_bytes)


def _in_background(bundle: Bundle, variant: Variant) -> Future[None]:
    """The check of what the bundle has left unchecked, under way in a thread of its own."""
    with_one_thread = ThreadPoolExecutor(1, thread_name_prefix="memopt-verify")
    checked = with_one_thread.submit(bundle.check_variant, variant)
    with_one_thread.shutdown(wait=False)
    return checked
