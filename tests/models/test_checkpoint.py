from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from memopt.errors import InputRefused, IntegrityError, UsageError
from memopt.tensors import TensorSpec
from memopt_models.checkpoint import (
    MAX_HEADER_BYTES,
    Checkpoint,
    load_checkpoint,
    read_metadata,
    save_checkpoint,
    snapshot,
)
from memopt_models.evaluate import predict
from memopt_models.networks import build

GOLDEN = Path(__file__).parent / "golden"
INPUT = TensorSpec("input", "float32", ("batch", 1, 28, 28))


@pytest.fixture(params=["dense", "pruned", "student"])
def checkpoint(request: pytest.FixtureRequest) -> Checkpoint:
    found: Checkpoint = request.getfixturevalue(request.param)
    return found


def every_layer(width: int = 6, groups: int = 2) -> nn.Module:
    """One of each layer that can be pruned."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.Conv2d(width, width, 3, padding=1, groups=width),
        nn.Conv2d(width, 2 * width, 3, padding=1, groups=width, bias=False),
        nn.Conv2d(2 * width, width, 1, groups=groups),
        nn.ConvTranspose2d(width, width, 2, stride=2),
        nn.ConvTranspose2d(width, width, 2, stride=2, groups=width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.LayerNorm(width),
        nn.Linear(width, 10),
    )


def divided(by: int) -> nn.Module:
    return nn.Linear(8 // by, 1)


def of_module(module: nn.Module, network: str, **settings: object) -> Checkpoint:
    return Checkpoint(network, dict(settings), snapshot(module), (INPUT,), tuple("0123456789"), (), (), {}, 0)


def written_by_hand() -> Checkpoint:
    """Every field with something in it, and weights that nothing had to compute."""
    module = build("ds_cnn", {"classes": 2, "width": 1, "depth": 1})
    state = {
        name: (torch.arange(tensor.numel(), dtype=torch.float32) / 8).reshape(tensor.shape).to(tensor.dtype)
        for name, tensor in module.state_dict().items()
    }
    blank = Checkpoint(
        network="ds_cnn",
        settings={"classes": 2, "in_channels": 1, "width": 1, "depth": 1},
        state={},
        inputs=(INPUT,),
        labels=("naïve", "zero"),
        preprocess=({"op": "decode", "color": "gray"}, {"op": "normalize", "mean": [0.5], "std": [0.25]}),
        lineage=(),
        metrics={},
        seed=7,
    )
    module.load_state_dict(state)
    return blank.advance("train", module, settings={"epochs": 3}, metrics={"test_top1": 0.5})


def test_file_is_byte_for_byte_the_golden_one(tmp_path: Path) -> None:
    save_checkpoint(written_by_hand(), tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == (GOLDEN / "checkpoint-1.1.safetensors").read_bytes()


@pytest.mark.parametrize("schema", ["1.0", "1.1"])
def test_every_schema_there_was_is_still_read(schema: str) -> None:
    loaded, expected = load_checkpoint(GOLDEN / f"checkpoint-{schema}.safetensors"), written_by_hand()
    assert (loaded.sha256, loaded.lineage, loaded.labels) == (expected.sha256, expected.lineage, expected.labels)
    assert loaded.module()(torch.zeros(1, 1, 28, 28)).shape == (1, 2)


def test_loading_gives_back_what_was_saved(checkpoint: Checkpoint, tmp_path: Path) -> None:
    save_checkpoint(checkpoint, tmp_path / "c.safetensors")
    loaded = load_checkpoint(tmp_path / "c.safetensors")
    assert loaded.sha256 == checkpoint.sha256
    fields = ("network", "settings", "inputs", "labels", "preprocess", "lineage", "metrics", "seed", "parameters")
    assert all(getattr(loaded, name) == getattr(checkpoint, name) for name in fields)


def test_equal_checkpoints_give_equal_bytes(checkpoint: Checkpoint, tmp_path: Path) -> None:
    backwards = replace(checkpoint, state=dict(reversed(checkpoint.state.items())))
    for name, each in (("a", checkpoint), ("b", backwards)):
        save_checkpoint(each, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_new_process_answers_the_same(
    dense: Checkpoint, pruned: Checkpoint, student: Checkpoint, tmp_path: Path
) -> None:
    inputs = np.random.default_rng(0).standard_normal((4, 1, 28, 28)).astype(np.float32)
    np.save(tmp_path / "inputs.npy", inputs)
    checkpoints = {"dense": dense, "pruned": pruned, "student": student}
    for name, each in checkpoints.items():
        save_checkpoint(each, tmp_path / name)
    run_python(
        "import sys, numpy as np, torch",
        "from memopt_models.checkpoint import load_checkpoint, Path",
        "from memopt_models.evaluate import predict",
        "torch.set_num_threads(1)",  # as here: the last bits depend on it
        "for name in sys.argv[1:]:",
        "    np.save(name + '.npy', predict(load_checkpoint(Path(name)).module(), np.load('inputs.npy')))",
        arguments=list(checkpoints),
        folder=tmp_path,
    )
    for name, each in checkpoints.items():
        np.testing.assert_array_equal(np.load(tmp_path / f"{name}.npy"), predict(each.module(), inputs))


def test_identity_is_that_of_the_weights_alone(dense: Checkpoint) -> None:
    renamed = {f"x.{name}": tensor for name, tensor in dense.state.items()}
    other = {name: tensor + 1 for name, tensor in dense.state.items()}
    half = {name: tensor.half() for name, tensor in dense.state.items()}
    digests = [replace(dense, state=state).sha256 for state in (dense.state, renamed, other, half)]
    assert len(set(digests)) == 4
    assert replace(dense, metrics={}, seed=7, lineage=()).sha256 == dense.sha256
    assert dense.lineage[-1].output_sha256 == dense.sha256


def test_identity_covers_bfloat16_and_scalars(dense: Checkpoint) -> None:
    state = {"a": torch.ones(2, dtype=torch.bfloat16), "n": torch.tensor(3)}
    assert len(replace(dense, state=state).sha256) == 64


def test_every_kind_of_layer_takes_the_shapes_of_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mynets", sys.modules[__name__])
    small = every_layer(width=4).eval()
    rebuilt = of_module(small, "mynets:every_layer").module()  # built with width 6, its weights have 4
    inputs = torch.randn(2, 1, 8, 8)
    assert torch.equal(rebuilt(inputs), small(inputs))
    assert repr(rebuilt) == repr(small)  # channel numbers, groups and features are those of the small one


class EveryWeight(nn.Module):
    """Layers that are pruned along with others, and weights that stand beside layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.register_buffer("shift", torch.randn(width))
        self.patch = nn.Conv2d(1, width, 4, stride=4)
        self.group, self.instance = nn.GroupNorm(2, width), nn.InstanceNorm2d(width, affine=True)
        self.slope, self.attention = nn.PReLU(width), nn.MultiheadAttention(width, 2, batch_first=True)
        self.fc = nn.Linear(width, 10)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        features = self.slope(self.instance(self.group(self.patch(inputs)))).flatten(2).transpose(1, 2)
        sequence = torch.cat([self.token.expand(len(features), -1, -1), features], dim=1) + self.shift
        logits: torch.Tensor = self.fc(self.attention(sequence, sequence, sequence)[0][:, 0])
        return logits


def every_weight(width: int = 8) -> nn.Module:
    return EveryWeight(width)


def test_weights_of_every_kind_take_the_shapes_that_are_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mynets", sys.modules[__name__])
    small = every_weight(width=4).eval()
    rebuilt = of_module(small, "mynets:every_weight").module()  # built with width 8, its weights have 4
    inputs = torch.randn(2, 1, 8, 8)
    assert torch.equal(rebuilt(inputs), small(inputs))
    assert repr(rebuilt) == repr(small)


def test_width_that_attention_heads_cannot_share_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mynets", sys.modules[__name__])
    whole = of_module(every_weight(), "mynets:every_weight")
    odd = {"attention.in_proj_weight": torch.zeros(21, 7), "attention.in_proj_bias": torch.zeros(21)}
    with pytest.raises(InputRefused, match=r"2 of them differ \(attention\.in_proj_bias, attention\.in_proj_weight\)$"):
        replace(whole, state=whole.state | odd).module()


def test_network_whose_layers_have_versions_is_loaded() -> None:
    module = build("mnasnet0_5", {"classes": 10})
    checkpoint = of_module(module, "mnasnet0_5", classes=10)
    assert checkpoint.module().state_dict().keys() == module.state_dict().keys()


def test_rebuilding_costs_the_caller_no_randomness(dense: Checkpoint) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    dense.module()
    assert torch.equal(torch.rand(2), expected)


def test_module_does_not_share_memory_with_the_checkpoint(dense: Checkpoint) -> None:
    before = dense.state["fc2.bias"].clone()
    with torch.no_grad():
        dense.module().fc2.bias.add_(1)
    assert torch.equal(dense.state["fc2.bias"], before)


def test_weights_of_another_network_are_refused_by_name(dense: Checkpoint, student: Checkpoint) -> None:
    with pytest.raises(InputRefused) as raised:
        replace(dense, state=student.state).module()
    assert "the weights do not fit network 'simple_cnn': 40 of them differ (block1.depthwise.conv.weight, " in str(
        raised.value
    )
    fewer = {name: tensor for name, tensor in dense.state.items() if name != "fc2.bias"}
    with pytest.raises(InputRefused, match=r"1 of them differ \(fc2\.bias\)$"):
        replace(dense, state=fewer).module()
    kernel = dense.state | {"conv1.weight": torch.zeros(16, 1, 5, 5)}
    with pytest.raises(InputRefused, match=r"1 of them differ \(conv1\.weight\)$"):
        replace(dense, state=kernel).module()


@pytest.mark.parametrize(
    ("network", "settings", "message"),
    [
        ("simple_cnn", {"wings": 2}, "network 'simple_cnn' cannot be"),
        ("simple_cnn", {"channels": 5}, "channels is 5, two numbers are needed"),
        ("simple_cnn", {"hidden": 10**30}, ""),
        ("ds_cnn", {"width": "wide"}, "width is 'wide'"),
        ("mynets:every_layer", {"width": "wide"}, "mynets:every_layer raised TypeError: not all"),
        ("mynets:every_layer", {"width": 7, "groups": 3}, "mynets:every_layer raised ValueError: in_channels"),
        ("mynets:divided", {"by": 0}, "mynets:divided raised ZeroDivisionError: integer"),
    ],
)
def test_settings_that_build_nothing_are_refused(
    network: str, settings: dict[str, object], message: str, dense: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mynets", sys.modules[__name__])
    with pytest.raises(InputRefused, match=f"the checkpoint's network cannot be built: {message}"):
        replace(dense, network=network, settings=settings).module()


def test_code_is_not_imported_because_a_file_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mynets", sys.modules[__name__])
    path = tmp_path / "own.safetensors"
    save_checkpoint(of_module(every_layer(), "mynets:every_layer"), path)
    for network in (None, "simple_cnn", "mynets:another"):
        with pytest.raises(InputRefused) as raised:
            load_checkpoint(path, network=network)
        assert str(raised.value) == (
            f"{path} is built by code of yours, mynets:every_layer; hint: --network mynets:every_layer allows it"
        )
    assert load_checkpoint(path, network="mynets:every_layer").parameters > 0


def test_metadata_are_read_without_torch(pruned: Checkpoint, tmp_path: Path) -> None:
    save_checkpoint(pruned, tmp_path / "c")
    run_python(
        "import sys",
        "from memopt_models.checkpoint import Path, read_metadata",
        "read_metadata(Path('c'))",
        "assert not {'torch', 'safetensors', 'torchvision'} & set(sys.modules), 'too heavy'",
        folder=tmp_path,
    )
    metadata = read_metadata(tmp_path / "c")
    assert metadata["schema"] == "1.1"
    assert metadata["network"] == "simple_cnn"
    assert metadata["lineage"][-1]["output_sha256"] == pruned.sha256
    assert metadata["tensors"]["conv1.weight"] == {"dtype": "float32", "shape": [8, 1, 3, 3]}
    assert metadata["tensors"].keys() == pruned.state.keys()
    json.dumps(metadata)


def test_existing_file_is_only_replaced_when_asked(dense: Checkpoint, pruned: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "c"
    save_checkpoint(dense, path)
    with pytest.raises(UsageError, match="c exists; hint: --force replaces it"):
        save_checkpoint(pruned, path)
    assert load_checkpoint(path).sha256 == dense.sha256
    save_checkpoint(pruned, path, force=True)
    assert load_checkpoint(path).sha256 == pruned.sha256


def test_half_written_file_is_never_seen(dense: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c"
    save_checkpoint(dense, path)
    before = path.read_bytes()

    def stop(handle: int) -> None:
        assert path.read_bytes() == before
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", stop)
    for target in (path, tmp_path / "new"):
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(dense, target, force=True)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="nothing cannot be read: No such file or directory"):
        load_checkpoint(tmp_path / "nothing")
    with pytest.raises(InputRefused, match="cannot be read: Is a directory"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("content", [b"", b"1234", b"PK\x03\x04 a pickle of torch", b"\x04" + b"\0" * 7 + b"[1,2"])
def test_other_files_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "c").write_bytes(content)
    with pytest.raises(InputRefused, match=r"c is not a safetensors file$"):
        load_checkpoint(tmp_path / "c")


@pytest.mark.parametrize(
    "header",
    [
        b"{]",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [1]}}',
        b'{"a": {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}}',
        b'{"__metadata__": {"memopt": 1}}',
        b'{"__metadata__": {}, "__metadata__": {}}',
        b"{" + b'"a":{' * 5000,
    ],
)
def test_damaged_header_is_refused(header: bytes, tmp_path: Path) -> None:
    (tmp_path / "c").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)
    with pytest.raises(InputRefused, match="c is not a safetensors file: its "):
        read_metadata(tmp_path / "c")


def test_size_of_the_header_is_bounded(tmp_path: Path) -> None:
    (tmp_path / "c").write_bytes(struct.pack("<Q", 2**40) + b"{}")
    with pytest.raises(InputRefused, match=f"has a header of {2**40} bytes, at most {MAX_HEADER_BYTES} are read"):
        read_metadata(tmp_path / "c")


def test_every_cut_short_file_is_refused(pruned: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "c"
    save_checkpoint(pruned, path)
    whole = path.read_bytes()
    for length in (0, 5, 9, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(InputRefused, match=r"is cut short|is not a safetensors file"):
            load_checkpoint(path)
    path.write_bytes(whole[:-1])
    with pytest.raises(InputRefused, match=f"c is cut short: {len(whole) - 1} bytes, {len(whole)} needed"):
        read_metadata(path)


def test_safetensors_of_another_program_is_refused_with_a_hint(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.zeros(2)}, tmp_path / "c", metadata={"format": "pt"})
    with pytest.raises(InputRefused) as raised:
        load_checkpoint(tmp_path / "c")
    assert str(raised.value) == (
        f"{tmp_path / 'c'} is a safetensors file of another program; hint: memopt-export train writes ours"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda card: card | {"schema": "2.0"}, "has schema 2.0, this memopt reads 1.1; hint: pip install -U memopt"),
        (lambda card: card | {"colour": "blue"}, "unknown field 'colour'"),
        (lambda card: card | {"inputs": []}, "a checkpoint has one input, this one has 0"),
        (lambda card: card | {"seed": "zero"}, "expected int, got str"),
        (lambda card: {k: v for k, v in card.items() if k != "network"}, "field 'network' is missing"),
    ],
)
def test_metadata_are_read_strictly(
    change: Callable[[dict[str, object]], object], message: str, dense: Checkpoint, tmp_path: Path
) -> None:
    save_checkpoint(dense, tmp_path / "good")
    metadata = read_metadata(tmp_path / "good")
    card = change({name: value for name, value in metadata.items() if name != "tensors"})
    safetensors.torch.save_file(dense.state, tmp_path / "c", metadata={"memopt": json.dumps(card)})
    with pytest.raises(InputRefused) as raised:
        load_checkpoint(tmp_path / "c")
    assert message in str(raised.value)


def test_newer_minor_schema_is_read(dense: Checkpoint, tmp_path: Path) -> None:
    save_checkpoint(dense, tmp_path / "good")
    card = {name: value for name, value in read_metadata(tmp_path / "good").items() if name != "tensors"}
    safetensors.torch.save_file(dense.state, tmp_path / "c", {"memopt": json.dumps(card | {"schema": "1.7"})})
    assert load_checkpoint(tmp_path / "c").sha256 == dense.sha256


def test_nan_weights_are_refused_by_name(dense: Checkpoint, tmp_path: Path) -> None:
    broken = dense.state | {"fc1.bias": torch.full((32,), torch.nan)}
    save_checkpoint(replace(dense, state=broken), tmp_path / "c")
    with pytest.raises(InputRefused, match=r"c has NaN in 'fc1\.bias'"):
        load_checkpoint(tmp_path / "c")


def test_changed_weights_are_noticed(dense: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "c"
    save_checkpoint(dense, path)
    damaged = bytearray(path.read_bytes())
    damaged[-2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(IntegrityError, match=f"holds weights [0-9a-f]{{12}}, its lineage ends in {dense.sha256[:12]}"):
        load_checkpoint(path)


def run_python(*lines: str, arguments: list[str] | None = None, folder: Path) -> None:
    subprocess.run([sys.executable, "-c", "\n".join(lines), *(arguments or [])], cwd=folder, check=True)
