"""A beat that may run twice: each call has the tick at which its entry is due as its occurrence.

::

    celery -A proj beat --scheduler celery_idem.adapters.beat:Scheduler

Two beats that fire the same tick then send the same intent. The next tick is another intent. For this, both beats must
agree on the ticks. Crontab entries have fixed times. Celery counts plain intervals from the start of the beat, so this
scheduler counts them from the epoch instead (every 10 seconds: at :00, :10, :20). Intervals with ``relative=True`` are
not changed, and two beats do not agree on them.

A scheduler of another kind (one that keeps its entries in a database) gets the occurrence too, with ``class
MyScheduler(Ticks, DatabaseScheduler)``. Its plain intervals are not changed, so two such beats do not agree on them.
"""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

from celery.beat import PersistentScheduler, ScheduleEntry
from celery.schedules import crontab, schedule
from celery.utils.time import remaining

from celery_idem.core.model import OCCURRENCE

if TYPE_CHECKING:
    from celery.result import AsyncResult

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


class aligned(schedule):  # type: ignore[misc]  # noqa: N801  # as Celery's schedules are called
    """A plain interval that is counted from the epoch, so that all beats agree on the ticks."""

    def tick_after(self, when: datetime) -> datetime:
        """Return the first tick after ``when``."""
        count = (when - _EPOCH) // self.run_every + 1
        tick: datetime = _EPOCH + count * self.run_every
        return tick

    def remaining_estimate(self, last_run_at: datetime) -> timedelta:
        now: datetime = self.maybe_make_aware(self.now())
        return self.tick_after(self.maybe_make_aware(last_run_at)) - now

    def is_due(self, last_run_at: datetime) -> Any:
        due, _ = super().is_due(last_run_at)
        now = self.maybe_make_aware(self.now())
        return due, (
            self.tick_after(now) - now if due else self.remaining_estimate(last_run_at)
        ).total_seconds()


def due_at(entry: ScheduleEntry) -> datetime:
    """Return the tick at which an entry is due, in UTC: the first one after its last run."""
    plan = entry.schedule
    last = plan.maybe_make_aware(entry.last_run_at)
    if isinstance(plan, aligned):
        return plan.tick_after(last).astimezone(timezone.utc)
    if isinstance(plan, crontab):
        start, delta, now = plan.remaining_delta(last)
    else:
        now = plan.maybe_make_aware(plan.now())
        start, delta = now, plan.remaining_estimate(last)
    tick: datetime = now + remaining(start, delta, now)
    # A schedule that uses the present time is off by microseconds.
    return (tick + timedelta(seconds=0.5)).astimezone(timezone.utc).replace(microsecond=0)


class Ticks:
    """Mix-in for a beat scheduler: each call that an entry sends has its tick as occurrence."""

    def apply_async(
        self, entry: ScheduleEntry, producer: Any = None, advance: bool = True, **kwargs: Any
    ) -> AsyncResult:
        """As Celery's, with the occurrence, unless the entry's own ``options`` have one."""
        # Not copy.copy, which calls the constructor of Celery's own entry. A database's entry has another one.
        stamped = object.__new__(type(entry))
        vars(stamped).update(vars(entry))
        headers = {OCCURRENCE: due_at(entry).isoformat(), **(entry.options.get("headers") or {})}
        stamped.options = {**entry.options, "headers": headers}
        if advance:
            self.reserve(entry)  # type: ignore[attr-defined]  # not ``stamped``, whose occurrence is for this tick only
        return super().apply_async(stamped, producer=producer, advance=False, **kwargs)  # type: ignore[misc]


class Entry(ScheduleEntry):  # type: ignore[misc]
    """An entry whose plain interval is counted from the epoch."""

    schedule: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        plan = self.schedule
        if type(plan) is schedule and not plan.relative and plan.run_every > timedelta(0):
            self.schedule = aligned(plan.run_every, nowfun=plan.nowfun, app=plan._app)


class Scheduler(Ticks, PersistentScheduler):  # type: ignore[misc]
    """Celery's default scheduler with ticks that two beats agree on."""

    Entry = Entry
