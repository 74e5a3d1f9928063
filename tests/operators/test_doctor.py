"""``doctor`` names the fault of each wrong set-up, and the setting to change."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from types import SimpleNamespace
from typing import Any

import pytest
import redis as redis_py
from celery import Celery

from celery_idem import ALL_ARGUMENTS, IdempotentTask, Ledger, StoreError
from celery_idem.core import calls
from celery_idem.core.model import Fingerprint, Policy, Request
from celery_idem.engine import owners
from celery_idem.integration.settings import Settings
from celery_idem.operate import doctor
from celery_idem.operate.doctor import asking, at_start, configuration, snapshot, stores
from celery_idem.stores.memory import MemoryStore
from celery_idem.testing import FakeClock
from tests.operators.conftest import Idem, command_line
from tests.operators.intents import claimed
from tests.support.servers import RedisServer
from tests.support.waiting import wait_for
from tests.support.workers import CeleryWorker

GOOD: dict[str, Any] = {
    "broker_url": "redis://localhost:1/0",
    "result_backend": "redis://localhost:1/0",
    "task_acks_late": True,
    "task_reject_on_worker_lost": True,
}


def an_app(
    body: Callable[..., Any] | None = None, *, conf: dict[str, Any] | None = None, **options: Any
) -> Celery:
    """Return an application with one guarded task. Only what the test gives is wrong with it."""

    def send(customer_id: str, cents: int = 0) -> None: ...

    app = Celery("checked", set_as_current=False)
    app.conf.update({**GOOD, **(conf or {})})
    options = {"intent": ("customer_id",), "base": IdempotentTask, **options}
    app.task(name="shop.send", shared=False, **options)(body or send)
    return without_others(app)


def without_others(app: Celery) -> Celery:
    """Remove the tasks that plugins and other tests share with every application."""
    app.finalize()
    for name, task in list(app.tasks.items()):
        if not name.startswith("celery.") and type(task).__module__ != __name__:
            app.tasks.pop(name)
    return app


def with_timestamp(customer_id: str, requested_at: str) -> None: ...
def with_instant(customer_id: str, when: datetime) -> None: ...
def with_text(customer_id: str, note: str) -> None: ...


def codes(app: Celery, **options: Any) -> dict[str, str]:
    """Return the code of each finding and what to change, without asking a store."""
    found = doctor.examine(doctor.gather(app, ask=False, **options), doctor.CHEAP)
    return {finding.code: finding.change for finding in found}


def test_a_good_set_up_has_no_finding() -> None:
    assert codes(an_app()) == {}


BEAT = {"tick": {"task": "shop.send", "schedule": 60.0, "args": ("a",)}}
WRONG: dict[str, tuple[Callable[[], Celery], str]] = {
    "retention": (lambda: an_app(result_ttl=1800), "idem_result_ttl"),
    "retention-result": (lambda: an_app(result_ttl=7200), "idem_result_ttl"),
    "eta": (
        lambda: an_app(conf={"beat_schedule": {"t": {"task": "x", "options": {"countdown": 9000}}}}),
        '"visibility_timeout": 18000',
    ),
    "short-lease": (lambda: an_app(lease=0.5), "idem_lease = 30"),
    "long-lease": (lambda: an_app(conf={"idem_lease": 7200.0}), "idem_lease = 30"),
    "lease-visibility": (
        lambda: an_app(conf={"broker_transport_options": {"visibility_timeout": 20}}),
        "idem_lease below 20",
    ),
    "limits-ignored": (lambda: an_app(time_limit=60, conf={"worker_pool": "threads"}), "--pool prefork"),
    "acks-early": (lambda: an_app(conf={"task_acks_late": False}), "task_acks_late = True"),
    "worker-lost": (
        lambda: an_app(conf={"task_reject_on_worker_lost": False}),
        "task_reject_on_worker_lost = True",
    ),
    "serializer": (lambda: an_app(conf={"result_serializer": "pickle"}), "kombu.serialization.register"),
    "unconfirmed": (lambda: an_app(conf={"broker_url": "amqp://localhost:1//"}), '"confirm_publish": True'),
    "volatile-intent": (
        lambda: an_app(with_timestamp, intent=("customer_id", "requested_at")),
        "'requested_at' out of intent=",
    ),
    "text-intent": (lambda: an_app(with_text, intent=("customer_id", "note")), "'note' out of intent="),
    "all-arguments": (lambda: an_app(with_text, intent=ALL_ARGUMENTS), "intent=('customer_id',)"),
    "memory-store": (lambda: an_app(conf={"idem_store": "memory://"}), "redis://"),
    "fail-open": (lambda: an_app(on_store_error="run"), 'idem_on_store_error = "retry"'),
    "pickle": (
        lambda: an_app(conf={"result_accept_content": ["json", "pickle"]}),
        'result_accept_content = ["json"]',
    ),
    "beat": (lambda: an_app(conf={"beat_schedule": BEAT}), "beat_scheduler"),
    "reconcile-limit": (
        lambda: an_app(soft_time_limit=5, reconcile=lambda task, **kwargs: None),
        "idem_reconcile_timeout below 5",
    ),
}


@pytest.mark.parametrize("code", WRONG)
def test_each_fault_is_named_with_the_setting_to_change(code: str) -> None:
    make, change = WRONG[code]
    found = codes(make())
    assert change in found[code]
    # There is no other finding, except those that the same value causes.
    assert set(found) <= {code, "retention-result", "hard-limit", "lease-visibility"}


@pytest.mark.parametrize(("recovers", "left"), [(True, "published again"), (False, "stays lapsed")])
def test_what_becomes_of_a_call_whose_message_is_gone(recovers: bool, left: str) -> None:
    app = an_app(conf={"task_acks_late": False, "idem_recover": recovers})
    found = {
        finding.code: finding.wrong for finding in doctor.examine(doctor.gather(app, ask=False), doctor.CHEAP)
    }
    assert left in found["acks-early"]


def test_a_publisher_that_waits_for_rabbitmq_is_left_alone() -> None:
    conf = {"broker_url": "amqp://localhost:1//", "broker_transport_options": {"confirm_publish": True}}
    assert codes(an_app(conf=conf)) == {}


def test_an_annotation_says_what_the_name_does_not() -> None:
    assert "volatile-intent" in codes(an_app(with_instant, intent=("customer_id", "when")))


@pytest.mark.parametrize(
    "name", ["order_id", "order_uuid", "customer_id", "due_date", "context", "subject_id"]
)
def test_stable_names_are_left_alone(name: str) -> None:
    assert not configuration.VOLATILE.search(name)
    assert not configuration.FREE_TEXT.search(name)


def test_an_application_without_any_intent() -> None:
    app = Celery("plain", set_as_current=False)
    app.conf.update(GOOD)

    @app.task(name="shop.plain", shared=False)
    def plain() -> None: ...

    found = codes(without_others(app))
    assert "intent=" in found["no-intent"]
    assert "intent=" in found["unguarded-acks-late"]


def test_beat_with_our_scheduler_is_fine() -> None:
    assert (
        codes(an_app(conf={"beat_schedule": BEAT, "beat_scheduler": "celery_idem.adapters.beat:Scheduler"}))
        == {}
    )


# --- real servers ------------------------------------------------------------------------


def asked(server: RedisServer, **conf: Any) -> dict[str, doctor.Finding]:
    app = an_app(conf={"idem_store": server.url, **conf})
    return {finding.code: finding for finding in doctor.examine(doctor.gather(app))}


@pytest.mark.redis
def test_a_redis_that_forgets(start_redis: Callable[..., RedisServer]) -> None:
    server = start_redis()
    with redis_py.Redis.from_url(server.url) as client:
        client.config_set("maxmemory", "100mb")
        client.config_set("maxmemory-policy", "allkeys-lru")
        client.config_set("save", "")
        found = asked(server)
        assert found["eviction"].severity == found["persistence"].severity == "error"
        assert "maxmemory-policy noeviction" in found["eviction"].change

        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("appendonly", "yes")
        assert asked(server) == {}
        found = asked(server, idem_durability="replicas:1")
        assert found["replicas"].change.endswith('idem_durability = "none".')
        assert "replicas" in found["not-writable"].change
        client.config_set("min-replicas-to-write", 2)
        assert "min-replicas-to-write" in asked(server)["not-writable"].change
        client.config_set("min-replicas-to-write", 0)


def test_a_store_that_is_away(idem: Idem) -> None:
    app = an_app(conf={"idem_store": "redis://localhost:1/0"})
    answer = command_line(app)("doctor", "--json")
    assert answer.exit_code == 1
    assert [row["code"] for row in json.loads(answer.output)] == ["store-down"]


def test_a_store_that_does_not_let_us_look_is_not_down(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*words: str) -> object:
        raise StoreError(f"no permissions to run {words[0]}")

    app = an_app(conf={"idem_store": "memory://not-looked-at"})
    kind = type(Ledger.from_app(app).store)
    monkeypatch.setattr(kind, "execute", staticmethod(refused), raising=False)
    monkeypatch.setattr(kind, "everywhere", staticmethod(refused), raising=False)
    found = {finding.code: finding for finding in doctor.examine(doctor.gather(app), doctor.ASKING)}
    assert set(found) == {"not-looked-at"}
    assert found["not-looked-at"].severity == "note"
    assert "INFO" in found["not-looked-at"].wrong


def test_skew_beyond_the_limit() -> None:
    store = doctor.StoreFacts("redis://x", skew=stores.SKEW_LIMIT + 1)
    found = doctor.examine(doctor.Snapshot(stores=(store,)), doctor.ASKING)
    assert [finding.code for finding in found] == ["clock-skew"]
    assert not doctor.examine(doctor.Snapshot(stores=(replace(store, skew=0.2),)), doctor.ASKING)


def test_records_from_the_future() -> None:
    clock = FakeClock()
    ledger = Ledger(MemoryStore(clock))
    for task in ("wrong.a", "wrong.b"):
        request = Request(owners.mint(), "task", Fingerprint(), Policy(10**6, 10**6, 10**6))
        ledger.claim(f"{task}:1", request)
        clock.advance(3600)
    assert found_in(ledger) == set()
    clock.advance(-2 * 3600)
    assert found_in(ledger) == {"clock-back"}


def test_calls_that_records_do_not_hold() -> None:
    ledger = Ledger(MemoryStore())
    for n, why in enumerate((calls.Why.TOO_LARGE, calls.Why.TOO_LARGE, calls.Why.UNWRITABLE, calls.Why.OFF)):
        claimed(ledger, f"wrong.a:{n}", call=why.packed)
    facts = tuple(asking.facts_of(ledger, "none"))
    said = [finding.wrong for finding in stores.calls_not_kept(doctor.Snapshot(stores=facts))]
    assert len(said) == 2  # calls that the author chose not to keep are no finding
    assert "2 open intents" in next(one for one in said if "max_call_bytes" in one)


def found_in(ledger: Ledger) -> set[str]:
    facts = tuple(asking.facts_of(ledger, "none"))
    return {finding.code for finding in stores.clock_went_back(doctor.Snapshot(stores=facts))}


# --- the command, and a worker ---------------------------------------------------------------


def test_exit_status_for_a_ci(idem: Idem) -> None:
    warning = an_app(conf={"idem_store": "redis://localhost:1/0"}, lease=0.5)
    run = command_line(warning)
    assert run("doctor").exit_code == 1  # the store does not answer
    assert "short-lease" in run("doctor").output
    fine = command_line(an_app(conf={"idem_store": "memory://doctor"}, lease=0.5))
    assert fine("doctor").exit_code == 1  # memory://


@pytest.mark.redis
def test_strict_fails_on_a_warning(start_redis: Callable[..., RedisServer]) -> None:
    server = start_redis(appendonly=True)
    run = command_line(an_app(conf={"idem_store": server.url}, lease=0.5))
    assert run("doctor").exit_code == 0
    assert run("doctor", "--strict").exit_code == 1


@pytest.mark.redis
def test_a_worker_says_so_when_it_starts(redis_url: str, start_worker: Callable[..., CeleryWorker]) -> None:
    """A worker logs the findings and that its store answered. An attribute that raises stops no check."""
    worker = start_worker("tests.operators.wrong", env={"IDEM_TEST_REDIS": redis_url})
    wait_for(lambda: "answered in" in worker.log_text(), 20, worker.log_text)
    text = worker.log_text()
    for said in (
        "volatile-intent: wrong.send",
        "acks-early: wrong.send",
        "not-looked-at: wrong.odd: Its options could not be read",
        f"store {redis_url} answered in ",
        "(Redis ",
        "prefix 'staging:'",
    ):
        assert said in text, text


@pytest.mark.redis
def test_a_worker_starts_though_its_store_is_away(
    redis_url: str, start_worker: Callable[..., CeleryWorker]
) -> None:
    away = "redis://me:s3cret@127.0.0.1:1/0"
    worker = start_worker(
        "tests.operators.wrong", env={"IDEM_TEST_REDIS": redis_url, "IDEM_TEST_STORE": away}
    )
    wait_for(lambda: "did not answer" in worker.log_text(), 20, worker.log_text)
    assert "Start it, or set idem_store" in worker.log_text()
    assert "s3cret" not in worker.log_text()


# --- odd values that may not stop a check ---------------------------------------------------------


class Odd:
    """An attribute of a task that raises an error when it is read."""

    def __get__(self, *_: object) -> object:
        raise LookupError("no such tenant")


@pytest.mark.parametrize(
    "options",
    [
        {"max_retries": float("inf")},
        {"max_retries": float("inf"), "retry_backoff": True},
        {"max_retries": 10**7, "retry_backoff": True},
        {"max_retries": 10**400, "retry_backoff": 5},
        {"max_retries": 10**7, "retry_backoff": True, "retry_backoff_max": 0},
        {"max_retries": 5, "retry_backoff": 10**300},
    ],
)
def test_retries_without_an_end_are_not_counted_one_by_one(options: dict[str, Any]) -> None:
    assert not set(codes(an_app(**options))) - {"retention"}


def test_the_horizon_of_retries() -> None:
    def horizon(**options: Any) -> float | None:
        return snapshot._retry_horizon(SimpleNamespace(default_retry_delay=180, **options))

    assert horizon(max_retries=3) == 540
    assert horizon(max_retries=0) == 0
    assert horizon(max_retries=None) is None
    assert horizon(max_retries=float("inf")) is None
    assert horizon(max_retries=5, retry_backoff=True) == 1 + 2 + 4 + 8 + 16
    assert horizon(max_retries=5, retry_backoff=10, retry_backoff_max=30) == 10 + 20 + 30 + 30 + 30
    assert horizon(max_retries=1000, retry_backoff=True) == 1023 + 990 * 600
    assert horizon(max_retries=10**12, retry_backoff=True) is None  # not within a century


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"time_limit": "60"}, None),
        ({"time_limit": "a minute"}, "ValueError"),
        ({"max_retries": "many"}, "ValueError"),
        ({"default_retry_delay": Odd()}, "no such tenant"),
    ],
)
def test_a_task_that_cannot_be_read_is_named(options: dict[str, Any], says: str | None) -> None:
    found = {
        f.code: f.wrong for f in doctor.examine(doctor.gather(an_app(**options), ask=False), doctor.CHEAP)
    }
    assert ("not-looked-at" in found) is (says is not None)
    assert says is None or says in found["not-looked-at"]


REDIS, SQS, AMQP = "redis://localhost:1/0", "sqs://", "amqp://localhost:1//"


@pytest.mark.parametrize(
    ("broker", "visibility", "confirmed"),
    [
        (REDIS, 3600.0, True),
        ([REDIS, "redis://elsewhere:1/0"], 3600.0, True),
        (f"{SQS};{REDIS}", 3600.0, True),
        ("sentinel://a:1;sentinel://b:1", 3600.0, True),
        ([SQS], 1800.0, True),
        ([AMQP, "amqp://elsewhere//"], None, False),
        (f"{AMQP};{REDIS}", 3600.0, False),
        ("", None, False),
    ],
)
def test_several_brokers_are_all_looked_at(broker: Any, visibility: float | None, confirmed: bool) -> None:
    seen = doctor.gather(an_app(conf={"broker_url": broker}), ask=False)
    assert (seen.visibility, seen.confirmed) == (visibility, confirmed)


@pytest.mark.parametrize(
    "conf",
    [
        {"beat_schedule": [("a", 1)]},
        {"beat_schedule": {"a": {"task": "x", "options": {"countdown": float("inf")}}}},
        {"beat_schedule": {"a": {"task": "x", "options": {"countdown": 10**400}}}},
        {"beat_schedule": {"a": {"task": "x", "options": "none"}}},
        {"beat_scheduler": object},
        {"broker_transport_options": {"visibility_timeout": "long"}},
        {"broker_transport_options": {"visibility_timeout": float("nan")}},
    ],
)
def test_odd_configuration_stops_no_check(conf: dict[str, Any]) -> None:
    assert codes(an_app(conf=conf)) == {}


# --- when a worker starts -------------------------------------------------------------------------


def started(app: Celery) -> None:
    """Run the checks as a worker does at its start."""
    at_start.AtStart(SimpleNamespace(app=None, steps=[])).start(SimpleNamespace(app=app, pool_cls=None))


@pytest.mark.parametrize("raised", [ZeroDivisionError("by nought"), SystemExit("the settings exit")])
def test_whatever_a_check_raises_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, raised: BaseException
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise raised

    monkeypatch.setattr(at_start, "gather", fail)
    with caplog.at_level("INFO", logger="celery_idem"):
        started(an_app(conf={"idem_store": "memory://"}))
        wait_for(lambda: str(raised) in caplog.text and "answered in" in caplog.text, 60, lambda: caplog.text)
    assert "The checks of the configuration: failed. Tasks are guarded all the same." in caplog.text
    assert "store memory:// answered in" in caplog.text


def test_a_check_that_hangs_is_reported_and_holds_up_no_other(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    end = threading.Event()
    monkeypatch.setattr(at_start, "WITHIN", 0.05)
    monkeypatch.setattr(at_start, "gather", lambda *_, **__: end.wait(60))
    try:
        with caplog.at_level("INFO", logger="celery_idem"):
            started(an_app(conf={"idem_store": "memory://"}))
            for said in ("The checks of the configuration: no answer after", "store memory:// answered in"):
                wait_for(lambda said=said: said in caplog.text, 60, lambda: caplog.text)
    finally:
        end.set()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "shop.send not run, tried again later (idem_on_store_error)"),
        ({"on_store_error": "raise"}, "shop.send not run, StoreError (idem_on_store_error)"),
        ({"on_store_error": "run"}, "shop.send run without a guard (idem_on_store_error)"),
        ({"shadow": True, "on_store_error": "raise"}, "shop.send run (shadow mode)"),
    ],
)
def test_what_happens_while_a_store_is_away(
    options: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    app = an_app(conf={"idem_store": "redis://localhost:1/0"}, **options)
    with caplog.at_level("INFO", logger="celery_idem"):
        started(app)
        wait_for(lambda: "did not answer" in caplog.text, 60, lambda: caplog.text)
    assert f"Until it answers: {said}." in caplog.text
    (found,) = doctor.examine(doctor.gather(app), doctor.ASKING)
    assert found.code == "store-down"
    assert f"Until it answers: {said}." in found.wrong


def test_many_tasks_of_a_store_are_counted() -> None:
    found = stores.meanwhile({f"shop.{name}": Settings(on_store_error="run") for name in "abcde"})
    assert (
        found
        == "Until it answers: shop.a, shop.b, shop.c and 2 more run without a guard (idem_on_store_error)."
    )
    assert stores.meanwhile({}) == ""


def test_an_attribute_that_may_be_meant_as_a_setting_is_named_at_the_start(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Mixin:
        lease = 60

    app = an_app(base=type("Base", (Mixin, IdempotentTask), {}))
    with caplog.at_level("INFO", logger="celery_idem"):
        started(app)
        wait_for(lambda: "not-a-setting" in caplog.text, 60, lambda: caplog.text)
    (line,) = [record.getMessage() for record in caplog.records if "not-a-setting" in record.getMessage()]
    assert "Mixin.lease" in line
    assert "Write idem_lease" in line
    assert "shop.send" in line
