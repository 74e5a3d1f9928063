"""Keeping leases alive: one thread for each store renews all claims of this process that are running there.

A claim's lease says to everybody else "hands off until then". The body runs on its own
thread for as long as it likes, while this thread writes the lease anew, early enough to
survive one failed renewal: it looks every sixth of the shortest lease and
renews what is older than that, so no lease gets older than a third before the first
try. When the process dies, nobody renews, and the lease lapses: that is the point of
renewing here and not in a process that outlives the body.

A store that hangs delays the renewals of its own records only. A thread starts with the
first claim in its store, and ends after a while without any. It cannot be inherited by a
forked child, so the child starts its own.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import weakref
from typing import NamedTuple

from celery_idem.core.errors import StoreError
from celery_idem.core.model import MICROSECONDS
from celery_idem.engine import clock, events
from celery_idem.engine.claim import Claim
from celery_idem.engine.ledger import Ledger
from celery_idem.stores.base import Store

LOOKS_PER_LEASE = 6
"""Looks per lease. Renewing at a third at the latest leaves two more tries before it lapses."""

LONGEST_SLEEP = 5.0
"""Seconds between looks at most: a sixth of the default lease."""

SHORTEST_SLEEP = 0.01
"""Seconds between looks at least, so that a tiny lease does not become a busy loop."""

IDLE_LOOKS = 12
"""Looks with nothing to renew after which a thread ends: a minute. Starting one takes 0.1 ms."""


class _Watched(NamedTuple):
    """A claim that is running, and how often it is looked at, in seconds."""

    claim: Claim
    ledger: Ledger
    every: float


class _Keeper:
    """The renewing thread of one store, and the claims it looks after.

    No call of a body's thread waits for a lock here, unless the thread has to be started. What
    keeps a claim from being overlooked is the order: a claim is put among the watched first, and
    then it is looked whether the thread sleeps too long for it, or has ended. The thread does
    the reverse: it says how long it will sleep, or that it has ended, after it looked at what is watched,
    and where it said so too early it looks again.
    """

    def __init__(self, collected: weakref.ref[Store]) -> None:
        self.collected = collected  # kept, so that its callback is
        self.watched: dict[int, _Watched] = {}
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        self._sleep = math.inf
        self._wake = threading.Event()

    def watch(self, one: _Watched) -> None:
        self.watched[id(one.claim)] = one
        if self._thread is None:
            self._start()
        if one.every < self._sleep:
            self._wake.set()

    def _start(self) -> None:
        with self._starting:
            if self._thread is None:
                thread = threading.Thread(target=self._loop, name="celery_idem leases", daemon=True)
                thread.start()
                self._thread = thread

    def _loop(self) -> None:
        idle = 0
        while idle < IDLE_LOOKS or not self._ended():
            began = clock.elapsed()
            self._wake.clear()
            self._sleep = math.inf  # whoever comes after the next line wakes this thread
            watched = list(self.watched.values())
            self._sleep = min((one.every for one in watched), default=LONGEST_SLEEP)
            idle = 0 if watched else idle + 1
            _renew([one for one in watched if began - one.claim._written_at >= one.every])
            self._wake.wait(max(0.0, began + self._sleep - clock.elapsed()))

    def _ended(self) -> bool:
        """End, unless a claim has come meanwhile."""
        with self._starting:
            thread, self._thread = self._thread, None
            if self.watched:
                self._thread = thread
            return self._thread is None


def _renew(due: list[_Watched]) -> None:
    """Ledger by ledger, in one round trip each where the store can."""
    by_ledger: dict[int, list[_Watched]] = {}
    for one in due:
        if not one.claim._taken_over:
            by_ledger.setdefault(id(one.ledger), []).append(one)
    for some in by_ledger.values():
        claims = [one.claim for one in some]
        try:
            some[0].ledger.renew(claims)
        except StoreError as error:
            # Tried again at the next look. `Claim.lost` tells the body when it is too late.
            events.emit("store_error", claims[0].key, error=str(error), while_="renewing", leases=len(claims))
        except Exception as error:
            events.diagnose(
                logging.ERROR, "renewing %d leases failed; trying again", len(claims), error=error
            )


class Renewer:
    """The renewing threads of this process."""

    def __init__(self) -> None:
        self._reset()
        os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        self._keepers: dict[int, _Keeper] = {}

    def watch(self, claim: Claim, ledger: Ledger, lease: int) -> None:
        """Renew this claim until ``unwatch``.

        Args:
            lease: microseconds.
        """
        store = ledger.store
        keeper = self._keepers.get(id(store))
        if keeper is None:
            keeper = self._keep(store)
        keeper.watch(_Watched(claim, ledger, max(SHORTEST_SLEEP, lease / MICROSECONDS / LOOKS_PER_LEASE)))

    def _keep(self, store: Store) -> _Keeper:
        number, keepers = id(store), self._keepers
        return keepers.setdefault(number, _Keeper(weakref.ref(store, lambda _: keepers.pop(number, None))))

    def unwatch(self, claim: Claim, ledger: Ledger) -> None:
        """The claim has ended."""
        keeper = self._keepers.get(id(ledger.store))
        if keeper is not None:
            keeper.watched.pop(id(claim), None)


RENEWER = Renewer()
"""One for the whole process, whatever number of applications and stores it works with."""
