"""A worker that holds many leases in one process, and a measurement of what it costs to renew them.

Used by ``test_leases`` and by ``benchmarks/leases.py``. The worker makes its application from the environment.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import NamedTuple

import redis as redis_py
from celery import Celery

from celery_idem import IdempotentTask
from celery_idem.operate.operators import Operator
from tests.support.effects import Effects
from tests.support.servers import RedisServer
from tests.support.waiting import wait_for
from tests.support.workers import CeleryWorker

ENV = "CELERY_TESTS_LEASES"

LEASE = 2.0
"""Seconds. Short, so that three leases pass soon. Long enough for delays on a busy machine."""

LOOK = 0.5
"""Seconds between a body's looks at its gate. A thousand bodies must leave CPU time for other work."""

PATIENCE = 90.0
"""Seconds in which a thousand bodies begin or end on a busy machine."""


def make(broker: str, store: str, folder: str) -> Celery:
    app = Celery("leases", broker=broker, set_as_current=False)
    app.conf.update(
        idem_store=store,
        idem_lease=LEASE,
        task_default_queue="leases",
        worker_prefetch_multiplier=1,
        broker_connection_retry_on_startup=True,
        result_backend=store,
        result_expires=600,
    )
    effects, gate = Effects(Path(folder) / "effects.jsonl"), Path(folder) / "gate"

    @app.task(name="hold", base=IdempotentTask, intent=("n",), shared=False, bind=True)
    def hold(self: IdempotentTask, n: int) -> bool:
        lost = False
        while not gate.exists():
            lost = lost or self.claim.lost
            time.sleep(LOOK)
        effects.add(str(n))  # a thousand at once: after the measurement, so a late renewal does not matter
        return lost

    @app.task(name="threads", shared=False)
    def threads() -> list[str]:
        return [thread.name for thread in threading.enumerate()]

    return app


if ENV in os.environ:
    app = make(*os.environ[ENV].split("|"))


class Cost(NamedTuple):
    """The cost of renewing leases while nothing else was done.

    Attributes:
        seconds: length of the measurement.
        commands: commands that the store received.
        states: the number of records in each state, as an average over all looks.
        renewers: threads of the worker's process that renew leases.
        threads: all threads of the worker's process.
        oldest: the greatest age of a record, in seconds. It is less than the lease if every renewal was in time.
        lost: bodies that saw ``claim.lost``.
        effects: for each number of times that an effect happened, how many effects there are.
    """

    seconds: float
    commands: int
    states: dict[str, int]
    renewers: int
    threads: int
    oldest: float
    lost: int
    effects: dict[int, int]


def hold_many(pool: str, number: int, broker: RedisServer, store: RedisServer, folder: Path) -> Cost:
    """Start a worker that holds ``number`` leases at once, and measure for more than three leases."""
    place = (broker.url, store.url, str(folder))
    app = make(*place)
    worker = CeleryWorker(
        "tests.celery.leases:app", folder, pool=pool, concurrency=number + 2, env={ENV: "|".join(place)}
    )
    try:
        return _hold_many(app, number, store, folder)
    finally:
        worker.kill()
        app.close()


def _hold_many(app: Celery, number: int, store: RedisServer, folder: Path) -> Cost:
    operator = Operator(app)
    with app.producer_pool.acquire(block=True) as producer:
        results = [app.tasks["hold"].apply_async((n,), producer=producer) for n in range(number)]

    def running() -> bool:
        return sum(entry.state == "running" for entry in operator.list()) == number

    wait_for(running, PATIENCE, "all of them to run", 0.5)
    names = app.tasks["threads"].delay().get(timeout=PATIENCE)
    states: dict[str, int] = {}
    oldest = 0.0
    with redis_py.Redis.from_url(store.url) as client:
        before, began = _evaluated(client), time.monotonic()
        looks = 0
        while time.monotonic() - began < 3.2 * LEASE:
            time.sleep(0.5)
            looks += 1
            for entry in operator.list():
                states[entry.state] = states.get(entry.state, 0) + 1
                oldest = max(oldest, entry.age)
        seconds = time.monotonic() - began
        commands = _evaluated(client) - before - looks  # each listing runs one script, for the time
    (folder / "gate").touch()
    lost = sum(result.get(timeout=PATIENCE) for result in results)
    counts = Effects(folder / "effects.jsonl").counts().values()
    return Cost(
        seconds=seconds,
        commands=commands,
        states={state: count // looks for state, count in states.items()},
        renewers=names.count("celery_idem leases"),
        threads=len(names),
        oldest=oldest,
        lost=lost,
        effects={times: list(counts).count(times) for times in set(counts)},
    )


def _evaluated(client: redis_py.Redis) -> int:
    stats = client.info("commandstats")
    return sum(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("evalsha", "eval"))
