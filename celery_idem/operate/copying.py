"""Copies records from one store to another while both are in use.

A copy may be stopped at any time and run again. It updates records that have changed in the source since.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from celery_idem.core import keys, protocol
from celery_idem.core.errors import ConfigurationError, StoreError
from celery_idem.core.model import MICROSECONDS, Policy
from celery_idem.core.record import pack, unpack
from celery_idem.engine.ledger import Ledger
from celery_idem.stores.base import Reply

EVERY = 200
"""Records between two progress reports: a few reports a second over a network."""


class Copied(NamedTuple):
    """Counts of records.

    Attributes:
        seen: read from the source.
        written: written to the target.
        there: already in the target, in the same or a newer state.
        expired: not copied because their time to live was over.
        unreadable: not records of celery_idem.
    """

    seen: int = 0
    written: int = 0
    there: int = 0
    expired: int = 0
    unreadable: int = 0


def copy(
    source: Ledger, target: Ledger, progress: Callable[[Copied], object] = lambda counts: None
) -> Copied:
    """Write all live records of ``source`` to ``target``. Never overwrites a newer record.

    Leases and delays of retries start again in the target, because they count from the last write. So a running intent
    is not taken over too early. Outcomes are kept for the rest of the task's ``result_ttl``.

    Args:
        progress: called regularly, and at the end.

    Raises:
        ConfigurationError: the namespaces differ.
        StoreError: a store did not answer. Run it again to continue.
    """
    if source.namespace != target.namespace:
        raise ConfigurationError(
            f"copy: the namespaces {source.namespace!r} and {target.namespace!r} differ. The namespace is part "
            "of every key, so the records would never be found under the other one."
        )
    prefix = f"{source.namespace}:"
    now = source.store.read(prefix).now
    counts = Copied()
    for stored_key, stored in source.store.scan(prefix):
        key = stored_key.removeprefix(prefix)
        try:
            record = unpack(stored.value, stored.stamp, key)
        except StoreError:
            counts = counts._replace(seen=counts.seen + 1, unreadable=counts.unreadable + 1)
            continue
        keep = int(source.result_ttl(keys.task_of(key) or key) * MICROSECONDS)
        ttl = protocol.ttl(record, Policy(lease=0, result_ttl=keep, failure_ttl=keep))
        if ttl is not None:
            ttl -= now - stored.stamp
        if ttl is not None and ttl <= 0:
            outcome = "expired"
        else:
            due = protocol.due_again(record)
            outcome = "written" if _write(target, stored_key, pack(record), ttl, due) else "there"
        counts = counts._replace(seen=counts.seen + 1, **{outcome: getattr(counts, outcome) + 1})
        if counts.seen % EVERY == 0:
            progress(counts)
    progress(counts)
    return counts


def _write(target: Ledger, stored_key: str, value: bytes, ttl: int | None, due: int | None) -> bool:
    reply: Reply = target.store.create(stored_key, value, ttl, due)
    while not reply.done and reply.stored is not None:
        there = unpack(reply.stored.value, reply.stored.stamp, stored_key)
        if not protocol.supersedes(unpack(value, 0, stored_key), there):
            return False
        reply = target.store.replace(stored_key, reply.stored, value, ttl, due)
    return reply.done
