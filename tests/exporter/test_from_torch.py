"""One tiny network with global average pooling on pictures of one channel, exported once."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from memopt.errors import AnswerIsNo, InputRefused
from memopt.tensors import Array, TensorSpec
from memopt.torch_runtime import read_specs
from memopt_export import from_torch
from memopt_export.from_torch import Exported, Parity, export
from memopt_export.graph import load_graph, run_graph, save_graph
from memopt_models.checkpoint import Checkpoint, snapshot
from memopt_models.networks import build

torch = pytest.importorskip("torch")

INPUT = TensorSpec("picture", "float32", ("batch", 1, 8, 8))


@dataclass(frozen=True)
class Case:
    checkpoint: Checkpoint
    samples: Array
    exported: Exported


class Undecided(torch.nn.Module):
    """What it does hangs on the values that it sees."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 3)

    def forward(self, x):
        return self.linear(x.mean(dim=(1, 2))) if x.sum() > 0 else x


class Pair(torch.nn.Module):
    """Returns two tensors."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 3)

    def forward(self, x):
        return self.linear(x), x


def checkpoint_of(network, settings, module):
    return Checkpoint(network, settings, snapshot(module), (INPUT,), ("a", "b", "c"), (), (), {}, 0)


@pytest.fixture(scope="session")
def case():
    settings = {"classes": 3, "width": 2, "depth": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        checkpoint = checkpoint_of("ds_cnn", settings, build("ds_cnn", settings))
    samples = np.random.default_rng(0).normal(size=(5, 1, 8, 8)).astype(np.float32)
    return Case(checkpoint, samples, export(checkpoint, samples))


@pytest.fixture
def own(monkeypatch):
    """This file, importable as `mynets`."""
    monkeypatch.setitem(sys.modules, "mynets", sys.modules[__name__])


# --- the graph


def test_parity_is_proved_on_the_samples_given(case):
    parity = case.exported.parity
    assert parity.holds
    assert (parity.samples, parity.agreement) == (5, 1.0)
    assert 0 < parity.largest_output < 100


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_batch_is_free_and_outputs_are_torch_s_at_every_one(case, batch):
    (got,) = run_graph(case.exported.graph, {"picture": case.samples[:batch]})
    with torch.inference_mode():
        expected = case.checkpoint.module()(torch.from_numpy(case.samples[:batch])).numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_inputs_and_outputs_keep_their_names_and_call_the_free_dimension_batch(case):
    assert case.exported.graph.inputs == (INPUT,)
    assert case.exported.graph.outputs == (TensorSpec("logits", "float32", ("batch", 3)),)


def test_global_average_pooling_of_one_channel_needs_no_index_nodes(case):
    kinds = {node.op_type for node in case.exported.graph.model.graph.node}
    assert kinds == {"Conv", "Relu", "ReduceMean", "Reshape", "Gemm"}


def test_lineage_starts_with_the_digest_of_the_checkpoint_s_weights(case, tmp_path):
    assert case.exported.graph.weights_sha256 == case.checkpoint.sha256
    save_graph(case.exported.graph, tmp_path / "tiny.onnx")
    loaded = load_graph(tmp_path / "tiny.onnx")
    assert (loaded.weights_sha256, loaded.precision) == (case.checkpoint.sha256, "fp32")


def test_program_carries_its_specs_and_computes_the_same(case, tmp_path: Path):
    path = tmp_path / "tiny.pt2"
    path.write_bytes(case.exported.program)
    assert read_specs(path) == {"inputs": case.exported.graph.inputs, "outputs": case.exported.graph.outputs}
    program = torch.export.load(path).module()
    with torch.inference_mode():
        for batch in (1, 5):
            given = torch.from_numpy(case.samples[:batch])
            assert torch.equal(program(given), case.checkpoint.module()(given))


# --- parity


@pytest.fixture
def stuck(case, monkeypatch):
    """A converter that gives the case's graph, whatever it is asked for."""
    monkeypatch.setattr(from_torch, "_to_graph", lambda *_: case.exported.graph)


def with_bias(checkpoint, value):
    return replace(checkpoint, state={**checkpoint.state, "fc.bias": torch.full((3,), value)})


def test_a_difference_above_rounding_is_a_no(case, stuck):
    with pytest.raises(AnswerIsNo, match=r"the graph differs from torch by 0\.[0-9]+ on 5 samples"):
        export(with_bias(case.checkpoint, 0.5), case.samples)


def test_outputs_that_are_no_numbers_are_a_no(case, stuck):
    with pytest.raises(AnswerIsNo, match="the graph differs from torch by nan on 5 samples"):
        export(with_bias(case.checkpoint, torch.nan), case.samples)


def test_no_numbers_on_both_sides_are_a_no_too(case):
    nothing = np.full((5, 3), np.nan, np.float32)
    broken = case.samples * np.float32(np.nan)
    assert not from_torch.prove_parity(case.exported.graph, broken, nothing).holds


@pytest.mark.parametrize(
    ("difference", "largest", "holds"),
    [
        (0.0, 0.0, True),
        (1e-4, 0.5, True),  # small outputs are compared as if they were 1
        (1.1e-4, 0.5, False),
        (1e-2, 100.0, True),
        (1.1e-2, 100.0, False),
        (np.nan, 1.0, False),
        (np.nan, np.nan, False),
        (0.0, np.nan, False),
        (np.inf, 1.0, False),
        (np.inf, np.inf, False),  # torch gives infinity, the graph a number
    ],
)
def test_parity_holds_for_rounding_and_for_nothing_else(difference, largest, holds):
    assert Parity(2, difference, largest, None).holds is holds


# --- refusals


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_samples_are_refused(case, n):
    with pytest.raises(InputRefused, match="parity is proved on at least two samples; hint: --data SPEC"):
        export(case.checkpoint, case.samples[:n])


def test_a_network_that_cannot_be_traced_is_refused_in_one_line(case, own):
    with pytest.raises(InputRefused, match=r"torch\.export cannot trace mynets:Undecided: .") as raised:
        export(checkpoint_of("mynets:Undecided", {}, Undecided()), case.samples + 1)
    assert "\n" not in str(raised.value)


def test_a_network_with_two_outputs_is_refused(case, own):
    with pytest.raises(InputRefused, match="mynets:Pair returns tuple, one tensor is expected"):
        export(checkpoint_of("mynets:Pair", {}, Pair()), case.samples)
