"""One engine in the library with one execution context: the only place that speaks TensorRT."""

from __future__ import annotations

import logging
from typing import Any

from memopt.artifact import Artifact, release_pages
from memopt.cuda_driver import DeviceBuffer, Stream
from memopt.errors import BackendError, InputRefused, first_line
from memopt.manifest import Profile
from memopt.tensors import TensorSpec
from memopt.trt_library import library_log

# TensorRT's name of a dtype -> ours: those that numpy has.
_DTYPES = {
    "FLOAT": "float32", "HALF": "float16", "INT64": "int64", "INT32": "int32", "INT8": "int8", "UINT8": "uint8",
    "BOOL": "bool",
}  # fmt: skip

logger = logging.getLogger(__name__)

Shapes = dict[str, tuple[int, ...]]


class Engine:
    """An engine in the library, with one execution context: the only place that speaks TensorRT."""

    def __init__(
        self, trt: Any, artifact: Artifact, profile: str = "balanced", *, compiled: bytes | None = None
    ) -> None:
        self.name = artifact.name
        self._log = library_log(trt)
        self._log.lines.clear()
        self._runtime = trt.Runtime(self._log)
        if self._log.errors():  # tensorrt_lean 11.4 hands out an object all the same, whose next call crashes
            raise BackendError(f"the library does not start: {'; '.join(self._log.errors())}")
        self._engine = self._runtime.deserialize_cuda_engine(artifact.data)
        self._require(self._engine is not None, "cannot be opened")
        release_pages(artifact.data)
        self._streamed_bytes = self._stream_weights() if profile == "minimum" else 0
        self.inputs = self._specs(trt, trt.TensorIOMode.INPUT)
        self.outputs = self._specs(trt, trt.TensorIOMode.OUTPUT)
        self.activation_bytes = self._read_activation_bytes()
        self.profiles = self._read_profiles()
        self.weights_bytes = self._read_weights_bytes(trt, artifact)
        self._compiled: Any = None  # TensorRT-RTX's runtime cache
        self._context = self._make_context(trt, profile, compiled)
        self._require(self._context is not None, "has no execution context")

    def profile_for(self, shapes: Shapes) -> int:
        """The index of the profile that takes the least memory among those that cover the shapes."""
        batches = {shapes[spec.name][0] for spec in self.inputs if spec.shape and isinstance(spec.shape[0], str)}
        if len(batches) > 1:
            raise InputRefused(f"the inputs of {self.name} have different batches: {sorted(batches)}")
        for index, profile in self.profiles.items():
            if _covers(profile, shapes):
                return index
        have = ", ".join(
            f"{low}..{high}" for low, high in sorted(profile.batches for profile in self.profiles.values())
        )
        raise InputRefused(
            f"batch {shapes[self.inputs[0].name][0]} is outside the profiles of {self.name}, which cover {have}",
            hint="split the batch, or memopt-export engine MODEL.onnx --batch MIN,OPT,MAX",
        )

    def set_profile(self, index: int, memory: DeviceBuffer, stream: Stream) -> None:
        """Switches the context to the profile, with this memory for its activations."""
        done = self._context.set_optimization_profile_async(index, stream.handle)
        self._require(done, f"cannot switch to profile {index}")
        self._context.set_device_memory(memory.handle, memory.size_bytes)

    def set_shapes(self, shapes: Shapes) -> Shapes:
        """Sets the inputs' shapes; the outputs' shapes follow from them."""
        for name, shape in shapes.items():
            self._require(self._context.set_input_shape(name, shape), f"refuses shape {shape} of {name!r}")
        try:
            self._context.infer_shapes()
        except RuntimeError as error:
            raise BackendError(f"{self.name} has no output shapes for {shapes}: {first_line(error)}") from error
        outputs = {spec.name: tuple(self._context.get_tensor_shape(spec.name)) for spec in self.outputs}
        for name, shape in outputs.items():
            if min(shape, default=0) < 0:
                raise BackendError(f"output {name!r} of {self.name} has a shape that depends on the data: {shape}")
        return outputs

    def set_address(self, name: str, buffer: DeviceBuffer) -> None:
        """Where the input or output lies."""
        self._require(self._context.set_tensor_address(name, buffer.handle), f"refuses the address of {name!r}")

    def execute(self, stream: Stream) -> None:
        """Queues one run."""
        self._log.lines.clear()
        self._require(self._context.execute_async_v3(stream.handle), "failed")

    def close(self) -> None:
        """Lets the library free all it holds, in the order it wants."""
        del self._context
        del self._compiled
        del self._engine
        del self._runtime

    def compiled(self) -> bytes | None:
        """The kernels that TensorRT-RTX has compiled for this GPU so far; None where nothing is."""
        return bytes(self._compiled.serialize()) if self._compiled is not None else None

    def _make_context(self, trt: Any, profile: str, compiled: bytes | None) -> Any:
        """A context whose activation memory is ours to give.

        TensorRT-RTX is told what it may cost, too, and given what it compiled in an earlier process; what does not fit
        this GPU, driver or release it leaves out by itself.
        """
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not hasattr(trt, "CudaGraphStrategy"):
            return self._engine.create_execution_context(strategy)
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        if profile == "fast":
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        if profile == "minimum":  # kernels for one shape each are compiled at run time, and stay
            config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.NONE
        self._compiled = config.create_runtime_cache()
        if compiled is not None and not self._compiled.deserialize(compiled):
            logger.info("%s: the kernels kept from an earlier process are of another GPU, driver or release", self.name)
        config.set_runtime_cache(self._compiled)
        return self._engine.create_execution_context(config)

    def _require(self, done: bool, problem: str) -> None:
        if not done:
            reason = "; ".join(self._log.errors()) or "the library does not say why"
            raise BackendError(f"{self.name} {problem}: {reason}")

    def _specs(self, trt: Any, mode: Any) -> tuple[TensorSpec, ...]:
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        return tuple(self._spec(trt, name) for name in names if self._engine.get_tensor_mode(name) == mode)

    def _spec(self, trt: Any, name: str) -> TensorSpec:
        dtype, place = self._engine.get_tensor_dtype(name), self._engine.get_tensor_location(name)
        if dtype.name not in _DTYPES or place != trt.TensorLocation.DEVICE:  # a shape tensor lies in host memory
            raise BackendError(f"{name!r} of {self.name} cannot be a numpy array: {dtype.name} in {place.name} memory")
        shape = enumerate(self._engine.get_tensor_shape(name))
        dims = tuple(dim if dim >= 0 else "batch" if i == 0 else f"{name}_{i}" for i, dim in shape)
        return TensorSpec(name, _DTYPES[dtype.name], dims)

    def _read_activation_bytes(self) -> dict[int, int]:
        """Of each profile, by index, the smallest first; from the library, which always knows."""
        sizes = {
            index: int(self._engine.get_device_memory_size_for_profile_v2(index))
            for index in range(self._engine.num_optimization_profiles)
        }
        return dict(sorted(sizes.items(), key=lambda entry: entry[1]))

    def _read_profiles(self) -> dict[int, Profile]:
        """By index, the one with the smallest activation memory first."""
        return {index: self._profile(index) for index in self.activation_bytes}

    def _profile(self, index: int) -> Profile:
        shapes = {spec.name: self._engine.get_tensor_profile_shape(spec.name, index) for spec in self.inputs}
        low, best, high = ({name: tuple(three[i]) for name, three in shapes.items()} for i in range(3))
        return Profile(low, best, high, self.activation_bytes[index])

    def _read_weights_bytes(self, trt: Any, artifact: Artifact) -> int | None:
        """From the engine where the library can tell (not before TensorRT 10.16), else from the manifest."""
        if hasattr(self._engine, "get_engine_stat"):
            size_bytes = int(self._engine.get_engine_stat(trt.EngineStat.TOTAL_WEIGHTS_SIZE))
            return size_bytes - self._streamed_bytes if size_bytes >= 0 else None  # -1: it cannot
        known = artifact.engine.weights_bytes if artifact.engine else None
        return known - self._streamed_bytes if known is not None else None

    def _stream_weights(self) -> int:
        """Leaves in host memory what an engine built with weight streaming can bring layer by layer; bytes of it.

        What that takes on the device counts among its activations. To be asked for before there is a context.
        """
        streamable = int(getattr(self._engine, "streamable_weights_size", 0))
        if streamable > 0:
            self._engine.weight_streaming_budget_v2 = 0
        return streamable


def _covers(profile: Profile, shapes: Shapes) -> bool:
    """Whether every dimension of every input lies within the profile."""
    return all(
        low <= size <= high
        for name, shape in shapes.items()
        for low, size, high in zip(profile.min[name], shape, profile.max[name], strict=True)
    )
