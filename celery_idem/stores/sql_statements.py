"""The SQL store's statements for PostgreSQL and SQLite, and the primitives that run them.

The statements are text and not built with SQLAlchemy, because they also run on an author's own connection
(``sql_transaction``) with any driver. ``:name`` is a parameter. ``{now}`` is the store's time in microseconds:
PostgreSQL's ``clock_timestamp()``, or SQLite's ``julianday('now')``, which counts milliseconds. PostgreSQL's clock
moves during a statement, so a statement reads it once. Where the clock has not moved, the new stamp is the old one
plus one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import Any, NamedTuple

from celery_idem.core.errors import ConfigurationError, StoreError
from celery_idem.core.model import Stored
from celery_idem.stores.base import OWNER, Listed, Mark, Reply, Store

PAGE = 500
"""Rows per statement of a scan: at about 300 bytes each, 150 kB."""

LATEST = (1 << 63) - 1
"""Later than any time, and the last that a column has."""

TRIES = 20
"""Attempts of ``create``. It starts again when the row it met was deleted, or not visible yet, when it looked. Each
time another caller has written in between."""

_NOW = {
    "postgresql": "CAST(extract(epoch FROM clock_timestamp()) * 1000000 AS bigint)",
    "sqlite": "CAST(round((julianday('now') - 2440587.5) * 86400000) AS integer) * 1000",
}
_GREATEST = {"postgresql": "greatest", "sqlite": "max"}

# The key is looked up first, so that a duplicate writes nothing and waits for no lock. The insert then meets no row, an
# expired row, or a row that is too new for this statement to see: then it writes nothing, and the caller tries again.
_CREATE_POSTGRESQL = """
WITH clock AS MATERIALIZED (SELECT {now} AS now),
held AS MATERIALIZED (
  SELECT stamp, value FROM celery_idem, clock WHERE key = :key AND (expires IS NULL OR expires > now)
),
written AS (
  INSERT INTO celery_idem AS there (key, stamp, value, expires, due)
  SELECT :key, now, :value, now + :ttl, now + :due FROM clock WHERE NOT EXISTS (SELECT 1 FROM held)
  ON CONFLICT (key) DO UPDATE
  SET stamp = greatest(excluded.stamp, there.stamp + 1), value = excluded.value, expires = excluded.expires,
    due = greatest(excluded.stamp, there.stamp + 1) + :due
  WHERE there.expires <= excluded.stamp
  RETURNING stamp
)
SELECT now, written.stamp, held.stamp, held.value
FROM clock LEFT JOIN written ON true LEFT JOIN held ON true
"""

# In the order of the keys, so that two of these statements never wait for each other.
_CREATE_MANY_POSTGRESQL = """
WITH clock AS MATERIALIZED (SELECT {now} AS now),
given AS MATERIALIZED (
  SELECT * FROM unnest(
    CAST(:keys AS text[]), CAST(:news AS bytea[]), CAST(:ttls AS bigint[]), CAST(:dues AS bigint[])
  ) AS given (key, value, ttl, due)
),
held AS MATERIALIZED (
  SELECT there.key, there.stamp, there.value
  FROM given JOIN celery_idem AS there ON there.key = given.key, clock
  WHERE there.expires IS NULL OR there.expires > now
),
written AS (
  INSERT INTO celery_idem AS there (key, stamp, value, expires, due)
  SELECT key, now, value, now + ttl, now + due FROM given, clock
  WHERE NOT EXISTS (SELECT 1 FROM held WHERE held.key = given.key)
  ORDER BY key
  ON CONFLICT (key) DO UPDATE
  SET stamp = greatest(excluded.stamp, there.stamp + 1), value = excluded.value, expires = excluded.expires,
    due = greatest(excluded.stamp, there.stamp + 1) + excluded.due - excluded.stamp
  WHERE there.expires <= excluded.stamp
  RETURNING key, stamp
)
SELECT given.key, now, written.stamp, held.stamp, held.value
FROM clock, given LEFT JOIN written ON written.key = given.key LEFT JOIN held ON held.key = given.key
"""

_CREATE_SQLITE = """
INSERT INTO celery_idem AS there (key, stamp, value, expires, due)
VALUES (:key, {now}, :value, {now} + :ttl, {now} + :due)
ON CONFLICT (key) DO UPDATE
SET stamp = max(excluded.stamp, there.stamp + 1), value = excluded.value, expires = excluded.expires,
  due = max(excluded.stamp, there.stamp + 1) + :due
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
SET stamp = {greatest}(clock.now, stamp + 1), value = :value,
  expires = CASE WHEN CAST(:ttl AS bigint) < 0 THEN expires ELSE clock.now + :ttl END,
  due = {greatest}(clock.now, stamp + 1) + :due
FROM (SELECT {now} AS now) AS clock
WHERE key = :key AND stamp = :stamp AND substr(value, 1, :length) = :owner
  AND (expires IS NULL OR expires > clock.now)
RETURNING stamp
"""

# Rows that a transaction has locked (`settle_in`, before its commit) are skipped: a long transaction would delay the
# renewal of all other leases. The next renewal tries them again.
_REPLACE_MANY_POSTGRESQL = """
WITH clock AS MATERIALIZED (SELECT {now} AS now),
mine AS MATERIALIZED (
  SELECT there.key, given.stamp AS was, given.value, given.ttl, given.due
  FROM unnest(
    CAST(:keys AS text[]), CAST(:stamps AS bigint[]), CAST(:owners AS bytea[]), CAST(:news AS bytea[]),
    CAST(:ttls AS bigint[]), CAST(:dues AS bigint[])
  ) AS given (key, stamp, owner, value, ttl, due)
  JOIN celery_idem AS there ON there.key = given.key AND there.stamp = given.stamp
  WHERE substr(there.value, 1, :length) = given.owner
    AND (there.expires IS NULL OR there.expires > (SELECT now FROM clock))
  FOR UPDATE OF there SKIP LOCKED
)
UPDATE celery_idem AS there
SET stamp = greatest(clock.now, mine.was + 1), value = mine.value,
  expires = CASE WHEN mine.ttl < 0 THEN there.expires ELSE clock.now + mine.ttl END,
  due = greatest(clock.now, mine.was + 1) + mine.due
FROM clock, mine
WHERE there.key = mine.key
RETURNING there.key, mine.was, there.stamp
"""

_SCAN = """
SELECT key, stamp, value
FROM celery_idem, (SELECT {now} AS now) AS clock
WHERE key >= :after AND (expires IS NULL OR expires > clock.now)
ORDER BY key LIMIT :page
"""

# A row constructor lets the planner use the partial index for the page's beginning, and its order.
_OPEN = """
SELECT key, stamp, value, due
FROM celery_idem, (SELECT {now} AS now) AS clock
WHERE due IS NOT NULL AND (due, key) > (:at, :after) AND due <= :before
  AND substr(key, 1, :length) = :prefix AND (expires IS NULL OR expires > clock.now)
ORDER BY due, key LIMIT :page
"""

_MARK = """
UPDATE celery_idem SET due = stamp + :due WHERE key = :key AND stamp = :stamp RETURNING key
"""

_MARK_POSTGRESQL = """
WITH mine AS MATERIALIZED (
  SELECT given.key, given.stamp + given.due AS at
  FROM unnest(CAST(:keys AS text[]), CAST(:stamps AS bigint[]), CAST(:dues AS bigint[])) AS given (key, stamp, due)
  JOIN celery_idem AS there ON there.key = given.key AND there.stamp = given.stamp
  FOR UPDATE OF there SKIP LOCKED
)
UPDATE celery_idem AS there SET due = mine.at FROM mine WHERE there.key = mine.key RETURNING there.key
"""

_PURGE = """
DELETE FROM celery_idem WHERE key IN (
  SELECT key FROM celery_idem WHERE expires <= {now} ORDER BY expires LIMIT :limit
)
"""

# Rows that another session is purging or replacing are skipped.
_PURGE_POSTGRESQL = """
WITH expired AS MATERIALIZED (
  SELECT key FROM celery_idem WHERE expires <= (SELECT {now}) ORDER BY expires LIMIT :limit
  FOR UPDATE SKIP LOCKED
)
DELETE FROM celery_idem USING expired WHERE celery_idem.key = expired.key
"""


# What tells one database's table from another's: the database, the table that the search path finds first (0: none),
# and the server's start; or the file. It reads nothing of a SQLite file: a transaction that has read cannot write any
# more once another one has written.
_PLACE = {
    "postgresql": """
SELECT (SELECT oid FROM pg_database WHERE datname = current_database()),
  CAST(coalesce(CAST(to_regclass('celery_idem') AS oid), 0) AS bigint),
  CAST(extract(epoch FROM pg_postmaster_start_time()) * 1000000 AS bigint)
""",
    "sqlite": "PRAGMA database_list",
}


class Statements(NamedTuple):
    """The statements for one database and one style of parameters."""

    create: str
    create_many: str  # "" for SQLite, which has no round trips
    read: str
    replace: str
    replace_many: str  # as create_many
    scan: str
    open: str
    mark: str  # of many, except for SQLite
    purge: str
    place: str


def statements(dialect: str, paramstyle: str) -> Statements:
    """Return the statements for a database.

    Args:
        dialect: "postgresql" or "sqlite".
        paramstyle: "named" (``:key``) or "pyformat" (``%(key)s``), see PEP 249.
    """
    postgresql = dialect == "postgresql"
    texts = (
        _CREATE_POSTGRESQL if postgresql else _CREATE_SQLITE,
        _CREATE_MANY_POSTGRESQL if postgresql else "",
        _READ,
        _REPLACE,
        _REPLACE_MANY_POSTGRESQL if postgresql else "",
        _SCAN,
        _OPEN,
        _MARK_POSTGRESQL if postgresql else _MARK,
        _PURGE_POSTGRESQL if postgresql else _PURGE,
        _PLACE[dialect],
    )
    names = {"now": _NOW[dialect], "greatest": _GREATEST[dialect]}
    spelled = [text.format(**names) for text in texts]
    if paramstyle == "pyformat":
        spelled = [re.sub(r"(?<!:):([a-z]+)", r"%(\1)s", text) for text in spelled]
    return Statements(*spelled)


def schema(dialect: str) -> str:
    """Return the statements that create the table.

    Args:
        dialect: "postgresql" or "sqlite".

    Raises:
        ConfigurationError: it is neither.
    """
    if dialect not in _NOW:
        raise ConfigurationError(f"There is no table for {dialect!r}: use one of {', '.join(_NOW)}.")
    return files("celery_idem.stores").joinpath(f"schema.{dialect}.sql").read_text()


def apart(text: str) -> list[str]:
    """Return the statements of a schema one by one."""
    return [one for one in re.sub(r"--.*", "", text).split(";") if one.strip()]


class SqlPrimitives(Store):
    """The primitives over the statements. A subclass runs them."""

    dialect: str
    _sql: Statements

    def _rows(self, statement: str, parameters: dict[str, Any]) -> Sequence[Any]:
        """Run a statement and return its rows."""
        raise NotImplementedError

    def create(self, key: str, value: bytes, ttl: int | None = None, due: int | None = None) -> Reply:
        for _ in range(TRIES):
            parameters = {"key": key, "value": value, "ttl": ttl, "due": due}
            for now, written, stamp, held in self._rows(self._sql.create, parameters):
                if written is not None:
                    return Reply(True, Stored(value, written), now)
                if stamp is not None:
                    return Reply(False, Stored(bytes(held), stamp), now)
            if self.dialect == "sqlite":
                reply = self.read(key)
                if reply.done:
                    return reply._replace(done=False)
        raise StoreError(f"{key} kept changing in {self.url}. Nothing was written. Try again.", key)

    def read(self, key: str) -> Reply:
        ((now, stamp, value),) = self._rows(self._sql.read, {"key": key})
        if stamp is None:
            return Reply(False, None, now)
        return Reply(True, Stored(bytes(value), stamp), now)

    def replace(
        self, key: str, old: Stored, value: bytes, ttl: int | None = None, due: int | None = None
    ) -> Reply:
        parameters = {"key": key, "value": value, "ttl": ttl, "due": due, "stamp": old.stamp}
        parameters.update(owner=old.value[:OWNER], length=OWNER)
        for (stamp,) in self._rows(self._sql.replace, parameters):
            return Reply(True, Stored(value, stamp), stamp)
        return self.read(key)._replace(done=False)

    def scan(self, prefix: str) -> Iterator[tuple[str, Stored]]:
        """Read page by page, each from the last key of the one before, so that no cursor stays open."""
        after, seen = prefix, False
        while True:
            rows = self._rows(self._sql.scan, {"after": after, "page": PAGE})
            for key, stamp, value in rows:
                if not key.startswith(prefix):
                    return
                if not (seen and key == after):
                    yield key, Stored(bytes(value), stamp)
            if len(rows) < PAGE:
                return
            after, seen = rows[-1][0], True

    def open(self, prefix: str, before: int | None = None) -> Iterator[Listed]:
        given = {"prefix": prefix, "length": len(prefix), "before": LATEST if before is None else before}
        at, after = -LATEST, ""
        while True:
            rows = self._rows(self._sql.open, {**given, "at": at, "after": after, "page": PAGE})
            for key, stamp, value, due in rows:
                yield Listed(key, due, Stored(bytes(value), stamp))
            if len(rows) < PAGE:
                return
            at, after = rows[-1][3], rows[-1][0]

    def mark(self, marks: Sequence[Mark]) -> None:
        if self.dialect == "sqlite":
            for mark in marks:
                self._rows(self._sql.mark, mark._asdict())
        elif marks:
            keys, stamps, dues = map(list, zip(*marks, strict=True))
            self._rows(self._sql.mark, {"keys": keys, "stamps": stamps, "dues": dues})

    def purge(self, limit: int) -> int:
        return self._count(self._sql.purge, {"limit": limit})

    def _count(self, statement: str, parameters: dict[str, Any]) -> int:
        """Run a statement and return how many rows it wrote."""
        raise NotImplementedError


def no_table(error: BaseException) -> bool:
    """Tell whether a driver's error says that our table is missing, and not another one."""
    code = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)  # psycopg 3, psycopg 2
    return "celery_idem" in str(error) and (code == "42P01" or "no such table" in str(error))
