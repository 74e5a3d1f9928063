"""The applications that the benchmarks run: one no-op task, guarded in different ways.

``BENCH_VARIANT`` chooses the guard. ``BENCH_URL`` is the Redis for broker and results, ``BENCH_STORE`` the
one for the guard's data. Each guard is set up as its documentation shows, and keeps its data for a day.
Run as a program, this publishes calls: it reads lines ``first count`` from standard input, and writes
``done`` when it has published them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import redis
from celery import Celery, Task

URL = os.environ.get("BENCH_URL", "redis://127.0.0.1:6379/0")
RESULTS = os.environ.get("BENCH_RESULTS", URL)
STORE = os.environ.get("BENCH_STORE", URL)
VARIANT = os.environ.get("BENCH_VARIANT", "bare")
DAY = 86_400

SETTINGS: dict[str, Any] = {
    "broker_url": URL,
    "result_backend": RESULTS,
    "task_default_queue": f"bench-{VARIANT}",
    "worker_prefetch_multiplier": 64,
    "broker_connection_retry_on_startup": True,
    "worker_send_task_events": False,
}

app = Celery("bench")
app.conf.update(SETTINGS, idem_store=STORE)


class Floor(Task):
    """The simplest possible guard: two redis-py calls, without rules."""

    client: redis.Redis | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        client = Floor.client
        if client is None:
            client = Floor.client = redis.Redis.from_url(STORE)
        key = f"floor:{self.name}:{args[0]}"
        if client.set(key, b"running", nx=True, get=True, ex=DAY) is not None:
            return None
        value = self.run(*args, **kwargs)
        client.set(key, b"null", ex=DAY)
        return value


def bare(n: int) -> None:
    return None


def make_bare() -> Any:
    return app.task(name="bench.noop")(bare)


def make_floor() -> Any:
    return app.task(base=Floor, name="bench.noop")(bare)


def make_idem() -> Any:
    from celery_idem import IdempotentTask

    return app.task(base=IdempotentTask, intent=("n",), name="bench.noop")(bare)


def make_wasteful() -> Any:
    """celery_idem with some needless work per task, to test the instruction count."""
    from celery_idem import IdempotentTask
    from celery_idem.core.record import unpack

    class Wasteful(IdempotentTask):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            value = super().__call__(*args, **kwargs)
            unpack(self.request.idem_claim.written.value, 1, "")
            return value

    return app.task(base=Wasteful, intent=("n",), name="bench.noop")(bare)


def make_celery_once() -> Any:
    from celery_once import QueueOnce

    app.conf.ONCE = {
        "backend": "celery_once.backends.Redis",
        "settings": {"url": STORE, "default_timeout": DAY},
    }
    return app.task(base=QueueOnce, once={"graceful": True}, name="bench.noop")(bare)


def make_celery_singleton() -> Any:
    from celery_singleton import Singleton

    app.conf.update(singleton_backend_url=STORE, singleton_lock_expiry=DAY)
    return app.task(base=Singleton, name="bench.noop")(bare)


def make_idemkit() -> Any:
    from idemkit import MethodConfig, RedisBackend, idempotent_sync

    backend = RedisBackend.from_url(STORE)
    config = MethodConfig(key_fields=["n"], expires_after_seconds=DAY)
    return app.task(name="bench.noop")(idempotent_sync(backend=backend, config=config)(bare))


def make_fencekit() -> Any:
    from datetime import timedelta

    from fencekit import DistributedLock, IdempotencyGuard, idempotency_key
    from fencekit.celery import idempotent_task

    client = redis.Redis.from_url(STORE, decode_responses=True)
    guarded = idempotent_task(
        IdempotencyGuard(client),
        DistributedLock(client),
        key=lambda n: idempotency_key({"n": n}, namespace="bench"),
        lock_resource=lambda n: f"noop:{n}",
        idempotency_ttl=timedelta(seconds=DAY),
        lock_ttl=timedelta(minutes=5),
    )
    return app.task(name="bench.noop")(guarded(bare))


def make_relier() -> Any:
    """Relier has its own application. Its settings for late acknowledgement and the started state are kept."""
    global app  # noqa: PLW0603  # the worker is started with it
    os.environ["RELIER_REDIS_URL"] = STORE
    from relier import rl_task
    from relier.tasks.app import celery_app

    queues = {"task_default_queue", "worker_prefetch_multiplier"}
    celery_app.conf.update({name: value for name, value in SETTINGS.items() if name not in queues})
    celery_app.conf.worker_prefetch_multiplier = 64
    app = celery_app
    return rl_task(name="bench.noop", idempotent=True, idempotency_ttl=DAY)(bare)


MAKE: dict[str, Callable[[], Any]] = {
    "bare": make_bare,
    "floor": make_floor,
    "idem": make_idem,
    "apart": make_idem,
    "wasteful": make_wasteful,
    "celery-once": make_celery_once,
    "celery-singleton": make_celery_singleton,
    "idemkit": make_idemkit,
    "fencekit": make_fencekit,
    "relier": make_relier,
}


def calm() -> None:
    """Let no thread of celery_idem work by the clock: under valgrind a task takes fifty times as long."""
    from celery_idem.engine import lease
    from celery_idem.integration import deaths, purging, recovering

    # An hour is longer than any run.
    recovering.EVERY = purging.EVERY = deaths.REAP_EVERY = 3600.0
    lease.SHORTEST_SLEEP = lease.LONGEST_SLEEP = 3600.0


noop = MAKE[VARIANT]()
if os.environ.get("BENCH_CALM"):
    calm()


def publish(first: int, count: int) -> None:
    """Make ``count`` calls through the guard's own API, over one connection if it accepts one."""
    if VARIANT == "relier":
        for n in range(first, first + count):
            noop.push(n)
        return
    with app.producer_pool.acquire(block=True) as producer:
        for n in range(first, first + count):
            noop.apply_async((n,), producer=producer)


if __name__ == "__main__":
    for line in sys.stdin:
        publish(*map(int, line.split()))
        print("done", flush=True)
