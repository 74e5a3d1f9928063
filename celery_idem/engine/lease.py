"""Renews leases: one thread per store renews all holds of this process in that store.

Until its lease ends, every other worker leaves an intent alone. While the body runs in its own thread, this thread
renews the lease, early enough to survive one failed renewal. It looks every sixth of the shortest lease, and renews
leases that are older than that. So each lease is first renewed before it is a third old. When the process dies, the
renewals end and the lease lapses. So this must not run in another process, which could outlive the body.

The same thread takes settled records out of the index when their callers have the answer, many in one round trip
(``close``), and keeps those fresh whose callers do not have it yet (``owe``).

A store that hangs delays only the renewals of its own records. A thread starts with the first hold in its store, and
ends after a while without holds. A forked child does not inherit it, and starts its own.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import weakref
from collections import deque
from collections.abc import Sequence

from celery_idem.core import protocol
from celery_idem.core.errors import StoreError
from celery_idem.core.model import MICROSECONDS
from celery_idem.engine import clock, events
from celery_idem.engine.claim import Hold
from celery_idem.stores.base import Mark, PartlyError, Reply, Store

LOOKS_PER_LEASE = 6
"""Looks per lease. The first renewal is at a third of the lease, which leaves time for two more tries."""

LONGEST_SLEEP = 5.0
"""The longest time between looks, in seconds: a sixth of the default lease."""

SHORTEST_SLEEP = 0.01
"""The shortest time between looks, in seconds, so that a tiny lease does not cause a busy loop."""

CLOSED_AT_ONCE = 100
"""Number of answers that wake the thread before its next look, so that a busy process keeps no long list of them. One
more round trip for a hundred tasks costs nothing."""

CLOSING_KEPT = 10_000
"""Answers that wait to be noted while the store hangs: about 2 MB. The oldest are then left to recovery."""

LOOKS_PER_WAIT = 4
"""Looks in the time after which recovery acts on an answer that is owed: three of them may fail."""

IDLE_LOOKS = 12
"""Number of looks without holds after which a thread ends: a minute. Starting a thread takes 0.1 ms."""


class Renewals:
    """Renews holds of one store together, and compares the store's clock with the clock of this process."""

    def __init__(self) -> None:
        self._stepped = 0.0

    def renew(self, store: Store, holds: Sequence[Hold]) -> None:
        """Renew holds, in one round trip if the store can.

        Raises:
            StoreError: some could not be renewed. The others are renewed.
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
                failed = error  # the store answered with a value that is no record; go on with the others
        if failed is not None:
            raise failed

    def _compare_clocks(self, hold: Hold, reply: Reply, before: float) -> None:
        """Emit an event if the time between two writes of a hold is not the same in the store and here."""
        assert hold.written is not None
        assert reply.stored is not None
        there = reply.stored.stamp - hold.written.stamp
        ahead = there - (clock.elapsed() - hold.written_at) * MICROSECONDS
        back = (before - hold.written_at) * MICROSECONDS if there == 1 else 0.0  # at least; 1 hides how much
        by = ahead if ahead > protocol.STEP else -back if back > protocol.STEP else 0.0
        if by and by * self._stepped <= 0:  # once, and not at every renewal
            events.emit("clock_stepped", hold.key, by=round(by / MICROSECONDS, 1), store=hold.store.url)
        self._stepped = by


class _Watched:
    """A hold whose body runs, and the seconds between looks at it."""

    __slots__ = ("every", "hold")

    def __init__(self, hold: Hold, every: float) -> None:
        self.hold = hold
        self.every = every


class _Keeper:
    """The renewing thread of one store, and the holds that it renews.

    A body's thread does not wait for a lock here, unless it has to start the renewing thread. No hold is overlooked,
    because the order of writes and reads is this. A body's thread first adds its hold to ``watched``. Then it reads
    whether the renewing thread sleeps too long, or has ended. The renewing thread first writes that it sleeps, or has
    ended. Then it reads ``watched``, and corrects what it wrote.
    """

    def __init__(self, collected: weakref.ref[Store]) -> None:
        self.collected = collected  # kept, because otherwise its callback is not called
        self.watched: dict[int, _Watched] = {}
        self.owed: dict[int, _Watched] = {}
        self.given: deque[Hold] = deque(maxlen=CLOSING_KEPT)
        self.closing: deque[Mark] = deque(maxlen=CLOSING_KEPT)
        self._renewals = Renewals()
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        self._flushing = threading.Lock()
        self._sleep = math.inf
        self._wake = threading.Event()

    def watch(self, one: _Watched) -> None:
        self.watched[id(one.hold)] = one
        if self._thread is None:
            self._start()
        if one.every < self._sleep:
            self._wake.set()

    def close(self, mark: Mark) -> None:
        self.closing.append(mark)
        if len(self.closing) >= CLOSED_AT_ONCE:
            self._wake.set()
        if self._thread is None:
            self._start()

    def owe(self, one: _Watched) -> None:
        self.owed[id(one.hold)] = one
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
            self._sleep = math.inf  # a hold that is added after the next line wakes this thread
            watched = [*list(self.watched.values()), *list(self.owed.values())]
            self._sleep = min((one.every for one in watched), default=LONGEST_SLEEP)
            idle = 0 if watched or self.closing or self.given else idle + 1
            if self.closing or self.given:
                self.flush()
            self._renew([one.hold for one in watched if began - one.hold.written_at >= one.every])
            self._wake.wait(max(0.0, began + self._sleep - clock.elapsed()))

    def _ended(self) -> bool:
        """Note that the thread has ended, unless a hold was added meanwhile."""
        with self._starting:
            thread, self._thread = self._thread, None
            if self.watched or self.closing or self.owed or self.given:
                self._thread = thread
            return self._thread is None

    def flush(self) -> None:
        """Note which answers were given. A process that ends waits here for the thread, if that does so now."""
        with self._flushing:
            for _ in range(len(self.given)):
                if not self.tell(self.given.popleft()):
                    return  # the store does not answer
            marks = [self.closing.popleft() for _ in range(len(self.closing))]
            store = self.collected()
            if store is None or not marks:
                return
            try:
                store.mark(marks)
            except Exception as error:  # recovery looks whether their callers have the answer
                events.diagnose(logging.DEBUG, "%d answers are not noted: %s", len(marks), error)

    def tell(self, hold: Hold) -> bool:
        """Write that an answer was given. False: the store does not answer."""
        self.owed.pop(id(hold), None)
        try:
            hold.told()
        except StoreError as error:
            events.diagnose(logging.DEBUG, "%s: its answer is not noted: %s", hold.key, error)
            if not error.key:  # the store is away; try again at the next look
                self.given.append(hold)
                return False
        except Exception as error:  # the thread must go on, because it renews leases
            events.diagnose(logging.ERROR, "%s: its answer is not noted", hold.key, error=error)
        return True

    def _renew(self, due: list[Hold]) -> None:
        if not due:
            return
        try:
            self._renewals.renew(due[0].store, due)
        except StoreError as error:
            # It is tried again at the next look. The body sees in ``Claim.lost`` when it is too late.
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
        """Renew this hold no more."""
        keeper = self._keepers.get(id(hold.store))
        if keeper is not None:
            keeper.watched.pop(id(hold), None)

    def close(self, store: Store, closing: Mark) -> None:
        """Take a settled record out of the index at the next look, with others: its caller has the answer."""
        keeper = self._keepers.get(id(store))
        if keeper is None:
            keeper = self._keep(store)
        keeper.close(closing)

    def owe(self, hold: Hold) -> None:
        """Keep recovery from a settled record while Celery answers, until ``given``."""
        hold.owed = True
        keeper = self._keepers.get(id(hold.store)) or self._keep(hold.store)
        keeper.owe(
            _Watched(hold, max(SHORTEST_SLEEP, protocol.PUBLISHED_WAIT / MICROSECONDS / LOOKS_PER_WAIT))
        )

    def given(self, hold: Hold) -> None:
        """Write that Celery has answered."""
        (self._keepers.get(id(hold.store)) or self._keep(hold.store)).tell(hold)

    def flush(self) -> None:
        """Write what waits for the next look: the process ends."""
        for keeper in list(self._keepers.values()):
            keeper.flush()


RENEWER = Renewer()
"""One for the whole process, for all its applications and stores."""
