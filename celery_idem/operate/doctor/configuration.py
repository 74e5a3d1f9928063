"""Checks of an application's configuration and its tasks. They ask no server."""

from __future__ import annotations

import re
from collections.abc import Iterator

from celery_idem.core.model import MICROSECONDS
from celery_idem.integration.options import Stray
from celery_idem.integration.settings import PREFIX, Settings
from celery_idem.operate.doctor.snapshot import Finding, Snapshot, error, note, warning
from celery_idem.operate.operators import duration

VOLATILE = re.compile(
    r"(^|_)(now|timestamp|ts|datetime|nonce|random|salt|attempts?|retries|retry_count)$"
    r"|^(time|uuid|guid)$|_at$"
    r"|(^|_)(request|trace|span|correlation|message|call|run|job|delivery|attempt)_?(id|uuid)$"
)
"""Names of parameters that usually have a new value for each try, such as ``message_id``, but not ``order_id`` or
``order_uuid``."""

FREE_TEXT = re.compile(
    r"(^|_)(note|notes|text|message|body|content|comment|comments|description|reason|summary|prompt|title|subject|"
    r"explanation|thought|details)$"
)
"""Names of parameters whose text a person or a model words differently each time."""

INSTANTS = ("datetime", "time")
"""Annotations of parameters that usually have a new value for each try, whatever their names."""

NO_LIMITS = ("threads", "solo", "eventlet")
"""Pools that enforce no time limit; gevent enforces the hard one."""

SHORT_LEASE = 5.0
"""Seconds. A shorter lease lapses in an ordinary pause: a large garbage collection, a failover of the store, a machine
that swaps."""

LONG_LEASE = 3600.0
"""Seconds. With a longer lease, it takes hours until a dead worker's work is decided."""

NOT_A_SETTING = "not-a-setting"
"""Code of the one note that a worker logs when it starts: an attribute may be meant as a setting, and is not read."""


# --- intents and options ----------------------------------------------------------------


def minted_anew(name: str, annotation: str) -> bool:
    """Whether a parameter's name or annotation says that each try has its own value."""
    return VOLATILE.search(name) is not None or annotation in INSTANTS


def no_intent(s: Snapshot) -> Iterator[Finding]:
    plain = [t.name for t in s.tasks if not t.guarded and not t.name.startswith("celery.")]
    if not s.guarded:
        yield warning(
            "no-intent",
            "the application",
            f"No task declares an intent, so nothing is guarded ({', '.join(plain[:5]) or 'there are no tasks'}).",
            'Declare intent=(…) with base=IdempotentTask, or task_annotations = {"task": {"intent": (…)}}.',
        )


def volatile_intent(s: Snapshot) -> Iterator[Finding]:
    for task in s.guarded:
        for name in () if task.all_arguments else task.intent or ():
            if minted_anew(name, task.parameters.get(name, "")):
                yield warning(
                    "volatile-intent",
                    task.name,
                    f"{name!r} is part of the intent and looks as if each try brought its own value: then every "
                    "retry is a new action, and the guard does nothing.",
                    f"Take {name!r} out of intent=. `idem audit` shows whether it really varies.",
                )
            elif FREE_TEXT.search(name):
                yield warning(
                    "text-intent",
                    task.name,
                    f"{name!r} is part of the intent and looks like free text: reworded, it is another action.",
                    f"Take {name!r} out of intent=, and into must_match= if it may not change.",
                )


def all_arguments(s: Snapshot) -> Iterator[Finding]:
    for task in s.guarded:
        names = [n for n in task.parameters if FREE_TEXT.search(n) or VOLATILE.search(n)]
        if task.all_arguments and names:
            others = ", ".join(repr(n) for n in task.parameters if n not in names)
            yield warning(
                "all-arguments",
                task.name,
                f"intent=ALL_ARGUMENTS makes {', '.join(map(repr, names))} part of what the action is, and that looks "
                "reworded or minted anew each time: then the guard does nothing.",
                f"Name what tells two actions apart instead: intent=({others},)."
                if others
                else "Name an intent=(…).",
            )


def strays(s: Snapshot) -> Iterator[Finding]:
    found: dict[Stray, list[str]] = {}
    for task in s.tasks:
        for stray in task.strays:
            found.setdefault(stray, []).append(task.name)
    for stray, tasks in found.items():
        yield note(
            NOT_A_SETTING,
            stray.where,
            "It has a setting's name and is not read as one, because its class does not declare the intent of "
            f"{', '.join(tasks[:3])}{' and others' if len(tasks) > 3 else ''}.",
            f"Write {PREFIX}{stray.name} if it is meant as the setting. If not, nothing has to change.",
        )


def beat_without_occurrence(s: Snapshot) -> Iterator[Finding]:
    for task in s.guarded:
        # Beat copies its own there.
        names = ", ".join(dict.fromkeys(repr(entry.name) for entry in task.scheduled))
        if task.scheduled and not s.ticks:
            yield error(
                "beat",
                task.name,
                f"Beat sends it with the same arguments at every tick ({names}). That is one action, so it runs once "
                f"and is replayed until its outcome expires after {duration(task.settings.result_ttl)}.",
                'Set beat_scheduler = "celery_idem.adapters.beat:Scheduler", which makes each tick an occurrence; with '
                "entries in a database a class of your own, Scheduler(Ticks, DatabaseScheduler).",
            )
        elif any(entry.interval for entry in task.scheduled):
            names = ", ".join(repr(entry.name) for entry in task.scheduled if entry.interval)
            yield note(
                "beat-interval",
                task.name,
                f"The entries {names} of beat's database have a plain interval, which two beats count apart: each has "
                "its own ticks, and all of them run.",
                "Run one beat, or give them a crontab.",
            )
    if s.unread_schedule:
        yield note(
            "not-looked-at",
            "django_celery_beat",
            f"Beat's entries in the database were not looked at: {s.unread_schedule}",
            "Run the doctor where beat runs, with the same settings.",
        )


# --- how tasks run ----------------------------------------------------------------------


def unread(s: Snapshot) -> Iterator[Finding]:
    for task in s.tasks:
        if task.unread:
            yield warning(
                "not-looked-at",
                task.name,
                f"Its options could not be read, so nothing about it was checked ({task.unread}).",
                "Correct the attribute or the property that raises this.",
            )


def time_limits(s: Snapshot) -> Iterator[Finding]:
    for task in s.guarded:
        limit = task.time_limit or task.soft_time_limit
        if not limit:
            continue
        if s.pool in NO_LIMITS:
            yield error(
                "limits-ignored",
                task.name,
                f"The {s.pool} pool enforces no time limit, so a body that hangs keeps its lease for ever, and every "
                "duplicate waits with it.",
                "Run it with --pool prefork, or give every call in the body a timeout of its own.",
            )
        if task.time_limit and not task.soft_time_limit:
            yield note(
                "hard-limit",
                task.name,
                f"Past {task.time_limit:g} s its process is killed, and what it was doing is in doubt.",
                "Set soft_time_limit a little lower, and handle SoftTimeLimitExceeded where the effect can be undone.",
            )
        if task.asks and limit < task.settings.reconcile_timeout:
            yield warning(
                "reconcile-limit",
                task.name,
                f"Its time limit ({limit:g} s) is shorter than the destination may take to answer "
                f"({task.settings.reconcile_timeout:g} s): the question is cut off, and stays open.",
                f"Set idem_reconcile_timeout below {limit:g}.",
            )


def _left(settings: Settings) -> str:
    """Return what becomes of a running action whose message is gone, after "what it was running"."""
    if settings.recover and settings.keep_call:
        return "waits for its lease to end, and is then published again from its record"
    return "stays lapsed until the call is made again"


def acknowledgement(s: Snapshot) -> Iterator[Finding]:
    twice = [t.name for t in s.tasks if t.acks_late and not t.guarded and not t.name.startswith("celery.")]
    if twice:
        more = f" and {len(twice) - 5} more" if len(twice) > 5 else ""
        yield note(
            "unguarded-acks-late",
            ", ".join(twice[:5]) + more,
            "Delivered again after a crash (acks_late), without a guard: what it did, it does twice.",
            "Declare intent=(…) with base=IdempotentTask where it writes anything.",
        )
    for task in s.guarded:
        if not task.acks_late:
            yield warning(
                "acks-early",
                task.name,
                "Its message is acknowledged as soon as a worker has it. When the whole worker dies it is not "
                f"delivered again: what it was running {_left(task.settings)}.",
                "Set task_acks_late = True and task_reject_on_worker_lost = True: the guard makes redelivery safe.",
            )
        elif not task.reject_on_worker_lost:
            yield warning(
                "worker-lost",
                task.name,
                "When its process is killed (memory, for one) Celery acknowledges the message although acks_late is "
                "set. The worker's main process then decides in its place; should the store not answer it within "
                "a second, the message is not delivered again and the caller gets WorkerLostError.",
                "Set task_reject_on_worker_lost = True.",
            )


def publishing(s: Snapshot) -> Iterator[Finding]:
    if not s.confirmed:
        yield note(
            "unconfirmed",
            "broker_transport_options",
            "Publishing does not wait until RabbitMQ has the message: one that is on its way while the connection or "
            "the broker goes down is lost without an error, and does not run.",
            'Set broker_transport_options = {"confirm_publish": True}.',
        )


def results(s: Snapshot) -> Iterator[Finding]:
    if s.unusable:
        yield error(
            "serializer",
            "result_serializer",
            f"Guarded tasks refuse to run: {s.unusable}.",
            "Register it with kombu.serialization.register where the application is made, and list it in "
            "accept_content or result_accept_content.",
        )


def choices(s: Snapshot) -> Iterator[Finding]:
    for task in s.guarded:
        if task.settings.shadow:
            yield note(
                "shadow",
                task.name,
                "Shadow mode: duplicates are counted and run all the same.",
                "Set idem_shadow = False when `idem shadow` says it is ready.",
            )
        if (
            task.secret
            and not task.settings.seal_keys
            and task.settings.keep_call
            and not task.settings.shadow
        ):
            yield note(
                "not-sealed",
                task.name,
                "It has secret parameters, and nothing seals them: they are left out of its record, so what is lost "
                "with its worker or its message is not published again. Results and errors are stored in clear.",
                "Set idem_seal_keys (docs/how-to/sealing.md).",
            )
        if task.settings.on_store_error == "run":
            yield warning(
                "fail-open",
                task.name,
                "While the store does not answer it runs without a guard, as often as it is delivered.",
                'Set idem_on_store_error = "retry", unless running twice is better than running late.',
            )
    if s.pickled:
        yield warning(
            "pickle",
            "result_accept_content",
            "Stored results may be pickled: everyone who can write to the store can run code in your workers.",
            'Set result_accept_content = ["json"].',
        )


# --- durations that depend on each other ------------------------------------------------


def retention(s: Snapshot) -> Iterator[Finding]:
    for task in s.guarded:
        policy = task.settings.policy(task.asks)
        keep = min(policy.result_ttl, policy.failure_ttl) / MICROSECONDS
        horizons = [
            (s.visibility, "the broker may deliver a message again", "the visibility timeout"),
            (task.retry_horizon, "its own last retry may come", "the retry horizon"),
            (s.longest_delay, "a scheduled message may still wait", "the longest countdown"),
        ]
        for seconds, what, name in horizons:
            if seconds is not None and keep < seconds:
                yield error(
                    "retention",
                    task.name,
                    f"An outcome is kept {duration(keep)}, and {duration(seconds)} later {what} ({name}): by then it "
                    "is forgotten, and the task runs again, or is in doubt where the message is known to be old.",
                    f"Set idem_result_ttl (and idem_failure_ttl) to {int(2 * seconds)} or more.",
                )
        if s.result_expires is not None and keep < s.result_expires:
            yield note(
                "retention-result",
                task.name,
                f"The result backend shows results for {duration(s.result_expires)}, an outcome is replayed for "
                f"{duration(keep)} only: a caller that still sees the result may run the action again.",
                f"Set idem_result_ttl to {int(s.result_expires)}.",
            )


def eta_beyond_visibility(s: Snapshot) -> Iterator[Finding]:
    if s.visibility is not None and s.longest_delay > s.visibility:
        yield warning(
            "eta",
            "broker_transport_options",
            f"Messages wait {duration(s.longest_delay)} for their ETA in a worker, and the broker delivers them again "
            f"after {duration(s.visibility)}: several copies wait at once. They run once, but cost claims and memory.",
            f'Set broker_transport_options = {{"visibility_timeout": {int(2 * s.longest_delay)}}}.',
        )


def leases(s: Snapshot) -> Iterator[Finding]:
    for settings, where in _distinct(s):
        if settings.lease < SHORT_LEASE:
            yield warning(
                "short-lease",
                where,
                f"A lease of {settings.lease:g} s lapses in an ordinary pause (garbage collection, a store that fails "
                "over), and a healthy execution is taken for a dead one.",
                "Set idem_lease = 30.",
            )
        if settings.lease > LONG_LEASE:
            yield warning(
                "long-lease",
                where,
                f"A lease of {duration(settings.lease)}: what a dead host left behind is decided only after that. "
                "Leases are renewed while the body runs, so it need not be as long as the body.",
                "Set idem_lease = 30.",
            )
        if s.visibility is not None and settings.lease > s.visibility:
            yield warning(
                "lease-visibility",
                where,
                f"The broker redelivers after {duration(s.visibility)} and the lease is {duration(settings.lease)}: "
                "a dead worker's message comes back again and again before it can be decided.",
                f"Set idem_lease below {int(s.visibility)}.",
            )


def _distinct(s: Snapshot) -> Iterator[tuple[Settings, str]]:
    """Return, for each different lease, the settings of the first task with it, and its name."""
    first = {task.settings.lease: task for task in reversed(s.guarded)}
    yield from ((task.settings, task.name) for task in s.guarded if first[task.settings.lease] is task)
