"""Looks at an application and asks its stores. The result is a snapshot: values, which the checks then look at."""

from __future__ import annotations

import inspect
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from urllib.parse import urlsplit

from celery_idem.core.errors import ConfigurationError, StoreError
from celery_idem.core.model import MICROSECONDS, State
from celery_idem.integration.declaring import options_of
from celery_idem.integration.options import Stray
from celery_idem.integration.settings import LONGEST, Settings, of_app
from celery_idem.integration.wiring import codec_of, store_of
from celery_idem.operate.doctor import kept, schedules, servers
from celery_idem.operate.doctor.schedules import Entry
from celery_idem.operate.operators import Operator

if TYPE_CHECKING:
    from celery import Celery

    from celery_idem.engine.ledger import Ledger
    from celery_idem.integration.task import IdempotentTask

Severity = Literal["error", "warning", "note"]


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
        scheduled: entries of beat that send it the same call at every tick.
        strays: attributes with a setting's name that are not read as settings.
        unread: why it could not be looked at; "" where it was.
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
    scheduled: tuple[Entry, ...] = ()
    asks: bool = False
    strays: tuple[Stray, ...] = ()
    unread: str = ""


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


@dataclass(frozen=True)
class Snapshot:
    """A set-up, as values.

    Attributes:
        visibility: seconds until the broker delivers an unacknowledged message again; None: it does not by time.
        confirmed: a publisher learns whether the broker has the message.
        pool: the worker's pool; "" where it is not known.
        result_expires: seconds the result backend keeps results; None: for ever.
        pickled: pickle is accepted for results.
        unusable: why results could not be read again; "" where they can.
        ticks: the beat scheduler makes each tick an occurrence.
        unread_schedule: why beat's entries in a database could not be read; "" where they could.
        longest_delay: the longest countdown in the beat schedule, in seconds.
        store_scheme: of ``idem_store``, or of the result backend that stands in for it.
    """

    visibility: float | None = 3600.0
    confirmed: bool = True
    pool: str = ""
    result_expires: float | None = 86_400.0
    pickled: bool = False
    unusable: str = ""
    ticks: bool = False
    unread_schedule: str = ""
    longest_delay: float = 0.0
    store_scheme: str = "redis"
    tasks: tuple[TaskFacts, ...] = ()
    stores: tuple[StoreFacts, ...] = ()


Check = Callable[[Snapshot], Iterator[Finding]]
"""Looks at a snapshot alone: no server, no clock, so each can be tested with values."""

# --- looking at an application ----------------------------------------------------------

VISIBILITY = {"redis": 3600.0, "rediss": 3600.0, "sentinel": 3600.0, "redis+socket": 3600.0, "sqs": 1800.0}
"""Seconds until an unacknowledged message is delivered again, by the broker's scheme:
kombu's defaults. Other brokers notice the lost connection instead."""


DOUBLINGS = 64
"""Retries after which an exponential delay has met its maximum, whatever it began with."""

OPEN = bytes(state for state in State if not state.settled)
LOOKED_AT = 10_000
"""Records read to find one from the future: 0.2 s among those of a Redis that keeps millions."""

PROBE = b"x" * 40
"""What is written to see whether the store takes it: as long as a small record."""

PROBE_TTL = 60 * MICROSECONDS
"""After which a value is gone that could be written and not deleted."""

AMQP = ("amqp", "amqps", "pyamqp", "librabbitmq")
"""Schemes of kombu's whose broker confirms a message only where it is told to."""


def gather(app: Celery, *, ask: bool = True, pool: str = "") -> Snapshot:
    """Take a snapshot of an application.

    Args:
        ask: ask its stores too; one that does not answer costs its connection timeout.
        pool: the worker's pool, where it is known.

    Raises:
        ConfigurationError: a setting is wrong, which has to be corrected first.
    """
    conf = app.conf
    settings = of_app(conf)
    operator = Operator(app)
    guarded = operator.tasks()
    brokers = _brokers(conf.broker_read_url, conf.broker_write_url)
    schedule = conf.beat_schedule if isinstance(conf.beat_schedule, Mapping) else {}
    scheduled, unread = _scheduled(app, ask)
    transport: Mapping[str, Any] = conf.broker_transport_options or {}
    return Snapshot(
        visibility=_visibility(brokers, transport),
        confirmed=not set(AMQP) & set(brokers) or bool(transport.get("confirm_publish")),
        pool=pool or str(conf.worker_pool or ""),
        result_expires=_seconds(conf.result_expires),
        pickled="pickle" in str(conf.result_accept_content or conf.accept_content),
        unusable=codec_of(settings, conf).unusable(),
        ticks=schedules.ticks(app),
        unread_schedule=unread,
        longest_delay=max((_countdown(entry) for entry in schedule.values()), default=0.0),
        store_scheme=urlsplit(store_of(settings, app).url).scheme,
        tasks=tuple(
            _facts_or_why_not(
                name,
                task,
                guarded.get(name),
                tuple(one for one in scheduled if app.tasks.get(one.task) is task),
            )
            for name, task in sorted(app.tasks.items())
            if name == task.name  # and not a former name of it
        ),
        stores=tuple(
            _store_facts(ledger, settings.durability, guarded.values()) for ledger in operator.ledgers()
        )
        if ask
        else (),
    )


def _scheduled(app: Celery, ask: bool) -> tuple[list[Entry], str]:
    """What beat sends, and why its database could not be read."""
    found: list[Entry] = []
    try:
        found.extend(schedules.entries(app, ask))
    except Exception as error:  # a driver's; a migration that was not made
        return found, f"{type(error).__name__}: {error}"
    return found, ""


def _brokers(*given: Any) -> list[str]:
    """Schemes of the brokers: kombu takes several URLs to fail over to, as a list or with ";" between them."""
    urls = [url for some in given for url in (some.split(";") if isinstance(some, str) else some or ())]
    return [str(url).partition(":")[0] for url in urls if "://" in str(url)] or ["amqp"]


def _visibility(brokers: list[str], options: Mapping[str, Any]) -> float | None:
    """The longest of them: outcomes have to be kept for as long."""
    defaults = [VISIBILITY[broker] for broker in brokers if broker in VISIBILITY]
    return None if not defaults else _number(options.get("visibility_timeout"), max(defaults))


def _number(value: Any, default: float) -> float:
    """A finite number of seconds; ``default`` where it is none."""
    try:
        number = float(value.total_seconds() if hasattr(value, "total_seconds") else value)
    except (TypeError, ValueError, OverflowError):
        return default
    return number if math.isfinite(number) else default


def _seconds(value: Any) -> float | None:
    return _number(value, 0.0) or None


def _countdown(entry: Any) -> float:
    options = entry.get("options") if isinstance(entry, Mapping) else None
    return _number(options.get("countdown"), 0.0) if isinstance(options, Mapping) else 0.0


def _facts_or_why_not(
    name: str, task: Any, guarded: IdempotentTask | None, scheduled: tuple[Entry, ...]
) -> TaskFacts:
    """What matters of a task; of one whose attributes cannot be read, the reason."""
    try:
        return _task_facts(task, guarded, scheduled)
    except ConfigurationError:
        raise
    except Exception as error:  # a property of the author's own, a limit that is text
        why = f"{type(error).__name__}: {error}"
        return TaskFacts(name=name, guarded=guarded is not None, acks_late=guarded is not None, unread=why)


def _limit(value: Any) -> float | None:
    return None if value is None else float(value)


def _task_facts(task: Any, guarded: IdempotentTask | None, scheduled: tuple[Entry, ...]) -> TaskFacts:
    limits: dict[str, Any] = {
        "acks_late": bool(task.acks_late),
        "reject_on_worker_lost": bool(task.reject_on_worker_lost),
        "time_limit": _limit(task.time_limit),
        "soft_time_limit": _limit(task.soft_time_limit),
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
        parameters={name: annotated(p.annotation) for name, p in declaration.signature.parameters.items()},
        asks=guarded.guard.ask is not None,
        strays=options_of(type(guarded)).strays,
        **limits,
    )


def _retry_horizon(task: Any) -> float | None:
    """Seconds until the last retry; None where they never end, or not within a century."""
    try:
        retries = None if task.max_retries is None else float(task.max_retries)
    except OverflowError:
        retries = None
    delay = float(task.default_retry_delay or 0)
    backoff = getattr(task, "retry_backoff", False)
    if retries is None:
        return None
    if not backoff:
        horizon = retries * delay if retries and delay else 0.0
    else:
        longest = float(getattr(task, "retry_backoff_max", 600))
        first = 1.0 if backoff is True else float(backoff)
        doubling = max(0, int(min(retries, DOUBLINGS)))
        growing = sum(min(longest, first * 2.0**n) for n in range(doubling))
        horizon = growing + (retries - doubling) * longest if retries > doubling else growing
    return horizon if horizon <= LONGEST else None


def _store_facts(ledger: Ledger, durability: str, guarded: Iterable[IdempotentTask] = ()) -> StoreFacts:
    store = ledger.store
    tasks = tuple(str(task.name) for task in guarded if task.guard.ledger.store is store)
    try:
        before = time.time()
        now = store.read(f"{ledger.namespace}:").now / MICROSECONDS
        after = time.time()
        some = islice(store.scan_states(f"{ledger.namespace}:", OPEN), LOOKED_AT)
        ahead = max((stored.stamp / MICROSECONDS - now for _, stored in some), default=0.0)
    except StoreError as error:
        return StoreFacts(store.url, durability, tasks, error=str(error))
    info: dict[str, str] = {}
    noted: Mapping[str, Any] = {}
    unseen = ""
    unwritable = _unwritable(ledger)
    try:
        info = asked(store)
        noted = kept.read(ledger, servers.NAME)
    except StoreError as error:  # a user with the least rights may do all that the guard needs, and not this
        unseen = str(error)
    return StoreFacts(
        store.url,
        durability,
        tasks,
        unwritable=unwritable,
        unseen=unseen,
        info=info,
        server=servers.run_of(info),
        noted=noted,
        now=now,
        skew=max(0.0, abs(now - (before + after) / 2) - (after - before) / 2),
        ahead=ahead,
    )


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


def asked(store: Any) -> dict[str, str]:
    """What a server says of itself; empty for a store without a server.

    Raises:
        StoreError: it does not let us look.
    """
    if hasattr(store, "query"):
        rows = store.query(SERVER) if store.dialect == "postgresql" else ()
        return dict(zip(SERVER_NAMES, map(str, rows[0]), strict=True)) if rows else {}
    if not hasattr(store, "execute"):
        return {}
    info = _info(store.execute("INFO"))
    if "rdb_saves_configured" not in info:
        info["rdb_saves_configured"] = _saves(store)
    return info


SERVER_NAMES = ("system_identifier", "timeline", "standby", "read_only", "blocked")
SERVER = """
SELECT (SELECT system_identifier FROM pg_control_system()), (SELECT timeline_id FROM pg_control_checkpoint()),
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


def annotated(annotation: Any) -> str:
    """An annotation as text, without its module; "" for none."""
    if annotation is inspect.Parameter.empty:
        return ""
    return str(getattr(annotation, "__name__", annotation)).rpartition(".")[2]
