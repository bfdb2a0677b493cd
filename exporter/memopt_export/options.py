"""Options that several commands share, and the kinds of values that a person types."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from memopt.errors import UsageError
from memopt.sizes import parse_amount, parse_size
from memopt_export.recipe import PRECISIONS

Command = TypeVar("Command", bound=Callable[..., Any])

as_json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document on stdout and nothing else."
)
force_option = click.option("--force", is_flag=True, help="Replace an existing output.")
data_root_option = click.option(
    "--data-root",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where data sets lie; default $MEMOPT_DATA_ROOT.",
)
seed_option = click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of everything random."
)
factory_option = click.option(
    "--allow-network",
    "network",
    metavar="PKG.MOD:FACTORY",
    help="Import this code of yours, which the checkpoint names.",
)
output_option = click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="File to write.")
passphrase_file_option = click.option(
    "--passphrase-file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Holds the passphrase of the private key; default $MEMOPT_PASSPHRASE.",
)
key_option = click.option(
    "--key",
    "keys",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="KEY.pub",
    help="The bundle must be signed by this key, or by another one given.",
)
trust_engines_option = click.option(
    "--trust-engines",
    is_flag=True,
    help="Run engines though no --key signed the bundle. Engines are code; for bundles that you made.",
)
DATA_SPECS = "digits, mnist, fashion-mnist, cifar10, images:DIR, FILE.npz or pkg.mod:function."
PRECISION_NAMES = tuple(name for name in PRECISIONS if name != "fp32")
training_data_option = click.option("--data", default="digits", show_default=True, help=DATA_SPECS)


external_data_option = click.option(
    "--external-data", is_flag=True, help="Weights beside, in OUT.onnx.data; always from 2 GiB on."
)

compact_option = click.option(
    "--compact", is_flag=True, help="In as few bytes as can be: tensors renamed, nodes without names, no notes."
)


class Batches(click.ParamType[tuple[int, ...]]):
    """One or several batch sizes: 1 or 1,8,32."""

    name = "batches"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """The batch sizes, in the order typed."""
        if isinstance(value, tuple):
            return value
        parts = str(value).split(",")
        if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
            self.fail(f"{value!r} is no list of batches; type 1,8,32", param, ctx)
        return tuple(int(part) for part in parts)


class Size(click.ParamType[int]):
    """A size in bytes with its unit: 64MiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes."""
        try:
            return parse_size(value)
        except UsageError as error:
            self.fail(str(error), param, ctx)


class Amount(click.ParamType[float]):
    """A share below 1, or a number: 0.5, 300k, 1.2M."""

    name = "amount"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The share or the number."""
        try:
            return parse_amount(str(value))
        except UsageError as error:
            self.fail(str(error), param, ctx)


class Memory(click.ParamType[float]):
    """A share below 1, or a size in bytes with its unit: 0.5, 24MiB."""

    name = "memory"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The share, or bytes."""
        try:
            return float(value) if re.fullmatch(r"0?\.\d+", str(value)) else parse_size(value)
        except UsageError as error:
            self.fail(str(error), param, ctx)


class Dimension(click.ParamType[tuple[str, int]]):
    """The size of a free dimension: sequence=128."""

    name = "dimension"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, int]:
        """The name and its size."""
        name, equals, size = str(value).rpartition("=")
        if not (equals and name and size.isdigit() and int(size) > 0):
            self.fail(f"{value!r} is no size of a dimension; type sequence=128", param, ctx)
        return name, int(size)


def read_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE pairs as a dict; values are TOML: 8, 0.5, true, [16, 32], "text"."""
    import tomllib

    settings: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        try:
            settings[name] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError as error:
            raise UsageError(f"--setting {pair!r} is not NAME=VALUE", hint="--setting width=8") from error
        if not equals or not name:
            raise UsageError(f"--setting {pair!r} is not NAME=VALUE", hint="--setting width=8")
    return settings
