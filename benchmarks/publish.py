"""Measures the caller's side: ``python -m benchmarks.publish``.

It compares three things. A new intent through ``submit`` and ``apply_async`` is compared with bare Celery's
``apply_async``. Ten thousand new intents through ``submit_many`` are compared with ``submit``. A duplicate of a
finished intent through ``submit`` is compared with one GET. Broker and store are two servers. The broker counts its
commands, because a duplicate must send none.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import redis
from celery import Celery

from benchmarks.report import Row, compared, show
from benchmarks.timing import rounds_of
from celery_idem import IdempotentTask
from tests.support.servers import RedisServer

ROUNDS, COUNT = 9, 500
"""Rounds and calls per round: some seconds."""

DUPLICATE = 1.3
"""Target: a duplicate's cost over one GET."""

MANY, SINGLE = 10_000, 500
"""New intents per round: in one call of ``submit_many``, and one by one."""

TOGETHER = 0.2
"""Target: the cost of one intent in ``submit_many`` over one in ``submit``."""


def bare(key: str) -> None:
    return None


def commands(client: redis.Redis) -> int:
    """Return the number of commands that the server ran, without INFO."""
    stats: dict[str, Any] = client.info("commandstats")
    return sum(one["calls"] for name, one in stats.items() if name != "cmdstat_info")


def of_many(guarded: Any, rounds: int, clear: Callable[[], None]) -> dict[str, list[float]]:
    """Return microseconds per call of each round, one by one and at once, in turn. The first round warms up."""
    taken: dict[str, list[float]] = {"celery_idem: submit": [], "celery_idem: submit_many": []}
    for turn in range(rounds + 1):
        clear()
        began = time.perf_counter()
        for n in range(SINGLE):
            guarded.submit(f"{turn}s{n}")
        between = time.perf_counter()
        guarded.submit_many([(f"{turn}m{n}",) for n in range(MANY)])
        ended = time.perf_counter()
        if turn:
            taken["celery_idem: submit"].append((between - began) / SINGLE * 1e6)
            taken["celery_idem: submit_many"].append((ended - between) / MANY * 1e6)
    return taken


def rows(rounds: int = ROUNDS, count: int = COUNT) -> list[Row]:
    with (
        tempfile.TemporaryDirectory() as folder,
        RedisServer(Path(folder) / "broker") as broker,
        RedisServer(Path(folder) / "store") as store,
    ):
        app = Celery("bench", broker=broker.url, backend=broker.url_for(1))
        app.conf.update(idem_store=store.url, task_default_queue="bench")
        plain = app.task(name="bench.plain")(bare)
        guarded: Any = app.task(base=IdempotentTask, intent=("key",), name="bench.guarded")(bare)
        client = redis.Redis.from_url(broker.url)
        kept = redis.Redis.from_url(store.url)

        def clear() -> None:
            client.flushdb()
            kept.flushdb()

        new = {
            "bare Celery: apply_async": lambda key: plain.apply_async((key,)),
            "celery_idem: apply_async": lambda key: guarded.apply_async((key,)),
            "celery_idem: submit": lambda key: guarded.submit(key + "s"),
        }
        published, _ = rounds_of(new, 1, rounds, count, clear)
        many = of_many(guarded, rounds, clear)

        guarded.apply(("done",))
        kept.set("bare", b"null", ex=86_400)
        before = commands(client)
        assert guarded.submit("done").status == "replayed"
        again = {
            "one GET": lambda _: kept.get("bare"),
            "celery_idem: submit": lambda _: guarded.submit("done"),
        }
        p50, p99 = rounds_of(again, 1, rounds, count)
        sent = commands(client) - before
        assert sent == 0, f"duplicates sent {sent} commands to the broker"
        app.close()
        note = {"celery_idem: submit": "0 commands to the broker"}
    target = {"celery_idem: submit": DUPLICATE}
    return [
        *compared("Publish, a new intent: p50", published, "bare Celery: apply_async", "µs"),
        *compared(
            "Publish, ten thousand new intents at once: each",
            many,
            "celery_idem: submit",
            "µs",
            {"celery_idem: submit_many": TOGETHER},
        ),
        *compared("Publish, a duplicate: p50", p50, "one GET", "µs", target, note),
        *compared("Publish, a duplicate: p99", p99, "one GET", "µs", target, note),
    ]


if __name__ == "__main__":
    show(rows())
