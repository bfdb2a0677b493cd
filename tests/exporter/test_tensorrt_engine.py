"""Engines: real TensorRT-RTX builds of tiny models, which need no GPU, and what is refused before and after."""

import hashlib
import json
import struct
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memopt import cuda_driver
from memopt.artifact import open_artifact
from memopt.errors import BackendError, InputRefused, OutOfResource, UsageError
from memopt.manifest import EngineInfo
from memopt.trt_runtime import TENSORRT_RTX, this_platform
from memopt_export import tensorrt_engine
from memopt_export.tensorrt_engine import (
    Engine,
    EngineHeader,
    EngineSettings,
    build,
    flavors_available,
    read_header,
    save_engine,
    split_targets,
)

onnx = pytest.importorskip("onnx", reason="onnx is not installed, so there are no models to build")
helper, numpy_helper, TensorProto = onnx.helper, onnx.numpy_helper, onnx.TensorProto

WHY_NO_RTX = flavors_available()["tensorrt-rtx"]
needs_rtx = pytest.mark.skipif(WHY_NO_RTX is not None, reason=str(WHY_NO_RTX))
SM86 = EngineSettings("tensorrt-rtx", ("sm86",))
RNG = np.random.default_rng(0)


def model_of(nodes, constants, *, shape=("batch", 8), out=("batch", 8), dtype=TensorProto.FLOAT, functions=()):
    """ONNX with one input "x" and one output "y"."""
    x = helper.make_tensor_value_info("x", dtype, shape)
    y = helper.make_tensor_value_info("y", dtype, out)
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.test", 1)]
    graph = helper.make_graph(nodes, "tiny", [x], [y], tensors)
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=list(functions))


def cnn(dtype=np.float32, *, batch="batch"):
    """Convolution, pooling and a classifier of 10 classes."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv", pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["r"], name="relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flatten"),
        helper.make_node("Gemm", ["f", "fw"], ["y"], name="fc"),
    ]
    weights = {"w": RNG.normal(size=(16, 1, 3, 3)).astype(dtype), "fw": RNG.normal(size=(16, 10)).astype(dtype)}
    return model_of(nodes, weights, shape=(batch, 1, 8, 8), out=(batch, 10), dtype=kind)


def int8_cnn(*, zero_point=0):
    """A convolution between symmetric Q/DQ pairs, with weights of one scale a channel."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"], name="q"),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"], name="dq"),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], name="dqw", axis=0),
        helper.make_node("Conv", ["xd", "wd"], ["y"], name="conv", pads=[1] * 4),
    ]
    weights = {"w": RNG.integers(-127, 128, (16, 1, 3, 3), np.int8), "ws": np.full(16, 0.01, np.float32)}
    scales = {"s": np.float32(0.02), "z": np.int8(zero_point), "wz": np.zeros(16, np.int8)}
    return model_of(nodes, weights | scales, shape=("batch", 1, 8, 8), out=("batch", 16, 8, 8))


def cast_through(dtype):
    nodes = [
        helper.make_node("Cast", ["x"], ["n"], to=dtype),
        helper.make_node("Cast", ["n"], ["y"], to=TensorProto.FLOAT),
    ]
    return model_of(nodes, {})


@pytest.fixture(scope="module")
def onnx_data():
    return cnn().SerializeToString()


@pytest.fixture(scope="module")
def engine(onnx_data):
    return build(onnx_data, SM86)


def pretend(monkeypatch, program):
    """Lets `program` take the place of the compiler's process."""
    monkeypatch.setattr(tensorrt_engine, "_COMPILER", (sys.executable, "-c", program))
    monkeypatch.setattr(tensorrt_engine, "flavors_available", lambda: {"tensorrt-rtx": None})


def test_weights_of_an_engine_that_can_stream_them_lie_apart(onnx_data, engine):
    streaming = build(onnx_data, replace(SM86, weight_streaming=True))
    assert read_header(engine.data).weights_bytes > 0
    assert read_header(streaming.data).weights_bytes == 0
    assert streaming.info.weights_bytes == engine.info.weights_bytes


# ---- Settings.


@given(st.lists(st.integers(1, 512), min_size=3, max_size=3))
def test_profiles_run_from_small_to_large(batches):
    low, best, high = sorted(batches)
    assert EngineSettings("tensorrt-rtx", ("sm86",), ((low, best, high),)).batches == ((low, best, high),)
    if low < high:
        with pytest.raises(UsageError, match=f"^batches {high},{best},{low} are no profile; hint: MIN,OPT,MAX"):
            EngineSettings("tensorrt-rtx", ("sm86",), ((high, best, low),))


@pytest.mark.parametrize(
    ("flavor", "targets", "problem"),
    [
        ("tensorflow", ("sm86",), "flavor 'tensorflow' is not known; hint: one of tensorrt, tensorrt-rtx"),
        (
            "tensorrt-rtx",
            ("sm86", "sm90"),
            "TensorRT-RTX cannot target 'sm90'; hint: one of sm75, sm80, sm86, sm89, sm120, sm121, local",
        ),
        ("tensorrt", ("sm86",), "TensorRT cannot target 'sm86'; hint: one of local"),
        ("tensorrt-rtx", (), "an engine needs targets, each named once; hint: --target sm75"),
        ("tensorrt-rtx", ("sm86", "sm86"), "an engine needs targets, each named once; hint: --target sm75"),
        ("tensorrt-rtx", ("local", "sm86"), "local is a target of its own; hint: --target local"),
    ],
)
def test_impossible_settings_are_refused(flavor, targets, problem):
    with pytest.raises(UsageError) as refused:
        EngineSettings(flavor, targets)
    assert str(refused.value) == problem


@pytest.mark.parametrize("batches", [((0, 1, 1),), ((1, 2, 1),), ()])
def test_impossible_profiles_are_refused(batches):
    with pytest.raises(UsageError, match="profile"):
        EngineSettings("tensorrt-rtx", ("sm86",), batches)


def test_settings_are_frozen():
    with pytest.raises(FrozenInstanceError):
        SM86.flavor = "tensorrt"


# ---- Which target can have which model.


def test_float32_gemm_is_refused_for_sm75_only():
    accepted, refused = split_targets(cnn(), ("sm75", "sm86", "sm120"))
    assert accepted == ("sm86", "sm120")
    assert refused == {"sm75": "Gemm 'fc' multiplies in float32, which TensorRT-RTX cannot on sm75"}


@pytest.mark.parametrize("model", [cnn(np.float16), int8_cnn()], ids=["float16 gemm", "int8 convolution"])
def test_other_models_are_accepted_for_sm75(model):
    assert split_targets(model, ("sm75", "sm89")) == (("sm75", "sm89"), {})


@pytest.mark.parametrize(
    ("dtype", "accepted", "reason"),
    [
        (TensorProto.BFLOAT16, ("sm80", "sm86", "sm89", "sm121"), "bfloat16 needs sm80 or newer"),
        (TensorProto.INT4, ("sm80", "sm86", "sm89", "sm121"), "int4 needs sm80 or newer"),
        (TensorProto.FLOAT8E4M3FN, ("sm89", "sm121"), "float8e4m3fn needs sm89 or newer"),
    ],
)
def test_dtype_is_refused_where_the_arithmetic_lacks_it(dtype, accepted, reason):
    targets = ("sm75", "sm80", "sm86", "sm89", "sm121")
    assert split_targets(cast_through(dtype), targets) == (
        accepted,
        dict.fromkeys([target for target in targets if target not in accepted], reason),
    )


def test_gemm_with_q_and_dq_around_it_still_multiplies_in_float32():
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["wd"]),
        helper.make_node("MatMul", ["x", "wd"], ["y"], name="mm"),
    ]
    model = model_of(nodes, {"w": np.ones((8, 8), np.int8), "s": np.float32(1)})
    assert split_targets(model, ("sm75",)) == (
        (),
        {"sm75": "MatMul 'mm' multiplies in float32, which TensorRT-RTX cannot on sm75"},
    )


def test_local_target_needs_a_driver(monkeypatch):
    with_gpu(monkeypatch, None)
    with pytest.raises(BackendError, match=r"^no NVIDIA driver on this machine$"):
        split_targets(cnn(), ("local",))


def test_local_target_is_judged_by_the_sm_of_this_machine(monkeypatch):
    with_gpu(monkeypatch, "sm75")
    assert split_targets(cast_through(TensorProto.INT4), ("local",)) == ((), {"local": "int4 needs sm80 or newer"})
    with_gpu(monkeypatch, "sm87")
    assert split_targets(cnn(), ("local",), flavor="tensorrt") == (("local",), {})
    with pytest.raises(BackendError) as refused:
        split_targets(cnn(), ("local",))
    assert str(refused.value) == ("TensorRT-RTX cannot target sm87 (Fake GPU); hint: --flavor tensorrt --target local")


def with_gpu(monkeypatch, sm):
    def driver():
        if sm is None:
            raise BackendError("no NVIDIA driver on this machine")
        gpu = ModuleType("driver")
        gpu.sm, gpu.name = sm, "Fake GPU"
        return gpu

    monkeypatch.setattr(tensorrt_engine, "open_driver", driver)
    monkeypatch.setattr(cuda_driver, "open_driver", lambda *_: driver())


# ---- Which flavors there are.


def test_missing_flavor_says_what_to_type(monkeypatch, onnx_data):
    monkeypatch.setattr("memopt.trt_runtime.TrtRuntime.version", lambda _: None)
    assert flavors_available() == {
        "tensorrt": "TensorRT is not installed; hint: pip install 'memopt[tensorrt]'",
        "tensorrt-rtx": "TensorRT-RTX is not installed; hint: pip install 'memopt[tensorrt-rtx]'",
    }
    with pytest.raises(BackendError, match=r"hint: pip install 'memopt\[tensorrt-rtx\]'$"):
        build(onnx_data, SM86)


def test_only_tensorrt_needs_a_driver(monkeypatch, onnx_data):
    monkeypatch.setattr("memopt.trt_runtime.TrtRuntime.version", lambda _: "10.16.1.11")
    with_gpu(monkeypatch, None)
    assert flavors_available() == {"tensorrt": "no NVIDIA driver on this machine", "tensorrt-rtx": None}
    with pytest.raises(BackendError, match=r"^no NVIDIA driver on this machine$"):
        build(onnx_data, EngineSettings("tensorrt", ("local",)))


# ---- Real builds.


@needs_rtx
def test_engine_is_described(engine, onnx_data):
    info = engine.info
    assert (info.flavor, info.version, info.targets) == ("tensorrt-rtx", TENSORRT_RTX.version(), ("sm86",))
    assert (info.os, info.arch) == this_platform()
    assert [profile.batches for profile in info.profiles] == [(1, 1), (2, 32)]
    assert info.profiles[1].opt == {"x": (8, 1, 8, 8)}
    assert info.onnx_sha256 == hashlib.sha256(onnx_data).hexdigest()
    assert info.upper_bound
    assert 0 < info.build_seconds < 60
    assert 50 * 2**20 < info.build_peak_bytes < 2**30


@needs_rtx
def test_larger_profile_needs_more_activation_memory(engine):
    small, large = (profile.activation_bytes for profile in engine.info.profiles)
    assert 0 < small < large


@needs_rtx
def test_header_agrees_with_the_info(engine):
    assert read_header(engine.data) == EngineHeader(
        engine.info.version, len(engine.data), complete=True, targets=("sm86",), weights_bytes=engine.info.weights_bytes
    )


@needs_rtx
def test_equal_models_give_equal_engines(engine, onnx_data):
    assert build(onnx_data, SM86).data == engine.data


@needs_rtx
def test_half_precision_takes_less_memory(engine):
    half = build(cnn(np.float16).SerializeToString(), SM86)
    assert half.info.weights_bytes < engine.info.weights_bytes
    assert half.info.profiles[1].activation_bytes < engine.info.profiles[1].activation_bytes


@needs_rtx
def test_one_engine_serves_several_targets():
    targets = ("sm75", "sm86", "sm89", "sm120", "sm121")
    built = build(cnn(np.float16).SerializeToString(), replace(SM86, targets=targets))
    assert read_header(built.data).targets == built.info.targets == targets


@needs_rtx
def test_int8_engine_is_built():
    assert build(int8_cnn().SerializeToString(), SM86).info.profiles[1].activation_bytes > 0


@needs_rtx
def test_file_with_external_data_is_built_where_it_lies(tmp_path):
    onnx.save(cnn(), tmp_path / "m.onnx", save_as_external_data=True, location="m.onnx.data", size_threshold=0)
    steps = []
    built = build(tmp_path / "m.onnx", replace(SM86, batches=((1, 4, 4),)), on_step=steps.append)
    assert len(built.info.profiles) == 1
    assert steps == ["read the model", "compile for sm86"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]


@needs_rtx
def test_models_own_functions_are_no_unknown_operators():
    opsets = [helper.make_opsetid("", 21)]
    twice = helper.make_function(
        "com.test", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], opsets
    )
    node = helper.make_node("Twice", ["x"], ["y"], domain="com.test")
    model = model_of([node], {}, functions=[twice])
    assert build(model.SerializeToString(), SM86).data


@needs_rtx
def test_fixed_batch_is_built_and_no_other(onnx_data):
    data = cnn(batch=4).SerializeToString()
    assert build(data, replace(SM86, batches=((4, 4, 4),))).info.profiles[0].batches == (4, 4)
    with pytest.raises(InputRefused) as refused:
        build(data, SM86)
    assert str(refused.value) == "the model's batch is fixed at 4; hint: --batch 4, or export it with a free batch"


# ---- What is refused, and by whom.


@needs_rtx
def test_unsupported_operators_are_named_all_at_once():
    nodes = [
        helper.make_node("Foo", ["x"], ["a"], domain="com.test", name="foo1"),
        helper.make_node("Relu", ["a"], ["r"], name="relu"),
        helper.make_node("Foo", ["r"], ["b"], domain="com.test", name="foo2"),
        helper.make_node("Bernoulli", ["b"], ["y"], name="coin"),
    ]
    with pytest.raises(InputRefused) as refused:
        build(model_of(nodes, {}).SerializeToString(), SM86)
    title = f"TensorRT-RTX {TENSORRT_RTX.version()}"
    assert str(refused.value) == f"{title} has no operator Bernoulli (node 'coin'), Foo (node 'foo1')"


@needs_rtx
def test_refusal_of_the_parser_names_node_and_reason():
    with pytest.raises(
        InputRefused, match=r"cannot read the model: QuantizeLinear \(node 'q'\): .*Non-zero zero point"
    ):
        build(int8_cnn(zero_point=3).SerializeToString(), SM86)


@needs_rtx
def test_refusal_of_the_compiler_is_told_without_its_noise(monkeypatch):
    """Were the SM75 rule forgotten, the compiler's own words would come through."""
    monkeypatch.setattr(tensorrt_engine, "_GEMMS", frozenset())
    with pytest.raises(InputRefused) as refused:
        build(cnn().SerializeToString(), replace(SM86, targets=("sm75",)))
    assert str(refused.value).startswith("TensorRT-RTX cannot compile the model for sm75: ")
    assert "Cannot compile operation 'fc' for Turing (SM75): FP32 GEMM is not supported" in str(refused.value)
    assert "catchCudaError" not in str(refused.value)


def test_impossible_target_is_refused_before_the_compiler_starts(monkeypatch):
    pretend(monkeypatch, "raise SystemExit('started')")
    with pytest.raises(InputRefused) as refused:
        build(cnn().SerializeToString(), replace(SM86, targets=("sm86", "sm75")))
    assert str(refused.value) == (
        "no engine for sm75: Gemm 'fc' multiplies in float32, which TensorRT-RTX cannot on sm75"
    )


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"garbage", "the model is not a valid ONNX model: "),
        (b"", "the model is not a valid ONNX model: "),
        (cnn(batch="n").SerializeToString().replace(b"Relu", b"Rulu"), "the model is not a valid ONNX model: "),
    ],
)
def test_what_is_not_onnx_is_refused(monkeypatch, data, problem):
    pretend(monkeypatch, "")
    with pytest.raises(InputRefused, match=f"^{problem}") as refused:
        build(data, SM86)
    assert "\n" not in str(refused.value)


def test_missing_file_is_refused(monkeypatch, tmp_path):
    pretend(monkeypatch, "")
    with pytest.raises(InputRefused, match=r"absent.onnx does not exist$"):
        build(tmp_path / "absent.onnx", SM86)
    with pytest.raises(InputRefused, match=r"is not a file$"):
        build(tmp_path, SM86)


def test_free_dimension_beside_the_batch_is_refused(monkeypatch):
    pretend(monkeypatch, "")
    model = model_of([helper.make_node("Relu", ["x"], ["y"])], {}, shape=("batch", "width"), out=("batch", "width"))
    with pytest.raises(InputRefused, match=r"^input 'x' has shape \(batch, width\), only its batch may be free$"):
        build(model.SerializeToString(), SM86)


@needs_rtx
def test_timeout_stops_the_compiler(onnx_data):
    with pytest.raises(OutOfResource, match=r"^TensorRT-RTX was not done after 0.05 seconds and was stopped$"):
        build(onnx_data, SM86, timeout_s=0.05)


@pytest.mark.parametrize(
    ("program", "kind", "problem"),
    [
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
            BackendError,
            "TensorRT-RTX crashed with SIGSEGV while it compiled: it left no message",
        ),
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
            OutOfResource,
            "TensorRT-RTX ended with SIGKILL while it compiled, most likely for want of memory: it left no message",
        ),
        (
            "raise MemoryError('bytes')",
            OutOfResource,
            "TensorRT-RTX ended with code 1 while it compiled, most likely for want of memory: MemoryError: bytes",
        ),
        (
            "raise KeyError('bug')",
            BackendError,
            "TensorRT-RTX crashed with code 1 while it compiled: KeyError: 'bug'",
        ),
        ("", BackendError, "TensorRT-RTX crashed with code 0 while it compiled: it left no message"),
    ],
)
def test_crash_of_the_compiler_stays_in_its_process(monkeypatch, onnx_data, program, kind, problem):
    pretend(monkeypatch, program)
    with pytest.raises(kind) as refused:
        build(onnx_data, SM86)
    assert str(refused.value) == problem


# ---- Files.


@pytest.fixture
def small_engine():
    return Engine(b"compiled", EngineInfo("tensorrt-rtx", "1.7.1.116", ("sm86",), "linux", "x86_64", (), 8, "0" * 64))


def test_saved_engine_opens_with_its_info(tmp_path, small_engine):
    save_engine(small_engine, tmp_path / "m.engine")
    artifact = open_artifact(tmp_path / "m.engine")
    assert (bytes(artifact.data), artifact.engine) == (small_engine.data, small_engine.info)
    assert json.loads((tmp_path / "m.engine.json").read_text())["targets"] == ["sm86"]


def test_saved_engine_is_replaced_only_by_force(tmp_path, small_engine):
    save_engine(small_engine, tmp_path / "m.engine")
    other = Engine(b"other", replace(small_engine.info, targets=("sm89",)))
    with pytest.raises(UsageError, match=r"m.engine exists; hint: --force replaces it$"):
        save_engine(other, tmp_path / "m.engine")
    assert open_artifact(tmp_path / "m.engine").engine == small_engine.info
    save_engine(other, tmp_path / "m.engine", force=True)
    assert open_artifact(tmp_path / "m.engine").engine == other.info


def test_lone_sidecar_is_not_overwritten(tmp_path, small_engine):
    (tmp_path / "m.engine.json").write_text("{}")
    with pytest.raises(UsageError, match=r"m.engine.json exists"):
        save_engine(small_engine, tmp_path / "m.engine")
    assert not (tmp_path / "m.engine").exists()


def test_engine_needs_its_ending(tmp_path, small_engine):
    with pytest.raises(UsageError, match=r"m.plan does not end in .engine; hint: -o .*m.engine$"):
        save_engine(small_engine, tmp_path / "m.plan")


def header(*, magic=b"vtrt", layout=2, size=64, mask=0b1000, weights=7):
    return struct.pack("<4s4xQQ4B4sI20xQ", magic, layout, size, 1, 7, 1, 116, b"vtrt", mask, weights)


def test_header_is_read_by_the_byte():
    assert len(header()) == 64
    assert read_header(header()) == EngineHeader("1.7.1.116", 64, complete=True, targets=("sm89",), weights_bytes=7)
    everything = read_header(header(mask=0b1111111, size=65))
    assert everything.targets == ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121", "later")
    assert not everything.complete


@pytest.mark.parametrize("data", [b"", b"ftrt" * 20, header()[:63], header(magic=b"ptrt"), b"\x08\x08" * 40])
def test_anything_else_has_no_header(data):
    with pytest.raises(InputRefused, match=r"^this is no TensorRT-RTX engine$"):
        read_header(data)


def test_unknown_header_format_is_refused():
    with pytest.raises(InputRefused, match=r"^this TensorRT-RTX engine has format 3, 2 is known$"):
        read_header(header(layout=3))


def test_importing_the_module_imports_no_heavy_library():
    program = (
        "import sys, memopt_export.tensorrt_engine; "
        "print([name for name in ('onnx', 'torch', 'tensorrt', 'tensorrt_rtx', 'onnxruntime') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
