"""`python -m tests.proof.explore [--deep] [--only WORDS]` explores the scenarios and prints each result."""

from __future__ import annotations

import argparse
import sys
import time

from tests.proof.explorer import Scenario
from tests.proof.scenarios import CI, DEEP
from tests.proof.search import Coverage, explore


def line(scenario: Scenario, coverage: Coverage, seconds: float) -> str:
    return (
        f"{scenario.name:42} {coverage.schedules:9,} schedules {coverage.cut:10,} joined an earlier one "
        f"{coverage.states:10,} states {seconds:7.1f} s"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--deep", action="store_true", help="the large scenarios too: an hour of one core")
    parser.add_argument("--only", default="", help="scenarios whose name has these words")
    options = parser.parse_args()
    totals = [0, 0, 0]
    for scenario in CI + (DEEP if options.deep else ()):
        if options.only not in scenario.name:
            continue
        began = time.process_time()
        coverage = explore(scenario)
        print(line(scenario, coverage, time.process_time() - began), flush=True)
        if coverage.violation:
            print(f"BROKEN: {coverage.violation}", *coverage.trace, sep="\n    ")
            continue
        for n, count in enumerate((coverage.schedules, coverage.cut, coverage.states)):
            totals[n] += count
    print("in all: {:,} schedules to their end, {:,} to a known state, {:,} states".format(*totals))
    return 0


if __name__ == "__main__":
    sys.exit(main())
