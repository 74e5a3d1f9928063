"""Every write but a claim: decide, compare-and-set, start over when somebody was faster.

The loop is the same for a renewal, a step, an outcome and a person's decision; what they
mean for a record is ``protocol``'s.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from celery_idem.core import protocol
from celery_idem.core.errors import StoreError
from celery_idem.core.model import Done, Policy, Record, Refused, Stored
from celery_idem.core.record import pack, unpack
from celery_idem.engine import clock, events
from celery_idem.engine.claim import Claim, renewed
from celery_idem.stores.base import Reply, Store

ROUNDS = 50
"""How often an operation starts over because somebody else wrote in between. Each round
somebody made progress; fifty in a row means something writes in a loop."""

PAUSES = (0.05, 0.1, 0.2, 0.4, 0.8, 1.0)
"""Seconds between tries to write an outcome; the last one repeats."""


class Transitions:
    """The records of one namespace in one store, and the one way to change them.

    Args:
        store: where they are.
        prefix: what their keys begin with there.
    """

    def __init__(self, store: Store, prefix: str) -> None:
        self.store = store
        self._prefix = prefix

    def _read(self, key: str, stored: Stored) -> Record:
        return unpack(stored.value, stored.stamp, key)

    def _compare_and_set(
        self,
        key: str,
        reply: Reply,
        decide: Callable[[Record | None, int, int], tuple[Any, Record | None]],
        policy: Policy | None,
        record: Record | None = None,
    ) -> tuple[Any, Reply]:
        """The loop that every write but a claim goes through.

        Args:
            reply: what stands there, as far as is known.
            record: the same, read already; None to read it here.

        Returns:
            The decision, and what stands there now.
        """
        for _ in range(ROUNDS):
            stored = reply.stored
            if stored is None:
                record = None
            elif record is None:
                record = self._read(key, stored)
            decision, new = decide(record, stored.stamp if stored else 0, reply.now)
            if new is None and stored is not None and not reply.now:
                # Told from memory, and no write will say whether that is still so: look.
                reply, record = self.store.read(self._prefix + key), None
                continue
            if new is None:
                return decision, reply
            value = pack(new)
            keep = protocol.ttl(new, policy) if policy is not None else None
            if stored is None:
                reply = self.store.create(self._prefix + key, value, keep)
            else:
                reply = self.store.replace(self._prefix + key, stored, value, keep)
            if reply.done or (reply.stored is not None and reply.stored.value == value):
                return decision, reply
            record = None
        raise StoreError(f"{key} changes all the time; nothing was written. Try again.", key)

    def _last_seen(self, claim: Claim) -> tuple[Reply, Record | None]:
        """What this claim wrote last: the best guess at what stands there, and it saves the read."""
        stored, record = claim._seen
        if stored is None:
            return self.store.read(self._prefix + claim.key), None
        return Reply(False, stored, 0), record

    def transition(
        self, claim: Claim, decide: Callable[[Record, int, int], tuple[Any, Record | None]]
    ) -> Any:
        """A transition of the record that this claim holds, starting from its own last write."""

        def checked(record: Record | None, stamp: int, now: int) -> tuple[Any, Record | None]:
            return decide(known(claim, record, stamp), stamp, now)

        before = clock.elapsed()
        reply, seen = self._last_seen(claim)
        decision, reply = self._compare_and_set(claim.key, reply, checked, claim._request.policy, seen)
        if isinstance(decision, Done):
            renewed(claim, decision.record, reply, before)
        return decision

    def patient_transition(
        self,
        claim: Claim,
        decide: Callable[[Record | None, int, int], tuple[Done | Refused, Record | None]],
        patience: float,
        fresh: bool = False,
        ends: bool = True,
    ) -> Done | Refused:
        """The same, trying again while the store does not answer.

        Args:
            fresh: begin by reading: what this claim wrote last is not what stands there.
            ends: this write ends the hold.
        """
        if ends:
            claim._end()
        before = began = clock.elapsed()
        tries = 0
        while True:
            try:
                if fresh:
                    reply, seen = self.store.read(self._prefix + claim.key), None
                else:
                    reply, seen = self._last_seen(claim)
                decision, reply = self._compare_and_set(claim.key, reply, decide, claim._request.policy, seen)
            except StoreError as error:
                pause = PAUSES[min(tries, len(PAUSES) - 1)]
                tries += 1
                if clock.elapsed() + pause > began + patience:
                    raise
                if tries == 1:
                    events.emit("store_error", claim.key, error=str(error), while_="settling")
                threading.Event().wait(pause)
                before = clock.elapsed()
                continue
            if isinstance(decision, Done):
                renewed(claim, decision.record, reply, before)
            assert isinstance(decision, (Done, Refused))
            return decision


def present(
    decide: Callable[[Record], tuple[Done | Refused, Record | None]],
) -> Callable[[Record | None, int, int], tuple[Done | Refused, Record | None]]:
    """A transition that means nothing where the record is gone."""

    def checked(record: Record | None, stamp: int, now: int) -> tuple[Done | Refused, Record | None]:
        return (Refused(None), None) if record is None else decide(record)

    return checked


def kept(
    claim: Claim, decide: Callable[[Record], tuple[Done | Refused, Record | None]]
) -> Callable[[Record | None, int, int], tuple[Done | Refused, Record | None]]:
    """A transition that has something to say also where the store has lost the record."""
    return lambda record, stamp, now: decide(known(claim, record, stamp))


def known(claim: Claim, record: Record | None, stamp: int) -> Record:
    """What stands in the store; what this claim wrote there last, where the store has lost that."""
    stored, held = claim._seen
    return protocol.restored(record, held, stored is not None and stamp < stored.stamp)
