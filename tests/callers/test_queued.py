"""Repeated calls of an action that is queued and not yet claimed publish one message.

Recovery publishes the accepted calls that the broker did not take.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from typing import Any

import httpx
import pydantic
import pytest
from amqp.exceptions import PreconditionFailed
from celery import Celery, group
from kombu import Exchange, Queue
from kombu.exceptions import OperationalError
from kombu.transport.memory import Transport

from celery_idem import IdempotentTask, Ledger
from celery_idem.adapters.http import door
from celery_idem.adapters.tools import tool_of
from celery_idem.core.model import KEY, MESSAGE, OCCURRENCE, SCOPE, Fingerprint, Request
from celery_idem.engine import owners
from celery_idem.integration import recovering
from celery_idem.integration.messages import of_submission
from celery_idem.integration.recovering import recover
from tests.callers.conftest import messages


async def post(app: Celery, bodies: list[dict[str, Any]]) -> list[httpx.Response]:
    transport = httpx.ASGITransport(app=door(app, ["shop.pay"], token="t"))
    headers = {"authorization": "Bearer t", "prefer": "wait=0"}
    async with httpx.AsyncClient(transport=transport, base_url="http://door", headers=headers) as client:
        return list(await asyncio.gather(*(client.post("/tasks/shop.pay", json=body) for body in bodies)))


def test_repeats_over_http_are_one_message(app: Celery) -> None:
    answers = asyncio.run(post(app, [{"invoice": "1"}] * 8))
    assert sorted(answer.status_code for answer in answers) == [202, *[409] * 7]
    assert all("retry-after" in answer.headers for answer in answers)
    assert messages(app) == 1
    other = asyncio.run(post(app, [{"invoice": "2"}]))
    assert (other[0].status_code, messages(app)) == (202, 2)


def test_threads_that_publish_at_once_are_one_message(app: Celery) -> None:
    tool = tool_of(app, "shop.pay")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: tool.submit({"invoice": "1"}).status, range(40)))
    assert sorted(found) == ["accepted", *["in_progress"] * 39]
    assert messages(app) == 1


def test_other_arguments_are_refused_at_once(app: Celery) -> None:
    tool = tool_of(app, "shop.pay")
    found = [tool.submit({"invoice": "1", "cents": cents}).status for cents in (1, 2, 1, 2)]
    assert found == ["accepted", "conflict", "in_progress", "conflict"]
    assert messages(app) == 1


def test_what_was_claimed_since_may_be_published_again(app: Celery) -> None:
    tool, task = tool_of(app, "shop.pay"), app.tasks["shop.pay"]
    tool.submit({"invoice": "1"})
    assert task.apply(kwargs={"invoice": "1"}).get() == "paid 1"
    assert tool.submit({"invoice": "1"}).status == "replayed"
    ledger = Ledger.from_app(app)
    entry = ledger.get(task.intent_key("1"))
    assert entry is not None
    # A released record: the effect did not happen, so the next call is published.
    from tests.operators.intents import claimed

    key = task.intent_key("2")
    tool.submit({"invoice": "2"})
    claimed(ledger, key).release(0.0)
    assert tool.submit({"invoice": "2"}).status == "accepted"
    assert tool.submit({"invoice": "2"}).status == "in_progress"
    assert messages(app) == 3


def test_one_that_could_not_be_published_is_not_remembered(
    app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tool_of(app, "shop.pay")
    with monkeypatch.context() as broken:
        broken.setattr(app, "send_task", lambda *args, **kwargs: 1 / 0)
        assert tool.submit({"invoice": "1"}).status == "not_run"
    assert tool.submit({"invoice": "1"}).status == "accepted"


def test_two_publishers_are_one_message(app: Celery) -> None:
    task = app.tasks["shop.pay"]
    app.conf.idem_accept_on_publish = True
    first = task.delay("1")
    assert task.delay("1").id == first.id
    assert task.s("1").apply_async().id == first.id
    assert messages(app) == 1
    assert task.submit("1").task_id == first.id
    # Each of these is published: its arguments differ, or something waits for this call's own task id.
    others = [
        task.delay("1", cents=2),
        task.apply_async(("1",), task_id="mine"),
        task.apply_async(("1",), link=task.s("2")),
        *group(task.s("1"), task.s("1")).apply_async(),
    ]
    assert len({first.id, *(other.id for other in others)}) == 6
    assert messages(app) == 6
    entry = Ledger.from_app(app).get(task.intent_key("1"))
    assert entry is not None
    assert (entry.state, entry.record.task_id) == ("accepted", first.id)


def test_two_beats_of_one_tick_are_one_message(app: Celery) -> None:
    app.conf.idem_accept_on_publish = True
    task = app.tasks["shop.pay"]
    ids = {task.apply_async(("1",), headers={OCCURRENCE: when}).id for when in ("10:00", "10:00", "11:00")}
    assert (len(ids), messages(app)) == (2, 2)


def test_what_the_broker_does_not_take_is_accepted_with_the_setting(
    app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*args: Any, **kwargs: Any) -> None:
        raise OperationalError("away")

    app.conf.idem_accept_on_publish = True
    task = app.tasks["shop.pay"]
    with monkeypatch.context() as broken:
        broken.setattr(app, "send_task", away)
        first = task.delay("1")
    assert [one.published for one in recovering.recover(app)] == [True]
    assert messages(app) == 1
    assert task.delay("1").id == first.id


def test_a_call_of_which_no_message_can_be_made_holds_up_no_other(
    app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    app.conf.task_create_missing_queues = False
    ledger, task = Ledger.from_app(app), app.tasks["shop.pay"]
    real = app.send_task

    def refuses(name: str, *args: Any, **options: Any) -> Any:
        if options["task_id"] == "refused":
            raise PreconditionFailed
        return real(name, *args, **options)

    monkeypatch.setattr(app, "send_task", refuses)
    monkeypatch.setattr(Transport, "channel_errors", (PreconditionFailed,))
    for invoice, options in (("bad", {"queue": "nowhere"}), ("refused", {}), ("good", {})):
        call = of_submission(task, task.intent_key(invoice), (invoice,), {}, invoice, options, {})
        request = Request(owners.mint(), invoice, Fingerprint(), task.guard.options.policy, call=call)
        ledger.accept(task.intent_key(invoice), request, 0)
    found = {each.entry.key: each.published for each in recover(app)}
    assert found == {task.intent_key(n): n == "good" for n in ("bad", "refused", "good")}
    assert messages(app) == 1
    assert not list(recover(app))  # the others wait for their back-off


class Tenant(enum.Enum):
    ACME = "acme"


class Invoice(pydantic.BaseModel):
    number: int


tenant: str | None = None


def current_tenant() -> str | None:
    return tenant


@contextlib.contextmanager
def broker_away(app: Celery) -> Iterator[None]:
    def away(*args: Any, **kwargs: Any) -> None:
        raise OperationalError("away")

    with pytest.MonkeyPatch.context() as broken:
        broken.setattr(app, "send_task", away)
        yield


def taken(app: Celery) -> list[Any]:
    """Take all messages from the queue and return the headers and body of each."""
    found = []
    with (
        app.connection_for_read() as connection,
        connection.SimpleQueue(app.conf.task_default_queue) as queue,
    ):
        while queue.qsize():
            message = queue.get()
            found.append((message.headers, message.payload))
    return found


def test_what_recovery_publishes_is_the_same_call(app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    app.conf.idem_scope = f"{__name__}:current_tenant"
    task = app.tasks["shop.pay"]
    monkeypatch.setitem(globals(), "tenant", "acme")
    with broker_away(app):
        receipts = [task.submit("1"), task.submit("2", scope=Tenant.ACME)]
        monkeypatch.setitem(globals(), "tenant", None)
        receipts.append(task.submit("3"))
    monkeypatch.setitem(globals(), "tenant", "of another call")
    assert {receipt.status for receipt in receipts} == {"accepted"}
    assert [one.published for one in recover(app)] == [True, True, True]
    assert sorted(headers[KEY] for headers, _ in taken(app)) == sorted(receipt.key for receipt in receipts)


def test_a_call_that_was_made_without_a_scope_is_accepted_without_one(
    app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    app.conf.update(idem_scope=f"{__name__}:current_tenant", idem_accept_on_publish=True)
    monkeypatch.setitem(globals(), "tenant", "of the process that publishes it")
    app.tasks["shop.pay"].apply_async(("1",), headers={MESSAGE: ""})  # as for a signature inside a message
    ((headers, _),) = taken(app)
    assert [entry.key for entry in Ledger.from_app(app).list()] == [headers[KEY]]
    assert SCOPE not in headers


def test_recovery_publishes_to_the_queue_that_its_producer_chose(app: Celery) -> None:
    worker_has, app.conf.task_routes = app.conf.task_default_queue, {"shop.*": f"eu-{uuid.uuid4().hex}"}
    queue = app.conf.task_routes["shop.*"]
    with broker_away(app):
        assert app.tasks["shop.pay"].submit("1").status == "accepted"
    app.conf.task_routes = None  # as in a worker that gets its queues from the command line
    del app.amqp.router
    assert [one.published for one in recover(app)] == [True]
    assert messages(app) == 0
    app.conf.task_default_queue = queue
    assert (worker_has != queue, messages(app)) == (True, 1)


def test_recovery_publishes_to_queues_and_with_headers_that_were_objects(app: Celery) -> None:
    task, direct, topic = app.tasks["shop.pay"], f"direct-{uuid.uuid4().hex}", f"topic-{uuid.uuid4().hex}"
    bound = Queue(topic, Exchange(topic, "topic"), "invoices.eu")
    with app.connection_for_write() as connection:
        bound.bind(connection.default_channel).declare()
    odd = {"at": datetime(2026, 11, 28, tzinfo=timezone.utc), "id": uuid.UUID(int=7), "raw": b"\xff"}
    odd["like kombu's"] = {"__type__": "bytes", "__value__": "x"}
    with broker_away(app):
        task.submit("1", queue=Queue(direct, Exchange(direct, "direct"), direct), headers=odd)
        task.submit("2", queue=bound)
        task.submit("3", exchange=Exchange(topic, "topic"), routing_key="invoices.eu", headers={"a": [1]})
    assert [one.published for one in recover(app)] == [True] * 3
    assert (messages(app), messages(app, direct), messages(app, topic)) == (0, 1, 2)
    app.conf.task_default_queue = direct
    ((headers, _),) = taken(app)
    assert {name: headers[name] for name in odd} == odd


def test_models_are_accepted_as_they_are_published(app: Celery) -> None:
    @app.task(base=IdempotentTask, shared=False, name="shop.file", intent=("invoice",), pydantic=True)
    def file(invoice: Invoice) -> int:
        return invoice.number

    with broker_away(app):
        assert file.submit(Invoice(number=1)).status == "accepted"
    assert [one.published for one in recover(app)] == [True]
    assert [body[0] for _, body in taken(app)] == [[{"number": 1}]]


def test_an_accepted_call_expires_when_its_caller_said(app: Celery) -> None:
    task = app.tasks["shop.pay"]
    with broker_away(app):
        late, soon = task.submit("1", expires=60), task.submit("2", expires=0.2)
        task.expires = 0.2  # the default of the task
        own = task.submit("3")
    time.sleep(0.3)
    assert {one.entry.key: one.published for one in recover(app)} == {
        late.key: True,
        soon.key: False,
        own.key: False,
    }
    assert [headers[KEY] for headers, _ in taken(app)] == [late.key]
    assert (soon.wait(0).status, own.wait(0).status) == ("not_run", "not_run")
    assert list(recover(app)) == []


def test_secrets_of_a_linked_task_are_not_in_the_record(app: Celery) -> None:
    @app.task(base=IdempotentTask, shared=False, name="shop.card", intent=("invoice",), secret=("card",))
    def card(invoice: str, card: str) -> None:
        """Nothing."""

    task = app.tasks["shop.pay"]
    receipt = task.submit("1", link=card.si("1", card="4111"))
    entry = Ledger.from_app(app).get(receipt.key)
    assert entry is not None
    assert entry.record.call
    assert b"4111" not in entry.record.call
