"""The compare-and-set loop. Every write of a record goes through it.

``protocol`` decides on the stored record, and the record that it returns replaces that one. If another writer was
faster, ``protocol`` decides again, on the new record. The caller may guess the stored record, which saves the read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celery_idem.core import protocol
from celery_idem.core.errors import StoreError
from celery_idem.core.model import Policy, Publish, Record, Refused, State, Stored, Tell
from celery_idem.core.record import pack, unpack
from celery_idem.engine import clock
from celery_idem.stores.base import KEEP, Reply, Store

ROUNDS = 50
"""How many times a write starts over because another writer was faster. Each time that one made progress, so fifty
times in a row mean that something writes in a loop."""

DELETED = Record(State.RELEASED)
"""Returned instead of a record to write: delete the stored one."""

Decide = Callable[[Record | None, int, int], tuple[Any, Record | None]]
"""From the record (None: absent), its stamp and the store's time, to a decision and the record to write, if any."""

Replace = Callable[[str, Stored, bytes, "int | None", "int | None"], Reply]
"""As ``Store.replace``."""


def change(
    store: Store,
    name: str,
    key: str,
    decide: Decide,
    policy: Policy | None,
    reply: Reply | None = None,
    record: Record | None = None,
    before: float = 0.0,
    lenient: bool = False,
    replace: Replace | None = None,
    check: Callable[[Record], object] | None = None,
) -> tuple[Any, Reply, float]:
    """Decide on one record, and write what was decided.

    Args:
        name: name of the record in the store.
        key: key of the intent, for messages.
        policy: says how long the record is kept; None: it is evidence, which does not expire.
        reply: the store's answer to an earlier call, or a guess of the stored record, with ``now`` 0; None: read first.
        record: the record in ``reply``, unpacked; None to unpack it here.
        before: the worker's time before the call that ``reply`` answers.
        replace: called instead of the store's ``replace``.
        check: raises for a record on which this process may not decide.
        lenient: for a value that is no record, call ``decide`` with None and a stamp instead of raising.

    Returns:
        The decision, the store's last answer, and the worker's time before the call that it answers.

    Raises:
        StoreError: the store did not answer, the value is no record, or other writers were always faster.
    """
    if reply is None:
        before, reply, record = clock.elapsed(), store.read(name), None
    for _ in range(ROUNDS):
        stored = reply.stored
        if stored is None:
            record = None
        elif record is None:
            try:
                record = unpack(stored.value, stored.stamp, key)
            except StoreError:
                if not lenient:
                    raise
            else:
                if check is not None:
                    check(record)
        decision, new = decide(record, stored.stamp if stored is not None else 0, reply.now)
        if new is None:
            if stored is None or reply.now:
                return decision, reply, before
            # This was decided on a guess, and no write will show whether the guess was right.
            before, record = clock.elapsed(), None
            reply = store.read(name)
            continue
        value = pack(new)
        ttl = 0 if new is DELETED else protocol.ttl(new, policy) if policy is not None else None
        if ttl and stored is not None and isinstance(decision, (Refused, Publish, Tell)):
            ttl = KEEP  # this write only notes something
        due = protocol.due(new, policy)
        before = clock.elapsed()
        if stored is None:
            reply = store.create(name, value, ttl, due)
        else:
            # A refused write only notes something, so the caller's announcement must not be written with it.
            write = store.replace if replace is None or isinstance(decision, Refused) else replace
            reply = write(name, stored, value, ttl, due)
        if reply.done or (reply.stored is not None and reply.stored.value == value):
            return decision, reply, before
        record = None
    raise StoreError(f"{key} changes all the time; nothing was written. Try again.", key)
