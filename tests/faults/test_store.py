"""The store is killed, frozen, or restarted with or without its data. Broker and results are on another server."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from tests.faults.app import POLICIES
from tests.faults.conftest import Case, Stage
from tests.support.servers import RedisServer
from tests.support.waiting import wait_for

# The store answers within half a second or counts as dead. The default of five seconds would slow the tests.
QUICK = "?socket_timeout=0.5"


@pytest.fixture
def make(
    make_stage: Callable[..., Stage], own_redis: RedisServer, start_redis: Callable[..., RedisServer]
) -> Callable[..., Stage]:
    """`make(keeps=True, FAULTS_X=…)` returns a stage with a worker and a separate store that keeps its data."""

    def make(*, keeps: bool, **env: str) -> Stage:
        store = start_redis(appendonly=keeps)
        stage = make_stage("redis", own_redis.url_for(0), store, own_redis, QUICK)
        stage.start_worker(concurrency=4, env=env)
        return stage

    return make


def hang(stage: Stage, at: str = "after effect") -> dict[str, Case]:
    cases = {policy: stage.call(f"{policy}.late", at=at, how="hang") for policy in POLICIES}
    for case in cases.values():
        case.wait_hanging()
    return cases


@pytest.mark.parametrize("keeps", [True, False])
def test_store_killed_before_settle(make: Callable[..., Stage], keeps: bool) -> None:
    """The worker tries to settle until the store is back. If the store lost the record, it is written again."""
    stage = make(keeps=keeps)
    cases = hang(stage)
    stage.store.kill()
    for case in cases.values():
        case.gate.open()
    log = stage.workers[0].log_text
    wait_for(lambda: log().count("store_error") >= len(cases), message="an error of the store in each case")
    stage.store.restart()
    for case in cases.values():
        sees = case.wait_answer()
        assert (sees, case.effects, case.state) == ("the result", 1, "succeeded"), case.task
        assert case.again().wait_answer() == "the result"
        assert case.effects == 1
        case.row(f"store killed before settle, back {'with' if keeps else 'without'} its data", "late", sees)


def test_store_dead_for_longer_than_patience(make: Callable[..., Stage]) -> None:
    """The caller receives the outcome, but it is not in the record: the next caller gets what the policy decides."""
    stage = make(keeps=True, FAULTS_PATIENCE="0.5", FAULTS_LEASE="2")
    cases = {p: c for p, c in hang(stage).items() if p != "resume"}
    stage.store.kill()
    for case in cases.values():
        case.gate.open()
    seen = {policy: case.wait_answer() for policy, case in cases.items()}
    stage.store.restart()
    next_one = {
        "in_doubt": ("OutcomeUnknown", 1, "in_doubt"),
        "rerun": ("the result", 2, "succeeded"),
        "reconcile": ("the result", 1, "succeeded"),
    }
    for policy, case in cases.items():
        assert seen[policy] == "the result"
        sees = case.again().wait_answer()
        assert (sees, case.effects, case.state) == next_one[policy], policy
        case.row("store lost for good at settle", "late", f"the result; the next caller: {sees}")


def test_store_frozen_during_claim(make: Callable[..., Stage]) -> None:
    """The store writes the claim late, and its process receives no answer. The body runs, without a doubt."""
    stage = make(keeps=False)
    stage.store.pause()
    cases = {policy: stage.call(f"{policy}.late") for policy in POLICIES}
    log = stage.workers[0].log_text
    wait_for(lambda: log().count("store_error") >= len(cases), message="claims without an answer")
    assert stage.effects.count() == 0
    stage.store.resume()
    for case in cases.values():
        sees = case.wait_answer()
        assert (sees, case.effects, case.state) == ("the result", 1, "succeeded"), case.task
        case.row("store frozen during claim", "late", sees)


def test_store_frozen_during_settle(make: Callable[..., Stage]) -> None:
    stage = make(keeps=False)
    cases = hang(stage)
    stage.store.pause()
    for case in cases.values():
        case.gate.open()
    log = stage.workers[0].log_text
    wait_for(lambda: log().count("store_error") >= len(cases), message="outcomes without an answer")
    stage.store.resume()
    for case in cases.values():
        sees = case.wait_answer()
        assert (sees, case.effects, case.state) == ("the result", 1, "succeeded"), case.task
        case.row("store frozen during settle", "late", sees)


def test_child_killed_while_the_store_is_dead(make: Callable[..., Stage]) -> None:
    """The parent cannot end the claim. A doubt is answered at once; other policies wait for the store."""
    stage = make(keeps=True)
    cases = hang(stage)
    stage.store.kill()
    for case in cases.values():
        os.kill(case.wait_hanging(), signal.SIGKILL)
    assert cases["in_doubt"].wait_answer() == "OutcomeUnknown"
    stage.store.restart()
    expected = {
        "in_doubt": ("OutcomeUnknown", 1),
        "resume": ("OutcomeUnknown", 1),
        "rerun": ("the result", 2),
        "reconcile": ("the result", 1),
    }
    for policy, case in cases.items():
        sees = case.wait_answer(30)
        assert (sees, case.effects) == expected[policy], policy
        if policy != "in_doubt":
            case.wait_state("succeeded" if sees == "the result" else "in_doubt")
            case.row("child killed after effect, store dead", "late", sees)
    # The doubt could not be written. The next caller finds a claim whose process is dead.
    case = cases["in_doubt"]
    assert case.again().wait_answer() == "OutcomeUnknown"
    assert (case.effects, case.state) == (1, "in_doubt")
    case.row("child killed after effect, store dead", "late", "OutcomeUnknown")


def test_what_lost_data_costs(make: Callable[..., Stage]) -> None:
    """A finished action runs again if the store has lost its record."""
    stage = make(keeps=False)
    case = stage.call("in_doubt.late")
    assert case.wait_answer() == "the result"
    stage.store.kill()
    stage.store.restart()
    sees = case.again().wait_answer()
    assert (sees, case.effects) == ("the result", 2)
    case.row("store back without its data, then a duplicate", "late", f"the result; the next caller: {sees}")


def test_running_work_gets_its_record_back(make: Callable[..., Stage]) -> None:
    """The next renewal writes the lost record again. A duplicate that comes later finds the claim."""
    stage = make(keeps=False, FAULTS_LEASE="2")
    cases = hang(stage)
    stage.store.kill()
    stage.store.restart()
    for case in cases.values():
        case.wait_state("running")
        duplicate = case.again()
        case.gate.open()
        sees = case.wait_answer()
        assert duplicate.wait_answer() == sees
        assert (sees, case.effects, case.state) == ("the result", 1, "succeeded"), case.task
        case.row("store back without its data, renewed, then a duplicate", "late", sees)
