"""Runs some fault tests without the guard. They must fail: a test that passes without the guard proves nothing.

The tests chosen here take seconds. `FAULTS_APP=tests.faults.unguarded` removes the guard from all fault tests
(see CONTRIBUTING.md).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from tests.faults import conftest, test_broker, test_child_killed, test_interrupted
from tests.faults.conftest import Case, Stage
from tests.support.servers import RedisServer
from tests.support.workers import CeleryWorker


def of(test: Callable[..., None], **arguments: str) -> object:
    """Return one case of a parametrized test."""
    return pytest.param(partial(test, **arguments), id="-".join([test.__name__, *arguments.values()]))


@pytest.fixture(scope="module")
def stage(make_stage: Callable[..., Stage], own_redis: RedisServer) -> Stage:
    return make_stage("redis", own_redis.url_for(0), own_redis)


@pytest.fixture(autouse=True)
def _unguarded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conftest, "APP", "tests.faults.unguarded")
    # Without the guard there is no record to wait for. The tests have to fail because of the effects.
    monkeypatch.setattr(Case, "wait_state", lambda case, *states, timeout=0.0: states[0])
    monkeypatch.setattr(Case, "state", "succeeded")


@pytest.fixture(scope="module")
def worker(stage: Stage) -> CeleryWorker:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conftest, "APP", "tests.faults.unguarded")
        return stage.start_worker(concurrency=2)


def twice(stage: Stage) -> list[str]:
    return [intent for intent, count in stage.effects.counts().items() if count > 1]


@pytest.mark.parametrize(
    "test",
    [
        of(test_child_killed.test_child_killed, point="before claim", policy="in_doubt"),
        of(test_child_killed.test_child_killed, point="after settle", policy="resume"),
        of(test_interrupted.test_killed_after_its_work, policy="in_doubt"),
        of(test_interrupted.test_killed_after_its_work, policy="reconcile"),
    ],
)
def test_without_the_claim_this_test_fails(
    stage: Stage, worker: CeleryWorker, test: Callable[..., None]
) -> None:
    before = len(twice(stage))
    given = {"worker": worker} if "worker" in test.func.__code__.co_varnames else {}  # type: ignore[attr-defined]
    with pytest.raises(AssertionError):
        test(stage, **given)
    assert len(twice(stage)) > before, "it failed, but not because something happened twice"


def test_without_the_claim_a_redelivery_runs_again(
    make_stage: Callable[..., Stage], own_redis: RedisServer
) -> None:
    stage = make_stage("redis", own_redis.url_for(0), own_redis)
    with pytest.raises(AssertionError):
        test_broker.test_visibility_timeout_shorter_than_the_task(stage)
    assert twice(stage), "it failed, but not because something happened twice"
