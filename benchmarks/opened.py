"""Measures what reading the open intents costs among many finished ones: ``python -m benchmarks.opened``.

A Redis and a PostgreSQL hold a thousand open intents (500 in doubt, 400 with a lapsed lease, 100 that run) and a
million finished ones (``--finished``). Each reading runs seven times, in turn, and the slowest counts. Without the
index, a listing reads every record, as ``reindex`` does.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import redis
from celery import Celery
from prometheus_client import generate_latest

from benchmarks import filling
from benchmarks.report import Row, show
from benchmarks.store import POLICY, RESULT
from celery_idem import IdempotentTask
from celery_idem.core.model import Record, State
from celery_idem.operate.operators import Oldest, Operator
from celery_idem.telemetry.prometheus import exporter_registry
from tests.support.servers import PostgresServer, RedisServer

FINISHED, OPEN, ROUNDS = 1_000_000, 1_000, 7

MOST = 100.0
"""Target: milliseconds for a reading. Ratios are relative to it."""


def opened(n: int, now: int) -> Record:
    """Return a record that is open."""
    made = filling.record(0 if n % 2 else 2, now)
    return (
        made if n % 10 else made._replace(state=State.RUNNING, lease=10 * POLICY.lease, reason="", crashes=0)
    )


def application(url: str) -> Celery:
    app = Celery("bench", set_as_current=False)
    app.conf.idem_store = url

    @app.task(base=IdempotentTask, intent=("n",), name=filling.TASK, shared=False)
    def noop(n: int) -> None:
        """Never called."""

    return app


def readings(app: Celery) -> dict[str, Callable[[], object]]:
    operator = Operator(app)
    (ledger,) = operator.ledgers()

    def first_page() -> list[object]:
        oldest = Oldest(50)
        for entry in operator.list("waiting"):
            oldest.add(entry)
        return list(oldest.entries())

    return {
        "list --state in_doubt": lambda: list(operator.list("in_doubt")),
        "stats of what is open": lambda: operator.stats("open"),
        "the inbox' first page": first_page,
        "an exporter's scrape": lambda: generate_latest(exporter_registry(app, every=0.0)),
        "recovery's look": lambda: list(ledger.overdue()),
    }


@contextlib.contextmanager
def filled(finished: int) -> Iterator[dict[str, str]]:
    """Start and fill two servers, and give their URLs by name."""
    with (
        tempfile.TemporaryDirectory() as folder,
        RedisServer(Path(folder)) as server,
        PostgresServer() as database,
    ):
        with redis.Redis.from_url(server.url, socket_timeout=600) as client:
            filling.fill_redis(client, 0, finished, filling.same(RESULT))
            filling.fill_redis(client, finished, finished + OPEN, opened)
        url = database.create_database("many")
        Operator(application(url)).stats("open")  # creates the table
        with psycopg.connect(url, autocommit=True) as connection:
            filling.fill_postgresql(connection, 0, finished, filling.same(RESULT))
            filling.fill_postgresql(connection, finished, finished + OPEN, opened)
        yield {"Redis": server.url, "PostgreSQL": url}


def rows(finished: int) -> list[Row]:
    made = []
    with filled(finished) as urls:
        for place, url in urls.items():
            app = application(url)
            calls = readings(app)
            times: dict[str, list[float]] = {name: [] for name in calls}
            cpu: dict[str, list[float]] = {name: [] for name in calls}
            for _ in range(ROUNDS):
                for name, call in calls.items():
                    began, used = time.perf_counter(), time.process_time()
                    call()
                    cpu[name].append((time.process_time() - used) * 1e3)
                    times[name].append((time.perf_counter() - began) * 1e3)
            group = f"{place}, {finished:,} finished, {OPEN:,} open"
            for name, taken in times.items():
                slowest = max(taken[1:])  # the first opens connections
                value = f"{slowest:.0f} ms, at best {min(taken):.0f}, {min(cpu[name]):.0f} of CPU here"
                made.append(Row(group, name, round(slowest / MOST, 2), target=1.0, value=value))
            began = time.perf_counter()
            Operator(app).reindex()
            made.append(Row(group, "reindex", value=f"{time.perf_counter() - began:.1f} s"))
    return made


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--finished", type=int, default=FINISHED)
    show(rows(parser.parse_args().finished))
