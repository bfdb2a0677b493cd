"""Which processor this is, as far as inference kernels care: the key of a graph that was optimized for one.

ONNX Runtime lays out weights for the vector registers of the processor on which it optimizes a graph. On another one
such a graph is slow, refused, or silently wrong, so it is used only where everything in its key is the same.
"""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from memopt.errors import IntegrityError

CPUINFO = Path("/proc/cpuinfo")
# What kernels ask a processor for, as the kernel of the system spells it; the first stands for the architecture itself.
FEATURES = {
    "x86_64": (
        "sse2", "sse4_1", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512dq", "avx512vl",
        "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16",
    ),
    "aarch64": (
        "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "svei8mm", "svebf16", "sme", "sme2",
    ),
}  # fmt: skip
_LINES = {"x86_64": "flags", "aarch64": "Features"}


@dataclass(frozen=True)
class CpuTarget:
    """The processor, system and library that a graph was optimized for: it runs where all of them are the same."""

    os: str  # "linux"
    arch: str  # "x86_64"
    isa: tuple[str, ...]  # those of FEATURES that the processor has, in that order
    onnxruntime: str  # version

    def __post_init__(self) -> None:
        if not self.isa:
            raise IntegrityError(f"a graph is said to be optimized for {self.arch}, but not for which features")

    @property
    def key(self) -> str:
        """A name that only equal targets share, such as "linux-x86_64-0123abcd"."""
        digest = hashlib.sha256("\n".join((self.onnxruntime, *self.isa)).encode()).hexdigest()
        return f"{self.os}-{self.arch}-{digest[:8]}"

    def refusal(self, onnxruntime: str | None) -> str | None:
        """Why a graph made for this target may not run here with this version of the library; None when it may."""
        system = f"{platform.system().lower()} {platform.machine()}"
        if f"{self.os} {self.arch}" != system:
            return f"optimized for {self.os} {self.arch}, this is {system}"
        if self.onnxruntime != onnxruntime:
            return f"optimized by onnxruntime {self.onnxruntime}, this is {onnxruntime}"
        here = features()
        if here is None:
            return f"optimized for {', '.join(self.isa)}; what this processor has cannot be read"
        unlike = [f"has no {name}" for name in self.isa if name not in here]
        unlike += [f"has {name} too" for name in here if name not in self.isa]
        return f"optimized for another processor: this one {', '.join(unlike)}" if unlike else None


def this_cpu(onnxruntime: str) -> CpuTarget | None:
    """The target that graphs optimized here have; None where the processor's features cannot be read."""
    isa = features()
    return CpuTarget(platform.system().lower(), platform.machine(), isa, onnxruntime) if isa is not None else None


@cache
def features() -> tuple[str, ...] | None:
    """Those of FEATURES that every core of this machine has; None where that cannot be read."""
    arch = platform.machine()
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return None
    named = [line.partition(":") for line in lines]
    cores = [set(flags.split()) for name, _, flags in named if name.strip() == _LINES.get(arch)]
    return tuple(name for name in FEATURES[arch] if all(name in core for core in cores)) if cores else None
