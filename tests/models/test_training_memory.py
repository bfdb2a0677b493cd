from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memopt.errors import OutOfResource
from memopt.memory import settled_resident
from memopt_models.checkpoint import Checkpoint
from memopt_models.data import DataSet
from memopt_models.train import AUTO, Progress, TrainSettings, train
from memopt_models.training_memory import Ledger, _Search, settle
from memopt_models.training_probe import Peak, Refusal, Subject

MIB = 2**20
SLACK = 16  # MiB that a search adds to what it measures


class _Machine:
    """Trainings that need so many MiB and so many more for each sample of a part; counts what is measured."""

    def __init__(self, held: int, each: int, *, least: int = 1, device: bool = False) -> None:
        self.held, self.each, self.least, self.device = held, each, least, device
        self.measured: list[TrainSettings] = []

    def __call__(self, how: TrainSettings, cap_bytes: int | None) -> Peak | Refusal:
        self.measured.append(how)
        if how.micro_batch < self.least:
            return Refusal("too few")
        each = self.each / (2 if how.checkpointing == "blocks" else 1)
        peak = round((self.held + each * how.micro_batch) * MIB)
        if self.device:
            return Peak(MIB, peak)
        return Refusal("too much") if cap_bytes is not None and peak > cap_bytes else Peak(peak)


def _search(machine: _Machine, batch: int, limit: int, *, held: int = 0) -> _Search:
    limits: dict[str, Any] = {"max_memory_bytes": limit * MIB}
    if machine.device:
        limits = {"max_device_memory_bytes": limit * MIB, "device": "cuda"}
    how = TrainSettings(epochs=1, batch_size=batch, accumulate=1, **limits)
    return _Search(how, lambda: held * MIB, machine, lambda text: None, Ledger())


@given(
    st.integers(1, 200), st.integers(0, 500), st.integers(1, 50), st.integers(0, 3000), st.integers(1, 3), st.booleans()
)
def test_the_largest_part_that_fits_is_found_by_few_probes(
    batch: int, base: int, each: int, room: int, least: int, device: bool
) -> None:
    machine, limit = _Machine(base, each, least=least, device=device), base + each + SLACK + room
    sizes = [n for n in [*(2**k for k in range(8) if 2**k < batch), batch] if n >= min(least, batch)]
    slack = 0 if device else SLACK
    fitting = [n for n in sizes if n >= least and base + n * each + slack <= limit]
    search = _search(machine, batch, limit)
    if not fitting:
        with pytest.raises(OutOfResource):
            search.run()
        return
    assert search.run() == fitting[-1]
    assert len(machine.measured) <= 7
    assert len({how.accumulate for how in machine.measured}) == len(machine.measured)


def test_a_batch_that_fits_whole_takes_one_probe() -> None:
    machine = _Machine(100, 1)
    assert _search(machine, 64, 1000).run() == 64
    assert [how.accumulate for how in machine.measured] == [1]


def test_what_was_chosen_is_said_with_the_reason() -> None:
    search = _search(_Machine(100, 20), 64, 313, held=50)
    assert search.explain(search.run()) == "micro-batch 4 x 16 = 64: peak 246 MiB of 313 MiB; 8 would need 326 MiB"
    assert search.ledger.memory["probes"][0] == {"micro_batch": 64, "refused": "too much"}
    assert {"micro_batch": 4, "peak_bytes": 246 * MIB} in search.ledger.memory["probes"]


def test_what_is_not_measured_is_said_to_be_about() -> None:
    search = _search(_Machine(100, 100), 64, 620)
    assert (
        search.explain(search.run()) == "micro-batch 4 x 16 = 64: peak 516 MiB of 620 MiB; 8 would need about 916 MiB"
    )


def test_a_whole_batch_is_said_without_what_would_be_larger() -> None:
    search = _search(_Machine(100, 1), 8, 300)
    assert search.explain(search.run()) == "micro-batch 8 x 1 = 8: peak 124 MiB of 300 MiB"


def test_one_sample_that_is_too_few_for_the_network_is_passed_over() -> None:
    search = _search(_Machine(100, 20, least=2), 64, 170)
    assert search.run() == 2


def test_a_limit_that_cannot_do_is_refused_with_the_setting_that_can() -> None:
    with pytest.raises(OutOfResource) as raised:
        _search(_Machine(100, 100), 64, 230, held=50).run()
    assert str(raised.value) == (
        "a micro-batch of 1 does not fit: peak 266 MiB of 230 MiB, 50.0 MiB of it before the network; "
        "hint: --checkpointing blocks"
    )
    assert raised.value.exit_code == 6


def test_a_limit_that_nothing_can_keep_is_refused_with_the_least_that_works() -> None:
    with pytest.raises(OutOfResource, match="hint: --checkpointing blocks --max-memory 216MiB"):
        _search(_Machine(100, 100), 64, 100, held=50).run()
    with pytest.raises(OutOfResource, match="hint: --checkpointing blocks --max-device-memory 150MiB"):
        _search(_Machine(100, 100, device=True), 64, 100, held=50).run()


def test_what_is_asked_for_is_not_tried(dense: Checkpoint, few: DataSet) -> None:
    ledger = Ledger()
    for how in (TrainSettings(1, accumulate=4, max_memory_bytes=1), TrainSettings(1)):
        assert settle(Subject(dense), few, how, ledger, stage="x").accumulate == (how.accumulate or 1)
    assert ledger.memory == {}


def test_a_lineage_tells_the_peak_of_each_epoch(dense: Checkpoint) -> None:
    (stage,) = dense.lineage
    peaks = stage.settings["memory"]["peak_bytes"]["train"]
    assert len(peaks) == 4
    assert all(peak > MIB for peak in peaks)


@pytest.mark.slow
def test_a_training_with_a_limit_chooses_says_and_keeps_it(few: DataSet) -> None:
    """Measured for real: a layer of 1568 x 6000 numbers is held four times, and parts hardly count."""
    seen: list[Progress] = []
    held = settled_resident()
    limit = held + 500 * MIB
    how = TrainSettings(epochs=1, batch_size=64, accumulate=AUTO, max_memory_bytes=limit)
    made = train("simple_cnn", {"hidden": 6000}, few, how, on_step=seen.append)
    notes = [progress.note for progress in seen if progress.note]
    assert notes[0] == "measuring a part of 64 of 64 …"
    assert notes[-1].startswith("micro-batch 64 x 1 = 64: peak ")
    (stage,) = made.lineage
    (probe,) = stage.settings["memory"]["probes"]
    (peak,) = stage.settings["memory"]["peak_bytes"]["train"]
    assert stage.settings["accumulate"] == 1
    assert peak <= probe["peak_bytes"] <= limit
    assert peak > held + 4 * 4 * made.parameters
