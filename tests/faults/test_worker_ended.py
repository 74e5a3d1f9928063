"""The whole worker ends: killed with all its processes, shut down cold, shut down warm."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.faults.app import POLICIES
from tests.faults.conftest import BROKERS, Case, Stage
from tests.support.servers import RedisServer

ACKS = ("early", "late")

# Seconds. A lease that a host's death is decided by, and a visibility timeout of the same length: both
# have to pass in the test. Redis hands a message out again after the second.
LEASE = 2.0
VISIBILITY = 2.0
SHORT = {"FAULTS_LEASE": str(LEASE), "FAULTS_VISIBILITY": str(VISIBILITY)}

# Of a body that ends after its effect, inside its step where it has one.
AFTER_EFFECT = {
    "in_doubt": ("OutcomeUnknown", 1),
    "resume": ("OutcomeUnknown", 1),
    "rerun": ("the result", 2),
    "reconcile": ("the result", 1),
}


@pytest.fixture(params=BROKERS)
def stage(request: pytest.FixtureRequest, make_stage: Callable[..., Stage], own_redis: RedisServer) -> Stage:
    """A stage of the test's own: what one worker left behind is no business of another test's."""
    url = own_redis.url_for(0) if request.param == "redis" else request.getfixturevalue("rabbitmq").url
    return make_stage(request.param, url, own_redis)


def hang(stage: Stage) -> dict[tuple[str, str], Case]:
    """A worker's processes, one for each policy and acknowledgement, all hanging after their effect."""
    cases = {
        (policy, acks): stage.call(f"{policy}.{acks}", at="after effect", how="hang")
        for policy in POLICIES
        for acks in ACKS
    }
    for case in cases.values():
        case.wait_hanging()
    return cases


def end(case: Case, fault: str, acks: str, expected: tuple[str, int]) -> None:
    sees = case.wait_answer()
    assert (sees, case.effects) == expected, case.task
    case.wait_state("succeeded" if sees == "the result" else "in_doubt")
    case.row(fault, acks, sees)


def test_worker_killed(stage: Stage) -> None:
    worker = stage.start_worker(concurrency=8, env=SHORT)
    cases = hang(stage)
    worker.kill()
    stage.start_worker(concurrency=4, env=SHORT)
    # With early acknowledgement Celery has no message any more. The record has it.
    for (policy, acks), case in cases.items():
        end(case, "worker killed after effect", acks, AFTER_EFFECT[policy])


def test_cold_shutdown(stage: Stage) -> None:
    worker = stage.start_worker(concurrency=8)
    cases = hang(stage)
    worker.cold_stop()
    assert cases["in_doubt", "early"].result.state == "FAILURE"  # told at once, with no worker left
    stage.start_worker(concurrency=4)
    for (policy, acks), case in cases.items():
        end(case, "cold shutdown after effect", acks, AFTER_EFFECT[policy])


def test_warm_shutdown(stage: Stage) -> None:
    worker = stage.start_worker(concurrency=8)
    cases = hang(stage)
    for case in cases.values():
        case.gate.open()
    worker.stop()
    for (_, acks), case in cases.items():
        end(case, "warm shutdown after effect", acks, ("the result", 1))
