from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import memopt
from memopt.batching import MemoryCurve
from memopt.bundle import Bundle, open_bundle
from memopt.choice import choose
from memopt.errors import BackendError, InputRefused, IntegrityError, OutOfResource, UsageError
from memopt.manifest import File, MemoryPoint
from memopt.model import Model
from memopt.tensors import Array

SIZES = {"cuda": 2**30, "cpu": 2**10}


@pytest.fixture
def model(tiny_bundle: Path) -> Iterator[Model]:
    with memopt.load(tiny_bundle, device="cpu", variant="large") as opened:
        yield opened


def test_the_golden_inputs_give_the_golden_outputs(tiny_bundle: Path, model: Model) -> None:
    bundle = open_bundle(tiny_bundle)
    got = model(bundle.golden_inputs()["input"])
    np.testing.assert_allclose(got, bundle.golden_outputs("large")[0], rtol=1e-5)


def test_run_has_onnxruntimes_signature(model: Model, tiny_inputs: Array) -> None:
    (everything,) = model.run(None, {"input": tiny_inputs})
    (named,) = model.run(["logits"], {"input": tiny_inputs})
    assert np.array_equal(everything, named)
    with pytest.raises(InputRefused, match="output 'x' does not exist; hint: logits"):
        model.run(["x"], {"input": tiny_inputs})


def test_predict_takes_files_and_arrays(model: Model, picture: Path) -> None:
    from memopt.image import read_image

    by_file, by_array, by_plane = model.predict([picture, read_image(picture), read_image(picture)[..., 0]], topk=2)
    assert by_file == by_array == by_plane
    assert [p.label in ("zero", "one", "two") for p in by_file] == [True, True]
    assert by_file[0].probability >= by_file[1].probability > 0
    assert model.predict([]) == []


def test_predictions_over_all_classes_sum_to_one(model: Model, picture: Path) -> None:
    (best,) = model.predict([picture], topk=10)
    assert sum(p.probability for p in best) == pytest.approx(1.0)


@pytest.mark.parametrize("bad", [np.zeros((8, 8), np.float32), np.zeros((1, 1, 8, 8), np.uint8)])
def test_pictures_are_uint8_planes(model: Model, bad: Array) -> None:
    with pytest.raises(InputRefused, match="a picture is uint8"):
        model.predict([bad])


def test_the_wrong_number_of_inputs_is_refused(model: Model, tiny_inputs: Array) -> None:
    with pytest.raises(InputRefused, match="1 inputs, got 2"):
        model(tiny_inputs, tiny_inputs)


def test_fit_batch_splits_larger_inputs_without_changing_the_result(model: Model, tiny_inputs: Array) -> None:
    whole = model(tiny_inputs)
    fit = model.fit_batch(8 * 2**20 + 5 * 2**16)
    assert fit.batch == 5
    assert fit.need_bytes <= fit.limit_bytes
    np.testing.assert_allclose(model(tiny_inputs), whole, rtol=1e-5)
    assert model.fit_batch("1GiB").batch == 32  # the largest that was measured: nothing is extrapolated
    with pytest.raises(OutOfResource, match=r"needs 8\.06 MiB at batch 1, the limit is 1\.00 MiB"):
        model.fit_batch("1MiB")


def test_the_bill_is_above_the_baseline(model: Model, tiny_inputs: Array) -> None:
    model(tiny_inputs)
    bill = model.memory()
    assert set(bill.phases) == {"import", "load", "steady"}
    steady = bill.phases["steady"]
    assert steady.private_bytes is not None
    assert 0 < steady.private_bytes < 64 * 2**20
    assert steady.peak_bytes is None  # that of the process, not of the model


def test_use_after_close_is_refused(tiny_bundle: Path, tiny_inputs: Array) -> None:
    with memopt.load(tiny_bundle, device="cpu") as opened:
        pass
    with pytest.raises(BackendError, match="is closed"):
        opened(tiny_inputs)


def test_without_a_limit_the_smallest_accurate_variant_is_taken(tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    assert choose(bundle, device="cpu").variant.id == "large"
    assert choose(bundle, device="cpu", max_drop=2.5).variant.id == "small"


def test_a_tight_limit_takes_the_most_accurate_that_fits_and_says_so(tiny_bundle: Path) -> None:
    chosen = choose(open_bundle(tiny_bundle), device="cpu", memory_limit=4 * 2**20)
    assert chosen.variant.id == "small"
    assert "the most accurate within 4.00 MiB, 2.00 pp below the best" in chosen.why[-1]


def test_a_limit_that_nothing_meets_names_the_least_that_is_needed(tiny_bundle: Path) -> None:
    needs = r"^large needs 8\.06 MiB at batch 1, limit {} MiB; smallest variant: small 2\.06 MiB; hint: {}$"
    with pytest.raises(OutOfResource, match=needs.format(r"1\.00", "memory_limit=2162688")):
        memopt.load(tiny_bundle, device="cpu", memory_limit="1MiB")
    with pytest.raises(OutOfResource, match=needs.format(r"4\.00", "variant='small'")):
        memopt.load(tiny_bundle, device="cpu", variant="large", memory_limit="4MiB")


def test_a_variant_at_exactly_the_allowed_drop_is_accurate(tiny_bundle: Path) -> None:
    assert choose(open_bundle(tiny_bundle), device="cpu", max_drop=2.0).variant.id == "small"  # 0.97 against 0.95


def test_auto_goes_on_to_the_next_device_when_nothing_fits_on_the_first(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from memopt import choice, ort_runtime

    monkeypatch.setattr(ort_runtime, "unavailable", lambda device: None)  # as if there were a GPU
    monkeypatch.setattr(choice, "memory_curve", lambda v, *, runtime, device: MemoryCurve(((1, SIZES[device]),), "x"))
    chosen = choose(open_bundle(tiny_bundle), device="auto", memory_limit=2**20)
    assert chosen.device == "cpu"
    assert any(
        "large on onnxruntime cuda: needs 1.00 GiB at batch 1, the limit is 1.00 MiB" in line for line in chosen.why
    )


def test_auto_falls_back_in_the_stated_order_and_says_why(tiny_bundle: Path) -> None:
    chosen = choose(open_bundle(tiny_bundle), device="auto")
    assert chosen.why[0].startswith("tensorrt cuda:")
    assert chosen.device in ("cuda", "cpu")


def test_a_named_device_is_required(tiny_bundle: Path) -> None:
    with pytest.raises(BackendError, match="nothing that runs on tensorrt"):
        memopt.load(tiny_bundle, device="tensorrt")
    with pytest.raises(UsageError, match="device 'npu' is not known"):
        memopt.load(tiny_bundle, device="npu")
    with pytest.raises(UsageError, match="no variant 'x'; hint: one of large, small"):
        memopt.load(tiny_bundle, variant="x")
    with pytest.raises(UsageError, match="'12QB' is not a size"):
        memopt.load(tiny_bundle, memory_limit="12QB")


@pytest.fixture
def damaged(tiny_bundle: Path, tmp_path: Path, flipped: Callable) -> Callable[[str], Path]:
    """A function that flips the highest bit in the middle of an entry: damaged(name) -> bundle."""

    def damage(name: str) -> Path:
        data, entry = tiny_bundle.read_bytes(), bytes(open_bundle(tiny_bundle).entries[name])
        path = tmp_path / "damaged.mopt"
        path.write_bytes(flipped(data, data.index(entry) + len(entry) // 2, 7))
        return path

    return damage


def test_lazily_checked_weights_give_their_result_only_when_they_hold(
    tiny_bundle: Path, damaged: Callable[[str], Path], tiny_inputs: Array
) -> None:
    with memopt.load(tiny_bundle, device="cpu", variant="large", verify="lazy") as model:
        whole = model(tiny_inputs)
    with memopt.load(tiny_bundle, device="cpu", variant="large") as model:
        assert np.array_equal(model(tiny_inputs), whole)
    path = damaged("variants/large/weights.data")
    with memopt.load(path, device="cpu", variant="large", verify="lazy") as model:
        for _ in range(2):
            with pytest.raises(IntegrityError, match=r"variants/large/weights\.data is damaged"):
                model(tiny_inputs)
    with memopt.load(path, device="cpu", variant="small", verify="lazy") as model:  # whose weights are whole
        assert model(tiny_inputs).shape == (32, 3)


def test_the_first_result_waits_for_the_check(
    tiny_bundle: Path, tiny_inputs: Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked, verify = threading.Event(), Bundle.verify

    def slowly(bundle: Bundle, file: File) -> None:
        if file.path == "variants/large/weights.data":
            assert checked.wait(20)
        verify(bundle, file)

    monkeypatch.setattr(Bundle, "verify", slowly)
    with memopt.load(tiny_bundle, device="cpu", variant="large", verify="lazy") as model, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(model, tiny_inputs)
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.3)
        checked.set()
        assert waiting.result(timeout=20).shape == (32, 3)


def test_lazy_leaves_nothing_but_weights_for_later(damaged: Callable[[str], Path]) -> None:
    for name in ("variants/large/graph.onnx", "variants/small/graph.onnx", "assets/labels.txt"):
        with pytest.raises(IntegrityError, match=f"{name} is damaged"):
            open_bundle(damaged(name), verify="lazy")


@pytest.mark.parametrize(
    "options", [{"threads": -1}, {"threads": 10_000}, {"threads": 1.5}, {"max_drop": -1.0}, {"max_drop": float("nan")}]
)
def test_options_that_mean_nothing_are_refused(tiny_bundle: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(options))} is "):
        memopt.load(tiny_bundle, device="cpu", **options)


def test_a_single_picture_and_no_class_at_all(model: Model, picture: Path) -> None:
    assert model.predict(picture, topk=1) == model.predict([picture], topk=1)
    with pytest.raises(UsageError, match="topk is 0"):
        model.predict([picture], topk=0)


def test_the_bundle_may_be_replaced_while_it_is_open(tiny_bundle: Path, tmp_path: Path, tiny_inputs: Array) -> None:
    from memopt.files import write_atomically

    copy = tmp_path / "copy.mopt"
    copy.write_bytes(tiny_bundle.read_bytes())
    with memopt.load(copy, device="cpu", variant="large") as opened:
        before = opened(tiny_inputs)
        write_atomically(copy, b"something else", force=True)
        assert np.array_equal(opened(tiny_inputs), before)


@pytest.fixture(scope="module")
def optimistic(chain_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that claims to need far less than it does: 1 KiB for each picture, of which two take 128."""
    from memopt_export.graph import load_graph
    from memopt_export.pack import Contents, OnnxPart, pack

    points = tuple(MemoryPoint(batch, 2**20 + batch * 2**10, 0, 0, "by hand", "onnxruntime") for batch in (1, 64))
    path = tmp_path_factory.mktemp("optimistic") / "x.mopt"
    pack(Contents("chain", (OnnxPart("chain", "chain", load_graph(chain_file, checked=True), {}, points),)), path)
    return path


def chain_inputs(count: int) -> Array:
    return np.random.default_rng(count).normal(size=(count, 1, 128, 128)).astype(np.float32)


def test_a_batch_without_memory_is_halved_once_and_said(optimistic: Path) -> None:
    with memopt.load(optimistic, device="cpu") as unlimited:
        expected = unlimited(chain_inputs(24))
    with memopt.load(optimistic, device="cpu", pool=memopt.MemoryPool("2MiB")) as model:
        assert np.array_equal(model(chain_inputs(24)), expected)
        assert model.why[-1].startswith(
            "chain: no memory for batch 24, 12 from now on: onnxruntime failed in chain: out"
        )
        assert np.array_equal(model(chain_inputs(24)), expected)
        assert len([line for line in model.why if "no memory" in line]) == 1


def test_a_batch_without_memory_for_its_half_fails(optimistic: Path) -> None:
    with memopt.load(optimistic, device="cpu", pool=memopt.MemoryPool("1MiB")) as model:
        with pytest.raises(OutOfResource, match="out of memory"):
            model(chain_inputs(64))
        assert model(chain_inputs(4)).shape == (4, 1, 128, 128)


def test_a_promise_that_this_machine_does_not_keep_is_corrected_at_load(optimistic: Path) -> None:
    from memopt.memory import give_back

    pictures = chain_inputs(64)
    with memopt.load(optimistic, device="cpu", memory_limit="5MiB") as model:
        assert model.fit_batch("5MiB").batch == 64  # as promised
    with memopt.load(optimistic, device="cpu", memory_limit="5MiB") as model:
        assert model._batch is not None
        assert 1 <= model._batch < 64
        assert any(" from now on" in line for line in model.why)
        assert model(pictures).shape[0] == 64
        give_back()
        held = model.memory().phases["steady"].private_bytes
        assert held is not None
        assert held < 6 * 2**20


def test_a_limit_that_is_really_passed_at_one_sample_fails_at_load(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Model, "_try_batch", lambda self: 20 * 2**20)
    with pytest.raises(OutOfResource, match=r"large takes 20\.0 MiB at batch 1, limit 9\.00 MiB; hint: memory_limit="):
        memopt.load(tiny_bundle, device="cpu", memory_limit="9MiB", variant="large")


def test_an_overrun_of_the_arena_is_an_error_and_not_growth(optimistic: Path) -> None:
    from memopt.memory import give_back, read_host_memory

    with memopt.load(optimistic, device="cpu", pool=memopt.MemoryPool("1MiB")) as model:
        model(chain_inputs(1))
        feeds = {"input": chain_inputs(64)}
        give_back()
        before = read_host_memory()
        try:
            model.run(None, feeds)
        except OutOfResource:  # and not pytest.raises, which keeps the frames with all that is in them
            failed = True
        give_back()
        grown = read_host_memory().above(before).private_bytes
    assert failed
    assert grown is not None
    assert grown < 2 * 2**20


def test_a_limit_leaves_the_rest_to_other_models(optimistic: Path, tiny_bundle: Path, tiny_inputs: Array) -> None:
    pool = memopt.MemoryPool("3MiB")
    with (
        memopt.load(optimistic, device="cpu", pool=pool) as one,
        memopt.load(tiny_bundle, device="cpu", variant="large", pool=pool) as other,
    ):
        for _ in range(2):
            assert one(chain_inputs(8)).shape[0] == 8
            assert other(tiny_inputs).shape == (32, 3)
        with pytest.raises(OutOfResource):
            one.run(None, {"input": chain_inputs(64)})
        assert other(tiny_inputs).shape == (32, 3)


def test_trim_gives_back_and_the_next_run_takes_it_again(model: Model, tiny_inputs: Array) -> None:
    before = model(tiny_inputs)
    held = model.memory().phases["steady"].private_bytes
    model.trim()
    left = model.memory().phases["steady"].private_bytes
    assert held is not None
    assert left is not None
    assert left < held
    assert np.array_equal(model(tiny_inputs), before)


@pytest.mark.parametrize("profile", ["fast", "balanced", "minimum"])
def test_every_profile_computes_the_same(tiny_bundle: Path, tiny_inputs: Array, model: Model, profile: str) -> None:
    with memopt.load(tiny_bundle, device="cpu", variant="large", profile=profile) as other:
        np.testing.assert_allclose(other(tiny_inputs), model(tiny_inputs), rtol=1e-5)
    with pytest.raises(UsageError, match="profile 'x' is not known; hint: fast, balanced, minimum"):
        memopt.load(tiny_bundle, device="cpu", profile="x")


def test_loading_running_and_closing_leaves_neither_files_nor_memory(tiny_bundle: Path, tiny_inputs: Array) -> None:
    from memopt.memory import give_back, read_host_memory

    def cycle(runs: int) -> None:
        with memopt.load(tiny_bundle, device="cpu", variant="large", threads=1) as opened:
            for _ in range(runs):
                opened(tiny_inputs[:1])

    def held() -> tuple[int, int]:
        give_back()
        private = read_host_memory().private_bytes
        assert private is not None
        return private, len(list(Path("/proc/self/fd").iterdir()))

    cycle(200)
    before, files_before = held()
    for _ in range(10):
        cycle(200)
    after, files_after = held()
    assert files_after <= files_before
    assert after - before < 2 * 2**20  # of 2,000 runs and 10 loads
