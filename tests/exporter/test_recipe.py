"""Recipes: what they refuse, and the TOML that says all of one."""

from __future__ import annotations

import re
import tomllib
from dataclasses import asdict, fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memopt.errors import InputRefused, UsageError
from memopt_export.recipe import (
    CALIBRATIONS,
    CORRECTIONS,
    GROUP_SIZES,
    PRECISIONS,
    TARGETS,
    Recipe,
    RecipeFile,
    read_recipe,
    save_recipe,
)

NAMES = st.lists(st.text(max_size=20), max_size=3).map(tuple)
RECIPES = st.builds(
    Recipe,
    precision=st.sampled_from([name for name in PRECISIONS if name not in ("int8-dynamic", "fp8")]),
    target=st.sampled_from(TARGETS),
    calibration=st.sampled_from(CALIBRATIONS),
    percentile=st.floats(50, 100),
    correction=st.sampled_from(CORRECTIONS),
    weight_bits=st.sampled_from([7, 8]),
    exclude=NAMES,
    include=NAMES,
    group_size=st.sampled_from(GROUP_SIZES),
    convert_io=st.booleans(),
)
FILES = st.builds(
    RecipeFile,
    recipe=RECIPES,
    data=st.none() | st.text(max_size=20),
    samples=st.integers(1, 10**6),
    seed=st.integers(0, 2**63),
    batch_size=st.integers(1, 1000),
)


@given(file=FILES)
def test_a_recipe_survives_its_file(file: RecipeFile, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "recipe.toml"
    save_recipe(file, path, force=True)
    assert read_recipe(path) == file


def test_the_file_says_everything_and_what_may_stand_there() -> None:
    file = RecipeFile(Recipe("int8", exclude=('/layer1/"conv"\\0',)), data="digits")
    text = file.to_toml()
    said = tomllib.loads(text)
    assert set(said) == {*asdict(file.recipe), "data", "samples", "seed", "batch_size"}
    assert said["exclude"] == ['/layer1/"conv"\\0']
    for field in (*fields(file.recipe), *fields(file)[1:]):
        assert re.search(rf"^# .+\n{field.name} = ", text, re.MULTILINE), field.name


def test_an_unknown_number_of_samples_is_a_comment() -> None:
    assert '# data = "SPEC"\n' in RecipeFile(Recipe("fp16")).to_toml()


REFUSED = [
    ('precision = "int8"\ncalibratoin = "mse"', "x.toml: unknown field 'calibratoin'", "did you mean 'calibration'?"),
    ('precision = "int8"\nsample = 3', "x.toml: unknown field 'sample'", "did you mean 'samples'?"),
    ('target = "cpu"', "x.toml: field 'precision' is missing", None),
    ('precision = "int3"', "x.toml: precision 'int3' is not known", "one of fp32, fp16"),
    ('precision = "int8"\ncalibration = "max"', "x.toml: calibration 'max' is not known", "one of mse, minmax"),
    ('precision = "int8"\npercentile = nan', "x.toml: percentile is nan", "50 to 100"),
    ('precision = "int8"\nweight_bits = 4', "x.toml: weight_bits is 4", "8, or 7"),
    ('precision = "int8"\nweight_bits = "8"', "x.toml.weight_bits: expected int, got str", None),
    ('precision = "int8"\nexclude = "stem"', "x.toml.exclude: expected list, got str", None),
    ('precision = "int8"\nsamples = 0', "x.toml: samples is 0", "at least 1"),
]


@pytest.mark.parametrize(("text", "problem", "hint"), REFUSED)
def test_a_wrong_file_is_refused_with_what_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, problem: str, hint: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.toml").write_text(text)
    with pytest.raises(UsageError) as refused:
        read_recipe(Path("x.toml"))
    assert problem in refused.value.problem
    assert (refused.value.hint or "").startswith(hint or "")


@pytest.mark.parametrize(
    ("data", "said"),
    [(b"precision = ", "is not TOML"), (b"\xff", "cannot be read"), (None, "cannot be read: .*No such file")],
)
def test_what_is_no_toml_is_refused(tmp_path: Path, data: bytes | None, said: str) -> None:
    path = tmp_path / "x.toml"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(InputRefused, match=said):
        read_recipe(path)


def test_a_name_that_is_no_text_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot stand in a TOML file"):
        save_recipe(RecipeFile(Recipe("int8"), data="\udcff.npz"), tmp_path / "x.toml")
    assert not list(tmp_path.iterdir())


def test_four_bits_have_groups_where_the_file_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text('precision = "int4-weights"')
    assert read_recipe(tmp_path / "x.toml").recipe.group_size == 32
