"""What a bundle costs: opening, verifying and writing 100 MB, and the private memory of ResNet-50 in three forms.

Times are medians, with the file in the page cache; opening is timed in fresh processes, and what is held against
something else alternates with it. Copying means `cp` followed by `sync FILE`, since a bundle is on the disk when `pack`
returns. Damage is every single bit of a small bundle flipped, every length it can be cut to, and FUZZ_S seconds of the
fuzzer.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from exported import exported
from marks import Mark, report

from memopt.archive import Entry
from memopt.bundle import open_bundle
from memopt.probe import Request, measure
from memopt_export.graph import Graph, load_graph
from memopt_export.pack import FORMS, Contents, OnnxPart, pack
from memopt_export.specialize import specialize

sys.path.append(str(Path(__file__).parent.parent / "fuzz"))
import bundles
from fuzz import fuzz
from tally import CRASH, WRONG, Tally

RUNS = 7
FUZZ_S = 20.0
MIB = 2**20
_OPEN = """
import sys, time
from memopt.bundle import open_bundle
started = time.perf_counter()
open_bundle(sys.argv[1], verify=sys.argv[2])
print(time.perf_counter() - started)
"""


def main() -> int:
    """Measures everything; returns the exit code."""
    with tempfile.TemporaryDirectory(prefix="memopt-bench-") as name:
        folder = Path(name)
        details: dict[str, Any] = {}
        marks = [*_times(folder, details), *_damage(details), *_memory(folder, details)]
    return report("bundle", marks, details)


def _times(folder: Path, details: dict[str, Any]) -> list[Mark]:
    path, contents = folder / "large.mopt", Contents("large", (OnnxPart("large", "large", _large_graph()),))
    pack(contents, path)
    items = [Entry(entry, bytes(view), 4096) for entry, view in open_bundle(path).entries.items()]

    def write() -> None:
        FORMS["mopt"](items, folder / "written.mopt", True)

    def copy() -> None:
        subprocess.run(["cp", path, folder / "copied.mopt"], check=True)
        subprocess.run(["sync", folder / "copied.mopt"], check=True)

    times = _alternately({
        "open, verify off": lambda: _opened(path, "off"),
        "open, verify lazy": lambda: _opened(path, "lazy"),
        "open, verify full": lambda: _opened(path, "full"),
        "sha256sum": lambda: _timed(lambda: subprocess.run(["sha256sum", path], capture_output=True, check=True)),
        "write": lambda: _timed(write),
        "pack, from the graph": lambda: _timed(lambda: pack(contents, folder / "packed.mopt", force=True)),
        "copy": lambda: _timed(copy),
    })  # fmt: skip
    medians = {what: statistics.median(each) for what, each in times.items()}

    def ratio(what: str, other: str) -> float:
        return medians[what] / medians[other]

    details["size_bytes"], details["seconds"] = path.stat().st_size, times
    details["median_ms"] = {what: 1e3 * each for what, each in medians.items()}
    return [
        Mark("bundle of 100 MB", details["size_bytes"] / 1e6, "MB", floor=100),
        Mark("opening it with verify=off", 1e3 * medians["open, verify off"], "ms", limit=20),
        Mark("verifying it in full against sha256sum", ratio("open, verify full", "sha256sum"), "x", limit=1.3),
        Mark("writing it against cp and sync", ratio("write", "copy"), "x", limit=2),
    ]


def _damage(details: dict[str, Any]) -> list[Mark]:
    data = sorted(bundles.GOLDEN.glob("schema-*.mopt"))[-1].read_bytes()
    seeds = bundles.Seeds.make()
    flips, cuts = Tally("flips"), Tally("truncations")
    mapper = bundles.bundle.map_file
    for position in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        flips.count(bytes(flipped), lambda damaged: bundles._open(damaged, [], seeds))
    for length in range(len(data)):
        cuts.count(data[:length], lambda damaged: bundles._open(damaged, [], seeds))
    bundles.bundle.map_file = mapper
    tallies = [flips, cuts, *(fuzz(target, seed=0, seconds=FUZZ_S) for target in ("bundle", "graph"))]
    details["damage"] = {tally.name: {"cases": tally.cases, "outcomes": dict(tally.outcomes)} for tally in tallies}
    accepted = sum(tally.outcomes["accepted"] for tally in (flips, cuts))
    return [
        Mark("flips and truncations that open", accepted, "", limit=0),
        Mark("cases of damage", sum(tally.cases for tally in tallies), "", floor=100_000),
        Mark("crashes among them", sum(tally.failures[CRASH] for tally in tallies), "", limit=0),
        Mark("wrong acceptances among them", sum(tally.failures[WRONG] for tally in tallies), "", limit=0),
    ]


def _memory(folder: Path, details: dict[str, Any]) -> list[Mark]:
    """Private memory after load: the plain .onnx, the portable variant, and the one optimized for this processor."""
    plain = exported("resnet50")
    part = OnnxPart("portable", "resnet50", load_graph(plain, checked=True))
    optimized, path = specialize(part), folder / "resnet50.mopt"
    pack(Contents("resnet50", (part, optimized)), path)
    np.save(folder / "x.npy", np.random.default_rng(0).normal(size=(8, 3, 224, 224)).astype(np.float32))
    found: dict[str, dict[str, Any]] = {}
    outputs = {}
    for name, file, variant in (
        ("plain", plain, None), ("portable", path, part.id), ("optimized", path, optimized.id)
    ):  # fmt: skip
        saved = str(folder / f"{name}.npy")
        request = Request(
            str(file), "onnxruntime", "cpu", 1, {"input": str(folder / "x.npy")}, variant=variant, runs=20, seconds=10,
            outputs=saved,
        )  # fmt: skip
        got = measure(request)
        load, steady = got.bill.phases["load"], got.bill.phases["steady"]
        outputs[name] = np.load(saved)
        found[name] = {
            "load_private_mib": _mib(load.private_bytes), "steady_private_mib": _mib(steady.private_bytes),
            "steady_file_backed_mib": _mib(steady.file_backed_bytes), "load_ms": got.load_ms, "p50_ms": got.p50_ms,
        }  # fmt: skip
    largest = float(np.abs(outputs["plain"]).max())
    difference = float(np.abs(outputs["optimized"] - outputs["plain"]).max()) / largest
    details["resnet50"] = found
    details["resnet50_method"] = "Anonymous of smaps_rollup above the import, batch 1, one fresh process each"
    load = {name: each["load_private_mib"] for name, each in found.items()}
    return [
        Mark("ResNet-50, private after load, optimized", load["optimized"], "MiB", limit=4),
        Mark("  of what the portable variant holds", load["optimized"] / load["portable"], "x", limit=0.1),
        Mark("  of what the plain .onnx holds", load["optimized"] / load["plain"], "x", limit=0.05),
        Mark("  largest difference of outputs, of the largest output", difference, "", limit=1e-4),
    ]


def _opened(path: Path, verify: str) -> float:
    done = subprocess.run([sys.executable, "-c", _OPEN, path, verify], capture_output=True, check=True)
    return float(done.stdout)


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _alternately(works: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Seconds of each, RUNS times in turn after one run that does not count."""
    rounds = [{what: work() for what, work in works.items()} for _ in range(RUNS + 1)]
    return {what: [each[what] for each in rounds[1:]] for what in works}


def _large_graph() -> Graph:
    """25 products with 1024 x 1024 weights: 100 MiB."""
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    names = ["input", *(f"t{i}" for i in range(24)), "output"]
    nodes = [helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]], name=f"m{i}") for i in range(25)]
    weights = [numpy_helper.from_array(rng.random((1024, 1024), np.float32), f"w{i}") for i in range(25)]
    ends = ([helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 1024])] for name in ("input", "output"))
    graph = helper.make_graph(nodes, "large", *ends, weights)
    return Graph(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), "0" * 64)


def _mib(size: int | None) -> float | None:
    return None if size is None else size / MIB


if __name__ == "__main__":
    sys.exit(main())
