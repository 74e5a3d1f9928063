"""A whole worker ends: it is killed with all its processes, or it is shut down, cold or warm."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.faults.app import POLICIES
from tests.faults.conftest import BROKERS, Case, Stage
from tests.support.servers import RedisServer

ACKS = ("early", "late")

# Seconds. Both have to pass in the test: the death of a host is noticed when the lease has lapsed, and
# Redis redelivers a message after the visibility timeout.
LEASE = 2.0
VISIBILITY = 2.0
SHORT = {"FAULTS_LEASE": str(LEASE), "FAULTS_VISIBILITY": str(VISIBILITY)}

# The caller's answer and the number of effects, for a body that ends after its effect. With "resume"
# it ends inside a step.
AFTER_EFFECT = {
    "in_doubt": ("OutcomeUnknown", 1),
    "resume": ("OutcomeUnknown", 1),
    "rerun": ("the result", 2),
    "reconcile": ("the result", 1),
}


@pytest.fixture(params=BROKERS)
def stage(request: pytest.FixtureRequest, make_stage: Callable[..., Stage], own_redis: RedisServer) -> Stage:
    """A stage for one test, so that a test does not find what the worker of another test left."""
    url = own_redis.url_for(0) if request.param == "redis" else request.getfixturevalue("rabbitmq").url
    return make_stage(request.param, url, own_redis)


def hang(stage: Stage) -> dict[tuple[str, str], Case]:
    """Return one case for each policy and acknowledgement, each of which hangs after its effect."""
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
    # With early acknowledgement the broker no longer has the message. The record holds the call.
    for (policy, acks), case in cases.items():
        end(case, "worker killed after effect", acks, AFTER_EFFECT[policy])


def test_cold_shutdown(stage: Stage) -> None:
    worker = stage.start_worker(concurrency=8)
    cases = hang(stage)
    worker.cold_stop()
    assert cases["in_doubt", "early"].result.state == "FAILURE"  # answered at once, without a worker
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
