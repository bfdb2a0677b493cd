"""Networks of torchvision through the whole way: prune, save, load, run, export, and the same answers everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from memopt.tensors import TensorSpec
from memopt_export.from_torch import draft, prove_parity
from memopt_models.channels import cut_channels
from memopt_models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, snapshot
from memopt_models.evaluate import predict
from memopt_models.hidden import cut_hidden
from memopt_models.networks import build
from memopt_models.prune_apart import Cutter
from memopt_models.ranking import Cut, NotThisWay

# The network, and the settings by which its inputs may be small.
BY_CHANNELS = (
    "resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large", "vgg16_bn", "squeezenet1_1",
    "efficientnet_b0", "convnext_tiny", "regnet_y_400mf", "densenet121", "vit_b_16",
)  # fmt: skip
BY_HIDDEN = ("shufflenet_v2_x0_5", "swin_t")
SETTINGS = {"vit_b_16": {"image_size": 32}}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def dense(network: str) -> Checkpoint:
    """The network with drawn weights, and statistics that differ between channels."""
    settings = {"classes": 10, **SETTINGS.get(network, {})}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = snapshot(build(network, settings))
        for name, tensor in state.items():
            if name.endswith(("running_mean", "running_var")):
                state[name] = tensor + 0.1 * torch.rand_like(tensor)
    inputs = (TensorSpec("input", "float32", ("batch", 3, 32, 32)),)
    return Checkpoint(network, settings, state, inputs, tuple("0123456789"), (), (), {}, 0)


def passes(checkpoint: Checkpoint, cut: Cutter, folder: Path) -> Checkpoint:
    """The pruned checkpoint, after everything that can be done with it has given the same answers."""
    state = cut(checkpoint, Cut(ratio=0.5), None)
    save_checkpoint(replace(checkpoint, state=state), folder / "pruned.safetensors")
    loaded = load_checkpoint(folder / "pruned.safetensors")
    assert {name: tuple(t.shape) for name, t in loaded.module().state_dict().items()} == {
        name: tuple(t.shape) for name, t in state.items()
    }
    inputs = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)
    graph = draft(loaded)
    assert prove_parity(graph, inputs, predict(loaded.module(), inputs)).holds
    assert graph.outputs[0].shape == ("batch", 10)
    return loaded


@pytest.mark.parametrize("network", BY_CHANNELS)
def test_network_without_half_its_channels_is_saved_loaded_run_and_exported(network: str, tmp_path: Path) -> None:
    whole = dense(network)
    pruned = passes(whole, cut_channels, tmp_path)
    assert pruned.parameters < 0.27 * whole.parameters  # a quarter, and what does not shrink by the square


@pytest.mark.parametrize("network", BY_HIDDEN)
def test_network_with_no_dependency_graph_loses_hidden_features(network: str, tmp_path: Path) -> None:
    whole = dense(network)
    pruned = passes(whole, cut_hidden, tmp_path)
    assert pruned.parameters < 0.85 * whole.parameters


def test_shuffled_channels_are_not_understood() -> None:
    with pytest.raises(NotThisWay, match=r"^torch-pruning: ZeroDivisionError: [^\n]*$"):
        cut_channels(dense("shufflenet_v2_x0_5"), Cut())
