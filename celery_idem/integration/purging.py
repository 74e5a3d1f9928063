"""Deletes expired records from databases, in each worker's main process, a few at a time.

Redis deletes them itself. In a database an expired row counts as absent at once, but takes space until it is deleted.
A separate thread does that, so that no claim and no renewal of a lease waits for it. Several workers do not disturb
each other: PostgreSQL skips rows that another one has locked, and SQLite has one writer at a time.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from celery_idem.core.errors import IdempotencyError
from celery_idem.engine import events
from celery_idem.integration.guarded import guarded_tasks
from celery_idem.integration.looks import FORKS, Beside, Looks

if TYPE_CHECKING:
    from celery import Celery

    from celery_idem.stores import Store

FIRST = 5.0
"""Longest time until the first look, in seconds: short, so that a worker that is restarted often purges too."""

EVERY = 60.0
"""Seconds between looks. Few records expire in a minute, compared with those that are kept for a day."""

BATCH = 500
"""Rows per statement. It takes 2 to 20 ms, during which SQLite lets no other connection write."""

REST = 4.0
"""Pause after a batch, as a multiple of its duration: so a backlog takes a fifth of one connection's time."""


class Purger(Looks):
    """The purging thread of a process. ``stores`` returns the stores to purge, and is called for each look."""

    def __init__(self, stores: Callable[[], Iterable[Store]]) -> None:
        super().__init__("purging", self._look_at_all, FIRST, EVERY)
        self._stores = stores

    def _look_at_all(self, ended: threading.Event) -> None:
        for store in self._stores():
            _purge(store, ended)


def _purge(store: Store, ended: threading.Event) -> None:
    total, deleted = 0, BATCH
    while deleted == BATCH:
        began = time.monotonic()
        with FORKS.held_off:
            deleted = store.purge(BATCH)
        total += deleted
        if ended.wait(REST * (time.monotonic() - began)):
            return
    if total:
        events.diagnose(logging.DEBUG, "%d expired records deleted from %s", total, store.url)


def stores_of(app: Celery) -> list[Store]:
    """Return the stores of an application's tasks that do not delete expired records themselves, each once."""
    found: dict[int, Store] = {}
    for task in guarded_tasks(app):
        store = task.guard.ledger.store
        if not store.expires:
            found[id(store)] = store
    return list(found.values())


def _purger(app: Celery) -> Purger | None:
    try:
        return Purger(lambda: stores_of(app)) if stores_of(app) else None
    except IdempotencyError as error:  # the tasks themselves raise it for their callers
        events.diagnose(logging.WARNING, "expired records are not purged by this worker: %s", error)
        return None


BESIDE = Beside(_purger)
