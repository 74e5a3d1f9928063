"""Each error message says what happened, to which task or intent, and what to do next.

Each function below causes one error. The table names the words that its message must contain. No message may contain
another caller's value, a password or the name of an internal module.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import pytest
import redis
from celery import Celery

import celery_idem
from celery_idem import (
    ALL_ARGUMENTS,
    ConfigurationError,
    FingerprintMismatch,
    Happened,
    IdempotencyError,
    IdempotentTask,
    InProgress,
    IntentError,
    LeaseLost,
    Ledger,
    OutcomeUnknown,
    ResultUnavailable,
    StoreError,
)
from celery_idem.core.model import MICROSECONDS, Acquired, Fingerprint, Policy, Request
from celery_idem.core.record import pack, unpack
from celery_idem.engine import owners
from celery_idem.stores import open_store
from celery_idem.testing import CrashingStore, use_store
from tests.support.servers import PostgresServer, RedisServer

HOUR = 3600 * MICROSECONDS
POLICY = Policy(lease=HOUR, result_ttl=HOUR, failure_ttl=HOUR)


class Shop:
    """An application with a store in memory that can be made to fail."""

    def __init__(self, **settings: Any) -> None:
        url = f"memory://{uuid.uuid4().hex}"
        self.store = CrashingStore(open_store(url))
        use_store(url, self.store)
        settings = {"idem_store": url, "idem_settle_patience": 0, "idem_on_store_error": "raise", **settings}
        self.app = Celery("shop", set_as_current=False)
        self.app.conf.update(settings)

    def task(self, body: Callable[..., Any] | None = None, **options: Any) -> Any:
        def charge(self: Any, customer: Any, cents: Any = 0) -> Any:
            return body(self) if body else "done"

        options = {"intent": ("customer",), "must_match": ("cents",), **options}
        # Not lazy, so that errors are raised here and not when the application is first used. Not shared, because
        # Celery adds shared tasks to all applications of the process, and these tasks are wrong on purpose.
        how = {"base": IdempotentTask, "bind": True, "name": "shop.charge", "lazy": False, "shared": False}
        return self.app.task(**how, **options)(charge)

    def take_over(self, key: str) -> None:
        """Give the intent to another execution."""
        stored = self.store.read(f"idem:{key}").stored
        assert stored is not None
        record = unpack(stored.value, stored.stamp, key)._replace(owner=owners.mint())
        assert self.store.replace(f"idem:{key}", stored, pack(record)).done

    def held(self, task: Any, *args: Any, lease: int = HOUR) -> str:
        """Claim the intent for another execution, and return its key."""
        key = task.intent_key(*args)
        policy = POLICY if lease == HOUR else Policy(lease=lease, result_ttl=HOUR, failure_ttl=HOUR)
        decision, _ = task.guard.ledger.claim(key, Request(owners.mint(), "other", Fingerprint(), policy))
        assert isinstance(decision, Acquired)
        return key


def run(task: Any, *args: Any, **options: Any) -> Any:
    return task.apply(args, throw=True, **options).get()


# -- what each does to meet its message ---------------------------------------------------------------------
def no_intent(shop: Shop) -> None:
    shop.task(intent=None)


def unknown_parameter(shop: Shop) -> None:
    shop.task(intent=("costumer",))


def empty_intent(shop: Shop) -> None:
    shop.task(intent=())


def intent_of_a_wrong_kind(shop: Shop) -> None:
    shop.task(intent=7)


def misspelt_option(shop: Shop) -> None:
    shop.task(must_macth=("cents",))


def misspelt_setting(shop: Shop) -> None:
    shop.app.conf.idem_leese = 5
    shop.task()


def unheard_of_setting(shop: Shop) -> None:
    shop.app.conf.idem_xyzzy = 5
    shop.task()


def wrong_lease(shop: Shop) -> None:
    shop.task(lease="long")


def wrong_choice(shop: Shop) -> None:
    shop.app.conf.idem_on_crash = "panic"
    shop.task()


def no_store(shop: Shop) -> None:
    shop.app.conf.idem_store = ""
    run(shop.task(), "c1")


def store_of_no_kind(shop: Shop) -> None:
    shop.app.conf.idem_store = "mongodb://user:hunter2@host"
    run(shop.task(), "c1")


def reconcile_of_a_wrong_kind(shop: Shop) -> None:
    run(shop.task(reconcile=7), "c1")


def submit_without_an_intent(shop: Shop) -> None:
    def plain() -> None:
        pass

    shop.app.task(name="shop.plain", lazy=False, shared=False)(plain)
    celery_idem.submit(shop.app, "shop.plain")


def an_object(shop: Shop) -> None:
    run(shop.task(), object())


def a_naive_datetime(shop: Shop) -> None:
    from datetime import datetime

    run(shop.task(), datetime(2026, 11, 1))  # noqa: DTZ001  # what the message is about


def not_a_number(shop: Shop) -> None:
    run(shop.task(intent=ALL_ARGUMENTS), "c1", float("nan"))


def intent_function_that_returns_nothing(shop: Shop) -> None:
    run(shop.task(intent=lambda arguments: None), "c1")


def other_values(shop: Shop) -> None:
    task = shop.task()
    run(task, "c1", 123456)
    run(task, "c1", 654321)


def in_progress(shop: Shop) -> None:
    task = shop.task(on_duplicate="raise")
    shop.held(task, "c1")
    run(task, "c1")


def in_doubt(shop: Shop) -> None:
    task = shop.task()
    shop.held(task, "c1", lease=0)
    run(task, "c1")


def interrupted(shop: Shop) -> None:
    def body(task: Any) -> None:
        raise TimeoutError("no answer from the bank")

    run(shop.task(body, ambiguous_errors=(TimeoutError,)), "c1")


def result_not_kept(shop: Shop) -> None:
    task = shop.task(lambda task: "x" * 500, max_result_bytes=100)
    run(task, "c1")
    run(task, "c1")


def store_away(shop: Shop) -> None:
    shop.store.crash("before create", times=100)
    run(shop.task(), "c1")


def foreign_value(shop: Shop) -> None:
    task = shop.task()
    shop.store.create(f"idem:{task.intent_key('c1')}", b"somebody else's value")
    run(task, "c1")


def claim_outside(shop: Shop) -> None:
    _ = shop.task().claim


def same_step_twice(shop: Shop) -> None:
    def body(task: Any) -> None:
        task.step("mail", lambda: 1)
        task.step("mail", lambda: 2)

    run(shop.task(body), "c1")


def step_in_a_step(shop: Shop) -> None:
    run(shop.task(lambda task: task.step("mail", lambda: task.step("inner", lambda: 1))), "c1")


def step_result_not_storable(shop: Shop) -> None:
    run(shop.task(lambda task: task.step("mail", object)), "c1")


def transaction_elsewhere(shop: Shop) -> None:
    import sqlite3

    def body(task: Any) -> None:
        with sqlite3.connect(":memory:") as connection, task.settle_in(connection):
            pass

    run(shop.task(body), "c1")


def taken_over_before_a_step(shop: Shop) -> None:
    def body(task: Any) -> None:
        shop.take_over(task.claim.key)
        task.step("mail", lambda: 1)

    run(shop.task(body), "c1")


def taken_over_before_the_end(shop: Shop) -> None:
    run(shop.task(lambda task: shop.take_over(task.claim.key)), "c1")


def capitals(shop: Shop) -> None:
    shop.app.conf.IDEM_LEASE = 5
    shop.task()


def namespace_with_a_colon(shop: Shop) -> None:
    shop.app.conf.idem_namespace = "shop:eu"
    run(shop.task(), "c1")


def resolve_nothing(shop: Shop) -> None:
    shop.task()
    Ledger.from_app(shop.app).resolve("shop.charge:none", Happened(1), by="ada")


def resolve_what_is_settled(shop: Shop) -> None:
    task = shop.task()
    run(task, "c1")
    Ledger.from_app(shop.app).resolve(task.intent_key("c1"), Happened(1), by="ada")


KEY = "shop.charge:"

MESSAGES: list[tuple[Callable[[Shop], None], type[Exception], tuple[str, ...]]] = [
    (no_intent, ConfigurationError, ("shop.charge", "without an intent", "intent=(…)", "customer, cents")),
    (unknown_parameter, ConfigurationError, ("shop.charge", "'costumer'", "customer, cents")),
    (empty_intent, ConfigurationError, ("shop.charge", "names no parameter", "ALL_ARGUMENTS")),
    (intent_of_a_wrong_kind, ConfigurationError, ("shop.charge", "intent=", "parameter names", "int")),
    (misspelt_option, ConfigurationError, ("shop.charge", "must_macth", "Did you mean must_match=?")),
    (misspelt_setting, ConfigurationError, ("idem_leese", "Did you mean idem_lease?")),
    (unheard_of_setting, ConfigurationError, ("idem_xyzzy", "There are: idem_store")),
    (wrong_lease, ConfigurationError, ("shop.charge", "lease", "'long'", "seconds from 0.1")),
    (wrong_choice, ConfigurationError, ("idem_on_crash", "'panic'", "'in_doubt', 'resume', 'rerun'")),
    (no_store, ConfigurationError, ("idem_store", "redis://localhost:6379/1")),
    (store_of_no_kind, ConfigurationError, ("idem_store", "mongodb", "redis://", "postgresql://")),
    (reconcile_of_a_wrong_kind, ConfigurationError, ("shop.charge", "reconcile=", "(task, *args, **kwargs)")),
    (submit_without_an_intent, ConfigurationError, ("shop.plain", "declares no intent", "intent=(…)")),
    (an_object, IntentError, ("'customer'", "object", "pass an id")),
    (a_naive_datetime, IntentError, ("'customer'", "naive datetime", "timezone")),
    (not_a_number, IntentError, ("'cents'", "NaN")),
    (intent_function_that_returns_nothing, IntentError, ("shop.charge", "intent=", "dictionary")),
    (
        other_values,
        FingerprintMismatch,
        (KEY, "cents", "Nothing was run", "occurrence", "repeat it unchanged"),
    ),
    (in_progress, InProgress, (KEY, "right now", "Nothing was started", "Ask again in")),
    (
        in_doubt,
        OutcomeUnknown,
        (KEY, "in doubt", "without reporting", "Look at the destination", "idem resolve"),
    ),
    (interrupted, OutcomeUnknown, (KEY, "in doubt", "TimeoutError", "idem resolve")),
    (result_not_kept, ResultUnavailable, (KEY, "will not be done again", "max_result_bytes")),
    (store_away, StoreError, (KEY, "did not answer", "Nothing was run")),
    (foreign_value, StoreError, (KEY, "not a record", "Nothing was run", "idem forget")),
    (claim_outside, IdempotencyError, ("shop.charge", "not running under a claim", "task.run()")),
    (same_step_twice, ConfigurationError, (KEY, "two steps are called 'mail'", "each its own")),
    (step_in_a_step, ConfigurationError, (KEY, "'inner'", "inside step 'mail'", "after the other has ended")),
    (step_result_not_storable, ConfigurationError, (KEY, "'mail'", "cannot be stored", "The step has run")),
    (transaction_elsewhere, ConfigurationError, ("settle_in", "memory://", "postgresql://")),
    (
        taken_over_before_a_step,
        LeaseLost,
        (KEY, "Another execution took", "stopped", "look for a second one"),
    ),
    (
        taken_over_before_the_end,
        LeaseLost,
        (KEY, "finished after", "happened twice", "idem show", "idem_lease", "fence"),
    ),
    (capitals, ConfigurationError, ("IDEM_LEASE", "does nothing", "Write idem_lease", "CELERY_IDEM_LEASE")),
    (namespace_with_a_colon, ConfigurationError, ("namespace", "'shop:eu'", "without a colon")),
    (resolve_nothing, IdempotencyError, ("no intent shop.charge:none", "memory://")),
    (resolve_what_is_settled, IdempotencyError, (KEY, "succeeded", "nothing to resolve", "idem forget")),
]

SECRETS = ("hunter2", "123456", "654321", "ledger", "protocol.py", "Traceback")
"""A password, the values of two callers, and internal words."""


@pytest.mark.parametrize(
    ("provoke", "kind", "words"), MESSAGES, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_message_says_what_happened_and_what_to_do(
    provoke: Callable[[Shop], None], kind: type[Exception], words: tuple[str, ...]
) -> None:
    with pytest.raises(kind) as raised:
        provoke(Shop())
    message = str(raised.value)
    assert [word for word in words if word not in message] == [], message
    assert [word for word in SECRETS if word in message] == [], message
    assert message.endswith((".", "?", ")")), message


# -- stores that are away, or refuse -----------------------------------------------------------------------
AWAY: list[tuple[str, tuple[str, ...]]] = [
    ("redis://:hunter2@127.0.0.1:1/0", ("redis://127.0.0.1:1/0 did not answer", "refused")),
    ("rediss://:hunter2@127.0.0.1:1/0", ("rediss://127.0.0.1:1/0 did not answer", "refused")),
    ("redis://:hunter2@nowhere.invalid/0", ("redis://nowhere.invalid/0 did not answer", "not known")),
    ("redis+socket:///nowhere.sock", ("unix:///nowhere.sock did not answer", "No such file")),
    (
        "sentinel://:hunter2@127.0.0.1:1;sentinel://127.0.0.1:2/0?master_name=shop",
        (
            "sentinel://127.0.0.1:1;sentinel://127.0.0.1:2/0 did not answer",
            "no sentinel there",
            "master 'shop'",
        ),
    ),
    (
        "redis-cluster://:hunter2@127.0.0.1:1,127.0.0.1:2",
        ("redis-cluster://127.0.0.1:1,127.0.0.1:2 did not answer", "refused"),
    ),
    ("postgresql://me:hunter2@127.0.0.1:1/shop", ("postgresql://127.0.0.1:1/shop did not answer", "refused")),
    ("sqlite:////nowhere/idem.db", ("sqlite:////nowhere/idem.db did not answer", "unable to open")),
]


@pytest.mark.parametrize(("url", "words"), AWAY, ids=[url.partition(":")[0] for url, _ in AWAY])
def test_a_store_that_is_away_is_named_with_the_reason(url: str, words: tuple[str, ...]) -> None:
    shop = Shop(idem_store=url)
    with pytest.raises(StoreError) as raised:
        run(shop.task(), "c1")
    message = str(raised.value)
    assert [word for word in (*words, KEY, "Nothing was run") if word not in message] == [], message
    assert [word for word in SECRETS if word in message] == [], message
    assert len(message) < 400, message  # it does not contain the representation of a client


MISWRITTEN: list[tuple[str, tuple[str, ...]]] = [
    ("sentinel://127.0.0.1:1/0", ("does not name the master", "?master_name=")),
    ("redis-cluster://127.0.0.1:1/3", ("only one database",)),
    ("redis-cluster://127.0.0.1:port", ("write redis-cluster://host:port,host:port",)),
    ("redis://127.0.0.1:1/0?socket_timeout=long", ("socket_timeout",)),
    ("redis://:hunter2/x@127.0.0.1:1/0", ("cannot be read", "Percent-encode it: %2F for /")),
    ("postgresql://me:hunter2@x@127.0.0.1/shop", ("more than one @", "%40")),
    ("redis://:hunter2[@127.0.0.1:1/0", ("no URL that can be read", "Percent-encode")),
    ("hunter2", ("this is no URL", "redis://")),
    ("sqlite://", ("in memory", "sqlite:///idem.db")),
]


@pytest.mark.parametrize(("url", "words"), MISWRITTEN, ids=[words[0] for _, words in MISWRITTEN])
def test_a_url_that_no_store_can_read_is_told_how_to_write_it(url: str, words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigurationError) as raised:
        open_store(url)
    message = str(raised.value)
    assert [word for word in ("idem_store", *words) if word not in message] == [], message
    assert [word for word in SECRETS if word in message] == [], message


@pytest.mark.redis
def test_a_redis_user_without_the_rights(start_redis: Callable[..., RedisServer]) -> None:
    server = start_redis()
    with redis.Redis.from_url(server.url) as admin:
        admin.execute_command(
            "ACL", "SETUSER", "poor", "on", ">hunter2", "~idem:*", "+@connection", "+evalsha", "+eval"
        )
    shop = Shop(idem_store=f"redis://poor:hunter2@127.0.0.1:{server.port}/0")
    with pytest.raises(
        StoreError, match=r"refused: .* needs more rights: the page on security .* Nothing was run"
    ) as it:
        run(shop.task(), "c1")
    assert "hunter2" not in str(it.value)
    wrong = Shop(idem_store=f"redis://poor:hunter22@127.0.0.1:{server.port}/0")
    with pytest.raises(StoreError, match=r"redis://127.* refused: .*(?i:password).* Nothing was run"):
        run(wrong.task(), "c1")


@pytest.mark.postgres
def test_a_postgresql_user_without_the_rights(postgres: PostgresServer) -> None:
    import psycopg

    url = postgres.create_database(f"messages_{uuid.uuid4().hex}")
    with psycopg.connect(url, autocommit=True) as admin:
        admin.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC; CREATE ROLE poor LOGIN")
    try:
        shop = Shop(idem_store=url.replace("postgres@", "poor@"))
        task = shop.task()
        with pytest.raises(
            StoreError, match="no table celery_idem, and it cannot be created: permission denied"
        ) as none:
            run(task, "c1")
        assert "Let the owner of the database run what `celery -A proj idem schema` prints." in str(
            none.value
        )
        open_store(url).read("idem:x")  # the owner's first read creates the table
        with pytest.raises(StoreError, match=r"permission denied for table celery_idem.* needs more rights"):
            run(task, "c1")
    finally:
        with psycopg.connect(url, autocommit=True) as admin:
            admin.execute("DROP OWNED BY poor; DROP ROLE poor")
