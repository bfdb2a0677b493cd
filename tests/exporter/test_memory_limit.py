import re
import resource

import numpy as np
import pytest

from memopt.errors import OutOfResource
from memopt.memory import settled_resident
from memopt_export import memory_limit
from memopt_export.means import UNLIMITED
from memopt_export.quantize import quantize
from memopt_export.recipe import Recipe

MIB = 2**20
INT8 = Recipe("int8")


def test_smaller_runs_and_pieces_need_less(graph, samples):
    large = memory_limit.estimate(graph, INT8, samples, UNLIMITED)
    fitted = memory_limit.fit(graph, INT8, samples, UNLIMITED, settled_resident() + 64 * MIB)
    small = memory_limit.estimate(graph, INT8, samples, fitted)
    assert small.total_bytes <= min(64 * MIB, large.total_bytes)
    assert small.run_bytes <= large.run_bytes


def test_a_correction_needs_more_than_none(graph, samples):
    plain = memory_limit.estimate(graph, Recipe("int8", correction="none"), samples, UNLIMITED)
    assert plain.layer_bytes < memory_limit.estimate(graph, INT8, samples, UNLIMITED).layer_bytes


def test_the_estimate_is_told_in_words(graph, samples):
    need = memory_limit.Need(weights_bytes=4 * MIB, piece_bytes=2 * MIB, run_bytes=MIB, layer_bytes=MIB)
    assert need.text().startswith("at most 39.0 MiB more memory: copies of the graph 4.00 MiB")


def test_a_limit_that_cannot_do_is_refused_with_one_that_can(graph, samples):
    with pytest.raises(
        OutOfResource, match=r"the limit is 1\.00 MiB; the process holds .* and needs at most"
    ) as refused:
        memory_limit.fit(graph, INT8, samples, UNLIMITED, MIB)
    least = int(re.fullmatch(r"--memory-limit (\d+)MiB", refused.value.hint)[1])
    room = 32  # what the process holds changes a little between two looks
    memory_limit.fit(graph, INT8, samples, UNLIMITED, (least + room) * MIB)  # does not raise


def test_bytes_are_the_same_within_a_limit(graph, samples):
    limit = settled_resident() + 128 * MIB
    means = memory_limit.fit(graph, INT8, samples, UNLIMITED, limit)
    with memory_limit.hard_cap(limit):
        capped = quantize(graph, INT8, samples, means)
    assert capped.graph.data == quantize(graph, INT8, samples).graph.data


def test_the_kernel_keeps_the_limit_and_lets_it_go_afterwards():
    before = resource.getrlimit(resource.RLIMIT_DATA)
    limit = settled_resident() + 64 * MIB
    with pytest.raises(OutOfResource, match="were needed; hint: --memory-limit"), memory_limit.hard_cap(limit):
        np.ones(2**30, np.uint8)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
