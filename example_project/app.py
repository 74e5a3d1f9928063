"""The Celery application, configured by environment variables.

| variable | meaning | default |
|---|---|---|
| `IDEM_DEMO_URL` | Redis or Valkey: broker, results, store of celery_idem | `redis://127.0.0.1:6379/0` |
| `IDEM_DEMO_BROKER_URL` | another broker, for instance RabbitMQ | `IDEM_DEMO_URL` |
| `IDEM_DEMO_GUARD` | `0` turns celery_idem off: it is then not even imported | `1` |
| `IDEM_DEMO_PREFIX` | prefix of every key, name of the queue: to share a server | `idem-demo` |
| `IDEM_DEMO_VISIBILITY` | seconds after which Redis redelivers an unacknowledged message | `3600` |
| `IDEM_DEMO_BILLING` | address of the billing service | `http://127.0.0.1:8765` |
| `IDEM_DEMO_WITNESS` | file for the journal of `witness` | none is kept |
"""

from __future__ import annotations

import os
from typing import Any

from celery import Celery

from example_project import witness

GUARDED = os.environ.get("IDEM_DEMO_GUARD", "1") != "0"
URL = os.environ.get("IDEM_DEMO_URL", "redis://127.0.0.1:6379/0")
BROKER_URL = os.environ.get("IDEM_DEMO_BROKER_URL", URL)
PREFIX = os.environ.get("IDEM_DEMO_PREFIX", "idem-demo")


def _task_class() -> Any:
    """Return the task class. Without the guard, celery_idem is not imported."""
    if GUARDED:
        from celery_idem import IdempotentTask

        return IdempotentTask
    from example_project.plain import PlainTask

    return PlainTask


BASE = _task_class()
app = Celery("example_project", include=["example_project.tasks", "example_project.legacy"], task_cls=BASE)

app.conf.update(
    broker_url=BROKER_URL,
    result_backend=URL,
    result_backend_transport_options={"global_keyprefix": f"{PREFIX}:"},
    task_default_queue=PREFIX,
    broker_connection_retry_on_startup=True,
    result_expires=3600,
    # The usual advice against lost tasks. It is also why tasks run twice.
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    # A worker takes no message in advance, so that none waits behind another one during the demo.
    worker_prefetch_multiplier=1,
)
if BROKER_URL.startswith("redis"):
    app.conf.broker_transport_options = {
        "global_keyprefix": f"{PREFIX}:",
        "visibility_timeout": float(os.environ.get("IDEM_DEMO_VISIBILITY", "3600")),
        # Look for overdue messages every second instead of every 100, to keep the demo short.
        "unacked_restore_interval": 1,
        "unacked_restore_throttle": 1,
    }
if GUARDED:
    app.conf.update(
        idem_namespace=PREFIX,
        # Any store will do: sqlite:///idem.db, postgresql://…, redis-cluster://…; by default the result backend.
        idem_store=os.environ.get("IDEM_DEMO_STORE", ""),
        # Short, so that the demo is short. Production keeps the default.
        idem_lease=5,
        # Guards a task without changing its code.
        task_annotations={"legacy.issue_refund": {"intent": ("order_id",), "must_match": ("cents",)}},
    )

if os.environ.get("IDEM_DEMO_WITNESS"):
    witness.watch_worker()
