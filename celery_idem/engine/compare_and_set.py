"""The compare-and-set loop. Every write of a record goes through it.

``protocol`` decides on the record that stands there, and the record it returns replaces that one. Where
another writer was faster, it decides again on what that writer left. The caller's first guess at what stands
there saves the read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celery_idem.core import protocol
from celery_idem.core.errors import StoreError
from celery_idem.core.model import Policy, Record, Refused, State, Stored
from celery_idem.core.record import pack, unpack
from celery_idem.engine import clock
from celery_idem.stores.base import KEEP, Reply, Store

ROUNDS = 50
"""How often a write starts over because of another writer. Each round one of them made progress;
fifty in a row mean that something writes in a loop."""

DELETED = Record(State.RELEASED)
"""In place of the record to write: delete what stands there."""

Decide = Callable[[Record | None, int, int], tuple[Any, Record | None]]
"""From the record (None: absent), its stamp and the store's time to a decision and the record to write, if any."""


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
        name: of the record in the store.
        key: of the intent, for messages.
        policy: says how long the record is kept; None: evidence, which does not expire.
        reply: what stands there, as far as is known: the store's answer, or a guess, with ``now`` 0.
            None: read it first.
        record: the same, unpacked; None to unpack it here.
        before: the worker's time before the call that ``reply`` answers.
        replace: replaces the record, in place of the store's own ``replace``.
        check: refuses a record that this process may not decide on, by raising.
        lenient: give ``decide`` None and a stamp for a value that is no record, and do not raise.

    Returns:
        The decision, the store's last answer, and the worker's time before the call that it answers.

    Raises:
        StoreError: the store did not answer, holds no record under that name, or other writers were always faster.
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
            # Decided on a guess, and no write will show whether it was right.
            before, record = clock.elapsed(), None
            reply = store.read(name)
            continue
        value = pack(new)
        ttl = 0 if new is DELETED else protocol.ttl(new, policy) if policy is not None else None
        if ttl and stored is not None and isinstance(decision, Refused):
            ttl = KEEP  # it only notes something
        due = protocol.due(new, policy)
        before = clock.elapsed()
        if stored is None:
            reply = store.create(name, value, ttl, due)
        else:
            # What is refused only notes something: an answer that would be written with it is not the caller's.
            write = store.replace if replace is None or isinstance(decision, Refused) else replace
            reply = write(name, stored, value, ttl, due)
        if reply.done or (reply.stored is not None and reply.stored.value == value):
            return decision, reply, before
        record = None
    raise StoreError(f"{key} changes all the time; nothing was written. Try again.", key)
