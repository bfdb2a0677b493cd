"""Which variant of a bundle runs here, and why: the reasons are part of the answer."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from memopt.batching import MemoryCurve, memory_curve
from memopt.bundle import Bundle
from memopt.errors import BackendError, OutOfResource, UsageError
from memopt.manifest import Variant
from memopt.runtimes import RUNTIMES
from memopt.sizes import show_size

# What a device name means, as (runtime, device) pairs; "auto" tries them in this order.
DEVICES = {
    "tensorrt": (("tensorrt", "cuda"), ("tensorrt-rtx", "cuda")),
    "cuda": (("onnxruntime", "cuda"),),
    "cpu": (("onnxruntime", "cpu"),),
}
CHOSEN_BY = "validation_top1"  # the metric that selects; the test split is only ever reported
_ROUNDING = 1e-9  # of percentage points: 0.99 - 0.98 is a little more than one


@dataclass(frozen=True)
class Choice:
    """One variant on one runtime and device. `why` tells what was refused, and why this one was taken."""

    variant: Variant
    runtime: str
    device: str
    curve: MemoryCurve | None  # what it needs over the batch, where that is known
    why: tuple[str, ...] = ()

    @property
    def need_bytes(self) -> int | None:
        """What it needs at batch 1."""
        return self.curve.at(1) if self.curve is not None else None


def choose(
    bundle: Bundle, *, device: str = "auto", variant: str | None = None, memory_limit: int | None = None,
    max_drop: float = 1.0, trust_engines: bool = False,
) -> Choice:  # fmt: skip
    """The variant to run: on the first device that works, the one that needs least memory among the accurate ones.

    Accurate is what loses at most `max_drop` percentage points of validation accuracy against the best variant of the
    bundle. Under a limit that no accurate variant meets, the most accurate one that fits is taken, and `why` says so.
    A graph optimized for this very processor goes before the portable one that it was made from.
    Engines are code: they are left out, and `why` says so, unless a trusted key signed the bundle or `trust_engines`.

    Raises:
        UsageError: a device name that does not exist.
        BackendError: nothing in the bundle can run on the device.
        OutOfResource: nothing fits into the limit; the message names the least that is needed.
    """
    if device != "auto" and device not in DEVICES:
        raise UsageError(f"device {device!r} is not known", hint="auto, " + ", ".join(DEVICES))
    if variant is not None:
        bundle.manifest.variant(variant)
    distrusted = {v.id: bundle.distrusts(v, trust_engines=trust_engines) for v in bundle.manifest.variants}
    refused = [f"{name}: {why}" for name, why in distrusted.items() if why is not None and variant in (None, name)]
    trusted = [v for v in bundle.manifest.variants if distrusted[v.id] is None and variant in (None, v.id)]
    too_large: list[Choice] = []
    for name in DEVICES if device == "auto" else (device,):
        runnable = _runnable(bundle, name, trusted, refused)
        fitting = [choice for choice in runnable if _fits(choice, memory_limit)]
        if fitting:
            return _best(bundle, fitting, memory_limit, max_drop, refused)
        too_large += runnable
        refused += [_too_large(choice, memory_limit) for choice in runnable]
    if too_large:
        everything = [v for v in bundle.manifest.variants if distrusted[v.id] is None]
        raise _nothing_fits(bundle, too_large, everything, memory_limit)
    raise BackendError(f"{bundle.path} has nothing that runs on {device}: " + "; ".join(refused))


def _runnable(bundle: Bundle, device: str, variants: list[Variant], refused: list[str]) -> list[Choice]:
    """Each of the variants that a runtime of this device opens here; the others leave their reason in `refused`."""
    found = []
    for runtime_name, where in DEVICES[device]:
        runtime = RUNTIMES[runtime_name]
        candidates = [variant for variant in variants if variant.runtime == runtime_name]
        reason = runtime.unavailable(where) if candidates else "no variant to run"
        if reason:
            refused.append(f"{runtime_name} {where}: {reason}")
            continue
        for candidate in candidates:
            artifact = bundle.artifact(candidate.id)
            refusal = runtime.refuses(artifact) if artifact.runs_on(where) else f"not for {where}"
            if refusal:
                refused.append(f"{candidate.id}: {refusal}")
                continue
            found.append(Choice(candidate, runtime_name, where, _curve(bundle, candidate, runtime_name, where)))
    return found


def _curve(bundle: Bundle, variant: Variant, runtime: str, device: str) -> MemoryCurve | None:
    """What the variant needs; an optimized graph that was not measured is taken to need what the portable one does."""
    if variant.cpu is not None and variant.source is not None and not variant.memory.measured:
        variant = bundle.manifest.variant(variant.source)
    return memory_curve(variant, runtime=runtime, device=device)


def _fits(choice: Choice, memory_limit: int | None) -> bool:
    """Whether it is known to stay within the limit."""
    return memory_limit is None or (choice.need_bytes is not None and choice.need_bytes <= memory_limit)


def _best(
    bundle: Bundle, fitting: list[Choice], memory_limit: int | None, max_drop: float, refused: list[str]
) -> Choice:
    best = max(_accuracy(bundle, variant) for variant in bundle.manifest.variants)
    drops = [100 * (best - _accuracy(bundle, choice.variant)) for choice in fitting]
    limit = f" within {show_size(memory_limit)}" if memory_limit is not None else ""
    accurate = [choice for choice, drop in zip(fitting, drops, strict=True) if drop <= max_drop + _ROUNDING]
    if accurate:
        chosen = min(accurate, key=_cost)
        reason = f"needs least ({show_size(chosen.need_bytes)} at batch 1) of {len(accurate)} variants{limit}"
        reason += f" at most {max_drop:g} pp below the best"
    else:
        drop, _, chosen = min(
            ((drop, _cost(choice), choice) for choice, drop in zip(fitting, drops, strict=True)),
            key=lambda each: each[:2],
        )
        reason = f"the most accurate{limit}, {drop:.2f} pp below the best variant"
    if chosen.variant.cpu is not None:
        reason += ", optimized for this processor"
    why = f"{chosen.variant.id} on {chosen.runtime} {chosen.device}: {reason}"
    return replace(chosen, why=(*refused, why))


def _accuracy(bundle: Bundle, variant: Variant) -> float:
    """Validation accuracy, of an engine that of the graph it was built from; 0 for a bundle without metrics."""
    if CHOSEN_BY not in variant.metrics and variant.source is not None:
        variant = bundle.manifest.variant(variant.source)
    return variant.metrics.get(CHOSEN_BY, 0.0)


def _cost(choice: Choice) -> tuple[float, bool]:
    """Bytes at batch 1, what is not known counting as most; of two that need the same, the optimized one is taken."""
    return math.inf if choice.need_bytes is None else choice.need_bytes, choice.variant.cpu is None


def _too_large(choice: Choice, memory_limit: int | None) -> str:
    return (
        f"{choice.variant.id} on {choice.runtime} {choice.device}: needs {show_size(choice.need_bytes)} at batch 1, "
        + (f"the limit is {show_size(memory_limit)}")
    )


def _nothing_fits(
    bundle: Bundle, asked: list[Choice], variants: list[Variant], memory_limit: int | None
) -> OutOfResource:
    """What the variant needs that would have been taken, and the least that any of the bundle does."""
    wanted = min(asked, key=lambda choice: (-_accuracy(bundle, choice.variant), _cost(choice)))
    names = {choice.device for choice in asked}
    others = [choice for name in DEVICES for choice in _runnable(bundle, name, variants, []) if choice.device in names]
    least = min(others, key=_cost)
    return OutOfResource(
        f"{wanted.variant.id} needs {show_size(wanted.need_bytes)} at batch 1, limit {show_size(memory_limit)}; "
        f"smallest variant: {least.variant.id} {show_size(least.need_bytes)}",
        hint=_more_memory(least, memory_limit),
    )


def _more_memory(least: Choice, memory_limit: int | None) -> str | None:
    if least.need_bytes is None:
        return None
    fits = memory_limit is not None and least.need_bytes <= memory_limit
    return f"variant={least.variant.id!r}" if fits else f"memory_limit={least.need_bytes}"
