"""What beat sends: the entries in ``beat_schedule``, and those in django-celery-beat's database."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from celery.utils.imports import symbol_by_name

from celery_idem.core.model import OCCURRENCE

if TYPE_CHECKING:
    from celery import Celery

TICKS = ("celery_idem.adapters.beat", "Ticks")
"""Module and name of the class that gives each tick its occurrence. By name, because it is in a package above this
one."""


class Entry(NamedTuple):
    """An entry that sends the same call at every tick.

    Attributes:
        interval: it has a plain interval in a database, on which two beats do not agree.
    """

    name: str
    task: str
    interval: bool = False


def entries(app: Celery, ask: bool) -> Iterator[Entry]:
    """Return the entries of an application without an occurrence of their own. ``ask``: read the database too."""
    schedule = app.conf.beat_schedule
    for name, entry in schedule.items() if isinstance(schedule, Mapping) else ():
        if isinstance(entry, Mapping):
            options = entry.get("options")
            given = options if isinstance(options, Mapping) else {}
            if "occurrence" not in given and OCCURRENCE not in (given.get("headers") or {}):
                yield Entry(str(name), str(entry.get("task")))
    if ask:
        yield from _in_django()


def _in_django() -> Iterator[Entry]:
    """Return the enabled entries of django-celery-beat, if Django is set up with it. Raises Django's errors."""
    django_apps = getattr(sys.modules.get("django.apps"), "apps", None)
    if django_apps is None or not django_apps.ready or not django_apps.is_installed("django_celery_beat"):
        return
    from django_celery_beat.models import PeriodicTask

    for row in PeriodicTask.objects.filter(enabled=True, one_off=False).order_by("name"):
        try:
            headers = json.loads(row.headers or "{}")
        except ValueError:  # beat leaves out such an entry
            continue
        if not isinstance(headers, dict) or OCCURRENCE not in headers:
            yield Entry(row.name, row.task, row.interval_id is not None)


def ticks(app: Celery) -> bool:
    """Whether the scheduler in the configuration makes each tick an occurrence."""
    named: Any = app.conf.beat_scheduler or ""
    try:
        scheduler = symbol_by_name(named)
    except Exception:  # of an author's own module
        return TICKS[0] in str(named)
    return any((one.__module__, one.__name__) == TICKS for one in getattr(scheduler, "__mro__", ()))
