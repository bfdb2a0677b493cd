"""GPTQ: weights rounded one input after the other, each making up for the error of those before it.

E. Frantar et al. 2022, https://arxiv.org/abs/2210.17323. Written in the form of LDLQ (J. Chee et al. 2023,
https://arxiv.org/abs/2307.13304, section 3), which is the same with one Cholesky factor instead of an inverse.
All arrays have a leading axis of groups: 1 for most layers, the channels for a depthwise convolution.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from memopt.tensors import Array

_BLOCK = 128  # inputs whose errors are fed forward together
_DAMPING = 0.01  # of the mean second moment, so that few samples still give a factor


def round_in_order(weight: Array, moments: Array, quantize: Callable[[Array, Array], Array]) -> Array:
    """The values that quantized weights stand for, (groups, outputs, inputs).

    Args:
        weight: float, (groups, outputs, inputs).
        moments: x^T x over rows of what the layer reads, (groups, inputs, inputs).
        quantize: (groups, outputs, n) weights and the indices of these n inputs -> the nearest values that can be
            stored, of the same shape.
    """
    order = np.argsort(-np.diagonal(moments, axis1=1, axis2=2), axis=1, kind="stable")  # (groups, inputs)
    rows = np.arange(len(order))[:, None]
    feedback = _feedback(moments[rows[:, :, None], order[:, :, None], order[:, None, :]])
    wanted = np.take_along_axis(weight.astype(np.float64), order[:, None, :], axis=2)
    error = np.zeros_like(wanted)  # wanted - stored
    for start in range(0, wanted.shape[2], _BLOCK):
        stop = min(start + _BLOCK, wanted.shape[2])
        pushed = wanted[:, :, start:stop] + error[:, :, :start] @ feedback[:, :start, start:stop]
        for k in range(start, stop):
            own = error[:, :, start:k] @ feedback[:, start:k, k : k + 1]
            stored = quantize(pushed[:, :, k - start : k - start + 1] + own, order[:, k : k + 1])
            error[:, :, k : k + 1] = wanted[:, :, k : k + 1] - stored
    rounded = np.empty_like(wanted)
    np.put_along_axis(rounded, order[:, None, :], wanted - error, axis=2)
    return rounded


def _feedback(moments: Array) -> Array:
    """U of moments = U D U^T, with ones on its diagonal and nothing below: (groups, inputs, inputs)."""
    damped = moments.astype(np.float64)
    damping = _DAMPING * np.trace(damped, axis1=1, axis2=2) / damped.shape[1]
    inputs = np.arange(damped.shape[1])
    damped[:, inputs, inputs] += np.maximum(damping, np.finfo(np.float32).tiny)[:, None]
    reversed_ = np.linalg.cholesky(damped[:, ::-1, ::-1])[:, ::-1, ::-1]
    factor: Array = reversed_ / np.diagonal(reversed_, axis1=1, axis2=2)[:, None, :]
    return factor
