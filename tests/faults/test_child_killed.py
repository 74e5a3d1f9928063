"""A pool process is killed (SIGKILL, as when memory runs out) at each point of an execution."""

from __future__ import annotations

import pytest

from tests.faults.app import ACKS, LEASE, POLICIES
from tests.faults.conftest import Stage
from tests.support.workers import CeleryWorker

BEFORE = ("before claim",)
DOUBTFUL = ("after claim", "before effect", "after effect", "before settle")
DONE = ("after settle",)

EFFECT_IS_OUT = ("after effect", "before settle", "after settle")


@pytest.fixture(scope="module")
def worker(stage: Stage) -> CeleryWorker:
    return stage.start_worker(concurrency=2)


def expected(point: str, policy: str) -> tuple[str, int]:
    """Return the answer that the caller must receive, and the number of effects."""
    out = 1 if point in EFFECT_IS_OUT else 0
    if point in BEFORE or point in DONE:
        return "the result", 1
    if policy == "in_doubt":
        return "OutcomeUnknown", out
    if policy == "reconcile":
        return "the result", 1
    if policy == "rerun":
        return "the result", 1 + out
    # "resume": a crash inside the step is in doubt, a crash outside the step is not.
    if point in ("before effect", "after effect"):
        return "OutcomeUnknown", out
    return "the result", 1


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("point", BEFORE + DOUBTFUL + DONE)
@pytest.mark.usefixtures("worker")
def test_child_killed(stage: Stage, point: str, policy: str) -> None:
    cases = {acks: stage.call(f"{policy}.{acks}", at=point, how="kill") for acks in ACKS}
    for acks, case in cases.items():
        sees = case.wait_answer()
        assert (sees, case.effects) == expected(point, policy), acks
        state = case.wait_state("succeeded" if sees == "the result" else "in_doubt")
        duplicate = case.again()
        assert duplicate.wait_answer() == sees
        assert case.effects == expected(point, policy)[1]
        assert case.state == state
        case.row(f"child killed {point}", acks, sees)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.usefixtures("worker")
def test_a_death_is_decided_long_before_the_lease_ends(stage: Stage, policy: str) -> None:
    """The parent process reports the death. Process and store run on one host, so their clocks agree."""
    case = stage.call(f"{policy}.late", at="after effect", how="kill")
    case.wait_state("in_doubt" if expected("after effect", policy)[0] == "OutcomeUnknown" else "succeeded")
    entry = case.entry
    assert entry is not None
    _, died_at = (stage.folder / f"died-{case.intent}").read_text().split()
    assert entry.changed_at - float(died_at) < LEASE / 2
