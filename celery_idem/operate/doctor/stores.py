"""Checks of the stores: one does not answer, may lose records, or its clock is wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from celery_idem.core.model import MICROSECONDS
from celery_idem.integration.settings import Settings
from celery_idem.operate.doctor import servers
from celery_idem.operate.doctor.asking import LOOKED_AT, StoreFacts
from celery_idem.operate.doctor.snapshot import Finding, Snapshot, error, note, warning
from celery_idem.operate.operators import duration, iso

SKEW_LIMIT = 1.0
"""Seconds between the clocks of the store and of this machine that are not reported. Leases use only the store's clock,
so only ETAs and the times in logs differ."""


NEAR = 0.85
"""Used part of a Redis' memory limit from which it is reported. The rest then lasts for hours or days, not weeks."""

SILENT_REPLICA = 3
"""Seconds without a message from a replica, which sends one each second."""

NAMED = 3
"""Tasks that a sentence names. Others are counted."""


def _meanwhile(s: Snapshot, store: StoreFacts) -> str:
    return meanwhile({task.name: task.settings for task in s.tasks if task.name in store.tasks})


def meanwhile(tasks: Mapping[str, Settings]) -> str:
    """Return what becomes of a store's tasks until it answers; "" if it has none."""
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
    for store in s.stores:
        if store.error:
            yield error(
                "store-down",
                store.url,
                f"{store.error} {_meanwhile(s, store)}".strip(),
                "Start it, or set idem_store to where it is. If it refuses: user and password there.",
            )
        elif store.unseen:
            yield note(
                "not-looked-at",
                store.url,
                f"The store works, but eviction, persistence and replicas were not looked at: {store.unseen}",
                "Run the doctor as a user who may read pg_control_system()."
                if store.url.startswith("postgresql")
                else "Run the doctor as a user who may also +info and +config|get.",
            )


def memory_store(s: Snapshot) -> Iterator[Finding]:
    if s.store_scheme == "memory":
        yield error(
            "memory-store",
            "idem_store",
            "memory:// lives in one process: two workers, or two children of one, do not see each other's claims, and "
            "all records are lost after a restart.",
            'Set idem_store = "redis://…" or "postgresql://…"; memory:// is for tests.',
        )


def writing(s: Snapshot) -> Iterator[Finding]:
    for store in s.stores:
        if store.unwritable and store.info.get("role") != "slave":
            yield error(
                "not-writable",
                store.url,
                f"It answers, and does not take a write: {store.unwritable} {_meanwhile(s, store)}".strip(),
                _how_to_write(store),
            )


def _how_to_write(store: StoreFacts) -> str:
    if _is_full(store):
        return "Raise maxmemory (or remove other data): keep maxmemory-policy noeviction."
    if store.info.get("standby") == "True":
        return "Point idem_store at the primary, or name all servers: postgresql://user@/database?host=one:5432&host=two:5432."
    if store.info.get("read_only") == "on":
        return "In PostgreSQL: default_transaction_read_only off, for the server, the database and this user."
    if store.info.get("blocked", "0") != "0":
        return "End the session that locks the table: select * from pg_locks where relation = 'celery_idem'::regclass."
    if store.durability != "none":
        return "Look at its replicas and its disk: each write waits for them (idem_durability). Else: rights, locks."
    if "min_slaves_good_slaves" in store.info:
        good = store.info["min_slaves_good_slaves"]
        return f"Bring its replicas back: min-replicas-to-write wants more than the {good} that are well."
    return "Make it writable for the user in idem_store: rights, free disk space, locks."


def _is_full(store: StoreFacts) -> bool:
    used, limit = _memory(store)
    return bool(limit) and used >= limit


def _memory(store: StoreFacts) -> tuple[int, int]:
    return int(store.info.get("used_memory", 0)), int(store.info.get("maxmemory", 0))


def memory(s: Snapshot) -> Iterator[Finding]:
    for store in s.stores:
        used, limit = _memory(store)
        if not limit or used < NEAR * limit or store.info.get("maxmemory_policy") != "noeviction":
            continue
        yield Finding(
            "error" if used >= limit else "warning",
            "memory",
            store.url,
            f"It uses {used / limit:.0%} of its memory (maxmemory {limit:,} bytes). A full Redis takes no claim, so no "
            "guarded task runs.",
            "Raise maxmemory, keep outcomes for a shorter time (idem_result_ttl), or move other data elsewhere.",
        )


def evicted(s: Snapshot) -> Iterator[Finding]:
    for store in s.stores:
        number = int(store.info.get("evicted_keys", 0))
        if number:
            yield Finding(
                "error" if _evicts(store) else "warning",
                "evicted",
                store.url,
                f"This Redis has dropped {number} keys since it started, because its memory was full. If records were "
                "among them, their calls run a second time.",
                "In redis.conf: maxmemory-policy noeviction, and a maxmemory that fits. What was dropped cannot be "
                "listed: compare the destination with what callers asked for since then.",
            )


def _evicts(store: StoreFacts) -> bool:
    return (
        store.info.get("maxmemory_policy", "noeviction") != "noeviction"
        and store.info.get("maxmemory") != "0"
    )


def eviction(s: Snapshot) -> Iterator[Finding]:
    for store in s.stores:
        policy = store.info.get("maxmemory_policy", "noeviction")
        if not _evicts(store):
            continue
        what = "any record" if policy.startswith("allkeys") else "any finished outcome"
        yield error(
            "eviction",
            store.url,
            f"When its memory is full, this Redis may drop {what} (maxmemory-policy {policy}): a call whose "
            "record was dropped runs a second time.",
            "In redis.conf: maxmemory-policy noeviction.",
        )


def persistence(s: Snapshot) -> Iterator[Finding]:
    for store in s.stores:
        if not _is_redis(store) or store.info.get("aof_enabled") == "1":
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
        if not _is_redis(store):
            continue
        connected = int(store.info.get("connected_slaves", "0") or 0)
        if store.durability.startswith("replicas:"):
            wanted = int(store.durability.partition(":")[2])
            if connected < wanted:
                yield error(
                    "replicas",
                    store.url,
                    f"Every write waits for replicas ({wanted}), and fewer are there ({connected}): no claim succeeds.",
                    "Bring its replicas back. Until then you may set idem_durability = "
                    + (f'"replicas:{connected}".' if connected else '"none".'),
                )
        elif connected:
            yield warning(
                "replicas",
                store.url,
                "This Redis has replicas, and writes do not wait for them: a failover forgets the last claims, and "
                "what they had started runs again.",
                'Set idem_durability = "replicas:1".',
            )


def silent_replicas(s: Snapshot) -> Iterator[Finding]:
    for store in s.stores:
        behind = [(name, lag, bytes_) for name, lag, bytes_ in _replicas(store) if lag >= SILENT_REPLICA]
        for name, lag, missing in behind:
            yield warning(
                "replica-lags",
                store.url,
                f"Its replica {name} sent its last sign {lag} s ago, and is {missing:,} bytes behind. If it takes "
                "over, what it has not received is forgotten, and runs again.",
                "Look at that server and the network to it.",
            )


def _replicas(store: StoreFacts) -> Iterator[tuple[str, int, int]]:
    """Return address, seconds since its last message, and bytes behind, of each connected replica."""
    written = int(store.info.get("master_repl_offset", 0))
    for n in range(int(store.info.get("connected_slaves", 0) or 0)):
        told = dict(part.partition("=")[::2] for part in store.info.get(f"slave{n}", "").split(","))
        if told.get("state") == "online":
            offset = int(told.get("offset", 0))
            yield f"{told.get('ip')}:{told.get('port')}", int(told.get("lag", 0)), max(0, written - offset)


def other_runs(s: Snapshot) -> Iterator[Finding]:
    """Report changes of the server's run, as long as outcomes from before them are remembered."""
    keep = {task.name: task.settings.policy(task.asks) for task in s.tasks if task.guarded}
    for store in s.stores:
        kept = [max(keep[name].result_ttl, keep[name].failure_ttl) for name in store.tasks]
        oldest = store.now - max(kept, default=0) / MICROSECONDS
        lost = store.noted.get("lost")
        if lost and lost > oldest:
            yield error(
                "data-lost",
                store.url,
                f"A worker found at {iso(lost)} that its note in the store was gone: the server had lost its data, or "
                "was emptied. Every action from before then is forgotten. Called again, it runs again.",
                "Compare the destination with the calls made since. Then give the server a disk that survives it: "
                "appendonly yes.",
            )
        latest = max(servers.changes(store.noted, store.server, store.now), default=None)
        if latest is not None and latest.since > oldest:
            yield _other_run(store, latest)


def _other_run(store: StoreFacts, change: servers.Change) -> Finding:
    when, safe = iso(change.since), False
    if change.kind == "restart":
        safe = store.info.get("aof_enabled") == "1"
        what = f"It was restarted (or a replica took over): noticed at {when}."
        lost = "the last second at most" if safe else "everything since its last snapshot"
    elif change.kind == "failover":
        safe = store.durability.startswith("replicas")
        what, lost = f"A replica took over: noticed at {when}.", "what the replica had not received"
    elif change.kind == "recovery":
        what = f"It was recovered to a point in time, or a standby took over: noticed at {when}."
        lost = "what was committed after that point"
    else:
        what, lost = (
            f"Its data is a copy from another server: noticed at {when}.",
            "what was written after the copy",
        )
    return Finding(
        "note" if safe else "warning",
        change.kind,
        store.url,
        f"{what} It has lost {lost}, and an action from then runs again when it is called again.",
        "Compare the destination with the calls of the minutes before. To lose less: "
        + ("nothing has to change." if safe else SAFER[change.kind]),
    )


SAFER = {
    "restart": "in redis.conf appendonly yes.",
    "failover": 'idem_durability = "replicas:1".',
    "recovery": "synchronous_standby_names in PostgreSQL.",
    "copy": "stop the workers before the copy is made.",
}
"""What to set so that a change of the run loses less, by its kind."""


def _is_redis(store: StoreFacts) -> bool:
    return "redis_version" in store.info or "aof_enabled" in store.info or "role" in store.info


def replica_as_store(s: Snapshot) -> Iterator[Finding]:
    for store in s.stores:
        if store.info.get("role") == "slave":
            yield error(
                "read-only",
                store.url,
                "This Redis is a replica: it refuses every claim.",
                "Set idem_store to the primary, or to sentinel://… so that it is found.",
            )


def clock_went_back(s: Snapshot) -> Iterator[Finding]:
    for store in s.stores:
        if store.ahead > SKEW_LIMIT:
            yield warning(
                "clock-back",
                store.url,
                f"Records were written up to {duration(store.ahead)} ahead of the store's clock: it was set back, or "
                "another server with another clock took over. A lease then counts from when a delivery, or "
                "`idem resolve`, meets the record; nothing runs twice.",
                "Let NTP slew the clocks of the store's servers instead of setting them (chrony: no makestep after the "
                "start).",
            )


def calls_not_kept(s: Snapshot) -> Iterator[Finding]:
    for store in s.stores:
        for why, number in store.not_kept.items():
            yield warning(
                "call-not-kept",
                store.url,
                f"{number:,} open intents cannot be shown, nor be published again: {why}. If their workers die, their "
                "callers wait until the call is made again.",
                "Pass ids in the place of large values, or raise idem_max_call_bytes; use a serializer that takes the "
                "arguments.",
            )


def sealing(s: Snapshot) -> Iterator[Finding]:
    for store in s.stores:
        for key, number in sorted(store.sealed.items()):
            if not key or key in store.keys:
                how = (
                    f"sealed with the old key {key}"
                    if key
                    else "in clear, from before idem_seal_keys was set"
                )
                yield note(
                    "old-key" if key else "in-clear",
                    store.url,
                    f"{number:,} of the {LOOKED_AT:,} records looked at, at most, hold something that is {how}.",
                    "Run `celery -A proj idem reseal`. Before that is done, the old key must stay in idem_seal_keys.",
                )
            else:
                yield error(
                    "key-missing",
                    store.url,
                    f"{number:,} of the {LOOKED_AT:,} records looked at, at most, are sealed with the key {key}, which "
                    "this process does not have. Their tasks do not run here, and lists cannot describe their actions.",
                    "Give every process the same idem_seal_keys; if the key is lost: `celery -A proj idem reseal "
                    "--lost`.",
                )


def clock_skew(s: Snapshot) -> Iterator[Finding]:
    for store in s.stores:
        if store.skew > SKEW_LIMIT:
            yield warning(
                "clock-skew",
                store.url,
                f"This machine's clock and the store's are {store.skew:.1f} s apart. Leases are not affected, "
                "the store's clock measures them. ETAs, and the times you compare in logs, are off by as much.",
                "Run NTP (chrony, systemd-timesyncd) on both machines.",
            )
