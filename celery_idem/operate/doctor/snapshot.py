"""Reads an application into a snapshot: values for the checks."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args
from urllib.parse import urlsplit

from celery_idem.core.errors import ConfigurationError
from celery_idem.integration.declaring import options_of
from celery_idem.integration.options import Stray
from celery_idem.integration.settings import LONGEST, Settings, of_app
from celery_idem.integration.wiring import codec_of, store_of
from celery_idem.operate.doctor import schedules
from celery_idem.operate.doctor.asking import StoreFacts, facts_of
from celery_idem.operate.doctor.schedules import Entry
from celery_idem.operate.operators import Operator

if TYPE_CHECKING:
    from celery import Celery

    from celery_idem.integration.task import IdempotentTask

Severity = Literal["error", "warning", "note"]


class Finding(NamedTuple):
    """One problem.

    Attributes:
        code: short and stable, for filters and for the documentation.
        where: the task, the store or the setting that it is about.
        wrong: what goes wrong, in one sentence.
        change: the exact setting to change.
    """

    severity: Severity
    code: str
    where: str
    wrong: str
    change: str


error, warning, note = (partial(Finding, severity) for severity in get_args(Severity))


@dataclass(frozen=True)
class TaskFacts:
    """Facts about one task.

    Attributes:
        intent: parameters in the intent; None if a function computes it.
        parameters: every parameter, and its annotation as text.
        retry_horizon: seconds until its last retry; None if they never end.
        scheduled: entries of beat that send the same call at every tick.
        strays: attributes with a setting's name that are not read as settings.
        secret: it has secret parameters.
        unread: why its options could not be read; "" if they could.
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
    secret: bool = False
    unread: str = ""


@dataclass(frozen=True)
class Snapshot:
    """A set-up, as values.

    Attributes:
        visibility: seconds until the broker delivers an unacknowledged message again; None: time does not matter.
        confirmed: a publisher learns whether the broker has the message.
        pool: the worker's pool; "" if it is not known.
        result_expires: seconds for which the result backend keeps results; None: for ever.
        pickled: pickle is accepted for results.
        unusable: why results could not be read again; "" if they can.
        ticks: the beat scheduler makes each tick an occurrence.
        unread_schedule: why beat's entries in a database could not be read; "" if they could.
        longest_delay: the longest countdown in the beat schedule, in seconds.
        store_scheme: scheme of ``idem_store``, or of the result backend that is the store.
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

    @property
    def guarded(self) -> list[TaskFacts]:
        """The guarded tasks."""
        return [task for task in self.tasks if task.guarded]


Check = Callable[[Snapshot], Iterator[Finding]]
"""A check. It uses only a snapshot, no server and no clock, so each can be tested with values."""

# --- reading an application -------------------------------------------------------------

VISIBILITY = {"redis": 3600.0, "rediss": 3600.0, "sentinel": 3600.0, "redis+socket": 3600.0, "sqs": 1800.0}
"""Seconds until an unacknowledged message is delivered again, by the broker's scheme: kombu's defaults. Other brokers
notice the lost connection instead."""


DOUBLINGS = 64
"""Retries after which an exponential delay has reached its maximum, whatever its first value."""

AMQP = ("amqp", "amqps", "pyamqp", "librabbitmq")
"""kombu's schemes of RabbitMQ, which confirms messages only if ``confirm_publish`` is set."""


def gather(app: Celery, *, ask: bool = True, pool: str = "") -> Snapshot:
    """Take a snapshot of an application.

    Args:
        ask: ask its stores too. One that does not answer costs its connection timeout.
        pool: the worker's pool, if it is known.

    Raises:
        ConfigurationError: a setting is wrong, and has to be corrected first.
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
        result_expires=_number(conf.result_expires, 0.0) or None,
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
            if name == task.name  # not one of its former names
        ),
        stores=tuple(
            facts
            for ledger in (operator.ledgers() if ask else ())
            for facts in facts_of(ledger, settings.durability, guarded.values())
        ),
    )


def _scheduled(app: Celery, ask: bool) -> tuple[list[Entry], str]:
    """Return what beat sends, and why its database could not be read; "" if it could."""
    found: list[Entry] = []
    try:
        found.extend(schedules.entries(app, ask))
    except Exception as error:  # of a driver, or because of a missing migration
        return found, f"{type(error).__name__}: {error}"
    return found, ""


def _brokers(*given: Any) -> list[str]:
    """Return the schemes of the brokers. kombu takes several URLs, as a list or with ";" between them."""
    urls = [url for some in given for url in (some.split(";") if isinstance(some, str) else some or ())]
    return [str(url).partition(":")[0] for url in urls if "://" in str(url)] or ["amqp"]


def _visibility(brokers: list[str], options: Mapping[str, Any]) -> float | None:
    """Return the longest visibility timeout, because outcomes have to be kept for as long."""
    defaults = [VISIBILITY[broker] for broker in brokers if broker in VISIBILITY]
    return None if not defaults else _number(options.get("visibility_timeout"), max(defaults))


def _number(value: Any, default: float) -> float:
    """Return a value as a finite number of seconds; ``default`` if it is none."""
    try:
        number = float(value.total_seconds() if hasattr(value, "total_seconds") else value)
    except (TypeError, ValueError, OverflowError):
        return default
    return number if math.isfinite(number) else default


def _countdown(entry: Any) -> float:
    options = entry.get("options") if isinstance(entry, Mapping) else None
    return _number(options.get("countdown"), 0.0) if isinstance(options, Mapping) else 0.0


def _facts_or_why_not(
    name: str, task: Any, guarded: IdempotentTask | None, scheduled: tuple[Entry, ...]
) -> TaskFacts:
    """Return the facts about a task, or why its attributes cannot be read."""
    try:
        return _task_facts(task, guarded, scheduled)
    except ConfigurationError:
        raise
    except Exception as error:  # of an author's own property, or because of a limit that is text
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
        secret=bool(declaration.secret),
        **limits,
    )


def _retry_horizon(task: Any) -> float | None:
    """Return the seconds until the last retry; None if retries never end, or not within a century."""
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


def annotated(annotation: Any) -> str:
    """Return an annotation as text, without its module; "" for none."""
    if annotation is inspect.Parameter.empty:
        return ""
    return str(getattr(annotation, "__name__", annotation)).rpartition(".")[2]
