"""The child that follows the dependency graph: what it answers, and how it ends."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from memopt.errors import UsageError
from memopt_models.channels import cut_channels
from memopt_models.checkpoint import Checkpoint
from memopt_models.prune_apart import Limits, cutter_apart
from memopt_models.ranking import Cut, NotThisWay

# A child that is as it is, but for what takes channels out: that eats memory, in lists or in tensors.
EATS = """
import sys; sys.path = sys.argv[1:]
from memopt_models import channels, prune_apart
def cut_channels(checkpoint, cut, gradients):
    import torch
    kept = []
    while True:
        kept.append(list(range(10**6)) if cut.method == "l1" else torch.ones(2**26))
channels.cut_channels = cut_channels
sys.exit(prune_apart.main())
"""
SLEEPS = "import time; time.sleep(60)"
DIES = "import os; os.kill(os.getpid(), 9)"
CRASHES = "import os; os.abort()"
FAILS = "raise KeyError('unforeseen')"
BABBLES = "print('not an answer', flush=True); import time; time.sleep(60)"


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_child_answers_as_this_process_would_again_and_again(dense: Checkpoint) -> None:
    gradients = {name: torch.ones_like(tensor) for name, tensor in dense.state.items()}
    with cutter_apart(Limits()) as cut:
        assert same(cut(dense, Cut(0.5), None), cut_channels(dense, Cut(0.5)))
        assert same(cut(dense, Cut(0.25, "taylor"), gradients), cut_channels(dense, Cut(0.25, "taylor"), gradients))
        with pytest.raises(UsageError, match=r"^no layer is called 'fc9'; hint: --protect conv1$"):
            cut(dense, Cut(protect=("fc9",)), None)
        assert same(cut(dense, Cut(0.5), None), cut_channels(dense, Cut(0.5)))


def test_child_has_no_more_memory_than_it_is_given(dense: Checkpoint) -> None:
    with cutter_apart(Limits(memory_bytes=3 * 2**29), command=EATS) as cut:
        for method in ("l1", "l2"):
            with pytest.raises(NotThisWay, match=r"^the dependency graph needs more than 1\.50 GiB of memory$"):
                cut(dense, Cut(0.5, method), None)


@pytest.mark.parametrize(
    ("child", "limits", "reason"),
    [
        (SLEEPS, Limits(seconds=0.5), r"^the dependency graph was not done within 0\.5 s$"),
        (DIES, Limits(), r"^the dependency graph needs more than 4\.00 GiB of memory, or than there is \(SIGKILL\)$"),
        (CRASHES, Limits(), "^the dependency graph crashed with SIGABRT: "),
        (FAILS, Limits(), "^the dependency graph crashed with code 1: KeyError: 'unforeseen'$"),
        (BABBLES, Limits(), "^what follows the dependency graph did not answer what it was asked$"),
    ],
)
def test_every_bad_end_of_the_child_is_one_reason(
    dense: Checkpoint, child: str, limits: Limits, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memopt_models.prune_apart._EXIT_S", 1.0)
    with cutter_apart(limits, command=child) as cut, pytest.raises(NotThisWay, match=reason):
        cut(dense, Cut(0.5), None)


def test_nothing_is_left_of_a_child_that_was_not_waited_for() -> None:
    def children() -> set[str]:
        return {pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}

    before, started = children(), time.monotonic()
    with pytest.raises(KeyboardInterrupt), cutter_apart(Limits(), command=SLEEPS):
        assert children() > before
        raise KeyboardInterrupt
    assert time.monotonic() - started < 10
    assert children() == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory_bytes": 2**20}, "1.00 MiB are too little for torch alone; hint: --analysis-memory 4GiB"),
        ({"seconds": 0.0}, "the time is 0.0 s; hint: --analysis-seconds 300"),
        ({"seconds": float("inf")}, "the time is inf s; hint: --analysis-seconds 300"),
    ],
)
def test_impossible_limits_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        Limits(**settings)
    assert str(raised.value) == message
