"""PostgreSQL changes roles or ends connections: the next call uses a server and a connection that work."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from celery import Celery

from celery_idem import Ledger
from celery_idem.core.errors import StoreError
from celery_idem.operate import doctor
from celery_idem.operate.doctor import kept, servers
from celery_idem.operate.doctor.asking import infos, run_of
from celery_idem.stores import open_store
from celery_idem.stores.sql import SqlStore
from tests.conftest import running
from tests.stores.servers import PgBouncer, Standby
from tests.support.servers import PostgresServer
from tests.support.waiting import wait_for

pytestmark = pytest.mark.postgres

MINE = b"owner-mine--"
CALLS = 24


def switch(primary: PostgresServer, standby: Standby) -> None:
    """Switches roles as a managed service does: the old primary takes no more writes, and keeps its connections."""
    with session(primary) as old, session(standby) as new:
        old.execute("ALTER SYSTEM SET default_transaction_read_only = on")
        old.execute("SELECT pg_reload_conf()")
        wait_for(lambda: one(old, "SHOW transaction_read_only") == "on", 30, "the old primary to only read")
        catch_up(old, new)
        new.execute("SELECT pg_promote()")
        wait_for(lambda: not one(new, "SELECT pg_is_in_recovery()"), 30, "the promotion")


def catch_up(primary: psycopg.Connection[Any], standby: psycopg.Connection[Any]) -> None:
    behind = f"SELECT pg_last_wal_replay_lsn() < '{one(primary, 'SELECT pg_current_wal_lsn()')}'"
    wait_for(lambda: not one(standby, behind), 30, "the standby to have everything")


@contextlib.contextmanager
def session(server: PostgresServer) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(server.url, autocommit=True) as connection:
        yield connection


def one(connection: psycopg.Connection[Any], statement: str) -> Any:
    row = connection.execute(statement).fetchone()  # type: ignore[call-overload]
    assert row is not None
    return row[0]


def not_writable(url: str) -> str:
    """What the doctor reports about a server that only reads."""
    app = Celery("away", set_as_current=False)
    app.conf.idem_store = url
    (found,) = doctor.examine(doctor.gather(app), (doctor.stores.writing,))
    return found.wrong + found.change


def with_connections(url: str, many: int = 4) -> SqlStore:
    """A store with several open connections. If it dropped them one by one, each would fail one call."""
    store = open_store(url)
    assert isinstance(store, SqlStore)
    assert store.create("before", MINE).done
    with contextlib.ExitStack() as stack:
        for _ in range(many):
            stack.enter_context(store._engine.connect())
    return store


def test_a_switchover_that_leaves_connections_alive_costs_no_claim() -> None:
    with running(PostgresServer) as primary, running(lambda: Standby(primary)) as standby:
        hosts = "&".join(f"host=127.0.0.1:{server.port}" for server in (primary, standby))
        store = with_connections(f"postgresql://postgres@/postgres?{hosts}")
        assert str(primary.port) in store.url
        noted = Ledger(store)
        servers.note(noted, run_of(infos(store)))
        with session(primary) as first, session(standby) as second:
            catch_up(
                first, second
            )  # until it has the table, the doctor says that this store cannot be used at all
        assert "standby" in not_writable(standby.url)
        switch(primary, standby)
        assert "default_transaction_read_only" in not_writable(primary.url)
        assert all(store.create(str(n), MINE).done for n in range(CALLS))
        assert store.read("before").done
        with session(standby) as promoted:
            assert (
                one(promoted, "SELECT count(*) FROM celery_idem WHERE NOT starts_with(key, 'idem~')")
                == CALLS + 1
            )
        (change,) = servers.changes(kept.read(noted, servers.NAME), run_of(infos(store)), 0.0)
        assert change.kind == "recovery", "a promotion begins another timeline"
        primary.kill()  # the store tries this dead server first, and then the other
        store.close()
        assert store.read("before").done


def test_a_server_that_only_reads_says_what_to_change(postgres_url: str) -> None:
    with_connections(postgres_url).close()
    with psycopg.connect(postgres_url, autocommit=True) as admin:
        name = admin.info.dbname
        admin.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")  # type: ignore[call-overload]
    store = open_store(postgres_url)
    for _ in range(2):
        with pytest.raises(StoreError, match="host=one:5432&host=two:5432"):
            store.create("a", MINE)


@pytest.mark.parametrize("ended", ["terminated", "idle for too long"])
def test_connections_that_the_server_ends_cost_no_claim(postgres_url: str, ended: str) -> None:
    options = "" if ended == "terminated" else "?options=-c%20idle_session_timeout%3D100"
    store = with_connections(postgres_url + options)
    mine = "FROM pg_stat_activity WHERE application_name = 'celery_idem' AND datname = current_database()"
    with psycopg.connect(postgres_url, autocommit=True) as admin:
        if ended == "terminated":
            admin.execute(f"SELECT pg_terminate_backend(pid) {mine}")  # type: ignore[call-overload]
        wait_for(lambda: one(admin, f"SELECT count(*) {mine}") == 0, 20, "the server to end the connections")
    assert all(store.create(str(n), MINE).done for n in range(CALLS))


def test_behind_a_pooler_a_server_that_is_back_is_found_again(postgres: PostgresServer) -> None:
    with running(lambda: PgBouncer(postgres)) as pooler:
        database = postgres.create_database("behind_a_pooler").rpartition("/")[2]
        store = with_connections(pooler.url_for(database))
        with psycopg.connect(postgres.url, autocommit=True) as admin:
            admin.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (database,)
            )
        assert all(store.create(str(n), MINE).done for n in range(CALLS))


def test_a_transaction_left_open_that_the_server_ends_is_the_authors_alone(postgres_url: str) -> None:
    """The server ends an idle transaction with `settle_in` (25P03): nothing of it stays, and the store works on."""
    store = with_connections(postgres_url)
    with psycopg.connect(postgres_url) as author:
        author.execute("SET idle_in_transaction_session_timeout = '50ms'")
        author.commit()
        inside = store.inside(author)
        assert inside.create("theirs", MINE).done
        with psycopg.connect(postgres_url, autocommit=True) as admin:
            gone = f"SELECT count(*) FROM pg_stat_activity WHERE pid = {author.info.backend_pid}"  # noqa: S608
            wait_for(lambda: one(admin, gone) == 0, 20, "the server to end the transaction")
        with pytest.raises(psycopg.Error):
            inside.read("theirs")
    assert not store.read("theirs").done
    assert store.create("theirs", MINE).done
