"""What a store must be able to do. A store knows no rules: only bytes, keys and its own clock.

Each value is kept together with a *stamp*: the store's time, in microseconds, of the
last write. Stamps of one key only grow, so the stamp is the version too. Five
primitives are enough; ``celery_idem.testing.StoreConformance`` tests them all.
"""

from __future__ import annotations

import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

from celery_idem.core.errors import ConfigurationError, StoreError
from celery_idem.core.model import Stored

OWNER = 12
"""Bytes at the start of every value that a replacement compares, together with the stamp."""


class Reply(NamedTuple):
    """Answer of ``create``, ``read`` and ``replace``.

    Attributes:
        done: this call wrote (``read``: there is a value).
        stored: what the key holds now; None when it holds nothing.
        now: the store's time, in microseconds.
    """

    done: bool
    stored: Stored | None
    now: int


class Change(NamedTuple):
    """One replacement: of ``old`` at ``key`` by ``value``, to be kept ``ttl`` microseconds (None: for ever)."""

    key: str
    old: Stored
    value: bytes
    ttl: int | None = None


class PartlyError(StoreError):
    """Some of several replacements got no answer, and others did.

    Attributes:
        replies: in order; None where there is none.
    """

    def __init__(self, first: StoreError, replies: Sequence[Reply | None]) -> None:
        super().__init__(str(first), first.key)
        self.replies = replies


def elsewhere(url: str) -> ConfigurationError:
    """The error of a connection on which the store's records cannot be seen."""
    return ConfigurationError(
        f"settle_in: the record of this intent is in {url}, and cannot be seen on your connection. Nothing was "
        "written. Point idem_store at the database (and, in PostgreSQL, the schema) that your connection uses."
    )


class Store(ABC):
    """A place for records. Safe to share between threads, and after a fork.

    Every method raises ``StoreError`` when the store did not answer in bounded time.
    The write may have happened all the same; callers find out by reading.
    """

    url: str
    """Where it is, without any secret: for messages."""

    expires: ClassVar[bool] = False
    """Values go by themselves when their time is over, so nobody need call ``purge``."""

    durabilities: ClassVar[tuple[str, ...]] = ()
    """Values of ``idem_durability`` that it honours beyond "none"."""

    @abstractmethod
    def create(self, key: str, value: bytes, ttl: int | None = None) -> Reply:
        """Write ``value`` if ``key`` holds nothing; else change nothing, and return what it holds.

        ``ttl``: microseconds to keep it (a store may round up to milliseconds); None: for
        ever; 0: the write counts as done and leaves nothing.
        """

    @abstractmethod
    def read(self, key: str) -> Reply:
        """What ``key`` holds."""

    def peek(self, key: str) -> Stored | None:
        """As ``read``, for a caller who does not need the store's time: cheaper, where the store can."""
        return self.read(key).stored

    @abstractmethod
    def replace(self, key: str, old: Stored, value: bytes, ttl: int | None = None) -> Reply:
        """Write ``value`` if the stamp and the first ``OWNER`` bytes are still those of ``old``.

        The new stamp is the store's time, or one more than the old stamp where that
        is later. ``ttl`` as for ``create``; it counts from this write, and 0 deletes.
        """

    @abstractmethod
    def scan(self, prefix: str) -> Iterator[tuple[str, Stored]]:
        """All keys that begin with ``prefix``, in no order, in bounded memory.

        What is written while it runs may be missing; nothing else may. A key may
        come twice.
        """

    def scan_states(self, prefix: str, states: bytes) -> Iterator[tuple[str, Stored]]:
        """As ``scan``, for a caller who wants only values whose byte at ``codec.STATE_AT`` is in ``states``.

        A store with an index may leave out the others; the caller looks at each all the same.
        """
        return self.scan(prefix)

    @abstractmethod
    def purge(self, limit: int) -> int:
        """Delete at most ``limit`` expired values; how many. A server that expires by itself: 0."""

    def replace_many(self, changes: Sequence[Change]) -> list[Reply]:
        """Several independent replacements, in one round trip where the store can.

        Raises:
            PartlyError: one that fails does not keep the others from being made, where the store can tell them apart.
        """
        return [self.replace(*change) for change in changes]

    def inside(self, connection: Any) -> Store:
        """The same records, read and written within the transaction of a connection of the author's own.

        Raises:
            ConfigurationError: they are not in the database of that connection.
        """
        raise ConfigurationError(
            f"settle_in: the records are in {self.url}, which cannot take part in a transaction of your database. "
            "Point idem_store at that database (postgresql://… or sqlite:///…)."
        )

    def close(self) -> None:
        """Drop connections. The store may be used again; it reconnects."""

    def forked(self) -> None:
        """In a forked child, of a store given to ``tell_after_fork``: forget the parent's connections, unclosed."""


_told_after_fork: weakref.WeakSet[Store] = weakref.WeakSet()


def tell_after_fork(store: Store) -> None:
    """Have ``forked`` called in each child: it must not talk on its parent's connections."""
    _told_after_fork.add(store)


def _after_fork() -> None:
    for store in list(_told_after_fork):
        store.forked()


os.register_at_fork(after_in_child=_after_fork)
