"""The application in the worker's container. pytest-celery copies this file into it as `app.py`.

The destination of its charges and the gate that holds a task half way are keys in the result backend's Redis. Their
database is used by neither Celery nor the store.
"""

from __future__ import annotations

import os
import time
from typing import Any

import redis
from celery import Celery

from celery_idem import Happened, IdempotentTask, NotHappened

DATABASE = 9

# Seconds. Short, so that a dead worker's message is redelivered and its lease lapses while a test waits.
VISIBILITY = 3
LEASE = 2.0

# Seconds that a task waits at the gate: longer than any test.
AT_THE_GATE = 120.0

# Tests import this file too, so the application must not become their current one. The broker and the result backend,
# which is also the store, come from the container's environment.
app = Celery("shop", set_as_current=False)
app.conf.update(
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    worker_prefetch_multiplier=1,
    broker_connection_retry_on_startup=True,
    idem_lease=LEASE,
)
if os.environ.get("CELERY_BROKER_URL", "").startswith("redis"):
    app.conf.broker_transport_options = {
        "visibility_timeout": VISIBILITY,
        "unacked_restore_interval": 1,
        "unacked_restore_throttle": 1,
    }


class Shop:
    """The destination of the charges."""

    def __init__(self, url: str) -> None:
        self.redis = redis.Redis.from_url(url, decode_responses=True)

    def charge(self, invoice: str, hold: str) -> str:
        """Charge an invoice. `hold` can be "before" or "after": wait at the gate before or after the charge."""
        self.redis.incr(f"bodies:{invoice}")
        if hold == "before":
            self.wait()
        self.redis.incr(f"charges:{invoice}")
        if hold == "after":
            self.wait()
        return f"receipt for {invoice}"

    def charges(self, invoice: str) -> int:
        return int(self.redis.get(f"charges:{invoice}") or 0)

    def bodies(self, invoice: str) -> int:
        """Return how often a body began."""
        return int(self.redis.get(f"bodies:{invoice}") or 0)

    def open_gate(self) -> None:
        self.redis.set("gate", "open")

    def wait(self) -> None:
        deadline = time.monotonic() + AT_THE_GATE
        while not self.redis.exists("gate"):
            if time.monotonic() > deadline:
                raise AssertionError(f"the gate stayed closed for {AT_THE_GATE:g} s")
            time.sleep(0.05)


def _shop() -> Shop:
    return Shop(os.environ["SHOP"])


def ask(task: Any, invoice: str, hold: str = "") -> Happened | NotHappened:
    return Happened(f"receipt for {invoice}") if _shop().charges(invoice) else NotHappened()


@app.task(shared=False, base=IdempotentTask, name="shop.charge", intent=("invoice",), reconcile=ask)
def charge(invoice: str, hold: str = "") -> str:
    return _shop().charge(invoice, hold)


@app.task(shared=False, base=IdempotentTask, name="shop.charge_blindly", intent=("invoice",))
def charge_blindly(invoice: str, hold: str = "") -> str:
    """The same without a reconcile function."""
    return _shop().charge(invoice, hold)
