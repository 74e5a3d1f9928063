"""Sends events to Celery's own event stream: ``celery events`` and Flower show them beside the task.

A worker started with ``-E`` installs this by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from celery import bootsteps, signals

from celery_idem.engine import events
from celery_idem.integration.delivery import EAGER

if TYPE_CHECKING:
    from celery import Celery

RARE = frozenset(events.KINDS) - {"settled", "scheduled"}
"""Kinds that are sent by default. The others happen with every task, and Celery has events of its own for that."""

TYPE = "task-idem-{}"
"""Type of an event of a task's execution in a worker: Celery's monitors show it as a state of that task, on
the worker that the event names."""

OTHER_TYPE = "idem-{}"
"""Type of any other event, such as an operator's ``resolve``, or one of an eager call in a body. Monitors
ignore it. A ``task-`` event would make them list a worker of that process' name, or a task without a name."""

_installed: dict[int, Callable[[], None]] = {}


def in_worker(sender: str, **_: Any) -> None:
    """Note that this process is a worker of that name, for logs too."""
    events.worker[:] = [sender]


signals.celeryd_init.connect(in_worker)


class AtStart(bootsteps.Step):  # type: ignore[misc]
    """Notes the worker's name, and installs this in a worker started with ``-E``. Before its pool forks, so that its
    children have both."""

    requires = ("celery.worker.components:Pool",)

    def __init__(self, parent: Any, **_: Any) -> None:
        super().__init__(parent)
        in_worker(parent.hostname)
        if getattr(parent, "task_events", False):
            install(parent.app)


def install(app: Celery, kinds: Collection[str] = RARE) -> Callable[[], None]:
    """Send events of these kinds; returns a function that stops it. A second call has no effect."""
    if id(app) not in _installed:
        stops = [
            events.listen(
                lambda event, form=form: _send(app, event, form),  # type: ignore[misc]
                wants=lambda event, form=form: event.kind in kinds and _form(event) == form,  # type: ignore[misc]
            )
            for form in (TYPE, OTHER_TYPE)
        ]

        def uninstall() -> None:
            if _installed.pop(id(app), None) is not None:
                for stop in stops:
                    stop()

        _installed[id(app)] = uninstall
    return _installed[id(app)]


def _form(event: events.Event) -> str:
    """``TYPE`` where a worker received the task that it happened to: monitors know no other."""
    task_id = event.details.get("task_id")
    return TYPE if task_id and events.worker and task_id not in EAGER else OTHER_TYPE


def _send(app: Celery, event: events.Event, form: str) -> None:
    fields: dict[str, Any] = {"idem_key": event.key, "idem_task": event.task}
    fields.update({name: value for name, value in event.details.items() if name != "task_id"})
    task_id = event.details.get("task_id")
    if task_id:
        fields["uuid"] = task_id
    with app.events.default_dispatcher(hostname=events.worker[0] if events.worker else None) as dispatcher:
        dispatcher.send(form.format(event.kind.replace("_", "-")), **fields)
