"""An application whose broker was down. It notes in a Redis what recovery publishes and what the task does."""

from __future__ import annotations

import os
import time
from functools import partial

import redis
from celery import Celery

from celery_idem import IdempotentTask
from celery_idem.engine import events

STORE = os.environ["OUTAGE_STORE"]

app = Celery("outage", broker=os.environ["OUTAGE_BROKER"], backend=STORE)
app.conf.update(idem_store=STORE, task_default_queue="outage", task_ignore_result=True)
destination = redis.Redis.from_url(STORE)


@app.task(base=IdempotentTask, name="outage.act", intent=("number",))
def act(number: int) -> None:
    destination.rpush("effects", number)


@partial(events.listen, here=True)
def note(event: events.Event) -> None:
    if event.kind == "recovered":
        destination.rpush("recovered", f"{time.time()} {event.details['task_id']}")
