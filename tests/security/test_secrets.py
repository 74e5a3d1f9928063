"""Secret values and passwords appear in no error message, log, event, record or page."""

from __future__ import annotations

import json
import logging
import pickle
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import prometheus_client
import pytest
from celery import Celery, chain
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.testclient import TestClient

from celery_idem import (
    ConfigurationError,
    FingerprintMismatch,
    IdempotencyError,
    IdempotentTask,
    IntentError,
    Ledger,
    StoreError,
    look_up,
)
from celery_idem.adapters.http import door
from celery_idem.adapters.inbox import inbox
from celery_idem.engine import events
from celery_idem.integration.deaths import request_class
from celery_idem.integration.settings import Settings, of_app
from celery_idem.stores import open_store
from celery_idem.stores.redis import redact
from celery_idem.telemetry import otel, prometheus
from tests.security.conftest import application, command_line

VALUE = "4111-1111-1111-1111"
OTHER = "5500-0000-0000-0004"
TOKEN = "a-token-of-enough-characters"


@pytest.fixture
def told() -> Iterator[list[str]]:
    """All events as text."""
    seen: list[str] = []
    stop = events.listen(lambda event: seen.append(repr(event)), here=True)
    yield seen
    stop()


def bare(text: str) -> str:
    return text.replace(VALUE, "VALUE").replace(OTHER, "OTHER")


# --- secret arguments ------------------------------------------------------------------------------


def shop(memory_app: Callable[..., Celery], **conf: Any) -> tuple[Celery, Any]:
    """Return an application and a task with secret parameters: in the intent, in must_match, and a free one."""
    app = memory_app(**conf)

    def charge(self: Any, card: str, pin: str, note: str = "", **more: str) -> str:
        if note == "in doubt":
            raise TimeoutError
        if note == "step":
            self.step("bank", lambda: None)
        return "done"

    how: dict[str, Any] = {"base": IdempotentTask, "bind": True, "shared": False, "lazy": False}
    options = {"intent": ("card",), "must_match": ("pin",), "secret": ("card", "pin", "note")}
    return app, app.task(name="shop.charge", ambiguous_errors=(TimeoutError,), **how, **options)(charge)


@pytest.mark.parametrize("conf", [{}, {"idem_audit_key": "of the operator"}, {"idem_shadow": True}], ids=str)
def test_a_secret_value_is_in_no_log_event_record_metric_span_or_page(
    memory_app: Callable[..., Celery], conf: dict[str, Any], told: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    registry, spans, provider = (
        prometheus_client.CollectorRegistry(),
        InMemorySpanExporter(),
        TracerProvider(),
    )
    provider.add_span_processor(SimpleSpanProcessor(spans))
    app, task = shop(memory_app, **conf)
    stops = [prometheus.install(app, registry), otel.install()]
    messages = []
    try:
        with provider.get_tracer("test").start_as_current_span("run"):
            for args in (
                (VALUE, VALUE, "step"),
                (VALUE, VALUE),
                (VALUE, OTHER, VALUE),
                (OTHER, VALUE, "in doubt"),
            ):
                try:
                    task.apply(args, throw=True)
                except (IdempotencyError, TimeoutError) as error:
                    messages.append("".join(traceback.format_exception(error)))
    finally:
        for stop in stops:
            stop()
    assert told, "there was no event, so nothing was checked"
    stored = [bytes(value.value) for _, value in Ledger.from_app(app).store.scan("")]
    assert len(stored) >= 2
    pages = TestClient(inbox(app, authenticate=lambda request: "ann"))
    shown = [
        *messages,
        *told,
        *map(repr, stored),
        *(value.decode("latin-1") for value in stored),
        # Celery's own log shows them here, because an eager call has no message with a hidden form of its arguments.
        *(repr(vars(record)) for record in caplog.records if record.name.startswith("celery_idem")),
        prometheus_client.generate_latest(registry).decode(),
        *(span.to_json() for span in spans.get_finished_spans()),
        *(command_line(app, word, "--json") for word in ("list", "stats", "audit", "shadow", "doctor")),
        *(command_line(app, "show", "--json", entry.key) for entry in Ledger.from_app(app).list()),
        command_line(
            app, "key", "--json", "shop.charge", json.dumps([VALUE, OTHER]), json.dumps([OTHER, VALUE])
        ),
        pages.get("/").text,
        *(pages.get("/intent", params={"key": entry.key}).text for entry in Ledger.from_app(app).list()),
    ]
    for text in shown:
        assert text == bare(text)


def test_what_a_function_makes_of_a_secret_is_not_shown(memory_app: Callable[..., Celery]) -> None:
    app = memory_app()

    def charge(card: str) -> str:
        return "done"

    app.task(
        base=IdempotentTask,
        shared=False,
        lazy=False,
        name="shop.charge",
        secret=("card",),
        intent=lambda arguments: {"who": arguments["card"]},
    )(charge)
    shown = command_line(app, "key", "--json", "shop.charge", json.dumps([VALUE]))
    assert shown == bare(shown)
    assert '"key": "shop.charge:' in shown


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        (("ann", VALUE), {}),
        (("ann", VALUE, VALUE, VALUE, VALUE), {}),
        (("ann",), {"token": VALUE, "pin": VALUE}),
        ((), {"user": "ann", "token": VALUE}),
    ],
)
def test_celery_shows_no_secret_either(
    memory_app: Callable[..., Celery], args: tuple[str, ...], kwargs: dict[str, str]
) -> None:
    """The headers of a message, which the worker's log, events and Flower show, have no secret values."""
    app = memory_app(task_send_sent_event=True)
    task = app.tasks["shop.login"]
    for publish in (task.apply_async, lambda *call: task.signature(*call).apply_async()):
        publish(args, kwargs)
        with app.connection_for_read() as connection:
            message = connection.default_channel.basic_get(app.conf.task_default_queue)
        shown = f"{message.headers['argsrepr']} {message.headers['kwargsrepr']}"
        assert "ann" in shown
        assert "(secret)" in shown
        assert shown == bare(shown)
        assert VALUE.encode() in message.body  # the worker receives it


def messages(app: Celery) -> Iterator[Any]:
    with app.connection_for_read() as connection:
        while (message := connection.default_channel.basic_get(app.conf.task_default_queue)) is not None:
            yield message


def test_a_worker_shows_no_secret_whoever_published_it(memory_app: Callable[..., Celery]) -> None:
    """A worker hides secrets in its answers to `inspect`, in events and in its log, whichever producer published."""
    app = memory_app()
    other = Celery("other", broker="memory://", set_as_current=False)
    other.send_task(
        "shop.elsewhere", queue=app.conf.task_default_queue
    )  # a producer that does not know the task
    (message,) = messages(app)
    task = app.tasks["shop.login"]
    kind = request_class(task)
    for args, kwargs in (([["ann"], {}]), (["ann", VALUE, VALUE, VALUE], {}), (["ann"], {"token": VALUE})):
        message.headers.update(task="shop.login", argsrepr=repr(args), kwargsrepr=repr(kwargs))
        request = kind(message, app=app, task=task, body=(args, kwargs, {}), decoded=True)
        shown = [str(request.info()), str(request.info(safe=True)), repr(request), request.argsrepr]
        shown += [request.kwargsrepr, request.request_dict["argsrepr"], request.request_dict["kwargsrepr"]]
        assert all(text == bare(text) for text in shown), shown
        assert "ann" in shown[0]
        assert request.args == args
    strange = kind(message, app=app, task=task, body=(None, None, {}), decoded=True)
    assert strange.info()["args"] == "(secret)"
    plain = request_class(app.tasks["shop.pay"])
    assert not issubclass(plain, kind), "a task without secrets has no extra cost"


def test_a_call_by_name_shows_no_secret_where_the_task_is_known(memory_app: Callable[..., Celery]) -> None:
    app = memory_app()
    app.send_task("shop.login", ("ann", VALUE), {"pin": VALUE})
    (message,) = messages(app)
    shown = message.headers["argsrepr"] + message.headers["kwargsrepr"]
    assert "ann" in shown
    assert shown == bare(shown)


def test_a_loop_over_calls_shows_no_secret(
    memory_app: Callable[..., Celery], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`map`, `starmap` and `chunks` are Celery tasks that have the calls as arguments. They hide secrets as well."""
    app = memory_app(task_send_sent_event=True)
    task = app.tasks["shop.login"]
    sent: list[Any] = []
    monkeypatch.setattr(app.amqp, "send_task_message", _also(sent, app.amqp.send_task_message))
    calls = [("ann", VALUE)]
    task.starmap(calls).apply_async()
    task.chunks(calls, 1).apply_async()
    task.map(calls).apply_async()
    assert len(sent) == 3
    assert all(str(event) == bare(str(event)) for event in sent)
    app.signature("celery.starmap", kwargs={"task": dict(task.s()), "it": calls}).apply_async()  # by hand
    for message in messages(app):
        shown = message.headers["argsrepr"] + message.headers["kwargsrepr"]
        assert shown == bare(shown)
        assert VALUE.encode() in message.body


def test_the_wait_for_a_chord_shows_no_secret(memory_app: Callable[..., Celery]) -> None:
    """Without native chords the body of a chord is an argument of a Celery task. It hides secrets as well."""
    app = memory_app()
    body = app.tasks["shop.login"].si("ann", VALUE)
    for args in (("group", chain(app.tasks["shop.pay"].si("c1", 7), body)), ("group", dict(body))):
        app.signature("celery.chord_unlock", args=args).apply_async()
    found = list(messages(app))
    assert len(found) == 2
    for message in found:
        shown = message.headers["argsrepr"] + message.headers["kwargsrepr"]
        assert shown == bare(shown)
        assert VALUE.encode() in message.body


def _also(sent: list[Any], publish: Any) -> Any:
    def also(producer: Any, name: str, message: Any, **options: Any) -> Any:
        sent.append(message.sent_event)
        return publish(producer, name, message, **options)

    return also


def test_a_retry_that_is_given_up_shows_no_secret(memory_app: Callable[..., Celery]) -> None:
    """Celery's MaxRetriesExceededError would contain all arguments, and it is stored as the outcome."""
    app = memory_app()

    def charge(self: Any, card: str) -> None:
        self.retry(max_retries=0, countdown=0)

    options: dict[str, Any] = {"base": IdempotentTask, "bind": True, "shared": False, "lazy": False}
    task = app.task(name="shop.gives_up", intent=("card",), secret=("card",), **options)(charge)
    result = task.apply((VALUE,))
    assert isinstance(result.result, task.MaxRetriesExceededError)
    stored = [value.value.decode("latin-1") for _, value in Ledger.from_app(app).store.scan("")]
    assert stored
    for text in (str(result.result), repr(vars(result.result)), *stored):
        assert text == bare(text)


def test_another_callers_secret_is_in_no_receipt(memory_app: Callable[..., Celery]) -> None:
    """The body's error quotes the first caller's secret note. The second caller of the action does not receive it."""
    app = memory_app()

    def charge(card: str, note: str) -> None:
        raise ValueError(f"not for {note}")

    options: dict[str, Any] = {"base": IdempotentTask, "shared": False, "lazy": False}
    task = app.task(name="shop.quotes", intent=("card",), secret=("note",), **options)(charge)
    task.apply(("c1", VALUE))
    site = TestClient(door(app, ["shop.quotes"], token=TOKEN), headers={"authorization": f"Bearer {TOKEN}"})
    told = site.post("/tasks/shop.quotes", json={"card": "c1", "note": OTHER})
    looked = site.get(f"/intents/{task.intent_key('c1', OTHER)}")
    receipt = task.submit("c1", OTHER)
    stranger = Celery("stranger", broker="memory://", set_as_current=False)  # an application without the task
    stranger.conf.update(idem_store=app.conf.idem_store, idem_namespace=Ledger.from_app(app).namespace)
    from_outside = look_up(stranger, task.intent_key("c1", OTHER))
    assert from_outside is not None
    assert from_outside.reason == "ValueError"
    assert (told.status_code, told.json()["detail"], receipt.reason) == (500, "ValueError", "ValueError")
    for text in (told.text, looked.text, str(receipt.to_dict())):
        assert text == bare(text)
    assert command_line(app, "key", "shop.quotes", json.dumps({"note": VALUE, "x": 1})) == bare(
        command_line(app, "key", "shop.quotes", json.dumps({"note": VALUE, "x": 1}))
    )


# --- what errors say -----------------------------------------------------------------------------------


class Shy:
    def __repr__(self) -> str:
        return VALUE


@pytest.mark.parametrize(
    "value",
    [
        Shy(),
        [[Shy()]],
        {VALUE: Shy()},
        {Shy(): 1},
        {f"{VALUE}\u00e9": 1, f"{VALUE}e\u0301": 2},
        f"{VALUE}\ud800",
        {VALUE: float("nan")},
        int(VALUE.replace("-", "")) ** 2000,
    ],
    ids=range(8),
)
def test_a_value_that_cannot_be_in_a_key_is_not_shown(memory_app: Callable[..., Celery], value: Any) -> None:
    task = memory_app().tasks["shop.pay"]
    for call in (
        lambda: task.intent_key(value),
        lambda: task.apply((value,), throw=True),
        lambda: task.delay(value),
    ):
        with pytest.raises(IntentError, match="'customer'") as refused:
            call()
        shown = "".join(traceback.format_exception_only(refused.value)) + repr(refused.value.args)
        assert shown == bare(shown)


def test_a_mismatch_tells_names_and_no_values(memory_app: Callable[..., Celery]) -> None:
    app = memory_app()
    task = app.tasks["shop.pay"]
    task.apply(("c1", 123456), throw=True)
    with pytest.raises(FingerprintMismatch) as refused:
        task.apply(("c1", 654321), throw=True)
    site = TestClient(door(app, ["shop.pay"], token=TOKEN), headers={"authorization": f"Bearer {TOKEN}"})
    answer = site.post("/tasks/shop.pay", json={"customer": "c1", "cents": 654321})
    assert answer.status_code == 422
    for text in (
        str(refused.value),
        repr(refused.value),
        repr(pickle.dumps(refused.value)),
        json.dumps(app.backend.prepare_exception(refused.value, serializer="json")),
        answer.text,
        repr(answer.headers),
    ):
        assert "cents" in text or text.startswith("Headers")
        for value in ("123456", "654321", "paid"):
            assert value not in text


def test_a_result_that_yaml_refuses_is_not_quoted(memory_app: Callable[..., Celery]) -> None:
    """YAML's error quotes the whole object. Ours does not."""
    app = memory_app(result_serializer="yaml", result_accept_content=["yaml"])

    def charge(a: int) -> Shy:
        return Shy()

    task = app.task(base=IdempotentTask, shared=False, lazy=False, name="shop.yaml", intent=("a",))(charge)
    task.apply((1,), throw=True)
    with pytest.raises(IdempotencyError, match="not stored") as refused:
        task.apply((1,), throw=True)
    assert str(refused.value) == bare(str(refused.value))


# --- passwords in URLs ------------------------------------------------------------------------------------

# A password, then one for each character that has a meaning in URLs and is not percent-encoded here.
PASSWORDS = ["hunterhunter", *(f"hunter{c}hunter" for c in "/?#;[]@:%&=+ ")]
URLS = [
    "redis://:{}@127.0.0.1:1/0",
    "redis://user:{}@127.0.0.1:1/0",
    "rediss://user:{}@127.0.0.1:1/0?ssl_cert_reqs=none",
    "redis://127.0.0.1:1/0?password={}",
    "redis+socket://user:{}@/nowhere.sock",
    "unix://user:{}@/nowhere.sock",
    "sentinel://user:{}@127.0.0.1:1;sentinel://127.0.0.1:2/0?master_name=m",
    "sentinel://127.0.0.1:1;sentinel://user:{}@127.0.0.1:2/0?master_name=m",
    "sentinel://127.0.0.1:1/0?master_name=m&sentinel_password={}",
    "redis-cluster://user:{}@127.0.0.1:1,127.0.0.1:2",
    "postgresql://user:{}@127.0.0.1:1/shop",
    "{}@127.0.0.1:1/0",
    ":{}@127.0.0.1:1/0",
    "//user:{}@127.0.0.1:1/0",
    "mongodb://user:{}@127.0.0.1:1/0",
]


@pytest.mark.parametrize("url", URLS)
def test_no_part_of_a_password_is_shown(url: str) -> None:
    for password in PASSWORDS:
        given = url.format(password)
        shown = [repr(Settings(store=given, audit_key=password, seal_keys=[password]))]
        try:
            store = open_store(given)
            shown.append(store.url)
            store.read("idem:x")
        except (ConfigurationError, StoreError) as error:
            shown += [str(error), repr(error.args)]
        assert len(shown) > 1
        for text in shown:
            assert "hunter" not in text, (given, text)


def test_a_password_that_was_not_encoded_is_explained() -> None:
    with pytest.raises(ConfigurationError, match=r"Percent-encode it: %2F for /") as refused:
        open_store("redis://:hunter/hunter@127.0.0.1:6379/0")
    assert "hunter" not in str(refused.value)
    assert (
        redact("redis://:a%2Fb@host:6379/0") == "redis://host:6379/0"
    )  # a password that is encoded is removed, and the rest of the URL is kept


def test_a_wrong_setting_does_not_quote_the_password() -> None:
    for name in ("idem_store", "idem_audit_key", "idem_seal_keys"):
        with pytest.raises(ConfigurationError) as refused:
            of_app({name: ["hunterhunter"]})
        assert "hunter" not in str(refused.value)


def test_a_caller_is_not_told_where_the_store_is() -> None:
    app = application("redis://:hunterhunter@127.0.0.1:1/0", "ours")
    site = TestClient(door(app, ["shop.pay"], token=TOKEN), headers={"authorization": f"Bearer {TOKEN}"})
    answer = site.get(f"/intents/{app.tasks['shop.pay'].intent_key('c1')}")
    assert answer.status_code == 503
    for part in ("127.0.0.1", "redis", "hunter"):
        assert part not in answer.text
