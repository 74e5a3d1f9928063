"""``settle_in``: rows and outcome commit together, wherever a process dies, and also when a late one wakes up."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from celery import Celery
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from celery_idem import ConfigurationError, IdempotentTask, LeaseLost, StoreError
from celery_idem.integration import delivery
from celery_idem.stores import sql_connections
from tests.support.servers import PostgresServer
from tests.support.waiting import wait_for

LEASE = 0.3  # seconds; short, because the second execution waits until it lapses

ROWS = sa.Table("invoices", sa.MetaData(), sa.Column("customer", sa.String))


class Shop:
    """An application whose rows and records are in one database."""

    def __init__(self, url: str, store: str = "") -> None:
        self.url = url
        # One connection for each transaction, so that a forked child shares none.
        self.engine = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"), poolclass=NullPool)
        ROWS.metadata.create_all(self.engine)
        self.at: Callable[[str], None] = lambda point: None
        self.transact = self.by_sqlalchemy
        self.app = Celery("shop", set_as_current=False, broker="memory://")
        self.app.conf.update(idem_store=store or url, idem_lease=LEASE)
        shop = self

        @self.app.task(
            base=IdempotentTask,
            bind=True,
            intent=("customer",),
            on_crash="transaction",
            max_attempts=20,
            ambiguous_errors=(ConnectionError,),
        )
        def invoice(self: Any, customer: str) -> str:
            shop.at("before")
            shop.transact(self, customer)
            shop.at("committed")
            return "ignored"

        self.invoice = invoice

    def by_sqlalchemy(self, task: Any, customer: str) -> None:
        with self.engine.connect() as connection:
            self.at("connected")
            with task.settle_in(connection) as outcome:
                self.at("begun")
                connection.execute(ROWS.insert().values(customer=customer))
                self.at("written")
                outcome.result = {"invoice": customer}
            self.at("settled")
            connection.commit()

    def rows(self) -> list[str]:
        with self.engine.connect() as connection:
            return [row.customer for row in connection.execute(ROWS.select())]

    def call(self, customer: str = "anna") -> Any:
        return self.invoice.apply((customer,)).get()


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def shop(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Shop]:
    if request.param == "sqlite":
        yield Shop(f"sqlite:///{tmp_path}/shop.db")
    else:
        yield Shop(request.getfixturevalue("postgres_url"))


def in_a_child(shop: Shop, at: Callable[[str], None], value: Any = None) -> int:
    """Runs the task in a forked process, and returns its pid. Exit status 0: it returned ``value``, 3: LeaseLost."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        shop.at = at
        status = 0 if shop.call() == value else 2
    except LeaseLost:
        status = 3
    finally:
        os._exit(status)


def kill_at(wanted: str) -> Callable[[str], None]:
    def at(point: str) -> None:
        if point == wanted:
            os.kill(os.getpid(), signal.SIGKILL)

    return at


def stop_at(wanted: str) -> Callable[[str], None]:
    def at(point: str) -> None:
        if point == wanted:
            os.kill(os.getpid(), signal.SIGSTOP)

    return at


ANNA = {"invoice": "anna"}


@pytest.mark.parametrize("point", ["before", "connected", "begun", "written", "settled", "committed"])
def test_killed_anywhere_it_happens_once(shop: Shop, point: str) -> None:
    child = in_a_child(shop, kill_at(point))
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    happened = point == "committed"
    assert len(shop.rows()) == happened
    assert shop.call() == ANNA  # runs or replays; it is not in doubt, and no person has to decide
    assert shop.call() == ANNA
    assert shop.rows() == ["anna"]


@pytest.mark.parametrize("point", ["begun", "written", "settled"])
@pytest.mark.timeout(60)
def test_a_zombie_that_wakes_up_late_cannot_commit_a_second_time(shop: Shop, point: str) -> None:
    child = in_a_child(shop, stop_at(point), ANNA)
    status = None
    try:
        assert os.WIFSTOPPED(os.waitpid(child, os.WUNTRACED)[1])
        results: list[Any] = []
        other = threading.Thread(target=lambda: results.append(shop.call()), daemon=True)
        other.start()
        # If the stopped process holds a lock, the other one waits for it. Else the other takes over and finishes.
        locked = point == "settled" or (point == "written" and "sqlite" in shop.url)
        if locked:
            other.join(3 * LEASE)
            assert other.is_alive()
        else:
            wait_for(shop.rows)
        os.kill(child, signal.SIGCONT)
        _, status = os.waitpid(child, 0)
        other.join(60)
        assert results == [ANNA]
        assert shop.rows() == ["anna"]
        assert os.waitstatus_to_exitcode(status) == (0 if locked else 3)
    finally:
        if status is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def test_a_rolled_back_transaction_settles_nothing(shop: Shop) -> None:
    def fail(point: str) -> None:
        if point == "settled":
            raise TimeoutError("the network")

    shop.at = fail
    with pytest.raises(TimeoutError):
        shop.call()
    assert shop.rows() == []
    shop.at = lambda point: None
    with pytest.raises(TimeoutError):  # an error is an outcome too, and is replayed
        shop.call()


def test_an_outcome_that_is_kept_for_no_time_was_committed_all_the_same(shop: Shop) -> None:
    shop.app.conf.idem_result_ttl = 0
    assert shop.call() == ANNA
    assert shop.rows() == ["anna"]


def test_an_error_that_says_no_more_than_a_crash_leaves_no_doubt(shop: Shop) -> None:
    def fail(point: str) -> None:
        if point == "settled":
            raise ConnectionError("the network")

    shop.at = fail
    with pytest.raises(ConnectionError):
        shop.call()
    shop.at = lambda point: None
    assert shop.call() == ANNA
    assert shop.rows() == ["anna"]


def test_what_the_body_raises_after_the_commit_cannot_change_the_outcome(
    shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(point: str) -> None:
        if point == "committed":
            raise ValueError("the mail server")

    shop.at = fail
    assert shop.call() == ANNA
    assert "the mail server" in caplog.text
    assert shop.rows() == ["anna"]


def test_a_transaction_that_nobody_commits_is_an_error_and_nothing_is_settled(shop: Shop) -> None:
    commit = shop.transact

    def forget(task: Any, customer: str) -> None:
        with shop.engine.connect() as connection, task.settle_in(connection):
            connection.execute(ROWS.insert().values(customer=customer))

    shop.transact = forget
    with pytest.raises(StoreError, match="not committed"):
        shop.call()
    assert shop.rows() == []
    shop.transact = commit
    assert shop.call() == ANNA
    assert shop.rows() == ["anna"]


def test_nobody_is_told_of_a_success_that_can_still_be_rolled_back(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store waits for a transaction that is open when the body returns. A time-out does not prove a commit."""
    kept: list[sa.Connection] = []

    def leave_open(task: Any, customer: str) -> None:
        connection = shop.engine.connect()
        kept.append(connection)
        with task.settle_in(connection) as outcome:
            connection.execute(ROWS.insert().values(customer=customer))
            outcome.result = {"invoice": customer}

    shop.transact = leave_open
    shop.app.conf.idem_settle_patience = 0.5
    monkeypatch.setattr(delivery, "INLINE_LIMIT", 0.5)
    monkeypatch.setattr(sql_connections, "TIMEOUT", 1.0)
    with pytest.raises(StoreError):
        shop.call()
    kept[0].rollback()
    assert shop.rows() == []
    shop.transact = shop.by_sqlalchemy
    assert shop.call() == {"invoice": "anna"}
    assert shop.rows() == ["anna"]


def test_a_renewed_lease_does_not_disturb_the_transaction(shop: Shop) -> None:
    def slow(point: str) -> None:
        if point == "begun":
            threading.Event().wait(2 * LEASE)  # longer than the lease, so it is renewed meanwhile

    shop.at = slow
    assert shop.call() == ANNA
    assert shop.rows() == ["anna"]


# --- supported connections -----------------------------------------------------------------


def by_session(shop: Shop, task: Any, customer: str) -> None:
    with Session(shop.engine) as session, session.begin(), task.settle_in(session) as outcome:
        session.execute(ROWS.insert().values(customer=customer))
        outcome.result = ANNA


def by_driver(shop: Shop, task: Any, customer: str) -> None:
    if shop.url.startswith("sqlite"):
        import sqlite3

        sqlite = sqlite3.connect(shop.url.removeprefix("sqlite:///"))
        with sqlite, task.settle_in(sqlite) as outcome:
            sqlite.execute("INSERT INTO invoices VALUES (?)", (customer,))
            outcome.result = ANNA
        sqlite.close()
        return
    import psycopg
    from psycopg.rows import dict_row

    with (
        psycopg.connect(shop.url, row_factory=dict_row, autocommit=True) as connection,
        connection.transaction(),
        task.settle_in(connection) as outcome,
    ):
        connection.execute("INSERT INTO invoices VALUES (%s)", (customer,))
        outcome.result = ANNA


def by_django(shop: Shop, task: Any, customer: str) -> None:
    connection = django_connection(shop.url)
    from django.db.transaction import Atomic

    try:
        with Atomic(connection.alias, savepoint=True, durable=False), task.settle_in(connection) as outcome:
            with connection.cursor() as cursor:
                cursor.execute("INSERT INTO invoices VALUES (%s)", (customer,))
            outcome.result = ANNA
    finally:
        connection.close()


def django_connection(url: str) -> Any:
    """A connection of Django to the database, like ``django.db.connection``."""
    import django
    import django.conf
    import django.db

    if not django.conf.settings.configured:
        django.conf.settings.configure(DATABASES={}, LOGGING_CONFIG=None)
        django.setup()
    parsed = sa.make_url(url)
    engine = "postgresql" if parsed.drivername == "postgresql" else "sqlite3"
    django.db.connections.databases[url] = django.db.connections.databases["default"] | {
        "ENGINE": f"django.db.backends.{engine}",
        "NAME": parsed.database,
        "USER": parsed.username or "",
        "HOST": parsed.host or "",
        "PORT": parsed.port or "",
    }
    return django.db.connections[url]


@pytest.mark.parametrize("by", [by_session, by_driver, by_django])
def test_connections(shop: Shop, by: Callable[[Shop, Any, str], None]) -> None:
    shop.transact = lambda task, customer: by(shop, task, customer)

    def fail(point: str) -> None:
        if point == "committed":
            assert shop.rows() == ["anna"]

    shop.at = fail
    assert shop.call() == ANNA
    assert shop.call() == ANNA
    assert shop.rows() == ["anna"]


# --- where it cannot work --------------------------------------------------------------------


def test_another_store_is_refused(shop: Shop) -> None:
    other = Shop(shop.url, store="memory://settle-in")
    with pytest.raises(ConfigurationError, match="cannot take part"):
        other.call()
    assert other.rows() == []


def test_another_database_is_refused(shop: Shop, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if shop.url.startswith("sqlite"):
        there = f"sqlite:///{tmp_path}/other.db"
    else:
        there = request.getfixturevalue("postgres").create_database("elsewhere_" + os.urandom(4).hex())
    other = Shop(shop.url, store=there)
    with pytest.raises(ConfigurationError, match="cannot be seen"):  # without the table
        other.call()
    assert shop.call("berta") == {"invoice": "berta"}
    with pytest.raises(ConfigurationError, match="cannot be seen"):  # with the table, and without the record
        other.call("carla")
    assert shop.rows() == ["berta"]


@pytest.mark.postgres
def test_another_kind_of_database_is_refused(
    postgres: PostgresServer, postgres_url: str, tmp_path: Path
) -> None:
    shop = Shop(postgres_url, store=f"sqlite:///{tmp_path}/idem.db")
    with pytest.raises(ConfigurationError, match="in one database"):
        shop.call()


def test_autocommit_is_refused(shop: Shop) -> None:
    shop.engine = shop.engine.execution_options(isolation_level="AUTOCOMMIT")
    with pytest.raises(ConfigurationError, match="no transaction"):
        shop.call()


def test_what_is_no_connection_is_refused(shop: Shop) -> None:
    def transact(task: Any, customer: str) -> None:
        with task.settle_in(object()):
            pass

    shop.transact = transact
    with pytest.raises(ConfigurationError, match="a object is not a supported connection"):
        shop.call()
