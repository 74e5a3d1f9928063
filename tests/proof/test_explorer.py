"""Every schedule of every scenario keeps the promise, and every broken rule is noticed.

`pytest -s` prints the numbers of schedules. `python -m tests.proof.explore` prints them with totals.
"""

from __future__ import annotations

import time

import pytest

from tests.proof.explore import line
from tests.proof.explorer import Scenario
from tests.proof.mutants import MUTANTS, Mutant, mutated
from tests.proof.scenarios import CI, DEEP
from tests.proof.search import explore

# The largest scenarios take 20 s of CPU time, and ten times as long on a busy machine.
pytestmark = pytest.mark.timeout(900)

BY_NAME = {scenario.name: scenario for scenario in CI}


@pytest.mark.parametrize("scenario", CI, ids=lambda scenario: scenario.name)
def test_every_schedule_keeps_the_promise(scenario: Scenario) -> None:
    began = time.process_time()
    coverage = explore(scenario)
    print(line(scenario, coverage, time.process_time() - began))
    assert not coverage.violation, "\n  ".join([coverage.violation, *coverage.trace])
    assert coverage.schedules


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_broken_rule_is_noticed(mutant: Mutant) -> None:
    with mutated(mutant):
        coverage = explore(BY_NAME[mutant.caught_by])
    print(f"{mutant.name:45} {coverage.schedules + coverage.cut + 1:6,} schedules: {coverage.violation}")
    assert coverage.violation, f"{mutant.name} went unnoticed in {mutant.caught_by}"


def test_names_are_unique() -> None:
    names = [scenario.name for scenario in CI + DEEP] + [mutant.name for mutant in MUTANTS]
    assert len(names) == len(set(names))
