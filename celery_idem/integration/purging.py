"""Expired records go by themselves: each worker's main process deletes them, a few at a time.

Redis expires by itself. In a database an expired row counts as absent at once, but takes
space until it is deleted. A separate thread does that: never on the way of a claim,
and not the thread that renews leases. Several workers do not get into each other's way: PostgreSQL
skips what another one has locked, and SQLite has one writer at a time anyway.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from celery_idem.core.errors import IdempotencyError
from celery_idem.engine import events
from celery_idem.integration.looks import FORKS, Looks

if TYPE_CHECKING:
    from celery import Celery

    from celery_idem.stores import Store

FIRST = 5.0
"""Seconds after the start until the first look at most: also a worker that is restarted often purges.
By chance, see there."""

EVERY = 60.0
"""Seconds between looks: what expires in a minute is little beside what is kept for a day."""

BATCH = 500
"""Rows per statement: 2 to 20 ms, in which SQLite lets no other connection write."""

REST = 4.0
"""The pause after a full batch, in times what it took: so a backlog takes a fifth of one connection's time."""


class Purger(Looks):
    """The purging thread of a process. ``stores``: gives the stores to look after; asked anew at each look."""

    def __init__(self, stores: Callable[[], Iterable[Store]]) -> None:
        super().__init__("purging", self._look_at_all, FIRST, EVERY)
        self._stores = stores

    def _look_at_all(self, ended: threading.Event) -> None:
        for store in self._stores():
            _purge(store, ended)


def _purge(store: Store, ended: threading.Event) -> None:
    total, gone = 0, BATCH
    while gone == BATCH:
        began = time.monotonic()
        with FORKS.held_off:
            gone = store.purge(BATCH)
        total += gone
        if ended.wait(REST * (time.monotonic() - began)):
            return
    if total:
        events.diagnose(logging.DEBUG, "%d expired records deleted from %s", total, store.url)


def stores_of(app: Celery) -> list[Store]:
    """The stores of an application's tasks that do not expire by themselves, each once."""
    found: dict[int, Store] = {}
    for task in list(app.tasks.values()):
        if getattr(task, "idem_declaration", None) is not None:
            store: Store = task.guard.ledger.store
            if not store.expires:
                found[id(store)] = store
    return list(found.values())


_purgers: dict[int, Purger] = {}
"""By application: one worker in this process each."""


def begin(sender: Any = None, **_: Any) -> None:
    """Celery's ``worker_ready``: the pool's processes are forked, and this thread is none of theirs."""
    app = sender.app
    try:
        if id(app) in _purgers or not stores_of(app):
            return
    except IdempotencyError as error:  # the tasks themselves raise it for their callers
        events.diagnose(logging.WARNING, "expired records are not purged by this worker: %s", error)
        return
    purger = _purgers[id(app)] = Purger(lambda: stores_of(app))
    purger.start()


def end(sender: Any = None, **_: Any) -> None:
    """Celery's ``worker_shutdown``."""
    purger = _purgers.pop(id(sender.app), None)
    if purger is not None:
        purger.stop()
