"""A message that is redelivered after its record may have expired is in doubt and does not run."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from celery_idem import IdempotentTask, Ledger, OutcomeUnknown, submit
from celery_idem.core.model import MESSAGE, PUBLISHED
from tests.celery import apps
from tests.celery.conftest import SOON
from tests.support import hand
from tests.support.effects import Effects
from tests.support.servers import RedisServer
from tests.support.waiting import wait_for
from tests.support.workers import CeleryWorker

KEPT = 1.0  # seconds that an outcome is kept


@pytest.mark.parametrize("broker", ["redis", "rabbitmq"])
def test_what_is_delivered_again_after_its_record_expired(
    broker: str, request: pytest.FixtureRequest, redis: RedisServer, tmp_path: Path
) -> None:
    """A message that is redelivered after its record expired is in doubt, unless the task has `late="run"`.

    A first delivery runs, however old it is.
    """
    server: Any = redis if broker == "redis" else request.getfixturevalue("rabbitmq")
    place = {
        "broker": server.url,
        "backend": redis.url_for(3),
        "folder": str(tmp_path),
        "queue": f"late-{broker}-{time.time_ns()}",
        "conf": {
            "idem_namespace": broker,
            "idem_result_ttl": KEPT,
            "task_annotations": {"slow": {"late": "run"}},
        },
    }
    app = apps.make(**place)
    effects, ledger = Effects(tmp_path / "effects.jsonl"), Ledger.from_app(app)
    pay, slow = app.tasks["pay"], app.tasks["slow"]
    (tmp_path / "gate-allowed").touch()
    calls = {"again": pay.apply_async(("again",)), "allowed": slow.apply_async(("allowed",))}
    with app.connection_for_read() as connection:  # it is closed without acknowledging
        queue = connection.default_channel
        for _ in calls:
            wait_for(lambda: queue.basic_get(place["queue"]), SOON, "a first delivery")
        pay.apply(("again",))
        slow.apply(("allowed",))
        first = pay.apply_async(("first",))
        for task, one in ((pay, "again"), (slow, "allowed")):
            wait_for(lambda t=task, o=one: ledger.get(t.intent_key(o)) is None, SOON, "the record to expire")  # type: ignore[misc]
        time_passes = int(time.time()) + KEPT + 1
        wait_for(lambda: time.time() > time_passes, SOON, "the messages to be too old")
    env = {apps.ENV: json.dumps(place)}
    worker = CeleryWorker("tests.celery.apps:app", tmp_path, pool="solo", concurrency=1, env=env)
    try:
        with pytest.raises(OutcomeUnknown, match="so late"):
            calls["again"].get(timeout=SOON)
        assert calls["allowed"].get(timeout=SOON) == "slow allowed"
        assert first.get(timeout=SOON) == {"paid": 5, "of": ["first"]}  # also old, but not delivered before
        counted = {one: effects.count(one) for one in ("again", "allowed", "first")}
        assert counted == {"again": 1, "allowed": 2, "first": 1}
        entry = ledger.get(pay.intent_key("again"))
        assert entry is not None
        assert (entry.state, entry.record.task_id) == ("in_doubt", calls["again"].id)
    finally:
        worker.kill()
        app.close()


def test_when_a_call_was_due_first_stays_with_its_messages() -> None:
    app = hand.application()

    @app.task(base=IdempotentTask, bind=True, intent=("n",), name="tries")
    def tries(self: Any, n: int) -> None:
        if self.request.retries < 2:
            raise self.retry(countdown=0)

    before = int(time.time())
    tries.apply_async((1,), headers={PUBLISHED: 5})  # a header copied from another message
    tries.apply_async((2,), countdown=1000)
    tries.apply_async((3,), eta="2001-09-09T01:46:40+00:00")
    due = [hand.take(app).headers[PUBLISHED] for _ in range(3)]
    assert before <= due[0] <= time.time()
    assert before + 1000 <= due[1] <= time.time() + 1000
    assert due[2] == 10**9
    tries.apply_async((4,), eta="2001-09-09T01:46:40+00:00")
    assert [headers[PUBLISHED] for headers in hand.drain(app)] == [10**9] * 3


def test_a_producer_without_the_task_says_when_its_call_was_due() -> None:
    app = hand.application()
    eta, copied = "2001-09-09T01:46:40+00:00", {MESSAGE: "another", PUBLISHED: 5}
    submit(app, "far.away", (1,), idempotency_key="a", eta=eta)
    app.send_task("far.away", (2,), scope="acme", eta=eta.removesuffix("+00:00"))
    app.send_task("far.away", (3,), headers=copied, eta=eta)
    told = [hand.take(app).headers for _ in range(3)]
    assert [headers[PUBLISHED] for headers in told] == [10**9] * 3
    assert all(headers[MESSAGE] == headers["id"] for headers in told)


def test_a_message_that_does_not_say_it_is_as_old_as_its_first_delivery() -> None:
    app = hand.application()

    @app.task(base=IdempotentTask, bind=True, intent=("n",), name="tries")
    def tries(self: Any, n: int) -> None:
        if not self.request.retries:
            raise self.retry(countdown=0)

    before = int(time.time())
    for headers in ({}, {PUBLISHED: 5}):
        app.send_task("tries", (len(headers),), headers=headers)
        message = hand.take(app)
        message.headers.pop(MESSAGE, None)
        message.headers.update({MESSAGE: "another"} if headers else {})
        hand.deliver(app, message)
        assert before <= hand.take(app).headers[PUBLISHED] <= time.time()
