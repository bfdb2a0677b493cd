"""What a graph tells of its own quantization: packed small, kept through files, and never believed blindly."""

from __future__ import annotations

import base64
import json
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memopt.errors import IntegrityError
from memopt_export.graph import METADATA_KEY, load_graph, save_graph
from memopt_export.provenance import Provenance, from_card, pack_rows, provenance, to_card, unpack_rows
from memopt_export.quantize import quantize
from memopt_export.recipe import Recipe
from memopt_models.data import Samples

# By hand: rows 1, 2, 9 have the gaps 1, 0, 6, of mean 7/3, so k = 1. Rests 0, 0, 3: bits 1 1 0001; lower bits: 1 0 0.
HAND = base64.b85encode(zlib.compress(bytes([1, 0b11000110, 0b00000000]), 9)).decode()


@given(st.sets(st.integers(0, 10**9), min_size=1, max_size=300))
def test_indices_survive_packing(rows: set[int]) -> None:
    text = pack_rows(np.array(sorted(rows)))
    assert text is not None
    assert unpack_rows(text, len(rows)).tolist() == sorted(rows)


def test_the_packing_is_the_documented_one() -> None:
    assert pack_rows(np.array([1, 2, 9])) == HAND
    assert unpack_rows(HAND, 3).tolist() == [1, 2, 9]


def test_all_of_a_split_takes_next_to_nothing() -> None:
    assert len(pack_rows(np.arange(50_000)) or "") < 50


@pytest.mark.parametrize("rows", [[], [3, 3], [-1, 4]])
def test_what_are_no_different_indices_is_not_packed(rows: list[int]) -> None:
    assert pack_rows(np.array(rows, np.int64)) is None


def test_a_card_of_256_samples_of_50000_stays_below_600_bytes() -> None:
    rows = np.sort(np.random.default_rng(0).choice(50_000, 256, replace=False))
    samples = Samples({"x": np.zeros((256, 1), np.float32)}, None, "cifar10/train", rows)
    assert len(json.dumps(to_card(provenance(Recipe("int8"), samples)))) < 600


@given(st.text(max_size=40), st.integers(-3, 10**9))
def test_text_of_strangers_is_refused_or_gives_as_many_indices(text: str, count: int) -> None:
    try:
        assert len(unpack_rows(text, count)) == count
    except IntegrityError as error:
        assert "indices of the samples" in error.problem


def test_a_bomb_is_not_unpacked() -> None:
    bomb = base64.b85encode(zlib.compress(bytes(2**26), 9)).decode()
    with pytest.raises(IntegrityError, match="indices of the samples are not 5"):
        unpack_rows(bomb, 5)


def test_it_is_kept_through_a_file_and_through_changes(cnn, samples_of, tmp_path) -> None:
    graph = cnn().graph()
    samples = samples_of(graph).take(16, seed=3)
    done = quantize(graph, Recipe("int8", correction="none"), samples).graph.with_seed(3)
    save_graph(done, tmp_path / "q.onnx")
    loaded = load_graph(tmp_path / "q.onnx")
    told = loaded.quantization
    assert told is not None
    assert told.rows is not None
    assert told.rows.tolist() == samples.rows.tolist()
    assert told == Provenance(
        Recipe("int8", correction="none"), "random/train", samples.fingerprint, 16, 3, told.packed_rows
    )
    assert loaded.with_model(loaded.copy_model()).quantization == told
    assert loaded.data == done.data


def test_what_looks_at_no_sample_names_none(cnn, samples_of) -> None:
    graph = cnn().graph()
    done = quantize(graph, Recipe("int8-weights"), samples_of(graph)).graph.with_seed(3)
    assert done.quantization == Provenance(Recipe("int8-weights"))
    assert graph.quantization is None
    assert "quantization" not in {entry.key: entry.value for entry in load(graph)}[METADATA_KEY]


def load(graph):
    import onnx

    return onnx.load_from_string(graph.data).metadata_props


STRANGE = [
    7,
    "text",
    {},
    {"recipe": {"precision": "int3"}},
    {"recipe": {"precision": "int8"}, "samples": "many"},
    {"recipe": {"precision": "int8"}, "packed_rows": "!", "samples": 3},
    {"recipe": {"precision": "int8"}, "unknown": 1},
    {"recipe": {"precision": "int8", "exclude": [[[[]]]]}},
]


@pytest.mark.parametrize("entry", STRANGE)
def test_an_entry_of_strangers_counts_for_nothing_and_takes_nothing_with_it(cnn, tmp_path, entry) -> None:
    model = cnn().model()
    card = {"precision": "fp16", "weights": "1" * 64, "quantization": entry}
    model.metadata_props.add(key=METADATA_KEY, value=json.dumps(card))
    (tmp_path / "x.onnx").write_bytes(model.SerializeToString())
    loaded = load_graph(tmp_path / "x.onnx")
    assert (loaded.quantization, loaded.precision, loaded.weights_sha256) == (None, "fp16", "1" * 64)
    assert from_card(entry) is None
