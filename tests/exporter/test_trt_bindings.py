"""Every call that memopt makes of TensorRT, held against the real Python classes of the releases it serves.

Their wheels come without the library, which the module only needs to be imported: stubs of its few C functions do. What
is called is read from memopt's own sources.
"""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

import memopt.trt_engine
import memopt_export.tensorrt_engine

BINDINGS = Path(sys.prefix) / "trt-bindings"
# What an expression is, by the last name of it, in each source.
SOURCES = {
    memopt.trt_engine: {"_engine": "ICudaEngine", "_context": "IExecutionContext", "_runtime": "Runtime"},
    memopt_export.tensorrt_engine: {
        "builder": "Builder", "config": "IBuilderConfig", "parser": "OnnxParser", "shapes": "IOptimizationProfile",
        "error": "ParserError",
    },
}  # fmt: skip
# What TensorRT-RTX alone has, and what old releases lack: asked for by `hasattr` or by the flavor.
RTX_ONLY = {
    "ComputeCapability", "IBuilderConfig.num_compute_capabilities", "IBuilderConfig.set_compute_capability",
    "BuilderFlag.REQUIRE_USER_ALLOCATION", "CudaGraphStrategy", "CudaGraphStrategy.WHOLE_GRAPH_CAPTURE",
    "DynamicShapesKernelSpecializationStrategy", "DynamicShapesKernelSpecializationStrategy.NONE",
}  # fmt: skip
NEW = {
    "ICudaEngine.get_engine_stat", "ICudaEngine.create_runtime_config", "EngineStat", "EngineStat.TOTAL_WEIGHTS_SIZE",
}  # fmt: skip
LACKS = {"10.3.0": RTX_ONLY | NEW, "10.16.1.11": RTX_ONLY, "11.4.0.106": RTX_ONLY, "rtx": set[str]()}
FUNCTIONS = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "createNvOnnxParser_INTERNAL", "createNvOnnxParserRefitter_INTERNAL", "getNvOnnxParserVersion", "getPluginRegistry",
    "initLibNvInferPlugins", "getBuilderPluginRegistry",
)  # fmt: skip
CHILD = """
import importlib, json, sys
trt = importlib.import_module(sys.argv[1])
found = {}
for name in json.load(sys.stdin):
    value = trt
    for part in name.split("."):
        value = getattr(value, part, None)
    found[name] = None if value is None else (value.__doc__ or "")
json.dump({"version": trt.__version__, "found": found}, sys.stdout)
"""


@dataclass(frozen=True)
class Use:
    """One name that is used, and how many arguments it is called with; None: not called."""

    name: str  # as the module has it: "ICudaEngine.get_tensor_name"
    arguments: int | None


@cache
def uses() -> frozenset[Use]:
    """All that the two sources use of the library, in calls or as constants."""
    return frozenset(
        use for module, classes in SOURCES.items()
        for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text()))
        for use in _uses_in(node, classes)
    )  # fmt: skip


def _uses_in(node: ast.AST, classes: Mapping[str, str]) -> list[Use]:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        name = _name(node.func, classes)
        return [Use(name, len(node.args) + len(node.keywords))] if name else []
    if isinstance(node, ast.Attribute):
        name = _name(node, classes)
        return [Use(name, None)] if name else []
    return []


def _name(node: ast.Attribute, classes: Mapping[str, str]) -> str | None:
    """What the module calls `trt.Builder`, `trt.BuilderFlag.TF32`, `self._engine.num_io_tensors`."""
    owner = node.value
    if isinstance(owner, ast.Name) and owner.id == "trt":
        return None if node.attr.startswith("__") else node.attr
    if isinstance(owner, ast.Attribute) and isinstance(owner.value, ast.Name) and owner.value.id == "trt":
        return f"{owner.attr}.{node.attr}"
    last = owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else ""
    return f"{classes[last]}.{node.attr}" if last in classes else None


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared libraries that the modules link to, of either major release, all of whose functions return 0."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed, so the stub libraries cannot be compiled")
    folder = tmp_path_factory.mktemp("trt")
    (folder / "stub.c").write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in FUNCTIONS))
    first = folder / "stub.so"
    subprocess.run(["gcc", "-shared", "-fPIC", folder / "stub.c", "-o", first], check=True)
    for major in ("10", "11"):
        for name in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
            shutil.copy(first, folder / f"lib{name}.so.{major}")
    return folder


@pytest.fixture(scope="module", params=LACKS)
def release(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def documented(release: str, stubs: Path) -> dict[str, str | None]:
    """The docstring of every name that is used, in one release; None where it does not exist."""
    folder = BINDINGS / release
    if release != "rtx" and not folder.is_dir():
        pytest.skip(f"no bindings of TensorRT {release} for this Python; make test installs them where there are any")
    done = subprocess.run(
        [sys.executable, "-c", CHILD, "tensorrt_rtx" if release == "rtx" else "tensorrt_bindings"],
        env={"PYTHONPATH": str(folder), "LD_LIBRARY_PATH": str(stubs)},
        input=json.dumps(sorted({use.name for use in uses()})), capture_output=True, text=True, check=True,
    )  # fmt: skip
    answer = json.loads(done.stdout)
    assert release in ("rtx", answer["version"])
    found: dict[str, str | None] = answer["found"]
    return found


def test_the_sources_are_read() -> None:
    names = {use.name for use in uses()}
    assert {"Builder", "ICudaEngine.get_tensor_profile_shape", "IExecutionContext.execute_async_v3"} <= names
    assert {"OnnxParser.parse_from_file", "NetworkDefinitionCreationFlag.STRONGLY_TYPED"} <= names
    assert names >= RTX_ONLY | NEW


def test_every_name_exists_in_every_release(release: str, documented: dict[str, str | None]) -> None:
    missing = {name for name, text in documented.items() if text is None}
    assert missing == {name for name in LACKS[release] if name in documented}


def test_every_call_has_a_signature_of_as_many_arguments(documented: dict[str, str | None]) -> None:
    wrong = {}
    for use in uses():
        text = documented[use.name]
        signatures = [line for line in (text or "").splitlines() if f"{use.name.rpartition('.')[2]}(self: " in line]
        if use.arguments is None or not signatures:
            continue
        if not any(_least(line) <= use.arguments <= _most(line) for line in signatures):
            wrong[use.name] = (use.arguments, signatures)
    assert wrong == {}


def test_most_calls_have_a_signature_to_be_held_against(documented: dict[str, str | None]) -> None:
    called = [use.name for use in uses() if use.arguments is not None and documented[use.name] is not None]
    checked = [name for name in called if "(self: " in (documented[name] or "")]
    assert len(checked) >= 0.8 * len(called), sorted(set(called) - set(checked))


def _parameters(signature: str) -> list[str]:
    """The parameters after self: `f(self: A, b: List[Tuple[int, int]], c: int = 0) -> None` has two."""
    depth, parameters, current = 0, [], ""
    for letter in signature[signature.index("(") + 1 :]:
        if letter == ")" and depth == 0:
            break
        depth += {"[": 1, "(": 1, "<": 1, "]": -1, ")": -1, ">": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            parameters.append(current)
            current = ""
        else:
            current += letter
    return [*parameters, current][1:]


def _least(signature: str) -> int:
    return sum("=" not in parameter for parameter in _parameters(signature))


def _most(signature: str) -> int:
    return len(_parameters(signature))
