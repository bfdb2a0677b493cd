"""The built wheel in an environment that holds only numpy and onnxruntime: what an application embeds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

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
    assert wheel.stat().st_size < 300_000
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {
        "memopt", "memopt_models", "memopt_export"
    }  # fmt: skip
    assert "memopt_export/recipes/digits.toml" in names
    assert "memopt/py.typed" in names
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


def test_without_the_exporters_tools_the_command_says_what_to_install(clean_python: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [clean_python.parent / "memopt-export", "doctor"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 5
    assert done.stderr == "memopt-export: error: click is not installed; hint: pip install 'memopt[export]'\n"
