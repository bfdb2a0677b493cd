"""What is said of outputs, and what is noted where nothing can be said."""

from __future__ import annotations

import numpy as np
import pytest

from memopt.accuracy import confusion, worst_sample
from memopt.errors import InputRefused
from memopt.judgement import Judgement, judged
from memopt.report import Row
from memopt.tensors import Array

ROW = Row("a", "onnxruntime", "cpu", 1)
LOGITS = np.random.default_rng(0).normal(size=(40, 7)).astype(np.float32)
LABELS = LOGITS.argmax(axis=1)


def said(output: Array, judgement: Judgement, expected: Array | None = None) -> Row:
    return judged(ROW, [output], expected, judgement)


def test_top5_is_told_of_more_than_five_classes() -> None:
    row = said(LOGITS, Judgement((LABELS + 1) % 7))
    assert row.top1 == 0.0
    assert row.top5 is not None
    assert 0.4 < row.top5 < 1.0
    assert said(LOGITS[:, :5], Judgement(LABELS)).top5 is None


@pytest.mark.parametrize("labels", [None, LABELS.astype(np.float32), np.zeros((40, 4), np.int64)])
def test_labels_that_are_no_classes_are_left_to_a_metric(labels: Array | None) -> None:
    seen = []
    row = said(LOGITS, Judgement(labels, metric=lambda outputs, given: seen.append(given) or 0.5, metric_name="m:f"))
    assert (row.top1, row.metric, row.note) == (None, 0.5, None)
    assert seen[0] is labels


def test_confusion_counts_every_sample_once() -> None:
    row = said(LOGITS, Judgement(LABELS, confusion=True))
    assert np.array_equal(row.confusion, np.diag(np.bincount(LABELS, minlength=7)))
    assert confusion(LOGITS, np.full(40, 9)).shape == (10, 10)
    with pytest.raises(InputRefused, match="label -1 is negative"):
        confusion(LOGITS, np.array([-1] * 40))


@pytest.mark.parametrize(
    ("answer", "note"),
    [
        ("much", "m:f returned a str, not a number"),
        (None, "m:f returned a NoneType, not a number"),
        (float("nan"), "m:f returned nan"),
        (np.float32(0.25), None),
        (np.array(3), None),
    ],
)
def test_a_metric_returns_a_number_or_a_note(answer: object, note: str | None) -> None:
    row = said(LOGITS, Judgement(LABELS, metric=lambda *_: answer, metric_name="m:f"))  # type: ignore[arg-type,return-value]
    assert row.note == note
    assert row.top1 == 1.0  # what was known before stays


def test_a_metric_that_fails_leaves_the_rest_of_the_row() -> None:
    def fails(outputs: list[Array], labels: Array | None) -> float:
        raise InputRefused("m:f raised ValueError: no")

    row = said(LOGITS, Judgement(LABELS, metric=fails, metric_name="m:f"))
    assert (row.top1, row.metric, row.note) == (1.0, None, "m:f raised ValueError: no")


def test_outputs_beside_the_reference() -> None:
    equal = said(LOGITS, Judgement(), LOGITS)
    assert (equal.agreement, equal.sqnr_db, equal.max_difference, equal.worst) == (1.0, None, 0.0, None)
    off = LOGITS.copy()
    off[17, 3] += 2.0
    row = said(off, Judgement(), LOGITS)
    assert row.worst is not None
    assert (row.worst.index, row.worst.max_difference) == (17, pytest.approx(2.0, rel=1e-6))
    signal = float((LOGITS[17].astype(float) ** 2).sum())
    assert row.worst.sqnr_db == pytest.approx(10 * np.log10(signal / 4), abs=1e-4)
    maps = said(np.ones((4, 3, 8, 8)), Judgement(), np.ones((4, 3, 8, 8)))
    assert (maps.agreement, maps.max_difference) == (None, 0.0)


@pytest.mark.parametrize(
    ("output", "note"),
    [
        (LOGITS[:, :3], "outputs are (40, 3), the reference's (40, 7)"),
        (np.where(LOGITS > 0, np.nan, LOGITS), "outputs, or the reference's, are not all finite numbers"),
        (np.full((40, 7), "x"), "outputs, or the reference's, are not all finite numbers"),
    ],
)
def test_outputs_that_cannot_be_held_against_the_reference_are_noted(output: Array, note: str) -> None:
    row = said(output, Judgement(), LOGITS)
    assert (row.sqnr_db, row.max_difference, row.note) == (None, None, note)


def test_the_worst_sample_by_hand() -> None:
    reference = np.array([[1.0, 0.0], [0.0, 0.0], [2.0, 0.0]])
    assert worst_sample(reference, reference) is None
    silent = worst_sample(reference + np.array([[0.0, 0.0], [0.0, 0.1], [0.0, 0.0]]), reference)
    assert silent is not None
    assert (silent.index, silent.sqnr_db, silent.max_difference) == (1, None, pytest.approx(0.1))
    both = worst_sample(reference + np.array([[0.1, 0.0], [0.0, 0.0], [0.1, 0.0]]), reference)
    assert both is not None
    assert (both.index, both.sqnr_db) == (0, pytest.approx(20.0))
