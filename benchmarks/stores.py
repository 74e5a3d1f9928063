"""Measures a record's cost in each store: ``python -m benchmarks.stores``.

With a result of 115 bytes, it measures claims and settles per second with one thread and with eight, look-ups of a
duplicate per second, and bytes per finished record. The servers run on this machine, so there is no network. It also
compares Valkey's own compare-and-set (``SET … IFEQ``) with the script.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import psutil
import redis
import sqlalchemy as sa

from benchmarks.store import claim_and_settle
from celery_idem.engine.ledger import Ledger
from celery_idem.stores import open_store
from tests.stores.servers import Cluster
from tests.support.servers import PostgresServer, RedisServer, ValkeyServer

WINDOW, WINDOWS = (
    0.4,
    8,
)  # seconds of a window, and number of windows. The best one counts: other programs only slow it down.
RECORDS = 10_000


def per_second(work: Callable[[str], object], threads: int) -> float:
    """Return calls of ``work`` per second with fresh keys, in several threads, in the best window."""
    return max(_window(work, threads) for _ in range(WINDOWS))


def _window(work: Callable[[str], object], threads: int) -> float:
    counts = [0] * threads
    end = time.monotonic() + WINDOW

    def run(n: int) -> None:
        while time.monotonic() < end:
            work(f"bench:{uuid.uuid4().hex}")
            counts[n] += 1

    running = [threading.Thread(target=run, args=(n,)) for n in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return sum(counts) / WINDOW


def memory(urls: list[str]) -> int:
    total = 0
    for url in urls:
        with redis.Redis.from_url(url) as client:
            total += client.info("memory")["used_memory"]
    return total


class Place(NamedTuple):
    """A store: a function for the bytes that it uses, and the pids of its server."""

    name: str
    url: str
    used: Callable[[], int]
    pids: list[int]

    def seconds(self) -> float:
        """Return the server's CPU time."""
        processes = [psutil.Process(pid) for pid in self.pids]
        family = processes + [child for process in processes for child in process.children()]
        return sum(sum(process.cpu_times()[:2]) for process in family)


@contextlib.contextmanager
def places(folder: Path) -> Iterator[list[Place]]:
    """Start each server with an empty store."""
    file = folder / "idem.db"
    with (
        RedisServer(folder / "redis") as one,
        ValkeyServer(folder / "valkey") as valkey,
        Cluster(folder / "cluster") as cluster,
        PostgresServer() as postgres,
    ):
        engine = sa.create_engine(postgres.url.replace("postgresql:", "postgresql+psycopg:"))

        def table() -> int:
            with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                exists = connection.exec_driver_sql("SELECT to_regclass('celery_idem')").scalar()
                if not exists:
                    return 0
                connection.exec_driver_sql("VACUUM celery_idem")
                return int(
                    connection.exec_driver_sql("SELECT pg_total_relation_size('celery_idem')").scalar_one()
                )

        nodes = cluster.nodes
        yield [
            Place("Redis", one.url, lambda: memory([one.url]), [one.pid]),
            Place("Valkey", valkey.url, lambda: memory([valkey.url]), [valkey.pid]),
            Place(
                "Redis Cluster of 3",
                cluster.url,
                lambda: memory([n.url for n in nodes]),
                [n.pid for n in nodes],
            ),
            Place("SQLite", f"sqlite:///{file}", lambda: file.stat().st_size if file.exists() else 0, []),
            Place("PostgreSQL", postgres.url, table, [postgres.pid]),
        ]


def compare_and_set(url: str) -> tuple[float, float]:
    """Return replacements per second by the script and by ``SET … IFEQ``, as medians of alternating rounds.

    ``SET … IFEQ`` compares the whole old value and does not read the clock.
    """
    rates: tuple[list[float], list[float]] = ([], [])
    with redis.Redis.from_url(url) as client:
        sha = client.script_load(files("celery_idem.stores").joinpath("replace.lua").read_text())
        head, old = b"\0" * 8 + b"owner-mine--", b"x" * 80
        client.set("script", head + b"x" * 60)
        client.set("native", old)
        for n in range(30):
            began = time.perf_counter()
            for _ in range(300):
                stamp = client.execute_command("EVALSHA", sha, 1, "script", head, head[8:] + b"x" * 60, "")
                head = int(stamp).to_bytes(8, "big") + head[8:]
            rates[0].append(300 / (time.perf_counter() - began))
            began = time.perf_counter()
            for m in range(300):
                new = b"%08d" % (300 * n + m) + b"x" * 72
                client.execute_command("SET", "native", new, "IFEQ", old)
                old = new
            rates[1].append(300 / (time.perf_counter() - began))
    return statistics.median(rates[0]), statistics.median(rates[1])


def main() -> None:
    print(f"{os.cpu_count()} cores. µs are of CPU for one intent, claimed and settled.\n")
    print(
        f"{'store':20} {'server µs':>10} {'worker µs':>10} {'bytes/record':>13} {'intents/s':>10} {'8 threads':>10} "
        f"{'looks/s':>8}"
    )
    with tempfile.TemporaryDirectory() as folder, places(Path(folder)) as stores:
        for place in stores:
            ledger = Ledger(open_store(place.url))
            claim_and_settle(ledger, "bench:first")
            before, theirs, ours = place.used(), place.seconds(), time.process_time()
            for n in range(RECORDS):
                claim_and_settle(ledger, f"bench:{n:032x}")
            ours = (time.process_time() - ours) / RECORDS * 1e6
            theirs = (place.seconds() - theirs) / RECORDS * 1e6
            size = (place.used() - before) / RECORDS
            rates = [per_second(lambda key, at=ledger: claim_and_settle(at, key), n) for n in (1, 8)]
            looks = per_second(lambda _, at=ledger: at.store.create("idem:bench:first", b"x" * 60), 1)
            print(
                f"{place.name:20} {theirs:10,.0f} {ours:10,.0f} {size:13,.0f} {rates[0]:10,.0f} {rates[1]:10,.0f} "
                f"{looks:8,.0f}",
                flush=True,
            )
        valkey = next(place.url for place in stores if place.name == "Valkey")
        script, native = compare_and_set(valkey)
        print(f"\nValkey, replacements/s through redis-py: script {script:,.0f}, SET IFEQ {native:,.0f}")


if __name__ == "__main__":
    main()
