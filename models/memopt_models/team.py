"""Several processes that train one network: each works on its part of every batch, and all agree on each step."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import numpy as np

from memopt.errors import AnswerIsNo, BackendError, UsageError, first_line
from memopt.tensors import Array

if TYPE_CHECKING:
    import torch
    from torch import nn

PARALLEL = ("ddp", "fsdp2")
_BLOCKS = 16  # into so many groups weights are divided, at most; each takes an exchange
PATIENCE = timedelta(minutes=30)  # for another process that neither answers nor ends


@dataclass(frozen=True)
class Team:
    """The place of this process among those that train together. All of them make the same calls, in the same order.

    With "ddp" each has the whole network (https://docs.pytorch.org/docs/stable/notes/ddp.html). With "fsdp2" weights in
    training, gradients and the optimizer's state are divided among them
    (https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html); the weights are whole in each between two
    epochs alone, when they are judged and saved.
    """

    rank: int = 0  # from 0
    size: int = 1
    parallel: str = "ddp"

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise UsageError(f"rank {self.rank} is none of {self.size} processes")
        if self.parallel not in PARALLEL:
            raise UsageError(f"parallel {self.parallel!r} is not known", hint=", ".join(PARALLEL))

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes and reports."""
        return self.rank == 0

    def part(self, rows: Array) -> slice:
        """Which of the rows of a batch are this process's: parts differ by one row at most.

        >>> [Team(rank, 2).part(np.arange(5)) for rank in (0, 1)]
        [slice(0, 3, None), slice(3, 5, None)]
        """
        sizes = [len(part) for part in np.array_split(rows, self.size)]
        begin = sum(sizes[: self.rank])
        return slice(begin, begin + sizes[self.rank])

    def divide(self, module: nn.Module) -> nn.Module:
        """What is trained in place of the module: with the weights of the first process, in each.

        Raises:
            AnswerIsNo: the network cannot be divided.
        """
        return module if self.size == 1 else _DIVIDE[self.parallel](module)

    def release(self, module: nn.Module, trained: nn.Module) -> None:
        """Frees the weights of a module in whose place a divided one is trained, until they are gathered."""
        if trained is not module and self.parallel == "fsdp2":
            for weight in module.parameters():
                weight.data = weight.data.new_empty(0)

    def gather(self, trained: nn.Module, module: nn.Module) -> None:
        """Gives the module the weights of what is trained, whole, and the first process's running statistics."""
        import torch

        if self.size == 1:
            return
        if self.parallel == "fsdp2":
            for weight, share in zip(module.parameters(), trained.parameters(), strict=True):
                weight.data = whole(share.detach())
            for buffer, own in zip(module.buffers(), trained.buffers(), strict=True):
                buffer.copy_(own)
        for buffer in module.buffers():
            torch.distributed.broadcast(buffer, 0)

    def scatter(self, module: nn.Module, trained: nn.Module) -> None:
        """Gives what is trained the weights of the module."""
        import torch

        if self.size > 1 and self.parallel == "fsdp2":
            with torch.no_grad():
                for source, target in zip(_tensors(module), _tensors(trained), strict=True):
                    target.copy_(like(target, source))

    def add(self, number: float) -> float:
        """The sum of every process's number."""
        import torch

        if self.size == 1:
            return number
        total = torch.tensor(number, dtype=torch.float64)
        torch.distributed.all_reduce(total)
        return total.item()

    @contextmanager
    def first(self) -> Iterator[None]:
        """Inside, the first process goes ahead; the others follow when it is through, and find what it has left."""
        import torch

        if self.size > 1 and not self.is_first:
            torch.distributed.barrier()
        yield
        if self.size > 1 and self.is_first:
            torch.distributed.barrier()

    def share(self, text: str, tensors: Mapping[str, torch.Tensor]) -> tuple[str, dict[str, torch.Tensor]]:
        """The first process's text and tensors; those that the others give do not count."""
        import torch

        if self.size == 1:
            return text, dict(tensors)
        card = {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()}
        told = json.loads(_share_bytes(json.dumps([text, card]).encode()))
        shared = {}
        for name, (dtype, shape) in told[1].items():
            kind = getattr(torch, dtype.removeprefix("torch."))
            shared[name] = tensors[name] if self.is_first else torch.empty(shape, dtype=kind)
            torch.distributed.broadcast(shared[name], 0)
        return told[0], shared

    @contextmanager
    def step(self, trained: nn.Module, *, last: bool) -> Iterator[None]:
        """Around each part of a batch: gradients are added up among the processes after the last one only."""
        if self.size == 1:
            yield
        elif self.parallel == "fsdp2":
            trained.set_requires_gradient_sync(last)  # type: ignore[operator]  # of FSDPModule
            yield
        else:
            with warnings.catch_warnings(), nullcontext() if last else trained.no_sync():  # type: ignore[operator]  # of DistributedDataParallel
                warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")  # of 1x1 weights
                yield


class Lost(BackendError):
    """Another process of the team is gone, or does not answer."""


ALONE = Team()


@contextmanager
def joined(team: Team, *, meeting: str, gpu: int = 0) -> Iterator[Team]:
    """The team, whose processes reach each other inside.

    Args:
        team: the place of this process.
        meeting: where they find each other: "env://" or "file:///PATH", see `torch.distributed.init_process_group`.
        gpu: of this process, where there are some.

    Raises:
        Lost: they do not find each other, or one is gone.
    """
    import torch
    from torch import distributed

    on_gpus = torch.cuda.is_available()
    if on_gpus:
        torch.cuda.set_device(gpu)
    try:
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpus else "gloo", init_method=meeting, rank=team.rank, world_size=team.size,
            timeout=PATIENCE,
        )  # fmt: skip
        yield team
    except RuntimeError as error:
        if not _is_lost(error):
            raise
        problem = f"process {team.rank} of {team.size} has lost another one: {first_line(error)}"
        raise Lost(problem, hint="the same command goes on after the last epoch") from error
    distributed.barrier()  # a process that goes while others still talk to it takes them down
    distributed.destroy_process_group()  # not after an error, when nobody may answer any more


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, of which each process may have had a share; all have to ask."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(model: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor, divided as `model` is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(model, DTensor) and model.shape == tensor.shape:
        return distribute_tensor(tensor, model.device_mesh, model.placements)
    return tensor


def _replicate(module: nn.Module) -> nn.Module:
    from torch import nn

    if next(module.parameters()).device.type == "cuda":  # there alone BatchNorm can look at all parts of a batch
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
    return nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True)


def _shard(module: nn.Module) -> nn.Module:
    """A copy whose weights are divided, block by block: of them one at a time is whole."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(next(module.parameters()).device.type, (torch.distributed.get_world_size(),))
    divided = copy.deepcopy(module)
    try:
        for block in _blocks(divided, least=sum(weight.numel() for weight in module.parameters()) // _BLOCKS):
            fully_shard(block, mesh=mesh)
        fully_shard(divided, mesh=mesh)
    except (ValueError, NotImplementedError) as error:
        raise AnswerIsNo(f"the network cannot be divided: {first_line(error)}", hint="--parallel ddp") from error
    return divided


def _blocks(module: nn.Module, *, least: int) -> list[nn.Module]:
    """The modules inside, innermost first, that have layers and so many weights which no other one before has.

    A layer alone is none: the module around it may use its weights without calling it, as MultiheadAttention does.
    """
    found: list[nn.Module] = []
    taken: set[int] = set()
    for block in reversed(list(module.modules())[1:]):
        own = {id(weight): weight.numel() for weight in block.parameters() if id(weight) not in taken}
        if any(True for _ in block.children()) and sum(own.values()) >= max(least, 1):
            found.append(block)
            taken |= own.keys()
    return found


_DIVIDE = {"ddp": _replicate, "fsdp2": _shard}


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return list(module.state_dict().values())


def _share_bytes(data: bytes) -> bytes:
    """The first process's bytes."""
    import torch

    length = torch.tensor(len(data))
    torch.distributed.broadcast(length, 0)
    buffer = torch.frombuffer(bytearray(data.ljust(int(length))), dtype=torch.uint8)[: int(length)]
    torch.distributed.broadcast(buffer, 0)
    return buffer.numpy().tobytes()


def _is_lost(error: RuntimeError) -> bool:
    """Whether the error is one of reaching others. gloo has no class of its own for that."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or "gloo" in str(error)
