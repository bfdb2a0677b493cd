from __future__ import annotations

import pytest
import torch
from torch import nn

from memopt_models.checkpoint import Checkpoint
from memopt_models.train import TrainSettings
from memopt_models.training_probe import TOO_FEW, Peak, Refusal, Subject, measure_peak

HOW = TrainSettings(epochs=1, batch_size=64, accumulate=16)


@pytest.mark.slow
def test_a_peak_counts_weights_gradients_and_the_optimizers_state(dense: Checkpoint) -> None:
    found = measure_peak(Subject(dense), HOW, cap_bytes=None)
    assert isinstance(found, Peak)
    assert found.host_bytes is not None
    assert found.host_bytes > 4 * 4 * dense.parameters
    assert found.device_bytes is None


@pytest.mark.slow
def test_a_child_that_may_not_have_enough_answers_that_it_is_too_much(dense: Checkpoint) -> None:
    assert measure_peak(Subject(dense), HOW, cap_bytes=1) == Refusal("too much")


def test_torch_says_that_one_sample_is_too_few_as_a_probe_expects_it() -> None:
    with pytest.raises(ValueError, match=TOO_FEW):
        nn.BatchNorm2d(2)(torch.rand(1, 2, 1, 1))
