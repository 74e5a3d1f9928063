"""A small application for the compatibility matrix. It must work with every supported version of Celery."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from celery import Celery
from kombu import Exchange, Queue

from celery_idem import Happened, IdempotentTask, NotHappened
from tests.support.effects import Effects, Gate

FOLDER = Path(os.environ.get("COMPAT_FOLDER", "."))
BROKER = os.environ.get("COMPAT_BROKER", "memory://")
QUEUE = os.environ.get("COMPAT_QUEUE", "compat")

effects = Effects(FOLDER / "effects.jsonl")


def make(broker: str, backend: str | None, queue: str, quorum: bool) -> Celery:
    app = Celery("compat", broker=broker, backend=backend, set_as_current=False)
    app.conf.update(
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        task_default_queue=queue,
        worker_prefetch_multiplier=1,
        broker_connection_retry_on_startup=True,
        # Seconds. The worker reports a dead process at once, so no test waits for a lease to lapse.
        idem_lease=5,
    )
    if broker.startswith("redis"):
        app.conf.broker_transport_options = {
            "visibility_timeout": 60,
            "unacked_restore_interval": 1,
            "unacked_restore_throttle": 1,
        }
    if quorum:  # as in docs/how-to/rabbitmq-quorum-queues.md
        exchange = Exchange(queue, type="topic")
        app.conf.task_queues = [
            Queue(queue, exchange, routing_key=queue, queue_arguments={"x-queue-type": "quorum"})
        ]
        app.conf.task_default_queue_type = "quorum"
        app.conf.task_default_exchange = app.conf.task_default_routing_key = queue
        app.conf.task_default_exchange_type = "topic"

    @app.task(base=IdempotentTask, shared=False, name="compat.pay", intent=("name",), must_match=("cents",))
    def pay(name: str, cents: int = 5, note: str = "") -> int:
        effects.add(name)
        return cents

    @app.task(base=IdempotentTask, shared=False, name="compat.total", intent=("name",))
    def total(values: list[int], name: str) -> int:
        effects.add(name)
        return sum(values)

    @app.task(base=IdempotentTask, shared=False, name="compat.slow", intent=("name",))
    def slow(name: str) -> str:
        effects.add(name)
        Gate(FOLDER / f"gate-{name}").wait()
        return f"slow {name}"

    @app.task(base=IdempotentTask, shared=False, bind=True, name="compat.retries", intent=("name",))
    def retries(self: Any, name: str) -> int:
        if self.request.retries < 2:
            raise self.retry(countdown=0)
        effects.add(name)
        return int(self.request.retries)

    @app.task(base=IdempotentTask, shared=False, name="compat.fails", intent=("name",))
    def fails(name: str) -> None:
        effects.add(name)
        raise ValueError(name)

    def ask(task: Any, name: str, at: str = "") -> Happened | NotHappened:
        return Happened(f"paid {name}") if effects.count(name) else NotHappened()

    @app.task(base=IdempotentTask, shared=False, name="compat.dies", intent=("name",), reconcile=ask)
    def dies(name: str, at: str) -> str:
        """Kill the process once, before or after the effect, or raise SystemExit once after it."""
        once = FOLDER / f"died-{name}"
        for point in ("before", "after"):
            if at == point and not once.exists():
                once.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if point == "before":
                effects.add(name)
        if at == "exit" and not once.exists():
            once.touch()
            raise SystemExit(1)
        return f"paid {name}"

    return app


app = make(BROKER, os.environ.get("COMPAT_BACKEND"), QUEUE, os.environ.get("COMPAT_QUORUM") == "1")
