"""The store in PostgreSQL or SQLite. A record is one row of one table.

Each primitive is one statement in its own transaction and keeps no state in the session, so a pooler may give every
transaction another connection. The first use creates the table, or an administrator does with ``schema.*.sql``.

``sql_statements`` has the statements and primitives, ``sql_connections`` our connections, ``sql_transaction`` the
author's connection.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from celery_idem.core.errors import ConfigurationError, StoreError
from celery_idem.core.model import Stored
from celery_idem.stores import sql_connections
from celery_idem.stores.base import OWNER, Change, Creation, Reply, Store, call_after_fork, elsewhere
from celery_idem.stores.sql_statements import SqlPrimitives, apart, no_table, schema, statements
from celery_idem.stores.sql_transaction import InsideTransaction

if TYPE_CHECKING:
    from sqlalchemy import URL

SCHEMES = ("sqlite", "postgresql", "postgresql+psycopg")

MANY = 1000
"""Replacements per statement: at about 300 bytes each, a third of a megabyte."""

LOCK = 0x69646D
"""Number of the advisory lock under which PostgreSQL creates the table ("idm" in ASCII). Without it, two sessions that
create the table at once get an error."""

_left_behind: list[Any] = []
"""A forked child's copies of its parent's connections. Kept, because garbage collection would close them, and SQLite
must not close in one process what another one opened."""


class SqlStore(SqlPrimitives):
    """Records in a PostgreSQL database or a SQLite file.

    Args:
        url: as SQLAlchemy takes it.
        durability: "none", or "fsync": SQLite waits for the disk at every write. PostgreSQL always does, unless its
            ``synchronous_commit`` is off.
    """

    durabilities: ClassVar[tuple[str, ...]] = ("fsync",)
    transactional = True

    def __init__(self, url: str, durability: str = "none") -> None:
        self._sa = sql_connections.sqlalchemy_module()
        try:
            parsed: URL = self._sa.make_url(url)
        except (self._sa.exc.ArgumentError, ValueError):
            raise ConfigurationError(
                "idem_store: this is no database URL. Write postgresql://user@host/database or sqlite:///file.db."
            ) from None
        if "@" in (parsed.host or ""):  # the host part is a piece of a password
            raise ConfigurationError(
                "idem_store: the database's URL has more than one @. Percent-encode the one in the password: %40."
            )
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
        self._place: Sequence[Any] = ()
        call_after_fork(self)

    def inside(self, connection: Any, first: bool = False) -> Store:
        inside = InsideTransaction(self, connection, first)
        if first and not self._is_there(inside):
            raise elsewhere(self.url)
        return inside

    def _is_there(self, inside: InsideTransaction) -> bool:
        """Tell whether an author's connection sees our table. Creates the table if it does not exist."""
        theirs = inside.place()
        if self.dialect == "sqlite":  # without a connection of ours, which would wait for the author's lock
            file, path = theirs[2], self._engine.url.database or ""
            path = path.removeprefix("file:").partition("?")[0]
            return bool(file) and os.path.realpath(os.fsdecode(file)) == os.path.realpath(path)
        if theirs != self._place:  # the first time, or after another server took over
            ours = tuple(self._rows(self._sql.place, {})[0])
            if not ours[1]:
                self.make_schema()
                ours, theirs = tuple(self._rows(self._sql.place, {})[0]), inside.place()
            self._place = ours
            return theirs == ours
        return True

    def create_many(self, items: Sequence[Creation]) -> list[Reply | StoreError]:
        if not self._sql.create_many:
            return super().create_many(items)
        found: dict[str, Reply] = {}
        parameters = {
            "keys": [item.key for item in items],
            "news": [item.value for item in items],
            "ttls": [item.ttl for item in items],
            "dues": [item.due for item in items],
        }
        values = {item.key: item.value for item in items}
        for key, now, written, stamp, held in self._rows(self._sql.create_many, parameters):
            if written is not None:
                found[key] = Reply(True, Stored(values[key], written), now)
            elif stamp is not None:
                found[key] = Reply(False, Stored(bytes(held), stamp), now)
        # Another transaction wrote the missing ones after this statement had looked.
        return [found.get(item.key) or self.create(*item) for item in items]

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
                "dues": [change.due for change in some],
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

    def forked(self) -> None:
        _left_behind.append(self._engine.pool)
        self._engine.dispose(close=False)
        self._making = threading.Lock()

    def make_schema(self) -> None:
        """Create the table if it does not exist. Several processes may do so at once.

        Raises:
            StoreError: the database refused or did not answer.
        """
        text = schema(self.dialect)
        if self.dialect == "postgresql":  # several statements sent as one are one transaction
            self._run(f"SELECT pg_advisory_xact_lock({LOCK}); {text}", None)
            return
        with self._making:
            for statement in apart(text):
                self._run(statement, None)

    def query(self, statement: str) -> Sequence[Any]:
        """Run another statement, for diagnosis, and return its rows."""
        return self._run(statement, None)[0]

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
            pass
        try:
            self.make_schema()
        except _RefusedError as error:
            raise StoreError(
                f"The store {self.url} has no table celery_idem, and it cannot be created: {_why(error)}. Nothing "
                "was run. Let the owner of the database run what `celery -A proj idem schema` prints."
            ) from error
        try:
            return self._run(statement, parameters)
        except _NoTableError as error:
            raise StoreError(
                f"The table celery_idem was created in {self.url}, but is not found there ({error}). Check the user's "
                "search_path."
            ) from error

    def _run(self, statement: str, parameters: dict[str, Any] | None) -> tuple[Sequence[Any], int]:
        """Run a statement. A dead connection is replaced once.

        Sending a write twice is safe, because an owner token that only the sender knows guards it.
        """
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
                # A soft time limit may interrupt this at any point. The next user of the connection must not read
                # the reply that may still arrive.
                connection.invalidate()
                raise

    def _failure(self, error: Exception) -> StoreError:
        cause = getattr(error, "orig", None) or error
        text = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        if no_table(cause):
            return _NoTableError(text)
        state = getattr(cause, "sqlstate", None)
        if state == sql_connections.READ_ONLY:
            return StoreError(
                f"The store {self.url} only reads: it is a standby, or was demoted ({text.rstrip('.')}). Point "
                "idem_store at the primary, or name all servers: postgresql://user@/database?host=one:5432&host=two:5432."
            )
        if state == "42501":  # insufficient_privilege
            return _RefusedError(
                f"The store {self.url} refused: {text}. The user in idem_store needs more rights: the page on security "
                "has the GRANT."
            )
        return StoreError(f"The store {self.url} did not answer, or refused: {text.rstrip('.')}.")


class _RefusedError(StoreError):
    """The user lacks a right."""


def _why(error: StoreError) -> str:
    """Return the database's own message."""
    return str(getattr(error.__cause__, "orig", error.__cause__)).strip().splitlines()[0]


class _NoTableError(StoreError):
    """The table does not exist."""


def open_url(url: str, durability: str = "none") -> SqlStore:
    """Return the store for SQLAlchemy's form of a PostgreSQL or SQLite URL."""
    return SqlStore(url, durability)
