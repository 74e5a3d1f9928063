"""A worker is stopped (SIGSTOP) until its lease has lapsed, and then continues.

Its outcome is late, or it is stale, or its effect is late.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import pytest

from tests.faults.app import POLICIES
from tests.faults.conftest import BROKERS, Case, Stage
from tests.support.servers import RedisServer
from tests.support.waiting import wait_for
from tests.support.workers import CeleryWorker

LEASE = 1.0  # seconds: short, because it has to lapse in the test

# Recovery is off: it would publish the call again, and only the test's duplicate may take over.
ENV = {"FAULTS_LEASE": str(LEASE), "FAULTS_RECOVER": "0"}


class Frozen(NamedTuple):
    """Bodies that hang in a worker whose processes are stopped. Their leases have lapsed."""

    stage: Stage
    worker: CeleryWorker
    cases: dict[str, Case]


@pytest.fixture(params=BROKERS)
def stage(request: pytest.FixtureRequest, make_stage: Callable[..., Stage], own_redis: RedisServer) -> Stage:
    url = own_redis.url_for(0) if request.param == "redis" else request.getfixturevalue("rabbitmq").url
    return make_stage(request.param, url, own_redis)


def freeze(stage: Stage, at: str) -> Frozen:
    worker = stage.start_worker(concurrency=4, env=ENV)
    cases = {policy: stage.call(f"{policy}.late", at=at, how="hang") for policy in POLICIES}
    for case in cases.values():
        case.wait_hanging()
    worker.pause()
    for case in cases.values():
        case.wait_state("lapsed")
    return Frozen(stage, worker, cases)


def go_on(frozen: Frozen) -> None:
    frozen.worker.resume()
    for case in frozen.cases.values():
        case.gate.open()


def test_nobody_took_over(stage: Stage) -> None:
    """An outcome after the lease is accepted if no other worker took over: the effect happened."""
    frozen = freeze(stage, "after effect")
    go_on(frozen)
    for case in frozen.cases.values():
        sees = case.wait_answer()
        assert (sees, case.effects, case.state) == ("the result", 1, "succeeded"), case.task
        case.row("frozen past the lease after effect", "late", sees)


def test_a_duplicate_came_meanwhile(stage: Stage) -> None:
    frozen = freeze(stage, "after effect")
    stage.start_worker(concurrency=2, env=ENV)
    # The duplicate's answer, the first caller's final answer, the number of effects.
    expected = {
        "in_doubt": ("OutcomeUnknown", "the result", 1),
        "resume": ("OutcomeUnknown", "LeaseLost", 1),  # the duplicate took over and stopped at the open step
        "rerun": (
            "the result",
            "the result",
            2,
        ),  # the execution that takes over makes sure that the first caller gets an answer
        "reconcile": ("the result", "the result", 1),
    }
    seen = {policy: case.again().wait_answer() for policy, case in frozen.cases.items()}
    frozen.worker.resume()
    wait_for(lambda: "lease_lost" in frozen.worker.log_text(), message="the worker to notice the takeover")
    go_on(frozen)
    for policy, case in frozen.cases.items():
        sees = case.wait_final_answer(expected[policy][1])
        assert (seen[policy], sees, case.effects) == expected[policy], policy
        case.wait_state("in_doubt" if policy == "resume" else "succeeded")
        assert case.again().wait_answer() == ("OutcomeUnknown" if policy == "resume" else "the result")
        case.row(
            "frozen after effect, a duplicate meanwhile", "late", f"{sees}; the duplicate: {seen[policy]}"
        )

    def alarms() -> int:
        return frozen.worker.log_text().count("stale_settle rerun.late")

    wait_for(alarms, message="the alarm")
    assert alarms() == 1
    suspect = {
        policy: case.entry.suspicions for policy, case in frozen.cases.items() if case.entry is not None
    }
    (note,) = suspect.pop("rerun")
    assert note.late is not None
    assert note.late.place.endswith(f", process {frozen.cases['rerun'].wait_hanging()}")
    assert note.late.stood_place not in ("", note.late.place)  # the other worker, which settled the intent
    assert note.late.task_id == frozen.cases["rerun"].result.id
    assert set(suspect.values()) == {()}


def test_a_duplicate_came_before_the_effect(stage: Stage) -> None:
    """The first body checks `self.claim.lost` before its effect, so the effect happens once.

    A destination that compares fences does not need this check.
    """
    frozen = freeze(stage, "before effect")
    stage.start_worker(concurrency=2, env=ENV)
    seen = {policy: case.again().wait_answer() for policy, case in frozen.cases.items()}
    assert seen == {
        "in_doubt": "OutcomeUnknown",
        "resume": "OutcomeUnknown",
        "rerun": "the result",
        "reconcile": "the result",
    }
    frozen.worker.resume()
    wait_for(lambda: "lease_lost" in frozen.worker.log_text(), message="the worker to notice the takeover")
    for policy in (
        "rerun",
        "reconcile",
    ):  # nothing took over the other two, so their own bodies would have the effect
        case = frozen.cases[policy]
        case.gate.open()
        sees = case.wait_final_answer("the result")
        ended = rf"\[{case.result.id}\] (succeeded|raised|retry|ignored)"  # also the body that was frozen
        wait_for(lambda ended=ended: re.search(ended, frozen.worker.log_text()), message=ended)  # type: ignore[misc]
        assert case.effects == 1, policy
        case.row(
            "frozen before effect, a duplicate meanwhile", "late", f"{sees}; the duplicate: {seen[policy]}"
        )
