-- The table of celery_idem's records, for PostgreSQL 12 or newer. Safe to run again.
--
--   key      the idempotency key, namespace first. Compared byte by byte (COLLATE "C"), so that
--            the keys of one prefix lie together in the index.
--   stamp    microseconds since 1970, this database's clock: when the row was last written. Also its version.
--   value    the packed record: docs/explanation/record.md says how to read it.
--   expires  microseconds since 1970 after which the row counts as absent; NULL for ever.
--   due      microseconds since 1970 at which somebody has to look at an open intent; NULL when it is settled.
CREATE TABLE IF NOT EXISTS celery_idem (
  key     text COLLATE "C" PRIMARY KEY,
  stamp   bigint NOT NULL,
  value   bytea NOT NULL,
  expires bigint,
  due     bigint
);

-- For `celery -A proj idem purge`.
CREATE INDEX IF NOT EXISTS celery_idem_expires ON celery_idem (expires) WHERE expires IS NOT NULL;

-- What is open: for recovery, the inbox, the exporter, and `celery -A proj idem list --state in_doubt`.
CREATE INDEX IF NOT EXISTS celery_idem_open ON celery_idem (due, key) WHERE due IS NOT NULL;
