"""BatchNorm layers that go into the convolutions before them, for networks whose weights are to be rounded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from memopt.errors import InputRefused, first_line

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.nn.modules.batchnorm import _BatchNorm


def find_norms(module: nn.Module) -> dict[str, str]:
    """The names of BatchNorm layers by the convolution whose output each alone reads; both are called once.

    Raises:
        InputRefused: there are BatchNorm layers, and torch.fx cannot follow the network to see what they read.
    """
    from torch import fx
    from torch.nn.modules.batchnorm import _BatchNorm

    if not any(isinstance(layer, _BatchNorm) for layer in module.modules()):
        return {}
    try:
        nodes = list(fx.Tracer().trace(module).nodes)
    except Exception as error:  # whatever the user's own forward raises when it is handed proxies
        raise InputRefused(
            f"torch.fx cannot follow the network, so its BatchNorm layers cannot be folded: {first_line(error)}",
            hint="a forward without branches on values",
        ) from error
    return dict(_pairs(module, nodes))


def fold_norms(module: nn.Module, pairs: Mapping[str, str]) -> None:
    """Gives each convolution the gain and the bias of its BatchNorm, and leaves an Identity there. In place.

    In evaluation mode the module computes the same, up to rounding.

    Args:
        module: on the CPU.
        pairs: see `find_norms`.
    """
    import torch
    from torch import nn
    from torch.nn.modules.batchnorm import _BatchNorm
    from torch.nn.modules.conv import _ConvNd

    for conv_name, norm_name in pairs.items():
        conv, norm = module.get_submodule(conv_name), module.get_submodule(norm_name)
        assert isinstance(conv, _ConvNd) and isinstance(norm, _BatchNorm)
        gain, shift = _affine(norm)
        with torch.no_grad():
            conv.weight.mul_(gain.reshape(-1, *[1] * (conv.weight.ndim - 1)))
            bias = shift if conv.bias is None else conv.bias * gain + shift
        conv.bias = nn.Parameter(bias)
        module.set_submodule(norm_name, nn.Identity())


def unfold_norms(
    state: Mapping[str, torch.Tensor],
    folded: Mapping[str, torch.Tensor],
    pairs: Mapping[str, str],
    *,
    module: nn.Module,
) -> dict[str, torch.Tensor]:
    """The state of the network with its BatchNorm layers, in which these only add the bias of the folded convolution.

    Args:
        state: before folding; gives the names.
        folded: after it.
        pairs: see `find_norms`.
        module: the network with its BatchNorm layers, for their epsilons.
    """
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm

    whole = {name: folded.get(name, tensor) for name, tensor in state.items()}
    for conv, norm in pairs.items():
        bias = folded[f"{conv}.bias"]
        if f"{conv}.bias" in state:
            whole[f"{conv}.bias"] = torch.zeros_like(bias)
        layer = module.get_submodule(norm)
        assert isinstance(layer, _BatchNorm)
        gain_is_one = torch.full_like(bias, 1 - layer.eps)
        neutral = {
            "weight": torch.ones_like(bias), "bias": bias, "running_mean": torch.zeros_like(bias),
            "running_var": gain_is_one,
        }  # fmt: skip
        whole |= {f"{norm}.{name}": tensor for name, tensor in neutral.items()}
    return whole


def _pairs(module: nn.Module, nodes: list[torch.fx.Node]) -> Iterator[tuple[str, str]]:
    from torch import fx
    from torch.nn.modules.batchnorm import _BatchNorm
    from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

    layers = dict(module.named_modules())
    calls = [str(node.target) for node in nodes if node.op == "call_module"]
    for node in nodes:
        norm = layers.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(norm, _BatchNorm) or norm.weight is None or norm.running_var is None:
            continue
        before = node.args[0]
        assert isinstance(before, fx.Node)
        conv = layers.get(str(before.target)) if before.op == "call_module" and len(before.users) == 1 else None
        once = all(calls.count(str(each.target)) == 1 for each in (node, before))
        if isinstance(conv, _ConvNd) and not isinstance(conv, _ConvTransposeNd) and once:
            yield str(before.target), str(node.target)


def _affine(norm: _BatchNorm) -> tuple[torch.Tensor, torch.Tensor]:
    """What the BatchNorm does to each channel in evaluation mode: times the first, plus the second."""
    import torch

    assert norm.running_mean is not None and norm.running_var is not None  # `find_norms` saw to it
    with torch.no_grad():
        gain = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        return gain, norm.bias - norm.running_mean * gain
