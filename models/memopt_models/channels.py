"""Channels taken out along the dependency graph. The one place that knows torch-pruning.

Channels that depend on each other go together (DepGraph, Fang et al. 2023, https://arxiv.org/abs/2301.12900). The
library follows autograd's graph, finds these groups and says how much each channel matters; which go is `ranking`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from memopt.errors import InputRefused
from memopt_models.checkpoint import Checkpoint, align_sizes, snapshot
from memopt_models.ranking import Candidate, Cut, NotThisWay, choose, protected_layers

if TYPE_CHECKING:
    import torch
    from torch import nn

# An importance for each method of `ranking.METHODS`: torch_pruning.importance -> what scores a group.
_IMPORTANCE: dict[str, Callable[[Any], Callable[[Any], torch.Tensor | None]]] = {
    "l1": lambda library: library.GroupMagnitudeImportance(p=1),
    "l2": lambda library: library.GroupMagnitudeImportance(p=2),
    "taylor": lambda library: library.GroupTaylorImportance(),
    "bn-scale": lambda library: library.BNScaleImportance(),
    "random": lambda library: library.RandomImportance(),
}


def cut_channels(
    checkpoint: Checkpoint, cut: Cut, gradients: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """The weights of the checkpoint with channels taken out of every layer but the classifier.

    Args:
        checkpoint: what to prune; stays as it is.
        cut: what to take away.
        gradients: of the loss by each weight, by its name, for the method "taylor".

    Raises:
        NotThisWay: the library does not understand the network, or what comes out cannot be rebuilt.
        UsageError: a pattern of protected layers matches nothing.
    """
    module = checkpoint.module()
    for name, parameter in module.named_parameters():
        parameter.grad = None if gradients is None else gradients[name]
    protected = protected_layers(module, cut.protect)
    shape = checkpoint.inputs[0].at_batch(1)
    try:
        remove_channels(module, shape, cut, classes=len(checkpoint.labels), protected=protected)
    except MemoryError:
        raise
    except Exception as error:  # torch-pruning documents no errors; ZeroDivisionError and AssertionError were seen
        if isinstance(error, NotThisWay) or "allocate memory" in str(error):
            raise
        raise NotThisWay(f"torch-pruning: {type(error).__name__}: {error}".partition("\n")[0]) from error
    _check_rebuild(checkpoint, module)
    return snapshot(module)


def remove_channels(
    module: nn.Module, shape: tuple[int, ...], cut: Cut, *, classes: int, protected: set[nn.Module] | None = None
) -> None:
    """Takes the channels that matter least out of the module, in place, and out of all that reads or writes them.

    Args:
        module: in evaluation mode; with gradients for the method "taylor".
        shape: of one input, (1, channels, height, width).
        cut: what to take away.
        classes: outputs of the classifier, which is left whole.
        protected: layers that stay as they are.

    Raises:
        NotThisWay: no layer could be the classifier, or the output is no longer that of one.
        Exception: whatever torch-pruning fails with.
    """
    import torch
    import torch_pruning

    example = torch.zeros(shape)
    graph = torch_pruning.DependencyGraph()
    graph.build_dependency(module, example, unwrapped_parameters=_bare_parameters(module), verbose=False)
    roots = [torch_pruning.ops.TORCH_CONV, torch_pruning.ops.TORCH_LINEAR]
    found = graph.get_all_groups(ignored_layers=[_find_classifier(module, classes)], root_module_types=roots)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cut.seed)
        score = _IMPORTANCE[cut.method](torch_pruning.importance)
        scored = [(group, score(group)) for group in found if not _layers(group) & (protected or set())]
    ranked = [(group, values.nan_to_num()) for group, values in scored if values is not None]
    going = choose([Candidate(values, _blocks(group)) for group, values in ranked], cut)
    for (group, _), channels in zip(ranked, going, strict=True):
        root = group[0].dep
        whole = graph.get_pruning_group(root.target.module, root.handler, channels)
        if channels and graph.check_pruning_group(whole):
            whole.prune()
    align_sizes(module)
    outputs = module(example)
    if tuple(outputs.shape) != (1, classes):
        raise NotThisWay(f"torch-pruning: the output became {tuple(outputs.shape)}")


def _layers(group: Any) -> set[nn.Module]:
    return {dep.target.module for dep, _ in group}


def _bare_parameters(module: nn.Module) -> list[tuple[nn.Parameter, int]]:
    """Weights that stand beside the layers, such as a scale for each channel, and the dimension of their channels.

    That is taken to be the last one that is not 1, as the library does; it looks through a set, in no fixed order.
    """
    import torch_pruning

    other = torch_pruning.ops.OPTYPE.ELEMENTWISE
    layers = [layer for layer in module.modules() if torch_pruning.ops.module2type(layer) != other]
    known = {id(weight) for layer in layers for weight in layer.parameters()}
    bare = [weight for weight in module.parameters() if id(weight) not in known]
    wide = [(weight, [dim for dim, size in enumerate(weight.shape) if size > 1]) for weight in bare]
    return [(weight, dims[-1]) for weight, dims in wide if dims]


def _blocks(group: Any) -> int:
    """In how many equal parts the group's channels are: attention heads, groups of a convolution or a norm."""
    from torch import nn

    parts = [1]
    for layer in _layers(group):
        if isinstance(layer, nn.MultiheadAttention):
            parts.append(layer.num_heads)
        elif isinstance(layer, nn.GroupNorm):
            parts.append(layer.num_groups)
        elif isinstance(layer, nn.Conv2d) and layer.groups != layer.out_channels:
            parts.append(layer.groups)
    return math.lcm(*parts)


def _find_classifier(module: nn.Module, classes: int) -> nn.Module:
    """The last layer with one output for each class."""
    from torch import nn

    layers = [layer for layer in module.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    outputs = [layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels for layer in layers]
    matching = [layer for layer, number in zip(layers, outputs, strict=True) if number == classes]
    if not matching:
        raise NotThisWay(f"no layer has {classes} outputs")
    return matching[-1]


def _check_rebuild(checkpoint: Checkpoint, module: nn.Module) -> None:
    """Raises NotThisWay unless the pruned network can be rebuilt from its weights alone and answers the same."""
    import torch

    shape = checkpoint.inputs[0].at_batch(2)
    example = torch.linspace(-1, 1, math.prod(shape)).reshape(shape)
    try:
        rebuilt = replace(checkpoint, state=snapshot(module)).module()
        with torch.inference_mode():
            same = torch.equal(rebuilt(example), module(example))
    except (InputRefused, RuntimeError) as error:
        raise NotThisWay(f"what is left cannot be rebuilt from its weights: {error}") from error
    if not same:
        raise NotThisWay("what is left, rebuilt from its weights, answers differently")
