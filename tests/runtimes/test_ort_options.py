"""What ONNX Runtime is told: tables that need no GPU to be read."""

from __future__ import annotations

import pytest

from memopt.errors import UsageError
from memopt.ort_options import PROFILES, profile_named, provider_options, session_entries

BALANCED = PROFILES["balanced"]


def test_profiles_are_known_by_name() -> None:
    assert profile_named("balanced") is BALANCED
    with pytest.raises(UsageError, match="profile 'slow' is not known; hint: fast, balanced, minimum"):
        profile_named("slow")


@pytest.mark.parametrize("name", ["balanced", "minimum"])
def test_cuda_takes_what_is_asked_for_and_no_workspace_to_try_out(name: str) -> None:
    ((provider, options),) = provider_options(PROFILES[name], device="cuda", limit_bytes=2**26)
    assert provider == "CUDAExecutionProvider"
    assert options == {
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",
        "cudnn_conv_use_max_workspace": "0",
        "gpu_mem_limit": "67108864",
    }


def test_without_a_limit_there_is_none_and_fast_may_search() -> None:
    ((_, options),) = provider_options(PROFILES["fast"], device="cuda", limit_bytes=None)
    assert "gpu_mem_limit" not in options
    assert options["cudnn_conv_algo_search"] == "EXHAUSTIVE"


def test_tensorrt_goes_before_cuda_which_takes_what_it_leaves() -> None:
    (first, trt), (second, _) = provider_options(BALANCED, device="tensorrt", limit_bytes=100)
    assert (first, second) == ("TensorrtExecutionProvider", "CUDAExecutionProvider")
    assert trt["trt_max_workspace_size"] == "100"
    assert trt["trt_context_memory_sharing_enable"] == "1"


def test_the_library_knows_every_option_of_the_tables() -> None:
    """Its CUDA and TensorRT providers name their options in their binaries."""
    from pathlib import Path

    import onnxruntime

    capi = Path(onnxruntime.__file__).parent / "capi"
    for device, library in (("cuda", "cuda"), ("tensorrt", "tensorrt")):
        binary = capi / f"libonnxruntime_providers_{library}.so"
        if not binary.is_file():
            pytest.skip(f"this onnxruntime has no {binary.name}")
        # The compiler cuts long names into immediates, so the beginning stands for the whole.
        words = binary.read_bytes()
        for profile in PROFILES.values():
            _, options = provider_options(profile, device=device, limit_bytes=1)[0]
            assert [name for name in options if name[:16].encode() not in words] == []


@pytest.mark.parametrize(
    ("profile", "optimized", "packed", "precision", "plain"),
    [
        ("balanced", True, False, "fp32", True),
        ("balanced", True, True, "fp32", False),  # the file holds them packed: they are mapped
        ("balanced", True, False, "int8", False),  # int8 kernels are several times slower without
        ("balanced", False, False, "fp32", False),  # the library lays out weights anew anyway
        ("fast", True, False, "fp32", False),
        ("minimum", True, False, "fp16", True),
    ],
)
def test_weights_are_packed_where_that_is_right(
    profile: str, optimized: bool, packed: bool, precision: str, plain: bool
) -> None:
    entries = session_entries(PROFILES[profile], device="cpu", optimized=optimized, packed=packed, precision=precision)
    assert entries == ({"session.disable_prepacking": "1"} if plain else {})


def test_on_a_gpu_weights_lie_beside_the_arena_and_placement_is_recorded() -> None:
    entries = session_entries(BALANCED, device="cuda", optimized=False, packed=False, precision="fp32")
    assert entries == {
        "session.use_device_allocator_for_initializers": "1", "session.record_ep_graph_assignment_info": "1",
    }  # fmt: skip
