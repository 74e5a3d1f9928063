"""A message that waits goes back unchanged, to its own queue only. If it cannot go back, it waits in its slot."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from celery.app.task import Context
from celery.exceptions import Ignore, Reject
from celery.worker.strategy import proto1_to_proto2
from kombu import Exchange, Queue, binding
from kombu.common import Broadcast

from celery_idem import IdempotentTask, InProgress, Ledger, StoreError
from celery_idem.core import calls
from celery_idem.integration import delivery, messages
from celery_idem.integration.deaths import IdempotentRequest
from celery_idem.integration.delivery import Delivery, Waiting
from celery_idem.integration.republishing import to_its_queue
from tests.operators.intents import claimed

NOWHERE = "redis://127.0.0.1:1/0"


def make(broker: str = "memory://", **conf: Any) -> Celery:
    app = Celery("going_back", broker=broker, backend="cache+memory://", set_as_current=False)
    app.conf.update(
        idem_store=f"memory://{uuid.uuid4().hex}",
        task_default_queue=f"q-{uuid.uuid4().hex}",
        task_publish_retry=False,
        accept_content=["json", "pickle", "yaml"],
        broker_transport_options={"max_retries": 1, "interval_start": 0},  # default: four seconds
        **conf,
    )

    @app.task(base=IdempotentTask, shared=False, name="shop.pay", intent=("what",), bind=True)
    def pay(self: Any, what: str, times: int = 0) -> str:
        if self.request.retries < times:
            raise self.retry(countdown=0)
        return f"paid {what}"

    app.finalize()
    return app


@pytest.fixture
def app() -> Iterator[Celery]:
    app = make()
    yield app
    app.close()


def delivered(app: Celery, what: Any = "a", **request: Any) -> Delivery:
    """Return a delivery of a call."""
    task = app.tasks["shop.pay"]
    info = {"exchange": "", "routing_key": app.conf.task_default_queue, "priority": None}
    form = {"id": uuid.uuid4().hex, "args": [what], "kwargs": {}, "delivery_info": info, **request}
    context = Context(form, called_directly=False)
    key, fingerprint = task.guard.identify(context, (what,), {})
    return Delivery(task.guard, task, context, (what,), {}, key, fingerprint)


def run(job: Delivery) -> Any:
    return job.guard.runner.run(job)


def taken(app: Celery, queue: str | None = None) -> Any:
    """Take one message from the queue."""
    with app.connection_for_read() as connection:
        message = connection.default_channel.basic_get(queue or app.conf.task_default_queue)
        assert message is not None
        message.accept = {"application/json", "application/x-python-serialize", "application/x-yaml"}
        return message


def from_a_worker(app: Celery, message: Any) -> Context:
    """Return the request of a message as a worker's main process passes it to a pool process."""
    request = IdempotentRequest(message, app=app, task=app.tasks["shop.pay"])
    args, kwargs, embed = message.payload
    return Context({**request.request_dict, **embed}, args=args, kwargs=kwargs, called_directly=False)


# --- as it was ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["duplicate", "retry", "death"])
def test_it_keeps_what_it_was_published_with(app: Celery, how: str) -> None:
    """A message keeps its serializer and options. JSON could not write these arguments: they contain a set."""
    task = app.tasks["shop.pay"]
    what = {"a", "b"}
    claimed(Ledger.from_app(app), task.intent_key(what))
    options = {"priority": 7, "delivery_mode": 1, "ignore_result": True, "time_limit": 600, "expires": 3600}
    task.apply_async((what,), serializer="pickle", compression="zlib", headers={"x-mine": "1"}, **options)
    first = taken(app)
    request = from_a_worker(app, first)
    if how == "duplicate":
        key, fingerprint = task.guard.identify(request, request.args, request.kwargs)
        with pytest.raises(Waiting):
            run(Delivery(task.guard, task, request, request.args, request.kwargs, key, fingerprint))
    elif how == "death":
        parent = IdempotentRequest(first, app=app, task=task)
        parent._publish_again(1)
    else:
        task.push_request(**vars(request))
        with pytest.raises(Ignore.__base__):  # Retry
            task.retry(countdown=0)
        task.pop_request()
    again = taken(app)
    assert again.content_type == first.content_type == "application/x-python-serialize"
    assert again.headers["compression"] == first.headers["compression"] == "application/x-gzip"
    assert again.payload[0] == first.payload[0]
    for name in ("priority", "delivery_mode"):
        assert again.properties[name] == first.properties[name]
    for name in ("id", "expires", "timelimit", "ignore_result", "x-mine", "idem-key", "root_id"):
        assert again.headers[name] == first.headers[name], name


def test_a_call_of_the_first_protocol_is_kept_with_its_serializer() -> None:
    """JSON, which is the default, could not write these arguments."""
    app = make(task_protocol=1)
    task, what = app.tasks["shop.pay"], {"a", "b"}
    task.apply_async((what,), serializer="pickle")
    message = taken(app)
    body, headers, decoded, utc = proto1_to_proto2(message, message.payload)
    parent = IdempotentRequest(
        message, app=app, task=task, body=body, headers=headers, decoded=decoded, utc=utc
    )
    request = Context(parent.request_dict, called_directly=False)
    key = task.guard.identify(request, (what,), {})[0]
    kept = calls.unpack(messages.of_delivery(app, task.guard, request, (what,), {}, key))
    assert kept.content_type == "application/x-python-serialize"
    assert messages.arguments(app, kept)[0] == (what,)
    app.close()


def test_what_the_author_asks_for_in_a_retry_counts(app: Celery) -> None:
    task = app.tasks["shop.pay"]
    task.apply_async(("a",), serializer="pickle")
    task.push_request(**vars(from_a_worker(app, taken(app))))
    with pytest.raises(Ignore.__base__):
        task.retry(countdown=0, serializer="yaml")
    task.pop_request()
    assert taken(app).content_type == "application/x-yaml"


def test_a_history_of_dead_letters_does_not_travel(app: Celery) -> None:
    job = delivered(app, headers={"x-death": [{"count": 1}], "x-first-death-queue": "q", "x-mine": "1"})
    signature = job.task.signature_from_request(job.request)
    assert {name for name in signature.options["headers"] if name.startswith("x-")} == {"x-mine"}
    assert "redelivered" not in signature.options


def test_celery_reports_nothing_of_it(app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    """Celery sends no event for a message that waits."""
    app.conf.task_send_sent_event = True
    sent: list[str] = []
    monkeypatch.setattr(
        app.amqp._event_dispatcher, "publish", lambda kind, *args, **kwargs: sent.append(kind)
    )
    job = delivered(app)
    claimed(Ledger.from_app(app), job.key)
    for _ in range(3):
        with pytest.raises(Ignore):
            run(job)
    assert sent == []
    app.tasks["shop.pay"].delay("b")
    assert sent == ["task-sent"]


# --- to its own queue --------------------------------------------------------------------------

ORDERS = Exchange("orders", type="topic")
QUORUM = {"x-queue-type": "quorum"}
AMQP = "amqp://guest@127.0.0.1:1//"
DELAY = "0." * 27 + "1."


@pytest.mark.parametrize(
    ("broker", "queues", "exchange", "routing_key", "queue"),
    [
        ("memory://", [Queue("one")], "", "one", "one"),
        ("memory://", [Queue("one")], "", "added-while-it-runs", "added-while-it-runs"),
        (AMQP, [Broadcast("all", queue="mine")], "all", "celery", "mine"),
        (AMQP, [Broadcast("all", queue="mine")], "", "mine", "mine"),
        (NOWHERE, [Broadcast("all", queue="mine")], "all", "celery", None),
        ("memory://", [Broadcast("all", queue="mine")], "all", "", None),
        (
            AMQP,
            [Queue("a", ORDERS, "orders.*"), Queue("b", ORDERS, "bills.#")],
            "orders",
            "bills.new.eu",
            "b",
        ),
        (
            AMQP,
            [Queue("a", ORDERS, "orders.#.eu"), Queue("b", ORDERS, "bills.#")],
            "orders",
            "orders.eu",
            "a",
        ),
        (NOWHERE, [Queue("a", ORDERS, "orders.*"), Queue("b", ORDERS, "bills.#")], "orders", "orders.x", "a"),
        (AMQP, [Queue("a", Exchange("d", type="direct"), "k1")], "d", "k1", "a"),
        (AMQP, [Queue("a", Exchange("h", type="headers"), "k"), Queue("z")], "h", "whatever", "a"),
        (AMQP, [Queue("a", Exchange("x", type="x-consistent-hash"), "10")], "x", "customer-7", "a"),
        (AMQP, [Queue("a", bindings=[binding(ORDERS, "orders.#")])], "orders", "orders.1", "a"),
    ],
)
def test_it_goes_to_the_queue_that_it_came_from(
    broker: str, queues: list[Queue], exchange: str, routing_key: str, queue: str | None
) -> None:
    """A message goes back through the default exchange, so that no other queue of its exchange gets a copy."""
    route = {"queue": "z", "exchange": "elsewhere", "routing_key": "elsewhere"}
    app = make(broker, task_queues=[*queues, Queue("z")], task_routes={"shop.*": route})
    app.amqp.queues.select([q.name for q in queues])
    info = {"exchange": exchange, "routing_key": routing_key}
    options = to_its_queue(app, Context(delivery_info=info))
    if queue is None:
        assert options is None
        return
    assert options is not None
    assert options["queue"].name == queue
    assert (options["exchange"], options["routing_key"], options["queue"].exchange.type) == (
        "",
        queue,
        "direct",
    )
    assert all(declared in [*queues, Queue("z")] for declared in options["declare"])  # with its own arguments


@pytest.mark.parametrize("prefix", ["", "eu_"])
def test_with_native_delays_it_goes_by_its_own_exchange(prefix: str) -> None:
    """With native delays a message goes back through the exchange of its own queue.

    Celery alone would use the routing key of the default queue.
    """
    other = Queue("other", Exchange("others", type="topic"), "other", queue_arguments=QUORUM)
    app = make(AMQP, task_queues=[Queue("main", ORDERS, "main", queue_arguments=QUORUM), other])
    for exchange, key in (("others", "other"), (f"{prefix}celery_delayed_delivery", f"{DELAY}other")):
        options = to_its_queue(app, Context(delivery_info={"exchange": exchange, "routing_key": key}))
        assert options is not None
        assert (options["queue"], options["exchange"], options["routing_key"]) == (other, "others", "other")
    lost = {"exchange": "celery_delayed_delivery", "routing_key": f"{DELAY}nobodys"}
    assert to_its_queue(app, Context(delivery_info=lost)) is None


@pytest.mark.parametrize(
    "queues",
    [
        [Queue("a", ORDERS, "orders.*"), Queue("b", ORDERS, "orders.#")],
        [Queue("a", ORDERS, "orders.eu"), Queue("b", Exchange("others", type="topic"), "eu")],
        [Queue("a", ORDERS, "orders.eu"), Queue("b", bindings=[binding(ORDERS, "#.eu")])],
        [Queue("a", Exchange("h", type="headers"), "a"), Queue("b", Exchange("h", type="headers"), "b")],
        [Queue("a", Exchange("h", type="headers"))],
    ],
)
def test_with_native_delays_it_goes_to_its_queue_where_another_one_would_get_a_copy(
    queues: list[Queue],
) -> None:
    """If another queue would get a copy, the message goes directly to its own queue. Otherwise copies would double."""
    for queue in queues:
        queue.queue_arguments = QUORUM
    app = make(AMQP, task_queues=queues)
    info = {"exchange": queues[0].exchange.name, "routing_key": queues[0].routing_key}
    options = to_its_queue(app, Context(delivery_info=info))
    assert options is not None
    assert (options["queue"].name, options["exchange"], options["routing_key"]) == ("a", "", "a")


def test_an_exchange_that_the_worker_knows_nothing_of(app: Celery) -> None:
    info = {"exchange": "dead-letters", "routing_key": "k"}
    options = to_its_queue(app, Context(delivery_info=info))
    assert options is not None
    assert (options["exchange"], options["routing_key"]) == ("dead-letters", "k")
    assert to_its_queue(app, Context(delivery_info={"exchange": "what", "routing_key": ""})) is None


# --- where it cannot go back ---------------------------------------------------------------------


def test_a_fanout_of_redis_waits_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    app = make(task_queues=[Broadcast("all", queue="mine")])
    fanout = {"delivery_info": {"exchange": "all", "routing_key": ""}}
    job = delivered(app, **fanout)
    claim = claimed(Ledger.from_app(app), job.key)
    threading.Timer(0.5, lambda: claim.release(0.0)).start()
    assert run(job) == "paid a"
    assert job.pauses
    monkeypatch.setattr(delivery, "INLINE_LIMIT", 0.1)
    stranger, copy = delivered(app, "b", **fanout), delivered(app, "b", **fanout)
    claim = claimed(Ledger.from_app(app), copy.key)
    with pytest.raises(InProgress):
        run(stranger)
    copy.task_id = claim.task_id  # another copy of the same message: the running delivery gives the result
    with pytest.raises(Waiting):
        run(copy)


@pytest.mark.parametrize("late", [False, True])
def test_the_broker_is_away_and_the_answer_comes_first(late: bool) -> None:
    app = make(NOWHERE, task_acks_late=late)
    job = delivered(app)
    claim = claimed(Ledger.from_app(app), job.key)
    threading.Timer(0.5, lambda: claim.release(0.0)).start()
    assert run(job) == "paid a"


def test_the_broker_is_away_and_comes_back(app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = app.send_task, []

    def away(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) < 3:
            raise ConnectionError("the broker")
        return real(*args, **kwargs)

    monkeypatch.setattr(app, "send_task", away)
    job = delivered(app)
    claimed(Ledger.from_app(app), job.key)
    with pytest.raises(Waiting):
        run(job)
    assert taken(app).headers["id"] == job.task_id


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("store", ["there", "away"])
def test_the_broker_stays_away(late: bool, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With late acknowledgement the message is rejected and requeued. Otherwise the caller receives an error."""
    monkeypatch.setattr(delivery, "BROKER_PATIENCE", 0.2)
    app = make(NOWHERE, task_acks_late=late)
    if store == "away":
        app.conf.idem_store = NOWHERE
        job = delivered(app)
    else:
        job = delivered(app)
        claimed(Ledger.from_app(app), job.key)
    with pytest.raises(Reject if late else InProgress if store == "there" else StoreError) as caught:
        run(job)
    assert not late or caught.value.requeue


def test_a_death_and_the_broker_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    from celery_idem.core.model import Again

    app = make(task_acks_late=True)
    app.tasks["shop.pay"].delay("a")
    rejected: list[bool] = []
    request = IdempotentRequest(
        taken(app),
        app=app,
        task=app.tasks["shop.pay"],
        on_reject=lambda log, errors, requeue: rejected.append(requeue),
    )

    def away(again: int) -> None:
        raise ConnectionError("the broker")

    monkeypatch.setattr(request, "_publish_again", away)
    assert request._carry_out(Again(), "shop.pay:1", 0) is True
    assert rejected == [True]
    app.tasks["shop.pay"].acks_late = False  # the message was acknowledged: Celery handles the error
    with pytest.raises(ConnectionError):
        request._carry_out(Again(), "shop.pay:1", 0)
