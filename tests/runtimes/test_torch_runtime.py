"""Exported programs from elsewhere: what makes torch unpickle, evaluate, import or call is refused before it does."""

from __future__ import annotations

import io
import json
import pickle
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memopt import torch_runtime
from memopt.artifact import open_artifact
from memopt.errors import BackendError, InputRefused, MemoptError, OutOfResource
from memopt.strict_json import to_json
from memopt.tensors import Array, TensorSpec
from memopt.torch_runtime import SPECS, read_specs

torch = pytest.importorskip("torch")

PROGRAM, SAMPLES = "models/model.json", "data/sample_inputs/model.pt"
WEIGHTS, CONSTANTS = "data/weights/model_weights_config.json", "data/constants/model_constants_config.json"
INPUTS = (TensorSpec("input", "float32", ("batch", 1, 8, 8)),)
OUTPUTS = (TensorSpec("logits", "float32", ("batch", 3)),)

Entries = dict[str, bytes]
Json = dict[str, Any]


class Net(torch.nn.Module):
    """Weights, a constant, a dimension that is computed, a text as an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(64, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scaled = torch.nn.functional.gelu(x, approximate="tanh") * torch.tensor([2.0])
        return self.linear(scaled.reshape(x.shape[0] * 2, 32).reshape(x.shape[0], 64))


@pytest.fixture(scope="session")
def entries() -> Entries:
    """A program as the exporter writes it, by entry."""
    program = torch.export.export(
        Net().eval(), (torch.zeros(2, 1, 8, 8),), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},)
    )
    program.example_inputs = None
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={SPECS: to_json({"inputs": INPUTS, "outputs": OUTPUTS})})
    with zipfile.ZipFile(buffer) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


@pytest.fixture
def program(tmp_path: Path, entries: Entries) -> Callable[..., Path]:
    """Writes the program with some entries replaced, or left out where they are None."""

    def write(changes: dict[str, bytes | None] | None = None, *, compression: int = zipfile.ZIP_STORED) -> Path:
        path = tmp_path / "x.pt2"
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, data in {**entries, **(changes or {})}.items():
                if data is not None:
                    archive.writestr(f"x/{name}", data)
        return path

    return write


class Canary:
    """Leaves a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.path,)


def changed(entries: Entries, name: str, change: Callable[[Json], None]) -> dict[str, bytes | None]:
    plain = json.loads(entries[name])
    change(plain)
    return {name: json.dumps(plain).encode()}


def opened(path: Path) -> torch_runtime.TorchSession:
    return torch_runtime.open(open_artifact(path))


def assert_refused(path: Path, canary: Path, said: str) -> None:
    with pytest.raises(InputRefused, match=said) as caught:
        opened(path).run({"input": np.zeros((2, 1, 8, 8), np.float32)})
    assert not canary.exists()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


def test_our_own_programs_run(program: Callable[..., Path]) -> None:
    x: Array = np.random.default_rng(0).normal(size=(5, 1, 8, 8)).astype(np.float32)
    session = opened(program())
    assert (session.inputs, session.outputs) == (INPUTS, OUTPUTS)
    (logits,) = session.run({"input": x})
    assert logits.shape == (5, 3)


# 1. Entries.


@pytest.mark.parametrize(
    "name",
    [
        "data/weights/model.pt",
        "data/constants/model.pt",
        "data/constants/custom_obj_0",
        "data/constants/opaque_obj_0",
        "data/aotinductor/model/x.so",
        "data/executorch/x.pte",
        "models/other.json",
        "Models/model.json",
        "data/sample_inputs/other.pt",
        "xl_model_weights/weight_0",
        "extra/x",
        "../x",
        "a\nb",
    ],
)
def test_entries_that_the_exporter_never_writes_are_refused(
    program: Callable[..., Path], canary: Path, name: str
) -> None:
    path = program({name: pickle.dumps(Canary(canary))})
    assert_refused(path, canary, r"^x\.pt2 is refused: it holds .*, which memopt never writes; hint: export it again$")


def test_an_entry_that_stands_twice_is_refused(program: Callable[..., Path], entries: Entries, canary: Path) -> None:
    path = program()
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr(f"x/{PROGRAM}", entries[PROGRAM])
    assert_refused(path, canary, "stand twice, or are larger than the file")


def test_entries_that_unpack_to_more_than_the_file_are_refused(
    program: Callable[..., Path], entries: Entries, canary: Path
) -> None:
    path = program({"data/weights/weight_9": bytes(2**24), f"extra/{SPECS}": None}, compression=zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"x/extra/{SPECS}", entries[f"extra/{SPECS}"])
    assert_refused(path, canary, "larger than the file")


@pytest.mark.parametrize("name", [PROGRAM, WEIGHTS, CONSTANTS, SAMPLES, "archive_format"])
def test_a_missing_entry_is_refused(program: Callable[..., Path], canary: Path, name: str) -> None:
    assert_refused(program({name: None}), canary, "is not a program that torch exported")


@pytest.mark.parametrize("name", [PROGRAM, WEIGHTS, CONSTANTS])
@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"config": 1}', b"[" * 10_000, b"\xff", b'{"a": NaN}'])
def test_a_damaged_list_is_refused(program: Callable[..., Path], canary: Path, name: str, data: bytes) -> None:
    assert_refused(program({name: data}), canary, "is not a program that torch exported|does not name")


def test_a_huge_list_is_refused_before_it_is_read(program: Callable[..., Path], canary: Path) -> None:
    path = program({PROGRAM: b" " * (16 * 2**20 + 1)})
    tracemalloc.start()
    assert_refused(path, canary, r"models/model\.json has 16777217 bytes, at most 16777216 are read")
    assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    tracemalloc.stop()


# 2. Weights and constants.


@pytest.mark.parametrize("config", [WEIGHTS, CONSTANTS])
def test_pickled_tensors_are_refused(program: Callable[..., Path], entries: Entries, canary: Path, config: str) -> None:
    def pickled(plain: Json) -> None:
        next(iter(plain["config"].values()))["use_pickle"] = True

    payload = pickle.dumps(Canary(canary))
    file = "data/weights/weight_0" if config == WEIGHTS else "data/constants/tensor_0"
    assert_refused(program({**changed(entries, config, pickled), file: payload}), canary, "is a pickle")


@pytest.mark.parametrize("name", ["opaque_obj_0", "custom_obj_0", "../weights/weight_0", "tensor_0\n"])
def test_constants_that_are_no_tensors_are_refused(
    program: Callable[..., Path], entries: Entries, canary: Path, name: str
) -> None:
    def other(plain: Json) -> None:
        next(iter(plain["config"].values()))["path_name"] = name

    assert_refused(program(changed(entries, CONSTANTS, other)), canary, "is a pickle")


@pytest.mark.parametrize(
    ("sizes", "weight"),
    [([10**12], b""), ([10**6, 10**6], bytes(64)), ([-1, -(10**12)], bytes(64)), ([2**70], bytes(64))],
)
def test_tensors_that_claim_more_than_there_is_are_refused(
    program: Callable[..., Path], entries: Entries, canary: Path, sizes: list[int], weight: bytes
) -> None:
    def claim(plain: Json) -> None:
        payload = next(iter(plain["config"].values()))
        meta = payload["tensor_meta"]
        meta["sizes"], meta["strides"] = [{"as_int": n} for n in sizes], [{"as_int": 0} for _ in sizes]
        payload["path_name"] = "weight_0"

    changes = {**changed(entries, WEIGHTS, claim), "data/weights/weight_0": weight}
    assert_refused(program(changes), canary, r"claims -?\d+ elements in \d+ bytes")


# 3. Example inputs.


def test_example_inputs_that_are_a_pickle_are_refused(program: Callable[..., Path], canary: Path) -> None:
    buffer = io.BytesIO()
    torch.save(((Canary(canary),), {}), buffer)
    for samples in (buffer.getvalue(), pickle.dumps(Canary(canary)), bytes(70_000), b"PK"):
        assert_refused(program({SAMPLES: samples}), canary, "example inputs are not a few plain tensors")


def test_example_inputs_that_are_a_few_tensors_are_taken(program: Callable[..., Path]) -> None:
    buffer = io.BytesIO()
    torch.save(((torch.zeros(2, 1, 8, 8),), {}), buffer)
    assert opened(program({SAMPLES: buffer.getvalue()})).inputs == INPUTS


# 4. The program.


def _graph(plain: Json) -> Json:
    graph: Json = plain["graph_module"]["graph"]
    return graph


def _expression(plain: Json, code: str) -> None:
    sizes = next(value["sizes"] for value in _graph(plain)["tensor_values"].values() if "as_expr" in value["sizes"][0])
    sizes[0]["as_expr"]["expr_str"] = code


def _operator(plain: Json, target: str) -> None:
    _graph(plain)["nodes"][0]["target"] = target


def _input_name(plain: Json, name: str) -> None:
    text = json.dumps(plain).replace('"name": "x"', json.dumps({"name": name})[1:-1])
    plain.clear()
    plain.update(json.loads(text))


def _argument_name(plain: Json, name: str) -> None:
    plain["graph_module"]["module_call_graph"][0]["signature"]["forward_arg_names"] = [name]


def _parameter_name(plain: Json, name: str) -> None:
    plain["graph_module"]["signature"]["input_specs"][0]["parameter"]["parameter_name"] = name


def _tree(plain: Json, spec: str) -> None:
    plain["graph_module"]["module_call_graph"][0]["signature"]["out_spec"] = spec


def _hidden(plain: Json, code: str) -> None:
    """An expression under a name that is free text elsewhere."""
    values = _graph(plain)["tensor_values"]
    values["metadata"] = json.loads(json.dumps(next(iter(values.values()))))
    values["metadata"]["sizes"] = [{"as_expr": {"expr_str": code, "hint": {"as_int": 2}}}]


def _field(plain: Json, field: str) -> None:
    _graph(plain)["nodes"][0]["inputs"][0]["arg"] = {field: {"name": "x"}}


DEFAULT_DICT = json.dumps(
    [
        1,
        {
            "type": "collections.defaultdict",
            "context": {"default_factory_module": "canary", "default_factory_name": "x", "dict_context": []},
            "children_spec": [],
        },
    ]
)
KEYWORDS = DEFAULT_DICT.replace("collections.defaultdict", "builtins.dict")
TOUCH = "__import__('pathlib').Path(CANARY).touch()"
CODE = {
    "expression": (_expression, TOUCH),
    "expression-by-class": (_expression, "().__class__"),
    "expression-power": (_expression, "Pow(Integer(9), Pow(Integer(9), Integer(99)))"),
    "expression-function": (_expression, "factorial(Integer(99999999))"),
    "expression-number": (_expression, "Integer(" + "9" * 4000 + ")"),
    "expression-hidden": (_hidden, TOUCH),
    "operator-os": (_operator, "torch.os.system"),
    "operator-load": (_operator, "torch.load"),
    "operator-method": (_operator, "_operator.methodcaller"),
    "operator-power": (_operator, "_operator.pow"),
    "operator-dunder": (_operator, "torch.ops.aten.__class__.__init__"),
    "operator-list": (_operator, "torch.ops.aten._dir.append"),
    "operator-opens": (_operator, "torch.ops.aten.from_file.default"),
    "operator-saves": (_operator, "torch.ops.aten.save.default"),
    "operator-unknown": (_operator, "torch.ops.aten.no_such.default"),
    "operator-of-others": (_operator, "torch.ops.canary.touch.default"),
    "operator-of-scope": (_operator, "torch.ops.higher_order.cond"),
    "input-name": (_input_name, f"x={TOUCH}"),
    "argument-name": (_argument_name, f"x={TOUCH}"),
    "parameter-name": (_parameter_name, f'a", {TOUCH}, "'),
    "parameter-dunder": (_parameter_name, "__class__.forward"),
    "tree-import": (_tree, DEFAULT_DICT),
    "tree-keywords": (_tree, KEYWORDS),
    "subgraph": (_field, "as_graph"),
    "operator-argument": (_field, "as_operator"),
    "object-argument": (_field, "as_custom_obj"),
}


@pytest.mark.parametrize("case", CODE)
def test_code_in_a_program_is_refused(
    program: Callable[..., Path], entries: Entries, canary: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    (canary.parent / "canary.py").write_text(f"open({str(canary)!r}, 'w'); x = dict")
    monkeypatch.syspath_prepend(canary.parent)
    change, text = CODE[case]
    path = program(changed(entries, PROGRAM, lambda plain: change(plain, text.replace("CANARY", repr(str(canary))))))
    assert_refused(path, canary, r"^x\.pt2 (is refused: |is not a program that torch exported: )")


def test_a_dimension_that_counts_to_billions_is_refused(
    program: Callable[..., Path], entries: Entries, canary: Path
) -> None:
    def count(plain: Json) -> None:
        plain["range_constraints"]["u99999999999"] = {"min_val": 1, "max_val": 2}

    assert_refused(program(changed(entries, PROGRAM, count)), canary, "is not the name of a dimension")


def test_guards_in_a_program_are_never_run(program: Callable[..., Path], entries: Entries, canary: Path) -> None:
    """They are Python source, which torch compiles when there are example inputs."""
    buffer = io.BytesIO()
    torch.save(((torch.zeros(2, 1, 8, 8),), {}), buffer)

    def guard(plain: Json) -> None:
        plain["guards_code"] = [TOUCH.replace("CANARY", repr(str(canary)))]

    session = opened(program({**changed(entries, PROGRAM, guard), SAMPLES: buffer.getvalue()}))
    session.run({"input": np.zeros((2, 1, 8, 8), np.float32)})
    assert not canary.exists()


@pytest.mark.parametrize("field", ["nodes", "inputs", "outputs", "tensor_values"])
def test_a_program_that_does_not_fit_together_is_refused(
    program: Callable[..., Path], entries: Entries, canary: Path, field: str
) -> None:
    def empty(plain: Json) -> None:
        _graph(plain)[field] = type(_graph(plain)[field])()

    assert_refused(program(changed(entries, PROGRAM, empty)), canary, "torch cannot open|is not a program")


# The file as a whole.


def test_a_damaged_file_is_refused(
    program: Callable[..., Path], flipped: Callable[[bytes, int, int], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every prefix, and single bits of the directory and the headers; what torch would load is not loaded here."""
    monkeypatch.setattr(torch_runtime, "_load", lambda path, name: torch.nn.Identity())
    path = program()
    whole = path.read_bytes()
    places = [*range(0, 200), *range(len(whole) - 400, len(whole), 3)]
    damaged = [whole[:size] for size in range(1, len(whole), len(whole) // 40)]
    damaged += [flipped(whole, place, place % 8) for place in places]
    for data in damaged:
        path.write_bytes(data)
        try:
            opened(path).close()
        except MemoptError as error:
            assert isinstance(error, InputRefused)
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    "specs",
    [b"", b"{", b"[]", b"{}", b'{"inputs": [], "outputs": 1}', b'{"inputs": []}', b"[" * 200_000, b'{"a": 1, "a": 2}'],
)
def test_specs_that_are_not_ours_are_refused(program: Callable[..., Path], specs: bytes) -> None:
    with pytest.raises(InputRefused, match="does not name its inputs; hint: memopt-export export"):
        read_specs(program({f"extra/{SPECS}": specs}))


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_huge_specs_are_refused_before_they_are_read(program: Callable[..., Path], compression: int) -> None:
    path = program({f"extra/{SPECS}": b" " * (256 * 2**20)}, compression=compression)
    tracemalloc.start()
    with pytest.raises(InputRefused, match="does not name its inputs"):
        read_specs(path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


# Failures of torch.


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (MemoryError(), OutOfResource, r"^torch ran out of memory in x\.pt2: MemoryError$"),
        (torch.OutOfMemoryError(""), OutOfResource, r"^torch ran out of memory in x\.pt2: OutOfMemoryError$"),
        (RuntimeError(""), BackendError, r"^torch failed in x\.pt2: RuntimeError$"),
        (AssertionError("one\ntwo"), BackendError, r"^torch failed in x\.pt2: one$"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_failure_without_a_message_has_the_name_of_its_kind(
    program: Callable[..., Path], error: Exception, kind: type[MemoptError], said: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    session = opened(program())
    session._module = fail
    with pytest.raises(kind, match=said):
        session.run({"input": np.zeros((2, 1, 8, 8), np.float32)})
