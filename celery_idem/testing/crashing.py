"""A store that fails at chosen points, to test the state that a crash leaves."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypeVar

from celery_idem.core.errors import StoreError
from celery_idem.core.model import Stored
from celery_idem.integration import wiring
from celery_idem.stores.base import Change, Listed, Mark, Reply, Store

T = TypeVar("T")

PRIMITIVES = ("create", "read", "replace", "replace_many", "scan", "open", "mark", "purge")

POINTS = tuple(f"{when} {name}" for name in PRIMITIVES for when in ("before", "after"))
"""Where a ``CrashingStore`` can fail. "before create": nothing is written. "after create": it is written, and the
caller does not get the reply. ``replace_many`` renews leases; ``replace`` writes outcomes and steps."""

How = Literal["raise", "kill"] | Callable[[], object]


class CrashingStore(Store):
    """Passes all calls on to ``store``, and fails at the points set with ``crash``.

    ::

        store = CrashingStore(open_store("redis://localhost:6379/1"))
        store.crash("after create")                 # the claim is written, its reply is lost
        store.crash("before replace", "kill")       # the process dies with the effect done, unrecorded
        store.crash("before replace", times=1000)   # the store is down
        store.heal()

    Attributes:
        store: the store behind it, which shows what was written.
        calls: names of the primitives called so far, in order.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.url = store.url
        self.calls: list[str] = []
        self._crashes: list[_Crash] = []

    def crash(self, point: str, how: How = "raise", *, times: int = 1, skip: int = 0) -> None:
        """Fail at ``point``, one of ``POINTS``.

        Args:
            how: "raise": a StoreError, as after a time-out; "kill": SIGKILL for this process; or a function to call.
            times: number of failures.
            skip: number of passes before the first failure.
        """
        if point not in POINTS:
            raise ValueError(f"there is no point {point!r}; there are: {', '.join(POINTS)}")
        self._crashes.append(_Crash(point, how, times, skip))

    def heal(self) -> None:
        """Stop failing."""
        self._crashes.clear()

    def create(self, key: str, value: bytes, ttl: int | None = None, due: int | None = None) -> Reply:
        return self._pass("create", lambda: self.store.create(key, value, ttl, due))

    def read(self, key: str) -> Reply:
        return self._pass("read", lambda: self.store.read(key))

    def replace(
        self, key: str, old: Stored, value: bytes, ttl: int | None = None, due: int | None = None
    ) -> Reply:
        return self._pass("replace", lambda: self.store.replace(key, old, value, ttl, due))

    def replace_many(self, changes: Sequence[Change]) -> list[Reply]:
        return self._pass("replace_many", lambda: self.store.replace_many(changes))

    def scan(self, prefix: str) -> Iterator[tuple[str, Stored]]:
        return self._pass("scan", lambda: self.store.scan(prefix))

    def open(self, prefix: str, before: int | None = None) -> Iterator[Listed]:
        return self._pass("open", lambda: self.store.open(prefix, before))

    def mark(self, marks: Sequence[Mark]) -> None:
        self._pass("mark", lambda: self.store.mark(marks))

    def indexed(self, prefix: str) -> None:
        self.store.indexed(prefix)

    def purge(self, limit: int) -> int:
        return self._pass("purge", lambda: self.store.purge(limit))

    def close(self) -> None:
        self.store.close()

    def _pass(self, name: str, call: Callable[[], T]) -> T:
        self.calls.append(name)
        self._reach(f"before {name}")
        reply = call()
        self._reach(f"after {name}")
        return reply

    def _reach(self, point: str) -> None:
        for crash in list(self._crashes):
            if crash.point == point and crash.due():
                crash.happen()


class _Crash:
    def __init__(self, point: str, how: How, times: int, skip: int) -> None:
        self.point = point
        self._how = how
        self._times = times
        self._skip = skip

    def due(self) -> bool:
        if self._skip > 0:
            self._skip -= 1
            return False
        self._times -= 1
        return self._times >= 0

    def happen(self) -> None:
        if self._how == "raise":
            raise StoreError(f"The store did not answer: a test crashed it {self.point}.")
        if self._how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        assert callable(self._how)
        self._how()


def use_store(url: str, store: Store, durability: str = "none") -> None:
    """Make every application of this process whose ``idem_store`` is ``url`` use ``store``.

    Call it before the first task runs, for example in the module that creates the application.
    """
    wiring._stores[url, durability] = store
