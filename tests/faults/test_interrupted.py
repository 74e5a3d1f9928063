"""A body is interrupted by a time limit, a SystemExit or a revocation, or its process is killed after the task."""

from __future__ import annotations

import os
import signal

import pytest

from tests.faults.app import ACKS, POLICIES
from tests.faults.conftest import Stage
from tests.support.waiting import wait_for
from tests.support.workers import CeleryWorker

# The caller's answer and the number of effects, for a body that is interrupted after its effect.
# With "resume" the interruption is inside a step.
AFTER_EFFECT = {
    "in_doubt": ("OutcomeUnknown", 1),
    "resume": ("OutcomeUnknown", 1),
    "rerun": ("the result", 2),
    "reconcile": ("the result", 1),
}

LIMIT = 2.0  # seconds: enough to reach the effect on a busy machine


@pytest.fixture(scope="module")
def worker(stage: Stage) -> CeleryWorker:
    return stage.start_worker(concurrency=4)


@pytest.fixture(scope="module", autouse=True)
def _worker(worker: CeleryWorker) -> None:
    """Start the worker for every test of this module."""


@pytest.mark.parametrize("policy", POLICIES)
def test_hard_time_limit(stage: Stage, policy: str) -> None:
    cases = {
        acks: stage.call(f"{policy}.{acks}", at="after effect", how="hang", time_limit=LIMIT) for acks in ACKS
    }
    for acks, case in cases.items():
        sees = case.wait_answer()
        assert (sees, case.effects) == AFTER_EFFECT[policy], acks
        case.wait_state("succeeded" if sees == "the result" else "in_doubt")
        case.row("hard time limit after effect", acks, sees)


@pytest.mark.parametrize("policy", POLICIES)
def test_soft_time_limit(stage: Stage, policy: str) -> None:
    """The author asked for the interruption, so no policy runs the body again; only `reconcile` asks."""
    case = stage.call(f"{policy}.late", at="after effect", how="hang", soft_time_limit=LIMIT)
    sees = case.wait_answer()
    assert (sees, case.effects) == ("the result" if policy == "reconcile" else "OutcomeUnknown", 1)
    case.wait_state("succeeded" if policy == "reconcile" else "in_doubt")
    case.row("soft time limit after effect", "late", sees)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("point", ["before settle", "after settle"])
def test_soft_time_limit_inside_our_own_settle(stage: Stage, point: str, policy: str) -> None:
    case = stage.call(f"{policy}.late", at=point, how="soft")
    sees = case.wait_answer()
    assert (sees, case.effects, case.state) == ("the result", 1, "succeeded")
    case.row(f"soft time limit {point}", "late", sees)


@pytest.mark.parametrize("policy", POLICIES)
def test_exit(stage: Stage, policy: str) -> None:
    cases = {acks: stage.call(f"{policy}.{acks}", at="after effect", how="exit") for acks in ACKS}
    for acks, case in cases.items():
        sees = case.wait_answer()
        assert (sees, case.effects) == AFTER_EFFECT[policy], acks
        case.wait_state("succeeded" if sees == "the result" else "in_doubt")
        case.row("SystemExit after effect", acks, sees)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("number", ["SIGTERM", "SIGKILL"])
def test_revoked(stage: Stage, number: str, policy: str) -> None:
    """The caller receives TaskRevokedError. The next caller receives what the policy decides."""
    cases = {
        acks: stage.call(f"{policy}.{acks}", at="after effect", how="hang") for acks in ("early", "late")
    }
    for case in cases.values():
        case.wait_hanging()
        stage.publisher.control.revoke(case.result.id, terminate=True, signal=number)
    for acks, case in cases.items():
        assert case.wait_answer() == "TaskRevokedError"
        lapsed = policy != "in_doubt"
        case.wait_state("lapsed" if lapsed else "in_doubt")
        again = case.again()
        sees = again.wait_answer()
        assert (sees, case.effects) == AFTER_EFFECT[policy], acks
        case.row(f"revoked with {number} after effect", acks, f"TaskRevokedError; the next caller: {sees}")


@pytest.mark.parametrize("policy", POLICIES)
def test_killed_after_its_work(stage: Stage, worker: CeleryWorker, policy: str) -> None:
    case = stage.call(f"{policy}.late")
    assert case.wait_answer() == "the result"
    wait_for(lambda: f"[{case.result.id}] succeeded" in worker.log_text(), message="the end of the task")
    (effect,) = stage.effects.of(case.intent)
    os.kill(int(str(effect["pid"])), signal.SIGKILL)
    sees = case.again().wait_answer()
    assert (sees, case.effects, case.state) == ("the result", 1, "succeeded")
    case.row("child killed after ack", "late", sees)
