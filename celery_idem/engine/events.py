"""The one seam where something that happened is told: to logs, signals and metrics.

Nothing else in the package logs or counts. Listeners get no argument values. They run on a thread of their own:
what one raises is logged and dropped, and one that blocks holds up other listeners, but no task for longer than
``PATIENCE``. Listeners that come with the package: ``celery_idem.telemetry.signals`` and ``celery_idem.telemetry``.

A log record carries ``idem_event``, ``idem_key``, ``idem_task`` and ``idem_details``, for
formatters that write JSON.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections import deque
from collections.abc import Callable
from threading import Lock, Semaphore, Thread, current_thread
from typing import Any, NamedTuple

from celery_idem.core import keys

logger = logging.getLogger("celery_idem")

LEVELS = {
    "claimed": logging.DEBUG,
    "settled": logging.DEBUG,
    "replayed": logging.INFO,
    "told": logging.INFO,
    "waiting": logging.INFO,
    "scheduled": logging.DEBUG,
    "released": logging.INFO,
    "mismatch": logging.WARNING,
    "in_doubt": logging.ERROR,
    "asked": logging.WARNING,
    "lease_lost": logging.ERROR,
    "clock_stepped": logging.WARNING,
    "stale_settle": logging.CRITICAL,
    "store_error": logging.WARNING,
    "broker_error": logging.WARNING,
    "unguarded": logging.WARNING,
    "unsettled": logging.ERROR,
    "late_error": logging.ERROR,
    "exited": logging.ERROR,
    "died": logging.ERROR,
    "lapsed": logging.WARNING,
    "resolved": logging.WARNING,
    "forgotten": logging.WARNING,
    "shadow": logging.INFO,
}
"""Every kind of event, and how loudly it is logged. ``stale_settle`` is the alarm: an
execution finished an effect after another one had taken the intent over."""

_MESSAGES = {kind: f"{kind} %s %s" for kind in LEVELS}
"""A message of its own for each kind, because monitors such as Sentry group by it."""


class Event(NamedTuple):
    """Something that happened to an intent.

    Attributes:
        kind: one of ``LEVELS``.
        key: the idempotency key.
        details: more, by name; never an argument's value.
    """

    kind: str
    key: str
    details: dict[str, Any]

    @property
    def task(self) -> str:
        """Name of the task; "" where the key is not known."""
        return keys.task_of(self.key) or ""


Listener = Callable[[Event], None]

PATIENCE = 0.1
"""Seconds that a task waits for the listeners of an event, which is long for any that only counts or queues.
It does not wait again until they have caught up."""

BACKLOG = 1000
"""Events kept for listeners that fell behind. Beyond it they are dropped, which is logged once."""

_here: list[Listener] = []
_listeners: list[tuple[Listener, Callable[[Event], bool]]] = []


def _always(event: Event) -> bool:
    return True


def listen(
    listener: Listener, *, wants: Callable[[Event], bool] = _always, here: bool = False
) -> Callable[[], None]:
    """Have ``listener`` called for every event; returns a function that stops it.

    Args:
        wants: whether an event concerns the listener. Must be quick.
        here: call it on the thread where the event happens. Only for what cannot block: it holds up the task.
    """
    if here:
        _here.append(listener)
        return lambda: _here.remove(listener)
    entry = (listener, wants)
    _listeners.append(entry)
    return lambda: _listeners.remove(entry)


def emit(kind: str, key: str, **details: Any) -> None:
    """Tell that something happened."""
    level = LEVELS[kind]
    if logger.isEnabledFor(level):
        extra = {
            "idem_event": kind,
            "idem_key": key,
            "idem_task": keys.task_of(key) or "",
            "idem_details": details,
        }
        with contextlib.suppress(Exception):  # an application's own filter; handlers catch theirs
            logger.log(level, _MESSAGES[kind], key, details or "", extra=extra)
    if _here or _listeners:
        event = Event(kind, key, details)
        for listener in _here:
            try:
                listener(event)
            except Exception:
                with contextlib.suppress(Exception):
                    logger.exception("a listener of celery_idem events failed on %s %s", kind, key)
        wanted = [listener for listener, wants in _listeners if wants(event)]
        if wanted:
            _speaker.tell(event, wanted)


class _Speaker:
    """Calls listeners on a thread of its own, one for each process, so that none can fail or block a task."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start anew. In a forked child the thread is the parent's, and its locks may be held."""
        self._lock = Lock()
        self._waiting: deque[tuple[Event, list[Listener], Lock]] = deque()
        self._some = Semaphore(0)
        self._thread: Thread | None = None
        self._behind = False  # a listener took longer than PATIENCE, and has not caught up
        self._dropped = False

    def tell(self, event: Event, listeners: list[Listener]) -> None:
        told = Lock()
        told.acquire()
        with self._lock:
            if self._thread is None:
                thread = Thread(target=self._run, name="celery_idem events", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # no more threads: then the log alone has the event
                    return
                self._thread = thread
            full = len(self._waiting) >= BACKLOG
            if not full:
                self._waiting.append((event, listeners, told))
        if full:
            if not self._dropped:
                self._dropped = True
                logger.error("listeners of celery_idem events block: events are dropped until they return")
            return
        self._some.release()
        if not self._behind and current_thread() is not self._thread and not told.acquire(timeout=PATIENCE):
            self._behind = True

    def _run(self) -> None:
        while True:
            self._some.acquire()
            event, listeners, told = self._waiting.popleft()
            for listener in listeners:
                try:
                    listener(event)
                except BaseException:  # whatever it raises is its own affair, an exit included
                    logger.exception(
                        "a listener of celery_idem events failed on %s %s", event.kind, event.key
                    )
            told.release()
            if not self._waiting:
                self._behind = self._dropped = False


_speaker = _Speaker()
os.register_at_fork(after_in_child=_speaker.reset)
