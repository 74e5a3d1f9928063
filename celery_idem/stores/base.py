"""The interface of stores: bytes by key, and the store's own clock.

A value is kept with a *stamp*: the store's time of the last write, in microseconds. The stamps of one key only
grow, so the stamp is also the version. ``celery_idem.testing.StoreConformance`` tests the primitives.

The *index of what is open* has the keys of open records, by the time at which a worker or a person has to look at them.
A write gives this time with ``due``, and the index changes in the same step. The index is a hint: entries may be wrong
or missing, and the record decides.

Without ``from __future__ import annotations``, as in ``core.model``: named tuples would compile their fields' types.
"""

import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from celery_idem.core.errors import ConfigurationError, StoreError
from celery_idem.core.model import Stored

OWNER = 12
"""Length of the owner token at the beginning of every value. A replacement compares it and the stamp."""

KEEP = -1
"""A ``ttl`` of a replacement: the new value expires when the old one would have expired."""


class Reply(NamedTuple):
    """The answer of ``create``, ``read`` and ``replace``.

    Attributes:
        done: this call wrote (``read``: there is a value).
        stored: what the key holds now; None for nothing.
        now: the store's time, in microseconds.
    """

    done: bool
    stored: Stored | None
    now: int


class Change(NamedTuple):
    """One replacement of ``old`` at ``key`` by ``value``. ``ttl`` and ``due`` are as for ``Store.replace``."""

    key: str
    old: Stored
    value: bytes
    ttl: int | None = None
    due: int | None = None


class Creation(NamedTuple):
    """One value to create; as for ``Store.create``."""

    key: str
    value: bytes
    ttl: int | None = None
    due: int | None = None


class Mark(NamedTuple):
    """A correction of the index, which is made only if the key's stamp is still ``stamp``.

    Attributes:
        stamp: stamp of the value that was read; 0 for none.
        due: the corrected entry, as for ``Store.create``.
    """

    key: str
    stamp: int
    due: int | None


class Listed(NamedTuple):
    """An entry of the index.

    Attributes:
        at: the time to look, by the index, in microseconds.
        stored: what the key holds now; None for nothing.
    """

    key: str
    at: int
    stored: Stored | None


class NoIndexError(StoreError):
    """The index of what is open was never built, or is lost. The caller rebuilds it: ``mark``, then ``indexed``."""


class Announcement(NamedTuple):
    """A second value, written and published together with a record.

    Attributes:
        key: its key, which is also the channel. Both are used without a prefix.
        seconds: how long to keep it; None: for ever.
    """

    key: bytes
    value: bytes
    seconds: int | None


class PartlyError(StoreError):
    """Some of several replacements failed.

    Attributes:
        replies: in order; None for those that failed.
    """

    def __init__(self, first: StoreError, replies: Sequence[Reply | None]) -> None:
        super().__init__(str(first), first.key)
        self.replies = replies


def elsewhere(url: str) -> ConfigurationError:
    """Return the error for a connection from which the store's records cannot be reached."""
    return ConfigurationError(
        f"settle_in and submit_in: the records of intents are in {url}, and cannot be seen on your connection. Nothing "
        "was written. Point idem_store at the database (and, in PostgreSQL, the schema) that your connection uses."
    )


class Store(ABC):
    """A store of records. Threads share it, and it survives a fork.

    Every method raises ``StoreError`` when the store does not answer in bounded time. The write may have happened
    nevertheless; the caller reads to find out.
    """

    url: str
    """The address to show in messages, without secrets."""

    expires: ClassVar[bool] = False
    """The server deletes expired values itself, so ``purge`` is not needed."""

    durabilities: ClassVar[tuple[str, ...]] = ()
    """Values of ``idem_durability`` that this store supports besides "none"."""

    transactional: ClassVar[bool] = False
    """``inside`` works here."""

    announces: ClassVar[bool] = False
    """``announce`` works here."""

    @abstractmethod
    def create(self, key: str, value: bytes, ttl: int | None = None, due: int | None = None) -> Reply:
        """Write ``value`` if ``key`` holds nothing; otherwise return what it holds.

        ``ttl`` is how many microseconds to keep the value; a store may round up to milliseconds. None keeps it
        for ever. With 0 the write counts as done and leaves nothing.

        ``due`` is how many microseconds after the stamp of this write a worker or a person has to look: the key is in
        the index of what is open, with that time. None takes it out of the index.
        """

    @abstractmethod
    def read(self, key: str) -> Reply:
        """Return what ``key`` holds."""

    def peek(self, key: str) -> Stored | None:
        """As ``read``, without the store's time, which makes it cheaper in some stores."""
        return self.read(key).stored

    @abstractmethod
    def replace(
        self, key: str, old: Stored, value: bytes, ttl: int | None = None, due: int | None = None
    ) -> Reply:
        """Write ``value`` if the stamp and the first ``OWNER`` bytes are still those of ``old``.

        The new stamp is the store's time, or the old stamp plus one if that is later. ``ttl`` and ``due`` are as for
        ``create`` and count from this write; ``ttl`` 0 deletes, and ``KEEP`` keeps the old time of expiry.
        """

    @abstractmethod
    def scan(self, prefix: str) -> Iterator[tuple[str, Stored]]:
        """Return all keys that begin with ``prefix``, in no order and in bounded memory.

        Keys that are written during the scan may be missing. A key may come twice.
        """

    @abstractmethod
    def open(self, prefix: str, before: int | None = None) -> Iterator[Listed]:
        """Return the entries of the index whose keys begin with ``prefix``, the earliest first.

        Args:
            prefix: a whole namespace with its colon, and maybe more. Each namespace may have its own index.
            before: only entries that are due at this time, in microseconds, or earlier.

        Raises:
            NoIndexError: entries may be missing that were written.
        """

    @abstractmethod
    def mark(self, marks: Sequence[Mark]) -> None:
        """Correct entries of the index, except those whose key was written since."""

    def indexed(self, prefix: str) -> None:
        """Note that the index of this prefix is complete, so that ``open`` does not raise.

        There is nothing to do if the index can only be lost together with the records.
        """

    @abstractmethod
    def purge(self, limit: int) -> int:
        """Delete at most ``limit`` expired values and return their number (0 if the server expires them itself)."""

    def is_at(self, options: Mapping[str, Any]) -> bool:
        """Whether these arguments of redis-py's connection pool lead to the same database, as the same user."""
        return False

    def announce(self, change: Change | Creation, also: Announcement) -> tuple[Reply, bool]:
        """As ``replace`` or ``create``, and write and publish a second value in the same step.

        Returns:
            The reply, and whether this call wrote the second value. It is never written without the first. If the
            server does not allow the second value, only the first is written.
        """
        return self.create(*change) if isinstance(change, Creation) else self.replace(*change), False

    def replace_many(self, changes: Sequence[Change]) -> list[Reply]:
        """Make several independent replacements, in one round trip if the store can.

        Raises:
            PartlyError: some of them failed. The others are made, if the store can tell them apart.
        """
        return [self.replace(*change) for change in changes]

    def create_many(self, items: Sequence[Creation]) -> list[Reply | StoreError]:
        """Make several independent creations of different keys, in one round trip if the store can.

        Returns:
            In order, what ``create`` returns, or an error that is about one key only.
        """
        replies: list[Reply | StoreError] = []
        for item in items:
            try:
                replies.append(self.create(*item))
            except StoreError as error:
                if not error.key:
                    raise
                replies.append(error)
        return replies

    def inside(self, connection: Any, first: bool = False) -> "Store":
        """Return the same records, read and written in the transaction of the author's connection.

        Args:
            first: there may be no record yet, so nothing else shows that this is another database: ask both.

        Raises:
            ConfigurationError: the connection's database does not have the records.
        """
        raise ConfigurationError(
            f"settle_in: the records of intents are in {self.url}, which cannot take part in a transaction of your "
            "database. Point idem_store at that database (postgresql://… or sqlite:///…)."
        )

    def close(self) -> None:
        """Close the connections. The next call opens new ones."""

    def forked(self) -> None:
        """In a forked child, drop the parent's connections without closing them. See ``call_after_fork``."""


_after_fork_stores: weakref.WeakSet[Store] = weakref.WeakSet()


def call_after_fork(store: Store) -> None:
    """Call ``store.forked`` in each child, which must not use its parent's connections."""
    _after_fork_stores.add(store)


def _after_fork() -> None:
    for store in list(_after_fork_stores):
        store.forked()


os.register_at_fork(after_in_child=_after_fork)
