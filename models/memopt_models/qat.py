"""Quantization-aware training: weights that are trained to be rounded as the deployed network rounds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from memopt.errors import InputRefused, UsageError
from memopt_models import pt2e, ste
from memopt_models.checkpoint import QUANTIZATION, Checkpoint
from memopt_models.dataset import DataSet
from memopt_models.evaluate import measure
from memopt_models.integer_kernels import PLACES
from memopt_models.train import OnStep, TrainSettings, cross_entropy, data_for, describe, fit_module

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class QatSettings:
    """What the weights are trained for, and how."""

    train: TrainSettings
    precision: str = "int8"
    target: str = "cpu"  # who computes int8: "cpu" (ONNX Runtime) or "tensorrt"
    # Of weights alone:
    layer_bits: Mapping[str, int] = field(default_factory=dict)  # other bits by patterns of names; 32: it stays float
    per_channel: bool = False  # a step for each output channel, 4 bytes each, instead of one for the layer
    round_biases: bool = True  # to 8 bits, in steps that the whole network shares

    def __post_init__(self) -> None:
        for name, table in (("precision", METHODS), ("target", PLACES)):
            if getattr(self, name) not in table:
                raise UsageError(f"{name} {getattr(self, name)!r} is not known", hint=", ".join(table))
        for name, bits in self.layer_bits.items():
            if bits not in (*ste.BITS, ste.FLOAT):
                known = ", ".join(map(str, (*ste.BITS, ste.FLOAT)))
                raise UsageError(f"layer {name!r} shall have {bits} bits", hint=f"one of {known}")
        if self.precision == "int8" and (self.layer_bits or self.per_channel):
            raise UsageError("bits and steps are chosen for weights alone", hint="--precision int4-weights")


def train_rounded(
    checkpoint: Checkpoint, data: DataSet, how: QatSettings, *, on_step: OnStep | None = None
) -> Checkpoint:
    """The checkpoint, trained on with its weights and activations rounded.

    The metrics are those of the rounded network, and of the float one before, "validation_top1_float" and
    "test_top1_float". The weights stay floats under the network's own names; `deployed` rounds them.

    Args:
        checkpoint: a trained network, pruned or not.
        data: to train and to measure on.
        how: precision, target, training.
        on_step: called after every step.

    Raises:
        InputRefused: the data does not fit the checkpoint, or torch cannot trace its network.
        AnswerIsNo: the training diverged, or nothing in the network can be rounded.
    """
    data = data_for(checkpoint, data)
    before = {f"{name}_float": value for name, value in measure(checkpoint.module(), data).items()}
    draft = METHODS[how.precision](checkpoint, data, how, on_step)
    metrics = measure(deployed(draft), data) | before
    return checkpoint.advance(
        "qat", draft.module(), settings={**asdict(how), **describe(data)}, metrics=metrics,
        parents=(checkpoint.sha256,), quantization=draft.quantization,
        scales=draft.scales,
    )  # fmt: skip


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


def _train_int8(checkpoint: Checkpoint, data: DataSet, how: QatSettings, on_step: OnStep | None) -> Checkpoint:
    rounded = pt2e.rounded(checkpoint, how.target)
    fit_module(rounded.module, data, how.train, cross_entropy, on_step, stage="qat")
    scales = {f"{QUANTIZATION}{name}": tensor for name, tensor in rounded.ranges().items()}
    return replace(
        checkpoint,
        state=rounded.state() | scales,
        quantization={"method": "pt2e", "precision": how.precision, "target": how.target},
    )


def _train_weights(
    bits: int, checkpoint: Checkpoint, data: DataSet, how: QatSettings, on_step: OnStep | None
) -> Checkpoint:
    made = ste.gridded(
        checkpoint, bits, layers=how.layer_bits, per_channel=how.per_channel, biases=how.round_biases
    )  # fmt: skip
    fit_module(made.module, data, how.train, cross_entropy, on_step, stage="qat")
    steps = {f"{QUANTIZATION}{name}": step for name, step in made.steps().items()}
    return replace(
        checkpoint, state=made.state(checkpoint) | steps, quantization={"method": ste.METHOD, "bits": made.bits}
    )


# By precision: what trains a checkpoint, and returns it with weights, scales and `quantization`; the rest is as before.
METHODS: dict[str, Callable[[Checkpoint, DataSet, QatSettings, OnStep | None], Checkpoint]] = {
    "int8": _train_int8,
    **{f"int{bits}-weights": partial(_train_weights, bits) for bits in ste.BITS},
}
# By method of rounding: the network of such a checkpoint that is exported.
DEPLOYED: dict[str, Callable[[Checkpoint], nn.Module]] = {"pt2e": pt2e.converted, ste.METHOD: pt2e.folded}
