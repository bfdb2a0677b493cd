"""How good outputs are: against labels, and against the outputs of a reference."""

from __future__ import annotations

from dataclasses import dataclass

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


def confusion(logits: Array, labels: Array) -> Array:
    """How often each answer was given for each label: (classes, classes), row = label, column = answer.

    >>> confusion(np.array([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]]), np.array([1, 1, 0])).tolist()
    [[0, 1], [1, 1]]
    """
    if labels.min(initial=0) < 0:
        raise InputRefused(f"label {labels.min()} is negative", hint="labels count from 0")
    classes = max(logits.shape[1], int(labels.max(initial=0)) + 1)
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (labels, logits.argmax(axis=1)), 1)
    return counts


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


@dataclass(frozen=True)
class WorstSample:
    """The sample whose outputs are furthest from the reference's. `sqnr_db` is None where the reference is all zero."""

    index: int
    sqnr_db: float | None
    max_difference: float


def worst_sample(output: Array, reference: Array) -> WorstSample | None:
    """The sample with the lowest SQNR, the first of several; None where all are equal to the reference.

    Args:
        output: (samples, ...), finite.
        reference: of the same shape.

    >>> worst_sample(np.array([[1.0, 2.0], [1.0, 1.0]]), np.array([[1.0, 2.0], [1.0, 2.0]])).index
    1
    """
    wanted = reference.reshape(len(reference), -1).astype(np.float64)
    difference = wanted - output.reshape(len(output), -1)
    signal, noise = (wanted**2).sum(axis=1), (difference**2).sum(axis=1)
    if not noise.any():
        return None
    share = np.divide(noise, signal, out=np.where(noise > 0, np.inf, 0.0), where=signal > 0)
    index = int(share.argmax())
    decibels = ratio_db(float(signal[index]), float(noise[index]))
    return WorstSample(index, finite(decibels), float(np.abs(difference[index]).max()))


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
