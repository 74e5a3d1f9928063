"""The store goes down before the body, during it, and for longer than the worker waits.

No body runs twice, except with `on_store_error="run"`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from celery_idem import Ledger, OutcomeUnknown, StoreError
from tests.celery.conftest import SOON, Kind, Stage, start
from tests.conftest import running
from tests.support.servers import RedisServer
from tests.support.waiting import wait_for


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A separate server, so that broker and results stay up. It keeps its data on disk, as a store should."""
    with running(lambda: RedisServer(tmp_path_factory.mktemp("store"), appendonly=True)) as server:
        yield server


@pytest.fixture(scope="module")
def stage(
    redis: RedisServer, store: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("store-down")
    kind = Kind("prefork", "redis", True, 2)
    stage = start(kind, redis.url, redis.url_for(1), folder, idem_store=store.url)
    yield stage
    stage.worker.kill()


@pytest.fixture(autouse=True)
def _up_again(store: RedisServer) -> Iterator[None]:
    yield
    if not store.alive:
        store.restart()


def test_down_before_the_body_it_comes_back_and_uses_no_retries(
    stage: Stage, store: RedisServer, name: str
) -> None:
    store.kill()
    results = [stage.pay.delay(name) for _ in range(3)]
    retried = stage.retried.delay(f"{name}-retried", 3)  # it needs all of its retries
    wait_for(
        lambda: all(stage.worker.sent_back(r.id) for r in (*results, retried)),
        SOON,
        "messages that come back later",
    )
    assert stage.effects.count(name) == 0
    store.restart()
    assert stage.answers(*results) == [{"paid": 5, "of": [name]}] * 3
    assert [result.retries for result in results] == [0] * 3
    assert retried.get(timeout=SOON) == [3, 4]
    assert stage.effects.count(name) == 1


def test_frozen_before_the_body(stage: Stage, store: RedisServer, name: str) -> None:
    """The store may apply a claim after the worker stopped waiting. The redelivered message takes up that claim."""
    store.pause()
    try:
        result = stage.app.tasks["pay"].delay(name)
        wait_for(lambda: stage.worker.sent_back(result.id), SOON, lambda: result.state)
    finally:
        store.resume()
    assert result.get(timeout=SOON) == {"paid": 5, "of": [name]}
    assert stage.effects.count(name) == 1


def test_down_after_the_body_the_outcome_is_written_when_it_is_back(
    stage: Stage, store: RedisServer, name: str
) -> None:
    result = stage.slow.delay(name)
    stage.effects.wait(name)
    store.kill()
    stage.gate(name).open()
    wait_for(lambda: "settling" in stage.worker.log_text(), SOON, "the worker to notice")
    assert not result.ready()
    store.restart()
    assert result.get(timeout=SOON) == f"slow {name}"
    assert stage.slow.delay(name).get(timeout=SOON) == f"slow {name}"
    assert stage.effects.count(name) == 1


def test_down_for_longer_than_patience_ends_in_doubt_and_not_in_a_second_effect(
    stage: Stage, store: RedisServer, name: str
) -> None:
    result = stage.impatient.delay(name)
    stage.effects.wait(name)
    store.kill()
    stage.gate(name).open()
    assert result.get(timeout=SOON) == "done"  # the first caller gets the result: this worker knows it
    store.restart()
    with pytest.raises(OutcomeUnknown) as caught:
        stage.impatient.delay(name).get(timeout=SOON)
    entry = Ledger.from_app(stage.app).get(str(caught.value.key))
    assert entry is not None
    assert entry.state == "in_doubt"
    assert stage.effects.count(name) == 1


def test_a_task_may_raise_or_run_without_a_store(stage: Stage, store: RedisServer, name: str) -> None:
    store.kill()
    with pytest.raises(StoreError):
        stage.on_store_error_raise.delay(name).get(timeout=SOON)
    assert stage.effects.count(name) == 0
    for n in (1, 2):  # on_store_error="run" lets both calls run
        assert stage.on_store_error_run.delay(name).get(timeout=SOON) == "done"
        assert stage.effects.count(name) == n
    store.restart()
    assert stage.on_store_error_raise.delay(name).get(timeout=SOON) == "done"
