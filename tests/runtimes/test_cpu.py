from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from memopt import cpu
from memopt.cpu import CpuTarget, features, this_cpu
from memopt.errors import IntegrityError

SKYLAKE = "flags\t\t: fpu sse2 sse4_1 avx f16c fma avx2 avx512f avx512bw avx512dq avx512vl\n"
HASWELL = "flags\t\t: fpu sse2 sse4_1 avx f16c fma avx2\n"
CORTEX = "Features\t: fp asimd evtstrm asimdhp cpuid asimddp\n"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """A function that makes this another machine: machine(arch, /proc/cpuinfo)."""

    def become(arch: str, cpuinfo: str) -> None:
        (tmp_path / "cpuinfo").write_text(cpuinfo)
        monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "cpuinfo")
        monkeypatch.setattr(platform, "machine", lambda: arch)
        monkeypatch.setattr(platform, "system", lambda: "Linux")
        features.cache_clear()

    yield become
    features.cache_clear()


@pytest.mark.parametrize(
    ("arch", "cpuinfo", "found"),
    [
        ("x86_64", HASWELL, ("sse2", "sse4_1", "avx", "f16c", "fma", "avx2")),
        ("aarch64", CORTEX, ("asimd", "asimdhp", "asimddp")),
        ("x86_64", HASWELL + SKYLAKE, ("sse2", "sse4_1", "avx", "f16c", "fma", "avx2")),  # what every core has
        ("x86_64", "model name : a\n", None),
        ("riscv64", "isa : rv64imafdcv\n", None),
    ],
    ids=["avx2", "arm", "unlike cores", "no flags", "unknown architecture"],
)
def test_the_features_are_those_of_every_core(
    machine: Callable[[str, str], None], arch: str, cpuinfo: str, found: tuple[str, ...] | None
) -> None:
    machine(arch, cpuinfo)
    assert features() == found
    assert (this_cpu("1.31.1") is None) is (found is None)


def test_without_proc_nothing_is_known(machine: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    machine("x86_64", HASWELL)
    monkeypatch.setattr(cpu, "CPUINFO", Path("/nowhere/cpuinfo"))
    assert features() is None
    target = CpuTarget("linux", "x86_64", ("sse2",), "1.31.1")
    assert target.refusal("1.31.1") == "optimized for sse2; what this processor has cannot be read"


def test_a_target_is_refused_for_each_thing_that_is_unlike(machine: Callable[[str, str], None]) -> None:
    machine("x86_64", HASWELL)
    here = this_cpu("1.31.1")
    assert here is not None
    assert here.refusal("1.31.1") is None
    assert here.refusal("1.31.2") == "optimized by onnxruntime 1.31.1, this is 1.31.2"
    assert here.refusal(None) == "optimized by onnxruntime 1.31.1, this is None"
    assert replace(here, os="darwin").refusal("1.31.1") == "optimized for darwin x86_64, this is linux x86_64"
    assert replace(here, arch="aarch64").refusal("1.31.1") == "optimized for linux aarch64, this is linux x86_64"
    machine("x86_64", SKYLAKE)  # larger registers: weights laid out for small ones would be read wrongly
    said = here.refusal("1.31.1")
    assert said == (
        "optimized for another processor: this one has avx512f too, has avx512bw too, has avx512dq too, "
        "has avx512vl too"
    )
    there = this_cpu("1.31.1")
    assert there is not None
    machine("x86_64", HASWELL)
    assert there.refusal("1.31.1") == (
        "optimized for another processor: this one has no avx512f, has no avx512bw, has no avx512dq, has no avx512vl"
    )


def test_the_key_names_the_target_and_only_equal_targets_share_it() -> None:
    target = CpuTarget("linux", "x86_64", ("sse2", "avx2"), "1.31.1")
    unlike = [
        replace(target, os="darwin"),
        replace(target, arch="aarch64"),
        replace(target, isa=("sse2",)),
        replace(target, onnxruntime="1.31.2"),
    ]
    assert target.key.startswith("linux-x86_64-")
    assert replace(target).key == target.key
    assert len({each.key for each in (target, *unlike)}) == 5


def test_a_target_names_its_features() -> None:
    with pytest.raises(IntegrityError, match="for x86_64, but not for which features"):
        CpuTarget("linux", "x86_64", (), "1.31.1")


def test_this_very_machine_is_known() -> None:
    """What CI and developers run on; elsewhere graphs are served portably."""
    if platform.machine() in cpu.FEATURES:
        assert cpu.FEATURES[platform.machine()][0] in (features() or ())
    else:
        assert features() is None
