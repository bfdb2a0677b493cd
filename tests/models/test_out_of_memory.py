from __future__ import annotations

import resource

import pytest
import torch

from memopt.errors import OutOfResource
from memopt.memory import settled_resident
from memopt_models.out_of_memory import limited

MIB = 2**20
CPU = torch.device("cpu")


def test_the_kernel_keeps_the_limit_and_lets_it_go_afterwards() -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    limit = settled_resident() + 64 * MIB
    with pytest.raises(OutOfResource) as raised, limited(CPU, host_bytes=limit, device_bytes=None):
        torch.ones(2**28)
    assert "the training ran out of memory within " in str(raised.value)
    assert " of the host: " in str(raised.value)
    assert "; hint: smaller parts of a batch, such as --accumulate 16, --checkpointing blocks" in str(raised.value)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    assert torch.ones(2**25).sum() == 2**25


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="size of tensor"), limited(CPU, host_bytes=None, device_bytes=None):
        torch.ones(2) + torch.ones(3)


def test_memory_that_runs_out_without_a_limit_is_told_as_well() -> None:
    with (
        pytest.raises(OutOfResource, match="the training ran out of memory: "),
        limited(CPU, host_bytes=None, device_bytes=None),
    ):
        raise MemoryError
