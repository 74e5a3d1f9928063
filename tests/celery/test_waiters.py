"""A hundred callers wait for one long body. The commands and messages that each of them costs are bounded."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from tests.celery.conftest import Kind, Stage, start
from tests.celery.waiters import (
    Counter,
    at_receipts,
    at_the_worker,
    most_commands,
    most_looks,
    most_returns,
    renewals,
)
from tests.conftest import running
from tests.support.servers import RedisServer

pytestmark = [pytest.mark.redis, pytest.mark.slow]

WAITERS = 100

LEASE = 30.0
"""Seconds. This is the default. With a shorter lease, duplicates come back earlier to see if the holder is dead."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis server for records only, so that all of its commands come from the guard."""
    with running(lambda: RedisServer(tmp_path_factory.mktemp("waiters-store"))) as server:
        yield server


@pytest.fixture(scope="module")
def stage(
    redis: RedisServer, store: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stage]:
    kind = Kind("threads", "redis", True, 8)
    folder = tmp_path_factory.mktemp("waiters")
    stage = start(kind, redis.url, redis.url_for(1), folder, idem_store=store.url, idem_lease=LEASE)
    yield stage
    stage.worker.kill()
    gc.collect()
    stage.app.close()


def test_duplicates_at_the_worker(stage: Stage, redis: RedisServer, store: RedisServer, name: str) -> None:
    def came_back_three_times(seconds: float, counter: Counter) -> bool:
        return counter.now()[1] >= WAITERS * (1 + 3)

    cost = at_the_worker(stage, lambda: Counter(store, redis), name, WAITERS, came_back_three_times)
    assert cost.answers == [f"slow {name}"] * (WAITERS + 1)
    assert stage.effects.count(name) == 1
    # No duplicate costs more messages and commands than its back-off allows.
    assert cost.messages <= WAITERS * most_returns(cost.seconds)
    assert cost.commands <= WAITERS * most_commands(cost.seconds) + renewals(cost.seconds, LEASE)


def test_receipts(stage: Stage, redis: RedisServer, store: RedisServer, name: str) -> None:
    def looked_a_dozen_times(seconds: float, counter: Counter) -> bool:
        return counter.now()[0] >= WAITERS * 12

    cost = at_receipts(stage, lambda: Counter(store, redis), name, WAITERS, looked_a_dozen_times)
    assert cost.answers == [f"slow {name}"] * (WAITERS + 1)
    assert stage.effects.count(name) == 1
    assert cost.messages == 0
    looks = 1 + most_looks(cost.seconds)  # one of `submit`, the others of `wait`
    assert cost.commands <= (WAITERS + 1) * looks + renewals(cost.seconds, LEASE)  # 1: the first caller
