"""The PostgreSQL and SQLite store. One row per record, in one table that anybody may read.

Each primitive is one statement in a transaction of its own, so nothing is left behind in
a session: a pooler that hands every transaction another connection is fine, and no
prepared statement is needed. The table is made at first use, or by hand from the files
``schema.*.sql``. The statements are in ``sql_statements``, and the connections that they run on in
``sql_connections``. A stamp is one more than the one before where the clock has not moved.
"""

from __future__ import annotations

import os
import re
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from celery_idem.errors import ConfigurationError, StoreError
from celery_idem.intent import Stored
from celery_idem.stores import sql_connections
from celery_idem.stores.base import OWNER, Change, Reply, Store
from celery_idem.stores.sql_statements import Statements, schema, statements

if TYPE_CHECKING:
    from sqlalchemy import URL

PAGE = 500
"""Rows per statement of a scan: at about 300 bytes each, a tenth of a megabyte."""

MANY = 1000
"""Replacements per statement: at about 300 bytes each, a third of a megabyte."""

TRIES = 20
"""How often ``create`` starts over because the row it ran into was gone, or not yet visible,
when it looked. Each time somebody else has written in between."""

LOCK = 0x69646D
"""Number of the advisory lock under which PostgreSQL makes the table: "idm" in ASCII. Two
sessions that do it at once would get an error otherwise."""


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


class SqlStore(SqlPrimitives):
    """Records in a PostgreSQL database or a SQLite file.

    Args:
        url: as SQLAlchemy takes it.
        durability: "none", or "fsync": SQLite then waits for the disk at every write.
            PostgreSQL does so anyway, unless its ``synchronous_commit`` is off.
    """

    durabilities: ClassVar[tuple[str, ...]] = ("fsync",)

    def __init__(self, url: str, durability: str = "none") -> None:
        self._sa = sql_connections.sqlalchemy_module()
        try:
            parsed: URL = self._sa.make_url(url)
        except (self._sa.exc.ArgumentError, ValueError):
            raise ConfigurationError(
                "idem_store: this is no database URL. Write postgresql://user@host/database or sqlite:///file.db."
            ) from None
        self.dialect = parsed.get_backend_name()
        self.url = sql_connections.shown(parsed)
        if durability.startswith("replicas"):
            raise ConfigurationError(
                f"idem_durability={durability!r} is for Redis. In PostgreSQL the server's own "
                "synchronous_standby_names makes every commit wait for replicas; SQLite has none."
            )
        if self.dialect == "sqlite":
            self._engine = sql_connections.sqlite_engine(self._sa, parsed, durability == "fsync")
        else:
            self._engine = sql_connections.postgresql_engine(self._sa, parsed)
        paramstyle = "named" if self.dialect == "sqlite" else "pyformat"
        self._sql = statements(self.dialect, paramstyle)
        self._making = threading.Lock()
        _forget_connections_after_fork(self)

    def inside(self, connection: Any) -> Store:
        from celery_idem.stores.sql_transaction import InsideTransaction

        return InsideTransaction(self, connection)

    def replace_many(self, changes: Sequence[Change]) -> list[Reply]:
        if not self._sql.replace_many:
            return super().replace_many(changes)
        written: dict[tuple[str, int], int] = {}
        for first in range(0, len(changes), MANY):
            some = changes[first : first + MANY]
            parameters = {
                "keys": [change.key for change in some],
                "stamps": [change.old.stamp for change in some],
                "owners": [change.old.value[:OWNER] for change in some],
                "news": [change.value for change in some],
                "ttls": [change.ttl for change in some],
                "length": OWNER,
            }
            for key, was, stamp in self._rows(self._sql.replace_many, parameters):
                written[key, was] = stamp
        replies = []
        for change in changes:
            stamp = written.get((change.key, change.old.stamp))
            if stamp is None:
                replies.append(self.read(change.key)._replace(done=False))
            else:
                replies.append(Reply(True, Stored(change.value, stamp), stamp))
        return replies

    def close(self) -> None:
        self._engine.dispose()

    def make_schema(self) -> None:
        """Make the table if it is not there. Several processes may do so at once.

        Raises:
            StoreError: the database refused, or did not answer.
        """
        text = schema(self.dialect)
        if self.dialect == "postgresql":  # several statements sent as one are one transaction
            self._run(f"SELECT pg_advisory_xact_lock({LOCK}); {text}", None)
            return
        with self._making:
            for statement in re.sub(r"--.*", "", text).split(";"):
                if statement.strip():
                    self._run(statement, None)

    # --- running a statement ----------------------------------------------------------

    def _rows(self, statement: str, parameters: dict[str, Any]) -> Sequence[Any]:
        rows: Sequence[Any] = self._with_table(statement, parameters)[0]
        return rows

    def _count(self, statement: str, parameters: dict[str, Any]) -> int:
        return self._with_table(statement, parameters)[1]

    def _with_table(self, statement: str, parameters: dict[str, Any]) -> tuple[Sequence[Any], int]:
        try:
            return self._run(statement, parameters)
        except _NoTableError:
            self.make_schema()
        try:
            return self._run(statement, parameters)
        except _NoTableError as error:
            raise StoreError(f"The store {self.url} has no table celery_idem: {error}") from error

    def _run(self, statement: str, parameters: dict[str, Any] | None) -> tuple[Sequence[Any], int]:
        """A connection that turns out to be dead is replaced once: every write here may be
        sent twice, because it is guarded by an owner that only its sender knows."""
        give_up = time.monotonic() + sql_connections.TIMEOUT
        try:
            return self._once(statement, parameters)
        except self._sa.exc.DBAPIError as error:
            if not error.connection_invalidated or time.monotonic() > give_up:
                raise self._failure(error) from error
        except self._sa.exc.SQLAlchemyError as error:  # no connection came free
            raise self._failure(error) from error
        try:
            return self._once(statement, parameters)
        except self._sa.exc.SQLAlchemyError as error:
            raise self._failure(error) from error

    def _once(self, statement: str, parameters: dict[str, Any] | None) -> tuple[Sequence[Any], int]:
        with self._engine.connect() as connection:
            try:
                result = connection.exec_driver_sql(statement, parameters)
                return (result.all() if result.returns_rows else ()), result.rowcount
            except self._sa.exc.DBAPIError:
                raise  # SQLAlchemy knows whether the connection can go on
            except BaseException:
                # A time limit's exception may come at any line: a reply may be under way
                # that belongs to nobody any more.
                connection.invalidate()
                raise

    def _failure(self, error: Exception) -> StoreError:
        cause = getattr(error, "orig", None) or error
        text = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        if no_table(cause):
            return _NoTableError(text)
        return StoreError(f"The store {self.url} did not answer, or refused: {text}")


class _NoTableError(StoreError):
    """The table is not there."""


def no_table(error: BaseException) -> bool:
    """A driver's error says that the table is not there (and not that another one is missing)."""
    code = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)  # psycopg 3, psycopg 2
    return "celery_idem" in str(error) and (code == "42P01" or "no such table" in str(error))


def open_sql(url: str, durability: str = "none") -> SqlStore:
    """The store for SQLAlchemy's form of a PostgreSQL or SQLite URL."""
    return SqlStore(url, durability)


_registered: list[bool] = []
_stores: weakref.WeakSet[SqlStore] = weakref.WeakSet()
_left_behind: list[Any] = []
"""A forked child's copies of its parent's connections. Kept, because SQLite must not close
in one process what was opened in another, and forgetting them would."""


def _forget_connections_after_fork(store: SqlStore) -> None:
    if not _registered:
        _registered.append(True)
        os.register_at_fork(after_in_child=_after_fork)
    _stores.add(store)


def _after_fork() -> None:
    for store in list(_stores):
        _left_behind.append(store._engine.pool)
        store._engine.dispose(close=False)
        store._making = threading.Lock()
