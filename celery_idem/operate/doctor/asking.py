"""Asks a store and its servers, and makes values of what they say."""

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
"""Records read to find one from the future: 0.2 s among those of a Redis that keeps millions."""

LEFT_OUT = (calls.Why.TOO_LARGE, calls.Why.UNWRITABLE)
"""Reasons why a call is not kept that nobody asked for."""

PROBE = b"x" * 40
"""What is written to see whether the store takes it: as long as a small record."""

PROBE_TTL = 60 * MICROSECONDS
"""After which a value is gone that could be written and not deleted."""


@dataclass(frozen=True)
class StoreFacts:
    """What matters of one store.

    Attributes:
        tasks: the guarded tasks that keep their records there.
        error: why it could not be asked; "" where it was.
        unwritable: why a value could not be written there and deleted again; "" where it could.
        unseen: why its INFO could not be read, though it answers; "" where it was.
        info: the server's INFO, for a Redis; for a PostgreSQL what ``SERVER`` asks.
        server: which run of the server this is (see ``servers.run_of``).
        noted: which ones workers have seen (see ``servers``).
        now: its time, in seconds.
        skew: seconds between its clock and ours, beyond what the round trip explains.
        ahead: seconds by which the latest of the records looked at was written in the future of its clock.
        not_kept: how many open records do not hold their call though they should, by the reason.
        sealed: how many of the records looked at hold something that is not sealed with the newest key, by the id of
            its key; "" for something in clear. Empty where nothing is to be sealed.
        keys: ids of the keys that are here.
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
    """Ask a store; of a cluster, each node. The first value says what is true of the whole store."""
    store = ledger.store
    names = [str(task.name) for task in guarded if task.guard.ledger.store is store]
    tasks = tuple(dict.fromkeys(names))  # a renamed task is there under each of its names
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
    except StoreError as error:  # a user with the least rights may do all that the guard needs, and not this
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
    """See ``StoreFacts.sealed``. Without keys only what is open is looked at: it costs what is open."""
    seal, found = ledger.codec.seal, Counter[str]()
    for entry in islice(ledger.list("open" if seal is None else None), LOOKED_AT):
        ids = sealed_with(entry.record)
        found.update(ids - {""} if seal is None else ids - {seal.newest})
    return found


def _unwritable(ledger: Ledger) -> str:
    """Write a value as a claim does, and delete it; why that is not possible, or "". A second write if need be."""
    key = f"{ledger.namespace}{kept.KEPT}:probe:{os.urandom(8).hex()}"
    try:
        reply = ledger.store.create(key, PROBE, PROBE_TTL)
        if reply.stored is not None:
            ledger.store.replace(key, reply.stored, PROBE, 0)
    except StoreError as error:
        return str(error)
    return ""


def infos(store: Any) -> dict[str, Info]:
    """What each server of a store says of itself, by its name; empty for a store without a server.

    Raises:
        StoreError: it does not let us look.
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
    """The run of a store's server (see ``servers.run_of``); empty for a cluster, in which masters come and go."""
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
"""What a PostgreSQL is asked, by the names above."""


def version(store: Any) -> str:
    """Name and version of a Redis store's server; "" where they cannot be read."""
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
    """ "1" when snapshots are configured; assumed where the server does not let us look (as hosted ones do)."""
    try:
        _, value = store.execute("CONFIG", "GET", "save")
    except (StoreError, ValueError, TypeError):
        return "1"
    return "1" if value else "0"
