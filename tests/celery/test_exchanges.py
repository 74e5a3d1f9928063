"""If an exchange copies a message to several queues, copies that wait do not multiply."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.celery.exchanges_app import make
from tests.support.effects import Effects, Gate
from tests.support.servers import RabbitMQServer, RedisServer
from tests.support.waiting import wait_for
from tests.support.workers import CeleryWorker


@pytest.mark.rabbitmq
@pytest.mark.redis
def test_copies_that_wait_do_not_multiply(
    rabbitmq: RabbitMQServer, redis: RedisServer, start_worker: Callable[..., CeleryWorker], tmp_path: Path
) -> None:
    prefix = uuid.uuid4().hex[:8]
    store = redis.url_for(1)
    env = {
        "EXCHANGES_BROKER": rabbitmq.url,
        "EXCHANGES_STORE": store,
        "EXCHANGES_FOLDER": str(tmp_path),
        "EXCHANGES_PREFIX": prefix,
    }
    workers = [
        start_worker(
            "tests.celery.exchanges_app:app",
            pool="threads",
            concurrency=4,
            env=env,
            options=("-Q", f"{prefix}-topic-{name},{prefix}-fanout-{name}"),
        )
        for name in ("one", "two")
    ]
    app = make(rabbitmq.url, store, tmp_path, prefix)
    slow = app.tasks["slow"]
    sent = {
        kind: slow.apply_async(
            (kind,), exchange=f"{prefix}-{kind}", routing_key="orders.new", queue=f"{prefix}-{kind}-one"
        )
        for kind in ("topic", "fanout")
    }

    def received(kind: str) -> list[int]:
        """Return how many deliveries of the message each worker had, the smaller number first."""
        return sorted(worker.log_text().count(f"[{sent[kind].id}] received") for worker in workers)

    for kind in sent:
        # The worker that runs the body has one delivery. The other copy goes back to its own queue only.
        wait_for(
            lambda kind=kind: received(kind)[1] >= 4, message=lambda: str({k: received(k) for k in sent})
        )
        assert received(kind)[0] == 1
        Gate(tmp_path / f"gate-{kind}").open()
    assert {kind: result.get(timeout=30) for kind, result in sent.items()} == {k: f"slow {k}" for k in sent}
    effects = Effects(tmp_path / "effects.jsonl")
    assert [effects.count(kind) for kind in sent] == [1, 1]
    app.close()
