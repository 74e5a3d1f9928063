"""Moving house: the records of one store written to another, while both are in use.

May be stopped at any time and run again: what is there already is left alone, and a
record that has moved on in the source since it was copied is brought up to date.
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
"""Records between two reports of progress: a few a second over a network."""


class Copied(NamedTuple):
    """Counts of records.

    Attributes:
        seen: that the source had.
        written: to the target, now.
        there: that the target had already, or had a newer state of.
        expired: whose time to live was over.
        unreadable: that are no records of ours.
    """

    seen: int = 0
    written: int = 0
    there: int = 0
    expired: int = 0
    unreadable: int = 0


def copy(
    source: Ledger, target: Ledger, progress: Callable[[Copied], object] = lambda counts: None
) -> Copied:
    """Write all live records of ``source`` to ``target``. Never overwrites a newer one.

    A lease or a retry's delay starts anew in the target, because it counts from the last
    write: nobody takes a running intent over too early. Outcomes are kept for what is
    left of the task's ``result_ttl``.

    Args:
        progress: called now and then, and at the end.

    Raises:
        ConfigurationError: the namespaces differ; they are part of every key.
        StoreError: a store did not answer. Run it again: it goes on where it was.
    """
    if source.namespace != target.namespace:
        raise ConfigurationError(
            f"copy: the namespaces {source.namespace!r} and {target.namespace!r} differ. A key is a digest of the "
            "namespace too, so the records would never be found under the other one."
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
            outcome = "written" if _write(target, stored_key, pack(record), ttl) else "there"
        counts = counts._replace(seen=counts.seen + 1, **{outcome: getattr(counts, outcome) + 1})
        if counts.seen % EVERY == 0:
            progress(counts)
    progress(counts)
    return counts


def _write(target: Ledger, stored_key: str, value: bytes, ttl: int | None) -> bool:
    reply: Reply = target.store.create(stored_key, value, ttl)
    while not reply.done and reply.stored is not None:
        there = unpack(reply.stored.value, reply.stored.stamp, stored_key)
        if not protocol.supersedes(unpack(value, 0, stored_key), there):
            return False
        reply = target.store.replace(stored_key, reply.stored, value, ttl)
    return reply.done
