"""A checkpoint: weights, how to rebuild their network, and where they come from, in one .safetensors file.

The file is a plain safetensors file; everything but the weights is JSON under its metadata key "memopt". Nothing in it
is a program, and a network of the user's own is only built when the caller names it too.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memopt.errors import InputRefused, IntegrityError, UsageError
from memopt.files import write_atomically
from memopt.manifest import Stage
from memopt.strict_json import from_json, from_plain, to_json, to_plain
from memopt.tensors import Array, TensorSpec
from memopt_models import networks
from memopt_models.digest import digest_arrays

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.nn.modules.conv import _ConvNd

SCHEMA = "1.1"
QUANTIZATION = "quantization."
MAX_HEADER_BYTES = 16 * 2**20
_KEY = "memopt"

# Numbers that a network keeps of its own, and the parameter whose last dimension they are (torchvision's ViT).
_REMEMBERED = {"hidden_dim": "class_token"}

# The dtypes of safetensors by the names we use.
_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A trained network. Its identity is `sha256`, the digest of the weights alone."""

    network: str  # see networks.build
    settings: dict[str, Any]
    state: dict[str, torch.Tensor]
    inputs: tuple[TensorSpec, ...]
    labels: tuple[str, ...]
    preprocess: tuple[dict[str, Any], ...]  # steps of memopt.preprocess
    lineage: tuple[Stage, ...]
    metrics: dict[str, float]
    seed: int
    # How the weights were trained to be rounded, for the exporter: empty for float networks. What it needs in tensors,
    # such as scales, stands in `state` under names that begin with QUANTIZATION.
    quantization: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.inputs) != 1:
            raise InputRefused(f"a checkpoint has one input, this one has {len(self.inputs)}")

    @cached_property
    def sha256(self) -> str:
        """Digest of the weights' names, dtypes, shapes and bytes, as 64 hex digits."""
        return digest_state(self.state)

    @cached_property
    def parameters(self) -> int:
        """Number of learned weights; running statistics are none."""
        return count_parameters(self.module())

    @property
    def scales(self) -> dict[str, torch.Tensor]:
        """The tensors that `quantization` needs, by their names without the prefix."""
        return {
            name.removeprefix(QUANTIZATION): tensor
            for name, tensor in self.state.items()
            if name.startswith(QUANTIZATION)
        }

    def module(self) -> nn.Module:
        """The network with these weights, in evaluation mode; pruned layers get the shapes of their weights.

        Raises:
            InputRefused: the network cannot be built, or the weights are not its weights.
        """
        import torch

        with torch.random.fork_rng(devices=[]):  # the fresh weights thrown away here cost the caller no randomness
            try:
                module = networks.build(self.network, self.settings)
            except (InputRefused, UsageError, RuntimeError, TypeError, ValueError, ArithmeticError) as error:
                raise InputRefused(f"the checkpoint's network cannot be built: {error}") from error
        weights = {name: tensor for name, tensor in self.state.items() if not name.startswith(QUANTIZATION)}
        _reshape_layers(module, weights)
        _refuse_misfit(module.state_dict(), weights, network=self.network)
        module.load_state_dict(_with_versions(module, weights))
        return module.eval()

    def advance(
        self,
        stage: str,
        module: nn.Module,
        *,
        settings: Mapping[str, Any],
        metrics: Mapping[str, float],
        parents: Sequence[str] = (),
        quantization: Mapping[str, Any] | None = None,
        scales: Mapping[str, torch.Tensor] | None = None,
    ) -> Checkpoint:
        """The checkpoint after a stage: the module's weights, the lineage one step longer, other metrics.

        `quantization` and the tensors that go with it, `scales`, are new too: None after a stage that trained floats.
        """
        counted = {**metrics, "parameters": float(count_parameters(module))}
        state = snapshot(module) | {f"{QUANTIZATION}{name}": tensor for name, tensor in (scales or {}).items()}
        advanced = replace(self, state=state, metrics=counted, quantization=dict(quantization or {}))
        step = Stage(stage, advanced.sha256, tuple(parents), to_plain(dict(settings)))
        return replace(advanced, lineage=(*self.lineage, step))


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    """The module's weights as they are now, in memory of their own."""
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in module.state_dict().items()}


def digest_state(state: Mapping[str, torch.Tensor]) -> str:
    """sha256 of the tensors' names, dtypes, shapes and bytes, as 64 hex digits."""
    return digest_arrays({
        f"{name} {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}": bytes_of(tensor)
        for name, tensor in state.items()
    })  # fmt: skip


def bytes_of(tensor: torch.Tensor) -> Array:
    """The bytes of a tensor, one after the other: a view where it lies on the CPU in one piece."""
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def dtype_name(tensor: torch.Tensor) -> str:
    """How safetensors calls the dtype.

    >>> import torch
    >>> dtype_name(torch.zeros(1, dtype=torch.bfloat16))
    'BF16'
    """
    names = {ours: theirs for theirs, ours in _DTYPES.items()}
    return names[str(tensor.dtype).removeprefix("torch.")]


def count_parameters(module: nn.Module) -> int:
    """Number of learned weights of the module."""
    return sum(parameter.numel() for parameter in module.parameters())


def save_checkpoint(checkpoint: Checkpoint, path: Path, *, force: bool = False) -> None:
    """Writes the checkpoint, whole or not at all; equal checkpoints give equal bytes.

    Raises:
        UsageError: the file exists and `force` is not given.
    """
    import safetensors.torch

    card = {field.name: getattr(checkpoint, field.name) for field in fields(_Card)}
    text = to_json({"schema": SCHEMA, **card})
    write_atomically(path, safetensors.torch.save(checkpoint.state, {_KEY: text}), force=force)


def load_checkpoint(path: Path, *, network: str | None = None) -> Checkpoint:
    """The checkpoint in this file.

    Args:
        path: written by `save_checkpoint`.
        network: `pkg.mod:factory` when the checkpoint has a network of the user's own. Code is not imported because
            a file names it; the caller has to name it as well.

    Raises:
        InputRefused: missing, cut short, not a checkpoint of ours, NaN weights, or a factory that was not named.
        IntegrityError: the weights are not those its lineage speaks of.
    """
    card = _read_card(path, _read_plain(path, _read_header(path)))
    if ":" in card.network and network != card.network:
        hint = f"--network {card.network} allows it"
        raise InputRefused(f"{path} is built by code of yours, {card.network}", hint=hint)
    checkpoint = Checkpoint(state=_read_state(path), **vars(card))
    promised = card.lineage[-1].output_sha256 if card.lineage else checkpoint.sha256
    if checkpoint.sha256 != promised:
        raise IntegrityError(f"{path} holds weights {checkpoint.sha256[:12]}, its lineage ends in {promised[:12]}")
    return checkpoint


def read_metadata(path: Path) -> dict[str, Any]:
    """All but the weights: the checkpoint's fields as plain values, and "tensors", name -> dtype and shape.

    Neither torch nor the weights are loaded.

    Raises:
        InputRefused: as for `load_checkpoint`, from what the header shows.
    """
    header = _read_header(path)
    plain = _read_plain(path, header)
    _read_card(path, plain)
    tensors = {
        name: {"dtype": _DTYPES.get(tensor.dtype, tensor.dtype.lower()), "shape": list(tensor.shape)}
        for name, tensor in sorted(header.tensors.items())
    }
    return {**plain, "tensors": tensors}


@dataclass(frozen=True)
class _Card:
    """What the file's metadata hold: a Checkpoint without its weights."""

    network: str
    settings: dict[str, Any]
    inputs: tuple[TensorSpec, ...]
    labels: tuple[str, ...]
    preprocess: tuple[dict[str, Any], ...]
    lineage: tuple[Stage, ...]
    metrics: dict[str, float]
    seed: int
    quantization: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Tensor:
    """One entry of a safetensors header."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, ...]  # begin and end, counted from the end of the header


@dataclass(frozen=True)
class _Header:
    metadata: dict[str, str]
    tensors: dict[str, _Tensor]


def _read_header(path: Path) -> _Header:
    """The header of a safetensors file: a little-endian length, JSON of that length, then the tensors' bytes."""
    try:
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            data = file.read(min(length, MAX_HEADER_BYTES))
        size_bytes = path.stat().st_size
    except OSError as error:
        raise InputRefused(f"{path} cannot be read: {error.strerror}") from error
    if not data.startswith(b"{"):
        raise InputRefused(f"{path} is not a safetensors file")
    if length > MAX_HEADER_BYTES:
        raise InputRefused(f"{path} has a header of {length} bytes, at most {MAX_HEADER_BYTES} are read")
    if size_bytes < 8 + length:
        raise InputRefused(f"{path} is cut short: {size_bytes} bytes, the header alone needs {8 + length}")
    return _parse_header(path, data, size_bytes=size_bytes)


def _parse_header(path: Path, data: bytes, *, size_bytes: int) -> _Header:
    try:
        entries = from_json(dict[str, Any], data, where="its header")
        metadata = from_plain(dict[str, str], entries.pop("__metadata__", {}), where="its metadata")
        tensors = from_plain(dict[str, _Tensor], entries, where="its header")
    except IntegrityError as error:
        raise InputRefused(f"{path} is not a safetensors file: {error}") from error
    needed = 8 + len(data) + max((end for tensor in tensors.values() for end in tensor.data_offsets), default=0)
    if size_bytes < needed:
        raise InputRefused(f"{path} is cut short: {size_bytes} bytes, {needed} needed")
    return _Header(metadata, tensors)


def _read_plain(path: Path, header: _Header) -> dict[str, Any]:
    """Our metadata as plain values, with their schema."""
    if _KEY not in header.metadata:
        raise InputRefused(f"{path} is a safetensors file of another program", hint="memopt-export train writes ours")
    try:
        plain = from_json(dict[str, Any], header.metadata[_KEY].encode(), where=path.name)
    except IntegrityError as error:
        raise InputRefused(str(error)) from error
    schema = str(plain.get("schema"))
    if schema.partition(".")[0] != SCHEMA.partition(".")[0]:
        raise InputRefused(f"{path} has schema {schema}, this memopt reads {SCHEMA}", hint="pip install -U memopt")
    return plain


def _read_card(path: Path, plain: Mapping[str, Any]) -> _Card:
    try:
        return from_plain(_Card, {name: plain[name] for name in plain if name != "schema"}, where=path.name)
    except IntegrityError as error:
        raise InputRefused(str(error)) from error


def _read_state(path: Path) -> dict[str, torch.Tensor]:
    import safetensors
    import safetensors.torch

    try:
        mapped = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, KeyError) as error:
        raise InputRefused(f"{path} is not a safetensors file: {error}") from error
    for name, tensor in mapped.items():
        if tensor.is_floating_point() and bool(tensor.float().isnan().any()):
            raise InputRefused(f"{path} has NaN in {name!r}")
    return {name: tensor.clone() for name, tensor in mapped.items()}  # of our own: the file may change under a mapping


def _with_versions(module: nn.Module, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights with the version of each layer beside them, without which torchvision's MNASNet cannot be loaded."""
    versioned = module.state_dict()
    versioned.update(weights)
    return versioned


def _refuse_misfit(wanted: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], *, network: str) -> None:
    bad = sorted(
        name for name in wanted.keys() | state.keys()
        if name not in wanted or name not in state or wanted[name].shape != state[name].shape
    )  # fmt: skip
    if bad:
        shown = ", ".join(bad[:3]) + (", …" if len(bad) > 3 else "")
        raise InputRefused(f"the weights do not fit network {network!r}: {len(bad)} of them differ ({shown})")


def align_sizes(module: nn.Module) -> None:
    """Tells networks that remember their own width, beside that of their layers, what it has become. In place."""
    for layer in module.modules():
        for number, parameter in _REMEMBERED.items():
            if number in vars(layer) and parameter in layer._parameters:
                setattr(layer, number, layer.get_parameter(parameter).shape[-1])


def _reshape_layers(module: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Gives every layer the shapes of its weights in `state`, and the channel numbers that go with them.

    What differs in more than the number of channels (rank, kernel) stays as it is, for `_refuse_misfit` to see.
    """
    import torch
    from torch import nn

    for prefix, layer in module.named_modules():
        own = {**dict(layer.named_parameters(recurse=False)), **dict(layer.named_buffers(recurse=False))}
        given = {name: state.get(f"{prefix}.{name}" if prefix else name) for name in own}
        shapes = {
            name: tuple(new.shape) for name, new in given.items() if new is not None and new.ndim == own[name].ndim
        }
        if all(shape == tuple(own[name].shape) for name, shape in shapes.items()) or not _set_sizes(layer, shapes):
            continue
        for name, shape in shapes.items():
            fresh = torch.empty(shape, dtype=own[name].dtype)
            setattr(layer, name, nn.Parameter(fresh) if isinstance(own[name], nn.Parameter) else fresh)
    align_sizes(module)


def _set_sizes(layer: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Sets the layer's own numbers from the shapes of its tensors; False for a layer that cannot have these."""
    from torch import nn
    from torch.nn.modules.batchnorm import _NormBase
    from torch.nn.modules.conv import _ConvNd

    weight = shapes.get("weight", ())
    if isinstance(layer, _ConvNd):
        return len(weight) > 2 and _set_convolution(layer, weight)
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = weight
    elif isinstance(layer, _NormBase):
        (layer.num_features,) = weight or shapes["running_mean"]
    elif isinstance(layer, nn.LayerNorm):
        layer.normalized_shape = weight
    elif isinstance(layer, nn.GroupNorm):
        (layer.num_channels,) = weight
        return layer.num_channels % layer.num_groups == 0
    elif isinstance(layer, nn.PReLU):
        (layer.num_parameters,) = weight
    elif isinstance(layer, nn.MultiheadAttention):
        return _set_attention(layer, shapes)
    else:  # weights that a network keeps beside its layers, such as a scale for each channel
        return not type(layer).__module__.startswith("torch.nn.")
    return True


def _set_convolution(layer: _ConvNd, weight: tuple[int, ...]) -> bool:
    from torch.nn.modules.conv import _ConvTransposeNd

    if weight[2:] != tuple(layer.kernel_size):
        return False
    turned = isinstance(layer, _ConvTransposeNd)  # its weight is (inputs, outputs / groups, ...)
    if layer.groups > 1 and layer.groups == layer.in_channels:  # depthwise: one group for each input channel
        layer.groups = weight[0] * layer.groups // (layer.in_channels if turned else layer.out_channels)
    first, second = weight[0], weight[1] * layer.groups
    layer.in_channels, layer.out_channels = (first, second) if turned else (second, first)
    return True


def _set_attention(layer: nn.MultiheadAttention, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """One width for queries, keys and values, a multiple of the number of heads, which stays."""
    threefold, width = shapes.get("in_proj_weight", (0, 0))
    if not width or threefold != 3 * width or width % layer.num_heads:
        return False
    layer.embed_dim = layer.kdim = layer.vdim = width
    layer.head_dim = width // layer.num_heads
    return True
