"""Recovery without workers: what it publishes and answers while others recover too, or a server is down."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
from celery import Celery

from celery_idem import IdempotentTask, OutcomeUnknown
from celery_idem.core import protocol
from celery_idem.core.model import Fingerprint, Request, Stored
from celery_idem.engine import owners
from celery_idem.integration import messages, recovering
from tests.support.servers import RedisServer
from tests.support.waiting import wait_for

pytestmark = pytest.mark.redis


def make(server: str) -> Celery:
    app = Celery("recoverers", broker=f"{server[:-1]}0", backend=f"{server[:-1]}2", set_as_current=False)
    app.conf.update(
        idem_store=f"{server[:-1]}1", task_default_queue=f"queue-{uuid.uuid4().hex}", idem_lease=0.1
    )

    @app.task(base=IdempotentTask, shared=False, name="shop.pay", intent=("invoice",))
    def pay(invoice: str) -> str:
        return f"paid {invoice}"

    return app


def accept(app: Celery, number: int) -> None:
    """Accept calls without publishing them."""
    task = app.tasks["shop.pay"]
    for n in range(number):
        call = messages.of_submission(task, task.intent_key(str(n)), (str(n),), {}, f"task-{n}", {}, {})
        request = Request(owners.mint(), f"task-{n}", Fingerprint(), task.guard.options.policy, call=call)
        task.guard.ledger.accept(task.intent_key(str(n)), request, 0)


def queued(app: Celery) -> int:
    with app.connection_for_read() as connection:
        return int(connection.default_channel.client.llen(app.conf.task_default_queue))


def test_several_that_look_at_once_publish_each_call_once(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In a process only one recovery runs at a time. Here four threads stand for four processes.
    monkeypatch.setattr(recovering.FORKS, "held_off", nullcontext())
    monkeypatch.setattr(recovering, "PAUSE", 0.0)
    app = make(redis_url)
    accept(app, 40)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: sum(one.published for one in recovering.recover(app)), range(4)))
    assert (sum(found), queued(app)) == (40, 40)
    app.close()


def test_a_store_that_is_away_is_looked_at_again(
    start_redis: Callable[..., RedisServer],
    redis_url: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = start_redis(appendonly=True)
    app = make(redis_url)
    app.conf.idem_store = server.url_for(1)
    accept(app, 3)
    server.kill()
    monkeypatch.setattr(recovering, "EVERY", 0.05)
    recoverer = recovering.Recoverer(app)
    with caplog.at_level(logging.WARNING):
        recoverer.start()
        wait_for(lambda: "recovery failed; trying again" in caplog.text, message="a recovery that fails")
    assert queued(app) == 0
    server.restart()
    wait_for(lambda: queued(app) == 3, message="the calls to be published")
    recoverer.stop()
    app.close()


def test_what_is_given_up_is_told_once(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("GRACE", 0), ("PUBLISHED_WAIT", 0), ("JITTER", 1)):
        monkeypatch.setattr(protocol, name, value)
    app = make(redis_url)
    accept(app, 1)
    task = app.tasks["shop.pay"]
    ledger, policy, key = task.guard.ledger, task.guard.options.policy, task.intent_key("0")
    entry = ledger.get(key)
    accepted = Stored(entry.record.owner, entry.stamp)
    ledger.claim(
        key,
        Request(owners.mint(), "task-0", Fingerprint(), policy, call=entry.record.call, accepted=accepted),
    )
    answer = app.AsyncResult("task-0")
    wait_for(lambda: ledger.get(key).state == "lapsed", message="its lease to lapse")
    assert [one.published for _ in range(policy.max_attempts) for one in recovering.recover(app)] == [
        True
    ] * policy.max_attempts
    with monkeypatch.context() as away:
        away.setattr(type(task.backend), "store_result", lambda *_, **__: 1 / 0)
        assert ["could not be told" in one.why for one in recovering.recover(app)] == [True]
    assert (ledger.get(key).state, answer.state) == ("in_doubt", "PENDING")
    assert [one.why for one in recovering.recover(app)] == [recovering.TOLD]
    assert isinstance(answer.result, OutcomeUnknown)
    assert answer.result.key == key
    assert list(recovering.recover(app)) == []  # a person decides
    assert ledger.get(key).state == "in_doubt"
    app.close()
