"""Weights to start a training from: those that torchvision has for its networks, or a state dict of the user's."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memopt.errors import InputRefused, UsageError, first_line
from memopt.files import sha256_file
from memopt_models import networks
from memopt_models.checkpoint import Checkpoint
from memopt_models.dataset import DataSet
from memopt_models.train import TrainSettings, begin

if TYPE_CHECKING:
    import torch
    from torch import nn

IMAGENET = "imagenet"
STAGE = "weights"  # of the lineage
_INSIDE = ("state_dict", "model_state_dict", "model")  # where training scripts put the weights among other things
_PREFIXES = ("module.", "_orig_mod.")  # of networks in DataParallel or torch.compile
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # heads of googlenet and inception_v3 that only their training has


@dataclass(frozen=True)
class Weights:
    """A state dict, and how inputs are prepared for it."""

    state: Mapping[str, torch.Tensor]
    name: str  # a file, or "imagenet" and which ones
    sha256: str | None = None  # of the file
    normalize: dict[str, Any] | None = None  # step of memopt.preprocess; None: not known, the data's own is taken


def begin_with(
    weights: str, network: str, settings: Mapping[str, Any], data: DataSet, how: TrainSettings
) -> Checkpoint:
    """The checkpoint to start a training from; its lineage says where its weights come from, and which are fresh.

    Of another number of classes, the classifier stays as it was drawn with the seed. Of another number of channels, the
    first convolution takes the mean over the channels it knows, scaled by 3 / channels: for gray pictures the sum,
    which answers to them as it did to the same in RGB.

    Args:
        weights: "imagenet" (torchvision downloads them), or a file: .safetensors, or what `torch.save` wrote.
        network: see `networks.build`.
        settings: of the network.
        data: what is to be learned.
        how: the seed counts.

    Raises:
        UsageError: the network has no weights of that name.
        InputRefused: they cannot be downloaded or read, or are not those of the network.
    """
    first = begin(network, settings, data, how, start=None)
    found = _imagenet(network, settings) if weights == IMAGENET else read_state(Path(weights))
    module = first.module()
    fresh = load_into(module, found, network=network)
    used = {"weights": found.name, "sha256": found.sha256, "fresh": list(fresh)}
    if found.normalize is not None and first.preprocess:
        first = replace(first, preprocess=_normalized(first.preprocess, found.normalize))
    return first.advance(STAGE, module, settings=used, metrics={})


def fresh_weights(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Names of the weights that the file or download it began with did not have, or had for other channels."""
    stages = [stage for stage in checkpoint.lineage if stage.stage == STAGE]
    return tuple(stages[-1].settings["fresh"]) if stages else ()


def read_state(path: Path) -> Weights:
    """The weights in a file of the user's; never a program.

    Raises:
        InputRefused: the file cannot be read, holds code, or no weights.
    """
    if not path.is_file():
        raise InputRefused(f"{path} does not exist", hint="--weights FILE, or --weights imagenet")
    held = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    for name in _INSIDE:
        if isinstance(held, Mapping) and isinstance(held.get(name), Mapping):
            held = held[name]
    return Weights(_named(held, path), str(path), sha256_file(path))


def load_into(module: nn.Module, weights: Weights, *, network: str) -> tuple[str, ...]:
    """Gives the module the weights; the names of those that stay fresh, or were made for other channels.

    Raises:
        InputRefused: they are not those of the network; the first three names say why.
    """
    wanted = module.state_dict()
    state = {
        name: tensor for name, tensor in weights.state.items() if name in wanted or not name.startswith(_AUXILIARY)
    }
    changed = _fit_channels(module, state, wanted) + _leave_classifier(state, wanted)
    bad = [why for name in sorted(wanted.keys() | state.keys()) if (why := _misfit(name, wanted, state)) is not None]
    if bad:
        shown = ", ".join(bad[:3]) + (", …" if len(bad) > 3 else "")
        raise InputRefused(
            f"{weights.name} has not the weights of {network}: {len(bad)} names differ: {shown}",
            hint="the network and settings that they were trained with",
        )
    broken = next((name for name, tensor in state.items() if tensor.is_floating_point() and tensor.isnan().any()), None)
    if broken is not None:
        raise InputRefused(f"{weights.name} has NaN in {broken!r}")
    module.load_state_dict(state)
    return changed


def _imagenet(network: str, settings: Mapping[str, Any]) -> Weights:
    """What torchvision has, loaded by torchvision itself into its own network, which knows old names of weights."""
    import torchvision

    if not networks.is_torchvision(network):
        raise UsageError(f"network {network!r} has no ImageNet weights", hint="--network resnet18, or --weights FILE")
    best = torchvision.models.get_model_weights(network).DEFAULT
    own = {name: value for name, value in settings.items() if name not in ("classes", "in_channels")}
    try:
        with redirect_stdout(sys.stderr):  # where torch.hub says that it downloads; stdout is for results
            module = torchvision.models.get_model(network, weights=best, progress=False, **own)
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        raise InputRefused(
            f"the ImageNet weights of {network} cannot be had: {first_line(error)}",
            hint=f"--weights FILE, from {best.url}",
        ) from error
    prepared = best.transforms()
    mean, std = list(prepared.mean), list(prepared.std)
    if getattr(module, "transform_input", False):  # it brings ImageNet's mean to 0.5 itself; here nothing has to
        mean, std = [0.5] * 3, [0.5] * 3
    return Weights(module.state_dict(), f"imagenet, {best}", None, {"op": "normalize", "mean": mean, "std": std})


def _read_safetensors(path: Path) -> Any:
    import safetensors
    import safetensors.torch

    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, KeyError) as error:
        raise InputRefused(f"{path} is not a safetensors file: {first_line(error)}") from error


def _read_pickle(path: Path) -> Any:
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputRefused(
            f"{path} holds more than weights, and code is not run", hint="torch.save(model.state_dict(), FILE)"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise InputRefused(f"{path} cannot be read by torch: {first_line(error)}") from error


def _named(held: Any, path: Path) -> dict[str, torch.Tensor]:
    """The tensors by name, without what a wrapper has put before all of them."""
    import torch

    if not isinstance(held, Mapping) or not held or not all(isinstance(each, torch.Tensor) for each in held.values()):
        kind = f"a {type(held).__name__}"
        if isinstance(held, Mapping):
            kind = f"{', '.join(str(name) for name in list(held)[:3])}" or "nothing"
        raise InputRefused(f"{path} holds {kind}, no state dict", hint="torch.save(model.state_dict(), FILE)")
    state = {str(name): tensor for name, tensor in held.items()}
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _fit_channels(
    module: nn.Module, state: dict[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]
) -> tuple[str, ...]:
    """Changes the weight of the first convolution in `state` to the channels of the network's; its name, if it did."""
    name = networks.first_convolution(module)
    old, new = state.get(f"{name}.weight"), wanted.get(f"{name}.weight")
    if old is None or new is None or old.ndim != new.ndim or old.shape[1] == new.shape[1]:
        return ()
    if old.shape[1] != 3 or (old.shape[0], *old.shape[2:]) != (new.shape[0], *new.shape[2:]):
        return ()
    channels = new.shape[1]
    state[f"{name}.weight"] = (old.float().sum(dim=1, keepdim=True) / channels).expand(-1, channels, -1, -1)
    return (f"{name}.weight",)


def _leave_classifier(state: dict[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    """Puts the network's own into `state` where the last layer differs in the number of its outputs alone."""
    last = next(reversed([name for name in wanted if name.endswith(".weight")]), "")
    layer = [name for name in (last, last.removesuffix("weight") + "bias") if name in wanted and name in state]
    if not layer or any(state[name].shape[1:] != wanted[name].shape[1:] for name in layer):
        return ()
    if state[last].shape[0] == wanted[last].shape[0]:
        return ()
    for name in layer:
        state[name] = wanted[name]
    return tuple(layer)


def _misfit(name: str, wanted: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> str | None:
    """What is wrong with the tensor of this name; None where nothing is."""
    if name not in state:
        return f"{name} is missing"
    if name not in wanted:
        return f"{name} is not known"
    if state[name].shape != wanted[name].shape:
        return f"{name} is {list(state[name].shape)}, not {list(wanted[name].shape)}"
    return None


def _normalized(steps: tuple[dict[str, Any], ...], normalize: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """The steps with this normalization; for one channel, with the mean of the three."""
    own = next(step for step in steps if step["op"] == "normalize")
    if len(own["mean"]) == 1:
        normalize = {**normalize, **{key: [sum(normalize[key]) / 3] for key in ("mean", "std")}}
    return tuple(normalize if step is own else step for step in steps)
