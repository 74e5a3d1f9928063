"""``submit_in``: an action is accepted with the author's rows or not at all, wherever the process dies."""

from __future__ import annotations

import os
import signal
import sqlite3
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from celery import Celery
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from celery_idem import ConfigurationError, IdempotentTask, Ledger, Receipt
from celery_idem.engine.entries import Entry
from celery_idem.integration import recovering
from tests.support.waiting import wait_for

ORDERS = sa.Table("orders", sa.MetaData(), sa.Column("number", sa.Integer, unique=True))


class Shop:
    """An application whose rows and records are in one database, and whose queue is in memory."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.engine = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"), poolclass=NullPool)
        ORDERS.metadata.create_all(self.engine)
        self.app = Celery("shop", broker="memory://", backend="cache+memory://", set_as_current=False)
        self.app.conf.update(idem_store=url, task_default_queue=f"shop-{uuid.uuid4().hex}")

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
    assert shop.state() == ""  # a SQLite file is switched to write-ahead logging
    with Session(shop.engine) as session, session.begin():
        receipt = shop.place(session)
        assert receipt.status == "accepted"
        assert shop.ship.submit_in(session, 7).status == "in_progress"
        assert (shop.state(), shop.messages()) == ("", 0)
    assert (shop.state(), shop.messages()) == ("accepted", 1)
    entry = shop.entry()
    assert entry is not None
    assert entry.retry_after is not None and entry.retry_after > 5  # recovery has time again
    assert not list(recovering.recover(shop.app))
    assert shop.ship.submit(7).status == "in_progress"


def test_rolled_back_there_is_nothing(shop: Shop) -> None:
    with pytest.raises(ZeroDivisionError), Session(shop.engine) as session, session.begin():
        shop.place(session)
        raise ZeroDivisionError
    with Session(shop.engine) as session, session.begin():
        savepoint = session.begin_nested()
        shop.place(session, 8)
        savepoint.rollback()
        shop.place(session, 9)
    assert (shop.state(7), shop.state(8), shop.state(9), shop.messages()) == ("", "", "accepted", 1)
