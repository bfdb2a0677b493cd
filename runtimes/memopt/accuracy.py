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
    return ratio_db(float((signal**2).sum()), float(((signal - output.astype(np.float64)) ** 2).sum()))


def ratio_db(signal: float, noise: float) -> float:
    """10 log10(signal / noise): inf where there is no noise, -inf where there is nothing else.

    >>> ratio_db(100.0, 1.0), ratio_db(1.0, 0.0), ratio_db(0.0, 1.0)
    (20.0, inf, -inf)
    """
    return float("inf") if noise == 0 else 10 * float(np.log10(signal / noise)) if signal else float("-inf")


def kl_divergence(logits: Array, reference: Array) -> float:
    """How far the softmax of the logits is from that of the reference's: sum(p log(p / q)) in nats, mean over samples.

    Args:
        logits: (samples, classes), of which q is the softmax.
        reference: (samples, classes), of which p is the softmax.

    >>> round(kl_divergence(np.array([[0.0, 0.0]]), np.array([[np.log(3.0), 0.0]])), 4)  # 3/4 log 3/2 + 1/4 log 1/2
    0.1308
    """
    q, p = _log_softmax(logits), _log_softmax(reference)
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


def _log_softmax(logits: Array) -> Array:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True).astype(np.float64)
    logarithms: Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return logarithms


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
