"""A shop that writes order and call in one transaction, and shipment and outcome in another.

A process kills itself at a point if a file called "point order" exists, and deletes the file first.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from celery import Celery
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from celery_idem import IdempotentTask, Ledger

OF_THE_PRODUCER = ("accepted", "placed", "published")
"""Before the commit; after it, before the message; after the message, before the record says that it was sent."""

OF_THE_WORKER = ("before", "written", "settled", "shipped", "never")

TABLES = sa.MetaData()
ORDERS = sa.Table("orders", TABLES, sa.Column("number", sa.Integer))
SHIPMENTS = sa.Table("shipments", TABLES, sa.Column("number", sa.Integer))


class Shop:
    """The application, its tables, and the folder with the files that make a process kill itself."""

    def __init__(self, url: str, broker: str, folder: Path) -> None:
        self.folder = folder
        # One connection for each transaction, so that a forked child shares none.
        self.engine = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"), poolclass=NullPool)
        TABLES.create_all(self.engine)
        self.app = Celery("chain", broker=broker, backend=broker, set_as_current=False)
        self.app.conf.update(idem_store=url, idem_lease=2, task_acks_late=True)
        shop = self

        @self.app.task(
            base=IdempotentTask, bind=True, name="chain.ship", intent=("order",), on_crash="transaction"
        )
        def ship(self: Any, order: int) -> str:
            shop.at("before", order)
            with Session(shop.engine) as session, session.begin():
                with self.settle_in(session) as outcome:
                    session.execute(SHIPMENTS.insert().values(number=order))
                    shop.at("written", order)
                    outcome.result = f"shipped {order}"
                shop.at("settled", order)
            shop.at("shipped", order)
            return "ignored"

        self.ship = ship

    def at(self, point: str, order: int) -> None:
        try:
            (self.folder / f"{point} {order}").unlink()
        except FileNotFoundError:
            return
        os.kill(os.getpid(), signal.SIGKILL)

    def place(self, order: int) -> None:
        publish = self.app.send_task

        def send_task(*args: Any, **options: Any) -> Any:
            self.at("placed", order)
            sent = publish(*args, **options)
            self.at("published", order)
            return sent

        self.app.send_task = send_task
        with Session(self.engine) as session, session.begin():
            session.execute(ORDERS.insert().values(number=order))
            assert self.ship.submit_in(session, order).status == "accepted"
            self.at("accepted", order)

    def place_in_a_child(self, order: int) -> int:
        """Places the order in a forked child, and returns the child's exit code."""
        child = os.fork()
        if child:
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        status = 1
        try:
            self.place(order)
            status = 0
        finally:
            os._exit(status)

    def ledger(self) -> Ledger:
        return Ledger.from_app(self.app)

    def orders(self) -> list[int]:
        return self._numbers(ORDERS)

    def shipped(self) -> list[int]:
        return self._numbers(SHIPMENTS)

    def _numbers(self, table: sa.Table) -> list[int]:
        with self.engine.connect() as connection:
            return sorted(row.number for row in connection.execute(table.select()))


def __getattr__(name: str) -> Celery:
    if name != "app":
        raise AttributeError(name)
    return Shop(os.environ["CHAIN"], os.environ["CHAIN_BROKER"], Path(os.environ["CHAIN_FOLDER"])).app
