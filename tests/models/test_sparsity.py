from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from memopt.errors import AnswerIsNo, UsageError
from memopt_models.checkpoint import Checkpoint
from memopt_models.data import DataSet
from memopt_models.sparsity import Magnitude, Pattern, SparsitySettings, find_masks, masked, parse_pattern, sparsify
from memopt_models.train import TrainSettings

ONE = TrainSettings(epochs=1, learning_rate=2e-3)


def masks(module: nn.Module, kind: Pattern | Magnitude, *protect: str) -> dict[str, torch.Tensor]:
    return find_masks(module, SparsitySettings(kind, protect))


def test_largest_weights_of_every_four_input_channels_stay() -> None:
    module = nn.Sequential(nn.Linear(8, 1), nn.Conv2d(4, 1, (1, 2)))
    with torch.no_grad():
        module[0].weight[:] = torch.tensor([[1.0, -4, 3, 2, 5, 5, 5, 5]])
        module[1].weight[0, :, 0, 0] = torch.tensor([1.0, 2, 3, 4])
        module[1].weight[0, :, 0, 1] = torch.tensor([4.0, 3, 2, 1])
    found = masks(module, Pattern(2, 4))
    assert found["0"].int().tolist() == [[0, 1, 1, 0, 1, 1, 0, 0]]  # of equals the first stay
    assert found["1"][0, :, 0].T.int().tolist() == [[0, 0, 1, 1], [1, 1, 0, 0]]


@given(kept=st.integers(1, 7), more=st.integers(1, 8), seed=st.integers(0, 50))
def test_every_group_keeps_exactly_so_many(kept: int, more: int, seed: int) -> None:
    pattern = Pattern(kept, kept + more)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = nn.Sequential(nn.Conv2d(2 * pattern.of, 3, 3))
    groups = masks(module, pattern)["0"].movedim(1, -1).reshape(-1, pattern.of)
    assert bool((groups.sum(1) == kept).all())


def test_layers_whose_inputs_do_not_divide_stay_dense() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1))
    assert list(masks(module, Pattern(2, 4))) == ["2"]
    with pytest.raises(AnswerIsNo, match=r"^no layer can have zeros by Pattern\(kept=2, of=4\)$"):
        masks(module[:2], Pattern(2, 4))


@given(share=st.floats(0.05, 0.95), scope=st.sampled_from(["layer", "global"]), seed=st.integers(0, 50))
def test_so_many_of_the_smallest_go(share: float, scope: str, seed: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = nn.Sequential(nn.Linear(10, 20), nn.Linear(20, 5))
    found = masks(module, Magnitude(share, scope))
    weights = {name: module.get_submodule(name).weight.detach().abs() for name in found}
    together = [tuple(found)] if scope == "global" else [(name,) for name in found]
    for names in together:
        gone = torch.cat([weights[name][~found[name]] for name in names])
        stay = torch.cat([weights[name][found[name]] for name in names])
        assert len(gone) == int(share * (len(gone) + len(stay)))
        assert not len(gone) or gone.max() <= stay.min()


def test_protected_layers_stay_as_they_are(dense: Checkpoint) -> None:
    assert list(masks(dense.module(), Magnitude(0.5), "conv*")) == ["fc1", "fc2"]


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_zeros_stay_while_the_rest_is_trained(optimizer: type[torch.optim.Optimizer]) -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    found = masks(module, Magnitude(0.6))
    before = module[0].weight.detach().clone()
    with masked(module, found):
        training = optimizer(module.parameters(), lr=0.1, weight_decay=0.1)  # type: ignore[call-arg]
        for _ in range(3):
            training.zero_grad()
            module(torch.randn(4, 8)).square().sum().backward()
            training.step()
    assert bool((module[0].weight[~found["0"]] == 0).all())
    assert bool((module[0].weight != before)[found["0"]].all())
    module(torch.ones(1, 8)).sum().backward()  # afterwards gradients are free again
    assert bool(module[2].weight.grad.ne(0).any())


@pytest.mark.parametrize("kind", [Pattern(2, 4), Magnitude(0.8)])
def test_checkpoint_has_its_zeros_after_fine_tuning_and_says_what_they_save(
    dense: Checkpoint, few: DataSet, kind: Pattern | Magnitude
) -> None:
    sparse = sparsify(dense, few, SparsitySettings(kind, finetune=ONE))
    stage = sparse.lineage[-1]
    for name, mask in masks(dense.module(), kind).items():
        assert torch.equal(sparse.state[f"{name}.weight"] != 0, mask)
        assert name in stage.settings["layers"]
    assert sparse.metrics["zeros"] == pytest.approx(0.5 if isinstance(kind, Pattern) else 0.8, abs=0.01)
    assert sparse.metrics["compressed_bytes"] < 0.75 * sparse.metrics["compressed_bytes_before"]
    assert sparse.parameters == dense.parameters  # no tensor has shrunk
    assert (stage.stage, stage.parents) == ("prune", (dense.sha256,))
    assert sparsify(dense, few, SparsitySettings(kind, finetune=ONE)).sha256 == sparse.sha256


def test_fine_tuning_brings_back_what_zeros_cost(dense: Checkpoint, few: DataSet) -> None:
    how = SparsitySettings(Magnitude(0.9), finetune=replace(ONE, epochs=3))
    alone, tuned = (sparsify(dense, few, each) for each in (replace(how, finetune=None), how))
    assert tuned.metrics["validation_top1"] > alone.metrics["validation_top1"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Pattern(4, 4), "pattern 4:4 keeps nothing or everything; hint: --pattern 2:4"),
        (lambda: Pattern(0, 4), "pattern 0:4 keeps nothing or everything; hint: --pattern 2:4"),
        (lambda: parse_pattern("2/4"), "'2/4' is no pattern; hint: --pattern 2:4"),
        (lambda: Magnitude(1.0), "sparsity is 1.0, it lies between 0 and 1; hint: --sparsity 0.8"),
        (lambda: Magnitude(0.5, "all"), "sparsity scope 'all' is not known; hint: layer, global"),
    ],
)
def test_impossible_zeros_are_refused(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(UsageError) as raised:
        make()
    assert str(raised.value) == message
