"""``submit_many`` publishes the same messages as ``submit`` and loses none of them if the broker fails."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import amqp
import pytest
import redis
from celery import Celery, signals
from kombu import Exchange, Queue
from kombu.exceptions import OperationalError

from celery_idem import IdempotentTask
from celery_idem.integration import templates
from tests.support.servers import RabbitMQServer, RedisServer

QUEUE = "many"


@pytest.fixture
def app(redis_server: RedisServer) -> Iterator[Celery]:
    app = Celery("many", broker=redis_server.url, backend=redis_server.url, set_as_current=False)
    app.conf.update(
        idem_store=redis_server.url,
        idem_namespace=QUEUE,
        task_default_queue=QUEUE,
        task_routes={"shop.slow": {"queue": "many-slow"}},
        task_send_sent_event=True,
    )
    declared: Any = {"base": IdempotentTask, "shared": False, "intent": ("invoice",)}

    @app.task(name="shop.pay", **declared)
    def pay(invoice: str, cents: int = 1) -> None: ...

    @app.task(name="shop.slow", priority=3, expires=600, time_limit=60, compression="zlib", **declared)
    def slow(invoice: str, cents: int = 1) -> None: ...

    @app.task(name="shop.card", secret=("cents",), ignore_result=True, **declared)
    def card(invoice: str, cents: int = 1) -> None: ...

    empty(app)
    yield app
    app.close()


def empty(app: Celery) -> None:
    """Delete all records and messages, and bind one queue to a separate exchange."""
    redis.Redis.from_url(app.conf.broker_url).flushdb()
    with app.connection_for_write() as connection:
        Queue("many-bound", Exchange("many-exchange"), "many-key").bind(connection.default_channel).declare()


def taken(app: Celery) -> list[Any]:
    """Take the messages from the queues, oldest first, with their bodies still encoded."""
    client = redis.Redis.from_url(app.conf.broker_url)
    found = []
    for queue in sorted(client.keys(QUEUE + "*")):
        if client.type(queue) == b"list" and b"." not in queue:
            found += [
                (queue.split(b"\x06")[0], json.loads(one)) for one in reversed(client.lrange(queue, 0, -1))
            ]
            client.delete(queue)
    return found


def without_ids(message: Any) -> Any:
    """Return the message as text, without its task id, delivery tag and times."""
    queue, message = message
    task_id, times = message["headers"]["id"], ("eta", "expires", "idem-published", "idem-accepted")
    headers = {name: bool(value) if name in times else value for name, value in message["headers"].items()}
    properties = {
        name: v for name, v in message["properties"].items() if name not in ("delivery_tag", "expiration")
    }
    told = json.dumps([str(queue), {**message, "headers": headers, "properties": properties}], sort_keys=True)
    return told.replace(task_id, "the id")


GIVEN: list[tuple[str, dict[str, Any]]] = [
    ("shop.pay", {}),
    ("shop.slow", {}),
    ("shop.card", {}),
    (
        "shop.pay",
        {"scope": "acme", "headers": {"trace": "x"}, "queue": "many-other", "priority": 9, "shadow": "paid"},
    ),
    (
        "shop.pay",
        {"countdown": 60, "expires": 120, "serializer": "yaml", "compression": "gzip", "time_limit": 9},
    ),
    (
        "shop.pay",
        {"routing_key": "many-key", "exchange": "many-exchange", "reply_to": "here", "argsrepr": "shown"},
    ),
    ("shop.slow", {"soft_time_limit": 5, "ignore_result": True, "delivery_mode": 1, "link": "shop.pay"}),
]


@pytest.mark.parametrize(("name", "options"), GIVEN)
def test_messages_of_many_are_those_of_single_submits(
    app: Celery, name: str, options: dict[str, Any]
) -> None:
    task = app.tasks[name]
    options = dict(options)
    if "link" in options:
        options["link"] = app.tasks[options["link"]].s("linked")
    seen: list[tuple[str, str]] = []

    def note(sender: str, headers: Any, **_: Any) -> None:
        seen.append((sender, headers["id"]))

    calls = [{"invoice": "1", "cents": 5}, ("2", 6), {"invoice": "3"}]
    single = []
    for call in calls:
        args, kwargs = ((), call) if isinstance(call, dict) else (call, {})
        task.submit(*args, **kwargs, **options)
        single += taken(app)
    empty(app)
    signals.before_task_publish.connect(note)
    signals.after_task_publish.connect(note)
    try:
        receipts = task.submit_many(calls, **options)
    finally:
        signals.before_task_publish.disconnect(note)
        signals.after_task_publish.disconnect(note)
    many = taken(app)
    assert templates.fits(task, options)
    assert [one["headers"]["id"] for _, one in many] == [receipt.task_id for receipt in receipts]
    assert seen == [(name, receipt.task_id) for receipt in receipts for _ in range(2)]
    assert list(map(without_ids, many)) == list(map(without_ids, single))
    bodies = [[one["body"] for _, one in found] for found in (many, single)]
    assert bodies[0] == bodies[1]
    assert len(many) == 3


@pytest.mark.parametrize("flushed", [False, True])
def test_a_hundred_of_which_nobody_knows_what_the_broker_took_is_published_once_more(
    app: Celery, monkeypatch: pytest.MonkeyPatch, flushed: bool
) -> None:
    real, turns = templates.Template.together, []

    @contextmanager
    def breaks(self: templates.Template) -> Iterator[None]:
        turns.append("")
        with real(self):
            yield
            if len(turns) == 2 and not flushed:
                raise OperationalError("before the messages were sent")
        if len(turns) == 2:
            raise OperationalError("after they were sent")

    monkeypatch.setattr(templates.Template, "together", breaks)
    receipts = app.tasks["shop.pay"].submit_many([(str(n),) for n in range(250)])
    ids = [receipt.task_id for receipt in receipts]
    assert {(receipt.status, receipt.code) for receipt in receipts} == {("accepted", "")}
    published = [message["headers"]["id"] for _, message in taken(app)]
    again = ids[100:200] if flushed else []
    assert published == ids[:200] + again + ids[200:]
    assert len(turns) == 3


@pytest.mark.rabbitmq
def test_confirmations_of_many_are_awaited_together(
    app: Celery, rabbitmq: RabbitMQServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    awaited: list[str] = []
    real = amqp.Channel.basic_publish_confirm

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        awaited.append("")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(amqp.Channel, "basic_publish_confirm", counted)
    queue, full = f"many-{uuid.uuid4().hex}", {"x-max-length": 350, "x-overflow": "reject-publish"}
    app.conf.update(
        # Another name of the same host, so that kombu opens a new channel. A pooled one has the real method.
        broker_url=rabbitmq.url.replace("127.0.0.1", "localhost"),
        broker_transport_options={"confirm_publish": True},
        task_queues=[Queue(queue, queue_arguments=full)],
    )
    pay = app.tasks["shop.pay"]

    def queued() -> int:
        with app.connection_for_read() as connection:
            return int(connection.default_channel.queue_declare(queue, passive=True).message_count)

    told = {receipt.code for receipt in pay.submit_many([(str(n),) for n in range(250)], queue=queue)}
    assert (told, queued(), len(awaited)) == ({""}, 250, 3)
    # The queue has no room for all of them, and the broker does not say which of that hundred it refused.
    told = {receipt.code for receipt in pay.submit_many([(f"{n} more",) for n in range(150)], queue=queue)}
    assert (told, queued()) == ({"", "not_sent"}, 350)
    receipts = pay.submit_many([("the last",)], queue=queue)
    assert [(receipt.status, receipt.code) for receipt in receipts] == [("accepted", "not_sent")]


def test_a_task_with_a_part_of_its_own_in_publishing_keeps_it(app: Celery) -> None:
    published = []

    class Traced(IdempotentTask):
        def apply_async(self, args: Any = None, kwargs: Any = None, *more: Any, **options: Any) -> Any:
            published.append(args)
            return super().apply_async(args, kwargs, *more, **options)

    @app.task(base=Traced, shared=False, name="shop.traced", intent=("invoice",))
    def traced(invoice: str) -> None: ...

    traced.submit_many([("1",), ("2",)])
    assert published == [("1",), ("2",)]
    assert len(taken(app)) == 2
