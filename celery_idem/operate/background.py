"""The latest of something that takes long to read: a million records take half a minute.

It is read on a thread of its own, one reading at a time and with pauses, while everybody who asks
gets what is there: the latest whole result, and how far the next one is.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

PAUSE = 9.0
"""The least pause after a reading that took longer than anybody waits, in times what it took: the
store's server and this process then spend a tenth of the time on it at most."""


@dataclass(frozen=True)
class Latest(Generic[T]):
    """What is there.

    Attributes:
        whole: the latest result; None before the first reading has ended.
        unfinished: as far as the present reading is; None when there is none.
        began: the worker's time (``time.monotonic``) when the reading of ``whole`` began, or
            while there is none, that of ``unfinished``.
        error: what ended the latest reading; None when nothing did.
    """

    whole: T | None = None
    unfinished: T | None = None
    began: float = 0.0
    error: Exception | None = None


class Background(Generic[T]):
    """Reads when somebody asks and the latest result is old.

    Args:
        read: gives what is known so far, as often as it likes; what it gives last is the result.
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
        self._slow = False  # the latest reading took longer than anybody waits
        self._latest: Latest[T] = Latest()

    def look(self) -> Latest[T]:
        """What is there, after waiting for the present reading (see ``patience``)."""
        with self._lock:
            if self._idle.is_set() and time.monotonic() >= self._due:
                self._idle.clear()
                threading.Thread(target=self._run, name="celery_idem reading", daemon=True).start()
        self._idle.wait(self._patience)
        return self._latest

    def outdate(self) -> None:
        """Something has changed: read anew for whoever asks next, where that is quickly done."""
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
        except Exception as error:  # whoever looks next is told
            self._latest = Latest(before.whole, None, before.began, error)
        finally:
            ended = time.monotonic()
            took = ended - began
            self._slow = self._patience is not None and took > self._patience
            if self._latest.error is not None:
                self._due = ended  # the next one to ask tries again
            else:
                self._due = ended + max(self._fresh, PAUSE * took if self._slow else 0.0)
            self._idle.set()
