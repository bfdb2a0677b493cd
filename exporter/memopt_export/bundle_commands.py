"""What commands about bundles do: `pack`, `keygen`, `run`, `verify`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from memopt.accuracy import max_difference
from memopt.artifact import Artifact, open_artifact
from memopt.bundle import Bundle, open_bundle
from memopt.errors import InputRefused, MemoptError, UsageError
from memopt.files import read_text, refuse_own_input, sha256_file
from memopt.preprocess import prepare
from memopt.runtimes import runtime
from memopt.session import Runtime
from memopt.tensors import Array

if TYPE_CHECKING:
    from memopt_export import pack as packing

PREPROCESSING = "preprocessing"  # stands for a variant in the row of the golden pictures


@dataclass(frozen=True)
class Packed:
    """A bundle on disk, or what else `pack` writes."""

    path: str
    format: str
    size_bytes: int
    sha256: str | None  # of a single file
    variants: tuple[str, ...]
    files: int
    signed_by: str | None = None
    left_out: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SavedKey:
    """A pair of keys on disk."""

    path: str
    public_path: str
    key_id: str


@dataclass(frozen=True)
class Predicted:
    """The classes of each picture, best first, and why this variant ran."""

    variant: str
    why: tuple[str, ...]
    pictures: tuple[tuple[str, tuple[tuple[str, float], ...]], ...]  # (file, ((label, probability), ...))


@dataclass(frozen=True)
class Replay:
    """One variant against the golden outputs, on one runtime of this machine; or the pictures against the inputs."""

    variant: str
    runtime: str
    max_difference: float | None
    atol: float | None
    reason: str | None = None
    excused: bool = False  # this machine lacks what the variant needs

    @property
    def holds(self) -> bool:
        """Whether the outputs are the golden ones, or cannot be had on this machine."""
        if self.max_difference is None or self.atol is None:
            return self.excused
        return self.max_difference <= self.atol


@dataclass(frozen=True)
class Verification:
    """A bundle whose structure and digests hold, and what its variants compute here."""

    path: str
    files: int
    size_bytes: int
    replays: tuple[Replay, ...] = ()
    signed_by: str | None = None  # the trusted key whose signature holds
    signatures: tuple[str, ...] = ()  # the keys that claim to have signed

    @property
    def holds(self) -> bool:
        """Whether every variant that runs here gives the golden outputs, and, where that was asked, one does run."""
        ran = [replay for replay in self.replays if not replay.excused and replay.variant != PREPROCESSING]
        return all(replay.holds for replay in self.replays) and (bool(ran) or not self.replays)


def pack(
    paths: Sequence[Path], output: Path, *, form: str, name: str | None, data: str | None, labels: Path | None,
    license_id: str | None, license_file: Path | None = None, sign: Path | None = None,
    passphrase: str | None = None, specialized: bool = False, force: bool = False, data_root: Path | None = None,
) -> Packed:  # fmt: skip
    """A bundle of these graphs and engines; labels, preprocessing and golden samples come from the data set.

    With `specialized`, every graph that gains by it stands beside one that is optimized for this processor.
    """
    from memopt.specialization import gains_nothing
    from memopt_export import formats
    from memopt_export import pack as packing
    from memopt_export.signing import load_key
    from memopt_export.specialize import specialize
    from memopt_export.stages import tool_versions
    from memopt_models.data import Pictures, is_data_set, open_data, stream_samples

    refuse_own_input(output, paths)
    key = load_key(sign, passphrase) if sign is not None else None
    parts = _parts(paths)
    graphs = [part for part in parts if isinstance(part, packing.OnnxPart)]
    skipped = {
        part.id: why for part in graphs if specialized and (why := gains_nothing(part.graph.precision)) is not None
    }
    parts += [specialize(part) for part in graphs if specialized and part.id not in skipped]
    named = data is not None and bool(graphs) and is_data_set(data, graphs[0].graph.inputs)
    opened = open_data(data, root=data_root) if data is not None and named else None
    golden, pictures, steps = {}, None, graphs[0].graph.preprocess or () if graphs else ()
    if data and graphs:
        first = graphs[0].graph
        at_most = first.fixed_batch or packing.GOLDEN_SAMPLES
        found = stream_samples(
            data, split="test", inputs=first.inputs, preprocess=first.preprocess, root=data_root, at_most=at_most
        )
        golden = found.pick(slice(None)).feeds
        if isinstance(found, Pictures):
            pictures, steps = found.pictures, tuple(map(dict, found.steps))
    contents = packing.Contents(
        name=name or output.stem,
        parts=tuple(parts),
        labels=_read_labels(labels) if labels else opened.classes if opened else (),
        preprocess=steps,
        golden_inputs=golden,
        golden_pictures=pictures,
        license=license_id,
        license_text=read_text(license_file) if license_file else None,
        tools=tool_versions(),
    )
    written = formats.write(form, contents, output, sign=key, force=force)
    size = sum(path.stat().st_size for path in (output, *output.rglob("*")) if path.is_file())
    digest = sha256_file(output) if output.is_file() else None
    signed_by = key.key_id if key else None
    left_out = skipped | written.left_out
    return Packed(str(output), form, size, digest, written.variants, written.files, signed_by, left_out)


def keygen(output: Path, passphrase: str | None, *, force: bool) -> SavedKey:
    """A new pair of keys: the private one locked by the passphrase, the public one beside it."""
    from memopt_export import signing

    key = signing.generate()
    signing.save_key(key, output, passphrase or "", force=force)
    return SavedKey(str(output), str(signing.public_path(output)), key.key_id)


def run(
    bundle: Path, pictures: Sequence[Path], *, device: str, variant: str | None, memory_limit: str | None, topk: int,
    trusted_keys: Sequence[Path] = (), trust_engines: bool = False,
) -> Predicted:  # fmt: skip
    """The classes of these pictures, by the embedded runtime."""
    import memopt

    with memopt.load(
        bundle, device=device, variant=variant, memory_limit=memory_limit, trusted_keys=trusted_keys,
        trust_engines=trust_engines,
    ) as model:  # fmt: skip
        found = model.predict(pictures, topk=topk)
        answers = tuple(
            (str(picture), tuple((p.label, p.probability) for p in best))
            for picture, best in zip(pictures, found, strict=True)
        )
        return Predicted(model.variant, model.why, answers)


def verify(path: Path, *, replay: bool, trusted_keys: Sequence[Path] = (), trust_engines: bool = False) -> Verification:
    """Structure and digests of a bundle, and its signature when keys are given.

    With `replay`, the golden outputs on every runtime of this machine as well.
    """
    bundle = open_bundle(path, trusted_keys=trusted_keys)
    size = sum(len(entry) for entry in bundle.entries.values())
    replays = tuple(_replay(bundle, trust_engines=trust_engines)) if replay else ()
    return Verification(str(path), len(bundle.manifest.files), size, replays, bundle.signed_by, bundle.signatures)


def _read_labels(path: Path) -> tuple[str, ...]:
    return tuple(read_text(path).removesuffix("\n").split("\n"))


def _parts(paths: Sequence[Path]) -> list[packing.OnnxPart | packing.EnginePart]:
    """The parts of a bundle: graphs first, then the engines built from them, found by digest."""
    from memopt_export.graph import load_graph
    from memopt_export.pack import EnginePart, OnnxPart, engine_id

    parts: list[OnnxPart | EnginePart] = []
    for path in paths:
        if path.suffix not in (".onnx", ".engine"):
            raise UsageError(f"{path} cannot be packed", hint="*.onnx, and *.engine built from one of them")
    for path in (path for path in paths if path.suffix == ".onnx"):
        parts.append(OnnxPart(path.stem, path.stem, load_graph(path)))
    sources = {part.graph.sha256: part for part in parts if isinstance(part, OnnxPart)}
    for path in (path for path in paths if path.suffix == ".engine"):
        artifact = open_artifact(path)
        assert artifact.engine is not None  # open_artifact reads the sidecar
        source = sources.get(artifact.engine.onnx_sha256)
        if source is None:
            raise UsageError(f"{path} was built from a graph that is not packed with it", hint="name its .onnx as well")
        precision, data = source.graph.precision, bytes(artifact.data)
        name = engine_id(path.stem, artifact.engine.flavor)
        parts.append(EnginePart(name, source.network, precision, data, artifact.engine, source.id))
    return parts


def _replay(bundle: Bundle, *, trust_engines: bool) -> Iterator[Replay]:
    """Every variant on every device of its runtime that works here; what a machine lacks is no fault of the bundle."""
    if bundle.manifest.golden is None:
        raise InputRefused(f"{bundle.path} has no golden outputs", hint="memopt-export pack --data SPEC")
    inputs, pictures = bundle.golden_inputs(), bundle.golden_pictures()
    if pictures is not None:
        prepared = prepare(pictures, bundle.manifest.preprocess)
        yield Replay(PREPROCESSING, "numpy", max_difference(prepared, next(iter(inputs.values()))), 0.0)
    for variant in bundle.manifest.variants:
        expected = bundle.golden_outputs(variant.id)
        made_for = runtime(variant.runtime)
        artifact = bundle.artifact(variant.id)
        distrusted = bundle.distrusts(variant, trust_engines=trust_engines)
        for device in filter(artifact.runs_on, made_for.DEVICES):
            reason = distrusted or made_for.unavailable(device) or made_for.refuses(artifact)
            place = f"{variant.runtime} {device}"
            if reason is not None:
                yield Replay(variant.id, place, None, None, reason, excused=True)
            else:
                replay = Replay(variant.id, place, None, bundle.manifest.golden.atol[variant.id])
                yield _replay_on(replay, artifact, made_for, device, inputs, expected)


def _replay_on(
    replay: Replay, artifact: Artifact, made_for: Runtime, device: str, inputs: Mapping[str, Array],
    expected: Sequence[Array],
) -> Replay:  # fmt: skip
    """What the artifact computes, held against what is expected."""
    try:
        session = made_for.open(artifact, device=device)
        got = session.run(inputs)
        session.close()
    except MemoptError as error:
        return replace(replay, reason=error.problem)
    differences = [max_difference(a, b) if a.shape == b.shape else np.inf for a, b in zip(got, expected, strict=True)]
    worst = float(np.max(differences))
    if not np.isfinite(worst):
        return replace(replay, reason="outputs are not finite, or of another shape")
    return replace(replay, max_difference=worst)
