"""Two beats that keep their schedule in one database (django-celery-beat), which fire the same ticks.

Environment: `CALLERS_URL` and `CALLERS_FOLDER` as for the shop, `CALLERS_TICKER` the intent, `CALLERS_DATABASE`
a file for SQLite, `CALLERS_LAST_RUNS` when the entry last ran (ISO 8601), for one tick after the other.
"""

from __future__ import annotations

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

from django_celery_beat.models import CrontabSchedule, PeriodicTask  # noqa: E402
from django_celery_beat.schedulers import DatabaseScheduler  # noqa: E402

from celery_idem.adapters.beat import Ticks  # noqa: E402
from celery_idem.core.model import OCCURRENCE  # noqa: E402
from tests.callers.shop import FOLDER, URL, make  # noqa: E402


class Scheduler(Ticks, DatabaseScheduler):
    """As docs/how-to/beat.md says."""


def main() -> None:
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
            assert "every minute" in beat.schedule  # both have read it before either writes
        for beat in beats:
            print(beat.apply_async(beat.schedule["every minute"]).id)
            assert OCCURRENCE not in str(beat.schedule["every minute"].options), "the stamp is for one tick"


if __name__ == "__main__":
    main()
