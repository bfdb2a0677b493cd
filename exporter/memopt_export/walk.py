"""A walk through a model: all samples go through it piece by piece, and what later pieces read waits in files.

So memory is that of one piece and one batch, however many samples there are and however large the model is, and
weights may change ahead of the walk. Files are read and written, not mapped: their pages are the kernel's to drop.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from memopt.errors import InputRefused, OutOfResource, first_line
from memopt.ort_runtime import library_errors
from memopt.tensors import Array, TensorSpec, check_feeds
from memopt_export.bodies import captured
from memopt_export.graph import Wiring, tensor_spec, wire

if TYPE_CHECKING:
    import onnx
    import onnxruntime


@dataclass(frozen=True)
class _Stored:
    """A tensor of every batch, one behind the other in a file."""

    path: Path
    dtype: np.dtype[Any]
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    ends: list[int] = field(default_factory=lambda: [0])  # bytes to where each batch begins, and the last one ends

    def append(self, array: Array) -> None:
        """Adds the next batch's tensor."""
        with self.path.open("ab") as file:
            np.ascontiguousarray(array).tofile(file)
        self.shapes.append(array.shape)
        self.ends.append(self.ends[-1] + array.nbytes)

    def read(self, batch: int) -> Array:
        """The tensor of one batch."""
        shape, start = self.shapes[batch], self.ends[batch]
        return np.fromfile(self.path, self.dtype, math.prod(shape), offset=start).reshape(shape)


class Walk:
    """One way through a model's nodes, from the inputs to any node ahead.

    `position` counts the nodes that all samples have passed. A value computed by DequantizeLinear from stored integers
    waits as integers, a quarter of its size.
    """

    def __init__(self, model: onnx.ModelProto, batches: Sequence[Mapping[str, Array]], folder: Path) -> None:
        self.position = 0
        self._model = model
        self._wiring: Wiring = wire(model)
        self._batches = batches
        values = [value for value in model.graph.input if value.name not in self._wiring.initializers]
        self._specs = [tensor_spec(value) for value in values]
        self._inputs = {spec.name for spec in self._specs}
        self._folder = folder
        self._latest: tuple[int, Mapping[str, Array]] | None = None  # a batch may be made when it is read
        self._samples: dict[int, int] = {}
        self._stored: dict[str, _Stored] = {}
        self._changed: dict[str, Array] = {}

    def writer(self, tensor: str) -> int:
        """The node that writes the tensor; -1 for an input."""
        return self._wiring.writer.get(tensor, -1)

    def reads(self, node: int) -> str:
        """The first tensor that the node reads."""
        return str(self._wiring.nodes[node].input[0])

    def samples(self, batch: int) -> int:
        """How many samples a batch holds that the walk has seen."""
        return self._samples[batch]

    def change(self, initializer: str, array: Array) -> None:
        """Gives an initializer another value for all that is ahead."""
        self._changed[initializer] = array

    def advance(self, stop: int, watch: Sequence[str] = ()) -> Iterator[list[Array]]:
        """Takes all samples to the node at `stop`; yields the watched tensors of each batch as it passes.

        The walk has advanced when the iterator is exhausted.

        Raises:
            InputRefused: a batch does not fit the inputs, or the model cannot run on it.
            OutOfResource: there is no room for what has to wait.
        """
        nodes = range(self.position, stop)
        waiting = [name for name in self._waiting(stop) if name not in self._stored and not self._is_input(name)]
        outputs = list(dict.fromkeys([*waiting, *watch]))
        piece = self._piece(nodes, outputs)
        stored: dict[str, _Stored] = {}
        for batch in range(len(self._batches)):
            if self.position == 0:
                check_feeds(self._specs, self._batch(batch))
            values = self._run(piece, batch, outputs)
            for name in waiting:
                if name not in stored:
                    path = self._folder / f"{stop}-{len(stored)}"
                    path.unlink(missing_ok=True)
                    stored[name] = _Stored(path, values[name].dtype)
                self._store(stored[name], values[name])
            yield [values[name] for name in watch]
        self._stored |= stored
        self.position = stop
        self._forget()

    def pass_to(self, stop: int) -> None:
        """Takes all samples to the node at `stop`."""
        for _ in self.advance(stop):
            pass

    def read(self, *names: str) -> Iterator[list[Array]]:
        """Tensors that a node ahead reads, batch by batch."""
        piece = self._piece(range(0), list(names))
        for batch in range(len(self._batches)):
            values = self._run(piece, batch, list(names))
            yield [values[name] for name in names]

    def _waiting(self, stop: int) -> list[str]:
        """What nodes from `stop` on, or the caller, read of what was there before it."""
        written = {name for name, writer in self._wiring.writer.items() if writer >= stop}
        ahead = [name for node in self._wiring.nodes[stop:] for name in (*node.input, *captured(node)) if name]
        return [
            origin
            for name in dict.fromkeys([*ahead, *sorted(self._wiring.outputs)])
            if name not in written and name not in self._wiring.initializers
            for origin in self._origins(name)
        ]

    def _origins(self, name: str) -> list[str]:
        """What has to be kept for a tensor: the integers behind a DequantizeLinear, else the tensor itself."""
        node = self._dequantizer(name)
        return [name] if node is None else self._origins(node.input[0])

    def _dequantizer(self, name: str) -> onnx.NodeProto | None:
        """The DequantizeLinear that writes the tensor from int8 or uint8; numpy knows no smaller floats."""
        from onnx import TensorProto

        writer = self._wiring.writer.get(name)
        node = self._wiring.nodes[writer] if writer is not None else None
        if node is None or node.op_type != "DequantizeLinear" or node.input[0] in self._wiring.initializers:
            return None
        constants = [self._wiring.initializers.get(each) for each in node.input[1:]]
        known = len(constants) == 2 and all(each is not None for each in constants)
        zero_point = constants[-1]
        integers = known and zero_point is not None and zero_point.data_type in (TensorProto.INT8, TensorProto.UINT8)
        return node if integers else None

    def _is_input(self, name: str) -> bool:
        return name in self._inputs

    def _forget(self) -> None:
        """Deletes the files that nobody ahead reads."""
        needed = set(self._waiting(self.position))
        for name in [name for name in self._stored if name not in needed]:
            self._stored.pop(name).path.unlink(missing_ok=True)

    def _store(self, stored: _Stored, array: Array) -> None:
        try:
            stored.append(array)
        except OSError as error:
            raise OutOfResource(
                f"{self._folder} has no room for activations: {error.strerror or error}", hint="TMPDIR=DIR"
            ) from error

    # --- one piece

    def _piece(self, nodes: range, outputs: Sequence[str]) -> _Piece:
        """A session for these nodes, with what they read from before as its inputs."""
        import onnx
        from onnx import helper

        chosen = [self._wiring.nodes[index] for index in nodes]
        written = {name for node in chosen for name in node.output if name}
        before: dict[int, onnx.NodeProto] = {}
        inputs: dict[str, None] = {}
        initializers: dict[str, None] = {}
        wanted = [name for node in chosen for name in (*node.input, *captured(node)) if name]
        wanted += [name for name in outputs if name not in written]
        while wanted:
            name = wanted.pop()
            if name in written:
                continue
            if name in self._wiring.initializers:
                initializers[name] = None
            elif name in self._stored or self._is_input(name):
                inputs[name] = None
            else:
                node = self._dequantizer(name)
                assert node is not None, f"{name!r} was not kept"
                before[self._wiring.writer[name]] = node
                written.add(name)
                wanted.extend(node.input)
        given = [name for name in outputs if name in inputs]
        made = [name for name in outputs if name not in inputs]
        if not made:
            return _Piece(None, tuple(inputs), (), tuple(given))
        first = {name: self._value(name, 0) for name in inputs}
        graph = helper.make_graph(
            [*(before[index] for index in sorted(before)), *chosen],
            "piece",
            [_open_value(name, array) for name, array in first.items()],
            [helper.make_empty_tensor_value_info(name) for name in made],
            [self._initializer(name) for name in initializers],
        )
        piece = onnx.ModelProto(ir_version=self._model.ir_version, graph=graph)
        piece.opset_import.extend(self._model.opset_import)
        piece.functions.extend(self._model.functions)
        return _Piece(open_plain(piece.SerializeToString()), tuple(inputs), tuple(made), tuple(given))

    def _run(self, piece: _Piece, batch: int, outputs: Sequence[str]) -> dict[str, Array]:
        feeds = {name: self._value(name, batch) for name in piece.inputs}
        values = {name: feeds[name] for name in piece.given}
        if piece.session is not None:
            values |= zip(piece.made, run_plain(piece.session, piece.made, feeds), strict=True)
        return {name: values[name] for name in outputs}

    def _value(self, name: str, batch: int) -> Array:
        return self._stored[name].read(batch) if name in self._stored else self._batch(batch)[name]

    def _batch(self, index: int) -> Mapping[str, Array]:
        if self._latest is None or self._latest[0] != index:
            batch = self._batches[index]
            self._samples[index] = len(next(iter(batch.values())))
            self._latest = (index, share_scalars(self._specs, batch))
        return self._latest[1]

    def _initializer(self, name: str) -> onnx.TensorProto:
        from onnx import numpy_helper

        if name in self._changed:
            return numpy_helper.from_array(self._changed[name], name)
        return self._wiring.initializers[name]


def share_scalars(inputs: Sequence[TensorSpec], batch: Mapping[str, Array]) -> dict[str, Array]:
    """The batch as a graph takes it: a scalar input, which has no place for samples, gets the one value of them all.

    Raises:
        InputRefused: they do not agree on it.
    """
    scalars = {spec.name for spec in inputs if not spec.shape}
    for name in scalars & batch.keys():
        if np.unique(batch[name]).size > 1:
            raise InputRefused(
                f"input {name!r} is one number for all samples of a run, and the samples have several",
                hint="--data with the samples of one value",
            )
    return {name: np.asarray(array.reshape(-1)[0]) if name in scalars else array for name, array in batch.items()}


def watch_all(
    model: onnx.ModelProto, batches: Sequence[Mapping[str, Array]], tensors: Sequence[str], *, cuts: Sequence[int] = ()
) -> Iterator[tuple[str, Array]]:
    """Every tensor asked for with its value, batch by batch; the model is cut into pieces before the nodes named."""
    with tempfile.TemporaryDirectory(prefix="memopt-") as folder:
        walk = Walk(model, batches, Path(folder))
        for stop in (*cuts, len(model.graph.node)):
            own = [name for name in tensors if walk.position <= max(walk.writer(name), 0) < stop]
            for values in walk.advance(stop, own):
                yield from zip(own, values, strict=True)


@dataclass(frozen=True)
class _Piece:
    """Some nodes, ready to run. `given` are outputs asked for that are inputs already."""

    session: onnxruntime.InferenceSession | None
    inputs: tuple[str, ...]
    made: tuple[str, ...]
    given: tuple[str, ...]


def open_plain(data: bytes) -> onnxruntime.InferenceSession:
    """A session that runs every node as it stands, and keeps no memory between runs.

    Raises:
        InputRefused: ONNX Runtime cannot open the model.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except library_errors() as error:
        raise _cannot_run(error) from error


def run_plain(
    session: onnxruntime.InferenceSession, outputs: Sequence[str] | None, feeds: Mapping[str, Array]
) -> list[Array]:
    """The session's outputs; OutOfResource where memory was short, InputRefused for anything else."""
    try:
        return [np.asarray(value) for value in session.run(outputs, dict(feeds))]
    except library_errors() as error:
        raise _cannot_run(error) from error


def _cannot_run(error: Exception) -> InputRefused | OutOfResource:
    text = first_line(error)
    short = "bad allocation" in text or "bad_alloc" in text or "Failed to allocate memory" in text
    return OutOfResource(f"out of memory: {text}") if short else InputRefused(f"onnxruntime cannot run it: {text}")


def _open_value(name: str, array: Array) -> onnx.ValueInfoProto:
    """An input of this dtype and rank; its dimensions may differ from batch to batch."""
    from onnx import helper

    return helper.make_tensor_value_info(
        name, helper.np_dtype_to_tensor_dtype(array.dtype), [f"{name}.{axis}" for axis in range(array.ndim)]
    )
