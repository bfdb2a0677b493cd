from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from memopt.errors import InputRefused, UsageError
from memopt_models.checkpoint import Checkpoint
from memopt_models.data import DataSet
from memopt_models.distill import DistillSettings, distill, soft_target_loss, taught, trainee
from memopt_models.networks import build
from memopt_models.train import Progress, TrainSettings, fit_module, train

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
    steps = [progress.stage for progress in seen if not progress.note]
    assert steps == ["plain", "distilled"]  # in this order the teacher is held against the plain student first


def test_student_prepares_its_inputs_as_its_teacher(dense: Checkpoint, student: Checkpoint, few: DataSet) -> None:
    other = replace(few, preprocess=(*few.preprocess[:2], {"op": "scale", "factor": 1.0}, few.preprocess[4]))
    assert distill(dense, "ds_cnn", TINY, other, DistillSettings(ONE)).preprocess == dense.preprocess
    stranger = replace(student, preprocess=other.preprocess)
    with pytest.raises(InputRefused) as raised:
        distill(dense, "ds_cnn", {}, few, DistillSettings(ONE), start=stranger)
    assert str(raised.value) == (
        "start and teacher prepare their inputs differently; hint: train both on the same data"
    )


@pytest.mark.parametrize("shift", [0, 2])
def test_teacher_worse_than_the_plain_student_on_what_it_sees_is_warned_of(
    dense: Checkpoint, few: DataSet, shift: int
) -> None:
    seen: list[Progress] = []
    poor = replace(dense, state=dense.state | {n: dense.state[n].roll(1, 0) for n in ("fc2.weight", "fc2.bias")})
    how = DistillSettings(replace(ONE, shift=shift, epochs=2))
    student = distill(poor, "ds_cnn", {"width": 4, "depth": 2}, few, how, on_step=seen.append)
    (warning,) = (progress.note for progress in seen if progress.note)
    where = "pictures moved by up to 2 pixels" if shift else "validation"
    right = {name: f"{100 * student.metrics[f'augmented_top1_{name}']:.2f}%" for name in ("teacher", "plain")}
    assert warning == (
        f"warning: the teacher is right for {right['teacher']} on {where}, the student without it {right['plain']}; "
        f"train the teacher on with --shift {shift} first"
    )
    assert student.lineage[-1].settings["warning"] == warning


def test_good_teacher_is_not_warned_of(student: Checkpoint) -> None:
    assert student.metrics["augmented_top1_teacher"] >= student.metrics["augmented_top1_plain"]
    assert "warning" not in student.lineage[-1].settings


def test_teacher_is_judged_on_moved_pictures(dense: Checkpoint, few: DataSet) -> None:
    moved = distill(dense, "ds_cnn", TINY, few, DistillSettings(replace(ONE, shift=6)))
    assert moved.metrics["augmented_top1_teacher"] < dense.metrics["validation_top1"]


def test_features_make_the_student_see_what_its_teacher_sees(dense: Checkpoint, few: DataSet) -> None:
    how = DistillSettings(replace(ONE, epochs=3), alpha=0.0, features=("auto",), beta=5.0)
    module, loss = taught(build("ds_cnn", TINY), dense.module(), how, (2, 1, 28, 28))
    assert module.projections[0].weight.shape == (32, 4, 1, 1)  # to the channels of the teacher's conv2
    inputs, labels = torch.randn(8, 1, 28, 28), torch.zeros(8, dtype=torch.long)
    plain = functional.cross_entropy(module(inputs), labels)
    before = loss(module(inputs), labels, inputs) - plain
    fit_module(module, few, how.train, loss, stage="distilled")
    after = loss(module(inputs), labels, inputs) - functional.cross_entropy(module(inputs), labels)
    assert 0 < float(after.detach()) < float(before.detach())


def test_student_taught_by_features_is_a_plain_network(dense: Checkpoint, few: DataSet) -> None:
    how = DistillSettings(ONE, features=("block1=pool2", "fc=fc2"))
    student = distill(dense, "ds_cnn", TINY, few, how)
    assert student.module()(torch.randn(2, 1, 28, 28)).shape == (2, 10)
    assert list(student.lineage[-1].settings["features"]) == ["block1=pool2", "fc=fc2"]


def test_layers_that_are_not_there_are_refused_before_the_first_step(dense: Checkpoint, few: DataSet) -> None:
    seen: list[Progress] = []
    with pytest.raises(UsageError, match="the teacher has no layer 'odd'"):
        distill(dense, "ds_cnn", TINY, few, DistillSettings(ONE, features=("fc=odd",)), on_step=seen.append)
    assert not seen


def test_probe_of_memory_trains_what_is_trained(dense: Checkpoint) -> None:
    module, loss = trainee(dense, teacher=dense, seed=0, temperature=4.0, alpha=0.5, features=["auto"], beta=1.0)
    inputs, labels = torch.randn(4, 1, 28, 28), torch.zeros(4, dtype=torch.long)
    assert loss(module(inputs), labels, inputs).isfinite()


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
        ({"beta": 0.0}, "beta is 0.0, a positive number is needed; hint: --beta 1"),
        ({"features": ("conv1=",)}, "features 'conv1=' name no two layers; hint: STUDENT=TEACHER, or auto"),
    ],
)
def test_impossible_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        DistillSettings(ONE, **settings)
    assert str(raised.value) == message
