"""Sends events to Celery's own event stream: ``celery events`` and Flower show them beside the task.

A worker that is started with ``-E`` installs this.
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
"""Kinds that are sent by default. The others happen with every task, for which Celery has its own events."""

TYPE = "task-idem-{}"
"""Type of an event of a task's execution in a worker. Celery's monitors show it as a state of that task, on the worker
that the event names."""

OTHER_TYPE = "idem-{}"
"""Type of any other event, such as an operator's ``resolve``, or one of an eager call in a body. Monitors ignore it.
With a ``task-`` event, they would list that process as a worker, or a task without a name."""

_installed: dict[int, Callable[[], None]] = {}


def in_worker(sender: str, **_: Any) -> None:
    """Note the name of the worker that this process is, also for logs."""
    events.worker[:] = [sender]


signals.celeryd_init.connect(in_worker)


class AtStart(bootsteps.Step):  # type: ignore[misc]
    """Notes the worker's name, and installs this in a worker that is started with ``-E``.

    It runs before the pool forks, so that the children have both.
    """

    requires = ("celery.worker.components:Pool",)

    def __init__(self, parent: Any, **_: Any) -> None:
        super().__init__(parent)
        in_worker(parent.hostname)
        if getattr(parent, "task_events", False):
            install(parent.app)


def install(app: Celery, kinds: Collection[str] = RARE) -> Callable[[], None]:
    """Send events of these kinds, and return a function that stops it. A second call has no effect."""
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
    """Return ``TYPE`` if a worker has received the event's task: monitors know no other tasks."""
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
