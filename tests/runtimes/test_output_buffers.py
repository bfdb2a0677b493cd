"""Outputs belong to the caller: used again only when nothing of them is left."""

from __future__ import annotations

import gc
from collections.abc import Callable

import numpy as np
import pytest

from memopt.output_buffers import POOLED_BYTES, OutputBuffers, can_hold
from memopt.tensors import Array, TensorSpec

INPUTS = (TensorSpec("x", "float32", ("batch", 3)),)
OUTPUTS = (TensorSpec("y", "float32", ("batch", POOLED_BYTES // 4)), TensorSpec("n", "int64", ()))
VIEWS: dict[str, Callable[[Array], object]] = {
    "itself": lambda array: array,
    "a slice": lambda array: array[:1],
    "a view of a view": lambda array: array.reshape(-1)[5:].view(np.int32),
    "a memoryview": memoryview,
    "a transposed slice": lambda array: array.T[3:],
}


def take(buffers: OutputBuffers, batch: int = 1) -> dict[str, Array]:
    return buffers.take(INPUTS, OUTPUTS, {"x": np.zeros((batch, 3), np.float32)})


def address(array: Array) -> int:
    return array.__array_interface__["data"][0]


def test_shapes_and_dtypes_follow_from_the_inputs() -> None:
    taken = take(OutputBuffers(), 5)
    assert {name: (array.shape, array.dtype.name) for name, array in taken.items()} == {
        "y": ((5, POOLED_BYTES // 4), "float32"), "n": ((), "int64"),
    }  # fmt: skip
    assert all(array.flags.writeable and array.flags.c_contiguous for array in taken.values())


def test_a_dropped_output_is_used_again() -> None:
    buffers = OutputBuffers()
    first = take(buffers)
    where = address(first["y"])
    del first
    assert address(take(buffers)["y"]) == where


@pytest.mark.parametrize("keep", VIEWS.values(), ids=VIEWS.keys())
def test_whatever_is_left_of_an_output_keeps_it(keep: Callable[[Array], object]) -> None:
    buffers = OutputBuffers()
    first = take(buffers)
    where, kept = address(first["y"]), keep(first["y"])
    del first
    gc.collect()
    second = take(buffers)
    assert address(second["y"]) != where
    del kept, second
    gc.collect()
    assert where in {address(array["y"]) for array in [take(buffers) for _ in range(2)]}


def test_free_buffers_are_few_and_can_be_let_go() -> None:
    buffers = OutputBuffers()
    many = [take(buffers) for _ in range(50)]
    del many
    assert len(buffers._free) == 8
    buffers.clear()
    assert not buffers._free


def test_what_is_larger_than_the_limit_is_not_kept() -> None:
    buffers = OutputBuffers(largest_bytes=2 * POOLED_BYTES)
    for batch, kept in ((3, 0), (2, 1), (1, 2)):
        del [take(buffers, batch)][:]
        assert len(buffers._free) == kept


@pytest.mark.parametrize(
    ("spec", "named", "holds"),
    [
        (TensorSpec("y", "float32", ("batch", 2)), True, True),
        (TensorSpec("y", "float32", ("batch", 2)), False, False),
        (TensorSpec("y", "float32", ("boxes", 2)), True, False),
        (TensorSpec("y", "bfloat16", ("batch", 2)), True, False),
    ],
)
def test_only_outputs_whose_size_is_known_are_held(spec: TensorSpec, named: bool, holds: bool) -> None:
    assert can_hold(INPUTS, (spec,), named=named) is holds
