"""Which variant of a bundle runs here, and why: the reasons are part of the answer."""

from __future__ import annotations

from dataclasses import dataclass

from memopt.batching import memory_line
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


@dataclass(frozen=True)
class Choice:
    """One variant on one runtime and device. `why` tells what was refused, and why this one was taken."""

    variant: Variant
    runtime: str
    device: str
    need_bytes: int  # at batch 1
    why: tuple[str, ...]


def choose(
    bundle: Bundle, *, device: str = "auto", variant: str | None = None, memory_limit: int | None = None,
    max_drop: float = 1.0,
) -> Choice:  # fmt: skip
    """The variant to run: on the first device that works, the one that needs least memory among the accurate ones.

    Accurate is what loses at most `max_drop` percentage points of validation accuracy against the best variant of the
    bundle. Under a limit that no accurate variant meets, the most accurate one that fits is taken, and `why` says so.

    Raises:
        UsageError: a device name that does not exist.
        BackendError: nothing in the bundle can run on the device.
        OutOfResource: nothing fits into the limit; the message names the least that is needed.
    """
    if device != "auto" and device not in DEVICES:
        raise UsageError(f"device {device!r} is not known", hint="auto, " + ", ".join(DEVICES))
    if variant is not None:
        bundle.manifest.variant(variant)
    refused: list[str] = []
    for name in DEVICES if device == "auto" else (device,):
        runnable = _runnable(bundle, name, variant, refused)
        if runnable:
            return _least(bundle, runnable, memory_limit, max_drop, refused)
    raise BackendError(f"{bundle.path} has nothing that runs on {device}: " + "; ".join(refused))


def _runnable(bundle: Bundle, device: str, variant: str | None, refused: list[str]) -> list[Choice]:
    """Every variant that a runtime of this device opens here; the others leave their reason in `refused`."""
    found = []
    for runtime_name, where in DEVICES[device]:
        runtime = RUNTIMES[runtime_name]
        candidates = [v for v in bundle.manifest.variants if v.runtime == runtime_name and variant in (None, v.id)]
        reason = runtime.unavailable(where) if candidates else "no such variant in the bundle"
        if reason:
            refused.append(f"{runtime_name} {where}: {reason}")
            continue
        for candidate in candidates:
            refusal = runtime.refuses(bundle.artifact(candidate.id))
            if refusal:
                refused.append(f"{candidate.id}: {refusal}")
                continue
            need = memory_line(candidate, runtime=runtime_name, device=where).at(1)
            found.append(Choice(candidate, runtime_name, where, need, ()))
    return found


def _least(
    bundle: Bundle, runnable: list[Choice], memory_limit: int | None, max_drop: float, refused: list[str]
) -> Choice:
    fitting = [choice for choice in runnable if memory_limit is None or choice.need_bytes <= memory_limit]
    if not fitting:
        least = min(runnable, key=lambda choice: choice.need_bytes)
        raise OutOfResource(
            f"nothing fits into {show_size(memory_limit)}: the smallest variant, {least.variant.id}, "
            f"needs {show_size(least.need_bytes)} at batch 1",
            hint=f"memory_limit of at least {least.need_bytes} bytes",
        )
    best = max((v.metrics.get(CHOSEN_BY, 0.0) for v in bundle.manifest.variants), default=0.0)
    accurate = [choice for choice in fitting if _drop(choice, best) <= max_drop]
    limit = f" within {show_size(memory_limit)}" if memory_limit is not None else ""
    if accurate:
        chosen = min(accurate, key=lambda choice: choice.need_bytes)
        reason = f"needs least ({show_size(chosen.need_bytes)} at batch 1) of {len(accurate)} variants{limit}"
        reason += f" at most {max_drop:g} pp below the best"
    else:
        chosen = min(fitting, key=lambda choice: (_drop(choice, best), choice.need_bytes))
        reason = f"the most accurate{limit}, {_drop(chosen, best):.2f} pp below the best variant"
    chosen_line = f"{chosen.variant.id} on {chosen.runtime} {chosen.device}: {reason}"
    return Choice(chosen.variant, chosen.runtime, chosen.device, chosen.need_bytes, (*refused, chosen_line))


def _drop(choice: Choice, best: float) -> float:
    """Percentage points of validation accuracy below the best; 0 for a bundle without metrics."""
    return 100 * (best - choice.variant.metrics.get(CHOSEN_BY, 0.0))
