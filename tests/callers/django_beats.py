"""Two beats that keep their schedule in one database (django-celery-beat) and send the same ticks.

Environment: `CALLERS_URL` and `CALLERS_FOLDER` as for the shop. `CALLERS_TICKER` is the `name` argument of the task.
`CALLERS_DATABASE` is the SQLite file. `CALLERS_LAST_RUNS` has, for each tick, when the entry last ran (ISO 8601).
"""

from __future__ import annotations

import json
import os
from datetime import datetime

import django
from django.conf import settings
from django.core.management import call_command

settings.configure(
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": os.environ["CALLERS_DATABASE"]}},
    INSTALLED_APPS=["django_celery_beat"],
    USE_TZ=True,
    TIME_ZONE="UTC",
    DEFAULT_AUTO_FIELD="django.db.models.AutoField",
)
django.setup()

from celery import Celery  # noqa: E402
from django_celery_beat.models import CrontabSchedule, IntervalSchedule, PeriodicTask  # noqa: E402
from django_celery_beat.schedulers import DatabaseScheduler  # noqa: E402

from celery_idem.adapters.beat import Ticks  # noqa: E402
from celery_idem.core.model import OCCURRENCE  # noqa: E402
from celery_idem.operate import doctor  # noqa: E402
from tests.callers.shop import FOLDER, URL, make  # noqa: E402


class Scheduler(Ticks, DatabaseScheduler):
    """The scheduler of docs/how-to/beat.md."""


def main() -> None:
    app = make(URL, FOLDER)
    assert "no such table" in checked(app)["not-looked-at"]
    call_command("migrate", verbosity=0)
    name = os.environ["CALLERS_TICKER"]
    every_minute, _ = CrontabSchedule.objects.get_or_create(minute="*", hour="*")
    for last_run in os.environ["CALLERS_LAST_RUNS"].split():
        PeriodicTask.objects.update_or_create(
            name="every minute",
            defaults={
                "task": "shop.number",
                "crontab": every_minute,
                "kwargs": f'{{"name": "{name}", "value": 1}}',
                "last_run_at": datetime.fromisoformat(last_run),
            },
        )
        beats = [Scheduler(app=make(URL, FOLDER)) for _ in range(2)]
        for beat in beats:
            assert "every minute" in beat.schedule  # both beats read the entry before one writes it
        for beat in beats:
            print(beat.apply_async(beat.schedule["every minute"]).id)
            assert OCCURRENCE not in str(beat.schedule["every minute"].options), "the entry must not keep it"
    app.conf.beat_schedule = {
        "every minute": {"task": "shop.number", "schedule": 60.0}
    }  # django-celery-beat copies such entries to its database
    print(json.dumps([checked(app, beat_scheduler=one) for one in (DatabaseScheduler, Scheduler)]))


def checked(app: Celery, **conf: type) -> dict[str, str]:
    """Return what the doctor reports about the schedule."""
    app.conf.update({name: f"{one.__module__}:{one.__qualname__}" for name, one in conf.items()})
    if conf:
        often, _ = IntervalSchedule.objects.get_or_create(every=5, period="minutes")
        defaults = {"task": "shop.greet", "interval": often, "kwargs": '{"name": "often"}'}
        PeriodicTask.objects.update_or_create(name="often", defaults=defaults)
        defaults["task"] = "shop.total"
        once = {**defaults, "one_off": True}
        own = {**defaults, "headers": json.dumps({OCCURRENCE: "2026"})}
        off = {**defaults, "enabled": False}
        # Beat itself refuses such rows. The doctor must skip them and read the others.
        wrong = [PeriodicTask(name=h, task="shop.greet", interval=often, headers=h) for h in ("null", "{")]
        PeriodicTask.objects.bulk_create(wrong, ignore_conflicts=True)
        for name, given in {"once": once, "its own": own, "off": off}.items():
            PeriodicTask.objects.update_or_create(name=name, defaults=given)
    found = doctor.examine(doctor.gather(app), (doctor.configuration.beat_without_occurrence,))
    return {f"{one.code} {one.where}".removesuffix(" django_celery_beat"): one.wrong for one in found}


if __name__ == "__main__":
    main()
