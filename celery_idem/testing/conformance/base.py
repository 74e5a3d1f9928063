"""The base of the suite: set-up, sample values and keys, and bounded waiting."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from celery_idem.core.model import MICROSECONDS, Stored
from celery_idem.stores.base import Reply, Store

PATIENCE = 60.0
"""Seconds until a wait fails: enough for a very slow machine."""

SHORT = MICROSECONDS // 5
"""Time to live in the tests of expiry, in microseconds: longer than a round trip, and short to wait for."""

MINE = b"owner-mine--"
YOURS = b"owner-yours-"

AWKWARD = (
    "plain",
    "shop.send_invoice:0123456789abcdef",
    "Plain",  # differs in case only
    "plain ",  # differs by a space at the end
    "pl_in",
    "pl%in",
    "pl*in",
    "pl?in",
    "pl[a]in",
    "pl\\ain",
    "pl'; DROP TABLE records; --",
    'pl"ain',
    "pl\nain",
    "größe",  # a composed ö
    "gro\u0308ße",  # and a decomposed one: a store does not normalise
    "支払い",
    "💶",
    "{tag}plain",
    "x" * 700,
)


class Suite:
    """A store, and keys that no other test uses, so the store need not be empty."""

    shared_by_processes = True
    """False for a store in one process: races between processes are then skipped."""

    racers = 8
    """Threads in a race."""

    processes = 3
    """Processes in a race. Each takes about a second to start."""

    def make_store(self) -> Store:
        """Return a store that is open, or opens itself when it is used.

        Every call must return a new object on the same data. Other processes call this too, on a pickled copy of this
        instance. So a fixture must only set simple values on it, such as a URL.
        """
        raise NotImplementedError

    def wait_until(self, store: Store, when: int) -> None:
        """Wait until the store's time is past ``when``, in microseconds. A store with a fake clock moves it instead."""
        wait_for(lambda: store.read(self.key("nothing")).now > when, f"the store's time to pass {when}")

    def setup_method(self, *_: object) -> None:
        self._prefix = f"conformance-{uuid.uuid4().hex}:"
        self._opened: Store | None = None

    def teardown_method(self, *_: object) -> None:
        if self._opened is not None:
            self._opened.close()

    @property
    def store(self) -> Store:
        """The store, opened at first use, after the fixtures of a subclass."""
        if self._opened is None:
            self._opened = self.make_store()
        return self._opened

    def key(self, name: str) -> str:
        """Return a key that no other test uses."""
        return self._prefix + name

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}


def held_by(reply: Reply) -> Stored:
    """Return what the key holds; fail if it holds nothing."""
    assert reply.stored is not None
    return reply.stored


def stamp_of(reply: Reply) -> int:
    return held_by(reply).stamp


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Wait until the condition holds. ``what`` names it in the error."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE:g} s for {what}"
        threading.Event().wait(0.005)
