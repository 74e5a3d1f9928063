-- The table of celery_idem's records, for PostgreSQL 12 or newer. Safe to run again.
--
--   key      the idempotency key, namespace first. Compared byte by byte (COLLATE "C"), so that
--            the keys of one prefix lie together in the index.
--   stamp    microseconds since 1970, this database's clock: when the row was last written. Also its version.
--   value    the packed record: docs/explanation/record.md says how to read it.
--   expires  microseconds since 1970 after which the row counts as absent; NULL for ever.
CREATE TABLE IF NOT EXISTS celery_idem (
  key     text COLLATE "C" PRIMARY KEY,
  stamp   bigint NOT NULL,
  value   bytea NOT NULL,
  expires bigint
);

-- For `celery -A proj idem purge`.
CREATE INDEX IF NOT EXISTS celery_idem_expires ON celery_idem (expires) WHERE expires IS NOT NULL;

-- For `celery -A proj idem list --state …`: byte 14 of a value is its state, and 4 is "succeeded", which nearly all are.
CREATE INDEX IF NOT EXISTS celery_idem_open ON celery_idem (substr(value, 14, 1), key)
  WHERE substr(value, 14, 1) <> '\x04'::bytea;
