"""INT8 by PT2E: a network traced by torch.export, with torchao's fake quantization where integer kernels will round.

What is trained is the network as it is deployed: BatchNorms are folded into the convolutions before them, and Dropout
and its like are off. torchao can keep BatchNorm alive (`_fuse_conv_bn_qat`), but takes every epsilon for 1e-5, which
that of MobileNetV3 or EfficientNet is not, and divides by a scale that may be zero.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from memopt.errors import AnswerIsNo, InputRefused
from memopt_models.checkpoint import Checkpoint, snapshot
from memopt_models.integer_kernels import (
    CONVOLUTIONS,
    LAYERS,
    PLACES,
    Places,
    argument,
    is_layer,
    is_stored,
    operation,
)  # fmt: skip
from memopt_models.trace import quiet, trace

if TYPE_CHECKING:
    import torch
    from torch.fx import GraphModule, Node

METHOD = "pt2e"
_SMALLEST_STEP = 2.0**-60
# A little below one: ONNX Runtime drops a Clip before a QuantizeLinear only where 255 steps do not reach past its end.
_WITHIN = 1 - 2.0**-20
_LARGEST_WEIGHT = 127
_LARGEST_BIAS = 2.0**30  # in steps of an integer kernel's int32 sums


@dataclass(frozen=True, eq=False)
class Rounded:
    """A network that rounds where its deployed form will.

    Attributes:
        module: computes in floats, with fake quantization; `train` lets it learn ranges of activations, `eval` not.
        weights: for each layer's node, the fake quantizer of its weight.
        activations: the fake quantizers of activations, by the name of the tensor that has the range.
        others: the network's own state, for what the module does not hold.
    """

    module: GraphModule
    weights: dict[Node, Any]
    activations: dict[str, Any]
    others: dict[str, torch.Tensor]

    def state(self) -> dict[str, torch.Tensor]:
        """The weights, under the network's own names."""
        now = snapshot(self.module)
        return {name: now.get(name, tensor) for name, tensor in self.others.items()}

    def ranges(self) -> dict[str, torch.Tensor]:
        """The smallest and the largest value of each activation by its tensor's name, (2,), float32."""
        import torch

        observers = {name: fake.activation_post_process for name, fake in self.activations.items()}
        return {
            name: torch.stack([observer.min_val.reshape(()), observer.max_val.reshape(())]).cpu()
            for name, observer in observers.items()
        }


def rounded(checkpoint: Checkpoint, target: str) -> Rounded:
    """The checkpoint's network, ready to be trained; the ranges of activations are not known yet.

    Args:
        checkpoint: what to train.
        target: one of `integer_kernels.PLACES`.

    Raises:
        InputRefused: torch cannot trace the network.
        AnswerIsNo: it has no layer that an integer kernel could compute.
    """
    module = folded(checkpoint)
    others = checkpoint.module().state_dict() | snapshot(module)
    if not any(is_layer(node) for node in module.graph.nodes):
        raise AnswerIsNo(f"{checkpoint.network} has no convolution or linear layer that int8 could serve")
    prepared = _prepare(module, target)
    weights = {node: _fake(prepared, argument(node, 1)) for node in prepared.graph.nodes if _has_rounded_weight(node)}
    activations = _name_activations(prepared, weights.values())
    _make_switchable(prepared, activations.values())
    return Rounded(prepared, weights, activations, others)


def folded(checkpoint: Checkpoint) -> GraphModule:
    """The network as a graph in which BatchNorms have gone into the convolutions before them, in evaluation mode.

    Its parameters have the network's own names; see `_fold_batch_norms`.

    Raises:
        InputRefused: torch cannot trace the network.
    """
    module = _trace(checkpoint)
    _fold_batch_norms(module)
    _make_switchable(module, ())
    return module


def restored(checkpoint: Checkpoint) -> Rounded:
    """The network of a checkpoint that was trained so, with its ranges; it no longer learns any.

    Raises:
        InputRefused: the ranges are not those of this network.
    """
    made = rounded(checkpoint, str(checkpoint.quantization.get("target")))
    ranges = checkpoint.scales
    odd = sorted(ranges.keys() ^ made.activations.keys()) or [name for name in ranges if not _is_range(ranges[name])]
    if odd:
        raise InputRefused(
            f"the checkpoint's ranges do not fit its network: {len(odd)} of them differ ({', '.join(odd[:3])})",
            hint="memopt-export qat CKPT makes them anew",
        )
    for name, fake in made.activations.items():
        _set_range(fake, *(ranges[name] * _WITHIN))
    for layer, fake in made.weights.items():
        _set_range(fake, *_weight_bounds(made.module, layer))
    return made


def converted(checkpoint: Checkpoint) -> GraphModule:
    """The same with int8 weights, and operations that quantize and dequantize: what torch.onnx makes QDQ of."""
    from torch.fx import GraphModule

    with quiet():
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

        whole = convert_pt2e(restored(checkpoint).module)
    whole.graph.eliminate_dead_code()
    module = GraphModule(whole, whole.graph)  # which takes what the graph reads, and leaves the float weights behind
    _make_switchable(module, ())
    return module


def without_torchao(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program of a converted network in torch's own operators: these are what is there where it is loaded."""
    import torch

    def quantize(x: Any, scale: float, zero_point: int, low: int, high: int, dtype: torch.dtype) -> Any:
        return torch.clamp(torch.round(x / scale) + zero_point, low, high).to(dtype)

    def dequantize(x: Any, scale: float, zero_point: int, *_ends_and_dtype: Any) -> Any:
        return (x.to(torch.float32) - zero_point) * scale

    def dequantize_channels(x: Any, scale: Any, _zeros: Any, axis: int, *_ends_and_dtype: Any) -> Any:
        return x.to(torch.float32) * scale.reshape([-1 if each == axis else 1 for each in range(x.ndim)])

    operators = torch.ops.quantized_decomposed
    table = {
        operators.quantize_per_tensor.default: quantize,
        operators.dequantize_per_tensor.default: dequantize,
        operators.dequantize_per_channel.default: dequantize_channels,
    }
    plain: torch.export.ExportedProgram = program.run_decompositions(table)
    return plain


# --- the graph


def _trace(checkpoint: Checkpoint) -> GraphModule:
    """The network in evaluation mode as a graph without operations in place, for any batch."""
    import torch

    with quiet():
        program = trace(checkpoint.module(), torch.zeros(checkpoint.inputs[0].at_batch(2)), checkpoint.network)
        traced: GraphModule = program.run_decompositions({}).module(check_guards=False)
    for node in traced.graph.nodes:  # a view that suits the example may not suit pictures in another memory format
        if node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default
    traced.recompile()
    return traced


def _fold_batch_norms(module: GraphModule) -> None:
    """What was (conv(x) + b - mean) * gain + shift is one convolution, which adds the BatchNorm's own bias. In place.

    The parameters keep their names and the float network its function: a folded BatchNorm is left with mean 0, weight 1
    and a variance that makes 1 with its epsilon, so that folding it once more changes nothing.
    """
    stored = dict(module.named_parameters()) | dict(module.named_buffers())
    for norm in list(module.graph.nodes):
        conv = _convolution_before(norm)
        if conv is None:
            continue
        weights = [conv.args[1], *norm.args[1:5], argument(conv, 2)]
        _fold(*(None if part is None else stored[part.target] for part in weights), epsilon=norm.args[6])
        conv.args = (*conv.args[:2], norm.args[2], *conv.args[3:])
        (item,) = norm.users
        item.replace_all_uses_with(conv)
        module.graph.erase_node(item)
        module.graph.erase_node(norm)
    module.recompile()


def _convolution_before(norm: Any) -> Any:
    """The convolution whose output this BatchNorm alone reads, where nobody else reads their weights."""
    conv, users = argument(norm, 0), list(norm.users)
    if operation(norm) != "_native_batch_norm_legit_no_training" or operation(conv) not in CONVOLUTIONS:
        return None
    weights = [*norm.args[1:5], *(part for part in conv.args[1:3] if part is not None)]
    own = all(is_stored(part) and part is not None and len(part.users) == 1 for part in weights)
    alone = len(conv.users) == len(users) == 1 and argument(users[0], 1) == 0  # the other two outputs are for training
    return conv if own and alone else None


def _fold(*weights: Any, epsilon: float) -> None:
    """In place, computed in float64: the convolution's weight, the BatchNorm's four, the former's bias or None."""
    import torch

    weight, gamma, beta, mean, variance, bias = weights

    with torch.no_grad():
        gain = gamma.double() / torch.sqrt(variance.double() + epsilon)
        before = 0.0 if bias is None else bias.double()
        beta.copy_((before - mean.double()) * gain + beta.double())
        weight.copy_(weight.double() * gain.reshape(-1, *[1] * (weight.ndim - 1)))
        gamma.fill_(1)
        mean.zero_()
        variance.fill_(1 - epsilon)
        if bias is not None:
            bias.zero_()


# --- fake quantization


def _prepare(module: GraphModule, target: str) -> GraphModule:
    """The graph with torchao's fake quantizers where integer kernels of the target will round."""
    with quiet():
        from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
        from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, Quantizer

    class IntegerKernels(Quantizer):  # type: ignore[misc]  # torchao is untyped
        def annotate(self, model: GraphModule) -> GraphModule:
            places = PLACES[target](model.graph)
            specs = _Specs(places, target)
            for node in model.graph.nodes:
                inputs = {tensor: specs.of(tensor) for tensor, reader in places.reads if reader is node}
                if is_layer(node):
                    inputs |= specs.stored(node)
                output = specs.of(node) if node in places.written else None
                if inputs or output:
                    node.meta["quantization_annotation"] = QuantizationAnnotation(inputs, output, _annotated=True)
            return model

        def validate(self, model: GraphModule) -> None:
            """Nothing is annotated that the places do not hold."""

    with quiet():
        prepared: GraphModule = prepare_qat_pt2e(module, IntegerKernels())
    return prepared


@dataclass(frozen=True)
class _Specs:
    """What torchao is told of a tensor."""

    places: Places
    target: str

    def of(self, tensor: Node) -> Any:
        """Of an activation: rounded on its own, or with the range of the tensor that it was made of."""
        from torchao.quantization.pt2e.quantizer import SharedQuantizationSpec

        origin = self.places.origins.get(tensor)
        return self._activation if origin is None else SharedQuantizationSpec(self._first(origin))

    def stored(self, layer: Node) -> dict[Node, Any]:
        """Of a layer's weight; and of its bias where kernels add it in int32, to products of inputs and weights."""
        import torch
        from torchao.quantization.pt2e.quantizer import DerivedQuantizationSpec

        weight, bias = argument(layer, 1), argument(layer, 2)
        if self.target != "cpu" or bias is None:
            return {weight: self._weight}
        int32 = DerivedQuantizationSpec(
            [self._first(argument(layer, 0)), (weight, layer)], _product, torch.int32,
            quant_min=-(2**31), quant_max=2**31 - 1, qscheme=torch.per_channel_symmetric, ch_axis=0,
        )  # fmt: skip
        return {weight: self._weight, bias: int32}

    def _first(self, tensor: Node) -> Any:
        """Where a tensor is quantized first, as torchao names it: where it is written, or where it is read."""
        return tensor if tensor in self.places.written else next(e for e in self.places.reads if e[0] is tensor)

    @property
    def _activation(self) -> Any:
        """uint8 with a zero point, or symmetric int8; ranges follow a moving average of each batch's ends."""
        import torch
        from torchao.quantization.pt2e import FakeQuantize, MovingAverageMinMaxObserver

        cpu = self.target == "cpu"
        return _spec(
            torch.uint8 if cpu else torch.int8,
            torch.per_tensor_affine if cpu else torch.per_tensor_symmetric,
            FakeQuantize.with_args(observer=MovingAverageMinMaxObserver),
            low=0 if cpu else -128,
        )

    @property
    def _weight(self) -> Any:
        """Symmetric int8 for each output channel, as wide as its weights are at this moment."""
        import torch
        from torchao.quantization.pt2e import FakeQuantize, MovingAveragePerChannelMinMaxObserver

        observer = MovingAveragePerChannelMinMaxObserver.with_args(averaging_constant=1.0, eps=_SMALLEST_STEP)
        return _spec(torch.int8, torch.per_channel_symmetric, FakeQuantize.with_args(observer=observer), low=-127)


def _product(fakes: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The steps of a bias, (channels,), and their zero points, from the fake quantizers of input and weight."""
    (scale, _), (scales, zero_points) = (fake.calculate_qparams() for fake in fakes)
    return scale * scales, zero_points


def _spec(dtype: torch.dtype, scheme: torch.qscheme, fake: Any, *, low: int) -> Any:
    """What torchao is told of 8 bits that begin at `low`."""
    import torch
    from torchao.quantization.pt2e.quantizer import QuantizationSpec

    high = torch.iinfo(dtype).max
    return QuantizationSpec(dtype, fake, quant_min=low, quant_max=high, qscheme=scheme, ch_axis=0)


def _name_activations(prepared: GraphModule, weights: Iterable[Any]) -> dict[str, Any]:
    """The fake quantizers of activations by the tensor that comes first to each, such as "relu.3" or "input"."""
    seen, counts = {id(fake) for fake in weights}, Counter[str]()
    named, found = {}, {}
    for node in prepared.graph.nodes:
        if node.op == "placeholder":
            named[node] = "input"
        elif node.op == "call_function":
            named[node] = f"{operation(node)}.{counts[operation(node)]}"
            counts[operation(node)] += 1
        elif node.op == "call_module" and argument(node, 0) in named and id(fake := _fake(prepared, node)) not in seen:
            seen.add(id(fake))
            found[named[argument(node, 0)]] = fake
    return found


def _has_rounded_weight(node: Node) -> bool:
    return operation(node) in LAYERS and argument(node, 1).op == "call_module"


def _fake(prepared: GraphModule, node: Any) -> Any:
    """The fake quantizer that the node calls."""
    return prepared.get_submodule(node.target)


def _make_switchable(prepared: GraphModule, activations: Iterable[Any]) -> None:
    """Lets `train` and `eval` say whether ranges of activations are learned; torchao forbids both. In place.

    Those of weights always follow the weights.
    """
    fakes = list(activations)

    def train(mode: bool = True) -> GraphModule:
        prepared.training = mode
        for fake in fakes:
            fake.enable_observer(mode)
        return prepared

    prepared.train, prepared.eval = train, lambda: train(mode=False)  # type: ignore[method-assign]
    prepared.eval()


def _is_range(tensor: torch.Tensor) -> bool:
    return tensor.shape == (2,) and bool(tensor.isfinite().all()) and bool(tensor[0] <= tensor[1])


def _set_range(fake: Any, low: torch.Tensor, high: torch.Tensor) -> None:
    """Makes the fake quantizer as wide as that, once and for all."""
    fake.activation_post_process.min_val, fake.activation_post_process.max_val = low, high
    scale, zero_point = fake.calculate_qparams()
    fake.scale, fake.zero_point = scale, zero_point.to(fake.zero_point.dtype)
    fake.disable_observer()


def _weight_bounds(prepared: GraphModule, layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The ends of each channel's weights, widened where its bias would overflow int32, the weights being near zero."""
    weight = prepared.get_parameter(layer.args[1].args[0].target)
    largest = weight.detach().abs().flatten(1).amax(dim=1)
    stored = argument(layer, 2)
    if stored is not None:
        name = stored.target if is_stored(stored) else argument(stored, 0).target
        bias = prepared.get_parameter(name).detach()
        step = bias.abs() / (_fake(prepared, layer.args[0]).scale * _LARGEST_BIAS)  # of the weights, at least
        largest = largest.maximum(step * _LARGEST_WEIGHT)
    return -largest, largest
