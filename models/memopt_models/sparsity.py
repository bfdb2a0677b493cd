"""Weights set to zero one by one: no tensor shrinks. What a mask saves, and where, is said beside it.

Zeros in a pattern N:M make kernels faster that were built for them (2:4: TensorRT on GPUs from sm80 on), and zeros
anywhere make a compressed file smaller. The file as it lies, and the memory of what runs it, stay what they were.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from memopt.errors import AnswerIsNo, UsageError
from memopt_models.checkpoint import Checkpoint, digest_state, snapshot
from memopt_models.dataset import DataSet
from memopt_models.evaluate import measure
from memopt_models.ranking import SCOPES, protected_layers
from memopt_models.resume import Keep
from memopt_models.team import ALONE, Team
from memopt_models.train import OnStep, TrainSettings, cross_entropy, data_for, describe, fit_module, identify
from memopt_models.training_memory import Ledger, settle
from memopt_models.training_probe import Subject

if TYPE_CHECKING:
    import torch
    from torch import nn

_LEVEL = 6  # of zlib, gzip's own default


@dataclass(frozen=True)
class Pattern:
    """Of every `of` weights in a row of input channels, the `kept` largest stay: 2:4 is what GPUs know."""

    kept: int = 2
    of: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.kept < self.of:
            raise UsageError(f"pattern {self.kept}:{self.of} keeps nothing or everything", hint="--pattern 2:4")


@dataclass(frozen=True)
class Magnitude:
    """The smallest weights go, this share of all."""

    share: float
    scope: str = "layer"  # of every layer the same share; or "global": of all layers together

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise UsageError(f"sparsity is {self.share}, it lies between 0 and 1", hint="--sparsity 0.8")
        if self.scope not in SCOPES:
            raise UsageError(f"sparsity scope {self.scope!r} is not known", hint=", ".join(SCOPES))


@dataclass(frozen=True)
class SparsitySettings:
    """Which weights become zero, and how to train the others afterwards."""

    kind: Pattern | Magnitude
    protect: tuple[str, ...] = ()  # patterns of names of layers that stay as they are
    finetune: TrainSettings | None = None  # None: not at all


def sparsify(
    checkpoint: Checkpoint, data: DataSet, how: SparsitySettings, *, on_step: OnStep | None = None,
    keep: Keep | None = None, team: Team = ALONE,
) -> Checkpoint:  # fmt: skip
    """The checkpoint with zeros among the weights of its convolutions and linear layers, fine-tuned with them in place.

    Its metrics say what there is of it: "zeros", their share of all parameters, and "compressed_bytes" of all tensors
    by zlib, the method of gzip, beside "compressed_bytes_before".

    Args:
        checkpoint: what to prune; stays as it is.
        data: to fine-tune and to measure on.
        how: which weights go, fine-tuning.
        on_step: called after every step of the fine-tuning.
        keep: of the fine-tuning, see `train`.
        team: of the fine-tuning, see `train`.

    Raises:
        InputRefused: the data does not fit the checkpoint.
        UsageError: a pattern of protected layers matches nothing.
        AnswerIsNo: no layer can have such zeros.
        OutOfResource: the fine-tuning does not fit into its limits.
    """
    data, ledger = data_for(checkpoint, data), Ledger(on_step)
    module = checkpoint.module()
    masks = find_masks(module, how)
    with masked(module, masks):
        if how.finetune is not None:
            finetune = settle(Subject(checkpoint), data, how.finetune, ledger, stage="prune", keep=keep, team=team)
            fit_module(
                module, data, finetune, cross_entropy, ledger,
                stage="prune", keep=keep, made_from=identify(checkpoint) | {"masks": digest_state(masks)}, team=team,
            )  # fmt: skip
    note = {"layers": list(masks), "skipped": [name for name in _weights(module, set()) if name not in masks]}
    metrics = (measure(module, data) if team.is_first else {}) | {
        "zeros": _zeros(module),
        "compressed_bytes": float(compressed_bytes(snapshot(module))),
        "compressed_bytes_before": float(compressed_bytes(checkpoint.state)),
    }
    used = {
        **asdict(how),
        **describe(data),
        **note,
        "memory": ledger.memory,
        "kind": {type(how.kind).__name__.lower(): asdict(how.kind)},
    }
    return checkpoint.advance("prune", module, settings=used, metrics=metrics, parents=(checkpoint.sha256,))


def find_masks(module: nn.Module, how: SparsitySettings) -> dict[str, torch.Tensor]:
    """Layer -> which of its weights stay, True or False in the shape of the weight.

    Raises:
        AnswerIsNo: no layer can have such zeros.
    """
    weights = _weights(module, protected_layers(module, how.protect))
    masks = _pattern_masks(weights, how.kind) if isinstance(how.kind, Pattern) else _magnitude_masks(weights, how.kind)
    if not masks:
        raise AnswerIsNo(f"no layer can have zeros by {how.kind}")
    return masks


@contextmanager
def masked(module: nn.Module, masks: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Sets what is masked to zero, and keeps it so while the module is trained inside.

    A weight of zero whose gradient is always zero stays so in every optimizer: its moments and its decay are zero, too.
    """
    import torch

    layers = dict(module.named_modules())
    hooks = []
    for name, mask in masks.items():
        weight = layers[name].get_parameter("weight")
        with torch.no_grad():
            weight.masked_fill_(~mask, 0)
        hooks.append(
            weight.register_hook(lambda gradient, gone=~mask: gradient.masked_fill(gone.to(gradient.device), 0))
        )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def compressed_bytes(state: Mapping[str, torch.Tensor]) -> int:
    """Size of all tensors one after the other, compressed by zlib as gzip does it."""
    import torch

    compressor = zlib.compressobj(_LEVEL)
    size = 0
    for tensor in state.values():
        size += len(compressor.compress(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()))
    return size + len(compressor.flush())


def parse_pattern(text: str) -> Pattern:
    """The pattern written N:M.

    Raises:
        UsageError: it is not.

    >>> parse_pattern("2:4")
    Pattern(kept=2, of=4)
    """
    kept, colon, of = text.partition(":")
    if not (colon and kept.isdigit() and of.isdigit()):
        raise UsageError(f"{text!r} is no pattern", hint="--pattern 2:4")
    return Pattern(int(kept), int(of))


def _without(gone: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    return gradient.masked_fill(gone.to(gradient.device), 0)


def _weights(module: nn.Module, protected: set[nn.Module]) -> dict[str, torch.Tensor]:
    """The weights of convolutions and linear layers, (outputs, inputs, ...)."""
    from torch import nn

    return {
        name: layer.weight.detach()
        for name, layer in module.named_modules()
        if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)) and layer not in protected
    }


def _pattern_masks(weights: Mapping[str, torch.Tensor], pattern: Pattern) -> dict[str, torch.Tensor]:
    """Along the input channels, where TensorRT looks for 2:4; layers whose channels do not divide so are left out."""
    import torch

    masks = {}
    for name, weight in weights.items():
        if weight.shape[1] % pattern.of:
            continue
        rows = weight.movedim(1, -1)  # (outputs, ..., inputs)
        groups = rows.abs().reshape(-1, pattern.of)
        largest = groups.argsort(dim=1, descending=True, stable=True)[:, : pattern.kept]
        kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, largest, value=True)
        masks[name] = kept.reshape(rows.shape).movedim(-1, 1).contiguous()
    return masks


def _magnitude_masks(weights: Mapping[str, torch.Tensor], magnitude: Magnitude) -> dict[str, torch.Tensor]:
    import torch

    together = [list(weights)] if magnitude.scope == "global" else [[name] for name in weights]
    masks: dict[str, torch.Tensor] = {}
    for names in together:
        sizes = [weights[name].numel() for name in names]
        order = torch.cat([weights[name].abs().flatten() for name in names]).argsort(stable=True)
        kept = torch.ones(sum(sizes), dtype=torch.bool)
        kept[order[: math.floor(sum(sizes) * magnitude.share)]] = False
        parts = torch.split(kept, sizes)
        masks |= {name: part.reshape(weights[name].shape) for name, part in zip(names, parts, strict=True)}
    return masks


def _zeros(module: nn.Module) -> float:
    """Share of the parameters that are zero."""
    parameters = list(module.parameters())
    return sum(int((p == 0).sum()) for p in parameters) / max(sum(p.numel() for p in parameters), 1)
