from __future__ import annotations

import numpy as np
import pytest
import torch

from memopt.tensors import TensorSpec
from memopt_export import planned_memory
from memopt_export.from_torch import draft, export
from memopt_export.plan import plan
from memopt_models.checkpoint import Checkpoint, snapshot
from memopt_models.networks import build


def small(hidden: int, seed: int = 0) -> Checkpoint:
    settings = {"classes": 10, "hidden": hidden}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        state = snapshot(build("simple_cnn", settings))
    inputs = (TensorSpec("input", "float32", ("batch", 1, 28, 28)),)
    return Checkpoint("simple_cnn", settings, state, inputs, tuple("0123456789"), (), (), {}, 0)


def test_price_is_the_plan_of_what_would_be_exported() -> None:
    checkpoint = small(32)
    exported = export(checkpoint, np.zeros((2, 1, 28, 28), np.float32))
    price = planned_memory.planner()
    assert price(checkpoint, 1) == plan(exported.graph, batch=1).total_bytes
    assert price(checkpoint, 8) == plan(exported.graph, batch=8).total_bytes


def test_equal_shapes_are_planned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    drafted: list[str] = []
    monkeypatch.setattr(
        planned_memory, "draft", lambda checkpoint: drafted.append(checkpoint.sha256) or draft(checkpoint)
    )
    price = planned_memory.planner()
    prices = [price(each, 1) for each in (small(32), small(32, seed=1), small(16), small(32))]
    assert len(drafted) == 2
    assert prices[0] == prices[1] == prices[3] > prices[2]
