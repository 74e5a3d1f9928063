"""Fills stores with many real records quickly.

Of each hundred records, one is in doubt, one failed, one running (with a lapsed lease), one released. Of the
others, every second one has a result of 115 bytes, and the rest ``null``. Their stamps are spread over the past
day, and they are kept for another day, so a server expires none meanwhile.
"""

from __future__ import annotations

import sys
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.store import DAY, POLICY, RESULT
from celery_idem.core import protocol
from celery_idem.core.model import Outcome, Record, State
from celery_idem.core.record import pack
from celery_idem.engine import owners

CHUNK = 1_000
"""Records per batch: about 300 KB."""

TASK = "bench.noop"

OPEN = "idem~open"
"""The key of the index of open intents."""


def record(n: int, now: int) -> Record:
    """Return record number ``n``. ``now``: microseconds."""
    common: dict[str, Any] = {"owner": owners.mint(), "task_id": str(uuid.UUID(int=n)), "fence": now - n}
    kind = n % 100
    if kind == 0:
        return Record(State.IN_DOUBT, **common, crashes=1, reason=protocol.CRASHED)
    if kind == 1:
        return Record(State.FAILED, **common, outcome=Outcome(False, b'j{"type":"ValueError"}'))
    if kind == 2:
        return Record(State.RUNNING, **common, lease=POLICY.lease)
    if kind == 3:
        return Record(State.RELEASED, **common)
    return Record(State.SUCCEEDED, **common, outcome=Outcome(True, RESULT if kind % 2 else b"jnull"))


def same(payload: bytes) -> Callable[[int, int], Record]:
    """Return a maker of finished records with this result."""
    return lambda n, now: record(4, now)._replace(
        task_id=str(uuid.UUID(int=n)), fence=now - n, outcome=Outcome(True, payload)
    )


def key(n: int) -> str:
    """Return the key of record ``n`` in the store."""
    return f"idem:{TASK}:{n:032x}"


def rows(
    first: int, last: int, make: Callable[[int, int], Record] = record
) -> Iterator[tuple[str, int, bytes, int | None, int | None]]:
    """Return key, stamp, value, time to live and due time (microseconds) of the records ``first`` to ``last``."""
    now = time.time_ns() // 1000
    for n in range(first, last):
        made = make(n, now)
        stamp = now - n % DAY * 1_000_000
        yield key(n), stamp, pack(made), protocol.ttl(made, POLICY), protocol.due(made)


def fill_redis(
    client: Any, first: int, last: int, make: Callable[[int, int], Record] = record, bare: bytes = b""
) -> None:
    """Write the records through one connection without reading replies.

    Args:
        bare: write this value instead, as ``SET key value EX`` would.
    """
    connection = client.connection_pool.get_connection()
    client.zadd(OPEN, {"": "-inf"})
    before = client.dbsize()
    ttl: int | None
    try:
        connection.send_packed_command([b"CLIENT REPLY OFF\r\n"])
        packed: list[bytes] = []
        for n, (name, stamp, value, ttl, due) in enumerate(rows(first, last, make), first + 1):
            value, ttl = (bare, DAY * 1_000_000) if bare else (stamp.to_bytes(8, "big") + value, ttl)
            words = [b"SET", name.encode(), value]
            if ttl is not None:
                words += [b"PX", b"%d" % (ttl // 1000)]
            packed.append(_packed(words))
            if due is not None:
                packed.append(_packed([b"ZADD", OPEN.encode(), b"%d" % (stamp + due), name.encode()]))
            if n % CHUNK == 0 or n == last:
                connection.send_packed_command([b"".join(packed)])
                packed = []
                shown(n, last)
        connection.send_packed_command([b"CLIENT REPLY ON\r\n"])
        connection.read_response()
    finally:
        connection.disconnect()
        client.connection_pool.release(connection)
    written = client.dbsize() - before
    assert written == last - first, f"{written} of {last - first} records were written"


def _packed(words: list[bytes]) -> bytes:
    return b"*%d\r\n" % len(words) + b"".join([b"$%d\r\n%s\r\n" % (len(word), word) for word in words])


def fill_postgresql(
    connection: Any, first: int, last: int, make: Callable[[int, int], Record] = record
) -> None:
    """Write the records with COPY into ``celery_idem``. ``connection``: psycopg's."""
    with connection.cursor().copy("COPY celery_idem (key, stamp, value, expires, due) FROM STDIN") as copy:
        for n, (name, stamp, value, ttl, due) in enumerate(rows(first, last, make), first + 1):
            expires = None if ttl is None else time.time_ns() // 1000 + ttl
            copy.write_row((name, stamp, value, expires, None if due is None else stamp + due))
            shown(n, last)
    connection.execute("VACUUM ANALYZE celery_idem")  # autovacuum would do this later


def shown(done: int, of: int) -> None:
    """Print progress on standard error, on a terminal only."""
    if sys.stderr.isatty() and (done % 100_000 == 0 or done == of):
        end = "\n" if done == of else ""
        print(f"\r  {done:,} of {of:,} records", end=end, file=sys.stderr, flush=True)
