"""Keeping leases alive: one thread per process renews all claims that are running.

A claim's lease says to everybody else "hands off until then". The body runs on its own
thread for as long as it likes, while this thread writes the lease anew, early enough
that one failed try can be made good: it looks every sixth of the shortest lease and
renews what is older than that, so no lease gets older than a third before the first
try. When the process dies, nobody renews, and the lease lapses: that is the point of
renewing here and not in a process that outlives the body.

The thread starts with the first claim. It cannot be inherited by a forked child, so
the child starts its own.
"""

from __future__ import annotations

import os
import threading
import time
from typing import NamedTuple

from celery_idem import events
from celery_idem.claims import Claim
from celery_idem.errors import StoreError
from celery_idem.intent import MICROSECONDS
from celery_idem.ledger import Ledger

LOOKS_PER_LEASE = 6
"""Looks per lease. Renewing at a third at the latest leaves two more tries before it lapses."""

LONGEST_SLEEP = 5.0
"""Seconds between looks at most: a sixth of the default lease."""

SHORTEST_SLEEP = 0.01
"""Seconds between looks at least, so that a tiny lease does not become a busy loop."""


class _Watched(NamedTuple):
    """A claim that is running, and how often it is looked at, in seconds."""

    claim: Claim
    ledger: Ledger
    every: float


class Renewer:
    """The renewing thread of this process, and the claims it looks after."""

    def __init__(self) -> None:
        self._reset()
        os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        self._watched: dict[int, _Watched] = {}
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        self._sleep = LONGEST_SLEEP
        self._wake = threading.Event()

    def watch(self, claim: Claim, ledger: Ledger, lease: int) -> None:
        """Renew this claim until ``unwatch``.

        Args:
            lease: microseconds.
        """
        every = max(SHORTEST_SLEEP, lease / MICROSECONDS / LOOKS_PER_LEASE)
        self._watched[id(claim)] = _Watched(claim, ledger, every)
        if self._thread is None:
            self._start()
        if every < self._sleep:
            self._sleep = every
            self._wake.set()

    def unwatch(self, claim: Claim) -> None:
        """The claim has ended."""
        self._watched.pop(id(claim), None)

    def _start(self) -> None:
        with self._starting:
            if self._thread is None:
                thread = threading.Thread(target=self._loop, name="celery_idem leases", daemon=True)
                thread.start()
                self._thread = thread

    def _loop(self) -> None:
        while True:
            self._wake.wait(self._sleep)
            self._wake.clear()
            self._look()

    def _look(self) -> None:
        now = time.monotonic()
        due: dict[int, list[_Watched]] = {}
        shortest = LONGEST_SLEEP
        for one in list(self._watched.values()):
            shortest = min(shortest, one.every)
            if now - one.claim._written_at >= one.every and not one.claim._taken_over:
                due.setdefault(id(one.ledger), []).append(one)
        for some in due.values():
            claims = [one.claim for one in some]
            try:
                some[0].ledger.renew(claims)
            except StoreError as error:
                # Tried again at the next look. `Claim.lost` tells the body when it is too late.
                events.emit(
                    "store_error", claims[0].key, error=str(error), while_="renewing", leases=len(claims)
                )
            except Exception:
                events.logger.exception("renewing %d leases failed; trying again", len(claims))
        if not self._watched or shortest > self._sleep:
            self._sleep = shortest


RENEWER = Renewer()
"""One for the whole process, whatever number of applications and stores it works with."""
