"""Feature maps that a student learns from its teacher, besides the answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from memopt.errors import UsageError
from memopt.tensors import show_shape

if TYPE_CHECKING:
    import torch
    from torch import nn

AUTO = "auto"
Pair = tuple[str, str]  # a layer of the student, and the layer of the teacher that it shall be like
_SHOWN = 4


def pair_up(student: nn.Module, teacher: nn.Module, asked: Sequence[str], example: torch.Tensor) -> list[Pair]:
    """The layers that `asked` names, each with outputs that can be compared.

    Args:
        student: whose layers stand first.
        teacher: whose layers stand second.
        asked: "STUDENT=TEACHER", or AUTO: in both the last layer with a feature map of more than one pixel, which is
            the one before the pooling that forgets places.
        example: an input of both.

    Raises:
        UsageError: no such layer, or its output is neither a feature map nor a vector of features.
    """
    shapes = [_shapes(module, example) for module in (student, teacher)]
    pairs = []
    for text in asked:
        names = [_last_map(found, who) for found, who in zip(shapes, _WHO, strict=True)] if text == AUTO else []
        own, _, other = text.partition("=")
        pair = (names[0], names[1]) if names else (own, other)
        for name, found, who in zip(pair, shapes, _WHO, strict=True):
            _check(name, found, who)
        if len(shapes[0][pair[0]]) != len(shapes[1][pair[1]]):
            both = [f"{name!r} gives {show_shape(found[name])}" for name, found in zip(pair, shapes, strict=True)]
            raise UsageError(f"{both[0]}, {both[1]}: one is a map and the other is not", hint=f"--features {AUTO}")
        pairs.append(pair)
    return pairs


def pupil(student: nn.Module, teacher: nn.Module, pairs: Sequence[Pair], example: torch.Tensor, *, seed: int) -> Any:
    """The student with a projection for each pair: what is trained. `network` is the student.

    A projection is a 1x1 convolution, or a linear layer, from the student's channels to the teacher's: the regressor of
    Romero et al. 2015, https://arxiv.org/abs/1412.6550, section 2.2. It is thrown away after the training.
    """
    import torch
    from torch import nn

    shapes = [_shapes(module, example) for module in (student, teacher)]

    class Pupil(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = student
            self.projections = nn.ModuleList(_projection(shapes[0][own], shapes[1][other]) for own, other in pairs)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.network(x)
            return logits

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Pupil()


def watch(module: nn.Module, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """What these layers have written last, by name, for as long as the module lives."""
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda _layer, _inputs, output: seen.update({name: output})

    for name in names:
        module.get_submodule(name).register_forward_hook(keep(name))
    return seen


def distance(projected: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The mean square of what the features lack, as a share of the teacher's own mean square.

    Of maps of different sizes the larger is pooled. Equation 3 of Romero et al. 2015 but for the share, which makes the
    weight of the features mean the same in every layer.

    Args:
        projected: the student's, (n, channels, height, width) or (n, features).
        wanted: the teacher's, of as many channels.
    """
    from torch.nn import functional

    if projected.ndim == 4:
        height, width = (min(one, other) for one, other in zip(projected.shape[2:], wanted.shape[2:], strict=True))
        size = (height, width)
        projected, wanted = (functional.adaptive_avg_pool2d(each, size) for each in (projected, wanted))
    return functional.mse_loss(projected, wanted) / wanted.square().mean().clamp_min(1e-12)


_WHO = ("student", "teacher")


def _shapes(module: nn.Module, example: torch.Tensor) -> dict[str, tuple[int, ...]]:
    """The shape of what each layer writes last that is one tensor, by name, in the order of execution."""
    import torch

    names = {layer: name for name, layer in module.named_modules() if name}
    shapes: dict[str, tuple[int, ...]] = {}

    def note(layer: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            shapes.pop(names[layer], None)
            shapes[names[layer]] = tuple(output.shape)

    hooks = [layer.register_forward_hook(note) for layer in names]
    was_training = module.training
    module.eval()
    try:
        with torch.inference_mode():
            module(example)
    finally:
        module.train(was_training)
        for hook in hooks:
            hook.remove()
    return shapes


def _last_map(shapes: dict[str, tuple[int, ...]], who: str) -> str:
    maps = [name for name, shape in shapes.items() if len(shape) == 4 and shape[2] * shape[3] > 1]
    if not maps:
        raise UsageError(f"the {who} has no layer with a feature map", hint="--features STUDENT=TEACHER")
    return maps[-1]


def _check(name: str, shapes: dict[str, tuple[int, ...]], who: str) -> None:
    fitting = [known for known, shape in shapes.items() if len(shape) in (2, 4)]
    if name not in shapes:
        raise UsageError(f"the {who} has no layer {name!r}", hint="its last ones: " + ", ".join(fitting[-_SHOWN:]))
    if name not in fitting:
        problem = f"layer {name!r} of the {who} gives {show_shape(shapes[name])}, neither a map nor features"
        raise UsageError(problem, hint="its last ones that do: " + ", ".join(fitting[-_SHOWN:]))


def _projection(own: tuple[int, ...], other: tuple[int, ...]) -> nn.Module:
    from torch import nn

    return nn.Conv2d(own[1], other[1], 1) if len(own) == 4 else nn.Linear(own[1], other[1])
