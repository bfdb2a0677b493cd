"""What ONNX Runtime is told, as tables: a profile for the session, and the options of each execution provider."""

from __future__ import annotations

from dataclasses import dataclass

from memopt.errors import UsageError

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
# Precisions whose kernels read weights as they lie in the file; the others are several times slower unless packed anew.
READ_IN_PLACE = ("fp32", "fp16", "bf16")
ProviderOptions = dict[str, str]


@dataclass(frozen=True)
class Profile:
    """What a session gives for memory, and what memory it gives for speed.

    Memory that is reused within a run (`enable_mem_reuse`) and laid out ahead (`enable_mem_pattern`) is not among it:
    in one region both cost memory and gain nothing (vit_b_16 at batch 8: 189 MiB and 2.88 s, without 92 and 2.80).
    """

    arena: bool  # keeps the memory of activations from run to run
    packs: bool  # copies weights of products into the kernels' layout, unless the file holds them so
    cuda: ProviderOptions


_FRUGAL_CUDA = {
    "arena_extend_strategy": "kSameAsRequested",
    "cudnn_conv_algo_search": "HEURISTIC",  # EXHAUSTIVE allocates the workspace of every algorithm it tries
    "cudnn_conv_use_max_workspace": "0",
}
# Measured beside plain ONNX Runtime on one core (AVX-512): private MiB once batch 8 has run, time of a run at batch 1.
#
#               resnet50        mobilenet_v2    vit_b_16
#   plain       295    1.00x    111    1.00x    691    1.00x
#   fast        as balanced; where the file does not hold packed weights, vit_b_16 takes 327 MiB more, and 1.02x
#   balanced    55     1.01x    58     1.01x    78     1.00x    1.10x where the file does not hold packed weights
#   minimum     3      1.19x    3      2.80x    5      1.44x    between runs; while batch 8 runs 53, 49 and 65
PROFILES = {
    "fast": Profile(
        arena=True,
        packs=True,
        cuda={
            "arena_extend_strategy": "kNextPowerOfTwo",
            "cudnn_conv_algo_search": "EXHAUSTIVE",
            "cudnn_conv_use_max_workspace": "1",
        },
    ),
    "balanced": Profile(arena=True, packs=False, cuda=_FRUGAL_CUDA),
    "minimum": Profile(arena=False, packs=False, cuda=_FRUGAL_CUDA),
}
_DEVICE_SESSION = {
    "session.use_device_allocator_for_initializers": "1",  # in the arena they would count against its limit
    "session.record_ep_graph_assignment_info": "1",  # which nodes are left to the CPU
}


def profile_named(name: str) -> Profile:
    """The profile; UsageError names those there are."""
    if name not in PROFILES:
        raise UsageError(f"profile {name!r} is not known", hint=", ".join(PROFILES))
    return PROFILES[name]


def session_entries(
    profile: Profile, *, device: str, optimized: bool, packed: bool, precision: str | None
) -> dict[str, str]:
    """The session's config entries.

    Args:
        profile: what it may cost.
        device: one of PROVIDERS.
        optimized: the graph is for this very processor, its weights lie as kernels read them.
        packed: the weights' file holds products' weights packed already.
        precision: of the graph.
    """
    entries = dict(_DEVICE_SESSION) if device != "cpu" else {}
    if optimized and not packed and not profile.packs and precision in READ_IN_PLACE:
        entries["session.disable_prepacking"] = "1"
    return entries


def provider_options(profile: Profile, *, device: str, limit_bytes: int | None) -> list[tuple[str, ProviderOptions]]:
    """The providers to ask for, with their options, the one for `device` first.

    The limit is that of the arena: activations, workspace. TensorRT's provider leaves to CUDA what it cannot run.

    >>> provider_options(PROFILES["balanced"], device="cpu", limit_bytes=None)
    [('CPUExecutionProvider', {})]
    >>> provider_options(PROFILES["minimum"], device="cuda", limit_bytes=2**20)[0][1]["gpu_mem_limit"]
    '1048576'
    """
    if device == "cpu":
        return [(PROVIDERS["cpu"], {})]
    limited = {"gpu_mem_limit": str(limit_bytes)} if limit_bytes is not None else {}
    cuda = (PROVIDERS["cuda"], profile.cuda | limited)
    if device == "cuda":
        return [cuda]
    workspace = {"trt_max_workspace_size": str(limit_bytes)} if limit_bytes is not None else {}
    options = {
        "trt_context_memory_sharing_enable": "1",  # the subgraphs of a model run in turn in one memory
        "trt_auxiliary_streams": "0",  # each would have an activation memory of its own
    }
    return [(PROVIDERS["tensorrt"], options | workspace), cuda]
