"""The store in memory, for tests and experiments. Its records end with the process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence

from celery_idem.core.model import Stored
from celery_idem.stores.base import KEEP, OWNER, Listed, Mark, Reply, Store

SCHEMES = ("memory",)


class MemoryStore(Store):
    """Records in a dictionary under a lock. ``clock``: returns the time in microseconds."""

    url = "memory://"

    def __init__(self, clock: Callable[[], int] = lambda: time.time_ns() // 1000) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._values: dict[str, tuple[Stored, int | None]] = {}
        self._due: dict[str, int] = {}

    def create(self, key: str, value: bytes, ttl: int | None = None, due: int | None = None) -> Reply:
        with self._lock:
            now = self._clock()
            held = self._held(key, now)
            if held is not None:
                return Reply(False, held, now)
            return Reply(True, self._list(key, self._write(key, value, now, now, ttl), due), now)

    def read(self, key: str) -> Reply:
        with self._lock:
            now = self._clock()
            held = self._held(key, now)
            return Reply(held is not None, held, now)

    def replace(
        self, key: str, old: Stored, value: bytes, ttl: int | None = None, due: int | None = None
    ) -> Reply:
        with self._lock:
            now = self._clock()
            held = self._held(key, now)
            if held is None or held.stamp != old.stamp or held.value[:OWNER] != old.value[:OWNER]:
                return Reply(False, held, now)
            new = self._write(key, value, max(now, old.stamp + 1), now, ttl)
            return Reply(True, self._list(key, new, due), now)

    def scan(self, prefix: str) -> Iterator[tuple[str, Stored]]:
        with self._lock:
            keys = [key for key in self._values if key.startswith(prefix)]
        for key in keys:
            stored = self.read(key).stored
            if stored is not None:
                yield key, stored

    def open(self, prefix: str, before: int | None = None) -> Iterator[Listed]:
        with self._lock:
            due = sorted((at, key) for key, at in self._due.items() if key.startswith(prefix))
        for at, key in due:
            if before is None or at <= before:
                yield Listed(key, at, self.peek(key))

    def mark(self, marks: Sequence[Mark]) -> None:
        with self._lock:
            now = self._clock()
            for key, stamp, due in marks:
                held = self._held(key, now)
                if (0 if held is None else held.stamp) == stamp:
                    self._list(key, held or Stored(b"", 0), due)

    def purge(self, limit: int) -> int:
        with self._lock:
            now = self._clock()
            expired = [key for key, (_, end) in self._values.items() if end is not None and end <= now][
                :limit
            ]
            for key in expired:
                del self._values[key]
            return len(expired)

    def _list(self, key: str, stored: Stored, due: int | None) -> Stored:
        if due is None:
            self._due.pop(key, None)
        else:
            self._due[key] = stored.stamp + due
        return stored

    def _held(self, key: str, now: int) -> Stored | None:
        stored, expires = self._values.get(key, (None, None))
        if stored is None or (expires is not None and expires <= now):
            return None
        return stored

    def _write(self, key: str, value: bytes, stamp: int, now: int, ttl: int | None) -> Stored:
        stored = Stored(value, stamp)
        expires = self._values[key][1] if ttl == KEEP else None if ttl is None else now + ttl
        self._values[key] = (stored, expires)
        return stored


_named: dict[str, MemoryStore] = {}


def open_url(url: str, durability: str = "none") -> MemoryStore:
    """Return the store for this URL. The same URL gives the same store in a process."""
    return _named.setdefault(url, MemoryStore())
