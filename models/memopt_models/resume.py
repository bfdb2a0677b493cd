"""Resume: after every epoch, all that a training needs to go on lies in a file beside its output.

What is random in an epoch follows from the seed and the epoch's number alone, so no generator's state is kept.
"""

from __future__ import annotations

import glob
import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memopt.errors import IntegrityError, UsageError, first_line
from memopt.files import atomic_file
from memopt.strict_json import from_json, to_json
from memopt_models.checkpoint import bytes_of, dtype_name
from memopt_models.team import ALONE, Team, like, whole

if TYPE_CHECKING:
    import torch

    from memopt_models.train import Training

_TEXT, _DIGEST = "memopt-resume", "sha256"  # what stands in the metadata of the file
_SUFFIX = ".resume"
_MODULE, _BEST, _OPTIMIZER = "module.", "best.", "optimizer."
_TOOLS = ("memopt", "numpy", "torch")  # whose version decides the last bits


@dataclass(frozen=True)
class Keep:
    """Where the trainings of one command keep what they need to go on: one file each, OUTPUT.STAGE.resume."""

    output: Path

    def training(self, stage: str, made_from: Mapping[str, Any], *, team: Team = ALONE) -> KeptTraining:
        """What is kept of one training.

        Args:
            stage: its name, of which a command has each once.
            made_from: all that decides its result, as plain values.
            team: the processes that train together; the first one of them reads and writes.
        """
        tools = {tool: metadata.version(tool) for tool in _TOOLS}
        plain = json.loads(to_json({**made_from, "tools": tools}))
        return KeptTraining(self._path(stage), plain, team)

    def accumulate(self, stage: str) -> int | None:
        """In how many parts a training that was kept has cut its batches; None where there is none to go on with."""
        path = self._path(stage)
        try:
            how = _read_card(_open(path)[0], path).made_from["how"] if path.is_file() else {}
        except (IntegrityError, KeyError):
            return None
        return how.get("accumulate")

    def forget(self) -> None:
        """Removes what was kept: the output is there, or nobody wants to go on."""
        for path in self.output.parent.glob(f"{glob.escape(self.output.name)}.*{_SUFFIX}"):
            path.unlink(missing_ok=True)

    def _path(self, stage: str) -> Path:
        name = "".join(letter if letter.isalnum() else "-" for letter in stage)
        return self.output.with_name(f"{self.output.name}.{name}{_SUFFIX}")


@dataclass(frozen=True)
class KeptTraining:
    """One training on disk, as it stood when its last epoch had ended."""

    path: Path
    made_from: dict[str, Any]
    team: Team = ALONE

    def restore(self, training: Training) -> str:
        """Brings a fresh training to where the file left it, and says so.

        Where there is no file nothing is done nor said; a damaged one leaves the training fresh, and is told.

        Raises:
            UsageError: the file is of another training.
        """
        note, text, tensors = self._read() if self.team.is_first and self.path.is_file() else ("", "", {})
        text, tensors = self.team.share(text, tensors)
        if text:
            _load(_read_card(text, self.path), tensors, training)
        return note

    def store(self, training: Training) -> None:
        """Writes how the training stands over what was written before, whole or not at all.

        Raises:
            OutOfResource: the disk is full; what was written before is there still.
            InputRefused: the folder cannot be written.
        """
        text, tensors = _unload(training, self.made_from)
        digest = _digest(text, tensors)
        if self.team.is_first:
            _write(self.path, text, tensors, digest)
        else:
            for tensor in tensors.values():
                whole(tensor)  # the first process asks for everybody's share

    def _read(self) -> tuple[str, str, dict[str, torch.Tensor]]:
        """What there is to say of the file, and, if it is whole and of this training, its card and its tensors."""
        try:
            text, tensors = _open(self.path)
            card = _read_card(text, self.path)
        except IntegrityError as error:
            return f"starts anew: {self.path} is damaged ({error})", "", {}
        difference = _difference(card.made_from, self.made_from)
        if difference is not None:
            problem = f"{self.path} keeps epoch {len(card.ended)} of another training: {difference}"
            raise UsageError(problem, hint="--restart drops it")
        return f"goes on after epoch {len(card.ended)}, kept in {self.path}", text, tensors


@dataclass(frozen=True)
class _Card:
    """All that is kept but the tensors."""

    made_from: dict[str, Any]
    ended: tuple[dict[str, Any], ...]  # of each epoch done, the last Progress
    best_top1: float
    groups: tuple[dict[str, Any], ...]  # of the optimizer
    numbers: dict[str, dict[str, Any]]  # of its state, what is no tensor: index of the weight -> name -> value
    scheduler: dict[str, Any]
    scaler: dict[str, Any]


def _unload(training: Training, made_from: dict[str, Any]) -> tuple[str, dict[str, torch.Tensor]]:
    """The card as JSON, and the tensors: nothing is copied, and what several processes share is not gathered."""
    import torch

    optimizer = training.optimizer.state_dict()
    tensors = {_MODULE + name: tensor for name, tensor in training.module.state_dict().items()}
    tensors |= {_BEST + name: tensor for name, tensor in training.best.tensors(training.module).items()}
    numbers: dict[str, dict[str, Any]] = {}
    for index, state in optimizer["state"].items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{_OPTIMIZER}{index}.{name}"] = value
            else:
                numbers.setdefault(str(index), {})[name] = value
    card = _Card(
        made_from, tuple(map(asdict, training.ended)), training.best_top1, tuple(optimizer["param_groups"]), numbers,
        training.scheduler.state_dict(), training.scaler.state_dict(),
    )  # fmt: skip
    return to_json(card), dict(sorted(tensors.items()))


def _load(card: _Card, tensors: Mapping[str, torch.Tensor], training: Training) -> None:
    from memopt_models.train import Progress  # which is built on what is here

    def named(prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    training.module.load_state_dict(named(_BEST))
    training.best.keep(training.module)
    training.module.load_state_dict(named(_MODULE))
    training.team.scatter(training.module, training.worker)
    state: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in card.numbers.items()}
    for name, tensor in named(_OPTIMIZER).items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor
    weights = [weight for group in training.optimizer.param_groups for weight in group["params"]]
    state = {
        index: {key: like(weights[index], value) for key, value in values.items()}
        for index, values in sorted(state.items())
    }
    training.optimizer.load_state_dict({"state": state, "param_groups": list(card.groups)})
    training.scheduler.load_state_dict(card.scheduler)
    training.scaler.load_state_dict(card.scaler)
    training.ended, training.best_top1 = [Progress(**progress) for progress in card.ended], card.best_top1


def _read_card(text: str, path: Path) -> _Card:
    return from_json(_Card, text.encode(), where=path.name)


def _write(path: Path, text: str, tensors: Mapping[str, torch.Tensor], digest: str) -> None:
    """A safetensors file, a tensor at a time: the library would rename a file of its own, that is neither locked nor
    synced.
    """
    entries: dict[str, Any] = {"__metadata__": {_TEXT: text, _DIGEST: digest}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": dtype_name(tensor), "shape": list(tensor.shape), "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    with atomic_file(path, force=True) as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for tensor in tensors.values():
            file.write(bytes_of(whole(tensor)).data)


def _open(path: Path) -> tuple[str, dict[str, torch.Tensor]]:
    """What `_write` wrote.

    Raises:
        IntegrityError: it is not that.
    """
    import safetensors

    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            text, digest = metadata[_TEXT], metadata[_DIGEST]
            tensors = {name: file.get_tensor(name).clone() for name in sorted(file.keys())}
    except (safetensors.SafetensorError, OSError, KeyError) as error:
        raise IntegrityError(first_line(error)) from error
    if _digest(text, tensors) != digest:
        raise IntegrityError("its digest is another one")
    return text, tensors


def _digest(text: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 of the text and of the tensors' names, dtypes, shapes and bytes, as 64 hex digits."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(bytes_of(whole(tensor)).data)
    return digest.hexdigest()


def _difference(was: Mapping[str, Any], now: Mapping[str, Any], where: str = "") -> str | None:
    """The first value in which two nested dicts differ, as a person reads it.

    >>> _difference({"how": {"seed": 0, "shift": 1}}, {"how": {"seed": 0, "shift": 2}})
    'how.shift was 1, is 2'
    """
    for name in (*now, *(name for name in was if name not in now)):
        old, new = was.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            difference = _difference(old, new, f"{where}{name}.")
            if difference is not None:
                return difference
        elif old != new:
            return f"{where}{name} was {old}, is {new}"
    return None
