"""What a comparison says of outputs: by labels, by a metric of the user's own, and by the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from memopt.accuracy import agreement, confusion, finite, max_difference, sqnr_db, topk, worst_sample
from memopt.errors import InputRefused, MemoptError
from memopt.report import Row
from memopt.tensors import Array

# What a user's own metric is: all outputs, each with a row for every sample, and the labels; the more, the better.
Metric = Callable[[list[Array], Array | None], float]


@dataclass(frozen=True)
class Judgement:
    """What outputs are judged by, besides the reference's."""

    labels: Array | None = None  # (samples,), class numbers; a metric of one's own may want others
    classes: tuple[str, ...] = ()  # the labels' names
    confusion: bool = False
    metric: Metric | None = None
    metric_name: str | None = None


def judged(row: Row, outputs: list[Array], expected: Array | None, judgement: Judgement) -> Row:
    """The row with what labels and metric say of it, and what the reference does; what cannot be judged is noted."""
    try:
        row = _by_labels(row, outputs[0], judgement)
        if judgement.metric is not None:
            row = replace(row, metric=_number(judgement.metric(outputs, judgement.labels), judgement.metric_name))
        return _by_reference(row, outputs[0], expected)
    except MemoptError as error:
        return replace(row, note=error.problem)


def _by_labels(row: Row, output: Array, judgement: Judgement) -> Row:
    """Top-1, top-5 where there are more classes than that, and the confusion where it is asked for."""
    labels = judgement.labels
    if labels is None or output.ndim != 2 or labels.ndim != 1 or labels.dtype.kind not in "iu":
        return row
    row = replace(row, top1=topk(output, labels, k=1))
    if output.shape[1] > 5:  # of five classes, the label is always among the first five
        row = replace(row, top5=topk(output, labels, k=5))
    if judgement.confusion:
        row = replace(row, confusion=tuple(map(tuple, confusion(output, labels).tolist())))
    return row


def _by_reference(row: Row, output: Array, expected: Array | None) -> Row:
    if expected is None:
        return row
    if output.shape != expected.shape:
        return replace(row, note=f"outputs are {output.shape}, the reference's {expected.shape}")
    if output.dtype.kind not in "biuf" or not np.isfinite(output).all() or not np.isfinite(expected).all():
        return replace(row, note="outputs, or the reference's, are not all finite numbers")
    return replace(
        row,
        agreement=agreement(output, expected) if output.ndim == 2 else None,  # (samples, classes)
        sqnr_db=finite(sqnr_db(output, expected)),
        max_difference=max_difference(output, expected),
        worst=worst_sample(output, expected),
    )


def _number(value: object, name: str | None) -> float:
    """What a user's metric returned."""
    try:
        number = float(value)  # type: ignore[arg-type]  # anything may come
    except (TypeError, ValueError) as error:
        raise InputRefused(f"{name} returned a {type(value).__name__}, not a number") from error
    if not np.isfinite(number):
        raise InputRefused(f"{name} returned {number}")
    return number
