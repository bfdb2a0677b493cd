"""The built wheel in an environment that holds only numpy and onnxruntime: what an application embeds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from memopt.tensors import Array
from memopt_export.formats import write
from memopt_export.graph import run_graph
from memopt_export.pack import Contents, pack
from memopt_export.specialize import specialize

ROOT = Path(__file__).parent.parent
BIN = "Scripts" if os.name == "nt" else "bin"

# Everything that DESIGN promises an application, in one process of the clean environment.
EMBED = """
import importlib.util, json, sys
import memopt
light = sorted(sys.modules.keys() & {"numpy", "onnxruntime"})
import numpy as np

bundle, picture = sys.argv[1:]
heavy = ("torch", "onnx", "click", "rich", "PIL", "sklearn")
absent = [name for name in heavy if importlib.util.find_spec(name) is None]
x = np.zeros((9, 1, 8, 8), np.float32)
with memopt.load(bundle, memory_limit="64MiB") as model:
    whole = model(x)
    fit = model.fit_batch("8.2MiB") if model.variant == "large" else model.fit_batch("64MiB")
    document = {
        "light": light,
        "absent": absent,
        "variant": model.variant,
        "placement": model.placement,
        "why": model.why,
        "equal": bool(np.array_equal(model.run(None, {"input": x})[0], whole)),
        "label": model.predict([picture], topk=3)[0][0].label,
        "batch": fit.batch,
        "phases": sorted(model.memory().phases),
        "used": sorted(name for name in heavy if name in sys.modules),
    }
print(json.dumps(document))
"""


# ONNX Runtime's own reader of model packages, which the newest version for the CPU has.
OPEN_PACKAGE = """
import json, sys
import numpy as np, onnxruntime as ort

context = ort.ModelPackageContext(sys.argv[1])
chosen = context.select_component("tiny", ort.ModelPackageOptions(ort.SessionOptions()))
session = chosen.create_session()
logits = session.run(["logits"], {"input": np.load(sys.argv[2])})[0]
print(json.dumps({
    "components": context.get_component_names(),
    "variants": context.get_variant_names("tiny"),
    "chosen": chosen.get_selected_variant_name(),
    "logits": logits.tolist(),
}))
"""


def check(*command: object, cwd: Path) -> str:
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    check(sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder, cwd=ROOT)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def clean_python(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    """The interpreter of an environment with the wheel, numpy and onnxruntime."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(folder)
    python = folder / BIN / "python"
    uv = Path(sys.executable).parent / "uv"
    pinned = ("--python", python, "--constraint", ROOT / "constraints.txt")
    check(uv, "pip", "install", "--quiet", *pinned, f"memopt[onnxruntime] @ file://{wheel}", cwd=folder)
    return python


def test_the_wheel_is_small_and_holds_the_three_packages(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.stat().st_size < 750_000  # text alone: no model, no data set, no library
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {
        "memopt", "memopt_models", "memopt_export"
    }  # fmt: skip
    assert "memopt_export/recipes/digits.toml" in names
    assert {"memopt/py.typed", "memopt/page.html"} <= set(names)
    assert not [name for name in names if "test" in name]


def test_an_application_needs_numpy_and_onnxruntime_alone(
    clean_python: Path, tiny_bundle: Path, picture: Path, tmp_path: Path
) -> None:
    found = json.loads(check(clean_python, "-W", "error", "-c", EMBED, tiny_bundle, picture, cwd=tmp_path))
    assert found["light"] == []
    assert found["absent"] == ["torch", "onnx", "click", "rich", "PIL", "sklearn"]
    assert found["used"] == []
    assert found["variant"] == "large"
    assert found["placement"] == "CPUExecutionProvider"
    assert found["equal"]
    assert found["label"] in ("zero", "one", "two")
    assert found["batch"] >= 1
    assert found["phases"] == ["import", "load", "steady"]


COMPARE = """
import sys
from memopt.compare import Given, cells, compare, subjects
from memopt.judgement import Judgement
from memopt.page import render
from pathlib import Path
import numpy as np

if __name__ == "__main__":
    todo = cells(subjects([Path(sys.argv[1])]), batches=(2,), devices=("cpu",))
    report = compare(todo, Given({"input": np.zeros((4, 1, 8, 8), np.float32)}), Judgement())
    print([row.reason for row in report.rows], len(render(report)) > 10_000, report.rows[0].p50_ms > 0)
"""


def test_a_device_without_the_exporter_compares_and_draws(
    clean_python: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    assert check(clean_python, "-W", "error", "-c", COMPARE, tiny_bundle, cwd=tmp_path) == "[None, None] True True\n"


def test_onnxruntime_opens_a_model_package_and_takes_the_reference(
    clean_python: Path, tiny_contents: Contents, tiny_inputs: Array, tmp_path: Path
) -> None:
    write("ort", tiny_contents, tmp_path / "package")
    np.save(tmp_path / "x.npy", tiny_inputs)
    found = json.loads(check(clean_python, "-c", OPEN_PACKAGE, tmp_path / "package", tmp_path / "x.npy", cwd=tmp_path))
    assert found["components"] == ["tiny"]
    assert found["variants"] == ["large", "small", "large-cuda", "small-cuda"]
    assert found["chosen"] == "large"
    expected = run_graph(tiny_contents.graphs[0].graph, {"input": tiny_inputs})[0]
    np.testing.assert_allclose(found["logits"], expected, rtol=1e-5, atol=1e-6)


def test_another_library_is_served_the_portable_graph(
    clean_python: Path, tiny_contents: Contents, picture: Path, tmp_path: Path
) -> None:
    large = tiny_contents.graphs[0]
    part = specialize(large)
    pack(replace(tiny_contents, parts=(large, part)), tmp_path / "x.mopt")
    found = json.loads(check(clean_python, "-W", "error", "-c", EMBED, tmp_path / "x.mopt", picture, cwd=tmp_path))
    assert found["variant"] == "large"
    assert any(line.startswith(f"{part.id}: optimized by onnxruntime ") for line in found["why"])


def test_without_the_exporters_tools_the_command_says_what_to_install(clean_python: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [clean_python.parent / "memopt-export", "doctor"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 5
    assert done.stderr == "memopt-export: error: click is not installed; hint: pip install 'memopt[export]'\n"
