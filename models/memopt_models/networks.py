"""Networks by name: our two small ones, every torchvision classifier, and the user's own `pkg.mod:factory`."""

from __future__ import annotations

import difflib
import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from memopt.errors import UsageError
from memopt.strict_json import to_plain
from memopt_models.factories import load_factory

if TYPE_CHECKING:
    from torch import nn

# What torchvision would warn about or answer with a tuple, unless it is told.
_TORCHVISION_SETTINGS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}


def build(network: str, settings: Mapping[str, Any]) -> nn.Module:
    """The network with fresh weights, drawn from torch's global generator.

    Args:
        network: a name in NETWORKS, a torchvision classification model, or `pkg.mod:factory`.
        settings: the factory's keyword arguments; for torchvision `classes`, `in_channels` and the model's own.

    Raises:
        UsageError: the network or one of its settings does not exist.
    """
    from torch import nn

    factory = find_factory(network)
    try:
        inspect.signature(factory).bind(**settings)
    except TypeError as error:
        raise UsageError(f"network {network!r} cannot be built with {dict(settings)}: {error}") from error
    module = factory(**settings)
    if not isinstance(module, nn.Module):
        raise UsageError(f"{network!r} returned a {type(module).__name__}, not a torch.nn.Module")
    return module


def complete(network: str, settings: Mapping[str, Any], *, classes: int, shape: Sequence[int]) -> dict[str, Any]:
    """The settings with `classes`, `in_channels` and `size` of the data added where the factory has such a parameter.

    Args:
        network: as in `build`.
        settings: what the user asked for; it wins.
        classes: number of labels.
        shape: (channels, height, width) of one input.

    >>> complete("simple_cnn", {"hidden": 32}, classes=10, shape=(1, 28, 28))
    {'classes': 10, 'in_channels': 1, 'size': [28, 28], 'hidden': 32}
    """
    channels, height, width = shape
    known = {"classes": classes, "in_channels": channels, "size": [height, width]}
    parameters = inspect.signature(find_factory(network)).parameters
    completed: dict[str, Any] = to_plain({name: known[name] for name in known if name in parameters} | dict(settings))
    return completed


def find_factory(network: str) -> Callable[..., Any]:
    """What builds the network of this name; UsageError suggests names that look alike."""
    if ":" in network:
        return load_factory(network)
    if network in NETWORKS:
        return NETWORKS[network]
    if is_torchvision(network):
        return partial(torchvision_classifier, network)
    alike = difflib.get_close_matches(network, [*NETWORKS, *_torchvision_names()])
    hint = (
        f"did you mean {' or '.join(alike)}?"
        if alike
        else f"{', '.join(NETWORKS)}, a torchvision model or pkg.mod:factory"
    )
    raise UsageError(f"network {network!r} is not known", hint=hint)


def is_torchvision(network: str) -> bool:
    """Whether this is the name of one of torchvision's classifiers."""
    return ":" not in network and network not in NETWORKS and network in _torchvision_names()


def first_convolution(module: nn.Module) -> str:
    """The name of the convolution that takes the input; "" where there is none."""
    from torch import nn

    return next((name for name, layer in module.named_modules() if isinstance(layer, nn.Conv2d)), "")


def simple_cnn(
    classes: int = 10,
    in_channels: int = 1,
    size: int | Sequence[int] = 28,
    channels: Sequence[int] = (16, 32),
    hidden: int = 128,
) -> nn.Module:
    """Two 3x3 convolutions, each with ReLU and 2x2 max pooling, and two fully connected layers.

    Args:
        classes: number of outputs.
        in_channels: channels of the input.
        size: height and width of the input, or one number for both; 28x28 gives 32 x 7 x 7 = 1568 features.
        channels: outputs of the two convolutions.
        hidden: outputs of the first fully connected layer.
    """
    from torch import nn

    _check_positive(classes=classes, in_channels=in_channels, hidden=hidden)
    first, second = _pair("channels", channels, hint="channels = [16, 32]")
    height, width = _pair("size", [size, size] if isinstance(size, int) else size, hint="size = [28, 28]")
    if min(height, width) < 4:
        raise UsageError(f"size is {[height, width]}, two poolings leave nothing of it", hint="size = [28, 28]")
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=nn.Conv2d(in_channels, first, kernel_size=3, padding=1),
        relu1=nn.ReLU(),
        pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(first, second, kernel_size=3, padding=1),
        relu2=nn.ReLU(),
        pool2=nn.MaxPool2d(2),
        flatten=nn.Flatten(),
        fc1=nn.Linear(second * (height // 4) * (width // 4), hidden),
        relu3=nn.ReLU(),
        fc2=nn.Linear(hidden, classes),
    )
    return nn.Sequential(layers)


def ds_cnn(classes: int = 10, in_channels: int = 1, width: int = 8, depth: int = 3) -> nn.Module:
    """A student of a few thousand parameters: strided 3x3 stem, depthwise-separable blocks, global average, one layer.

    Block k of `depth` has width * (k + 1) outputs, and every second one halves height and width. Blocks are those of
    MobileNet (Howard et al. 2017, https://arxiv.org/abs/1704.04861): each convolution with BatchNorm and ReLU.

    Args:
        classes: number of outputs.
        in_channels: channels of the input.
        width: outputs of the stem.
        depth: number of blocks.
    """
    from torch import nn

    _check_positive(classes=classes, in_channels=in_channels, width=width, depth=depth)
    layers: OrderedDict[str, nn.Module] = OrderedDict(stem=_conv_norm_relu(in_channels, width, kernel=3, stride=2))
    for k in range(1, depth + 1):
        layers[f"block{k}"] = _separable(width * k, width * (k + 1), stride=2 if k % 2 == 0 else 1)
    layers["pool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["fc"] = nn.Linear(width * (depth + 1), classes)
    return nn.Sequential(layers)


def tiny_cnn(classes: int = 10, in_channels: int = 1, channels: Sequence[int] = (8, 16, 22, 28, 30)) -> nn.Module:
    """A student for the smallest files: 3x3 stem, separable blocks, two max poolings, global average, one layer.

    In a block a depthwise 3x3 convolution goes straight into the pointwise one, without BatchNorm, bias or ReLU between
    them (Chollet 2017, section 4.7, https://arxiv.org/abs/1610.02357, found it better so). That saves bytes twice: no
    BatchNorm widens single channels, so that 4 bits are enough for these kernels as well. Height and width are halved
    after the stem and after the first half of the blocks, by pooling, which needs no weights. The blocks differ in
    nothing but their channels: a compact graph says once what they do.

    Args:
        classes: number of outputs.
        in_channels: channels of the input.
        channels: outputs of the stem and of every block.
    """
    from torch import nn

    _check_positive(classes=classes, in_channels=in_channels)
    if not isinstance(channels, (list, tuple)) or len(channels) < 2:
        raise UsageError(f"channels is {channels!r}, two numbers at least are needed", hint="channels = [12, 20, 24]")
    for width in channels:
        _check_positive(channels=width)
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        stem=_conv_norm_relu(in_channels, channels[0], kernel=3), pool1=nn.MaxPool2d(2)
    )
    for k in range(1, len(channels)):
        inputs, outputs = channels[k - 1], channels[k]
        block: OrderedDict[str, nn.Module] = OrderedDict(
            depthwise=nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False),
            pointwise=_conv_norm_relu(inputs, outputs, kernel=1),
        )
        layers[f"block{k}"] = nn.Sequential(block)
        if k == len(channels) // 2:
            layers["pool2"] = nn.MaxPool2d(2)
    layers["mean"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["fc"] = nn.Linear(channels[-1], classes, bias=False)
    return nn.Sequential(layers)


def torchvision_classifier(name: str, *, classes: int, in_channels: int = 3, **settings: Any) -> nn.Module:
    """A torchvision model without pretrained weights, its first convolution made to take `in_channels`."""
    import torchvision

    _check_positive(classes=classes, in_channels=in_channels)
    arguments = {**_TORCHVISION_SETTINGS.get(name, {}), **settings, "weights": None, "num_classes": classes}
    try:
        module: nn.Module = torchvision.models.get_model(name, **arguments)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UsageError(f"network {name!r} cannot be built with {settings}: {error}") from error
    if in_channels != 3:
        _change_first_convolution(module, in_channels)
    return module


NETWORKS: dict[str, Callable[..., nn.Module]] = {"simple_cnn": simple_cnn, "ds_cnn": ds_cnn, "tiny_cnn": tiny_cnn}


def _torchvision_names() -> list[str]:
    import torchvision

    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return names


def _separable(inputs: int, outputs: int, *, stride: int) -> nn.Module:
    from torch import nn

    layers: OrderedDict[str, nn.Module] = OrderedDict(
        depthwise=_conv_norm_relu(inputs, inputs, kernel=3, stride=stride, groups=inputs),
        pointwise=_conv_norm_relu(inputs, outputs, kernel=1),
    )
    return nn.Sequential(layers)


def _conv_norm_relu(inputs: int, outputs: int, *, kernel: int, stride: int = 1, groups: int = 1) -> nn.Module:
    from torch import nn

    convolution = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False)
    layers: OrderedDict[str, nn.Module] = OrderedDict(conv=convolution, norm=nn.BatchNorm2d(outputs), relu=nn.ReLU())
    return nn.Sequential(layers)


def _change_first_convolution(module: nn.Module, in_channels: int) -> None:
    from torch import nn

    first = module.get_submodule(first_convolution(module))
    assert isinstance(first, nn.Conv2d)  # of torchvision's classifiers each begins with one
    first.in_channels = in_channels
    first.weight = nn.Parameter(first.weight.new_empty(first.out_channels, in_channels, *first.kernel_size))
    first.reset_parameters()


def _check_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if type(number) is not int or number < 1:  # True is an int, too
            raise UsageError(f"{name} is {number!r}, a positive number is needed")


def _pair(name: str, value: Sequence[int], *, hint: str) -> tuple[int, int]:
    """The two positive numbers that a setting has to be."""
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise UsageError(f"{name} is {value!r}, two numbers are needed", hint=hint)
    for number in value:
        _check_positive(**{name: number})
    return value[0], value[1]
