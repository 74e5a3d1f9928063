"""What can be wrong with a store: it does not answer, it loses records, its clock is wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from celery_idem.integration.settings import Settings
from celery_idem.operate.doctor.snapshot import Finding, Snapshot
from celery_idem.operate.operators import duration

SKEW_LIMIT = 1.0
"""Seconds between the store's clock and this machine's that are not reported: leases are measured
by the store's clock alone, so only ETAs and the times in logs differ."""


NAMED = 3
"""Tasks that a sentence names before it only counts them."""


def meanwhile(tasks: Mapping[str, Settings]) -> str:
    """What becomes of a store's tasks until it answers. Empty where it has none."""
    kinds: dict[str, list[str]] = {}
    for name, settings in tasks.items():
        kind = "run (shadow mode)" if settings.shadow else WITHOUT_STORE[settings.on_store_error]
        kinds.setdefault(kind, []).append(name)
    parts = []
    for kind, names in kinds.items():
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        parts.append(f"{', '.join(names[:NAMED])}{more} {kind}")
    return f"Until it answers: {'; '.join(parts)}." if parts else ""


WITHOUT_STORE = {
    "retry": "not run, tried again later (idem_on_store_error)",
    "raise": "not run, StoreError (idem_on_store_error)",
    "run": "run without a guard (idem_on_store_error)",
}


def store_answers(s: Snapshot) -> Iterator[Finding]:
    settings = {task.name: task.settings for task in s.tasks}
    for store in s.stores:
        if store.error:
            its = {name: settings[name] for name in store.tasks}
            yield Finding(
                "error",
                "store-down",
                store.url,
                f"{store.error} {meanwhile(its)}".strip(),
                "Start it, or set idem_store to where it is.",
            )
        elif store.unseen:
            yield Finding(
                "note",
                "not-looked-at",
                store.url,
                f"The store works, but eviction, persistence and replicas were not looked at: {store.unseen}",
                "Run the doctor as a user who may also +info and +config|get.",
            )


def memory_store(s: Snapshot) -> Iterator[Finding]:
    if s.store_scheme == "memory":
        yield Finding(
            "error",
            "memory-store",
            "idem_store",
            "memory:// lives in one process: two workers, or two children of one, do not see each other's claims, and "
            "all records are lost after a restart.",
            'Set idem_store = "redis://…" or "postgresql://…"; memory:// is for tests.',
        )


def eviction(s: Snapshot) -> Iterator[Finding]:
    for store in s.stores:
        policy = store.info.get("maxmemory_policy", "noeviction")
        if policy == "noeviction" or store.info.get("maxmemory") == "0":
            continue
        what = "every record" if policy.startswith("allkeys") else "every finished outcome"
        yield Finding(
            "error",
            "eviction",
            store.url,
            f"When its memory is full this Redis drops {what} it likes (maxmemory-policy {policy}): a call whose "
            "record was dropped runs a second time.",
            "In redis.conf: maxmemory-policy noeviction.",
        )


def persistence(s: Snapshot) -> Iterator[Finding]:
    for store in s.stores:
        if not store.info or store.info.get("aof_enabled") == "1":
            continue
        rdb = store.info.get("rdb_saves_configured", "1") == "1"
        lost = "the changes since its last snapshot" if rdb else "every record"
        yield Finding(
            "warning" if rdb else "error",
            "persistence",
            store.url,
            f"This Redis keeps no append-only file, so a restart loses {lost}, and calls that ran run again.",
            'In redis.conf: appendonly yes (and idem_durability = "fsync" where the last second counts too).',
        )


def replicas(s: Snapshot) -> Iterator[Finding]:
    for store in s.stores:
        if not store.info:
            continue
        connected = int(store.info.get("connected_slaves", "0") or 0)
        if store.durability.startswith("replicas:"):
            wanted = int(store.durability.partition(":")[2])
            if connected < wanted:
                yield Finding(
                    "error",
                    "replicas",
                    store.url,
                    f"Every write waits for {wanted} replicas and {connected} are connected, so no claim succeeds.",
                    f'Connect {wanted} replicas, or set idem_durability = "replicas:{connected}" ("none" for 0).',
                )
        elif connected:
            yield Finding(
                "warning",
                "replicas",
                store.url,
                "This Redis has replicas, and writes do not wait for them: a failover forgets the last claims, and "
                "what they had started runs again.",
                'Set idem_durability = "replicas:1".',
            )


def replica_as_store(s: Snapshot) -> Iterator[Finding]:
    for store in s.stores:
        if store.info.get("role") == "slave":
            yield Finding(
                "error",
                "read-only",
                store.url,
                "This Redis is a replica: it refuses every claim.",
                "Set idem_store to the primary, or to sentinel://… so that it is found.",
            )


def clock_went_back(s: Snapshot) -> Iterator[Finding]:
    for store in s.stores:
        if store.ahead > SKEW_LIMIT:
            yield Finding(
                "warning",
                "clock-back",
                store.url,
                f"Records were written up to {duration(store.ahead)} ahead of the store's clock: it was set back, or "
                "another server with another clock took over. A lease then counts from when a delivery, or "
                "`idem resolve`, meets the record; nothing runs twice.",
                "Let NTP slew the clocks of the store's servers instead of setting them (chrony: no makestep after the "
                "start).",
            )


def clock_skew(s: Snapshot) -> Iterator[Finding]:
    for store in s.stores:
        if store.skew > SKEW_LIMIT:
            yield Finding(
                "warning",
                "clock-skew",
                store.url,
                f"This machine's clock and the store's are {store.skew:.1f} s apart. Leases are not affected, "
                "the store's clock measures them. ETAs, and the times you compare in logs, are off by as much.",
                "Run NTP (chrony, systemd-timesyncd) on both machines.",
            )
