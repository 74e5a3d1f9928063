"""``submit_in``: an action is accepted if and only if the author's rows commit, wherever the process dies."""

from __future__ import annotations

import signal
import sqlite3
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from celery import Celery
from kombu.exceptions import OperationalError
from psycopg.rows import dict_row
from sqlalchemy.event import registry
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.pool import NullPool

from celery_idem import ConfigurationError, IdempotentTask, Ledger, Receipt
from celery_idem.core.model import KEY
from celery_idem.engine.entries import Entry
from celery_idem.integration import recovering, transactions
from tests.stores import chain
from tests.stores.test_settle_in import django_connection
from tests.support.waiting import wait_for
from tests.support.workers import CeleryWorker

ORDERS = sa.Table("orders", sa.MetaData(), sa.Column("number", sa.Integer, unique=True))


class Shop:
    """An application whose rows and records are in one database, and whose queue is in memory."""

    def __init__(self, url: str, store: str = "") -> None:
        self.url = url
        self.engine = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"), poolclass=NullPool)
        ORDERS.metadata.create_all(self.engine)
        self.app = Celery("shop", broker="memory://", backend="cache+memory://", set_as_current=False)
        self.app.conf.update(idem_store=store or url, task_default_queue=f"shop-{uuid.uuid4().hex}")

        @self.app.task(base=IdempotentTask, name="shop.ship", intent=("order",))
        def ship(order: int, connection: str = "") -> str:
            return f"shipped {order}"

        self.ship = ship

    def messages(self) -> int:
        with self.app.connection_for_read() as connection:
            queue = self.app.conf.task_default_queue
            return int(connection.default_channel.queue_declare(queue).message_count)

    def entry(self, order: int = 7) -> Entry | None:
        return Ledger.from_app(self.app).get(self.ship.intent_key(order))

    def state(self, order: int = 7) -> str:
        entry = self.entry(order)
        return "" if entry is None else entry.state

    def place(self, session: Any, order: int = 7) -> Receipt:
        session.execute(ORDERS.insert().values(number=order))
        return self.ship.submit_in(session, order)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def shop(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Shop]:
    if request.param == "sqlite":
        shop = Shop(f"sqlite:///{tmp_path}/shop.db")
    else:
        shop = Shop(request.getfixturevalue("postgres_url"))
    yield shop
    shop.app.close()
    shop.engine.dispose()


def test_it_is_published_after_the_commit(shop: Shop) -> None:
    assert shop.state() == ""  # opens the store, which switches a SQLite file to write-ahead logging
    with Session(shop.engine) as session, session.begin():
        receipt = shop.place(session)
        assert receipt.status == "accepted"
        assert shop.ship.submit_in(session, 7).status == "in_progress"
        assert (shop.state(), shop.messages()) == ("", 0)
    assert (shop.state(), shop.messages()) == ("accepted", 1)
    entry = shop.entry()
    assert entry is not None
    assert entry.retry_after > 5  # it is published, so recovery waits again
    assert not list(recovering.recover(shop.app))
    assert shop.ship.submit(7).status == "in_progress"


def test_rolled_back_there_is_nothing(shop: Shop) -> None:
    with Session(shop.engine) as session:
        shop.place(session)
        session.rollback()
    with Session(shop.engine) as session, session.begin():
        savepoint = session.begin_nested()
        shop.place(session, 8)
        savepoint.rollback()
        shop.place(session, 9)
    assert (shop.state(7), shop.state(8), shop.state(9), shop.messages()) == ("", "", "accepted", 1)


def by_connection(shop: Shop, ends: Callable[[], None]) -> None:
    with shop.engine.begin() as connection:
        shop.place(connection)
        ends()


def by_driver(shop: Shop, ends: Callable[[], None]) -> None:
    if shop.url.startswith("sqlite"):
        sqlite = sqlite3.connect(shop.url.removeprefix("sqlite:///"))
        sqlite.row_factory = lambda cursor, row: dict(zip(cursor.description, row, strict=True))
        with sqlite:
            sqlite.execute("INSERT INTO orders VALUES (7)")
            shop.ship.submit_in(sqlite, 7)
            ends()
        sqlite.close()
        return
    with psycopg.connect(shop.url, cursor_factory=psycopg.RawCursor, row_factory=dict_row) as connection:
        connection.execute("INSERT INTO orders VALUES (7)")
        shop.ship.submit_in(connection, 7)
        ends()


def by_pipeline(shop: Shop, ends: Callable[[], None]) -> None:
    if shop.url.startswith("sqlite"):
        sqlite = sqlite3.connect(shop.url.removeprefix("sqlite:///"))
        sqlite.text_factory = bytes
        with sqlite:
            shop.ship.submit_in(sqlite, 7)
            ends()
        sqlite.close()
        return
    with (
        psycopg.connect(shop.url, autocommit=True) as connection,
        connection.pipeline(),
        connection.transaction(),
    ):
        connection.execute("INSERT INTO orders VALUES (7)")
        shop.ship.submit_in(connection, 7)
        ends()


def by_django(shop: Shop, ends: Callable[[], None]) -> None:
    connection = django_connection(shop.url)
    from django.db.transaction import Atomic

    try:
        with pytest.raises(ConfigurationError, match="no transaction open"):
            shop.ship.submit_in(connection, 7)
        with Atomic(connection.alias, savepoint=True, durable=False):
            shop.ship.submit_in(connection, 7)
            ends()
    finally:
        connection.close()


def roll_back() -> None:
    raise ZeroDivisionError


HOOKLESS = (by_driver, by_pipeline)


@pytest.mark.parametrize("by", [by_connection, *HOOKLESS, by_django])
def test_connections(shop: Shop, by: Callable[[Shop, Callable[[], None]], None]) -> None:
    with pytest.raises(ZeroDivisionError):
        by(shop, roll_back)
    assert (shop.state(), shop.messages()) == ("", 0)
    by(shop, lambda: None)
    assert (shop.state(), shop.messages()) == ("accepted", 0 if by in HOOKLESS else 1)
    if by in HOOKLESS:
        wait_for(lambda: any(one.published for one in recovering.recover(shop.app)), message="recovery")
        assert shop.messages() == 1


def test_a_connection_that_stays_open_publishes_when_it_begins_again(shop: Shop) -> None:
    shop.state()
    with shop.engine.connect() as connection:
        shop.place(connection)
        connection.commit()
        connection.execute(ORDERS.select())
        assert (shop.state(), shop.messages()) == ("accepted", 1)


def test_it_is_published_from_every_engine_and_from_every_pool(shop: Shop) -> None:
    """SQLAlchemy remembers the `id` of a pool that it has replaced. Another pool may get the same `id`."""
    first, second = shop.engine, sa.create_engine(shop.engine.url, poolclass=NullPool)
    shop.state()
    by_connection(shop, lambda: None)
    remembered = registry._key_to_collection
    key = (id(first.pool), "checkin", id(transactions._checked_in))
    remembered[(id(second.pool), *key[1:])] = remembered[key]
    shop.engine = second
    with shop.engine.begin() as connection:
        shop.place(connection, 8)
    assert shop.messages() == 2
    for order in range(9, 12):  # like a process that disposes of the engine after each fork
        shop.engine.dispose()
        with shop.engine.begin() as connection:
            shop.place(connection, order)
    assert shop.messages() == 5
    assert list(shop.engine.pool.dispatch.checkin).count(transactions._checked_in) == 1
    first.dispose()


def test_the_broker_is_away_and_recovery_publishes(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: Any, **__: Any) -> None:
        raise OperationalError("away")

    with monkeypatch.context() as broken:
        broken.setattr(shop.app, "send_task", away)
        by_connection(shop, lambda: None)
    assert (shop.state(), shop.messages()) == ("accepted", 0)
    wait_for(lambda: any(one.published for one in recovering.recover(shop.app)), message="recovery")
    assert shop.messages() == 1


def test_what_could_not_be_kept_is_refused(shop: Shop, tmp_path: Path) -> None:
    other = sa.create_engine(f"sqlite:///{tmp_path}/other.db")
    with other.begin() as connection, pytest.raises(ConfigurationError, match=r"cannot be seen|can only be"):
        shop.ship.submit_in(connection, 7)
    with Session(shop.engine) as session, session.begin():
        with pytest.raises(ConfigurationError, match="recovery must be able"):
            shop.ship.submit_in(session, 7, "x" * 70_000)
        assert shop.ship.submit_in(session, 8, connection="yes").status == "accepted"
    with pytest.raises(ConfigurationError, match="run_sync"):
        shop.ship.submit_in(AsyncSession(), 7)
    with pytest.raises(ConfigurationError, match="are coroutines"):
        shop.ship.submit_in(psycopg.AsyncConnection(psycopg.pq.PGconn.connect_start(b"")), 7)
    elsewhere = Shop(shop.url, f"memory://{uuid.uuid4().hex}")
    with Session(shop.engine) as session, pytest.raises(ConfigurationError, match="submit_on_commit"):
        elsewhere.ship.submit_in(session, 7)


def test_a_store_that_cannot_tell_is_a_receipt(shop: Shop) -> None:
    store = shop.ship.guard.ledger.store
    store.create(f"idem:{shop.ship.intent_key(7)}", b"no record of ours, or of a newer version")
    with Session(shop.engine) as session, session.begin():
        receipt = shop.place(session)
    assert (receipt.status, receipt.code) == ("not_run", "store_error")
    assert shop.ship.submit(7).status == "not_run"
    shop.app.conf.idem_on_store_error = "run"
    shop.ship.__class__._guard_made = None  # type() would give the class of the proxy
    with Session(shop.engine) as session, session.begin():
        assert shop.ship.submit_in(session, 7).status == "not_run"
    assert shop.messages() == 0


def test_what_is_published_is_what_was_accepted(shop: Shop) -> None:
    order = {"lines": ["a"]}
    engine = shop.engine.execution_options(stream_results=True)
    with Session(engine) as session, session.begin():
        receipt = shop.ship.submit_in(session, order)
        order["lines"].append("for another one")
    with shop.app.connection_for_read() as connection:
        message = connection.SimpleQueue(shop.app.conf.task_default_queue).get(timeout=5)
    assert message.payload[0] == [{"lines": ["a"]}]
    assert message.headers[KEY] == receipt.key


def test_another_schema_is_refused(postgres_url: str) -> None:
    shop = Shop(postgres_url)
    shop.state()
    with shop.engine.begin() as connection:
        connection.exec_driver_sql("CREATE SCHEMA aside")
        connection.exec_driver_sql("CREATE TABLE aside.celery_idem (LIKE celery_idem INCLUDING ALL)")
        connection.exec_driver_sql("SET LOCAL search_path = aside")
        with pytest.raises(ConfigurationError, match="cannot be seen on your connection"):
            shop.ship.submit_in(connection, 7)


def test_submit_on_commit(tmp_path: Path) -> None:
    shop = Shop(f"sqlite:///{tmp_path}/shop.db", f"memory://{uuid.uuid4().hex}")
    with pytest.raises(ConfigurationError, match="takes a SQLAlchemy session"):
        shop.ship.submit_on_commit(object(), 1)
    with pytest.raises(ConfigurationError, match="takes a SQLAlchemy session"):
        shop.ship.submit_on_commit(AsyncSession(), 1)
    with Session(shop.engine) as session:
        shop.ship.submit_on_commit(session, 1)
        session.rollback()
        shop.ship.submit_on_commit(session, 2)
        session.close()
        savepoint = session.begin_nested()
        shop.ship.submit_on_commit(session, 3)
        savepoint.rollback()
        with session.begin_nested(), session.begin_nested():
            shop.ship.submit_on_commit(session, 4)
        shop.ship.submit_on_commit(session, 5)
        assert shop.messages() == 0
        session.commit()
        assert shop.messages() == 2
        session.commit()
    django = django_connection(shop.url)
    from django.db.transaction import Atomic

    with Atomic(django.alias, savepoint=True, durable=False):
        shop.ship.submit_on_commit(django, 6)
        with pytest.raises(TypeError):
            shop.ship.submit_on_commit(django)
    django.close()
    assert [shop.state(n) for n in range(1, 7)] == ["", "", "", "accepted", "accepted", "accepted"]
    assert shop.messages() == 3
    scoped = scoped_session(sessionmaker(shop.engine))  # as Flask-SQLAlchemy makes it
    shop.ship.submit_on_commit(scoped, 7)
    scoped.rollback()
    shop.ship.submit_on_commit(scoped, 8)
    scoped.commit()
    scoped.remove()
    assert (shop.state(7), shop.state(8), shop.messages()) == ("", "accepted", 4)


def test_a_call_in_an_open_block_of_djangos_warns_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = Shop(f"sqlite:///{tmp_path}/shop.db")
    monkeypatch.setattr(transactions, "_warned", False)
    django = django_connection(shop.url)
    from django.db.transaction import Atomic

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shop.ship.delay(1)
        with Atomic(django.alias, savepoint=True, durable=False):
            shop.ship.submit_in(django, 2)
    with Atomic(django.alias, savepoint=True, durable=False), pytest.warns(RuntimeWarning, match="submit_in"):
        shop.ship.delay(3)
    django.close()


# --- the whole chain ------------------------------------------------------------------------


@pytest.mark.redis
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def test_killed_anywhere_each_order_is_shipped_once(
    kind: str, redis_url: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = f"sqlite:///{tmp_path}/shop.db" if kind == "sqlite" else request.getfixturevalue("postgres_url")
    shop = chain.Shop(url, redis_url, tmp_path)
    worker = CeleryWorker(
        "tests.stores.chain:app", tmp_path, pool="prefork", concurrency=2,
        env={"CHAIN": url, "CHAIN_BROKER": redis_url, "CHAIN_FOLDER": str(tmp_path)},
    )  # fmt: skip
    with worker:
        placed = []
        for order, point in enumerate([*chain.OF_THE_PRODUCER, *chain.OF_THE_WORKER]):
            (tmp_path / f"{point} {order}").touch()
            assert shop.place_in_a_child(order) == (-signal.SIGKILL if point in chain.OF_THE_PRODUCER else 0)
            if point != "accepted":
                placed.append(order)
        wait_for(lambda: len(set(shop.shipped())) == len(placed), message="all shipments")
        wait_for(lambda: not list(shop.ledger().list("open")), message="all outcomes")
    assert shop.orders() == placed
    assert shop.shipped() == placed
