"""PostgreSQL and SQLite. One row per record, in one table that anybody may read.

Each primitive is one statement in a transaction of its own, so nothing is left behind in
a session: a pooler that hands every transaction another connection is fine, and no
prepared statement is needed. The table is made at first use, or by hand from the files
``schema.*.sql``. SQLAlchemy gives the pool and the drivers; the statements are written
out below, because they have to run on an author's own connection too (``sql_transaction``).

The clock is PostgreSQL's ``clock_timestamp()``, and SQLite's ``julianday('now')``, which counts
milliseconds: a stamp is one more than the one before where the clock has not moved.
"""

from __future__ import annotations

import os
import re
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from celery_idem.errors import ConfigurationError, StoreError
from celery_idem.intent import Stored
from celery_idem.stores.base import OWNER, Reply, Store

if TYPE_CHECKING:
    from sqlalchemy import URL
    from sqlalchemy.engine import Engine

TIMEOUT = 5.0
"""Seconds to wait for a connection, an answer or a lock: the Redis stores' own."""

IDLE, MOST = 5, 20
"""Connections kept and connections at most, per process. A call takes one for about a
millisecond, so twenty are busy only when the database hangs, and then more would not help.
A prefork child has two: its body's and the lease thread's."""

PAGE = 500
"""Rows per statement of a scan: at about 300 bytes each, a tenth of a megabyte."""

TRIES = 20
"""How often ``create`` starts over because the row it ran into was gone, or not yet visible,
when it looked. Each time somebody else has written in between."""

LOCK = 0x69646D
"""Number of the advisory lock under which PostgreSQL makes the table: "idm" in ASCII. Two
sessions that do it at once would get an error otherwise."""


# --- statements: `:name` is a parameter, {now} the store's time in microseconds ----------
# SQLite's 'now' stands still during a statement; PostgreSQL's clock does not, so it is read once.

_NOW = {
    "postgresql": "CAST(extract(epoch FROM clock_timestamp()) * 1000000 AS bigint)",
    "sqlite": "CAST(round((julianday('now') - 2440587.5) * 86400000) AS integer) * 1000",
}
_GREATEST = {"postgresql": "greatest", "sqlite": "max"}
_BYTE_4 = {"postgresql": r"'\x04'::bytea", "sqlite": "x'04'"}

# The key is looked up first, so that a duplicate, which is most of what comes here twice, writes
# nothing and waits for no lock. The insert then meets nothing, an expired row, or a row so new
# that this statement cannot see it: then it writes nothing, and the caller starts over.
_CREATE_POSTGRESQL = """
WITH clock AS MATERIALIZED (SELECT {now} AS now),
held AS MATERIALIZED (
  SELECT stamp, value FROM celery_idem, clock WHERE key = :key AND (expires IS NULL OR expires > now)
),
written AS (
  INSERT INTO celery_idem AS there (key, stamp, value, expires)
  SELECT :key, now, :value, now + :ttl FROM clock WHERE NOT EXISTS (SELECT 1 FROM held)
  ON CONFLICT (key) DO UPDATE
  SET stamp = greatest(excluded.stamp, there.stamp + 1), value = excluded.value, expires = excluded.expires
  WHERE there.expires <= excluded.stamp
  RETURNING stamp
)
SELECT now, written.stamp, held.stamp, held.value
FROM clock LEFT JOIN written ON true LEFT JOIN held ON true
"""

_CREATE_SQLITE = """
INSERT INTO celery_idem AS there (key, stamp, value, expires) VALUES (:key, {now}, :value, {now} + :ttl)
ON CONFLICT (key) DO UPDATE
SET stamp = max(excluded.stamp, there.stamp + 1), value = excluded.value, expires = excluded.expires
WHERE there.expires <= excluded.stamp
RETURNING stamp, stamp, NULL, NULL
"""

_READ = """
SELECT clock.now, held.stamp, held.value
FROM (SELECT {now} AS now) AS clock
LEFT JOIN celery_idem AS held ON held.key = :key AND (held.expires IS NULL OR held.expires > clock.now)
"""

_REPLACE = """
UPDATE celery_idem
SET stamp = {greatest}(clock.now, stamp + 1), value = :value, expires = clock.now + :ttl
FROM (SELECT {now} AS now) AS clock
WHERE key = :key AND stamp = :stamp AND substr(value, 1, :length) = :owner
  AND (expires IS NULL OR expires > clock.now)
RETURNING stamp
"""

_SCAN = """
SELECT key, stamp, value
FROM celery_idem, (SELECT {now} AS now) AS clock
WHERE key >= :after AND (expires IS NULL OR expires > clock.now)
ORDER BY key LIMIT :page
"""

# The comparison with byte 4 says nothing new; it is what lets the planner use the partial index.
_SCAN_STATE = """
SELECT key, stamp, value
FROM celery_idem, (SELECT {now} AS now) AS clock
WHERE substr(value, 14, 1) = :state AND substr(value, 14, 1) <> {byte_4}
  AND key >= :after AND (expires IS NULL OR expires > clock.now)
ORDER BY key LIMIT :page
"""

_PURGE = """
DELETE FROM celery_idem WHERE key IN (
  SELECT key FROM celery_idem WHERE expires <= {now} ORDER BY expires LIMIT :limit
)
"""

# Rows that somebody else is purging, or replacing, are left to them.
_PURGE_POSTGRESQL = """
WITH gone AS MATERIALIZED (
  SELECT key FROM celery_idem WHERE expires <= (SELECT {now}) ORDER BY expires LIMIT :limit
  FOR UPDATE SKIP LOCKED
)
DELETE FROM celery_idem USING gone WHERE celery_idem.key = gone.key
"""


class Statements(NamedTuple):
    """Every statement, in the spelling of one database and one style of parameters."""

    create: str
    read: str
    replace: str
    scan: str
    scan_state: str
    purge: str


def statements(dialect: str, paramstyle: str) -> Statements:
    """The statements for a database.

    Args:
        dialect: "postgresql" or "sqlite".
        paramstyle: "named" (``:key``) or "pyformat" (``%(key)s``), see PEP 249.
    """
    postgresql = dialect == "postgresql"
    texts = (
        _CREATE_POSTGRESQL if postgresql else _CREATE_SQLITE,
        _READ,
        _REPLACE,
        _SCAN,
        _SCAN_STATE,
        _PURGE_POSTGRESQL if postgresql else _PURGE,
    )
    names = {"now": _NOW[dialect], "greatest": _GREATEST[dialect], "byte_4": _BYTE_4[dialect]}
    spelled = [text.format(**names) for text in texts]
    if paramstyle == "pyformat":
        spelled = [re.sub(r"(?<!:):([a-z]+)", r"%(\1)s", text) for text in spelled]
    return Statements(*spelled)


def schema(dialect: str) -> str:
    """The statements that make the table, to read and to run by hand.

    Args:
        dialect: "postgresql" or "sqlite".

    Raises:
        ConfigurationError: it is another one.
    """
    if dialect not in _NOW:
        raise ConfigurationError(f"There is no table for {dialect!r}: use one of {', '.join(_NOW)}.")
    return files("celery_idem.stores").joinpath(f"schema.{dialect}.sql").read_text()


# --- the store ---------------------------------------------------------------------------


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
        self._sa = _sqlalchemy()
        try:
            parsed: URL = self._sa.make_url(url)
        except (self._sa.exc.ArgumentError, ValueError):
            raise ConfigurationError(
                "idem_store: this is no database URL. Write postgresql://user@host/database or sqlite:///file.db."
            ) from None
        self.dialect = parsed.get_backend_name()
        self.url = _shown(parsed)
        if durability.startswith("replicas"):
            raise ConfigurationError(
                f"idem_durability={durability!r} is for Redis. In PostgreSQL the server's own "
                "synchronous_standby_names makes every commit wait for replicas; SQLite has none."
            )
        if self.dialect == "sqlite":
            self._engine = _sqlite_engine(self._sa, parsed, durability == "fsync")
        else:
            self._engine = _postgresql_engine(self._sa, parsed)
        paramstyle = "named" if self.dialect == "sqlite" else "pyformat"
        self._sql = statements(self.dialect, paramstyle)
        self._making = threading.Lock()
        _forget_connections_after_fork(self)

    def inside(self, connection: Any) -> Store:
        from celery_idem.stores.sql_transaction import InsideTransaction

        return InsideTransaction(self, connection)

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
        give_up = time.monotonic() + TIMEOUT
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


# --- connections -------------------------------------------------------------------------


def _sqlalchemy() -> Any:
    try:
        import sqlalchemy
    except ImportError as error:
        raise ConfigurationError(
            f"idem_store: a database as store needs another package ({error}): pip install 'celery_idem[sql]'"
        ) from None
    return sqlalchemy


def _shown(url: URL) -> str:
    """The URL without user, password and query: safe in a log."""
    host = f"{url.host or ''}:{url.port}" if url.port else url.host or ""
    return f"{url.get_backend_name()}://{host}/{url.database or ''}"


def _sqlite_engine(sa: Any, url: URL, fsync: bool) -> Engine:
    import sqlite3

    if sqlite3.sqlite_version_info < (3, 35):  # the first that knows RETURNING
        raise ConfigurationError(
            f"idem_store: this Python has SQLite {sqlite3.sqlite_version}; sqlite:// needs 3.35 or newer."
        )
    if url.database in (None, "", ":memory:"):
        raise ConfigurationError(
            "idem_store: a SQLite database in memory is another one for each connection. Name a file, "
            "sqlite:///idem.db, or use memory:// for tests."
        )
    engine: Engine = sa.create_engine(
        url,
        isolation_level="AUTOCOMMIT",
        pool_size=IDLE,
        max_overflow=MOST - IDLE,
        pool_timeout=TIMEOUT,
        connect_args={"timeout": TIMEOUT},
        hide_parameters=True,
    )

    def set_up(connection: sqlite3.Connection, _: Any) -> None:
        _write_ahead(connection)
        # NORMAL loses the last writes when the machine loses power, and none when a process is killed.
        connection.execute(f"PRAGMA synchronous = {'FULL' if fsync else 'NORMAL'}")

    sa.event.listen(engine, "connect", set_up)
    return engine


def _write_ahead(connection: Any) -> None:
    """Readers and the writer then do not wait for each other. The switch is the one thing for
    which SQLite does not wait by itself, when several processes open a new file at once."""
    import sqlite3

    give_up = time.monotonic() + TIMEOUT
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() > give_up:
                raise
            threading.Event().wait(0.01)  # the other process needs about a millisecond


def _postgresql_engine(sa: Any, url: URL) -> Engine:
    try:
        connect = _bounded_connect()
    except ImportError as error:
        raise ConfigurationError(
            f"idem_store: postgresql:// needs another package ({error}): pip install 'celery_idem[sql]'"
        ) from None
    url = url.set(drivername="postgresql+psycopg")
    arguments, options = url.get_dialect()().create_connect_args(url)
    options.setdefault("connect_timeout", int(TIMEOUT))
    options.setdefault("application_name", "celery_idem")

    def creator() -> Any:
        # Without server-side prepared statements: behind a pooler the next transaction has another server.
        return connect(*arguments, prepare_threshold=None, **options)

    engine: Engine = sa.create_engine(
        url,
        creator=creator,
        isolation_level="AUTOCOMMIT",
        pool_size=IDLE,
        max_overflow=MOST - IDLE,
        pool_timeout=TIMEOUT,
        use_native_hstore=False,  # saves a question at connecting, about a type that is not used here
        hide_parameters=True,
    )
    return engine


def _bounded_connect() -> Any:
    """psycopg's ``connect``, of connections that wait at most ``TIMEOUT`` for any answer.

    The server's own ``statement_timeout`` would be state of a session, and a server that
    hangs would not keep it.
    """
    import psycopg

    class BoundedConnection(psycopg.Connection[Any]):
        def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
            return super().wait(self._bounded(gen), *args, **kwargs)

        def _bounded(self, gen: Any) -> Any:
            """The same conversation with the driver's loop, which looks in here ten times a second."""
            give_up = time.monotonic() + TIMEOUT
            try:
                wanted = next(gen)
                while True:
                    ready = yield wanted
                    if not ready and time.monotonic() > give_up:
                        self.pgconn.finish()  # an answer that comes now belongs to nobody
                        raise psycopg.OperationalError(f"no answer within {TIMEOUT:g} s")
                    wanted = gen.send(ready)
            except StopIteration as end:
                return end.value

    return BoundedConnection.connect


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
