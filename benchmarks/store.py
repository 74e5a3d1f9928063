"""Measures the ledger over a store: ``python -m benchmarks.store``.

In one process, with one thread and with eight, it compares in turn: claim and settle with two bare SETs of redis-py,
and the look-up of a finished intent with one GET.
"""

from __future__ import annotations

import tempfile
import uuid
from pathlib import Path

import redis

from benchmarks.report import Row, compared, show
from benchmarks.timing import rounds_of
from celery_idem.core.model import Fingerprint, Outcome, Policy, Request
from celery_idem.engine import owners
from celery_idem.engine.ledger import Ledger
from celery_idem.stores import open_store
from tests.support.servers import RedisServer

DAY = 86_400
POLICY = Policy(lease=30_000_000, result_ttl=DAY * 1_000_000, failure_ttl=DAY * 1_000_000)
RESULT = b'j"' + b"r" * 112 + b'"'  # one byte for the serializer, and 114 bytes of JSON

ROUNDS, COUNT = 9, 2000
"""Rounds and calls per round. A round's 99th percentile is its twentieth slowest call."""

PAIR, LOOK = 1.25, 1.3
"""Targets: claim and settle over two SETs, and a look-up over one GET."""


def two_sets(client: redis.Redis, key: str) -> None:
    client.set(f"bare:{key}", b"running", nx=True, ex=DAY)
    client.set(f"bare:{key}", RESULT, ex=DAY)


def claim_and_settle(ledger: Ledger, key: str, payload: bytes = RESULT) -> None:
    request = Request(owners.mint(), str(uuid.uuid4()), Fingerprint(), POLICY)
    _, claim = ledger.claim(key, request)
    assert claim is not None
    claim.settle(Outcome(True, payload), 1.0)


def rows(rounds: int = ROUNDS, count: int = COUNT) -> list[Row]:
    made: list[Row] = []
    with tempfile.TemporaryDirectory() as folder, RedisServer(Path(folder)) as server:
        client = redis.Redis.from_url(server.url)
        ledger = Ledger(open_store(server.url))
        pairs = {
            "two SETs": lambda key: two_sets(client, key),
            "celery_idem: claim, settle": lambda key: claim_and_settle(ledger, key),
        }
        looks = {
            "one GET": lambda _: client.get("bare"),
            "celery_idem: look": lambda _: ledger.get("bench.task:done"),
        }
        for name, calls, target in (
            ("claim and settle", pairs, PAIR),
            ("look at a finished one", looks, LOOK),
        ):
            for threads in (1, 8):
                client.flushdb()
                client.set("bare", RESULT, ex=DAY)
                claim_and_settle(ledger, "bench.task:done")
                base, ours = calls
                shown = f"{name}, {threads} thread{'s' * (threads > 1)}"
                for what, measured in zip(
                    ("p50", "p99"), rounds_of(calls, threads, rounds, count), strict=True
                ):
                    made += compared(f"Store, {shown}: {what}", measured, base, "µs", {ours: target})
        client.close()
        ledger.store.close()
    return made


if __name__ == "__main__":
    show(rows())
