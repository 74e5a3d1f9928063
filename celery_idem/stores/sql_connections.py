"""Connections to PostgreSQL and SQLite whose every wait has an end, in a pool of SQLAlchemy's."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

from celery_idem.core.errors import ConfigurationError

if TYPE_CHECKING:
    from sqlalchemy import URL
    from sqlalchemy.engine import Engine

TIMEOUT = 5.0
"""Seconds to wait for a connection, an answer or a lock: the Redis stores' own."""

IDLE, MOST = 5, 20
"""Connections kept and connections at most, per process. A call takes one for about a
millisecond, so twenty are busy only when the database hangs, and then more would not help.
A prefork child has two: its body's and the lease thread's."""


READ_ONLY = "25006"
"""SQLSTATE of a write that meets a server which is no primary (any more)."""


def sqlalchemy_module() -> Any:
    """SQLAlchemy, imported.

    Raises:
        ConfigurationError: it is not installed.
    """
    try:
        import sqlalchemy
    except ImportError as error:
        raise ConfigurationError(
            f"idem_store: a database as store needs another package ({error}): pip install 'celery_idem[sql]'"
        ) from None
    return sqlalchemy


def shown(url: URL) -> str:
    """The URL without user, password and query: safe in a log."""
    host = f"{url.host or ''}:{url.port}" if url.port else url.host or ""
    several = url.query.get("host", ())
    host = host or ",".join([several] if isinstance(several, str) else several)
    return f"{url.get_backend_name()}://{host}/{url.database or ''}"


def sqlite_engine(sa: Any, url: URL, fsync: bool) -> Engine:
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
    if "," in str(
        options.get("host", "")
    ):  # the first that answers may be a standby, or the primary of before
        options.setdefault("target_session_attrs", "read-write")

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
    sa.event.listen(engine, "handle_error", _drop_what_leads_nowhere)
    return engine


def _drop_what_leads_nowhere(context: Any) -> None:
    """Have SQLAlchemy drop all connections after an error that only a new one can mend.

    It does so by itself when the driver has closed one. But after a switchover they may live on, with a server
    that only reads; and a pooler between may report its own broken connection as an ordinary error.
    """
    error = context.original_exception
    code = getattr(error, "sqlstate", None) or ""
    severity = getattr(getattr(error, "diag", None), "severity_nonlocalized", None)
    if code == READ_ONLY or code.startswith(("08", "57P")) or severity in ("FATAL", "PANIC"):
        context.is_disconnect = True


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
