"""The one seam where something that happened is told: to logs, signals and metrics.

Nothing else in the package logs or counts. A listener must be quick, must not raise
(what it raises is logged and dropped), and gets no argument values. Listeners that come
with the package: ``celery_idem.signals`` and ``celery_idem.telemetry``.

A log record carries ``idem_event``, ``idem_key``, ``idem_task`` and ``idem_details``, for
formatters that write JSON.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

from celery_idem import keys

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


_listeners: list[Callable[[Event], None]] = []


def listen(listener: Callable[[Event], None]) -> Callable[[], None]:
    """Have ``listener`` called for every event; returns a function that stops it."""
    _listeners.append(listener)
    return lambda: _listeners.remove(listener)


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
            logger.log(level, "%s %s %s", kind, key, details or "", extra=extra)
    if _listeners:
        event = Event(kind, key, details)
        for listener in _listeners:
            try:
                listener(event)
            except Exception:
                with contextlib.suppress(Exception):
                    logger.exception("a listener of celery_idem events failed on %s %s", kind, key)
