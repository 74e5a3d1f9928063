"""A model of a database that holds the author's rows and our records, for `on_crash="transaction"`.

Others see the writes of a transaction when it commits. Until it ends, others that write the record wait. A commit may
fail. A commit may also be sent and answered by an error; then the row stays locked until the database has carried the
commit out. If a process dies before it sends the commit, its transaction is rolled back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from celery_idem.core.model import Stored
from celery_idem.stores.base import OWNER, Listed, Mark, Reply, Store
from celery_idem.stores.memory import MemoryStore

if TYPE_CHECKING:
    from tests.proof.explorer import Actor, World


class Lock(NamedTuple):
    """The record as one uncommitted transaction has written it.

    Attributes:
        holder: name of the execution.
        sent: the commit is under way, so it no longer matters whether the execution is alive.
    """

    holder: object
    value: bytes
    sent: bool = False


class LostCommit(Exception):
    """The driver's error for a commit that failed or was not answered."""


class Inside(Store):
    """The store as one transaction sees it."""

    url = "model:"

    def __init__(self, world: World, actor: Actor, insert: Callable[[], None]) -> None:
        self.world = world
        self.actor = actor
        self.insert = insert
        self._commit: Callable[[], Reply] | None = None

    def create(self, key: str, value: bytes, ttl: int | None = None, due: int | None = None) -> Reply:
        raise AssertionError("a transaction settles a record that is there")

    def scan(self, prefix: str) -> Iterator[tuple[str, Stored]]:
        raise AssertionError("not here")

    def purge(self, limit: int) -> int:
        raise AssertionError("not here")

    def open(self, prefix: str, before: int | None = None) -> Iterator[Listed]:
        raise AssertionError("not here")

    def mark(self, marks: Sequence[Mark]) -> None:
        raise AssertionError("not here")

    def read(self, key: str) -> Reply:
        return self.world.store.read(key)

    def replace(
        self, key: str, old: Stored, value: bytes, ttl: int | None = None, due: int | None = None
    ) -> Reply:
        """Lock the record, and prepare the write for the commit."""
        world = self.world
        world.tell(self.actor, (old, value))
        choice = world.pause_at("lock")
        if choice == "down":
            raise LostCommit("no answer")
        held, now = world.store.held(), world.clock.now
        if held is None or (held.stamp, held.value[:OWNER]) != (old.stamp, old.value[:OWNER]):
            reply = Reply(False, held, now)
        else:
            world.lock = Lock(self.actor.name, value)
            reply = Reply(True, Stored(value, max(now, held.stamp + 1)), now)

            def commit() -> Reply:
                world.lock = None
                self.insert()
                return MemoryStore.replace(world.store, key, old, value, ttl, due)

            self._commit = commit
        world.tell(self.actor, reply)
        return reply

    def commit(self) -> None:
        """Commit the rows and the record together."""
        world = self.world
        choice = world.pause_at("commit")
        commit = self._commit
        assert commit is not None
        if choice == "rollback":
            raise LostCommit("rolled back")
        if choice == "late":
            assert world.lock is not None
            world.ghosts.append((("commit", world.lock.value), self.actor, commit))
            world.lock = world.lock._replace(sent=True)
            raise LostCommit("no answer")
        world.apply(self.actor, commit)
        if choice == "soft after":
            raise world.soft_limit()

    def rollback(self) -> None:
        """End a transaction that did not commit."""
        lock = self.world.lock
        if lock is not None and lock.holder == self.actor.name and not lock.sent:
            self.world.lock = None
