"""SQLAlchemy engines for PostgreSQL and SQLite in which every wait is bounded."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

from celery_idem.core.errors import ConfigurationError

if TYPE_CHECKING:
    from sqlalchemy import URL
    from sqlalchemy.engine import Engine

TIMEOUT = 5.0
"""Seconds to wait for a connection, an answer or a lock, as in the Redis stores."""

IDLE, MOST = 5, 20
"""Connections kept open, and their maximum, per process. A call uses one for about a millisecond, so twenty are in use
only when the database hangs. A prefork child has two: the task body's and the lease thread's."""

READ_ONLY = "25006"
"""SQLSTATE of a write to a server that is not the primary (any more)."""


def sqlalchemy_module() -> Any:
    """Import SQLAlchemy. Raises ``ConfigurationError``: it is not installed."""
    try:
        import sqlalchemy
    except ImportError as error:
        raise ConfigurationError(
            f"idem_store: a database as store needs another package ({error}): pip install 'celery_idem[sql]'"
        ) from None
    return sqlalchemy


def shown(url: URL) -> str:
    """Return the URL without user, password and query, for logs."""
    host = f"{url.host or ''}:{url.port}" if url.port else url.host or ""
    several = url.query.get("host", ())
    host = host or ",".join([several] if isinstance(several, str) else several)
    return f"{url.get_backend_name()}://{host}/{url.database or ''}"


def sqlite_engine(sa: Any, url: URL, fsync: bool) -> Engine:
    import sqlite3

    if sqlite3.sqlite_version_info < (3, 35):  # the first version with RETURNING
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
        # NORMAL loses the last writes at a power cut, and none when a process is killed.
        connection.execute(f"PRAGMA synchronous = {'FULL' if fsync else 'NORMAL'}")

    sa.event.listen(engine, "connect", set_up)
    return engine


def _write_ahead(connection: Any) -> None:
    """Switch to write-ahead logging, so that readers and the writer do not wait for each other.

    SQLite itself does not wait for this switch when several processes open a new file at once.
    """
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


def postgresql_engine(sa: Any, url: URL) -> Engine:
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
    if "," in str(options.get("host", "")):  # the first server that answers may be a standby
        options.setdefault("target_session_attrs", "read-write")

    def creator() -> Any:
        # No server-side prepared statements: behind a pooler the next transaction has another session.
        return connect(*arguments, prepare_threshold=None, **options)

    engine: Engine = sa.create_engine(
        url,
        creator=creator,
        isolation_level="AUTOCOMMIT",
        pool_size=IDLE,
        max_overflow=MOST - IDLE,
        pool_timeout=TIMEOUT,
        use_native_hstore=False,  # saves a query per connection, about a type that is not used here
        hide_parameters=True,
    )
    sa.event.listen(engine, "handle_error", _mark_disconnects)
    return engine


def _mark_disconnects(context: Any) -> None:
    """Make SQLAlchemy drop all connections after an error that only a new connection can solve.

    SQLAlchemy does so itself when the driver has closed one. But after a switchover the connections may stay open to a
    server that is read-only, and a pooler may report its own broken connection as an ordinary error.
    """
    error = context.original_exception
    code = getattr(error, "sqlstate", None) or ""
    severity = getattr(getattr(error, "diag", None), "severity_nonlocalized", None)
    if code == READ_ONLY or code.startswith(("08", "57P")) or severity in ("FATAL", "PANIC"):
        context.is_disconnect = True


def _bounded_connect() -> Any:
    """Return psycopg's ``connect`` for connections that wait at most ``TIMEOUT`` for any answer.

    ``statement_timeout`` would be session state, and a server that hangs would not enforce it.
    """
    import psycopg

    class BoundedConnection(psycopg.Connection[Any]):
        def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
            return super().wait(self._bounded(gen), *args, **kwargs)

        def _bounded(self, gen: Any) -> Any:
            """Wrap the driver's generator, which psycopg resumes ten times a second, with a deadline."""
            give_up = time.monotonic() + TIMEOUT
            try:
                wanted = next(gen)
                while True:
                    ready = yield wanted
                    if not ready and time.monotonic() > give_up:
                        self.pgconn.finish()  # the next caller must not read a late answer
                        raise psycopg.OperationalError(f"no answer within {TIMEOUT:g} s")
                    wanted = gen.send(ready)
            except StopIteration as end:
                return end.value

    return BoundedConnection.connect
