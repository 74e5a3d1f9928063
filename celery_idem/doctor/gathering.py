"""Looks at an application and asks its stores: a snapshot, which the checks then look at."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from celery_idem.desk import Desk
from celery_idem.doctor.facts import Snapshot, StoreFacts, TaskFacts
from celery_idem.doctor.intents import annotated
from celery_idem.errors import StoreError
from celery_idem.intent import MICROSECONDS
from celery_idem.settings import of_app, store_url

if TYPE_CHECKING:
    from celery import Celery

    from celery_idem.ledger import Ledger
    from celery_idem.task import IdempotentTask

VISIBILITY = {"redis": 3600.0, "rediss": 3600.0, "sentinel": 3600.0, "redis+socket": 3600.0, "sqs": 1800.0}
"""Seconds until a message that nobody acknowledged is delivered again, by the broker's scheme:
kombu's defaults. Other brokers notice the lost connection instead."""


AMQP = ("amqp", "amqps", "pyamqp", "librabbitmq")
"""Schemes of kombu's whose broker confirms a message only where it is told to."""


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
    transport: Mapping[str, Any] = conf.broker_transport_options or {}
    return Snapshot(
        visibility=_visibility(broker, transport),
        confirmed=broker not in AMQP or bool(transport.get("confirm_publish")),
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
        parameters={name: annotated(p.annotation) for name, p in declaration.signature.parameters.items()},
        asks=guarded.guard.ask is not None,
        **limits,
    )


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
    try:
        before = time.time()
        now = store.read(f"{ledger.namespace}:").now / MICROSECONDS
        after = time.time()
    except StoreError as error:
        return StoreFacts(store.url, durability, error=str(error))
    info: dict[str, str] = {}
    unseen = ""
    try:
        if hasattr(store, "execute"):
            info = _info(store.execute("INFO"))
            if "rdb_saves_configured" not in info:
                info["rdb_saves_configured"] = _saves(store)
    except StoreError as error:  # a user with the least rights may do all that the guard needs, and not this
        unseen = str(error)
    skew = max(0.0, abs(now - (before + after) / 2) - (after - before) / 2)
    return StoreFacts(store.url, durability, unseen=unseen, info=info, skew=skew)


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
