"""Batches for a network: uint8 pictures go to its device, and become numbers there, in memory that is used again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from memopt.errors import UsageError
from memopt.preprocess import prepare, split_steps
from memopt.tensors import Array
from memopt_models.dataset import Split
from memopt_models.selection import Selection

if TYPE_CHECKING:
    import torch

Step = Mapping[str, Any]
_IN_FLIGHT = 2  # staging buffers of a GPU: one is filled while the other one is copied


class Feeder:
    """Gives a network the batches of one split; after the first one nothing more is allocated for them.

    The inputs are those of `memopt.preprocess.prepare`, to the bit on a CPU. They lie in memory that the next batch
    overwrites: whoever wants to keep them clones them. Moving pictures takes temporary memory for a part of a
    batch.

    Args:
        split: what to feed; a mapped file stays mapped.
        steps: of memopt.preprocess. What decodes, resizes or crops is done before, on the CPU.
        batch_size: of the largest batch.
        device: of the network; None is the CPU.
        layout: of the inputs in memory; None is `torch.contiguous_format`.
    """

    def __init__(
        self, split: Split, steps: Sequence[Step], *, batch_size: int, device: torch.device | None = None,
        layout: torch.memory_format | None = None,
    ) -> None:  # fmt: skip
        import torch

        self._split, self._size = split, min(batch_size, len(split))
        pictures, numbers = split_steps(steps)
        first = split.images[:1]
        self._pictures = _that_change(first, pictures)
        shape, dtype = prepare(first, self._pictures).shape[1:], torch.from_numpy(first.copy()).dtype
        place = device or torch.device("cpu")
        with torch.inference_mode(mode=False):  # tensors made in there could not be trained on later
            self._images = Staging((self._size, *shape), dtype, place)
            self._labels = Staging((self._size,), torch.int64, place)
            self._numbers = _Numbers(numbers, self._images.shape, dtype, place, layout or torch.contiguous_format)

    def batch(self, rows: Array | slice, moves: Array | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and labels of these rows of the split, at most `batch_size`, on the device; valid until the next call.

        Args:
            rows: their order is kept; sorted ones read a mapped file from front to back.
            moves: (rows, 2), by how many pixels each picture is moved, see `draw_moves`; None moves none.

        Raises:
            UsageError: something is to be moved that is no picture.
        """
        labels = self._split.labels[rows]
        images = self._images.to_fill(len(labels))
        if self._pictures:
            images[...] = prepare(self._split.images[rows], self._pictures)
        else:
            _take(self._split.images, rows, images)
        if moves is not None and moves.any():
            if not self._split.are_pictures:
                raise UsageError(f"samples of {images.dtype} are no pictures that could be shifted", hint="--shift 0")
            shift_pictures(images, moves)
        self._labels.to_fill(len(labels))[...] = labels
        return self._numbers.of(self._images.send(len(labels))), self._labels.send(len(labels))

    def in_order(self, moves: Array | None = None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Every sample of the split, `batch_size` at a time; the last batch may be smaller. `moves` as in `batch`."""
        for start in range(0, len(self._split), self._size):
            rows = slice(start, start + self._size)
            yield self.batch(rows, None if moves is None else moves[rows])


class Staging:
    """Memory for a batch on the CPU, and on the device where that is another: pinned, and in turn, for a GPU.

    Args:
        shape: of the largest batch; the first axis counts the samples.
        dtype: of its elements.
        device: where `send` brings it.
        pinned: whether the memory on the CPU is page-locked, so that copies from it need not be waited for.
    """

    def __init__(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, *, pinned: bool | None = None
    ) -> None:
        import torch

        on_gpu = device.type == "cuda"
        count = _IN_FLIGHT if on_gpu else 1
        locked = on_gpu if pinned is None else pinned
        self.shape = tuple(shape)
        self._hosts = [torch.empty(self.shape, dtype=dtype, pin_memory=locked) for _ in range(count)]
        self._device = torch.empty(self.shape, dtype=dtype, device=device) if device.type != "cpu" else None
        self._copied = [torch.cuda.Event() for _ in range(count)] if on_gpu else []  # type: ignore[no-untyped-call]
        self._turn = 0

    def to_fill(self, count: int) -> Array:
        """The first `count` samples, to be written; waits until what was there has been copied."""
        if self._copied:
            self._copied[self._turn].synchronize()
        filled: Array = self._hosts[self._turn][:count].numpy()
        return filled

    def send(self, count: int) -> torch.Tensor:
        """What was filled, on the device; the copy may be under way still, ahead of what is computed there next."""
        host = self._hosts[self._turn][:count]
        if self._device is None:
            return host
        sent = self._device[:count]
        sent.copy_(host, non_blocking=bool(self._copied))
        if self._copied:
            self._copied[self._turn].record()
        self._turn = (self._turn + 1) % len(self._hosts)
        return sent


class Arithmetic:
    """What the steps `scale` and `normalize` do to numbers, for torch: the same operations in the same order.

    Args:
        steps: of memopt.preprocess; `layout` is not looked at.
        axis: of the channels, counted from the back.
        device: where the numbers will be.
    """

    def __init__(self, steps: Sequence[Step], *, axis: int, device: torch.device | str = "cpu") -> None:
        import torch

        def number(values: Any) -> torch.Tensor:
            array = np.atleast_1d(np.asarray(values, np.float32))
            return torch.from_numpy(array.reshape(-1, *[1] * (-1 - axis))).to(device)

        # Tensors and no plain numbers: a division by one of those is a multiplication on a GPU.
        self.operations: list[tuple[str, torch.Tensor]] = []
        for step in steps:
            if step["op"] == "scale":
                self.operations.append(("mul", number(step["factor"])))
            if step["op"] == "normalize":
                self.operations += [("sub", number(step["mean"])), ("div", number(step["std"]))]

    def apply_(self, numbers: torch.Tensor) -> torch.Tensor:
        """The numbers, changed in place."""
        for name, operand in self.operations:
            getattr(numbers, f"{name}_")(operand)
        return numbers


def draw_moves(count: int, distance: int, rng: np.random.Generator) -> Array:
    """By how many pixels each of `count` pictures is moved down and right: (count, 2), within ±distance.

    A distance of 0 draws nothing.
    """
    if distance == 0:
        return np.zeros((count, 2), np.int64)
    return rng.integers(0, 2 * distance + 1, (2, count)).T - distance


def shift_pictures(images: Array, moves: Array) -> None:
    """Moves each picture in place, a window that goes down and right over it; edge pixels fill the gap.

    Args:
        images: (n, height, width, channels).
        moves: (n, 2), pixels down and right, see `draw_moves`.
    """
    _move(images, moves[:, 0])
    _move(images.swapaxes(1, 2), moves[:, 1])


def _move(images: Array, moves: Array) -> None:
    """Each picture's row y becomes what its row y + move was, or the nearest row that there is."""
    height = images.shape[1]
    for move in range(moves.min(), moves.max() + 1):
        if move:
            rows = np.flatnonzero(moves == move)
            sources = np.clip(np.arange(height) + move, 0, height - 1)
            images[rows] = images[rows[:, None], sources]


def _take(images: Array | Selection, rows: Array | slice, into: Array) -> None:
    """The rows, without memory for a copy of them where the pictures lie one after another."""
    if isinstance(images, Selection):
        _take(images.array, images.rows[rows], into)
    elif isinstance(rows, slice):
        into[...] = images[rows]
    elif _is_plain(images) and len(rows) and rows.min() >= 0 and rows.max() < len(images):
        np.take(images, rows, axis=0, out=into, mode="clip")  # with mode "raise" numpy would fill a copy first
    else:
        into[...] = images[rows]


def _is_plain(images: Array) -> bool:
    """Whether numpy takes rows without copying all of them first, to have them aligned and one after another."""
    return images.flags.c_contiguous and images.flags.aligned


def _that_change(images: Array, steps: Sequence[Step]) -> list[Step]:
    """The steps that do not leave pictures of this size and colour as they are."""
    changing: list[Step] = []
    for step in steps:
        after = prepare(images, [step])
        if after.shape != images.shape:
            changing.append(step)
        images = after
    return changing


class _Numbers:
    """Makes a network's inputs of a batch of pictures, always in the same memory."""

    def __init__(
        self, steps: Sequence[Step], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device,
        layout: torch.memory_format,
    ) -> None:  # fmt: skip
        import torch

        self._turned = any(step["op"] == "layout" for step in steps)
        self._arithmetic = Arithmetic(steps, axis=-3 if self._turned else -1, device=device)
        size = (shape[0], shape[3], shape[1], shape[2]) if self._turned else shape
        self._inputs: torch.Tensor | None = None
        if self._turned or self._arithmetic.operations or layout is not torch.contiguous_format:
            kind = torch.float32 if self._arithmetic.operations else dtype
            self._inputs = torch.empty(size, dtype=kind, device=device, memory_format=layout)

    def of(self, images: torch.Tensor) -> torch.Tensor:
        if self._inputs is None:
            return images
        inputs = self._inputs[: len(images)]
        inputs.copy_(images.permute(0, 3, 1, 2) if self._turned else images)
        return self._arithmetic.apply_(inputs)
