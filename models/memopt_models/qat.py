"""Quantization-aware training: weights that are trained to be rounded as the deployed network rounds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from memopt.errors import InputRefused, UsageError
from memopt_models import pt2e, ste
from memopt_models.checkpoint import QUANTIZATION, Checkpoint
from memopt_models.dataset import DataSet
from memopt_models.evaluate import measure
from memopt_models.integer_kernels import PLACES
from memopt_models.resume import Keep
from memopt_models.team import ALONE, Team
from memopt_models.train import Loss, OnStep, TrainSettings, cross_entropy, data_for, describe, fit_module, identify
from memopt_models.views import WINDOWS, check_views, seen_from

if TYPE_CHECKING:
    import torch
    from torch import nn

VIEWS = "views"  # of `quantization`


@dataclass(frozen=True)
class QatSettings:
    """What the weights are trained for, and how."""

    train: TrainSettings
    precision: str = "int8"
    views: int = 1  # places that a picture is seen from, see `memopt_models.views`
    target: str = "cpu"  # who computes int8: "cpu" (ONNX Runtime) or "tensorrt"
    # Of weights alone:
    layer_bits: Mapping[str, int] = field(default_factory=dict)  # other bits by patterns of names; 32: it stays float
    steps: str = "layer"  # who has a step of its own, 4 bytes: each layer, each output "channel", or the "network"
    round_biases: bool = True  # to 8 bits, in steps that the whole network shares

    def __post_init__(self) -> None:
        for name, table in (("precision", METHODS), ("target", PLACES), ("steps", ste.STEPS)):
            if getattr(self, name) not in table:
                raise UsageError(f"{name} {getattr(self, name)!r} is not known", hint=", ".join(table))
        check_views(self.views)
        for name, only in (("precision", "fp32"), ("checkpointing", "off")):
            if getattr(self.train, name) != only:
                raise UsageError(f"{name} is {getattr(self.train, name)!r}, a rounded network trains with {only!r}")
        for name, bits in self.layer_bits.items():
            if bits not in (*ste.BITS, ste.FLOAT):
                known = ", ".join(map(str, (*ste.BITS, ste.FLOAT)))
                raise UsageError(f"layer {name!r} shall have {bits} bits", hint=f"one of {known}")
        if self.precision == "int8" and (self.layer_bits or self.steps != "layer"):
            raise UsageError("bits and steps are chosen for weights alone", hint="--precision int4-weights")


def train_rounded(
    checkpoint: Checkpoint, data: DataSet, how: QatSettings, *, on_step: OnStep | None = None,
    keep: Keep | None = None, team: Team = ALONE,
) -> Checkpoint:  # fmt: skip
    """The checkpoint, trained on with its weights and activations rounded.

    The metrics are those of the rounded network, and of the float one before, "validation_top1_float" and
    "test_top1_float". The weights stay floats under the network's own names; `deployed` rounds them.

    Args:
        checkpoint: a trained network, pruned or not.
        data: to train and to measure on.
        how: precision, target, training.
        on_step: called after every step.
        keep: see `train`.
        team: see `train`.

    Raises:
        InputRefused: the data does not fit the checkpoint, or torch cannot trace its network.
        AnswerIsNo: the training diverged, or nothing in the network can be rounded.
        OutOfResource: it does not fit into the limits.
    """
    from memopt_models.training_memory import Ledger, settle
    from memopt_models.training_probe import Subject

    data, ledger = data_for(checkpoint, data), Ledger(on_step)
    asked = {name: value for name, value in vars(how).items() if name != "train"}
    subject = Subject(checkpoint, make=f"{__name__}:{trainee.__name__}", arguments=asked)
    how = replace(how, train=settle(subject, data, how.train, ledger, stage="qat", keep=keep, team=team))
    made, given = METHODS[how.precision](checkpoint, how), {**identify(checkpoint), **asked}
    fit_module(
        seen_from(made.module, how.views), data, how.train, cross_entropy, ledger, stage="qat", keep=keep,
        made_from=given, team=team,
    )  # fmt: skip
    draft = made.result()
    metrics: dict[str, float] = {}
    if team.is_first:
        before = {f"{name}_float": value for name, value in measure(checkpoint.module(), data).items()}
        metrics = measure(seen_from(deployed(draft), how.views), data) | before
    used = {**asdict(how), **describe(data), "memory": ledger.memory}
    return checkpoint.advance(
        "qat", draft.module(), settings=used, metrics=metrics,
        parents=(checkpoint.sha256,), quantization=draft.quantization | {VIEWS: how.views}, scales=draft.scales,
    )  # fmt: skip


def trainee(first: Checkpoint, **asked: Any) -> tuple[nn.Module, Loss]:
    """What is trained and its loss, for a probe of memory; `asked` are the fields of QatSettings."""
    how = QatSettings(TrainSettings(epochs=1), **asked)
    return seen_from(METHODS[how.precision](first, how).module, how.views), cross_entropy


def views_of(checkpoint: Checkpoint) -> int:
    """From how many places it was trained to see a picture.

    Raises:
        InputRefused: it says what no number of views is.
    """
    views = checkpoint.quantization.get(VIEWS, 1)
    if type(views) is not int or views not in WINDOWS:
        known = ", ".join(map(str, WINDOWS))
        raise InputRefused(f"the checkpoint was trained for {views!r} views, this memopt knows {known}")
    return views


def deployed(checkpoint: Checkpoint) -> nn.Module:
    """The network as it is exported: with the weights that its rounding leaves, where it was trained to be rounded.

    Raises:
        InputRefused: the network cannot be built, or was trained for a rounding that this memopt does not know.
    """
    if not checkpoint.quantization:
        return checkpoint.module()
    method = checkpoint.quantization.get("method")
    if method not in DEPLOYED:
        raise InputRefused(
            f"the checkpoint was trained for rounding by {method!r}, this memopt knows {', '.join(DEPLOYED)}",
            hint="pip install -U memopt",
        )
    return DEPLOYED[method](checkpoint)


@dataclass(frozen=True, eq=False)
class _Rounding:
    """What is trained, and what becomes of it: the checkpoint with weights, scales and `quantization`."""

    module: nn.Module
    result: Callable[[], Checkpoint]


def _round_all(checkpoint: Checkpoint, how: QatSettings) -> _Rounding:
    rounded = pt2e.rounded(checkpoint, how.target)
    quantization = {"method": pt2e.METHOD, "precision": how.precision, "target": how.target}
    return _Rounding(
        rounded.module, lambda: _rounded(checkpoint, rounded.state(), rounded.ranges(), quantization)
    )  # fmt: skip


def _round_weights(bits: int, checkpoint: Checkpoint, how: QatSettings) -> _Rounding:
    made = ste.gridded(checkpoint, bits, layers=how.layer_bits, steps=how.steps, biases=how.round_biases)
    quantization = {"method": ste.METHOD, "bits": made.bits}
    return _Rounding(made.module, lambda: _rounded(checkpoint, made.state(checkpoint), made.steps(), quantization))


def _rounded(
    checkpoint: Checkpoint, state: Mapping[str, torch.Tensor], scales: Mapping[str, torch.Tensor],
    quantization: dict[str, Any],
) -> Checkpoint:  # fmt: skip
    named = {f"{QUANTIZATION}{name}": scale for name, scale in scales.items()}
    return replace(checkpoint, state={**state, **named}, quantization=quantization)


METHODS: dict[str, Callable[[Checkpoint, QatSettings], _Rounding]] = {
    "int8": _round_all,
    **{f"int{bits}-weights": partial(_round_weights, bits) for bits in ste.BITS},
}
# By method of rounding: the network of such a checkpoint that is exported.
DEPLOYED: dict[str, Callable[[Checkpoint], nn.Module]] = {pt2e.METHOD: pt2e.converted, ste.METHOD: pt2e.folded}
