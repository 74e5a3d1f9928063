"""Runs the SQL store's statements in a transaction of the author's own connection.

The connection is a SQLAlchemy session or connection, a psycopg connection, Django's ``connections["default"]`` or a
``sqlite3`` connection. Drivers are recognised by their attributes and not imported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from celery_idem.core.errors import ConfigurationError
from celery_idem.stores.base import elsewhere
from celery_idem.stores.sql_statements import SqlPrimitives, apart, no_table, schema, statements


class InsideTransaction(SqlPrimitives):
    """The primitives on an author's connection. The author's commit makes their writes visible.

    Args:
        store: the store that keeps the records.
        connection: the author's connection.
        makes: create the table in SQLite if it does not exist, in the author's transaction: its lock keeps our own
            connection out.

    Raises:
        ConfigurationError: the kind of connection is not supported, or the database is of another kind.
    """

    def __init__(self, store: SqlPrimitives, connection: Any, makes: bool = False) -> None:
        self.url = store.url
        self._at = _opened(connection)
        self.dialect = self._at.dialect
        if self.dialect != store.dialect:
            raise ConfigurationError(
                f"This connection is to {self.dialect}, and the records of intents are in {store.url}. They can only "
                "be committed with your rows when both are in one database."
            )
        self._sql = statements(self.dialect, self._at.paramstyle)
        self._makes = makes and self.dialect == "sqlite"

    def place(self) -> Sequence[Any]:
        """Return what ``SqlStore`` compares with its own."""
        place: Sequence[Any] = tuple(self._rows(self._sql.place, {})[0])
        return place

    def _rows(self, statement: str, parameters: dict[str, Any]) -> Sequence[Any]:
        if not _in_transaction(self._at.driver()):
            raise ConfigurationError(
                "This connection has no transaction open and commits every statement by itself, so the record would "
                "not be committed together with your rows. Use settle_in and submit_in inside a transaction: "
                "engine.begin(), connection.transaction(), transaction.atomic()."
            )
        try:
            return self._at.run(statement, parameters)
        except Exception as error:  # any driver's error; the author's code handles it
            if not no_table(getattr(error, "orig", None) or error.__cause__ or error):
                raise
            if not self._makes:
                raise elsewhere(self.url) from error
        self._makes = False
        for one in apart(schema(self.dialect)):
            self._at.run(one, {})
        return self._at.run(statement, parameters)


class _At(NamedTuple):
    """An author's connection.

    Attributes:
        run: runs a statement.
        driver: returns the driver's own connection.
    """

    dialect: str
    paramstyle: str
    run: Callable[[str, dict[str, Any]], Sequence[Any]]
    driver: Callable[[], Any]


def _opened(given: Any) -> _At:
    if hasattr(given, "run_sync") or hasattr(given, "__aenter__"):
        raise ConfigurationError(
            f"settle_in and submit_in: the methods of an {type(given).__name__} are coroutines. Give what SQLAlchemy's "
            "AsyncSession wraps: await session.run_sync(lambda session: task.submit_in(session, …)). With a driver, "
            "give its blocking connection, in a thread."
        )
    if hasattr(given, "flush") and callable(getattr(given, "connection", None)):
        return _of_session(given)
    if hasattr(given, "exec_driver_sql"):
        return _of_sqlalchemy(given.dialect, lambda: given)
    if hasattr(given, "vendor") and hasattr(given, "in_atomic_block"):  # Django's
        return _At(given.vendor, "pyformat", _by_cursor(given.cursor), lambda: _djangos(given))
    kinds = {kind.__module__.partition(".")[0] for kind in type(given).__mro__}
    if "psycopg" in kinds:
        from psycopg import Cursor
        from psycopg.rows import tuple_row

        def run(statement: str, parameters: dict[str, Any]) -> Sequence[Any]:
            with Cursor(given, row_factory=tuple_row) as cursor:  # the author's cursors may return other rows
                return cursor.execute(statement, parameters).fetchall()  # this also waits for a pipeline

        return _At("postgresql", "pyformat", run, lambda: given)
    if "psycopg2" in kinds:
        from psycopg2.extensions import cursor

        return _At(
            "postgresql", "pyformat", _by_cursor(lambda: given.cursor(cursor_factory=cursor)), lambda: given
        )
    if "sqlite3" in kinds:
        return _At("sqlite", "named", _by_cursor(lambda: _by_tuples(given)), lambda: given)
    raise ConfigurationError(
        f"settle_in and submit_in: a {type(given).__name__} is not a supported connection. Give it a SQLAlchemy "
        "session or connection, a psycopg connection, or Django's django.db.connection."
    )


def _djangos(connection: Any) -> Any:
    connection.ensure_connection()  # before the first statement it has none
    return connection.connection


def _by_tuples(connection: Any) -> Any:
    cursor = connection.cursor()
    cursor.row_factory = None  # the author's rows may be dictionaries
    return cursor


def _of_session(session: Any) -> _At:
    def connection() -> Any:
        # Flush the author's rows first: their errors are the author's, and our lock is not held meanwhile.
        session.flush()
        return session.connection()

    return _of_sqlalchemy(connection().dialect, connection)


def _of_sqlalchemy(dialect: Any, connection: Callable[[], Any]) -> _At:
    from sqlalchemy import text  # it writes parameters in the driver's style

    def run(statement: str, parameters: dict[str, Any]) -> Sequence[Any]:
        # No statement is fit for a server-side cursor.
        result = connection().execute(
            text(statement), parameters, execution_options={"stream_results": False}
        )
        rows: Sequence[Any] = result.all() if result.returns_rows else ()
        return rows

    return _At(dialect.name, "named", run, lambda: connection().connection.dbapi_connection)


def _by_cursor(open_cursor: Callable[[], Any]) -> Callable[[str, dict[str, Any]], Sequence[Any]]:
    def run(statement: str, parameters: dict[str, Any]) -> Sequence[Any]:
        cursor = open_cursor()
        try:
            cursor.execute(statement, parameters)
            rows: Sequence[Any] = cursor.fetchall() if cursor.description else ()
            return rows
        finally:
            cursor.close()

    return run


def _in_transaction(driver: Any) -> bool:
    """Whether the connection's next statement is in a transaction, and not committed at once."""
    # SQLAlchemy wraps the connection of an async driver.
    sqlite = getattr(driver, "driver_connection", driver)
    if hasattr(sqlite, "in_transaction"):  # sqlite3, which may also begin a transaction before the next write
        begins = getattr(sqlite, "autocommit", -1)  # since Python 3.12; -1 means that isolation_level decides
        return (
            sqlite.in_transaction or begins is False or (begins == -1 and sqlite.isolation_level is not None)
        )
    if not driver.autocommit:
        return True
    return hasattr(driver, "info") and int(driver.info.transaction_status) != 0  # psycopg; 0: idle
