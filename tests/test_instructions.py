"""The hot path must not get slower. Its cost is counted in instructions, so other load does not matter.

Bounds are relative to the floor (two ordinary redis-py calls around the body, no rules), measured in
the same run: another version of Python, Celery or redis-py changes both.
"""

from __future__ import annotations

import importlib.util
import sys

import pytest

from benchmarks.imports import BASE, GUARDED_TASK, IMPORT, PLAIN_TASK, instructions_of
from benchmarks.instructions import ValgrindMissingError, per_task
from tests.conftest import missing
from tests.support.servers import ServerMissingError

# The cost that the guard adds to bare Celery with a separate store, divided by the cost that the floor adds.
# Measured without hiredis: 0.90 (0.62 before the record held the call and the index of open intents existed, 0.83
# before an answer was owed), and about a quarter more when the record is read back once more. With hiredis it is a few
# hundredths higher, because hiredis saves the floor more.
MOST = 0.96 if importlib.util.find_spec("hiredis") else 0.92

# The cost of a guarded task with a separate store, divided by the cost of a bare one: 1.37 was measured.
MOST_OVER_BARE = 1.39

# With the results in the same Redis, which is the default, a guarded task executes less than an unguarded one:
# one write stores the outcome and the result. 0.796 to 0.803 were measured with the same code, so the bound is above
# the target of 0.80.
MOST_IN_ONE_WRITE = 0.81

# The instructions of `import celery` with celery_idem, divided by those without, and the same with one declared task:
# 1.145 was measured for both. A dataclass is 0.005, a named tuple 0.001, a small module 0.001.
MOST_OF_AN_IMPORT = 1.155

MEASURED_WITH = (3, 11)


@pytest.mark.slow
@pytest.mark.redis
@pytest.mark.timeout(1300)  # 35 s of CPU, much longer under other load
def test_a_guarded_task_executes_less_than_an_unguarded_one() -> None:
    if sys.version_info[:2] != MEASURED_WITH:
        pytest.skip("the bounds hold for Python 3.11: other versions execute other numbers of instructions")
    try:
        cost = per_task(("bare", "floor", "idem", "apart", "wasteful"))
    except (ValgrindMissingError, ServerMissingError) as error:
        missing(str(error))
    print({name: f"{number:,.0f}" for name, number in cost.items()})
    assert cost["idem"] / cost["bare"] < MOST_IN_ONE_WRITE
    assert over_floor(cost, "apart") < MOST
    assert cost["apart"] / cost["bare"] < MOST_OVER_BARE
    # The measurement notices a little needless work: one more read of the record.
    assert over_floor(cost, "wasteful") > MOST


def over_floor(cost: dict[str, float], variant: str) -> float:
    return (cost[variant] - cost["bare"]) / (cost["floor"] - cost["bare"])


@pytest.mark.slow
@pytest.mark.timeout(600)  # 60 s of CPU, longer under other load
@pytest.mark.parametrize(("without", "guarded"), [(BASE, IMPORT), (PLAIN_TASK, GUARDED_TASK)])
def test_the_import_stays_small(without: str, guarded: str) -> None:
    if sys.version_info[:2] != MEASURED_WITH:
        pytest.skip("the bound holds for Python 3.11: other versions execute other numbers of instructions")
    try:
        ratio = instructions_of(guarded) / instructions_of(without)
    except ValgrindMissingError as error:
        missing(str(error))
    assert ratio < MOST_OF_AN_IMPORT
