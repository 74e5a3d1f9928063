"""Every statement of the SQL store, in the spelling of PostgreSQL and of SQLite.

Written out instead of built with SQLAlchemy, because they have to run on an author's own connection
too (``sql_transaction``), whichever driver that is of. ``:name`` is a parameter, ``{now}`` the
store's time in microseconds: PostgreSQL's ``clock_timestamp()``, and SQLite's ``julianday('now')``,
which counts milliseconds. SQLite's 'now' stands still during a statement; PostgreSQL's clock does
not, so it is read once. A stamp is one more than the one before where the clock has not moved.
"""

from __future__ import annotations

import re
from importlib.resources import files
from typing import NamedTuple

from celery_idem.core.errors import ConfigurationError

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

# A row that a transaction has locked (`settle_in`, before its commit) is left alone: one that is
# open for long would hold up the leases of all others. It is tried again at the next look.
_REPLACE_MANY_POSTGRESQL = """
WITH clock AS MATERIALIZED (SELECT {now} AS now),
mine AS MATERIALIZED (
  SELECT there.key, given.stamp AS was, given.value, given.ttl
  FROM unnest(
    CAST(:keys AS text[]), CAST(:stamps AS bigint[]), CAST(:owners AS bytea[]), CAST(:news AS bytea[]),
    CAST(:ttls AS bigint[])
  ) AS given (key, stamp, owner, value, ttl)
  JOIN celery_idem AS there ON there.key = given.key AND there.stamp = given.stamp
  WHERE substr(there.value, 1, :length) = given.owner
    AND (there.expires IS NULL OR there.expires > (SELECT now FROM clock))
  FOR UPDATE OF there SKIP LOCKED
)
UPDATE celery_idem AS there
SET stamp = greatest(clock.now, mine.was + 1), value = mine.value, expires = clock.now + mine.ttl
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
    replace_many: str  # "" for SQLite, where a round trip costs nothing
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
        _REPLACE_MANY_POSTGRESQL if postgresql else "",
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
