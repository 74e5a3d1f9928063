"""The store layer alone: ``python -m benchmarks.store``.

Claim and settle through the ledger, against two bare redis-py SETs, in turn within one
process, at one thread and at eight; a duplicate's look against one GET; and the bytes
that a record takes.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import redis

from celery_idem import owners
from celery_idem.intent import Fingerprint, Outcome, Policy, Request
from celery_idem.ledger import Ledger
from celery_idem.stores import open_store
from tests.support.servers import RedisServer

DAY = 86_400
POLICY = Policy(lease=30_000_000, result_ttl=DAY * 1_000_000, failure_ttl=DAY * 1_000_000)
RESULT = b'j"' + b"r" * 112 + b'"'  # 115 bytes of JSON behind one of serializer


def two_sets(client: redis.Redis, key: str) -> None:
    client.set(f"bare:{key}", b"running", nx=True, ex=DAY)
    client.set(f"bare:{key}", RESULT, ex=DAY)


def claim_and_settle(ledger: Ledger, key: str, payload: bytes = RESULT) -> None:
    request = Request(owners.mint(), str(uuid.uuid4()), Fingerprint(), POLICY)
    _, claim = ledger.claim(key, request)
    assert claim is not None
    ledger.settle(claim, Outcome(True, payload), 1.0)


def timed(call: Callable[[str], None], threads: int, count: int) -> list[float]:
    """Microseconds of each call."""
    times: list[float] = []

    def work(number: int) -> None:
        mine = []
        for n in range(count // threads):
            key = f"bench.task:{number:04x}{n:028x}"
            began = time.perf_counter()
            call(key)
            mine.append((time.perf_counter() - began) * 1e6)
        times.extend(mine)

    workers = [threading.Thread(target=work, args=(n,)) for n in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return times


def compare(
    name: str, call: Callable[[str], None], bare: Callable[[str], None], clear: Callable[[], object]
) -> None:
    for threads in (1, 8):
        ratios: dict[str, list[float]] = {"p50": [], "p99": []}
        for turn in range(8):  # the first warms up
            clear()
            ours, theirs = timed(call, threads, 2000), timed(bare, threads, 2000)
            if turn:
                ratios["p50"].append(statistics.median(ours) / statistics.median(theirs))
                ratios["p99"].append(
                    statistics.quantiles(ours, n=100)[98] / statistics.quantiles(theirs, n=100)[98]
                )
        shown = "   ".join(f"{what} {statistics.median(values):.2f}" for what, values in ratios.items())
        print(f"{name}, {threads} thread{'s' * (threads > 1)}: {shown}   (ratio to bare, median of 7 rounds)")


def bytes_per_record(client: redis.Redis, fill: Callable[[str], None], count: int) -> float:
    client.flushdb()
    before = client.info("memory")["used_memory"]
    for n in range(count):
        fill(f"bench.task:{n:032x}")
    return (client.info("memory")["used_memory"] - before) / count


def main() -> None:
    with RedisServer(Path(tempfile.mkdtemp())) as server:
        client = redis.Redis.from_url(server.url)
        ledger = Ledger(open_store(server.url))
        compare(
            "claim and settle",
            lambda k: claim_and_settle(ledger, k),
            lambda k: two_sets(client, k),
            client.flushdb,
        )
        client.flushdb()
        for number in range(8):
            for n in range(2000 // (8 if number else 1)):
                claim_and_settle(ledger, f"bench.task:{number:04x}{n:028x}")
        client.set("bare", RESULT)
        compare(
            "duplicate's look",
            lambda k: void(ledger.get(k)),
            lambda _: void(client.get("bare")),
            lambda: None,
        )
        count = int(os.environ.get("BENCH_RECORDS", "100000"))
        bare = bytes_per_record(client, lambda k: void(client.set(f"idem:{k}", RESULT[1:], ex=DAY)), count)
        ours = bytes_per_record(client, lambda k: claim_and_settle(ledger, k), count)
        none = bytes_per_record(client, lambda k: claim_and_settle(ledger, k, b"jnull"), count)
        print(
            f"bytes per record at {count}: {ours:.0f} with a 115-byte result, {ours / bare:.2f} × a bare SET … EX"
        )
        print(f"bytes per record of a no-op: {none:.0f}")


def void(_: object) -> None:
    """Calls are compared, not what they return."""


if __name__ == "__main__":
    main()
