"""What became of the cases of a fuzzer: counted, and kept where they failed."""

from __future__ import annotations

import hashlib
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from memopt.errors import MemoptError

KEPT = Path("build/fuzz")
SLOW_S = 5.0
CRASH, WRONG = "crash", "wrong acceptance"


@dataclass
class Tally:
    """What became of the cases of one target."""

    name: str
    cases: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)  # CRASH, WRONG
    seconds: float = 0.0

    def count(self, data: bytes, read: Callable[[bytes], tuple[str, str | None]]) -> None:
        """Counts one case. `read` returns what became of the data, and why it should not have been accepted if so.

        A crash is any exception but one of ours, or an answer that takes seconds.
        """
        self.cases += 1
        started = time.perf_counter()
        try:
            outcome, wrong = read(data)
        except MemoptError as error:
            outcome, wrong = f"refused with {error.exit_code}", None
        except Exception as error:  # noqa: BLE001  # whatever it is, it is what a fuzzer looks for
            outcome, wrong = CRASH, None
            self._fail(CRASH, data, repr(error))
        self.outcomes[outcome] += 1
        if wrong is not None:
            self._fail(WRONG, data, wrong)
        if time.perf_counter() - started > SLOW_S:
            self._fail(CRASH, data, f"no answer within {SLOW_S:g} seconds")

    def _fail(self, kind: str, data: bytes, why: str) -> None:
        self.failures[kind] += 1
        KEPT.mkdir(parents=True, exist_ok=True)
        kept = KEPT / f"{self.name}-{hashlib.sha256(data).hexdigest()[:12]}"
        kept.write_bytes(data)
        sys.stderr.write(f"{kind}: {why} ({kept})\n")

    def __str__(self) -> str:
        outcomes = ", ".join(f"{name} {count}" for name, count in sorted(self.outcomes.items()))
        rate = self.cases / max(self.seconds, 1e-9)
        failed = f"{self.failures[CRASH]} crashes, {self.failures[WRONG]} wrong acceptances"
        return f"{self.name}: {self.cases} cases in {self.seconds:.0f} s ({rate:.0f}/s): {outcomes}; {failed}"
