"""How a task is run: pools and time limits, acknowledgement, and choices that weaken the guard."""

from __future__ import annotations

from collections.abc import Iterator

from celery_idem.operate.doctor.facts import Finding, Snapshot

NO_LIMITS = ("threads", "solo", "eventlet")
"""Pools that enforce no time limit; gevent enforces the hard one."""


def unread(s: Snapshot) -> Iterator[Finding]:
    for task in s.tasks:
        if task.unread:
            yield Finding(
                "warning",
                "not-looked-at",
                task.name,
                f"Its options could not be read, so nothing about it was checked ({task.unread}).",
                "Correct the attribute or the property that raises this.",
            )


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
                "Its message is gone as soon as a worker has it. When the whole worker dies nothing comes back: "
                "what it was running stays lapsed, and nobody knows how it ended, until the call is made again.",
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


def publishing(s: Snapshot) -> Iterator[Finding]:
    if not s.confirmed:
        yield Finding(
            "note",
            "unconfirmed",
            "broker_transport_options",
            "Publishing does not wait until RabbitMQ has the message: one that is on its way while the connection or "
            "the broker goes down is lost without an error, and nobody runs it.",
            'Set broker_transport_options = {"confirm_publish": True}.',
        )


def results(s: Snapshot) -> Iterator[Finding]:
    if s.unusable:
        yield Finding(
            "error",
            "serializer",
            "result_serializer",
            f"Guarded tasks refuse to run: {s.unusable}.",
            "Register it with kombu.serialization.register where the application is made, and list it in "
            "accept_content or result_accept_content.",
        )


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
