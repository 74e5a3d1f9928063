"""Celery's own event stream: visible in ``celery events`` and Flower, beside the task it happened to.

A worker started with ``-E`` installs this by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from celery import current_task

from celery_idem import events

if TYPE_CHECKING:
    from celery import Celery

RARE = frozenset(events.LEVELS) - {"claimed", "settled", "scheduled"}
"""Kinds that are sent. The others happen with every task, and Celery's own events tell as much."""

TYPE = "task-idem-{}"
"""Type of an event of a task's execution: Celery's monitors show it as a state of that task."""

OTHER_TYPE = "idem-{}"
"""Type of an event that no execution stands behind, such as somebody's ``resolve``."""

_installed: dict[int, Callable[[], None]] = {}


def install(app: Celery, kinds: Collection[str] = RARE) -> Callable[[], None]:
    """Send events of these kinds; returns a function that stops it. Installing twice counts once."""
    if id(app) not in _installed:

        def send(event: events.Event) -> None:
            if event.kind in kinds:
                _send(app, event)

        stop = events.listen(send)

        def uninstall() -> None:
            if _installed.pop(id(app), None) is not None:
                stop()

        _installed[id(app)] = uninstall
    return _installed[id(app)]


def _send(app: Celery, event: events.Event) -> None:
    fields: dict[str, Any] = {"idem_key": event.key, "idem_task": event.task}
    fields.update({name: value for name, value in event.details.items() if name != "task_id"})
    task_id = event.details.get("task_id")
    kind = event.kind.replace("_", "-")
    hostname = getattr(current_task.request, "hostname", None) if current_task else None
    with app.events.default_dispatcher(hostname=hostname) as dispatcher:
        if task_id:
            dispatcher.send(TYPE.format(kind), uuid=task_id, **fields)
        else:
            dispatcher.send(OTHER_TYPE.format(kind), **fields)
