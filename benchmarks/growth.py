"""Measures how the cost grows with the number of records: ``python -m benchmarks.growth --sizes 1000,1000000``.

For each size, on a server filled with real records (``benchmarks.filling``), it measures:

* a claim, in turn with a bare ``SET … NX EX`` (PostgreSQL: a bare ``INSERT`` into as large a
  table), and with the same claim in a store of a thousand records. Other load hardly changes
  the two ratios. The second ratio is the growth;
* the operations that operators run (``benchmarks.operations``), each in a separate process: how
  long one takes, how much it adds to that process' peak memory, and how it slows other clients.

``--json FILE`` keeps the rows. Ten million records on Redis need 4 GB, and about ten minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
import os
import statistics
import tempfile
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import filling, operations
from benchmarks.store import DAY, POLICY
from celery_idem.core.model import Fingerprint, Request
from celery_idem.engine import owners
from celery_idem.engine.ledger import Ledger
from celery_idem.stores import open_store
from tests.support.servers import PostgresServer, RedisServer

SMALL = 1_000
"""Records in the small store for comparison."""

ROUNDS, CLAIMS = 9, 1_000
"""Rounds (the first one warms up) and claims per round: one or two seconds."""


class Place(ABC):
    """One server with many records, and a store with few.

    Attributes:
        url, small: the URLs of the two stores.
        pid: the process id of the first store's server.
        kind: "redis" or "postgresql".
    """

    kind: str
    url: str
    small: str
    pid: int

    @abstractmethod
    def fill(self, first: int, last: int) -> None:
        """Write records number ``first`` to ``last``."""

    @abstractmethod
    def bare(self, key: str) -> object:
        """Run the cheapest command that creates a key and tells whether it existed."""

    @abstractmethod
    def clear(self, keys: list[str]) -> None:
        """Remove claims and bare keys in both stores."""

    @abstractmethod
    def bytes(self) -> int:
        """Return the bytes that the records take."""


class RedisPlace(Place):
    kind = "redis"

    def __init__(self, server: RedisServer, small: RedisServer) -> None:
        import redis

        self.url, self.small, self.pid = server.url, small.url, server.pid
        self._client = redis.Redis.from_url(server.url, socket_timeout=120)
        self._few = redis.Redis.from_url(small.url)
        filling.fill_redis(self._few, 0, SMALL)

    def fill(self, first: int, last: int) -> None:
        filling.fill_redis(self._client, first, last)

    def bare(self, key: str) -> object:
        return self._client.set(f"bare:{key}", b"running", nx=True, ex=DAY)

    def clear(self, keys: list[str]) -> None:
        self._client.delete(*(f"bare:{key}" for key in keys))
        for client in (self._client, self._few):
            client.delete(*(f"idem:{key}" for key in keys))

    def bytes(self) -> int:
        return int(self._client.info("memory")["used_memory"])


class PostgresPlace(Place):
    kind = "postgresql"

    def __init__(self, server: PostgresServer) -> None:
        import psycopg

        self.url, self.small = server.create_database("many"), server.create_database("few")
        self.pid = server.pid
        self._connection = psycopg.connect(self.url, autocommit=True)
        self._few = psycopg.connect(self.small, autocommit=True)
        for url in (self.url, self.small):
            Ledger(open_store(url)).get("bench.noop:first")  # creates the table
        # The bare table has a primary key, and no index for listing or purging.
        self._connection.execute(
            'CREATE TABLE bare (key text COLLATE "C" PRIMARY KEY, stamp bigint, value bytea, expires bigint)'
        )
        filling.fill_postgresql(self._few, 0, SMALL)

    def fill(self, first: int, last: int) -> None:
        filling.fill_postgresql(self._connection, first, last)
        self._connection.execute("TRUNCATE bare")
        self._connection.execute("INSERT INTO bare SELECT * FROM celery_idem")
        self._connection.execute("VACUUM ANALYZE bare")

    def bare(self, key: str) -> object:
        return self._connection.execute(
            "INSERT INTO bare (key, stamp, value) VALUES (%s, 0, %s) ON CONFLICT DO NOTHING",
            (key, b"running"),
        )

    def clear(self, keys: list[str]) -> None:
        self._connection.execute("DELETE FROM bare WHERE key = ANY(%s)", (keys,))
        ours = [f"idem:{key}" for key in keys]
        for connection in (self._connection, self._few):
            connection.execute("DELETE FROM celery_idem WHERE key = ANY(%s)", (ours,))

    def bytes(self) -> int:
        row = self._connection.execute("SELECT pg_total_relation_size('celery_idem')").fetchone()
        return int(row[0]) if row else 0


@contextlib.contextmanager
def place(kind: str) -> Iterator[Place]:
    """Start the servers, and always stop them."""
    if kind == "postgresql":
        with PostgresServer() as server:
            yield PostgresPlace(server)
        return
    with (
        tempfile.TemporaryDirectory() as folder,
        RedisServer(Path(folder) / "many") as many,
        RedisServer(Path(folder) / "few") as few,
    ):
        yield RedisPlace(many, few)


def claims(at: Place) -> dict[str, float]:
    """Return medians over the rounds: a claim's p50 in µs, and its ratios to the two others."""
    many, few = Ledger(open_store(at.url)), Ledger(open_store(at.small))

    def claim(ledger: Ledger) -> Callable[[str], object]:
        return lambda key: ledger.claim(key, Request(owners.mint(), str(uuid.uuid4()), Fingerprint(), POLICY))

    calls = {"claim": claim(many), "few": claim(few), "bare": at.bare}
    orders = list(
        itertools.permutations(calls)
    )  # every order, so that no call always follows the same other call
    rounds: list[dict[str, float]] = []
    for turn in range(ROUNDS):
        times: dict[str, list[float]] = {name: [] for name in calls}
        keys = [f"{filling.TASK}:{uuid.uuid4().hex}" for _ in range(CLAIMS)]
        for n, key in enumerate(keys):
            for name in orders[n % len(orders)]:
                began = time.perf_counter()
                calls[name](key)
                times[name].append((time.perf_counter() - began) * 1e6)
        at.clear(keys)
        if turn:
            rounds.append({name: statistics.median(taken) for name, taken in times.items()})
            p99 = {name: statistics.quantiles(taken, n=100)[98] for name, taken in times.items()}
            rounds[-1].update({f"p99 {name}": value for name, value in p99.items()})

    def ratio(of: str, to: str) -> float:
        return round(statistics.median(one[of] / one[to] for one in rounds), 3)

    return {
        "claim p50, µs": round(statistics.median(one["claim"] for one in rounds), 1),
        "claim over bare": ratio("claim", "bare"),
        f"claim over claim among {SMALL}": ratio("claim", "few"),
        "p99 over bare": ratio("p99 claim", "p99 bare"),
        f"p99 over claim among {SMALL}": ratio("p99 claim", "p99 few"),
        "lowest": round(min(one["claim"] / one["few"] for one in rounds), 3),
        "highest": round(max(one["claim"] / one["few"] for one in rounds), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", choices=("redis", "postgresql"), default="redis")
    parser.add_argument("--sizes", default="1000,100000,1000000", help="records, ascending")
    parser.add_argument("--operations", default=",".join(operations.NAMES), help="which, or none")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the rows there")
    parser.add_argument(
        "--undisturbed",
        action="store_true",
        help="Redis goes before all other programs (SCHED_FIFO, needs root): on a busy machine a command "
        "takes as long as others interrupt it, and that is not what the longest one is to say",
    )
    options = parser.parse_args()
    logging.getLogger("celery_idem").setLevel(logging.ERROR)  # thousands of records are forgotten on purpose
    if options.undisturbed and options.store != "redis":
        parser.error("--undisturbed is for Redis: PostgreSQL answers from other processes than its first")
    wanted = [] if options.operations == "none" else options.operations.split(",")
    rows: list[dict[str, Any]] = []

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        print("  " + ", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")

    sizes = sorted(int(size) for size in options.sizes.split(","))
    with place(options.store) as at:
        filled = 0
        for size in sizes:
            began = time.monotonic()
            at.fill(filled, size)
            filled = size
            print(f"{at.kind}, {size:,} records (filled in {time.monotonic() - began:.0f} s)", flush=True)
            about = {"store": at.kind, "records": size}
            keep({**about, "what": "claim", **claims(at), "bytes per record": round(at.bytes() / size)})
            if options.undisturbed:  # only now, because the claims before compare two servers
                os.sched_setscheduler(at.pid, os.SCHED_FIFO, os.sched_param(1))
            for name in wanted:
                if name == "purge" and size != sizes[-1]:
                    continue  # it would remove records that the next size needs
                keep({**about, "what": name, **operations.run(name, at.kind, at.url, at.pid)})
            if options.undisturbed:
                os.sched_setscheduler(at.pid, os.SCHED_OTHER, os.sched_param(0))


if __name__ == "__main__":
    main()
