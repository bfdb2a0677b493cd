from __future__ import annotations

import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from memopt.errors import InputRefused, IntegrityError
from memopt.image import MAX_PIXELS, MAX_SIDE
from memopt.preprocess import _taps, check_steps, prepare, prepare_file, resize

PIL = pytest.importorskip("PIL.Image", reason="Pillow, the reference for pictures, is not installed")

DECODE = {"op": "decode", "color": "gray"}


@pytest.mark.parametrize(("have", "want"), [((8, 8), (28, 28)), ((100, 60), (28, 28)), ((33, 57), (57, 33))])
def test_resize_is_pillows_to_one_level(have: tuple[int, int], want: tuple[int, int]) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (*have, 3)).astype(np.uint8)
    expected = np.asarray(PIL.fromarray(picture).resize(want[::-1], PIL.Resampling.BILINEAR)).astype(int)
    assert np.abs(resize(picture[None], want)[0] - expected).max() <= 1


def test_resize_keeps_a_flat_picture_flat() -> None:
    assert (resize(np.full((1, 5, 7, 1), 93, np.uint8), (31, 3)) == 93).all()


def test_steps_are_applied_in_order(tmp_path: Path) -> None:
    steps = (
        {"op": "decode", "color": "gray"},
        {"op": "scale", "factor": 0.5},
        {"op": "normalize", "mean": [1.0], "std": [2.0]},
        {"op": "layout", "to": "NCHW"},
    )
    np.save(tmp_path / "x.npy", np.array([[4, 8]], np.uint8))
    assert prepare_file(tmp_path / "x.npy", steps).tolist() == [[[[0.5, 1.5]]]]


def test_one_picture_and_a_batch_are_prepared_alike() -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (5, 9, 9, 3)).astype(np.uint8)
    steps = ({"op": "decode", "color": "gray"}, {"op": "resize", "size": [6, 6]}, {"op": "scale", "factor": 1 / 255})
    together = prepare(pictures, steps)
    assert np.array_equal(together, np.concatenate([prepare(p[None], steps) for p in pictures]))


@pytest.mark.parametrize("have", [(480, 640), (640, 480), (31, 300), (224, 224), (225, 230)])
def test_shorter_side_and_crop_are_torchvisions(have: tuple[int, int]) -> None:
    import torch
    from torchvision.transforms.v2 import functional

    picture = np.random.default_rng(1).integers(0, 256, (1, *have, 3)).astype(np.uint8)
    steps = ({"op": "resize", "shorter": 64}, {"op": "crop", "size": [55, 56]})
    got = prepare(picture, steps)
    tensor = torch.from_numpy(picture[0].transpose(2, 0, 1))
    theirs = functional.center_crop(functional.resize(tensor, [64], antialias=True), [55, 56])
    assert np.abs(got[0].transpose(2, 0, 1).astype(int) - theirs.numpy().astype(int)).max() <= 1


def test_a_crop_larger_than_the_picture_is_refused() -> None:
    with pytest.raises(InputRefused, match="a picture of 8 pixels has no middle of 9; hint: resize before crop"):
        prepare(np.zeros((1, 8, 8, 1), np.uint8), ({"op": "crop", "size": [9, 9]},))


IMPOSSIBLE = [
    {"op": "crop"},
    {"op": "crop", "size": [8]},
    {"op": "resize", "size": [8, 8], "shorter": 8},
    {"op": "resize", "shorter": 8.5},
    {"op": "resize", "shorter": 0},
    {},
    {"op": "rotate"},
    {"op": ["decode"]},
    {"op": None},
    {"op": "x\ny" * 10_000},
    {"op": "decode"},
    {"op": "decode", "color": "cmyk"},
    {"op": "decode", "color": ["gray"]},
    {"op": "resize"},
    {"op": "resize", "size": "ab"},
    {"op": "resize", "size": [8]},
    {"op": "resize", "size": [8, 8, 8]},
    {"op": "resize", "size": [8.0, 8.0]},
    {"op": "resize", "size": [True, True]},
    {"op": "resize", "size": [0, 8]},
    {"op": "resize", "size": [-8, -8]},
    {"op": "resize", "size": [MAX_SIDE, MAX_PIXELS // MAX_SIDE + 1]},
    {"op": "resize", "size": [1, MAX_SIDE + 1]},
    {"op": "resize", "size": [10**400, 1]},
    {"op": "scale"},
    {"op": "scale", "factor": "2"},
    {"op": "scale", "factor": float("nan")},
    {"op": "scale", "factor": 1e300},
    {"op": "scale", "factor": 10**400},
    {"op": "scale", "factor": True},
    {"op": "normalize"},
    {"op": "normalize", "mean": [0.5]},
    {"op": "normalize", "mean": 0.5, "std": 0.5},
    {"op": "normalize", "mean": [], "std": []},
    {"op": "normalize", "mean": [0.5], "std": [0]},
    {"op": "normalize", "mean": [0.5], "std": [-1.0]},
    {"op": "normalize", "mean": [0.5], "std": [1e-45]},
    {"op": "normalize", "mean": [0.5], "std": ["a"]},
    {"op": "normalize", "mean": [0.5], "std": [0.5, 0.5, 0.5]},
    {"op": "normalize", "mean": [0.5] * 2, "std": [0.5] * 2},
    {"op": "normalize", "mean": [0.5] * 10**6, "std": [0.5] * 10**6},
    {"op": "layout"},
    {"op": "layout", "to": "NHWC"},
    {"op": "layout", "to": {}},
]


@pytest.mark.parametrize("step", IMPOSSIBLE, ids=lambda step: str(step)[:60])
def test_a_step_that_could_never_run_is_refused_in_one_short_line(step: dict[str, object]) -> None:
    for check in (lambda steps: prepare(np.zeros((1, 2, 2, 1), np.uint8), steps), check_steps):
        with pytest.raises(IntegrityError, match=r"^preprocessing step \{.*\} is not understood") as caught:
            check((DECODE, step) if step.get("op") != "decode" else (step,))
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "steps",
    [
        [DECODE, DECODE],
        [{"op": "scale", "factor": 2}, DECODE],
        [{"op": "scale", "factor": 2}, {"op": "resize", "size": [2, 2]}],
        [{"op": "layout", "to": "NCHW"}, {"op": "normalize", "mean": [0.5], "std": [0.5]}],
        [{"op": "layout", "to": "NCHW"}] * 2,
    ],
)
def test_steps_out_of_order_are_refused(steps: list[dict[str, object]]) -> None:
    with pytest.raises(IntegrityError, match=r"comes too late; hint: decode, resize, crop, scale, normalize, layout$"):
        check_steps(steps)


def test_means_for_other_channels_are_refused() -> None:
    normalize = {"op": "normalize", "mean": [0.5] * 3, "std": [0.5] * 3}
    with pytest.raises(IntegrityError, match=r"^a gray picture cannot be normalized by 3 means$"):
        check_steps([DECODE, normalize])
    check_steps([normalize])
    with pytest.raises(IntegrityError, match=r"^pictures with 1 channels cannot be normalized by 3 means$"):
        prepare(np.zeros((1, 2, 2, 1), np.uint8), [normalize])


def test_no_steps_are_fine() -> None:
    check_steps([])
    assert prepare(np.ones((1, 2, 2, 1), np.uint8), []).sum() == 4


@pytest.mark.parametrize(
    ("have", "want"), [((4000, 3000), (224, 224)), ((1, MAX_SIDE), (MAX_SIDE, 1)), ((1, 1), (8000, 8000))]
)
def test_resize_takes_little_more_memory_than_its_result(have: tuple[int, int], want: tuple[int, int]) -> None:
    picture = np.full((1, *have, 1), 7, np.uint8)
    _taps.cache_clear()
    tracemalloc.start()
    started = time.perf_counter()
    resized = resize(picture, want)
    assert time.perf_counter() - started < 5
    assert tracemalloc.get_traced_memory()[1] < resized.nbytes + 100 * 2**20
    tracemalloc.stop()
    assert resized.shape == (1, *want, 1)
    assert (resized == 7).all()


def test_resize_in_strips_is_resize_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (2, 40, 30, 3)).astype(np.uint8)
    for size in ((17, 11), (50, 61), (12, 90)):
        whole = resize(pictures, size)
        monkeypatch.setattr("memopt.preprocess._STRIP_BYTES", 1)
        assert np.array_equal(resize(pictures, size), whole)
        monkeypatch.undo()


def test_what_resize_remembers_stays_small() -> None:
    for size in range(2, 40):
        resize(np.zeros((1, 4000, 4000, 1), np.uint8), (size, size))
    assert _taps.cache_info().currsize <= 4


def test_a_picture_too_large_to_resize_is_refused() -> None:
    with pytest.raises(InputRefused, match="the picture has 1 x 65537 pixels"):
        resize(np.zeros((1, MAX_SIDE + 1, 1, 1), np.uint8), (2, 2))
