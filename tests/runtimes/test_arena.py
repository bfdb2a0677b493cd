"""Pools: what is given back, what is shared, and limits that hold."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from memopt import arena, ort_runtime
from memopt.arena import MemoryPool
from memopt.artifact import open_artifact
from memopt.errors import BackendError, OutOfResource, UsageError
from memopt.memory import give_back, read_host_memory
from memopt.ort_runtime import OrtSession
from memopt.tensors import Array

SIDE = 128  # of the chain's pictures: 64 KiB each
MIB = 2**20


@pytest.fixture
def opened(chain_file: Path) -> Callable[..., OrtSession]:
    def open_(**options: object) -> OrtSession:
        return ort_runtime.open(open_artifact(chain_file), threads=1, **options)  # type: ignore[arg-type]

    return open_


def pictures(count: int) -> dict[str, Array]:
    return {"input": np.random.default_rng(count).normal(size=(count, 1, SIDE, SIDE)).astype(np.float32)}


def private_mib() -> float:
    give_back()
    private = read_host_memory().private_bytes
    assert private is not None
    return private / MIB


def test_a_pool_keeps_its_limit_and_goes_on_after_an_overrun(opened: Callable[..., OrtSession]) -> None:
    session = opened(pool=MemoryPool("4MiB"))
    few = session.run(pictures(16))[0]  # two pictures live: 2 MiB
    with pytest.raises(OutOfResource, match=r"out of memory: .*Available memory"):
        session.run(pictures(64))
    assert np.array_equal(session.run(pictures(16))[0], few)


def test_a_session_of_another_pool_knows_nothing_of_the_limit(opened: Callable[..., OrtSession]) -> None:
    before, narrow, after = opened(), opened(pool=MemoryPool("1MiB")), opened()
    for session in (before, after):
        assert session.run(pictures(64))[0].shape[0] == 64
    with pytest.raises(OutOfResource):
        narrow.run(pictures(64))


def test_models_of_one_pool_share_its_limit_even_when_another_pool_came_between(
    opened: Callable[..., OrtSession],
) -> None:
    pool = MemoryPool("4MiB")
    first = opened(pool=pool)
    other = opened()
    second = opened(pool=pool)
    for session in (first, second):
        assert session.run(pictures(16))[0].shape[0] == 16
        with pytest.raises(OutOfResource):
            session.run(pictures(64))
    assert other.run(pictures(64))[0].shape[0] == 64


def test_models_of_one_pool_run_in_the_same_memory(opened: Callable[..., OrtSession]) -> None:
    pool = MemoryPool("48MiB")
    sessions = [opened(pool=pool) for _ in range(4)]
    before = private_mib()
    sessions[0].run(pictures(256))  # 32 MiB
    after_one = private_mib()
    for session in sessions[1:]:
        session.run(pictures(256))
    assert after_one - before > 16
    assert private_mib() - after_one < 8


@pytest.mark.parametrize("give", [OrtSession.trim, OrtSession.close])
def test_what_trim_and_close_give_back_is_gone_from_the_process(
    opened: Callable[..., OrtSession], give: Callable[[OrtSession], None]
) -> None:
    opened().run(pictures(1))  # what the library takes once
    before = private_mib()
    session = opened()
    session.run(pictures(256))
    assert private_mib() - before > 16
    give(session)
    assert private_mib() - before < 4


def test_a_trimmed_session_runs_again_with_equal_results(opened: Callable[..., OrtSession]) -> None:
    session = opened()
    expected = session.run(pictures(3))[0]
    for _ in range(3):
        session.trim()
        assert np.array_equal(session.run(pictures(3))[0], expected)


def test_a_session_without_an_arena_holds_nothing_between_runs(opened: Callable[..., OrtSession]) -> None:
    session = opened(profile="minimum")
    session.run(pictures(1))
    before = private_mib()
    expected = session.run(pictures(256))[0]
    del expected
    assert private_mib() - before < 4


def test_outputs_are_never_overwritten_while_the_caller_has_them(opened: Callable[..., OrtSession]) -> None:
    session = opened()
    kept = [session.run(pictures(batch))[0] for batch in (3, 4, 3, 4, 3)]
    rows = [output[1] for output in kept]  # views, of which the whole is dropped
    copies = [output.copy() for output in kept]
    del kept
    for batch in (3, 4, 3, 4) * 4:
        session.run(pictures(batch))
    assert all(np.array_equal(row, copy[1]) for row, copy in zip(rows, copies, strict=True))


def test_a_dropped_output_of_the_same_size_is_used_again(opened: Callable[..., OrtSession]) -> None:
    session = opened()
    where = {session.run(pictures(3))[0].__array_interface__["data"][0] for _ in range(5)}
    assert len(where) == 1


def test_inputs_are_let_go_after_the_run(opened: Callable[..., OrtSession]) -> None:
    import weakref

    session, feeds = opened(), pictures(3)
    gone = weakref.ref(feeds["input"])
    session.run(feeds)
    del feeds
    assert gone() is None


def test_a_graph_that_says_wrong_shapes_runs_all_the_same(chain_file: Path, tmp_path: Path) -> None:
    import onnx

    model = onnx.load(chain_file)
    pads = model.graph.initializer[0]
    pads.CopyFrom(onnx.helper.make_tensor("pads", onnx.TensorProto.INT64, [8], [0] * 7 + [1]))  # one column more
    model.graph.output[0].type.tensor_type.shape.dim[3].dim_value = SIDE
    (tmp_path / "x.onnx").write_bytes(model.SerializeToString())
    session = ort_runtime.open(open_artifact(tmp_path / "x.onnx"))
    assert session.run(pictures(2))[0].shape == (2, 1, SIDE, SIDE + 3)


def test_a_pool_too_small_for_anything_is_refused() -> None:
    with pytest.raises(UsageError, match="a pool of 10 KiB holds no model; hint: MemoryPool"):
        MemoryPool("10 KiB")


def test_a_library_that_takes_no_second_arena_is_named(
    opened: Callable[..., OrtSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime
    from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

    def refuse(*_: object) -> None:
        raise InvalidArgument("An allocator for this device has already been registered for sharing.")

    monkeypatch.setattr(onnxruntime, "create_and_register_allocator", refuse)
    with pytest.raises(
        BackendError, match=r"takes no second arena: .*; hint: pip install -U onnxruntime, or profile='"
    ):
        opened()
    assert opened(profile="minimum").run(pictures(1))


def test_the_first_session_sets_malloc_once_unless_it_shall_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    once = arena._Once(lambda: calls.append(1))
    monkeypatch.setattr(arena, "_malloc_once", once)
    arena.return_large_blocks()
    arena.return_large_blocks()
    assert calls == [1]
    monkeypatch.setattr(arena, "_malloc_once", arena._Once(lambda: calls.append(2)))
    arena.keep_malloc()
    arena.return_large_blocks()
    assert calls == [1]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="only glibc has a threshold to set")
def test_freed_blocks_return_to_the_system_once_the_threshold_is_set() -> None:
    """glibc raises its threshold to the size of what is freed, and then keeps such blocks; the set one stays."""
    program = """
import sys, ctypes
from memopt import arena
from memopt.memory import read_host_memory
if sys.argv[1] == "set":
    arena.return_large_blocks()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def block(size):
    p = libc.malloc(size); ctypes.memset(p, 1, size); return p
libc.free(block(30 << 20))
pieces = [block(1 << 20) for _ in range(24)]
top = block(1 << 20)
for piece in pieces: libc.free(piece)
print(read_host_memory().private_bytes)
"""
    kept, returned = (
        int(subprocess.run([sys.executable, "-c", program, how], capture_output=True, check=True).stdout)
        for how in ("kept", "set")
    )
    assert kept - returned > 16 * MIB
