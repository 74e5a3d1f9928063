"""What in a set-up will go wrong, and the setting to change.

Two halves. ``gather`` looks at the application and at its stores and makes a ``Snapshot``, plain
values. ``examine`` looks at a snapshot alone, so each finding can be tested without a server. A
worker examines what needs no store when it starts, and logs what it finds; ``celery -A proj idem
doctor`` examines everything, and its exit status is for a CI.
"""

from __future__ import annotations

import inspect
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from urllib.parse import urlsplit

from celery import bootsteps

from celery_idem import events
from celery_idem.desk import Desk, duration
from celery_idem.errors import IdempotencyError, StoreError
from celery_idem.intent import MICROSECONDS
from celery_idem.settings import Settings, of_app, store_url
from celery_idem.telemetry import celery_events

if TYPE_CHECKING:
    from celery import Celery

    from celery_idem.ledger import Ledger
    from celery_idem.task import IdempotentTask

Severity = Literal["error", "warning", "note"]

VISIBILITY = {"redis": 3600.0, "rediss": 3600.0, "sentinel": 3600.0, "redis+socket": 3600.0, "sqs": 1800.0}
"""Seconds until a message that nobody acknowledged is delivered again, by the broker's scheme:
kombu's defaults. Other brokers notice the lost connection instead."""

SKEW_LIMIT = 1.0
"""Seconds between the store's clock and this machine's that are not worth a word: leases are
measured by the store's clock alone, so only ETAs and the times in logs suffer."""

SHORT_LEASE = 5.0
"""Seconds below which a lease lapses in an ordinary pause: a large garbage collection, a store
that fails over, a machine that swaps."""

LONG_LEASE = 3600.0
"""Seconds above which a lease keeps a dead worker's work from being decided for hours."""

NO_LIMITS = ("threads", "solo", "eventlet")
"""Pools that enforce no time limit; gevent enforces the hard one."""

VOLATILE = re.compile(
    r"(^|_)(now|timestamp|ts|datetime|nonce|random|salt|attempts?|retries|retry_count)$"
    r"|^(time|uuid|guid)$|_at$"
    r"|(^|_)(request|trace|span|correlation|message|call|run|job|delivery|attempt)_?(id|uuid)$"
)
"""Names of parameters whose values are usually minted anew for each try: ``message_id`` is one,
``order_id`` and ``order_uuid`` are not."""

FREE_TEXT = re.compile(
    r"(^|_)(note|notes|text|message|body|content|comment|comments|description|reason|summary|prompt|title|subject|"
    r"explanation|thought|details)$"
)
"""Parameter names whose values a person, or a model, words differently each time."""

INSTANTS = ("datetime", "time")
"""Annotations that say so where the name does not."""


class Finding(NamedTuple):
    """One thing that is wrong.

    Attributes:
        code: short and stable, for filters and for the documentation.
        where: the task, the store or the setting it is about.
        wrong: what goes wrong, in one sentence.
        change: the exact setting to change.
    """

    severity: Severity
    code: str
    where: str
    wrong: str
    change: str


@dataclass(frozen=True)
class TaskFacts:
    """What matters of one task.

    Attributes:
        intent: parameters in the intent; None where a function computes it.
        parameters: every parameter, and its annotation as text.
        retry_horizon: seconds until its last retry; None where they never end.
    """

    name: str
    guarded: bool
    settings: Settings = field(default_factory=Settings)
    intent: tuple[str, ...] | None = ()
    all_arguments: bool = False
    parameters: Mapping[str, str] = field(default_factory=dict)
    acks_late: bool = True
    reject_on_worker_lost: bool = True
    time_limit: float | None = None
    soft_time_limit: float | None = None
    retry_horizon: float | None = 0.0
    scheduled: bool = False
    asks: bool = False


@dataclass(frozen=True)
class StoreFacts:
    """What matters of one store.

    Attributes:
        error: why it could not be asked; "" where it was.
        info: the server's INFO, for a Redis.
        skew: seconds between its clock and ours, beyond what the round trip explains.
    """

    url: str
    durability: str = "none"
    error: str = ""
    info: Mapping[str, str] = field(default_factory=dict)
    skew: float = 0.0


@dataclass(frozen=True)
class Snapshot:
    """A set-up, as values.

    Attributes:
        broker: scheme of the broker's URL.
        visibility: seconds until it delivers an unacknowledged message again; None: it does not by time.
        pool: the worker's pool; "" where it is not known.
        result_expires: seconds the result backend keeps results; None: for ever.
        pickled: pickle is accepted for results.
        ticks: the beat scheduler gives each tick its occurrence.
        longest_delay: the longest countdown in the beat schedule, in seconds.
        store_scheme: of ``idem_store``, or of the result backend that stands in for it.
    """

    broker: str = "redis"
    visibility: float | None = 3600.0
    pool: str = ""
    result_expires: float | None = 86_400.0
    pickled: bool = False
    ticks: bool = False
    longest_delay: float = 0.0
    store_scheme: str = "redis"
    tasks: tuple[TaskFacts, ...] = ()
    stores: tuple[StoreFacts, ...] = ()


Check = Callable[[Snapshot], Iterator[Finding]]


# --- the store -----------------------------------------------------------------------


def store_answers(s: Snapshot) -> Iterator[Finding]:
    for store in s.stores:
        if store.error:
            yield Finding(
                "error",
                "store-down",
                store.url,
                f"The store does not answer, so no guarded task runs: {store.error}",
                "Start it, or set idem_store to where it is.",
            )


def memory_store(s: Snapshot) -> Iterator[Finding]:
    if s.store_scheme == "memory":
        yield Finding(
            "error",
            "memory-store",
            "idem_store",
            "memory:// lives in one process: two workers, or two children of one, do not see each other's claims, and "
            "everything is gone after a restart.",
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


def clock_skew(s: Snapshot) -> Iterator[Finding]:
    for store in s.stores:
        if store.skew > SKEW_LIMIT:
            yield Finding(
                "warning",
                "clock-skew",
                store.url,
                f"This machine's clock and the store's are {store.skew:.1f} s apart. Leases do not mind, the store's "
                "clock measures them; ETAs, and the times you compare in logs, are off by as much.",
                "Run NTP (chrony, systemd-timesyncd) on both machines.",
            )


# --- how long things are kept -----------------------------------------------------------


def retention(s: Snapshot) -> Iterator[Finding]:
    for task in s.tasks:
        if not task.guarded:
            continue
        keep = min(task.settings.result_ttl, _failure_ttl(task.settings))
        horizons = [
            (s.visibility, "the broker may deliver a message again", "the visibility timeout"),
            (task.retry_horizon, "its own last retry may come", "the retry horizon"),
            (s.longest_delay, "a scheduled message may still wait", "the longest countdown"),
        ]
        for seconds, what, name in horizons:
            if seconds is not None and keep < seconds:
                yield Finding(
                    "error",
                    "retention",
                    task.name,
                    f"An outcome is kept {duration(keep)}, and {duration(seconds)} later {what} ({name}): by then it "
                    "is forgotten, and the task runs again.",
                    f"Set idem_result_ttl (and idem_failure_ttl) to {int(2 * seconds)} or more.",
                )
        if s.result_expires is not None and keep < s.result_expires:
            yield Finding(
                "note",
                "retention-result",
                task.name,
                f"The result backend shows results for {duration(s.result_expires)}, an outcome is replayed for "
                f"{duration(keep)} only: a caller that still sees the result may run the action again.",
                f"Set idem_result_ttl to {int(s.result_expires)}.",
            )


def _failure_ttl(settings: Settings) -> float:
    return settings.result_ttl if settings.failure_ttl is None else settings.failure_ttl


def eta_beyond_visibility(s: Snapshot) -> Iterator[Finding]:
    longest = max([s.longest_delay, *(t.retry_horizon or 0.0 for t in s.tasks if t.guarded)], default=0.0)
    if s.visibility is not None and s.longest_delay > s.visibility:
        yield Finding(
            "warning",
            "eta",
            "broker_transport_options",
            f"Messages wait {duration(longest)} for their ETA in a worker, and the broker delivers them again after "
            f"{duration(s.visibility)}: several copies wait at once. They run once, but cost claims and memory.",
            f'Set broker_transport_options = {{"visibility_timeout": {int(2 * longest)}}}.',
        )


# --- leases, limits and pools -----------------------------------------------------------


def leases(s: Snapshot) -> Iterator[Finding]:
    for settings, where in _distinct(s):
        if settings.lease < SHORT_LEASE:
            yield Finding(
                "warning",
                "short-lease",
                where,
                f"A lease of {settings.lease:g} s lapses in an ordinary pause (garbage collection, a store that fails "
                "over), and a healthy execution is taken for a dead one.",
                "Set idem_lease = 30.",
            )
        if settings.lease > LONG_LEASE:
            yield Finding(
                "warning",
                "long-lease",
                where,
                f"A lease of {duration(settings.lease)}: what a dead host left behind is decided only after that. "
                "Leases are renewed while the body runs, so it need not be as long as the body.",
                "Set idem_lease = 30.",
            )
        if s.visibility is not None and settings.lease > s.visibility:
            yield Finding(
                "warning",
                "lease-visibility",
                where,
                f"The broker redelivers after {duration(s.visibility)} and the lease is {duration(settings.lease)}: "
                "a dead worker's message comes back again and again before it can be decided.",
                f"Set idem_lease below {int(s.visibility)}.",
            )


def _distinct(s: Snapshot) -> Iterator[tuple[Settings, str]]:
    """Each setting once: of the task where it differs from the first one's, else for all."""
    guarded = [task for task in s.tasks if task.guarded]
    seen: set[float] = set()
    for task in guarded:
        if task.settings.lease not in seen:
            seen.add(task.settings.lease)
            yield task.settings, task.name


def time_limits(s: Snapshot) -> Iterator[Finding]:
    for task in s.tasks:
        limit = task.time_limit or task.soft_time_limit
        if not task.guarded or not limit:
            continue
        if s.pool in NO_LIMITS:
            yield Finding(
                "error",
                "limits-ignored",
                task.name,
                f"The {s.pool} pool enforces no time limit, so a body that hangs keeps its lease for ever, and every "
                "duplicate waits with it.",
                "Run it with --pool prefork, or give every call in the body a timeout of its own.",
            )
        if task.time_limit and not task.soft_time_limit:
            yield Finding(
                "note",
                "hard-limit",
                task.name,
                f"Past {task.time_limit:g} s its process is killed, and what it was doing is in doubt.",
                "Set soft_time_limit a little lower, and handle SoftTimeLimitExceeded where the effect can be undone.",
            )
        if task.asks and limit < task.settings.reconcile_timeout:
            yield Finding(
                "warning",
                "reconcile-limit",
                task.name,
                f"Its time limit ({limit:g} s) is shorter than the destination may take to answer "
                f"({task.settings.reconcile_timeout:g} s): the question is cut off, and stays open.",
                f"Set idem_reconcile_timeout below {limit:g}.",
            )


def acknowledgement(s: Snapshot) -> Iterator[Finding]:
    twice = [t.name for t in s.tasks if t.acks_late and not t.guarded and not t.name.startswith("celery.")]
    if twice:
        more = f" and {len(twice) - 5} more" if len(twice) > 5 else ""
        yield Finding(
            "note",
            "unguarded-acks-late",
            ", ".join(twice[:5]) + more,
            "Delivered again after a crash (acks_late), without a guard: what it did, it does twice.",
            "Declare intent=(…) with base=IdempotentTask where it writes anything.",
        )
    for task in s.tasks:
        if not task.guarded:
            continue
        if not task.acks_late:
            yield Finding(
                "warning",
                "acks-early",
                task.name,
                "Its message is gone as soon as a worker has it. After a crash nothing comes back, so an intent that "
                "was running waits as lapsed for ever.",
                "Set task_acks_late = True and task_reject_on_worker_lost = True: the guard makes redelivery safe.",
            )
        elif not task.reject_on_worker_lost:
            yield Finding(
                "warning",
                "worker-lost",
                task.name,
                "When its process is killed (memory, for one) Celery acknowledges the message although acks_late is "
                "set. The worker's main process then decides in its place; should the store not answer it within "
                "a second, the message is gone and the caller gets WorkerLostError.",
                "Set task_reject_on_worker_lost = True.",
            )


# --- intents -----------------------------------------------------------------------------


def no_intent(s: Snapshot) -> Iterator[Finding]:
    plain = [t.name for t in s.tasks if not t.guarded and not t.name.startswith("celery.")]
    guarded = [t for t in s.tasks if t.guarded]
    if not guarded:
        yield Finding(
            "warning",
            "no-intent",
            "the application",
            f"No task declares an intent, so nothing is guarded ({', '.join(plain[:5]) or 'there are no tasks'}).",
            'Declare intent=(…) with base=IdempotentTask, or task_annotations = {"task": {"intent": (…)}}.',
        )


def volatile_intent(s: Snapshot) -> Iterator[Finding]:
    for task in s.tasks:
        if not task.guarded or task.all_arguments:
            continue
        for name in task.intent or ():
            kind = task.parameters.get(name, "")
            if VOLATILE.search(name) or kind in INSTANTS:
                yield Finding(
                    "warning",
                    "volatile-intent",
                    task.name,
                    f"{name!r} is part of the intent and looks as if each try brought its own value: then every "
                    "retry is a new action, and the guard does nothing.",
                    f"Take {name!r} out of intent=. `idem audit` shows whether it really varies.",
                )
            elif FREE_TEXT.search(name):
                yield Finding(
                    "warning",
                    "text-intent",
                    task.name,
                    f"{name!r} is part of the intent and looks like free text: reworded, it is another action.",
                    f"Take {name!r} out of intent=, and into must_match= if it may not change.",
                )


def all_arguments(s: Snapshot) -> Iterator[Finding]:
    for task in s.tasks:
        if not task.guarded or not task.all_arguments:
            continue
        names = [n for n in task.parameters if FREE_TEXT.search(n) or VOLATILE.search(n)]
        if names:
            others = ", ".join(repr(n) for n in task.parameters if n not in names)
            yield Finding(
                "warning",
                "all-arguments",
                task.name,
                f"intent=ALL_ARGUMENTS makes {', '.join(map(repr, names))} part of what the action is, and that looks "
                "reworded or minted anew each time: then the guard does nothing.",
                f"Name what tells two actions apart instead: intent=({others},)."
                if others
                else "Name an intent=(…).",
            )


def beat_without_occurrence(s: Snapshot) -> Iterator[Finding]:
    for task in s.tasks:
        if task.guarded and task.scheduled and not s.ticks:
            yield Finding(
                "error",
                "beat",
                task.name,
                "Beat sends it with the same arguments at every tick. That is one action, so it runs once and is "
                f"replayed until its outcome expires after {duration(task.settings.result_ttl)}.",
                'Set beat_scheduler = "celery_idem.adapters.beat:Scheduler", which makes each tick an occurrence.',
            )


# --- choices worth knowing ---------------------------------------------------------------


def choices(s: Snapshot) -> Iterator[Finding]:
    for task in s.tasks:
        if not task.guarded:
            continue
        if task.settings.shadow:
            yield Finding(
                "note",
                "shadow",
                task.name,
                "Shadow mode: duplicates are counted and run all the same.",
                "Set idem_shadow = False when `idem shadow` says it is ready.",
            )
        if task.settings.on_store_error == "run":
            yield Finding(
                "warning",
                "fail-open",
                task.name,
                "While the store is away it runs without a guard, as often as it is delivered.",
                'Set idem_on_store_error = "retry", unless running twice is better than running late.',
            )
    if s.pickled:
        yield Finding(
            "warning",
            "pickle",
            "result_accept_content",
            "Stored results may be pickled: whoever can write to the store can run code in your workers.",
            'Set result_accept_content = ["json"].',
        )


CHEAP: tuple[Check, ...] = (
    memory_store,
    retention,
    eta_beyond_visibility,
    leases,
    time_limits,
    acknowledgement,
    no_intent,
    volatile_intent,
    all_arguments,
    beat_without_occurrence,
    choices,
)
"""Checks that need nothing but the configuration."""

ASKING: tuple[Check, ...] = (
    store_answers,
    eviction,
    persistence,
    replicas,
    replica_as_store,
    clock_skew,
)
"""Checks that look at what the stores said."""

ORDER: dict[Severity, int] = {"error": 0, "warning": 1, "note": 2}


def examine(snapshot: Snapshot, checks: tuple[Check, ...] = CHEAP + ASKING) -> list[Finding]:
    """Everything that is wrong, the worst first."""
    found = [finding for check in checks for finding in check(snapshot)]
    return sorted(found, key=lambda finding: ORDER[finding.severity])


# --- gathering ---------------------------------------------------------------------------


def gather(app: Celery, *, ask: bool = True, pool: str = "") -> Snapshot:
    """Look at an application.

    Args:
        ask: ask its stores too; one that is away costs its connection timeout.
        pool: the worker's pool, where it is known.

    Raises:
        ConfigurationError: a setting is wrong; that is the first thing to repair.
    """
    conf = app.conf
    settings = of_app(conf)
    desk = Desk(app)
    guarded = desk.tasks()
    broker = urlsplit(str(conf.broker_url or conf.broker_read_url or "")).scheme or "amqp"
    schedule: Mapping[str, Any] = conf.beat_schedule or {}
    scheduled = {str(entry.get("task")) for entry in schedule.values() if isinstance(entry, Mapping)}
    return Snapshot(
        broker=broker,
        visibility=_visibility(broker, conf.broker_transport_options or {}),
        pool=pool or str(conf.worker_pool or ""),
        result_expires=_seconds(conf.result_expires),
        pickled="pickle" in str(conf.result_accept_content or conf.accept_content),
        ticks="celery_idem" in str(conf.beat_scheduler or ""),
        longest_delay=max((_countdown(entry) for entry in schedule.values()), default=0.0),
        store_scheme=urlsplit(store_url(settings, conf)).scheme,
        tasks=tuple(
            _task_facts(task, guarded.get(name), name in scheduled)
            for name, task in sorted(app.tasks.items())
        ),
        stores=tuple(_store_facts(ledger, settings.durability) for ledger in desk.ledgers()) if ask else (),
    )


def _visibility(broker: str, options: Mapping[str, Any]) -> float | None:
    default = VISIBILITY.get(broker)
    return None if default is None else float(options.get("visibility_timeout", default))


def _seconds(value: Any) -> float | None:
    if value is None:
        return None
    return float(value.total_seconds() if hasattr(value, "total_seconds") else value) or None


def _countdown(entry: Any) -> float:
    options = entry.get("options") if isinstance(entry, Mapping) else None
    countdown = (options or {}).get("countdown", 0)
    return float(countdown) if isinstance(countdown, (int, float)) else 0.0


def _task_facts(task: Any, guarded: IdempotentTask | None, scheduled: bool) -> TaskFacts:
    limits = {
        "acks_late": bool(task.acks_late),
        "reject_on_worker_lost": bool(task.reject_on_worker_lost),
        "time_limit": task.time_limit,
        "soft_time_limit": task.soft_time_limit,
        "retry_horizon": _retry_horizon(task),
        "scheduled": scheduled,
    }
    if guarded is None:
        return TaskFacts(name=task.name, guarded=False, **limits)
    declaration = guarded.guard.declaration
    return TaskFacts(
        name=task.name,
        guarded=True,
        settings=guarded.guard.settings,
        intent=declaration.fields,
        all_arguments=declaration.fields is None and declaration.compute is None,
        parameters={name: _kind(p.annotation) for name, p in declaration.signature.parameters.items()},
        asks=guarded.guard.ask is not None,
        **limits,
    )


def _kind(annotation: Any) -> str:
    if annotation is inspect.Parameter.empty:
        return ""
    return str(getattr(annotation, "__name__", annotation)).rpartition(".")[2]


def _retry_horizon(task: Any) -> float | None:
    """Seconds until the last retry; None where nobody counts them."""
    if task.max_retries is None:
        return None
    delay = float(task.default_retry_delay or 0)
    backoff = getattr(task, "retry_backoff", False)
    if not backoff:
        return float(task.max_retries) * delay
    longest = float(getattr(task, "retry_backoff_max", 600))
    first = 1.0 if backoff is True else float(backoff)
    return sum(min(longest, first * 2.0 ** min(n, 60)) for n in range(task.max_retries))


def _store_facts(ledger: Ledger, durability: str) -> StoreFacts:
    store = ledger.store
    info: dict[str, str] = {}
    try:
        before = time.time()
        now = store.read(f"{ledger.namespace}:").now / MICROSECONDS
        after = time.time()
        if hasattr(store, "execute"):
            info = _info(store.execute("INFO"))
            if "rdb_saves_configured" not in info:
                info["rdb_saves_configured"] = _saves(store)
    except StoreError as error:
        return StoreFacts(store.url, durability, error=str(error))
    skew = max(0.0, abs(now - (before + after) / 2) - (after - before) / 2)
    return StoreFacts(store.url, durability, info=info, skew=skew)


def _info(reply: Any) -> dict[str, str]:
    lines = reply.decode("utf-8", "replace").splitlines() if isinstance(reply, bytes) else []
    return dict(line.split(":", 1) for line in lines if ":" in line and not line.startswith("#"))


def _saves(store: Any) -> str:
    """ "1" when snapshots are configured; assumed where the server does not let us look (as hosted ones do)."""
    try:
        _, value = store.execute("CONFIG", "GET", "save")
    except (StoreError, ValueError, TypeError):
        return "1"
    return "1" if value else "0"


# --- at worker start -----------------------------------------------------------------------


class AtStart(bootsteps.StartStopStep):  # type: ignore[misc]
    """The cheap half, when a worker starts. Never stops it: what is wrong is logged."""

    def __init__(self, parent: Any, **_: Any) -> None:
        super().__init__(parent)
        if getattr(parent, "task_events", False):  # -E. Before the pool forks, so that its children send too.
            celery_events.install(parent.app)

    def start(self, parent: Any) -> None:
        try:
            module = str(getattr(parent.pool_cls, "__module__", "")).rpartition(".")[2]
            found = examine(gather(parent.app, ask=False, pool=POOLS.get(module, module)), CHEAP)
        except IdempotencyError as error:
            events.logger.error("celery_idem: %s", error)
            return
        for finding in found:
            if finding.severity != "note":
                log = events.logger.error if finding.severity == "error" else events.logger.warning
                log("%s: %s: %s -> %s", finding.code, finding.where, finding.wrong, finding.change)


POOLS = {"thread": "threads"}
"""Pools whose module has another name than ``--pool`` takes."""
