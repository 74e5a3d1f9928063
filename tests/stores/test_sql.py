"""The SQL store, in SQLite and in PostgreSQL, with and without a pooler."""

from __future__ import annotations

import os
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa

from celery_idem.core.errors import ConfigurationError, StoreError
from celery_idem.core.model import MICROSECONDS, Acquired, Fingerprint, Policy, Request, Stored
from celery_idem.engine import owners
from celery_idem.engine.ledger import Ledger
from celery_idem.stores import open_store, sql_connections, sql_statements
from celery_idem.stores.base import Change, Store
from celery_idem.stores.sql import SqlStore
from celery_idem.testing import StoreConformance
from tests.conftest import running
from tests.stores.servers import PgBouncer
from tests.support.servers import PostgresServer
from tests.support.waiting import wait_for

MINE = b"owner-mine--"
YOURS = b"owner-yours-"


class TestSqlite(StoreConformance):
    @pytest.fixture(autouse=True)
    def _url(self, tmp_path: Path) -> None:
        self.url = f"sqlite:///{tmp_path}/idem.db"

    def make_store(self) -> Store:
        return open_store(self.url)


@pytest.fixture(scope="module")
def database(postgres: PostgresServer) -> str:
    """One database for the whole suite, because making one takes a quarter second. Its tests use different keys."""
    return postgres.create_database(f"conformance_{os.urandom(4).hex()}")


@pytest.mark.postgres
class TestPostgresql(StoreConformance):
    @pytest.fixture(autouse=True)
    def _url(self, database: str) -> None:
        self.url = database

    def make_store(self) -> Store:
        return open_store(self.url)


@pytest.fixture(scope="module")
def pgbouncer(postgres: PostgresServer) -> Iterator[PgBouncer]:
    with running(lambda: PgBouncer(postgres)) as server:
        yield server


@pytest.mark.postgres
class TestPgBouncer(StoreConformance):
    @pytest.fixture(autouse=True)
    def _url(self, pgbouncer: PgBouncer, database: str) -> None:
        self.url = pgbouncer.url_for(database.rpartition("/")[2])

    def make_store(self) -> Store:
        return open_store(self.url)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/idem.db"
    made: str = request.getfixturevalue("postgres_url")
    return made


def opened(url: str, durability: str = "none") -> SqlStore:
    store = open_store(url, durability)
    assert isinstance(store, SqlStore)
    return store


def by_hand(url: str, text: str) -> list[Any]:
    """Runs statements with the driver alone, as a person would."""
    if url.startswith("sqlite"):
        with sqlite3.connect(url.removeprefix("sqlite:///")) as file:
            if ";" in text:
                file.executescript(text)
                return []
            return file.execute(text).fetchall()
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(text)  # type: ignore[call-overload]
        return cursor.fetchall() if cursor.description else []


# --- the table -----------------------------------------------------------------------------


def test_the_table_is_made_at_first_use_whoever_is_first(url: str) -> None:
    stores = [opened(url) for _ in range(6)]
    start = threading.Barrier(len(stores))
    made: list[bool] = []

    def use(store: SqlStore) -> None:
        start.wait(30)
        made.append(store.create("a", MINE).done)

    threads = [threading.Thread(target=use, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(made) == [False] * 5 + [True]


def test_the_table_may_be_made_by_hand_and_made_again(url: str) -> None:
    for _ in range(2):
        by_hand(url, sql_statements.schema(url.partition(":")[0]))
    assert opened(url).create("a", MINE).done
    assert by_hand(url, "SELECT key FROM celery_idem") == [("a",)]
    opened(url).make_schema()


@pytest.mark.postgres
def test_a_role_that_may_only_read_and_write_rows_is_enough(postgres_url: str) -> None:
    role = f"app_{os.urandom(4).hex()}"
    by_hand(postgres_url, f"CREATE ROLE {role} LOGIN")
    by_hand(postgres_url, "REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    theirs = postgres_url.replace("postgres@", f"{role}@")
    with pytest.raises(StoreError, match="permission denied"):
        opened(theirs).create("a", MINE)
    by_hand(postgres_url, sql_statements.schema("postgresql"))
    by_hand(postgres_url, f"GRANT SELECT, INSERT, UPDATE, DELETE ON celery_idem TO {role}")
    store = opened(theirs)
    created = store.create("a", MINE)
    assert created.stored is not None
    assert store.replace("a", created.stored, MINE, 1).done
    assert [key for key, _ in store.scan("")] in ([], ["a"])
    assert store.purge(10) in (0, 1)


def test_what_operators_ask_for_has_an_index(url: str) -> None:
    store = opened(url)
    store.create("a", MINE + b"\x01\x06")
    statements = sql_statements.statements(store.dialect, "named")
    parameters = {
        "after": "''",
        "before": "9",
        "at": "0",
        "length": "2",
        "prefix": "'a:'",
        "page": "9",
        "limit": "9",
    }
    for statement, index in [
        (statements.purge, "celery_idem_expires"),
        (statements.open, "celery_idem_open"),
    ]:
        for name, value in parameters.items():
            statement = statement.replace(f":{name}", value)
        if store.dialect == "sqlite":
            plan = by_hand(url, f"EXPLAIN QUERY PLAN {statement}")
        else:  # PostgreSQL reads a table of one row without an index, unless that is switched off
            with psycopg.connect(url) as connection:
                connection.execute("SET enable_seqscan = off")
                plan = connection.execute(f"EXPLAIN {statement}").fetchall()  # type: ignore[call-overload]
        assert index in str(plan), plan


@pytest.mark.postgres
def test_purge_does_not_wait_for_a_row_that_somebody_holds(postgres_url: str) -> None:
    store = opened(postgres_url)
    for n in range(5):
        store.create(str(n), MINE, 1)
    with psycopg.connect(postgres_url) as other:
        other.execute("SELECT 1 FROM celery_idem WHERE key = '3' FOR UPDATE")
        assert store.purge(100) == 4
    assert store.purge(100) == 1


@pytest.mark.postgres
def test_a_row_that_a_transaction_holds_does_not_hold_up_the_renewal_of_others(postgres_url: str) -> None:
    """`settle_in` locks its record until the author commits."""
    store = open_store(postgres_url)
    held = {name: store.create(name, MINE).stored for name in ("a", "b", "c")}
    with psycopg.connect(postgres_url) as author:
        author.execute("SELECT 1 FROM celery_idem WHERE key = 'b' FOR UPDATE")
        changes = [Change(key, stored, MINE + b"2") for key, stored in held.items() if stored is not None]
        assert [reply.done for reply in store.replace_many(changes)] == [True, False, True]
        assert store.read("b").stored == held["b"]
        author.rollback()
    again = store.replace_many(changes)
    assert [reply.done for reply in again] == [False, True, False]
    assert again[0].stored == store.read("a").stored
    assert store.read("b").stored == again[1].stored


@pytest.mark.postgres
def test_a_thousand_replacements_are_one_statement(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(postgres_url)
    assert isinstance(store, SqlStore)
    changes = []
    for n in range(1000):
        stored = store.create(str(n), MINE).stored
        assert stored is not None
        changes.append(Change(str(n), stored, MINE + b"2", 3600 * MICROSECONDS if n % 2 else None))
    ran: list[str] = []
    once = store._once
    monkeypatch.setattr(store, "_once", lambda *given: (ran.append(given[0]), once(*given))[1])
    assert all(reply.done for reply in store.replace_many(changes))
    assert len(ran) == 1


def test_purge_in_batches(url: str) -> None:
    store = opened(url)
    for n in range(25):
        store.create(str(n), MINE, 1)
    store.create("kept", MINE)
    wait_for(lambda: not store.read("24").done)  # SQLite counts milliseconds
    assert [store.purge(10) for _ in range(4)] == [10, 10, 5, 0]
    assert [key for key, _ in store.scan("")] == ["kept"]


@pytest.mark.postgres
def test_a_duplicate_waits_for_no_lock(postgres_url: str) -> None:
    """While a transaction with ``settle_in`` is open, a duplicate sees at once that the intent is in progress."""
    store = opened(postgres_url)
    created = store.create("a", MINE)
    with psycopg.connect(postgres_url) as other:
        other.execute("UPDATE celery_idem SET stamp = stamp WHERE key = 'a'")
        reply = store.create("a", YOURS)
        assert (reply.done, reply.stored) == (False, created.stored)
        assert store.read("a").done


# --- faults of a database ----------------------------------------------------------------------


@pytest.mark.postgres
def test_a_restarted_server_is_found_again(postgres: PostgresServer, postgres_url: str) -> None:
    store = opened(postgres_url)
    created = store.create("a", MINE)
    postgres.kill()
    try:
        with pytest.raises(StoreError, match="did not answer"):
            store.read("a")
    finally:
        postgres.restart()
    assert store.read("a").stored == created.stored


@pytest.mark.postgres
def test_connections_that_the_server_closed_are_replaced(postgres_url: str) -> None:
    store = opened(postgres_url)
    store.create("a", MINE)
    by_hand(
        postgres_url,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'celery_idem' "
        "AND datname = current_database()",
    )
    assert store.read("a").done


class Interrupted(Exception):
    """Stands for Celery's soft time limit, which may be raised at any line."""


@pytest.mark.postgres
@pytest.mark.parametrize("by", ["time-out", "signal"])
def test_a_hanging_server_is_an_error_and_its_late_reply_is_nobodys(
    postgres: PostgresServer, postgres_url: str, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    monkeypatch.setattr(sql_connections, "TIMEOUT", 0.5 if by == "time-out" else 30.0)
    store = opened(postgres_url)
    store.create("a", MINE)
    postgres.pause()
    before = signal.getsignal(signal.SIGALRM)
    left = signal.setitimer(signal.ITIMER_REAL, 0)
    try:
        began = time.monotonic()
        if by == "time-out":
            with pytest.raises(StoreError, match="no answer within"):
                store.read("a")
        else:

            def interrupt(*_: object) -> None:
                raise Interrupted

            signal.signal(signal.SIGALRM, interrupt)
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            with pytest.raises(Interrupted):
                store.read("a")
        assert time.monotonic() - began < 20  # a bound, far above the time-out: the machine may be slow
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *left)
        postgres.resume()
    assert store.read("b").stored is None
    assert store.create("c", MINE).done
    assert store.read("a").done


def test_a_locked_file_is_an_error_in_bounded_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sql_connections, "TIMEOUT", 0.3)
    store = opened(f"sqlite:///{tmp_path}/idem.db")
    created = store.create("a", MINE)
    with sqlite3.connect(tmp_path / "idem.db", isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="locked"):
            store.create("b", MINE)
        assert store.read("a").stored == created.stored  # readers do not wait for the writer
        other.execute("ROLLBACK")
    assert store.create("b", MINE).done


def test_a_file_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="unable to open"):
        opened(f"sqlite:///{tmp_path}/nowhere/idem.db").read("a")


def test_a_killed_writer_loses_nothing_that_was_answered(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/idem.db"
    child = os.fork()
    if child == 0:
        opened(url).create("a", MINE)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert opened(url).read("a").done


def test_fsync(tmp_path: Path) -> None:
    for durability, level in (("none", 1), ("fsync", 2)):  # NORMAL, FULL
        store = opened(f"sqlite:///{tmp_path}/{durability}.db", durability)
        with store._engine.connect() as connection:
            assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == level
            assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"


@pytest.mark.postgres
def test_the_databases_clock_counts_in_microseconds(postgres_url: str) -> None:
    store = opened(postgres_url)
    reply = store.create("a", MINE)
    assert reply.stored is not None
    [(now,)] = by_hand(postgres_url, "SELECT extract(epoch FROM clock_timestamp())")
    assert abs(now * MICROSECONDS - reply.stored.stamp) < 60 * MICROSECONDS
    stamps = {store.read("a").now % 1000 for _ in range(20)}
    assert len(stamps) > 1


def test_a_clock_that_was_set_back_does_not_move_stamps_back(url: str) -> None:
    store = opened(url)
    store.create("a", MINE)
    later = store.read("a").now + 3600 * MICROSECONDS
    by_hand(url, f"UPDATE celery_idem SET stamp = {later}")  # noqa: S608  # a number made here
    reply = store.replace("a", Stored(MINE, later), MINE)
    assert reply.stored is not None
    assert reply.stored.stamp == later + 1


# --- forms of the URL ---------------------------------------------------------------------------


@pytest.mark.postgres
def test_no_secret_in_any_message(postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(f"postgresql://me:s3cret@127.0.0.1:{postgres.port}/none?application_name=x")
    assert store.url == f"postgresql://127.0.0.1:{postgres.port}/none"
    with pytest.raises(StoreError) as caught:
        store.create("a", MINE)
    assert "s3cret" not in str(caught.value) + repr(caught.value.__cause__)


@pytest.mark.parametrize(
    ("wrong", "durability", "says"),
    [
        ("sqlite://", "none", "Name a file"),
        ("sqlite:///:memory:", "none", "Name a file"),
        ("sqlite:///x.db", "replicas:1", "synchronous_standby_names"),
        ("postgresql://me:s3cret@host:port/x", "none", "no database URL"),
    ],
)
def test_what_cannot_work_says_so(wrong: str, durability: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says) as caught:
        open_store(wrong, durability)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("package", ["sqlalchemy", "psycopg"])
def test_a_missing_package_names_the_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sa
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigurationError, match=r"pip install 'celery_idem\[sql\]'"):
        open_store("postgresql://localhost/x")


def test_two_namespaces_in_one_store_do_not_see_each_other(url: str) -> None:
    one, other = Ledger(opened(url), "shop"), Ledger(opened(url), "shop2")
    request = Request(owners.mint(), "id", Fingerprint(), Policy(MICROSECONDS, MICROSECONDS, MICROSECONDS))
    assert isinstance(one.claim("a:1", request)[0], Acquired)
    assert isinstance(other.claim("a:1", request)[0], Acquired)
    assert [[entry.key for entry in ledger.list()] for ledger in (one, other)] == [["a:1"], ["a:1"]]
    assert one.forget("a:1")
    assert list(one.list()) == []
    assert other.get("a:1") is not None
