"""Fuzzes what reads the files of strangers, and says how many cases ran, crashed, or were wrongly accepted.

    python tests/fuzz/fuzz.py --seconds 60 --seed 0

Equal seeds give equal cases. What fails is kept in build/fuzz, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import random
import sys
import time

import bundles
import graphs
from tally import Tally

# Name -> the fuzzer and its share of the time.
TARGETS = {"bundle": (bundles.fuzz, 0.75), "graph": (graphs.fuzz, 0.25)}


def fuzz(name: str, *, seed: int, seconds: float = 60.0, cases: int | None = None) -> Tally:
    """One target for its share of the seconds, or for so many cases."""
    run, share = TARGETS[name]
    tally, started = Tally(name), time.perf_counter()

    def done() -> bool:
        tally.seconds = time.perf_counter() - started
        return tally.cases >= cases if cases is not None else tally.seconds >= share * seconds

    run(random.Random(seed), tally, done)
    return tally


def main() -> int:
    """Runs all targets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--cases", type=int, help="this many of each target, instead of a time")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    tallies = [fuzz(name, seed=asked.seed, seconds=asked.seconds, cases=asked.cases) for name in TARGETS]
    sys.stdout.write("".join(f"{tally}\n" for tally in tallies))
    return 1 if any(tally.failures for tally in tallies) else 0


if __name__ == "__main__":
    sys.exit(main())
