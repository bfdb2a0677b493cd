"""INT8 beside ONNX Runtime's own quantizer: noise, KL divergence, fused layers, speed, memory and time.

mobilenet_v2 and resnet18, trained briefly on Fashion-MNIST at 3x64x64; three draws of 256 calibration samples; judged
on 2000 test pictures. Every quantization is a process of its own. Trained networks stay in build/bench.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from fashion64 import fashion64
from marks import OUTPUT, Mark, report

from memopt.accuracy import agreement, kl_divergence, sqnr_db
from memopt.memory import read_host_memory
from memopt.preprocess import prepare
from memopt.probe import Request, measure
from memopt.tensors import Array

# Network -> epochs and learning rate: brief, and the same for both up to what each needs to learn anything.
NETWORKS = {"mobilenet_v2": ("3", "3e-3"), "resnet18": ("1", "2e-3")}
SEEDS = (0, 1, 2)
SAMPLES = 256
JUDGED = 2000
LARGE = 224  # px, for which both networks were made
PEERS = ("minmax", "entropy", "percentile", "minmax-symmetric")
OURS = {
    "bias": {"correction": "bias"},
    "gptq": {"correction": "gptq"},
    "gptq-tensorrt": {"correction": "gptq", "target": "tensorrt"},
}


def main() -> int:
    """All marks."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    data = fashion64()
    steps = data.preprocess
    judged = prepare(data.test.images[:JUDGED], steps)
    marks: list[Mark] = []
    details: dict[str, Any] = {}
    for network in NETWORKS:
        model = trained(network)
        rows = []
        for seed in SEEDS:
            drawn = np.sort(np.random.default_rng(seed).choice(len(data.train), SAMPLES, replace=False))
            rows.append(compare(model, prepare(data.train.images[drawn], steps), judged))
            sys.stderr.write(
                f"{network} {seed}: " + "; ".join(f"{k} {v['sqnr_db']:.2f} dB" for k, v in rows[-1].items()) + "\n"
            )
        details[network] = rows
        marks += accuracy_marks(network, rows) + speed_marks(network, model, data.test.images, steps)
    marks += memory_marks(data.train.images, steps)
    return report("quantize", marks, details)


def trained(network: str) -> Path:
    """The network as ONNX, trained where it is not there yet."""
    path = OUTPUT / f"{network}.onnx"
    if not path.exists():
        epochs, rate = NETWORKS[network]
        checkpoint = path.with_suffix(".safetensors")
        how = ["--epochs", epochs, "--learning-rate", rate, "--schedule", "onecycle", "--threads", "2"]
        data = ["--data", "fashion64:fashion64"]
        command(["train", "--network", network, *data, *how, "-o", str(checkpoint), "--force"])
        command(["export", str(checkpoint), *data, "-o", str(path), "--force"])
    return path


def command(words: list[str]) -> None:
    """Runs memopt-export with this folder's modules at hand."""
    program = Path(sys.executable).with_name("memopt-export")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run([str(program), *words], check=True, env=environment, stdout=subprocess.DEVNULL)


def compare(model: Path, calibration: Array, judged: Array) -> dict[str, dict[str, float]]:
    """What every method makes of the model."""
    expected = outputs(model, judged)
    found = {}
    with tempfile.TemporaryDirectory(prefix="memopt-bench-") as name:
        folder = Path(name)
        np.save(folder / "samples.npy", calibration)
        for method in (*PEERS, *OURS):
            small = folder / f"{method}.onnx"
            told = job(
                {"model": str(model), "samples": str(folder / "samples.npy"), "method": method, "output": str(small)}
            )
            got = outputs(small, judged)
            told |= {"sqnr_db": sqnr_db(got, expected), "kl": kl_divergence(got, expected)}
            found[method] = told | {"agreement": agreement(got, expected), "bytes": small.stat().st_size}
    return found


def accuracy_marks(network: str, rows: list[dict[str, dict[str, float]]]) -> list[Mark]:
    """Medians over the seeds."""

    def median(read: Any) -> float:
        return statistics.median(read(row) for row in rows)

    unsigned = PEERS[:3]
    return [
        Mark(f"{network} cpu, SQNR above the best peer", median(
            lambda row: row["gptq"]["sqnr_db"] - max(row[peer]["sqnr_db"] for peer in unsigned)), "dB", floor=4),
        Mark(f"{network} cpu, KL of the best peer's", median(
            lambda row: row["gptq"]["kl"] / min(row[peer]["kl"] for peer in unsigned)), "x", limit=0.5),
        Mark(f"{network} cpu, file of the peers'", median(
            lambda row: row["gptq"]["bytes"] / row["minmax"]["bytes"]), "x", limit=1.02),
        Mark(f"{network} cpu, layers fused", median(lambda row: row["gptq"]["fused"]), "share", floor=0.95),
        Mark(f"{network} tensorrt, SQNR above the symmetric peer", median(
            lambda row: row["gptq-tensorrt"]["sqnr_db"] - row["minmax-symmetric"]["sqnr_db"]), "dB", floor=3.5),
        Mark(f"{network} bias, time of the peer's minmax", median(
            lambda row: row["bias"]["seconds"] / row["minmax"]["seconds"]), "x", limit=4),
        Mark(f"{network} gptq, time of the peer's minmax", median(
            lambda row: row["gptq"]["seconds"] / row["minmax"]["seconds"]), "x", limit=8),
    ]  # fmt: skip


def speed_marks(network: str, model: Path, images: Array, steps: Any) -> list[Mark]:
    """Latency of INT8 against fp32, each run in a fresh process, for pictures of the trained size and of LARGE px."""
    with tempfile.TemporaryDirectory(prefix="memopt-bench-") as name:
        folder = Path(name)
        shown, shown_large = folder / "shown.npy", folder / "large.npy"
        np.save(shown, prepare(images[:SAMPLES], steps))
        np.save(shown_large, prepare(images[:8], at_side(LARGE, steps)))
        small = folder / "small.onnx"
        job({"model": str(model), "samples": str(shown), "method": "bias", "output": str(small)})

        def ratio(batch: int, models: tuple[Path, Path], inputs: Path) -> float:
            pairs = []
            for _ in range(5):
                int8, fp32 = (
                    measure(Request(str(p), "onnxruntime", "cpu", batch, {"input": str(inputs)})) for p in models
                )
                pairs.append(int8.p50_ms / fp32.p50_ms)
            return statistics.median(pairs)

        sizes = {
            "": ((small, model), shown),
            f" at {LARGE} px": ((at_large(small, folder), at_large(model, folder)), shown_large),
        }
        return [
            Mark(f"{network} int8{size}, time of fp32 at batch {b}", ratio(b, *given), "x", limit=0.5)
            for size, given in sizes.items()
            for b in (1, 8)
        ]


def memory_marks(images: Array, steps: Any) -> list[Mark]:
    """Peak memory of calibration as samples grow, and of the whole job on large pictures."""
    model = trained("mobilenet_v2")
    with tempfile.TemporaryDirectory(prefix="memopt-bench-") as name:
        folder = Path(name)
        small = {"model": str(model), "output": str(folder / "out.onnx")}
        peaks = {}
        for count in (50, 800):
            np.save(folder / f"{count}.npy", prepare(images[:count], steps))
            peaks[count] = (
                job(small | {"samples": str(folder / f"{count}.npy"), "method": "ranges"})["peak_bytes"] / 2**20
            )
        np.save(folder / "large.npy", prepare(images[:64], at_side(LARGE, steps)))
        large = small | {"samples": str(folder / "large.npy"), "method": "gptq"}
        whole = {
            network: job(large | {"model": str(at_large(trained(network), folder))})["peak_bytes"] / 2**20
            for network in NETWORKS
        }
    return [
        Mark("calibration, peak RSS from 50 to 800 samples", peaks[800] - peaks[50], "MiB", limit=100),
        Mark("calibration on 800 samples, peak RSS", peaks[800], "MiB", limit=1024),
        *(Mark(f"{network} gptq at {LARGE} px, peak RSS", peak, "MiB", limit=2048) for network, peak in whole.items()),
    ]


def at_side(side: int, steps: Any) -> list[dict[str, Any]]:
    """The steps with pictures of another size."""
    return [step | {"size": [side, side]} if step["op"] == "resize" else step for step in steps]


def at_large(model: Path, folder: Path) -> Path:
    """The model for pictures of LARGE px, which its convolutions take as they take small ones."""
    import onnx

    large = onnx.load(model)
    for dim in large.graph.input[0].type.tensor_type.shape.dim[2:]:
        dim.dim_value = LARGE
    del large.graph.value_info[:]
    path = folder / f"{model.stem}-{LARGE}.onnx"
    onnx.save(large, path)
    return path


def outputs(model: Path, inputs: Array) -> Array:
    """The model's outputs for all inputs, in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"input": inputs[i : i + 50]})[0] for i in range(0, len(inputs), 50)])


# --- one quantization, in a process of its own


def job(request: dict[str, str]) -> dict[str, float]:
    """Seconds, peak RSS and the fused share of one quantization."""
    child = subprocess.run([sys.executable, __file__, json.dumps(request)], capture_output=True, text=True, check=False)
    if child.returncode:
        sys.exit(child.stderr)
    answer: dict[str, float] = json.loads(child.stdout.splitlines()[-1])
    return answer


def work(request: dict[str, str]) -> dict[str, float]:
    """Does the job and measures it."""
    samples = np.load(request["samples"])
    method = request["method"]
    fused = float("nan")
    if method in PEERS:
        seconds = quantize_by_peer(request, samples, method)
    else:
        seconds, fused = quantize_by_memopt(request, samples, method)
    peak = read_host_memory().peak_bytes or float("nan")  # ru_maxrss would begin with the parent's
    return {"seconds": seconds, "peak_bytes": peak, "fused": fused}


def quantize_by_peer(request: dict[str, str], samples: Array, method: str) -> float:
    """ONNX Runtime's quantize_static, with its defaults for a graph in Q/DQ form, weights by channel."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rows = iter(range(len(samples)))

        def get_next(self) -> Any:
            row = next(self.rows, None)
            return None if row is None else {"input": samples[row : row + 1]}

    symmetric = method.endswith("-symmetric")
    ways = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}
    prepared = request["output"] + ".prepared"
    quant_pre_process(request["model"], prepared)
    started = time.perf_counter()
    quantize_static(
        prepared, request["output"], Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QInt8 if symmetric else QuantType.QUInt8, weight_type=QuantType.QInt8,
        calibrate_method=getattr(CalibrationMethod, ways[method.removesuffix("-symmetric")]),
        extra_options={"ActivationSymmetric": symmetric},
    )  # fmt: skip
    return time.perf_counter() - started


def quantize_by_memopt(request: dict[str, str], samples: Array, method: str) -> tuple[float, float]:
    """Seconds and the share of fused layers; "ranges" only calibrates."""
    from memopt_export.graph import load_graph, save_graph
    from memopt_export.quantize import quantize
    from memopt_export.recipe import Recipe
    from memopt_models.data import Samples

    graph = load_graph(Path(request["model"]), checked=True)
    given = Samples({"input": samples}, None, "fashion64/train")
    options: dict[str, Any] = {"correction": "none", "equalize": False} if method == "ranges" else dict(OURS[method])
    started = time.perf_counter()
    done = quantize(graph, Recipe("int8", **options), given)
    save_graph(done.graph, Path(request["output"]), force=True)
    seconds = time.perf_counter() - started
    return seconds, done.fused[0] / done.fused[1] if done.fused else float("nan")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(work(json.loads(sys.argv[1]))))
        sys.exit(0)
    sys.exit(main())
