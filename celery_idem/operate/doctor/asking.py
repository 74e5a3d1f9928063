"""Asks a store and its servers, and returns what they say as values."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from celery_idem.core import calls
from celery_idem.core.errors import StoreError
from celery_idem.core.model import MICROSECONDS
from celery_idem.core.sealing import sealed_with
from celery_idem.integration import messages
from celery_idem.operate.doctor import kept, servers

if TYPE_CHECKING:
    from celery_idem.engine.ledger import Ledger
    from celery_idem.integration.task import IdempotentTask

Info = dict[str, str]

LOOKED_AT = 10_000
"""Records that are read to find stamps in the future and old seal keys. It takes 0.2 s in a Redis with millions."""

LEFT_OUT = (calls.Why.TOO_LARGE, calls.Why.UNWRITABLE)
"""Reasons why a call is not kept that the author did not choose."""

PROBE = b"x" * 40
"""Written to see whether the store takes writes. As long as a small record."""

PROBE_TTL = 60 * MICROSECONDS
"""Time to live of the probe, in case it can be written and not deleted."""


@dataclass(frozen=True)
class StoreFacts:
    """Facts about one store.

    Attributes:
        tasks: the guarded tasks that keep their records there.
        error: why it could not be asked; "" if it could.
        unwritable: why a value could not be written and deleted; "" if it could.
        unseen: why its INFO could not be read, although it answers; "" if it could.
        info: the server's INFO, for a Redis; the result of ``SERVER``, for a PostgreSQL.
        server: which run of the server this is (see ``servers.run_of``).
        noted: the runs that workers have seen (see ``servers``).
        now: its time, in seconds.
        skew: seconds between its clock and ours, beyond the time of the round trip.
        ahead: seconds from its time to the latest stamp in the future, among the records that were read.
        not_kept: number of open records without their call, by a reason in ``LEFT_OUT``.
        sealed: number of records that were read and have a field that is not sealed with the newest key, by the id of
            its key; "" for a field in clear. Empty if nothing is to be sealed.
        keys: ids of the seal keys that this process has.
    """

    url: str
    durability: str = "none"
    tasks: tuple[str, ...] = ()
    error: str = ""
    unwritable: str = ""
    unseen: str = ""
    info: Mapping[str, str] = field(default_factory=dict)
    server: Mapping[str, Any] = field(default_factory=dict)
    noted: Mapping[str, Any] = field(default_factory=dict)
    now: float = 0.0
    skew: float = 0.0
    ahead: float = 0.0
    not_kept: Mapping[str, int] = field(default_factory=dict)
    sealed: Mapping[str, int] = field(default_factory=dict)
    keys: tuple[str, ...] = ()


def facts_of(ledger: Ledger, durability: str, guarded: Iterable[IdempotentTask] = ()) -> Iterator[StoreFacts]:
    """Ask a store, and each node of a cluster. The first value is about the whole store."""
    store = ledger.store
    names = [str(task.name) for task in guarded if task.guard.ledger.store is store]
    tasks = tuple(dict.fromkeys(names))  # a renamed task comes once for each of its names
    try:
        before = time.time()
        now = store.read(f"{ledger.namespace}:").now / MICROSECONDS
        after = time.time()
        ahead, not_kept = 0.0, Counter[str]()
        for entry in islice(ledger.list("open"), LOOKED_AT):
            ahead = max(ahead, entry.changed_at - now)
            why = calls.missing(entry.record.call)
            if why in LEFT_OUT:
                not_kept[messages.WHY_NOT_KEPT[why]] += 1
        noted = kept.read(ledger, servers.NAME)
        sealed = _sealed(ledger)
    except StoreError as error:
        yield StoreFacts(store.url, durability, tasks, error=str(error))
        return
    unwritable, unseen = _unwritable(ledger), ""
    nodes: dict[str, Info] = {}
    try:
        nodes = infos(store)
    except (
        StoreError
    ) as error:  # a user with the least rights may not do this, and the guard does not need it
        unseen = str(error)
    info, *others = nodes.values() if nodes else ({},)
    yield StoreFacts(
        store.url,
        durability,
        tasks,
        unwritable=unwritable,
        unseen=unseen,
        info=info,
        server=run_of(nodes),
        noted=noted,
        now=now,
        skew=max(0.0, abs(now - (before + after) / 2) - (after - before) / 2),
        ahead=ahead,
        not_kept=not_kept,
        sealed=sealed,
        keys=() if ledger.codec.seal is None else ledger.codec.seal.ids,
    )
    for name, other in zip([*nodes][1:], others, strict=True):
        yield StoreFacts(f"{store.url} ({name})", durability, info=other, now=now)


def _sealed(ledger: Ledger) -> Counter[str]:
    """Return ``StoreFacts.sealed``. Without keys, only open records are read, which is cheaper."""
    seal, found = ledger.codec.seal, Counter[str]()
    for entry in islice(ledger.list("open" if seal is None else None), LOOKED_AT):
        ids = sealed_with(entry.record)
        found.update(ids - {""} if seal is None else ids - {seal.newest})
    return found


def _unwritable(ledger: Ledger) -> str:
    """Write a value as a claim does, and delete it. Return why that is not possible; "" if it is."""
    key = f"{ledger.namespace}{kept.KEPT}:probe:{os.urandom(8).hex()}"
    try:
        reply = ledger.store.create(key, PROBE, PROBE_TTL)
        if reply.stored is not None:
            ledger.store.replace(key, reply.stored, PROBE, 0)
    except StoreError as error:
        return str(error)
    return ""


def infos(store: Any) -> dict[str, Info]:
    """Return each server's information about itself, by its name; empty for a store without a server.

    Raises:
        StoreError: the store did not answer, or refused.
    """
    if hasattr(store, "query"):
        if store.dialect != "postgresql":
            return {}
        (row,) = store.query(SERVER)
        return {store.url: dict(zip(SERVER_NAMES, map(str, row), strict=True))}
    if not hasattr(store, "execute"):
        return {}
    found = {name: _info(reply) for name, reply in store.everywhere("INFO").items()}
    for info in found.values():
        if "rdb_saves_configured" not in info:
            info["rdb_saves_configured"] = _saves(store)
    return found


def run_of(nodes: Mapping[str, Info]) -> dict[str, Any]:
    """Return the run of a store's server (see ``servers.run_of``); empty for a cluster, whose masters change."""
    (info,) = nodes.values() if len(nodes) == 1 else ({},)
    return servers.run_of(info)


SERVER_NAMES = ("system_identifier", "timeline", "standby", "read_only", "blocked")
SERVER = """
SELECT (SELECT system_identifier FROM pg_control_system()),
  CASE WHEN pg_is_in_recovery() THEN (SELECT lpad(upper(to_hex(timeline_id)), 8, '0') FROM pg_control_checkpoint())
  ELSE substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8) END,  -- the last checkpoint may be older than a promotion
  pg_is_in_recovery(), current_setting('default_transaction_read_only'),
  (SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = to_regclass('celery_idem'))
"""
"""The question to a PostgreSQL. Its columns have the names above."""


def version(store: Any) -> str:
    """Return name and version of a Redis store's server; "" if they cannot be read."""
    try:
        info = _info(store.execute("INFO", "server")) if hasattr(store, "execute") else {}
    except StoreError:
        return ""
    if "valkey_version" in info:
        return f"Valkey {info['valkey_version']}"
    return f"Redis {info['redis_version']}" if "redis_version" in info else ""


def _info(reply: Any) -> Info:
    if isinstance(reply, dict):  # as redis-py reads it for a cluster
        return {
            name: ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
            for name, value in reply.items()
        }
    lines = reply.decode("utf-8", "replace").splitlines() if isinstance(reply, bytes) else []
    return dict(line.split(":", 1) for line in lines if ":" in line and not line.startswith("#"))


def _saves(store: Any) -> str:
    """Return "1" if snapshots are configured, and "0" if not. If a (hosted) server does not tell, "1"."""
    try:
        _, value = store.execute("CONFIG", "GET", "save")
    except (StoreError, ValueError, TypeError):
        return "1"
    return "1" if value else "0"
