"""Measures the bytes of a finished record in Redis: ``python -m benchmarks.memory --sizes 100000,1000000``.

It compares records with a result of 115 bytes, and with none (``null``), with a bare ``SET key result EX``
of the same result. Keys, and all memory that the server adds, are included. The records are as long as one
that a claim and a settle wrote.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import uuid
from pathlib import Path
from typing import Any

import redis

from benchmarks import filling
from benchmarks.store import POLICY, RESULT
from celery_idem.core.model import Fingerprint, Outcome, Request
from celery_idem.core.record import pack
from celery_idem.engine import owners
from celery_idem.engine.ledger import Ledger
from celery_idem.stores.memory import MemoryStore
from tests.support.servers import RedisServer

NOTHING = b"jnull"


def check(payload: bytes) -> None:
    """Check that the filled records are as long as real ones."""
    store = MemoryStore()
    ledger = Ledger(store)
    _, claim = ledger.claim("k", Request(owners.mint(), str(uuid.uuid4()), Fingerprint(), POLICY))
    assert claim is not None
    claim.settle(Outcome(True, payload), 0.0)
    real = store.read("idem:k").stored
    assert real is not None
    assert len(real.value) == len(pack(filling.same(payload)(0, 1)))


def per_record(client: redis.Redis, count: int, payload: bytes, bare: bool) -> float:
    client.flushall()
    before = client.info("memory")["used_memory"]
    filling.fill_redis(client, 0, count, filling.same(payload), payload[1:] if bare else b"")
    used: float = (client.info("memory")["used_memory"] - before) / count
    return used


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default="100000,1000000")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the rows there")
    options = parser.parse_args()
    for payload in (RESULT, NOTHING):
        check(payload)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, RedisServer(Path(folder)) as server:
        client = redis.Redis.from_url(server.url, socket_timeout=120)  # flushing a million takes seconds
        for size in map(int, options.sizes.split(",")):
            row: dict[str, Any] = {"records": size}
            for name, payload in (("115-byte result", RESULT), ("no-op", NOTHING)):
                ours, theirs = (per_record(client, size, payload, bare) for bare in (False, True))
                row |= {f"{name}, bytes": round(ours), f"{name}, over a bare SET EX": round(ours / theirs, 3)}
            rows.append(row)
            print(", ".join(f"{what} {value}" for what, value in row.items()), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
