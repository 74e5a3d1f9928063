"""The applications that the benchmarks run: one no-op task, guarded in different ways.

``BENCH_VARIANT`` chooses; ``BENCH_URL`` is the Redis for broker, results and records.
"""

from __future__ import annotations

import os

import redis
from celery import Celery, Task

URL = os.environ.get("BENCH_URL", "redis://127.0.0.1:6379/0")
VARIANT = os.environ.get("BENCH_VARIANT", "bare")

app = Celery("bench", broker=URL, backend=URL)
app.conf.update(
    task_default_queue=f"bench-{VARIANT}",
    worker_prefetch_multiplier=64,
    broker_connection_retry_on_startup=True,
    worker_send_task_events=False,
    idem_store=URL,
)


class Floor(Task):
    """The least a guard can do with two ordinary redis-py calls: no rules at all."""

    client = None

    def __call__(self, *args, **kwargs):
        client = Floor.client
        if client is None:
            client = Floor.client = redis.Redis.from_url(URL)
        key = f"floor:{self.name}:{args[0]}"
        if client.set(key, b"running", nx=True, get=True, ex=86400) is not None:
            return None
        value = self.run(*args, **kwargs)
        client.set(key, b"null", ex=86400)
        return value


if VARIANT == "idem":
    from celery_idem import IdempotentTask

    @app.task(base=IdempotentTask, intent=("n",), name="bench.noop")
    def noop(n):
        return None

elif VARIANT == "floor":

    @app.task(base=Floor, name="bench.noop")
    def noop(n):
        return None

else:

    @app.task(name="bench.noop")
    def noop(n):
        return None
