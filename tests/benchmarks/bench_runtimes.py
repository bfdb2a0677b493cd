"""What an application holds that loads a bundle, beside plain `onnxruntime.InferenceSession(path)` on the same model.

ResNet-50, MobileNetV2, ViT-B/16 and SimpleCNN with random weights. Each way is a process of its own that does what it
is told, so the two take turns and what else the machine does falls on both. Bundles come from `pack` alone; the graph
optimized for this processor lies in a cache that a first load has filled. Memory is private memory (Anonymous of
smaps_rollup) above the process with its library, PSS is absolute.

The ideal of activations is the most that is alive at once: what a process without an arena holds at its peak, every
tensor being allocated and freed on its own. It is sampled while the batch runs; `alive` counts the same way for all.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from exported import SHAPES, exported
from marks import Mark, report

from memopt.memory import STATUS, give_back, kib_fields, read_host_memory

MIB = 2**20
LARGE = ("mobilenet_v2", "resnet50", "vit_b_16")
SHARED = ("resnet50", "vit_b_16")
PROCESSES = 4
TURNS, RUNS = 5, {1: 8, 8: 2}  # turns of each way, and runs in a turn, by batch
IMPORTS = 9
CYCLES, CYCLE_RUNS = 100, 100  # of SimpleCNN: 10,000 runs


def main() -> int:
    """Measures everything; returns the exit code."""
    if len(sys.argv) > 1:
        return Served(**json.loads(sys.argv[1])).serve()
    with tempfile.TemporaryDirectory(prefix="memopt-bench-") as name:
        folder = Path(name)
        os.environ["MEMOPT_CACHE"] = str(folder / "cache")
        bundles = {network: packed(network, folder) for network in SHAPES}
        details: dict[str, Any] = {"load_average": os.getloadavg()}
        marks = [
            *(mark for network in LARGE for mark in _alone(network, bundles[network], details)),
            *(mark for network in SHARED for mark in _together(network, bundles[network], details)),
            *_overhead(bundles["simple_cnn"], details),
            *_import(details),
            *_lasting(bundles["simple_cnn"], details),
            *_prediction(folder, details),
        ]
    return report("runtimes", marks, details)


def packed(network: str, folder: Path) -> Path:
    """The bundle of the network, whose graph optimized for this processor is in the cache already."""
    import memopt
    from memopt_export.graph import load_graph
    from memopt_export.pack import Contents, OnnxPart, pack

    path = folder / f"{network}.mopt"
    pack(Contents(network, (OnnxPart(network, network, load_graph(exported(network), checked=True)),)), path)
    memopt.load(path, device="cpu", specialize="wait").close()
    return path


class Way:
    """A process that holds one model in one way, and answers questions."""

    def __init__(self, path: Path, **options: Any) -> None:
        script, told = str(Path(__file__).absolute()), json.dumps({"path": str(path), **options})
        self._process = subprocess.Popen(
            [sys.executable, script, told], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, what: str, **arguments: Any) -> Any:
        """The answer of the method of Served with this name."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([what, arguments]) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def __enter__(self) -> Way:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()


class Served:
    """The other end: `profile` None stands for plain ONNX Runtime."""

    def __init__(self, path: str, network: str, *, profile: str | None = None, **options: Any) -> None:
        self._path, self._network, self._profile, self._options = path, network, profile, options
        self._model: Any = None

    def serve(self) -> int:
        """Answers lines of questions until there are no more."""
        for line in sys.stdin:
            what, arguments = json.loads(line)
            sys.stdout.write(json.dumps(getattr(self, what)(**arguments)) + "\n")
            sys.stdout.flush()
        return 0

    def load(self) -> dict[str, float]:
        """Opens the model: private MiB it has taken, and milliseconds."""
        import onnxruntime

        onnxruntime.set_default_logger_severity(4)
        self._feeds = {batch: self._inputs(batch) for batch in (1, 8)}
        if self._profile is not None:
            import memopt.model  # the library in question, like onnxruntime
        give_back()
        self._base = read_host_memory()
        started = time.perf_counter()
        if self._profile is None:
            self._model = onnxruntime.InferenceSession(self._path)
        else:
            self._model = memopt.load(self._path, device="cpu", profile=self._profile, **self._options)
        return {"load_ms": (time.perf_counter() - started) * 1e3, "private_mib": self.private()}

    def run(self, batch: int, times: int) -> list[float]:
        """Milliseconds of each run."""
        found = []
        for _ in range(times):
            started = time.perf_counter()
            self._model.run(None, self._feeds[batch])
            found.append((time.perf_counter() - started) * 1e3)
        return found

    def private(self) -> float:
        """Private MiB above the process before it opened the model."""
        private = read_host_memory().above(self._base).private_bytes
        assert private is not None
        return private / MIB

    def pss(self) -> float:
        """MiB of the process, what it shares divided by those that share it."""
        proportional = read_host_memory().proportional_bytes
        assert proportional is not None
        return proportional / MIB

    def alive(self, batch: int) -> float:
        """Most private MiB above the load at any moment of a run, sampled."""
        self.run(batch, 1)
        ended, most = threading.Event(), 0

        def sample() -> None:
            nonlocal most
            while not ended.is_set():
                most = max(most, kib_fields(STATUS)["RssAnon"])
                time.sleep(2e-4)

        thread = threading.Thread(target=sample)
        thread.start()
        self.run(batch, 3)
        ended.set()
        thread.join()
        return (most - (self._base.private_bytes or 0)) / MIB

    def trim(self) -> float:
        """Private MiB above the library's own once the model sleeps."""
        self._model.trim()
        return self.private()

    def lasting(self, cycles: int, runs: int) -> dict[str, float]:
        """Loads, runs and closes again and again: MiB for a thousand runs, files left."""
        import memopt

        feeds = self._inputs(1)
        held = []
        for _ in range(cycles + 5):  # the first ones are not counted
            with memopt.load(self._path, device="cpu", threads=1) as model:
                for _ in range(runs):
                    model.run(None, feeds)
            give_back()
            held.append((read_host_memory().private_bytes, len(os.listdir("/proc/self/fd"))))  # noqa: PTH208
        sizes = [size for size, _ in held[5:]]
        slope = np.polyfit(np.arange(cycles) * runs / 1000, sizes, 1)[0] / MIB
        return {"slope_mib": float(slope), "files": held[-1][1] - held[5][1]}

    def overhead(self) -> dict[str, float]:
        """Microseconds of a run of one thread at batch 1, bare and through the model, in turn."""
        import onnxruntime

        import memopt

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        bare = onnxruntime.InferenceSession(str(exported(self._network)), options)
        model = memopt.load(self._path, device="cpu", threads=1)
        feeds = self._inputs(1)
        (array,) = feeds.values()
        ways: dict[str, Callable[[], object]] = {
            "bare": lambda: bare.run(None, feeds), "run": lambda: model.run(None, feeds), "call": lambda: model(array),
        }  # fmt: skip
        found: dict[str, list[float]] = {name: [] for name in ways}
        gc.disable()
        for _ in range(60):
            for name, way in ways.items():
                started = time.perf_counter()
                for _ in range(200):
                    way()
                found[name].append((time.perf_counter() - started) / 200 * 1e6)
        return {name: statistics.median(times) for name, times in found.items()}

    def batch_within(self, limit: str) -> dict[str, float]:
        """The batch that `load` has settled on and what it holds; the one that `fit_batch` reads off the curve, too."""
        settled = self._model._batch
        found = {"settled": settled, "settled_mib": self._held(settled)}
        fit = self._model.fit_batch(limit)
        return {**found, "batch": fit.batch, "need_mib": fit.need_bytes / MIB, "held_mib": self._held(fit.batch)}

    def _held(self, batch: int) -> float:
        feeds = self._inputs(batch)
        for _ in range(3):
            self._model.run(None, feeds)
        return self.private() - sum(array.nbytes for array in feeds.values()) / MIB

    def _inputs(self, batch: int) -> dict[str, Any]:
        shape = (batch, *SHAPES[self._network])
        return {"input": np.random.default_rng(0).normal(size=shape).astype(np.float32)}


def _alone(network: str, bundle: Path, details: dict[str, Any]) -> list[Mark]:
    """Memory and latency of each way."""
    ways = {
        "plain": Way(exported(network), network=network),
        "fast": Way(bundle, network=network, profile="fast"),
        "balanced": Way(bundle, network=network, profile="balanced"),
        "minimum": Way(bundle, network=network, profile="minimum"),
    }
    found: dict[str, dict[str, Any]] = {name: way.ask("load") for name, way in ways.items()}
    for batch, runs in RUNS.items():
        times: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(TURNS + 1):
            for name, way in ways.items():
                took = way.ask("run", batch=batch, times=runs)
                times[name] += took if turn else []
        for name, way in ways.items():
            found[name][f"p50_ms_{batch}"] = statistics.median(times[name])
            found[name][f"steady_mib_{batch}"] = way.ask("private")
            found[name][f"alive_mib_{batch}"] = way.ask("alive", batch=batch)
    for name in ("balanced", "minimum"):
        found[name]["trimmed_mib"] = ways[name].ask("trim")
        found[name]["wake_ms"] = ways[name].ask("run", batch=1, times=1)[0]
    for way in ways.values():
        way.__exit__()
    details[network] = found
    plain, ours, least = found["plain"], found["balanced"], found["minimum"]
    activations, ideal = (each["alive_mib_8"] - each["private_mib"] for each in (ours, least))
    return [
        Mark(f"{network}: private after load (plain {plain['private_mib']:.0f})", ours["private_mib"], "MiB", limit=6),
        Mark(f"{network}: p50 at batch 1 against plain", ours["p50_ms_1"] / plain["p50_ms_1"], "x", limit=1.05),
        Mark(f"{network}: p50 at batch 8 against plain", ours["p50_ms_8"] / plain["p50_ms_8"], "x", limit=1.03),
        Mark(f"{network}: activations at batch 8 against ideal {ideal:.1f}", activations / ideal, "x", limit=1.25),
        Mark(f"{network}: private after trim", ours["trimmed_mib"], "MiB", limit=12),
    ]


def _together(network: str, bundle: Path, details: dict[str, Any]) -> list[Mark]:
    """Four processes at once, each having run once."""
    sums = {}
    for name, path, options in (("plain", exported(network), {}), ("balanced", bundle, {"profile": "balanced"})):
        ways = [Way(path, network=network, **options) for _ in range(PROCESSES)]
        for way in ways:
            way.ask("load")
            way.ask("run", batch=1, times=1)
        sums[name] = sum(way.ask("pss") for way in ways)
        for way in ways:
            way.__exit__()
    details[f"{network}_pss_of_{PROCESSES}_mib"] = sums
    name = f"{network}: PSS of {PROCESSES} processes, {sums['balanced']:.0f} of {sums['plain']:.0f} MiB"
    return [Mark(name, sums["balanced"] / sums["plain"], "x", limit=1 / 3)]


def _overhead(bundle: Path, details: dict[str, Any]) -> list[Mark]:
    with Way(bundle, network="simple_cnn", profile="balanced") as way:
        details["overhead_us"] = found = way.ask("overhead")
    return [Mark("simple_cnn: a call above a bare session.run", found["call"] - found["bare"], "us", limit=6)]


_IMPORT = """
import sys, time, numpy
from pathlib import Path
def private():
    return int(Path("/proc/self/smaps_rollup").read_text().split("Anonymous:")[1].split()[0])
before, started = private(), time.perf_counter()
import memopt
if sys.argv[1] == "load":
    memopt.load
print((time.perf_counter() - started) * 1e3, (private() - before) / 1024)
"""


def _import(details: dict[str, Any]) -> list[Mark]:
    """`import memopt`, and as well with `memopt.load`, which imports all that is behind it."""
    marks = []
    for what in ("import", "load"):
        done = [
            subprocess.run([sys.executable, "-c", _IMPORT, what], capture_output=True, check=True).stdout.split()
            for _ in range(IMPORTS)
        ]
        ms, mib = (statistics.median(float(each[i]) for each in done) for i in (0, 1))
        details[f"import_{what}"] = {"ms": ms, "private_mib": mib}
        if what == "import":
            marks += [Mark("import memopt, over numpy", ms, "ms", limit=25), Mark("  its memory", mib, "MiB", limit=3)]
    return marks


def _lasting(bundle: Path, details: dict[str, Any]) -> list[Mark]:
    with Way(bundle, network="simple_cnn") as way:
        details["lasting"] = found = way.ask("lasting", cycles=CYCLES, runs=CYCLE_RUNS)
    return [
        Mark(f"{CYCLES} loads, {CYCLES * CYCLE_RUNS} runs: growth", found["slope_mib"], "MiB/k", limit=1),
        Mark("  file descriptors left", found["files"], "", limit=0),
    ]


def _prediction(folder: Path, details: dict[str, Any]) -> list[Mark]:
    """`fit_batch` on points measured as the pipeline does, against what that batch really holds."""
    from memopt.manifest import MemoryPoint
    from memopt.probe import Request, measure
    from memopt_export.graph import load_graph
    from memopt_export.pack import Contents, OnnxPart, pack

    network, plain = "mobilenet_v2", exported("mobilenet_v2")
    np.save(folder / "x.npy", np.random.default_rng(0).normal(size=(16, *SHAPES[network])).astype(np.float32))
    points = []
    for batch in (1, 8, 16):
        got = measure(Request(str(plain), "onnxruntime", "cpu", batch, {"input": str(folder / "x.npy")}, runs=5))
        held = got.bill.phases["steady"].private_bytes
        points.append(MemoryPoint(batch, held, None, None, "probe", "onnxruntime"))
    path = folder / "measured.mopt"
    part = OnnxPart(network, network, load_graph(plain, checked=True), {}, tuple(points))
    pack(Contents(network, (part,)), path)
    rows = []
    for limit in ("40MiB", "64MiB", "80MiB", "112MiB"):
        with Way(path, network=network, profile="balanced", specialize="off", memory_limit=limit) as way:
            way.ask("load")
            row = way.ask("batch_within", limit=limit)
        rows.append({"limit": limit, **row})
    details["fit_batch"] = rows
    worst = max(abs(row["held_mib"] / row["need_mib"] - 1) for row in rows)
    most = max(row["settled_mib"] / float(row["limit"].removesuffix("MiB")) for row in rows)
    return [
        Mark("mobilenet_v2: fit_batch against what that batch holds", 100 * worst, "%", limit=5),
        Mark("mobilenet_v2: what the batch tried at load holds, of the limit", most, "x", limit=1),
    ]


if __name__ == "__main__":
    sys.exit(main())
