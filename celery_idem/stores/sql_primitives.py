"""The SQL store's primitives, over whatever runs a statement: a connection of ours, or one of the author's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from celery_idem.core.errors import StoreError
from celery_idem.core.model import Stored
from celery_idem.stores.base import OWNER, Reply, Store
from celery_idem.stores.sql_statements import Statements

PAGE = 500
"""Rows per statement of a scan: at about 300 bytes each, a tenth of a megabyte."""

TRIES = 20
"""How often ``create`` starts over because the row it ran into was gone, or not yet visible,
when it looked. Each time somebody else has written in between."""


class SqlPrimitives(Store):
    """The primitives over a way to run a statement; where it runs is the subclass's matter."""

    dialect: str
    _sql: Statements

    def _rows(self, statement: str, parameters: dict[str, Any]) -> Sequence[Any]:
        """Run a statement; its rows."""
        raise NotImplementedError

    def create(self, key: str, value: bytes, ttl: int | None = None) -> Reply:
        for _ in range(TRIES):
            parameters = {"key": key, "value": value, "ttl": ttl}
            for now, written, stamp, held in self._rows(self._sql.create, parameters):
                if written is not None:
                    return Reply(True, Stored(value, written), now)
                if stamp is not None:
                    return Reply(False, Stored(bytes(held), stamp), now)
            if self.dialect == "sqlite":
                reply = self.read(key)
                if reply.done:
                    return reply._replace(done=False)
        raise StoreError(f"{key} changes all the time in {self.url}; nothing was written. Try again.", key)

    def read(self, key: str) -> Reply:
        ((now, stamp, value),) = self._rows(self._sql.read, {"key": key})
        if stamp is None:
            return Reply(False, None, now)
        return Reply(True, Stored(bytes(value), stamp), now)

    def replace(self, key: str, old: Stored, value: bytes, ttl: int | None = None) -> Reply:
        parameters = {
            "key": key,
            "value": value,
            "ttl": ttl,
            "stamp": old.stamp,
            "owner": old.value[:OWNER],
            "length": OWNER,
        }
        for (stamp,) in self._rows(self._sql.replace, parameters):
            return Reply(True, Stored(value, stamp), stamp)
        return self.read(key)._replace(done=False)

    def scan(self, prefix: str) -> Iterator[tuple[str, Stored]]:
        return self._scan(prefix, self._sql.scan, {})

    def scan_states(self, prefix: str, states: bytes) -> Iterator[tuple[str, Stored]]:
        if b"\x04" in states:  # nearly all rows: no index would help
            yield from self.scan(prefix)
            return
        for state in states:
            yield from self._scan(prefix, self._sql.scan_state, {"state": bytes([state])})

    def _scan(self, prefix: str, statement: str, parameters: dict[str, Any]) -> Iterator[tuple[str, Stored]]:
        """Page by page, each beginning at the last key of the one before: no cursor is held open."""
        after, seen = prefix, False
        while True:
            given = {**parameters, "after": after, "page": PAGE}
            rows = self._rows(statement, given)
            for key, stamp, value in rows:
                if not key.startswith(prefix):
                    return
                if not (seen and key == after):
                    yield key, Stored(bytes(value), stamp)
            if len(rows) < PAGE:
                return
            after, seen = rows[-1][0], True

    def purge(self, limit: int) -> int:
        return self._count(self._sql.purge, {"limit": limit})

    def _count(self, statement: str, parameters: dict[str, Any]) -> int:
        """Run a statement; how many rows it wrote."""
        raise NotImplementedError


def no_table(error: BaseException) -> bool:
    """A driver's error says that the table is not there (and not that another one is missing)."""
    code = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)  # psycopg 3, psycopg 2
    return "celery_idem" in str(error) and (code == "42P01" or "no such table" in str(error))
