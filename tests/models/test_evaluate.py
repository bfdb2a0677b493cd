from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from memopt.preprocess import prepare
from memopt_models.checkpoint import Checkpoint
from memopt_models.data import DataSet
from memopt_models.evaluate import measure, predict, score


@pytest.mark.parametrize("batch_size", [1, 7, 64, 1000])
def test_logits_do_not_depend_on_the_batch(batch_size: int, dense: Checkpoint, few: DataSet) -> None:
    module, inputs = dense.module(), prepare(few.test.images, few.preprocess)
    expected = module(torch.from_numpy(inputs)).detach().numpy()
    np.testing.assert_allclose(predict(module, inputs, batch_size=batch_size), expected, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_prediction_is_in_evaluation_mode_and_leaves_the_mode_as_it_was(training: bool) -> None:
    module = nn.Sequential(nn.Dropout(0.5)).train(training)
    inputs = np.ones((4, 3), np.float32)
    np.testing.assert_array_equal(predict(module, inputs), inputs)
    assert module.training is training


def test_score_is_the_share_of_right_answers(few: DataSet) -> None:
    class Always(nn.Module):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.one_hot(torch.full((len(inputs),), 3), 10).float()

    expected = float((few.test.labels == 3).mean())
    assert score(Always(), few.test, few.preprocess) == expected
    assert score(Always(), few.test, few.preprocess, batch_size=5) == expected


def test_metrics_are_those_of_validation_and_test(dense: Checkpoint, few: DataSet) -> None:
    module = dense.module()
    metrics = {f"{name}_top1": score(module, few.splits[name], few.preprocess) for name in ("validation", "test")}
    assert measure(module, few) == metrics
    assert dense.metrics == metrics | {"parameters": dense.parameters}
