"""What a benchmark finds, held against the marks it has to reach: a table for people, JSON for machines."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from memopt import machine

OUTPUT = Path("build/bench")


@dataclass(frozen=True)
class Mark:
    """One measured value and what it has to be: at most (`limit`), or at least (`floor`)."""

    name: str
    value: float
    unit: str = ""
    limit: float | None = None
    floor: float | None = None

    @property
    def reached(self) -> bool:
        """Whether the value keeps to its bounds; NaN never does."""
        return (self.limit is None or self.value <= self.limit) and (self.floor is None or self.value >= self.floor)

    def __str__(self) -> str:
        bound = f"at most {self.limit:g}" if self.limit is not None else f"at least {self.floor:g}"
        verdict = "reached" if self.reached else "MISSED"
        return f"{verdict:<7}  {self.name:<64} {self.value:>10.4g} {self.unit:<6} {bound}"


def report(name: str, marks: Sequence[Mark], details: Any) -> int:
    """Prints the marks, writes build/bench/NAME.json, and returns the exit code: 1 where one was missed."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    plain = {"machine": machine.describe(), "marks": [asdict(mark) for mark in marks], "details": details}
    (OUTPUT / f"{name}.json").write_text(json.dumps(plain, indent=1, sort_keys=True) + "\n")
    sys.stdout.write("\n".join([f"{name}:", *(f"  {mark}" for mark in marks), ""]))
    return 0 if all(mark.reached for mark in marks) else 1
