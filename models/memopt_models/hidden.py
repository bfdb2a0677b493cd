"""Hidden features taken out between two layers, where the dependency graph of the whole network cannot be had.

Where the outputs of one layer go to the next one alone, through nothing that mixes them, a feature can leave both and
nobody else learns of it: the hidden layer of an MLP, or the inner channels of a bottleneck. torch.fx says what goes
where; of a network that it cannot trace, the parts that it can are looked at. What depends on residual sums,
concatenation or shuffled channels stays.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from memopt_models.checkpoint import Checkpoint
from memopt_models.ranking import Candidate, Cut, NotThisWay, choose, protected_layers

if TYPE_CHECKING:
    import torch
    from torch import fx, nn

_TOLERANCE = 1e-4  # of the largest output; sums of float32 in another order differ by less
# Functions and methods that treat each feature by itself, by their names in torch, torch.nn.functional and Tensor.
_ELEMENTWISE = frozenset({
    "alpha_dropout", "clamp", "dropout", "elu", "gelu", "hardsigmoid", "hardswish", "leaky_relu", "mish", "relu",
    "relu6", "relu_", "selu", "sigmoid", "silu", "softplus", "tanh",
})  # fmt: skip


@dataclass(frozen=True)
class Hidden:
    """Features that one layer writes and one other reads; names of layers."""

    writer: str
    between: tuple[str, ...]  # layers with weights for each feature: batch norms and depthwise convolutions
    reader: str


def cut_hidden(
    checkpoint: Checkpoint, cut: Cut, gradients: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """The weights of the checkpoint with hidden features taken out between pairs of layers.

    Args:
        checkpoint: what to prune; stays as it is.
        cut: what to take away; of each pair's hidden features.
        gradients: of the loss by each weight, by its name, for the method "taylor".

    Raises:
        NotThisWay: there are no such pairs, or the network reads the features elsewhere as well.
        UsageError: a pattern of protected layers matches nothing.
    """
    import torch

    module = checkpoint.module()
    protected = protected_layers(module, cut.protect)
    layers = dict(module.named_modules())
    pairs = [pair for pair in find_hidden(module) if not protected & {layers[pair.writer], layers[pair.reader]}]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cut.seed)
        scores = [_importance(checkpoint.state, pair, cut.method, gradients) for pair in pairs]
    scored = [(pair, score) for pair, score in zip(pairs, scores, strict=True) if score is not None]
    if not scored:
        raise NotThisWay("no features are hidden between two layers")
    going = choose([Candidate(score) for _, score in scored], cut)
    muted, narrow = dict(checkpoint.state), dict(checkpoint.state)
    for (pair, score), features in zip(scored, going, strict=True):
        kept = torch.tensor(sorted(set(range(len(score))) - set(features)))
        _mute(muted, pair.reader, features)
        _keep(narrow, pair, kept)
    _check_equal(replace(checkpoint, state=muted), replace(checkpoint, state=narrow))
    return narrow


def find_hidden(module: nn.Module) -> list[Hidden]:
    """All hidden features of the module, in the order of its layers.

    >>> from torch import nn
    >>> find_hidden(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)))
    [Hidden(writer='0', between=(), reader='2')]
    """
    named = list(module.named_modules(remove_duplicate=False))
    own = {name: [id(weight) for weight in layer.parameters(recurse=False)] for name, layer in named}
    uses = Counter(weight for weights in own.values() for weight in weights)
    shared = {name for name, weights in own.items() if any(uses[weight] > 1 for weight in weights)}
    return [pair for pair in _find(module, "") if not shared & {pair.writer, pair.reader, *pair.between}]


def _find(module: nn.Module, prefix: str) -> Iterator[Hidden]:
    from torch import fx

    try:
        graph = fx.Tracer().trace(module)
    except Exception:  # noqa: BLE001  # whatever the network's own code does with what it is not made for
        for name, child in module.named_children():
            yield from _find(child, f"{prefix}{name}.")
        return
    layers = _Layers(module, graph)
    for node in graph.nodes:
        if _mixes(layers.of(node)):
            chain = layers.follow(node)
            if chain:
                yield Hidden(prefix + chain[0], tuple(prefix + name for name in chain[1:-1]), prefix + chain[-1])


class _Layers:
    """Which layers a traced network calls, one after the other."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        self._layers = dict(module.named_modules())
        self._calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
        self._read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}

    def of(self, node: fx.Node) -> nn.Module | None:
        """The layer that the node calls, unless it has weights that are used elsewhere as well."""
        name = str(node.target)
        if node.op != "call_module":
            return None
        layer = self._layers[name]
        alone = self._calls[name] == 1 and name not in self._read
        return layer if alone or not any(True for _ in layer.parameters()) else None

    def follow(self, node: fx.Node) -> list[str]:
        """The layers with weights from this one to the next that mixes features; nothing where others read as well."""
        first, chain = self.of(node), [str(node.target)]
        while len(node.users) == 1:
            node = next(iter(node.users))
            layer = self.of(node)
            if layer is None:
                if not _is_elementwise(node):
                    return []
            elif _mixes(layer):
                return [*chain, str(node.target)] if type(layer) is type(first) else []
            elif not _keeps_apart(layer):
                return []
            elif any(True for _ in layer.parameters()):
                chain.append(str(node.target))
        return []


def _is_elementwise(node: fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op in ("call_function", "call_method") and name in _ELEMENTWISE


def _mixes(layer: nn.Module | None) -> bool:
    """A layer all whose outputs depend on all of its inputs: one end of a pair."""
    from torch import nn
    from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

    if isinstance(layer, _ConvNd):
        return layer.groups == 1 and not isinstance(layer, _ConvTransposeNd)
    return type(layer) is nn.Linear


def _keeps_apart(layer: nn.Module) -> bool:
    """A layer that treats each feature by itself and has as many outputs as inputs."""
    from torch import nn
    from torch.nn.modules.batchnorm import _BatchNorm
    from torch.nn.modules.dropout import _DropoutNd

    if isinstance(layer, nn.Conv2d):
        return layer.groups == layer.in_channels == layer.out_channels
    elementwise = (
        nn.ELU, nn.GELU, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Identity, nn.LeakyReLU, nn.Mish, nn.ReLU,
        nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Tanh,
    )  # fmt: skip
    pooling = (nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d)
    return isinstance(layer, (_BatchNorm, _DropoutNd, *elementwise, *pooling))


def _importance(
    state: Mapping[str, torch.Tensor], pair: Hidden, method: str, gradients: Mapping[str, torch.Tensor] | None
) -> torch.Tensor | None:
    """How much each feature matters, (features,), with mean 1; None where the method has nothing to go by."""
    import torch

    ends = [f"{name}.weight" for name in (pair.writer, pair.reader)]  # features are dimension 0 of one, 1 of the other
    norms = [f"{name}.weight" for name in pair.between if f"{name}.running_mean" in state and f"{name}.weight" in state]
    if method == "random":
        return torch.rand(len(state[ends[0]]))
    if method == "bn-scale":
        parts = [state[name].abs() for name in norms]
    else:
        weights = [state[name] if gradients is None else state[name] * gradients[name] for name in ends]
        power = 2 if method == "l2" else 1
        parts = [each.transpose(0, dim).flatten(1).abs().pow(power).sum(1) for dim, each in enumerate(weights)]
    if not parts:
        return None
    total = torch.stack(parts).mean(0)
    return (total / total.mean()).nan_to_num()


def _mute(state: dict[str, torch.Tensor], reader: str, features: Sequence[int]) -> None:
    """Lets the reader hear nothing of these features."""
    weight = state[f"{reader}.weight"].clone()
    weight[:, list(features)] = 0
    state[f"{reader}.weight"] = weight


def _keep(state: dict[str, torch.Tensor], pair: Hidden, kept: torch.Tensor) -> None:
    """Leaves these features, and no others, in the weights of the pair and of what is between."""
    for name in (pair.writer, *pair.between):
        for key in [key for key in state if key.rpartition(".")[0] == name and state[key].ndim]:
            state[key] = state[key][kept].contiguous()
    state[f"{pair.reader}.weight"] = state[f"{pair.reader}.weight"][:, kept].contiguous()


def _check_equal(muted: Checkpoint, narrow: Checkpoint) -> None:
    """Raises NotThisWay unless taking features out is the same as not listening to them."""
    import torch

    shape = narrow.inputs[0].at_batch(2)
    example = torch.linspace(-1, 1, math.prod(shape)).reshape(shape)
    try:
        with torch.inference_mode():
            expected, got = muted.module()(example), narrow.module()(example)
    except RuntimeError as error:
        raise NotThisWay(f"hidden features are read elsewhere as well: {error}".partition("\n")[0]) from error
    if not torch.allclose(expected, got, rtol=0, atol=_TOLERANCE * max(1.0, float(expected.abs().max()))):
        raise NotThisWay("hidden features are read elsewhere as well: without them the network answers differently")
