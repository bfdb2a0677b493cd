"""The function behind a layer, as far as it decides which of the layer's errors are seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from memopt.tensors import Array
from memopt_export.graph import Wiring, attribute

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class Activation:
    """A function of one number, and its slope."""

    of: Callable[[Array], Array]
    slope: Callable[[Array], Array]


IDENTITY = Activation(lambda x: x, np.ones_like)


def behind(index: int, wiring: Wiring) -> Activation:
    """The function that alone reads the node's output; IDENTITY where there is none that we know.

    1. Relu, Clip, LeakyRelu, Sigmoid, Tanh, HardSigmoid and HardSwish,
    2. x * Sigmoid(x) and x * HardSigmoid(x), as SiLU and HardSwish are exported: two nodes read x, and one the other.
    """
    output: str = wiring.nodes[index].output[0]
    readers = [wiring.nodes[reader] for reader, _ in wiring.readers.get(output, ())]
    if output in wiring.outputs:
        return IDENTITY
    if len(readers) == 1:
        return _known(readers[0], wiring) or IDENTITY
    gates = [node for node in readers if node.op_type in ("Sigmoid", "HardSigmoid")]
    products = [node for node in readers if node.op_type == "Mul"]
    if len(readers) == 2 and len(gates) == len(products) == 1 and gates[0].output[0] in products[0].input:
        return _times_itself(_known(gates[0], wiring) or IDENTITY)
    return IDENTITY


def _known(node: onnx.NodeProto, wiring: Wiring) -> Activation | None:
    make = _KNOWN.get(node.op_type)
    return make(node, wiring) if make is not None else None


def _clip(node: onnx.NodeProto, wiring: Wiring) -> Activation | None:
    ends = [wiring.scalar(name) for name in [*node.input[1:], "", ""][:2]]
    if any(name and end is None for name, end in zip(node.input[1:], ends, strict=False)):
        return None
    low = attribute(node, "min", -np.inf) if ends[0] is None else ends[0]
    high = attribute(node, "max", np.inf) if ends[1] is None else ends[1]
    return _between(low, high)


def _between(low: float, high: float) -> Activation:
    return Activation(lambda x: x.clip(low, high), lambda x: ((x > low) & (x < high)).astype(x.dtype))


def _leaky(node: onnx.NodeProto, _wiring: Wiring) -> Activation:
    alpha = attribute(node, "alpha", 0.01)
    return Activation(lambda x: np.where(x > 0, x, alpha * x), lambda x: np.where(x > 0, x.dtype.type(1), alpha))


def _hard_sigmoid(node: onnx.NodeProto, _wiring: Wiring) -> Activation:
    alpha, beta = attribute(node, "alpha", 0.2), attribute(node, "beta", 0.5)
    line = _between(0.0, 1.0)
    return Activation(lambda x: line.of(alpha * x + beta), lambda x: alpha * line.slope(alpha * x + beta))


def _sigmoid(_node: onnx.NodeProto, _wiring: Wiring) -> Activation:
    def of(x: Array) -> Array:
        return np.asarray(0.5 * (1 + np.tanh(0.5 * x)), x.dtype)

    return Activation(of, lambda x: of(x) * (1 - of(x)))


def _tanh(_node: onnx.NodeProto, _wiring: Wiring) -> Activation:
    return Activation(np.tanh, lambda x: 1 - np.tanh(x) ** 2)


def _hard_swish(_node: onnx.NodeProto, _wiring: Wiring) -> Activation:
    line = _between(0.0, 1.0)
    return _times_itself(Activation(lambda x: line.of(x / 6 + 0.5), lambda x: line.slope(x / 6 + 0.5) / 6))


def _times_itself(gate: Activation) -> Activation:
    return Activation(lambda x: x * gate.of(x), lambda x: gate.of(x) + x * gate.slope(x))


_KNOWN: dict[str, Callable[[onnx.NodeProto, Wiring], Activation | None]] = {
    "Relu": lambda _node, _wiring: _between(0.0, np.inf),
    "Clip": _clip,
    "LeakyRelu": _leaky,
    "Sigmoid": _sigmoid,
    "Tanh": _tanh,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _hard_swish,
}
