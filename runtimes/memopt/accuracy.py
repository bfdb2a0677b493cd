"""How good outputs are: against labels, and against the outputs of a reference."""

from __future__ import annotations

import numpy as np

from memopt.errors import InputRefused
from memopt.tensors import Array


def top1(logits: Array, labels: Array) -> float:
    """Share of samples whose largest logit is the label, 0 to 1.

    Args:
        logits: (samples, classes).
        labels: (samples,), integers.

    >>> top1(np.array([[1.0, 2.0], [3.0, 0.0]]), np.array([1, 1]))
    0.5
    """
    return topk(logits, labels, k=1)


def topk(logits: Array, labels: Array, *, k: int) -> float:
    """Share of samples whose label is among the `k` largest logits, 0 to 1."""
    if logits.ndim != 2 or len(logits) != len(labels) or not len(labels):
        raise InputRefused(
            f"outputs are {logits.shape} for {len(labels)} labels", hint="(samples, classes) and (samples,)"
        )
    best = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    return float((best == labels[:, None]).any(axis=1).mean())


def agreement(logits: Array, reference: Array) -> float:
    """Share of samples with the same top class as the reference, 0 to 1."""
    return top1(logits, reference.argmax(axis=1))


def sqnr_db(output: Array, reference: Array) -> float:
    """Signal to quantization noise ratio in dB: 10 log10(sum(reference²) / sum((reference - output)²)); inf when equal.

    >>> round(sqnr_db(np.array([1.1, 2.0]), np.array([1.0, 2.0])), 1)
    27.0
    """
    signal = reference.astype(np.float64)
    noise = float(((signal - output.astype(np.float64)) ** 2).sum())
    power = float((signal**2).sum())
    return float("inf") if noise == 0 else 10 * float(np.log10(power / noise)) if power else float("-inf")


def finite(value: float) -> float | None:
    """The value; None, as JSON has no infinity, for the ratio of equal outputs.

    >>> finite(27.0), finite(float("inf"))
    (27.0, None)
    """
    return value if np.isfinite(value) else None


def max_difference(output: Array, reference: Array) -> float:
    """The largest absolute difference."""
    return float(np.abs(output.astype(np.float64) - reference.astype(np.float64)).max(initial=0.0))


def softmax(logits: Array) -> Array:
    """Probabilities along the last axis, float64, computed without overflow."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    exponentials: Array = np.exp(shifted)
    probabilities: Array = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return probabilities
