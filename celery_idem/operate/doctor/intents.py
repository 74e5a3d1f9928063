"""Does an intent name what the action is, and nothing that each try brings anew?"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

from celery_idem.operate.doctor.facts import Finding, Snapshot
from celery_idem.operate.operators import duration

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


def annotated(annotation: Any) -> str:
    """An annotation as text, without its module; "" for none."""
    if annotation is inspect.Parameter.empty:
        return ""
    return str(getattr(annotation, "__name__", annotation)).rpartition(".")[2]


def minted_anew(name: str, annotation: str) -> bool:
    """Does the declaration of a parameter say that each try brings its own value?"""
    return VOLATILE.search(name) is not None or annotation in INSTANTS


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
            if minted_anew(name, task.parameters.get(name, "")):
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
