"""Runs slow readings in the background: reading a million records takes half a minute.

A thread runs one reading at a time, with pauses. Callers get the latest complete result and the progress of the next.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

PAUSE = 9.0
"""Pause after a reading longer than ``patience``, as a multiple of its duration: the server and this process then spend
at most a tenth of their time on it."""


@dataclass(frozen=True)
class Latest(Generic[T]):
    """The latest result and the progress of the next.

    Attributes:
        whole: the latest complete result; None before the first reading has ended.
        unfinished: the partial result of the running reading; None if none is running.
        began: when the reading of ``whole`` (or else of ``unfinished``) began, as ``time.monotonic``.
        error: the error that ended the latest reading, if any.
    """

    whole: T | None = None
    unfinished: T | None = None
    began: float = 0.0
    error: Exception | None = None


class Background(Generic[T]):
    """Reads again when a caller asks and the latest result is old.

    Args:
        read: yields partial results; the last one is the complete result.
        fresh: seconds until a result is old.
        patience: seconds that ``look`` waits for a reading; None: until it has ended.
    """

    def __init__(self, read: Callable[[], Iterator[T]], fresh: float, patience: float | None) -> None:
        self._read = read
        self._fresh = fresh
        self._patience = patience
        self._lock = threading.Lock()
        self._idle = threading.Event()
        self._idle.set()
        self._due = 0.0
        self._slow = False  # the latest reading took longer than ``patience``
        self._latest: Latest[T] = Latest()

    def look(self, within: float | None = None) -> Latest[T]:
        """Return the latest result after waiting for the running reading: ``within`` seconds, or ``patience``."""
        with self._lock:
            if self._idle.is_set() and time.monotonic() >= self._due:
                self._idle.clear()
                threading.Thread(target=self._run, name="celery_idem reading", daemon=True).start()
        self._idle.wait(self._patience if within is None else within)
        return self._latest

    def outdate(self) -> None:
        """Make the next ``look`` read again after a change, if readings are fast."""
        if not self._slow:
            self._due = 0.0

    def _run(self) -> None:
        began = time.monotonic()
        before = self._latest
        so_far: T | None = None
        try:
            for so_far in self._read():
                since = began if before.whole is None else before.began
                self._latest = Latest(before.whole, so_far, since)
            self._latest = Latest(so_far, None, began)
        except Exception as error:  # the next ``look`` returns it
            self._latest = Latest(before.whole, None, before.began, error)
        finally:
            ended = time.monotonic()
            took = ended - began
            self._slow = self._patience is not None and took > self._patience
            if self._latest.error is not None:
                self._due = ended  # the next ``look`` tries again
            else:
                self._due = ended + max(self._fresh, PAUSE * took if self._slow else 0.0)
            self._idle.set()
