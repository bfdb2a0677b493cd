"""The TensorRT runtimes: refusals, profiles and memory, on a fake library and GPU; on real ones where there are any.

The fake engine is JSON (`ENGINE`) and computes `y = 2x + 1` and the row sums of x. It is strict where the library is
careless: activation memory that is missing, freed or too small for the profile is an error, not a wrong number.
"""

import ctypes
import json
import re
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from enum import Enum
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import memopt
from memopt import engine_rebuild
from memopt.arena import MemoryPool
from memopt.artifact import Artifact
from memopt.bundle import open_bundle
from memopt.cuda_driver import open_driver
from memopt.errors import BackendError, InputRefused, OutOfResource, UsageError
from memopt.manifest import EngineInfo, Profile
from memopt.runtimes import RUNTIMES
from memopt.session import Runtime, Session
from memopt.sizes import show_size
from memopt.specialization import Cache
from memopt.strict_json import to_json
from memopt.tensors import TensorSpec
from memopt.trt_library import library_log
from memopt.trt_runtime import TENSORRT, TENSORRT_RTX, TrtRuntime, this_platform
from memopt_export.pack import EnginePart, pack

DEVICE, HOST, STREAM, GRAPH = KINDS = range(4)
WEIGHTS, SMALL, LARGE = 5000, 2048, 40_000
ENGINE = {"profiles": [[2, 8, 32], [1, 1, 1]], "activations": [LARGE, SMALL], "weights": WEIGHTS}
SHAPE = (1, 8, 8)  # of one input of the tiny graph
ROW_BYTES = (4 + 4 + 1) * 4  # x, y and sum, one sample


@pytest.fixture
def cuda(fake_libcuda, tmp_path):
    """A fake libcuda of this test's own."""
    loaded = ctypes.CDLL(str(shutil.copy(fake_libcuda, tmp_path)))
    loaded.fake_set_total.argtypes = (ctypes.c_size_t,)
    loaded.fake_size.argtypes, loaded.fake_size.restype = (ctypes.c_uint64,), ctypes.c_size_t
    loaded.fake_used.restype = ctypes.c_size_t
    loaded.fake_flush.argtypes = (ctypes.c_void_p,)
    loaded.fake_captured.restype = ctypes.c_void_p
    return loaded


@pytest.fixture(params=["tensorrt", "tensorrt-rtx"])
def flavor(request):
    return request.param


@pytest.fixture
def trt(cuda, flavor, monkeypatch):
    """The fake library, in the place of the real one."""
    module = fake_library(flavor.replace("-", "_"), cuda)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest.fixture
def runtime(cuda, trt, flavor):
    return TrtRuntime(flavor, cuda_library=cuda._name)


@pytest.fixture
def info(flavor):
    os, arch = this_platform()
    profiles = (profile(2, 32, LARGE), profile(1, 1, SMALL))
    return EngineInfo(flavor, "1.7.1.116", ("sm80", "sm86"), os, arch, profiles, WEIGHTS, "0" * 64)


@pytest.fixture
def artifact(info):
    return artifact_of(info)


@pytest.fixture
def session(runtime, artifact):
    opened = runtime.open(artifact, device="cuda")
    yield opened
    opened.close()


def profile(low, high, activation_bytes):
    return Profile({"x": (low, 4)}, {"x": (high, 4)}, {"x": (high, 4)}, activation_bytes)


def artifact_of(info, **engine):
    data = json.dumps(ENGINE | engine).encode()
    return Artifact("m.engine", "engine", memoryview(data), len(data), engine=info)


def batch_of(size, seed=0):
    return np.random.default_rng(seed).normal(size=(size, 4)).astype(np.float32)


def assert_runs(session, x):
    y, total = session.run({"x": x})
    np.testing.assert_array_equal(y, 2 * x + 1)
    np.testing.assert_allclose(total, x.sum(axis=1), rtol=1e-5)


# ---- What is answered without an engine.


def test_objects_satisfy_the_protocols(session):
    runtimes: list[Runtime] = [TENSORRT, TENSORRT_RTX]
    opened: Session = session
    assert [(runtime.NAME, runtime.DEVICES) for runtime in runtimes] == [
        ("tensorrt", ("cuda",)),
        ("tensorrt-rtx", ("cuda",)),
    ]
    assert callable(opened.run)


def test_version_is_the_libraries_and_makes_no_context(runtime, cuda):
    assert runtime.version() == "1.7.1.116"
    assert runtime.unavailable("cuda") is None
    assert cuda.fake_contexts() == 0


@pytest.mark.parametrize(("installed", "version"), [("10.7.0.post1", "10.7.0"), ("10.16.1.11", "10.16.1.11")])
def test_version_of_a_library_not_imported_is_its_distributions(monkeypatch, installed, version):
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.setattr("importlib.metadata.version", {"tensorrt": installed}.__getitem__)
    assert TENSORRT.version() == version
    assert "tensorrt" not in sys.modules


def test_missing_library_says_what_to_type(flavor, monkeypatch):
    forget_library(flavor, monkeypatch)
    runtime = TrtRuntime(flavor)
    reason = f"{TITLE[flavor]} is not installed; hint: pip install 'memopt[{flavor}]'"
    assert runtime.version() is None
    assert runtime.unavailable("cuda") == reason
    with pytest.raises(BackendError) as refused:
        runtime.load_library()
    assert str(refused.value) == reason


def test_broken_library_says_what_is_missing(runtime, flavor, monkeypatch):
    def broken(_name):
        raise OSError("libnvinfer.so.11: cannot open shared object file")

    monkeypatch.setattr("memopt.trt_library.import_module", broken)
    reason = f"{flavor.replace('-', '_')} cannot be imported: libnvinfer.so.11: cannot open shared object file"
    assert runtime.unavailable("cuda") == reason


def test_library_that_fails_without_a_word_is_told_by_kind(runtime, flavor, monkeypatch):
    def broken(_name):
        raise ImportError

    monkeypatch.setattr("memopt.trt_library.import_module", broken)
    assert runtime.unavailable("cuda") == f"{flavor.replace('-', '_')} cannot be imported: ImportError"


def test_missing_driver_is_found_before_the_library_is_touched(flavor, trt, artifact):
    trt.Runtime = None  # the real one crashes without a driver
    runtime = TrtRuntime(flavor, cuda_library="/nowhere.so")
    assert runtime.unavailable("cuda").startswith("no NVIDIA driver on this machine (/nowhere.so")
    with pytest.raises(BackendError, match=r"^no NVIDIA driver on this machine"):
        runtime.open(artifact)


def test_other_devices_are_refused(runtime, artifact):
    with pytest.raises(BackendError, match=f"^{TITLE[runtime.NAME]} runs on cuda, not on cpu$"):
        runtime.open(artifact, device="cpu")


# ---- What an EngineInfo refuses, cheapest first.


def test_fitting_engine_is_not_refused(runtime, artifact, cuda):
    assert runtime.refuses(artifact) is None
    assert cuda.fake_contexts() == 0


def test_other_kinds_are_refused(runtime, artifact):
    title = TITLE[runtime.NAME]
    assert runtime.refuses(replace(artifact, kind="onnx")) == f"{title} opens .engine with its EngineInfo, not .onnx"
    assert runtime.refuses(replace(artifact, engine=None)) == f"{title} opens .engine with its EngineInfo, not .engine"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"flavor": "other"}, "was built by other, this is FLAVOR"),
        ({"version": "1.6.0.1"}, "was built by TITLE 1.6.0.1, 1.7.1.116 is installed"),
        ({"arch": "riscv64"}, "was built for OS riscv64, this machine is OS ARCH"),
        ({"targets": ("sm75", "sm89")}, "needs sm75 or sm89, this GPU (Fake GPU) is sm86"),
    ],
)
def test_refusal_names_have_want_and_command(runtime, info, change, reason):
    os, arch = this_platform()
    for name, value in {"FLAVOR": runtime.NAME, "TITLE": TITLE[runtime.NAME], "OS": os, "ARCH": arch}.items():
        reason = reason.replace(name, value)
    flavor, target = runtime.NAME, "local" if runtime.NAME == "tensorrt" else "sm86"
    expected = f"m.engine {reason}; hint: memopt-export engine MODEL.onnx --flavor {flavor} --target {target}"
    wrong = artifact_of(replace(info, **change))
    assert runtime.refuses(wrong) == expected
    with pytest.raises(BackendError) as refused:
        runtime.open(wrong)
    assert str(refused.value) == expected


def test_only_rtx_engines_cross_operating_systems(runtime, info):
    reason = runtime.refuses(artifact_of(replace(info, os="plan9")))
    if runtime.NAME == "tensorrt-rtx":
        assert reason is None
    else:
        assert "was built for plan9" in reason


def test_gpu_that_rtx_cannot_target_is_sent_to_tensorrt(cuda, runtime, artifact):
    cuda.fake_set_sm(9, 0)
    assert runtime.refuses(artifact) == (
        "m.engine needs sm80 or sm86, this GPU (Fake GPU) is sm90; "
        "hint: memopt-export engine MODEL.onnx --flavor tensorrt --target local"
    )


def test_refusal_without_a_driver_names_the_engines_targets(flavor, trt, info):
    reason = TrtRuntime(flavor, cuda_library="/nowhere.so").refuses(artifact_of(replace(info, version="1.0")))
    assert reason.endswith(f"--target {'sm80,sm86'}")


def test_too_little_memory_is_found_before_the_library_is_asked(cuda, trt, runtime, artifact):
    cuda.fake_set_total(4096)
    trt.Runtime = None
    with pytest.raises(OutOfResource) as refused:
        runtime.open(artifact)
    assert str(refused.value) == (
        "m.engine needs 6.88 KiB of device memory (weights 4.88 KiB, activations of its smallest profile 2.00 KiB), "
        "4.00 KiB of 4.00 KiB are free on Fake GPU"
    )


def without(info, *, weights=False, activations=False):
    """As if the engine's numbers had never been known."""
    profiles = tuple(replace(p, activation_bytes=None) for p in info.profiles) if activations else info.profiles
    return replace(info, profiles=profiles, weights_bytes=None if weights else info.weights_bytes)


@pytest.mark.parametrize(
    ("unknown", "said"),
    [
        (
            {"weights": True},
            "at least 2.00 KiB of device memory (weights unknown, activations of its smallest profile 2.00 KiB)",
        ),
        (
            {"activations": True},
            "at least 4.88 KiB of device memory (weights 4.88 KiB, activations of its smallest profile unknown)",
        ),
    ],
)
def test_what_is_not_known_of_an_engine_is_called_unknown(cuda, runtime, info, unknown, said):
    cuda.fake_set_total(1024)
    with pytest.raises(OutOfResource) as refused:
        runtime.open(artifact_of(without(info, **unknown)))
    assert str(refused.value) == f"m.engine needs {said}, 1.00 KiB of 1.00 KiB are free on Fake GPU"


def test_one_profile_of_unknown_size_leaves_the_smallest_unknown(cuda, runtime, info):
    cuda.fake_set_total(1024)
    profiles = (info.profiles[0], replace(info.profiles[1], activation_bytes=None))
    with pytest.raises(OutOfResource, match="activations of its smallest profile unknown"):
        runtime.open(artifact_of(replace(info, profiles=profiles)))


def test_an_engine_of_which_nothing_is_known_opens(runtime, info):
    session = runtime.open(artifact_of(without(info, weights=True, activations=True)))
    assert_runs(session, batch_of(2))
    session.close()


def test_weights_that_the_library_cannot_count_are_unknown(runtime, info, monkeypatch, trt):
    monkeypatch.setattr(trt.ICudaEngine, "get_engine_stat", lambda *_: -1)
    session = runtime.open(artifact_of(without(info, weights=True)))
    assert session.device_bytes is None
    session.close()


def test_engine_the_library_refuses_is_told_in_its_words(runtime, info, cuda):
    broken = replace(artifact_of(info), data=memoryview(b"not an engine"))
    with pytest.raises(BackendError, match=r"^m.engine cannot be opened: Serialization assertion failed$"):
        runtime.open(broken)
    assert cuda.fake_used() == 0


def test_library_that_does_not_start_is_not_called_again(trt, runtime, artifact):
    trt.start_error = "CUDA initialization failure with error: 35"
    with pytest.raises(BackendError, match=r"^the library does not start: CUDA initialization failure with error: 35$"):
        runtime.open(artifact)


@pytest.mark.parametrize(
    ("engine", "reason"),
    [
        ({"dtype": "FP8"}, "'x' of m.engine cannot be a numpy array: FP8 in DEVICE memory"),
        ({"location": "HOST"}, "'x' of m.engine cannot be a numpy array: FLOAT in HOST memory"),
    ],
)
def test_inputs_that_numpy_cannot_feed_are_refused(runtime, info, engine, reason):
    with pytest.raises(BackendError, match=f"^{reason}$"):
        runtime.open(artifact_of(info, **engine))


# ---- An open session.


def test_specs_and_placement_come_from_the_engine(session, flavor):
    assert session.inputs == (TensorSpec("x", "float32", ("batch", 4)),)
    assert session.outputs == (TensorSpec("y", "float32", ("batch", 4)), TensorSpec("sum", "float32", ("batch",)))
    assert session.placement == f"{TITLE[flavor]} 1.7.1 on Fake GPU (sm86)"


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batches=st.lists(st.integers(1, 32), min_size=1, max_size=6))
def test_outputs_equal_numpy_for_any_sequence_of_batches(session, batches):
    for seed, size in enumerate(batches):
        assert_runs(session, batch_of(size, seed))


def test_outputs_belong_to_the_caller(session):
    first = session.run({"x": np.zeros((2, 4), np.float32)})[0]
    session.run({"x": np.ones((2, 4), np.float32)})
    assert np.all(first == 1)


def test_arrays_of_any_layout_are_taken(session):
    x = batch_of(8)
    assert_runs(session, np.asfortranarray(x))
    assert_runs(session, np.repeat(x, 2, axis=0)[::2])
    with pytest.raises(InputRefused, match="byte order"):
        session.run({"x": x.astype(">f4")})


def test_smallest_profile_is_taken_at_open_and_grown_only_for_larger_batches(trt, session):
    activations = session._arena
    assert activations.size_bytes == SMALL
    assert_runs(session, batch_of(1))
    assert activations.size_bytes == SMALL
    assert_runs(session, batch_of(2))
    assert activations.size_bytes == LARGE
    assert_runs(session, batch_of(1))
    assert activations.size_bytes == LARGE
    assert trt.profiles_used == [1, 0, 1]


def test_buffers_are_reused(cuda, session):
    assert_runs(session, batch_of(32))
    made = [cuda.fake_allocations(kind) for kind in KINDS]
    for size in (1, 32, 7, 2, 31, 32):
        assert_runs(session, batch_of(size))
    assert [cuda.fake_allocations(kind) for kind in KINDS] == made


def test_device_bytes_are_what_the_driver_counts(cuda, session):
    for size, activations in ((1, SMALL), (4, LARGE), (32, LARGE)):
        assert_runs(session, batch_of(size))
        assert session.device_bytes == WEIGHTS + activations + size * ROW_BYTES == cuda.fake_used()
    session.close()
    assert session.device_bytes == 0


def test_trim_keeps_the_weights_alone_and_the_next_run_works(cuda, session):
    assert_runs(session, batch_of(32))
    session.trim()
    assert session.device_bytes == WEIGHTS == cuda.fake_used()
    assert_runs(session, batch_of(3))
    assert session.device_bytes == cuda.fake_used() > WEIGHTS


def test_the_context_of_an_application_stays_current(cuda, runtime, artifact):
    theirs, current = ctypes.c_int(), ctypes.c_void_p()
    cuda.cuCtxPushCurrent_v2(ctypes.byref(theirs))
    session = runtime.open(artifact)
    assert_runs(session, batch_of(2))
    with pytest.raises(InputRefused):
        session.run({"x": batch_of(33)})
    session.close()
    assert cuda.cuCtxPopCurrent_v2(ctypes.byref(current)) == 0
    assert current.value == ctypes.addressof(theirs)
    assert cuda.fake_depth() == 0


def test_weights_are_taken_from_the_manifest_where_the_library_cannot_tell(trt, runtime, info, monkeypatch):
    monkeypatch.delattr(trt.ICudaEngine, "get_engine_stat")
    known, unknown = runtime.open(artifact_of(info)), runtime.open(artifact_of(replace(info, weights_bytes=None)))
    assert known.device_bytes == WEIGHTS + SMALL + ROW_BYTES
    assert unknown.device_bytes is None
    known.close()
    unknown.close()


def test_profile_that_does_not_fit_leaves_the_small_one_usable(cuda, session):
    cuda.fake_set_total(WEIGHTS + SMALL + 2000)
    with pytest.raises(OutOfResource, match=r"^39.1 KiB of device memory are needed, .* are free on Fake GPU$"):
        session.run({"x": batch_of(2)})
    assert_runs(session, batch_of(1))
    cuda.fake_set_total(2**20)
    assert_runs(session, batch_of(2))


def test_profile_of_no_activations_runs(runtime, info):
    """TensorRT-RTX reports 0 bytes for a single MatMul."""
    session = runtime.open(artifact_of(info, activations=[LARGE, 0]))
    assert_runs(session, batch_of(1))
    session.close()


def test_batch_outside_all_profiles_names_them(session):
    with pytest.raises(InputRefused) as refused:
        session.run({"x": batch_of(33)})
    assert str(refused.value) == (
        "batch 33 is outside the profiles of m.engine, which cover 1..1, 2..32; "
        "hint: split the batch, or memopt-export engine MODEL.onnx --batch MIN,OPT,MAX"
    )
    assert_runs(session, batch_of(32))


def test_wrong_inputs_are_refused(session):
    with pytest.raises(InputRefused, match="the model expects"):
        session.run({"z": batch_of(1)})
    with pytest.raises(InputRefused, match="expects float32, got float64"):
        session.run({"x": batch_of(1).astype(np.float64)})
    with pytest.raises(InputRefused, match=r"expects shape \(batch, 4\), got \(1, 5\)"):
        session.run({"x": np.zeros((1, 5), np.float32)})


def test_inputs_of_different_batches_are_refused(runtime, info):
    session = runtime.open(artifact_of(info, second_input=True))
    with pytest.raises(InputRefused, match=r"^the inputs of m.engine have different batches: \[2, 3\]$"):
        session.run({"x": batch_of(2), "x2": batch_of(3)})
    session.close()


def test_output_of_unknown_shape_is_refused(runtime, info):
    with pytest.raises(BackendError, match=r"^output 'y' of m.engine has a shape that depends on the data: \(-1, 4\)$"):
        runtime.open(artifact_of(info, unknown_output=True))


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        ("create_execution_context", "has no execution context"),
        ("set_optimization_profile_async", "cannot switch to profile 1"),
        ("set_input_shape", r"refuses shape \(1, 4\) of 'x'"),
        ("set_tensor_address", "refuses the address of 'x'"),
    ],
)
def test_call_that_the_library_denies_is_named(cuda, trt, runtime, artifact, call, problem):
    trt.denied = call
    with pytest.raises(BackendError, match=f"^m.engine {problem}: the library does not say why$"):
        runtime.open(artifact)
    assert [cuda.fake_live(kind) for kind in KINDS] == [0, 0, 0, 0]


def test_shapes_that_contradict_each_other_are_told(trt, runtime, artifact):
    trt.denied = "infer_shapes"
    with pytest.raises(BackendError, match=r"^m.engine has no output shapes for {'x': \(1, 4\)}: broadcast$"):
        runtime.open(artifact)


def test_failed_run_is_told_in_the_librarys_words_and_can_be_repeated(trt, session):
    trt.run_error = "CUDNN_STATUS_EXECUTION_FAILED"
    with pytest.raises(BackendError, match=r"^m.engine failed: CUDNN_STATUS_EXECUTION_FAILED$"):
        session.run({"x": batch_of(2)})
    trt.run_error = None
    assert_runs(session, batch_of(2))


def test_eight_threads_share_one_session(session):
    arrays = [batch_of(1 + seed % 32, seed) for seed in range(64)]
    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(lambda x: session.run({"x": x})[0], arrays))
    for x, y in zip(arrays, results, strict=True):
        np.testing.assert_array_equal(y, 2 * x + 1)


def test_sessions_do_not_disturb_each_other(runtime, artifact, session):
    second = runtime.open(artifact)
    assert_runs(second, batch_of(32))
    assert_runs(session, batch_of(1))
    second.close()
    assert_runs(session, batch_of(5))


@pytest.fixture
def pair(runtime, artifact):
    """Two engines in one pool."""
    pool = MemoryPool()
    opened = [runtime.open(artifact, pool=pool) for _ in range(2)]
    yield opened
    for each in opened:
        each.close()


def test_engines_of_a_pool_compute_in_one_memory(cuda, pair):
    one, other = pair
    for sizes, activations in (((1, 1), SMALL), ((1, 32), LARGE), ((32, 1), LARGE)):
        for session, size in zip(pair, sizes, strict=True):
            assert_runs(session, batch_of(size))
        ports = sum(port.device_bytes for session in pair for port in session._ports.values())
        assert cuda.fake_used() == 2 * WEIGHTS + activations + ports
    other.close()
    assert_runs(one, batch_of(32))
    one.close()
    assert cuda.fake_used() == 0


def test_what_one_engine_of_a_pool_gives_back_the_other_takes_again(pair):
    one, other = pair
    for _ in range(2):
        assert_runs(one, batch_of(32))
        assert_runs(other, batch_of(4))
        other.trim()


def test_engines_of_a_pool_run_in_turn(pair):
    work = [(pair[seed % 2], batch_of(1 + seed % 32, seed)) for seed in range(64)]
    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(lambda each: each[0].run({"x": each[1]})[0], work))
    for (_, x), y in zip(work, results, strict=True):
        np.testing.assert_array_equal(y, 2 * x + 1)


def test_pool_keeps_its_limit_on_a_device(cuda, runtime, info):
    large = artifact_of(info, activations=[2 * 2**20, SMALL])
    session = runtime.open(large, pool=MemoryPool("1MiB"))
    assert_runs(session, batch_of(1))
    with pytest.raises(OutOfResource, match=r"^2.00 MiB of activations are needed, the pool's limit is 1.00 MiB$"):
        session.run({"x": batch_of(2)})
    assert_runs(session, batch_of(1))
    session.close()
    assert cuda.fake_used() == 0


@pytest.fixture
def fast(cuda, artifact, monkeypatch):
    """A session of TensorRT's that records what repeats."""
    trt = fake_library("tensorrt", cuda)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    engine = replace(artifact, engine=replace(artifact.engine, flavor="tensorrt"))
    session = TrtRuntime("tensorrt", cuda_library=cuda._name).open(engine, profile="fast")
    yield session
    session.close()
    assert [cuda.fake_live(kind) for kind in KINDS] == [0, 0, 0, 0]


def test_runs_that_repeat_are_launched_as_one_graph(cuda, fast):
    for size, launched in ((4, 0), (4, 1), (4, 2), (7, 2), (7, 3), (4, 3), (4, 4), (1, 4), (1, 5), (1, 6)):
        assert_runs(fast, batch_of(size, seed=launched))
        assert cuda.fake_launches() == launched
        assert cuda.fake_live(GRAPH) <= 1
    fast.trim()
    assert cuda.fake_live(GRAPH) == 0
    assert_runs(fast, batch_of(1))


def test_what_cannot_be_recorded_is_run_by_the_library(cuda, fast):
    cuda.fake_set_capture_result(900)
    for seed in range(4):
        assert_runs(fast, batch_of(4, seed))
    assert cuda.fake_launches() == 0


def test_other_profiles_record_nothing(cuda, session):
    for seed in range(4):
        assert_runs(session, batch_of(4, seed))
    assert cuda.fake_launches() == 0


def test_shapes_that_stay_are_set_once(trt, session, monkeypatch):
    asked = []
    infer = trt.IExecutionContext.infer_shapes
    monkeypatch.setattr(trt.IExecutionContext, "infer_shapes", lambda self: asked.append(1) or infer(self))
    for size in (4, 4, 4, 5, 4):
        assert_runs(session, batch_of(size))
    assert len(asked) == 3


@pytest.mark.parametrize(
    ("profile", "graphs", "kernels"),
    [("fast", "WHOLE_GRAPH_CAPTURE", None), ("balanced", None, None), ("minimum", None, "NONE")],
)
def test_rtx_is_told_what_a_context_may_cost(trt, runtime, artifact, profile, graphs, kernels):
    session = runtime.open(artifact, profile=profile)
    assert_runs(session, batch_of(2))
    session.close()
    if runtime.NAME == "tensorrt":
        assert trt.configs == []
        return
    (config,) = trt.configs
    for chosen, name in (
        (config.cuda_graph_strategy, graphs),
        (config.dynamic_shapes_kernel_specialization_strategy, kernels),
    ):
        assert (chosen.name if chosen else None) == name


@pytest.fixture
def kept(tmp_path):
    folder = tmp_path / "kept"
    folder.mkdir(mode=0o700)
    return folder


def test_kernels_compiled_in_one_process_are_there_in_the_next(trt, runtime, artifact, kept):
    for _ in range(2):
        session = replace(runtime, kernels=kept).open(artifact)
        assert_runs(session, batch_of(2))
        session.close()
    files = list(kept.iterdir())
    if runtime.NAME == "tensorrt":
        assert files == []
        return
    assert [file.read_bytes() for file in files] == [b"of this GPU: two kernels"]
    assert [bool(cache.kernels) for cache in trt.caches] == [False, True]


def test_kernels_are_kept_for_each_engine_and_when_a_session_is_trimmed(runtime, info, kept):
    runtime = replace(runtime, kernels=kept)
    for sha in ("1", "2"):
        session = runtime.open(artifact_of(replace(info, onnx_sha256=sha * 64)))
        session.trim()
        assert len(list(kept.iterdir())) == (int(sha) if runtime.NAME == "tensorrt-rtx" else 0)
        assert_runs(session, batch_of(2))
        session.close()


@pytest.mark.parametrize("spoil", ["other GPU", "others may write", "not a folder"])
def test_kernels_that_cannot_be_used_are_as_if_not_there(trt, runtime, artifact, kept, spoil):
    runtime = replace(runtime, kernels=kept)
    runtime.open(artifact).close()
    if spoil == "other GPU":
        for file in kept.iterdir():
            file.write_bytes(b"of another one")
    elif spoil == "others may write":
        kept.chmod(0o777)
    else:
        shutil.rmtree(kept)
        kept.touch()
    session = runtime.open(artifact)
    assert_runs(session, batch_of(2))
    assert not any(cache.kernels for cache in trt.caches)
    session.close()


@pytest.mark.parametrize(("profile", "on_device"), [("minimum", WEIGHTS - 4000), ("balanced", WEIGHTS)])
def test_weights_that_can_be_streamed_stay_in_host_memory_in_profile_minimum(cuda, runtime, info, profile, on_device):
    session = runtime.open(artifact_of(info, streamable=4000), profile=profile)
    assert_runs(session, batch_of(1))
    assert session.device_bytes == on_device + SMALL + ROW_BYTES == cuda.fake_used()
    session.close()


def test_profile_that_does_not_exist_is_refused(runtime, artifact):
    with pytest.raises(UsageError, match=r"^profile 'slow' is not known; hint: fast, balanced, minimum$"):
        runtime.open(artifact, profile="slow")


def test_close_frees_everything_and_ends_the_session(cuda, trt, runtime, artifact):
    session = runtime.open(artifact)
    assert_runs(session, batch_of(16))
    session.close()
    session.close()
    assert [cuda.fake_live(kind) for kind in KINDS] == [0, 0, 0, 0]
    assert trt.gone == ["context", "engine", "runtime"]
    with pytest.raises(BackendError, match=r"^m.engine is closed$"):
        session.run({"x": batch_of(1)})


def test_failed_open_leaves_nothing_behind(cuda, runtime, info):
    cuda.fake_set_total(WEIGHTS + LARGE)  # enough for what EngineInfo says, which is not true
    lying = artifact_of(info, activations=[LARGE + 1, LARGE + 1])
    with pytest.raises(OutOfResource, match="of device memory are needed"):
        runtime.open(lying)
    assert [cuda.fake_live(kind) for kind in KINDS] == [0, 0, 0, 0]


def test_close_frees_the_rest_when_the_device_has_failed(cuda, runtime, artifact):
    session = runtime.open(artifact)
    cuda.fake_set_sync_result(700)
    with pytest.raises(BackendError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        session.run({"x": batch_of(1)})
    session.close()
    assert [cuda.fake_live(kind) for kind in KINDS] == [0, 0, 0, 0]


def test_log_is_one_per_library_and_keeps_errors_apart(trt):
    log = library_log(trt)
    assert library_log(trt) is log
    log.lines.clear()
    assert log.errors() == []
    log.log(trt.ILogger.Severity.INFO, "all is well")
    log.log(trt.ILogger.Severity.ERROR, "it is not")
    log.log(trt.ILogger.Severity.INTERNAL_ERROR, "at all")
    log.log(trt.ILogger.Severity.VERBOSE, "and so on")
    assert log.errors() == ["it is not", "at all"]
    assert len(log.lines) == 3


# ---- An engine in a bundle that only has to be built anew to run here.


@pytest.fixture
def stale(tmp_path, cuda, trt, flavor, monkeypatch, tiny_contents):
    """A bundle whose engine is of another GPU, and a cache that is still empty; the fake GPU is an sm86."""
    monkeypatch.setitem(RUNTIMES, flavor, TrtRuntime(flavor, cuda_library=cuda._name))
    large = tiny_contents.parts[0]
    shapes = [{"input": (batch, *large.graph.inputs[0].shape[1:])} for batch in (1, 1, 4)]
    os, arch = this_platform()
    info = EngineInfo(flavor, "1.7.1.116", ("sm120",), os, arch, (Profile(*shapes, 4096),), 1000, large.graph.sha256)
    parts = (*tiny_contents.parts, EnginePart("engine", "tiny", "fp32", b"of another GPU", info, "large"))
    pack(replace(tiny_contents, parts=parts), tmp_path / "stale.mopt")
    return tmp_path / "stale.mopt", Cache(tmp_path / "cache")


@pytest.fixture
def builder(monkeypatch, stale):
    """In place of the exporter's command: leaves a fake engine of this GPU, and notes what was asked."""
    asked, free = [], threading.Event()
    free.set()

    def run(command, timeout_s):
        asked.append(command)
        assert free.wait(20)
        output = Path(command[command.index("-o") + 1])
        engine = {"profiles": [[1, 1, 4]], "activations": [SMALL], "weights": WEIGHTS, "input": "input", "shape": SHAPE}
        output.write_bytes(json.dumps(engine).encode())
        old = next(v for v in open_bundle(stale[0]).manifest.variants if v.id == "engine").engine
        profiles = (replace(old.profiles[0], activation_bytes=SMALL),)
        info = replace(old, targets=("sm86",), weights_bytes=WEIGHTS, profiles=profiles)
        output.with_name(output.name + ".json").write_text(to_json(info))

    monkeypatch.setattr(engine_rebuild, "_run", run)
    return SimpleNamespace(asked=asked, free=free)


@pytest.fixture
def full_disk(monkeypatch):
    """Engines cannot be built."""

    def refuse(command, timeout_s):
        raise BackendError("the disk is full")

    monkeypatch.setattr(engine_rebuild, "_run", refuse)


def opened_here(monkeypatch):
    """The names of the engines that the runtime is asked to open; what it opens is a stand-in."""
    opened = []

    def open_engine(self, artifact, **_):
        assert self.refuses(artifact) is None
        opened.append((artifact.name, self.kernels))
        return FakeSession()

    monkeypatch.setattr(TrtRuntime, "open", open_engine)
    return opened


class FakeSession:
    inputs = (TensorSpec("input", "float32", ("batch", *SHAPE)),)
    outputs = (TensorSpec("logits", "float32", ("batch", 3)),)
    placement, device_bytes, device_method = "the fake GPU", 7000, "by hand"

    def run(self, feeds):
        return [np.full((len(feeds["input"]), 3), 86, np.float32)]

    def trim(self):
        pass

    def close(self):
        pass


def test_stale_engine_is_built_anew_while_the_graph_serves(stale, builder, monkeypatch, tiny_inputs, flavor):
    path, cache = stale
    opened = opened_here(monkeypatch)
    builder.free.clear()
    with memopt.load(path, cache=cache) as model:
        assert model.why[-1] == f"engine: being built anew for Fake GPU, for {cache.folder}"
        assert model.variant in ("large", "small")
        served = model(tiny_inputs)
        builder.free.set()
        model._better.made.result(timeout=20)
        assert np.all(model(tiny_inputs) == 86)
        assert not np.all(served == 86)
        assert (model.variant, model.placement) == ("engine", "the fake GPU")
        assert model.why[-1] == "engine: built anew for this GPU from now on"
    target = "sm86" if flavor == "tensorrt-rtx" else "local"
    (command,) = builder.asked
    assert command[command.index("--flavor") :][:4] == ["--flavor", flavor, "--target", target]
    assert command[command.index("--batch") + 1] == "1,1,4"
    with memopt.load(path, cache=cache) as model:
        assert model.variant == "engine"
        assert np.all(model(tiny_inputs) == 86)
    assert opened == [("engine", cache.folder)] * 2
    assert len(builder.asked) == 1


def test_a_device_that_is_named_waits_for_its_engine(stale, builder, monkeypatch, tiny_inputs):
    path, cache = stale
    opened_here(monkeypatch)
    with memopt.load(path, cache=cache, device="tensorrt") as model:
        assert np.all(model(tiny_inputs) == 86)
        assert model.why[-1].endswith("built anew for this GPU")


def test_why_an_engine_was_not_built_is_said(stale, full_disk, tiny_inputs):
    path, cache = stale
    with memopt.load(path, cache=cache) as model:
        assert model._better.made.exception(timeout=20) is not None
        assert model(tiny_inputs).shape == (32, 3)
        assert model.why[-1] == "engine: not built anew for this GPU: the disk is full"
    with pytest.raises(BackendError, match=r"needs sm120.*; engine cannot be built anew: the disk is full"):
        memopt.load(path, cache=cache, device="tensorrt", trust_engines=True)
    assert memopt.load(path, cache=cache, specialize="off").why[-1].startswith(("large", "small"))


def test_engine_that_was_built_anew_keeps_the_limit_too(stale, builder, monkeypatch, tiny_inputs):
    path, cache = stale
    opened_here(monkeypatch)
    monkeypatch.setattr("memopt.model.Model.settle", lambda *_: None)
    with memopt.load(path, cache=cache, memory_limit="8MiB", specialize="wait") as model:
        assert model.variant == "engine"
    with pytest.raises(OutOfResource):
        memopt.load(path, cache=cache, memory_limit=WEIGHTS, specialize="wait")
    too_small = rf"the new engine needs .* KiB, the limit is {show_size(WEIGHTS)}"
    with pytest.raises(OutOfResource, match=too_small):
        memopt.load(path, cache=cache, memory_limit=WEIGHTS, device="tensorrt")


def test_engine_that_the_limit_does_not_hold_is_not_taken_up_when_it_is_there(
    stale, builder, monkeypatch, tiny_inputs
):  # fmt: skip
    path, cache = stale
    opened = opened_here(monkeypatch)
    monkeypatch.setattr("memopt.model.Model.settle", lambda *_: None)
    with memopt.load(path, cache=cache, memory_limit="8MiB") as model:
        served = model.variant
        grown = replace(model._better.made.result(timeout=20).engine, weights_bytes=9 * 2**20)
        monkeypatch.setattr("memopt.engine_rebuild.choice_of", with_engine(engine_rebuild.choice_of, grown))
        model(tiny_inputs)
        assert (model.variant, opened) == (served, [])
        assert re.match(
            r"engine: not built anew for this GPU: the new engine needs 9.* MiB, the limit is 8.00 MiB", model.why[-1]
        )


def with_engine(choice_of, engine):
    """`choice_of` for an engine of these figures."""
    return lambda bundle, artifact: choice_of(bundle, replace(artifact, engine=engine))


def test_load_that_waits_goes_on_without_an_engine_that_cannot_be_built(stale, full_disk, tiny_inputs):
    path, cache = stale
    with memopt.load(path, cache=cache, specialize="wait") as model:
        assert model(tiny_inputs).shape == (32, 3)
        assert "engine: not built anew for this GPU: the disk is full" in model.why


def test_damaged_engine_is_removed_and_built_again(stale, builder, monkeypatch, tiny_inputs):
    path, cache = stale
    opened_here(monkeypatch)
    memopt.load(path, cache=cache, specialize="wait").close()
    (engine,) = cache.folder.glob("*/model.engine")
    engine.write_bytes(b"other code")
    with memopt.load(path, cache=cache, specialize="wait") as model:
        assert model.variant == "engine"
        assert len(builder.asked) == 2


def test_the_exporter_really_builds_it(stale, flavor):
    if flavor == "tensorrt":
        pytest.skip("TensorRT builds for the GPU it finds; TensorRT-RTX without one")
    path, cache = stale
    bundle = open_bundle(path)
    rebuild = engine_rebuild.find_stale(bundle)
    built = engine_rebuild.find_or_build(rebuild, bundle, cache)
    assert built.engine.targets == ("sm86",)
    assert built.engine.profiles[0].batches == (1, 4)
    assert bytes(built.data[:4]) == b"vtrt"


# ---- The real thing.


def test_fake_has_nothing_that_the_real_library_lacks(cuda):
    real, fake = pytest.importorskip("tensorrt_rtx"), fake_library("tensorrt_rtx", cuda)
    kinds = ("Runtime", "IRuntimeCache", "IRuntimeConfig", "ICudaEngine", "IExecutionContext", "ILogger")
    for kind in (getattr(fake, name) for name in kinds):
        ours = ("compute", "strategy", "kernels", "driver")
        used = [name for name in vars(kind) if not name.startswith("_") and name not in ours]
        assert [name for name in used if not hasattr(getattr(real, kind.__name__), name)] == []
    for enum in (
        fake.TensorIOMode, fake.TensorLocation, fake.DataType, fake.EngineStat, fake.CudaGraphStrategy,
        fake.DynamicShapesKernelSpecializationStrategy,
    ):  # fmt: skip
        assert set(enum.__members__) <= set(getattr(real, enum.__name__).__members__)
    assert hasattr(real.ExecutionContextAllocationStrategy, "USER_MANAGED")
    assert hasattr(real.ICudaEngine, "num_io_tensors")
    assert hasattr(real.ICudaEngine, "num_optimization_profiles")


@pytest.mark.gpu
def test_real_engine_equals_numpy(flavor, tmp_path):
    runtime = TrtRuntime(flavor)
    if reason := runtime.unavailable("cuda"):
        pytest.skip(reason)
    tensorrt_engine = pytest.importorskip("memopt_export.tensorrt_engine")
    try:
        settings = tensorrt_engine.EngineSettings(flavor, ("local",))
        engine = tensorrt_engine.build(affine_model(), settings)
    except BackendError as error:  # TensorRT-RTX has no such target
        pytest.skip(str(error))
    tensorrt_engine.save_engine(engine, tmp_path / "m.engine")
    from memopt.artifact import open_artifact

    session = runtime.open(open_artifact(tmp_path / "m.engine"))
    small = session.device_bytes
    arrays = [batch_of(size, size) for size in (1, 32, 2, 1, 17)]
    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(lambda x: session.run({"x": x})[0], arrays))
    for x, y in zip(arrays, results, strict=True):
        np.testing.assert_allclose(y, 2 * x + 1, rtol=1e-6)
    assert session.device_bytes > small
    session.close()


def affine_model():
    """ONNX bytes of y = 2x + 1 over (batch, 4)."""
    from onnx import TensorProto, helper, numpy_helper

    nodes = [helper.make_node("Mul", ["x", "two"], ["d"]), helper.make_node("Add", ["d", "one"], ["y"])]
    constants = [
        numpy_helper.from_array(np.float32(value).reshape(1), name) for name, value in (("two", 2), ("one", 1))
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "affine", values[:1], values[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()


# ---- The fake library.

TITLE = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}


def forget_library(flavor, monkeypatch):
    """As if the library had never been installed."""
    from importlib.metadata import PackageNotFoundError

    module = flavor.replace("-", "_")

    def nothing(name):
        raise PackageNotFoundError(name)

    def no_module(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr("importlib.metadata.version", nothing)
    monkeypatch.setattr("memopt.trt_library.import_module", no_module)


def fake_library(name, cuda):
    """A module that looks like tensorrt to the runtime; `cuda` is the fake GPU it computes on."""
    trt = ModuleType(name)
    trt.__version__ = "1.7.1.116"
    trt.start_error = trt.run_error = trt.denied = None
    trt.profiles_used, trt.gone, trt.recorded, trt.configs, trt.caches = [], [], [], [], []
    trt.TensorIOMode = Enum("TensorIOMode", "NONE INPUT OUTPUT")
    trt.TensorLocation = Enum("TensorLocation", "DEVICE HOST")
    trt.DataType = Enum("DataType", "FLOAT HALF FP8")
    trt.EngineStat = Enum("EngineStat", "TOTAL_WEIGHTS_SIZE")
    trt.ExecutionContextAllocationStrategy = Enum("ExecutionContextAllocationStrategy", "STATIC USER_MANAGED")

    class ILogger:
        Severity = Enum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE")

    class Runtime:
        def __init__(self, logger):
            self.logger = logger
            if trt.start_error:
                logger.log(ILogger.Severity.ERROR, trt.start_error)

        def deserialize_cuda_engine(self, data):
            assert cuda.fake_ready()
            self.logger.log(ILogger.Severity.INFO, f"Loaded engine size: {len(data)}")
            try:
                return ICudaEngine(json.loads(bytes(data)))
            except ValueError:
                self.logger.log(ILogger.Severity.ERROR, "Serialization assertion failed")
                return None

        def __del__(self):
            trt.gone.append("runtime")

    class ICudaEngine:
        def __init__(self, plan):
            self.plan = plan
            self.names = ["x", "x2", "y", "sum"] if plan.get("second_input") else ["x", "y", "sum"]
            self.num_io_tensors = len(self.names)
            self.num_optimization_profiles = len(plan["profiles"])
            self.driver = open_driver(cuda._name)
            self.streamable_weights_size = plan.get("streamable", 0)
            self.weight_streaming_budget_v2 = self.streamable_weights_size
            self.weights = None

        def get_tensor_name(self, index):
            return self.names[index]

        def get_tensor_mode(self, name):
            return trt.TensorIOMode.INPUT if name.startswith("x") else trt.TensorIOMode.OUTPUT

        def get_tensor_dtype(self, name):
            return trt.DataType[self.plan.get("dtype", "FLOAT")]

        def get_tensor_location(self, name):
            return trt.TensorLocation[self.plan.get("location", "DEVICE")]

        def get_tensor_shape(self, name):
            return [-1] if name == "sum" else [-1, 4]

        def get_tensor_profile_shape(self, name, index):
            return [[batch, 4] for batch in self.plan["profiles"][index]]

        def get_device_memory_size_for_profile_v2(self, index):
            return self.plan["activations"][index]

        def get_engine_stat(self, stat):
            return self.plan["weights"]

        def create_runtime_config(self):
            trt.configs.append(IRuntimeConfig())
            return trt.configs[-1]

        def create_execution_context(self, how):
            assert cuda.fake_ready()
            streamed = self.streamable_weights_size - self.weight_streaming_budget_v2
            self.weights = self.driver.device_buffer(self.plan["weights"] - streamed)
            strategy = how.strategy if isinstance(how, IRuntimeConfig) else how
            assert strategy is trt.ExecutionContextAllocationStrategy.USER_MANAGED
            return None if trt.denied == "create_execution_context" else IExecutionContext(self)

        def __del__(self):
            trt.gone.append("engine")
            self.driver.free(self.weights)

    class IExecutionContext:
        def __init__(self, engine):
            self.plan = engine.plan
            self.profile, self.memory, self.shapes, self.addresses = 0, (0, 0), {}, {}

        def set_optimization_profile_async(self, index, stream):
            assert cuda.fake_ready()
            trt.profiles_used.append(index)
            self.profile, self.shapes = index, {}
            return trt.denied != "set_optimization_profile_async"

        def set_device_memory(self, address, size):
            assert cuda.fake_size(address) >= size
            self.memory = address, size

        def set_input_shape(self, name, shape):
            low, _, high = self.plan["profiles"][self.profile]
            self.shapes[name] = shape
            return trt.denied != "set_input_shape" and low <= shape[0] <= high

        def infer_shapes(self):
            if trt.denied == "infer_shapes":
                raise RuntimeError("broadcast")
            return []

        def get_tensor_shape(self, name):
            batch = -1 if self.plan.get("unknown_output") else self.shapes["x"][0]
            return [batch] if name == "sum" else [batch, 4]

        def set_tensor_address(self, name, address):
            self.addresses[name] = address
            return trt.denied != "set_tensor_address"

        def execute_async_v3(self, stream):
            assert cuda.fake_ready()
            if cuda.fake_captured():
                trt.recorded.append(partial(self.compute, dict(self.shapes), dict(self.addresses), self.memory))
                return True
            if trt.run_error:
                library_log(trt).log(ILogger.Severity.ERROR, trt.run_error)
                return False
            cuda.fake_flush(stream)
            self.compute(self.shapes, self.addresses, self.memory)
            return True

        def compute(self, shapes, addresses, memory):
            address, size = memory
            assert size >= self.plan["activations"][self.profile]
            assert cuda.fake_size(address) >= size
            ctypes.memset(address, 0x5A, size)
            batch = shapes["x"][0]
            x, y = (view(addresses[name], (batch, 4)) for name in ("x", "y"))
            y[...] = 2 * x + 1
            view(addresses["sum"], (batch,))[...] = x.sum(axis=1)

        def __del__(self):
            trt.gone.append("context" if cuda.fake_ready() else "context without its GPU")

    def view(address, shape):
        count = int(np.prod(shape))
        assert cuda.fake_size(address) >= 4 * count
        return np.ctypeslib.as_array((ctypes.c_float * count).from_address(address)).reshape(shape)

    trt.launch = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: trt.recorded[-1]())
    cuda.fake_set_on_launch(trt.launch)
    if name == "tensorrt_rtx":
        trt.CudaGraphStrategy = Enum("CudaGraphStrategy", "DISABLED WHOLE_GRAPH_CAPTURE")
        trt.DynamicShapesKernelSpecializationStrategy = Enum("DynamicShapesKernelSpecializationStrategy", "LAZY NONE")

    class IRuntimeConfig:
        cuda_graph_strategy = dynamic_shapes_kernel_specialization_strategy = strategy = None

        def set_execution_context_allocation_strategy(self, strategy):
            self.strategy = strategy

        def create_runtime_cache(self):
            return IRuntimeCache()

        def set_runtime_cache(self, cache):
            trt.caches.append(cache)

    class IRuntimeCache:
        kernels = b""

        def deserialize(self, data):
            assert cuda.fake_ready()
            fits = data.startswith(b"of this GPU")
            self.kernels = data if fits else b""
            return fits

        def serialize(self):
            return memoryview(self.kernels or b"of this GPU: two kernels")

    for kind in (ILogger, IRuntimeCache, IRuntimeConfig, Runtime, ICudaEngine, IExecutionContext):
        setattr(trt, kind.__name__, kind)
    return trt
