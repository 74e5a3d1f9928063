"""Keeps leases alive: one thread for each store renews all holds of this process there.

A lease tells every other worker to leave the intent alone until then. The body runs on its own
thread for as long as it likes, while this thread writes the lease anew, early enough to
survive one failed renewal: it looks every sixth of the shortest lease and
renews what is older than that, so no lease gets older than a third before the first
try. When the process dies, the renewals end and the lease lapses: that is why this runs
here, and not in a process that outlives the body.

A store that hangs delays the renewals of its own records only. A thread starts with the
first hold in its store, and ends after a while without any. A forked child does not inherit
it, and starts its own.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import weakref
from collections.abc import Sequence
from typing import NamedTuple

from celery_idem.core import protocol
from celery_idem.core.errors import StoreError
from celery_idem.core.model import MICROSECONDS
from celery_idem.engine import clock, events
from celery_idem.engine.claim import Hold
from celery_idem.stores.base import PartlyError, Reply, Store

LOOKS_PER_LEASE = 6
"""Looks per lease. Renewing at a third at the latest leaves two more tries before it lapses."""

LONGEST_SLEEP = 5.0
"""Seconds between looks at most: a sixth of the default lease."""

SHORTEST_SLEEP = 0.01
"""Seconds between looks at least, so that a tiny lease does not become a busy loop."""

IDLE_LOOKS = 12
"""Looks with nothing to renew after which a thread ends: a minute. Starting one takes 0.1 ms."""


class Renewals:
    """Renews holds of one store together, and compares the store's clock with this process' meanwhile."""

    def __init__(self) -> None:
        self._stepped = 0.0

    def renew(self, store: Store, holds: Sequence[Hold]) -> None:
        """In one round trip, where the store can.

        Raises:
            StoreError: some could not be renewed. The others are.
        """
        offered = [(hold, change) for hold in holds if (change := hold.renewal()) is not None]
        if not offered:
            return
        before = clock.elapsed()
        failed: StoreError | None = None
        replies: Sequence[Reply | None]
        try:
            replies = store.replace_many([change for _, change in offered])
        except PartlyError as error:
            failed, replies = error, error.replies
        if replies[0] is not None and replies[0].done:
            self._compare_clocks(offered[0][0], replies[0], before)
        for (hold, _), reply in zip(offered, replies, strict=True):
            try:
                if reply is not None:
                    hold.renewed(reply)
            except StoreError as error:
                if not error.key:
                    raise
                failed = error  # the store answered, with something that is no record: the others go on
        if failed is not None:
            raise failed

    def _compare_clocks(self, hold: Hold, reply: Reply, before: float) -> None:
        """Between two writes of a hold as much time should have passed in the store as here."""
        assert hold.written is not None
        assert reply.stored is not None
        there = reply.stored.stamp - hold.written.stamp
        ahead = there - (clock.elapsed() - hold.written_at) * MICROSECONDS
        back = (before - hold.written_at) * MICROSECONDS if there == 1 else 0.0  # or more: 1 hides how much
        by = ahead if ahead > protocol.STEP else -back if back > protocol.STEP else 0.0
        if by and by * self._stepped <= 0:  # once, and not at every renewal until it is over
            events.emit("clock_stepped", hold.key, by=round(by / MICROSECONDS, 1), store=hold.store.url)
        self._stepped = by


class _Watched(NamedTuple):
    """A hold whose body runs, and how often it is looked at, in seconds."""

    hold: Hold
    every: float


class _Keeper:
    """The renewing thread of one store, and the holds it looks after.

    No call of a body's thread waits for a lock here, unless the thread has to be started. The order
    keeps a hold from being overlooked: it is put among the watched first, and after that its thread looks
    whether the renewing thread sleeps too long for it, or has ended. The renewing thread does the reverse: it
    states how long it will sleep, or that it has ended, after it looked at what is watched, and where it
    stated that too early it looks again.
    """

    def __init__(self, collected: weakref.ref[Store]) -> None:
        self.collected = collected  # kept, so that its callback is
        self.watched: dict[int, _Watched] = {}
        self._renewals = Renewals()
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        self._sleep = math.inf
        self._wake = threading.Event()

    def watch(self, one: _Watched) -> None:
        self.watched[id(one.hold)] = one
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
            self._sleep = math.inf  # a hold that comes after the next line wakes this thread
            watched = list(self.watched.values())
            self._sleep = min((one.every for one in watched), default=LONGEST_SLEEP)
            idle = 0 if watched else idle + 1
            self._renew([one.hold for one in watched if began - one.hold.written_at >= one.every])
            self._wake.wait(max(0.0, began + self._sleep - clock.elapsed()))

    def _ended(self) -> bool:
        """End, unless a claim has come meanwhile."""
        with self._starting:
            thread, self._thread = self._thread, None
            if self.watched:
                self._thread = thread
            return self._thread is None

    def _renew(self, due: list[Hold]) -> None:
        if not due:
            return
        try:
            self._renewals.renew(due[0].store, due)
        except StoreError as error:
            # Tried again at the next look. ``Claim.lost`` tells the body when it is too late.
            events.emit("store_error", due[0].key, error=str(error), while_="renewing", leases=len(due))
        except Exception as error:
            events.diagnose(logging.ERROR, "renewing %d leases failed; trying again", len(due), error=error)


class Renewer:
    """The renewing threads of this process."""

    def __init__(self) -> None:
        self._reset()
        os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        self._keepers: dict[int, _Keeper] = {}

    def watch(self, hold: Hold) -> None:
        """Renew this hold until ``unwatch``."""
        store = hold.store
        keeper = self._keepers.get(id(store))
        if keeper is None:
            keeper = self._keep(store)
        lease = hold.policy.lease / MICROSECONDS
        keeper.watch(_Watched(hold, max(SHORTEST_SLEEP, lease / LOOKS_PER_LEASE)))

    def _keep(self, store: Store) -> _Keeper:
        number, keepers = id(store), self._keepers
        return keepers.setdefault(number, _Keeper(weakref.ref(store, lambda _: keepers.pop(number, None))))

    def unwatch(self, hold: Hold) -> None:
        """The hold has ended."""
        keeper = self._keepers.get(id(hold.store))
        if keeper is not None:
            keeper.watched.pop(id(hold), None)


RENEWER = Renewer()
"""One for the whole process, whatever number of applications and stores it works with."""
