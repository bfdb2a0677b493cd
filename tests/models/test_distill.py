from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from memopt.errors import InputRefused, UsageError
from memopt_models.checkpoint import Checkpoint
from memopt_models.data import DataSet
from memopt_models.distill import DistillSettings, distill, soft_target_loss
from memopt_models.train import Progress, TrainSettings, train

ONE = TrainSettings(epochs=1, learning_rate=1e-2)
TINY = {"width": 2, "depth": 1}


def test_better_of_both_trainings_is_kept(student: Checkpoint) -> None:
    both = {name: student.metrics[f"validation_top1_{name}"] for name in ("distilled", "plain")}
    kept = student.lineage[-1].settings["kept"]
    assert student.metrics["validation_top1"] == both[kept] == max(both.values())


def test_student_is_smaller_than_its_teacher(student: Checkpoint, dense: Checkpoint) -> None:
    assert student.network == "ds_cnn"
    assert student.parameters < dense.parameters / 50


def test_lineage_leads_back_to_the_teacher(student: Checkpoint, dense: Checkpoint, few: DataSet) -> None:
    stage = student.lineage[-1]
    assert student.lineage[:-1] == dense.lineage
    assert (stage.stage, stage.parents, stage.output_sha256) == ("distill", (dense.sha256,), student.sha256)
    assert stage.settings["temperature"] == 4.0
    assert stage.settings["train"]["epochs"] == 2
    assert stage.settings["data_fingerprint"] == few.fingerprint


def test_plain_training_is_the_same_as_without_a_teacher(dense: Checkpoint, few: DataSet) -> None:
    taught = distill(dense, "ds_cnn", TINY, few, DistillSettings(ONE))
    alone = train("ds_cnn", TINY, few, ONE)
    assert taught.metrics["validation_top1_plain"] == alone.metrics["validation_top1"]


def test_without_weight_of_the_teacher_both_trainings_are_one(dense: Checkpoint, few: DataSet) -> None:
    taught = distill(dense, "ds_cnn", TINY, few, DistillSettings(ONE, alpha=0.0))
    assert taught.sha256 == train("ds_cnn", TINY, few, ONE).sha256
    assert taught.lineage[-1].settings["kept"] == "distilled"


def test_distillation_is_the_same_every_time(dense: Checkpoint, few: DataSet) -> None:
    one, same = (distill(dense, "ds_cnn", TINY, few, DistillSettings(replace(ONE, shift=1))) for _ in range(2))
    assert one.sha256 == same.sha256


def test_student_can_go_on_from_a_checkpoint(dense: Checkpoint, student: Checkpoint, few: DataSet) -> None:
    longer = distill(dense, "ds_cnn", {}, few, DistillSettings(ONE), start=student)
    assert longer.lineage[-1].parents == (dense.sha256, student.sha256)
    assert [stage.stage for stage in longer.lineage] == ["train", "distill", "distill"]


def test_progress_names_both_trainings(dense: Checkpoint, few: DataSet) -> None:
    seen: list[Progress] = []
    distill(dense, "ds_cnn", TINY, few, DistillSettings(replace(ONE, batch_size=256)), on_step=seen.append)
    assert [progress.stage for progress in seen] == ["distilled", "plain"]


def test_student_prepares_its_inputs_as_its_teacher(dense: Checkpoint, student: Checkpoint, few: DataSet) -> None:
    other = replace(few, preprocess=(*few.preprocess[:2], {"op": "scale", "factor": 1.0}, few.preprocess[4]))
    assert distill(dense, "ds_cnn", TINY, other, DistillSettings(ONE)).preprocess == dense.preprocess
    stranger = replace(student, preprocess=other.preprocess)
    with pytest.raises(InputRefused) as raised:
        distill(dense, "ds_cnn", {}, few, DistillSettings(ONE), start=stranger)
    assert str(raised.value) == (
        "start and teacher prepare their inputs differently; hint: train both on the same data"
    )


def test_loss_is_the_formula_of_the_paper() -> None:
    teacher, temperature, alpha = nn.Linear(3, 4), 2.5, 0.3
    inputs, logits, labels = torch.randn(6, 3), torch.randn(6, 4), torch.randint(0, 4, (6,))
    p, q = (torch.softmax(z / temperature, dim=1) for z in (teacher(inputs), logits))
    divergence = (p * (p / q).log()).sum(dim=1).mean()
    expected = alpha * temperature**2 * divergence + (1 - alpha) * functional.cross_entropy(logits, labels)
    loss = soft_target_loss(teacher, DistillSettings(ONE, temperature, alpha))(logits, labels, inputs)
    torch.testing.assert_close(loss, expected)


def test_loss_of_an_equal_student_is_the_label_alone() -> None:
    teacher, inputs, labels = nn.Linear(3, 4), torch.randn(6, 3), torch.randint(0, 4, (6,))
    logits = teacher(inputs)
    loss = soft_target_loss(teacher, DistillSettings(ONE, alpha=0.5))(logits, labels, inputs)
    torch.testing.assert_close(loss, 0.5 * functional.cross_entropy(logits, labels))


def test_teacher_does_not_learn() -> None:
    teacher, student, inputs = nn.Linear(3, 4), nn.Linear(3, 4), torch.randn(6, 3)
    soft_target_loss(teacher, DistillSettings(ONE))(
        student(inputs), torch.zeros(6, dtype=torch.long), inputs
    ).backward()
    assert teacher.weight.grad is None
    assert student.weight.grad is not None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0, a positive number is needed; hint: --temperature 4"),
        ({"temperature": float("inf")}, "temperature is inf, a positive number is needed; hint: --temperature 4"),
        ({"alpha": 1.1}, "alpha is 1.1, it lies between 0 and 1; hint: --alpha 0.5"),
        ({"alpha": float("nan")}, "alpha is nan, it lies between 0 and 1; hint: --alpha 0.5"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        DistillSettings(ONE, **settings)
    assert str(raised.value) == message
