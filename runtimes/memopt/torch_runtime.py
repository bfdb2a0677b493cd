"""PyTorch, for exported programs (`.pt2`): the reference for accuracy and the baseline for memory.

torch trusts the file it loads: parts of it are unpickled, evaluated or run. So the file is checked first, and only what
our exporter writes is let through. What remains is the network itself: torch's own operators, on numbers from the file.
"""

from __future__ import annotations

import io
import math
import re
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from memopt.arena import MemoryPool
from memopt.artifact import Artifact
from memopt.errors import BackendError, InputRefused, IntegrityError, OutOfResource, first_line
from memopt.ort_options import profile_named
from memopt.strict_json import from_json
from memopt.tensors import Array, TensorSpec, check_feeds

if TYPE_CHECKING:
    import torch
    from torch.export.pt2_archive import PT2ArchiveReader

NAME = "torch"
DEVICES = ("cpu", "cuda")
COMPILED = "fast"  # the profile that compiles
# The entry of a .pt2 file that names inputs and outputs: {"inputs": [...], "outputs": [...]}, TensorSpecs as JSON.
SPECS = "memopt.json"
_MAX_SPECS_BYTES, _MAX_CONFIG_BYTES, _MAX_SAMPLES_BYTES = 2**20, 16 * 2**20, 64 * 2**10

_PROGRAM, _SAMPLES = "models/model.json", "data/sample_inputs/model.pt"
_PAYLOADS = {  # folder -> its list, and what the tensors in it are called
    "data/weights": ("data/weights/model_weights_config.json", re.compile(r"weight_\d{1,9}")),
    "data/constants": ("data/constants/model_constants_config.json", re.compile(r"tensor_\d{1,9}")),
}
_ENTRIES = re.compile(
    r"archive_format|archive_version|byteorder|\.data/(version|serialization_id)|extra/memopt\.json|models/model\.json"
    r"|data/sample_inputs/model\.pt|data/weights/(weight_\d{1,9}|model_weights_config\.json)"
    r"|data/constants/(tensor_\d{1,9}|model_constants_config\.json)"
)

_NAME = re.compile(r"(?:(?!__)\w+(?:\.(?!__)\w+)*)?", re.ASCII)
_SYMBOL = re.compile(r"[a-z]{1,4}\d{1,5}")
# What sympy prints for a dimension, such as "Mul(Integer(12), Symbol('s77', positive=True, integer=True))".
_EXPRESSION = re.compile(
    r"(?:\b(?:Symbol|Integer|Mul|Add|Min|Max|Mod|PythonMod|FloorDiv|CeilDiv|CleanDiv|ModularIndexing|Identity|Equality"
    r"|Unequality|StrictLessThan|LessThan|StrictGreaterThan|GreaterThan|positive|nonnegative|integer|True|False)\b"
    r"|'[a-z]{1,4}\d{1,5}'|[(),= -]|\b\d{1,18}\b){1,200}"
)
# The shape of arguments and results: tuples, lists and leaves.
_TREE = re.compile(
    r"(?:[\[\]{}:, 1]|null|\"(?:type|context|children_spec|null|\[\]|builtins\.(?:tuple|list|dict))\"){1,9999}"
)
_FLOAT = re.compile(r"-?Infinity|NaN")
_ATEN = re.compile(r"torch\.ops\.aten\.(\w+)\.(\w+)", re.ASCII)
_ON_NUMBERS = re.compile(
    r"_operator\.(?:add|sub|mul|truediv|floordiv|mod|neg|pos|and_|or_|eq|ne|lt|le|gt|ge)"
    r"|math\.trunc|torch\.sym_(?:int|float|min|max|not|ite)"
)
_TEXTS = {  # field -> what may stand in it; any other text is a name
    "expr_str": _EXPRESSION,
    "in_spec": _TREE,
    "out_spec": _TREE,
    "as_float": _FLOAT,
    "as_string": re.compile(r".*", re.DOTALL),  # an argument, of which nothing is made
    "as_strings": re.compile(r".*", re.DOTALL),
    "target": re.compile(f"{_ATEN.pattern}|{_ON_NUMBERS.pattern}", re.ASCII),
}
_REFUSED = {"as_graph", "as_operator", "as_custom_obj", "custom_obj"}  # code beyond one list of operators


def version() -> str | None:
    """The installed version; None without one."""
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return None


def load_library() -> None:
    """Imports torch and torch.export.

    Raises:
        BackendError: not installed, or broken.
    """
    try:
        import torch.export.pt2_archive  # noqa: F401  # the import is the point
    except ImportError as error:
        raise BackendError(f"torch cannot be imported: {error}", hint="pip install 'memopt[torch]'") from error


def unavailable(device: str) -> str | None:
    """Why torch cannot run on `device`; None when it can."""
    if version() is None:
        return "torch is not installed; hint: pip install 'memopt[torch]'"
    if device == "cpu":
        return None
    import torch

    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def refuses(artifact: Artifact) -> str | None:
    """Why torch cannot open this kind of artifact; None when it can."""
    if artifact.kind != "pt2":
        return f"torch opens .pt2, not .{artifact.kind}"
    return None if artifact.path else "torch opens .pt2 files only from a path"


def open(  # noqa: A001  # the arrow's name
    artifact: Artifact, *, device: str = "cpu", threads: int = 0, profile: str = "balanced",
    pool: MemoryPool | None = None,
) -> TorchSession:  # fmt: skip
    """A session on this device; see `memopt.session.Runtime.open`.

    Profile "fast" compiles the program at its first run, which takes a compiler and up to minutes; the others run it
    eagerly. torch has an allocator of its own, and no use for a pool.
    """
    profile_named(profile)
    reason = refuses(artifact) or unavailable(device)
    if reason or artifact.path is None:
        raise BackendError(reason or "torch opens .pt2 files only from a path")
    load_library()
    import torch

    if threads:
        torch.set_num_threads(threads)
    specs = read_specs(artifact.path)
    _check_file(artifact.path)
    module = _load(artifact.path, artifact.name)
    try:
        placed = module.to(device)
        compiled = profile == COMPILED
        function = torch.compile(placed) if compiled else placed
        return TorchSession(artifact.name, function, specs, device, compiled=compiled)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfResource(f"torch has no memory for {artifact.name} on {device}: {first_line(error)}") from error
    except RuntimeError as error:
        raise BackendError(f"torch cannot bring {artifact.name} to {device}: {first_line(error)}") from error


def read_specs(path: Path) -> dict[str, tuple[TensorSpec, ...]]:
    """What the exported program at `path` expects ("inputs") and returns ("outputs"), read without torch.

    Raises:
        InputRefused: not a `.pt2` file of ours.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entry = next(entry for entry in archive.infolist() if entry.filename.endswith(f"/{SPECS}"))
            stored = entry.compress_type == zipfile.ZIP_STORED and entry.compress_size == entry.file_size
            if not stored or entry.file_size > _MAX_SPECS_BYTES:
                raise ValueError(f"{SPECS} is not stored as it is, or too large")
            specs = from_json(dict[str, tuple[TensorSpec, ...]], archive.read(entry), where=SPECS)
        return {key: specs[key] for key in ("inputs", "outputs")}
    except (
        OSError, EOFError, RuntimeError, ValueError, KeyError, StopIteration, struct.error, zipfile.BadZipFile,
        IntegrityError,
    ) as error:  # fmt: skip
        hint = "memopt-export export CKPT --program OUT.pt2 writes one that does"
        raise InputRefused(f"{path} does not name its inputs", hint=hint) from error


class TorchSession:
    """An exported program on one device. Threads may share it."""

    def __init__(
        self, name: str, module: Callable[..., Any], specs: dict[str, tuple[TensorSpec, ...]], device: str, *,
        compiled: bool = False,
    ) -> None:  # fmt: skip
        self._name, self._device = name, device
        self._module: Callable[..., Any] | None = module
        self.inputs, self.outputs = specs["inputs"], specs["outputs"]
        self.placement = f"torch {device}" + (", compiled" if compiled else "")
        self.device_method = "torch.cuda.memory_reserved" if device == "cuda" else "unknown: it runs on the CPU"

    @property
    def device_bytes(self) -> int | None:
        """What torch's allocator has reserved on the device, for all of this process; None on the CPU."""
        if self._device != "cuda":
            return None
        import torch

        return torch.cuda.memory_reserved()

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        """The outputs, in order; see `memopt.session.Session.run`."""
        import torch

        module = self._module
        if module is None:
            raise BackendError(f"{self._name} is closed")
        check_feeds(self.inputs, feeds)
        try:
            with torch.inference_mode():
                given = [torch.from_numpy(np.ascontiguousarray(feeds[spec.name])) for spec in self.inputs]
                outputs = module(*(tensor.to(self._device) for tensor in given))
                outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
                return [output.cpu().numpy() for output in outputs]
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise OutOfResource(f"torch ran out of memory in {self._name}: {first_line(error)}") from error
        except Exception as error:  # a program from elsewhere makes torch raise whatever it trips over
            raise BackendError(f"torch failed in {self._name}: {first_line(error)}") from error

    def trim(self) -> None:
        """Gives back what torch's allocator has reserved on the device and does not use."""
        import torch

        if self._device == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Frees the module."""
        self._module = None


def _load(path: Path, name: str) -> torch.nn.Module:
    """The program as a module, from a file that `_check_file` has let through."""
    from torch.export.pt2_archive._package import load_pt2  # torch.export.load hides why, and falls back to old formats

    try:
        program = load_pt2(str(path)).exported_programs["model"]
        return program.module(
            check_guards=False
        )  # guards are Python source from the file; `check_feeds` does their work
    except MemoryError as error:
        raise OutOfResource(f"torch has no memory for {name}: {first_line(error)}") from error
    except Exception as error:  # a damaged program makes torch raise whatever it trips over
        raise InputRefused(f"torch cannot open {name}: {first_line(error)}") from error


def _check_file(path: Path) -> None:
    """Refuses every file but those that torch loads without unpickling, evaluating or importing what is in them.

    1. Entries: ours only. No other is harmless: `.pt` weights and custom objects are pickles, data/aotinductor is a
       shared library.
    2. Weights and constants: raw bytes, no more elements than bytes.
    3. Example inputs: none, or few enough and tensors.
    4. The program: dimensions are evaluated (sympy.sympify), operators looked up from `torch` on and called, names
       pasted into generated source, tree specs imported; each text must have the form it has in a file of ours.

    It is read by torch's own reader, so that no second reader sees another file.

    Raises:
        InputRefused: something of that kind is in it, or it is damaged.
    """
    from torch.export.pt2_archive import PT2ArchiveReader

    try:
        reader = PT2ArchiveReader(str(path))
        sizes = _check_entries(path, reader)
        for folder in _PAYLOADS:
            _check_payloads(reader, sizes, folder)
        _check_samples(reader, sizes)
        _check_program(_read_json(reader, sizes, _PROGRAM))
    except InputRefused as error:
        raise InputRefused(f"{path.name} is refused: {error.problem}", hint="export it again") from error
    except KeyError as error:
        raise InputRefused(f"{path.name} is not a program that torch exported: it has no {error}") from error
    except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, IntegrityError) as error:
        raise InputRefused(f"{path.name} is not a program that torch exported: {first_line(error)}") from error


def _check_entries(path: Path, reader: PT2ArchiveReader) -> dict[str, int]:
    """1. The size of each entry, by name."""
    names = reader.get_file_names()
    for name in names:
        if _ENTRIES.fullmatch(name) is None:
            raise InputRefused(f"it holds {name[:99]!r}, which memopt never writes")
    sizes = {name: reader.archive_file.get_record_size(name) for name in names}
    if len(sizes) != len(names) or sum(sizes.values()) > path.stat().st_size:
        raise InputRefused("its entries stand twice, or are larger than the file")
    return sizes


def _check_payloads(reader: PT2ArchiveReader, sizes: Mapping[str, int], folder: str) -> None:
    """2."""
    config, tensor_name = _PAYLOADS[folder]
    for name, payload in _read_json(reader, sizes, config)["config"].items():
        file = payload["path_name"]
        if payload["use_pickle"] is not False or tensor_name.fullmatch(file) is None:
            raise InputRefused(f"{name[:99]!r} is a pickle")
        elements = math.prod(int(size["as_int"]) for size in payload["tensor_meta"]["sizes"])
        if not 0 <= elements <= sizes[f"{folder}/{file}"]:
            raise InputRefused(f"{name[:99]!r} claims {elements} elements in {sizes[f'{folder}/{file}']} bytes")


def _check_samples(reader: PT2ArchiveReader, sizes: Mapping[str, int]) -> None:
    """3. torch loads them with weights_only=True, and when that fails without: so it must not fail."""
    import torch

    if sizes[_SAMPLES] == 0:
        return
    samples = reader.read_bytes(_SAMPLES) if sizes[_SAMPLES] <= _MAX_SAMPLES_BYTES else b""
    try:
        if not samples.startswith(b"PK") or not isinstance(torch.load(io.BytesIO(samples), weights_only=True), tuple):
            raise ValueError("not a tuple")
    except Exception as error:  # whatever an unpickler trips over; torch's own message says how to load it all the same
        raise InputRefused("its example inputs are not a few plain tensors") from error


def _check_program(program: dict[str, Any]) -> None:
    """4. Left out is what torch keeps as text, or ignores: where a node came from, its own version, guards."""
    graph_module = program["graph_module"]
    graph = graph_module["graph"]
    nodes = [{**node, "metadata": None} for node in graph["nodes"]]
    plain_graph = {**graph, "nodes": nodes}
    plain = {**program, "graph_module": {**graph_module, "graph": plain_graph, "metadata": None}}
    plain.update(torch_version=None, guards_code=None)
    for field, text in _texts(plain):
        if field in _REFUSED:
            raise InputRefused(f"it holds code: {field}")
        if _TEXTS.get(field, _NAME).fullmatch(text) is None:
            raise InputRefused(f"{field} is {text[:99]!r}, which is not the form that torch exports")
    for symbol in program["range_constraints"]:
        if _SYMBOL.fullmatch(symbol) is None:
            raise InputRefused(f"{symbol[:99]!r} is not the name of a dimension")
    for target in {node["target"] for node in nodes}:
        _check_operator(target)


def _texts(value: Any) -> Iterator[tuple[str, str]]:
    """Every text in the value with the field it stands in; fields themselves are texts in the field "name"."""
    waiting = [("name", value)]
    while waiting:
        field, value = waiting.pop()
        if isinstance(value, str):
            yield field, value
        elif isinstance(value, list):
            waiting += ((field, item) for item in value)
        elif isinstance(value, dict):
            yield from ((key if key in _REFUSED else "name", key) for key in value)
            waiting += value.items()


def _check_operator(target: str) -> None:
    """Refuses what is not an operator on tensors or on dimensions, and operators that open files."""
    import torch

    if _ON_NUMBERS.fullmatch(target):
        return
    match = _ATEN.fullmatch(target)
    operator = getattr(getattr(torch.ops.aten, match[1]), match[2]) if match else None
    if not isinstance(operator, torch._ops.OpOverload):
        raise InputRefused(f"{target[:99]!r} is not an operator")
    if any(argument.name == "filename" for argument in operator._schema.arguments):
        raise InputRefused(f"{target} opens a file")


def _read_json(reader: PT2ArchiveReader, sizes: Mapping[str, int], name: str) -> dict[str, Any]:
    if sizes[name] > _MAX_CONFIG_BYTES:
        raise InputRefused(f"{name} has {sizes[name]} bytes, at most {_MAX_CONFIG_BYTES} are read")
    return from_json(dict[str, Any], reader.read_bytes(name), where=name)
