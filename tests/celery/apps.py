"""The application of this folder's tests. The worker makes it from its environment, the test from its fixtures.

Every task records its effects under its ``name`` argument.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic
from celery import Celery
from celery.exceptions import Ignore, Reject
from celery.signals import task_failure
from celery.utils.imports import symbol_by_name

from celery_idem import ALL_ARGUMENTS, IdempotentTask
from tests.support.effects import Effects, Gate

ENV = "CELERY_TESTS"


class Declined(Exception):
    """The destination refused. This is an outcome and is replayed."""

    def __init__(self, reason: str, cents: int = 0) -> None:
        super().__init__(reason, cents)
        self.reason = reason
        self.cents = cents


class Busy(Exception):
    """An error that Celery retries automatically."""


class Order(pydantic.BaseModel):
    name: str
    cents: int = 5


def make(broker: str, backend: str, folder: str, queue: str, conf: Mapping[str, Any]) -> Celery:
    app = Celery(
        "celery_tests",
        broker=broker,
        backend=backend,
        task_cls="celery_idem:IdempotentTask",
        set_as_current=False,
    )
    app.conf.update(
        task_default_queue=queue,
        task_create_missing_queues=True,
        worker_prefetch_multiplier=1,
        broker_connection_retry_on_startup=True,
        broker_transport_options={
            "visibility_timeout": 60,
            "unacked_restore_interval": 1,
            "unacked_restore_throttle": 1,
        }
        if broker.startswith("redis")
        else {},
        result_extended=True,  # so that a test can see `retries`
        result_expires=600,
        idem_lease=5,
        task_annotations={"old.refund": {"intent": ("name",), "must_match": ("cents",)}},
    )
    app.conf.update(conf)
    add_tasks(app, Effects(Path(folder) / "effects.jsonl"), Path(folder))

    @task_failure.connect(sender=app.tasks["declined"], weak=False)
    def failed(sender: Any, exception: BaseException, args: Any, **_: Any) -> None:
        Effects(Path(folder) / "failures.jsonl").add(
            args[0],
            replayed=getattr(exception, "idem_replayed", False),
            request=getattr(sender.request, "idem_replayed", False),
            text=str(exception),
        )

    return app


def add_tasks(app: Celery, effects: Effects, folder: Path) -> None:
    def task(name: str, intent: Any = ("name",), **options: Any) -> Any:
        return app.task(name=name, intent=intent, shared=False, **options)

    @task("pay", must_match=("cents",))
    def pay(name: str, cents: int = 5, note: str = "") -> dict[str, Any]:
        effects.add(name, note=note)
        return {"paid": cents, "of": [name]}

    @task("exact", intent=ALL_ARGUMENTS)
    def exact(name: str, cents: int = 5) -> str:
        effects.add(name)
        return f"{name} {cents}"

    @task("declined")
    def declined(name: str) -> None:
        effects.add(name)
        raise Declined("stolen", 7)

    @task("slow", bind=True)
    def slow(self: Any, name: str) -> str:
        effects.add(name, task_id=self.request.id)
        Gate(folder / f"gate-{name}").wait(60)
        return f"slow {name}"

    @task("slow_pay", must_match=("cents",))
    def slow_pay(name: str, cents: int) -> int:
        effects.add(name)
        Gate(folder / f"gate-{name}").wait(60)
        return cents

    @task("longer_than_its_lease", lease=1.5)
    def longer_than_its_lease(name: str) -> str:
        effects.add(name)
        time.sleep(3.2)  # more than two leases
        return "done"

    @task("refuses_to_wait", on_duplicate="raise")
    def refuses_to_wait(name: str) -> str:
        effects.add(name)
        Gate(folder / f"gate-{name}").wait(60)
        return "done"

    @task("retried", bind=True, max_retries=3)
    def retried(self: Any, name: str, times: int) -> list[Any]:
        effects.add(f"try {name}", attempt=self.claim.attempt, fence=self.claim.fence)
        if self.request.retries < times:
            raise self.retry(exc=Declined("still no", times), countdown=0.05)
        effects.add(name)
        return [self.request.retries, self.claim.attempt]

    @task("retried_slowly", bind=True, max_retries=3)
    def retried_slowly(self: Any, name: str) -> int:
        effects.add(f"try {name}")
        if not self.request.retries:
            raise self.retry(countdown=2)
        effects.add(name)
        return int(self.request.retries)

    @task("autoretried", bind=True, autoretry_for=(Busy,), retry_kwargs={"max_retries": 2, "countdown": 0.05})
    def autoretried(self: Any, name: str, times: int) -> int:
        effects.add(f"try {name}")
        if self.request.retries < times:
            raise Busy(f"the {self.request.retries} time")
        effects.add(name)
        return int(self.request.retries)

    @task("modelled", intent=("order",), pydantic=True)
    def modelled(order: Order) -> Order:
        assert isinstance(order, Order)
        effects.add(order.name)
        return order

    @task("odd")
    def odd(name: str) -> Any:
        effects.add(name)
        return object()

    @task("big", max_result_bytes=100)
    def big(name: str) -> str:
        effects.add(name)
        return "x" * 200

    @task("special")
    def special(name: str, kind: str) -> None:
        effects.add(name)
        raise symbol_by_name(kind)(f"of {name}")

    @task("said_done", bind=True)
    def said_done(self: Any, name: str) -> None:
        effects.add(name)
        self.update_state(state="SUCCESS", meta={"paid": name})
        raise Ignore

    @task("ignored")
    def ignored(name: str) -> None:
        effects.add(name)
        raise Ignore

    @task("rejected")
    def rejected(name: str) -> None:
        effects.add(name)
        raise Reject("no", requeue=False)

    @task("requeued")
    def requeued(name: str, times: int) -> str:
        effects.add(f"try {name}")
        if effects.count(f"try {name}") <= times:
            raise Reject("not yet", requeue=True)
        effects.add(name)
        return "done"

    @task("calls_itself", bind=True)
    def calls_itself(self: Any, name: str, deep: int = 2) -> list[Any]:
        effects.add(name)
        return [name, self(name, deep - 1)] if deep else []

    @task("calls_another", bind=True, intent=("name", "deep"))
    def calls_another(self: Any, name: str, deep: int = 2) -> list[Any]:
        effects.add(f"{name} {deep}")
        return [deep, self(name, deep - 1)] if deep else []

    @task("calls_the_others", bind=True)
    def calls_the_others(self: Any, name: str) -> Any:
        effects.add(name)
        return [pay(f"{name} inner", 9), pay(f"{name} inner", 9)]

    @task("claimed", bind=True)
    def claimed(self: Any, name: str) -> dict[str, Any]:
        effects.add(name)
        claim = self.claim
        return {
            "key": claim.key,
            "fence": claim.fence,
            "attempt": claim.attempt,
            "task_id": claim.task_id,
            "lost": claim.lost,
            "downstream": claim.downstream_key("charge"),
        }

    @app.task(name="plain", shared=False)
    def plain(values: Any = None) -> Any:
        return values

    @app.task(name="told", shared=False)
    def told(value: Any, name: str) -> Any:
        effects.add(name, value=value)
        return value

    @app.task(name="told_error", shared=False)
    def told_error(request: Any, exc: BaseException, traceback: Any, name: str) -> None:
        effects.add(name, error=type(exc).__name__, args=list(exc.args))

    @app.task(name="old.refund", shared=False)
    def refund(name: str, cents: int) -> int:
        effects.add(name)
        return cents

    class Shipping(IdempotentTask):
        name = "shipping"
        intent = ("name",)

        def run(self, name: str, note: str = "") -> str:
            effects.add(name)
            return f"shipped at attempt {self.claim.attempt}"

    app.register_task(Shipping())

    @task("hasty", bind=True, on_duplicate="raise")
    def hasty(self: Any, name: str) -> str:
        effects.add(name)
        if not self.request.retries:
            self.retry(countdown=0, throw=False)
            Gate(folder / f"gate-{name}").wait(60)
            time.sleep(0.5)  # so that the retry is delivered while this body still runs
        return "done"

    @task("instant", bind=True, on_duplicate="raise")
    def instant(self: Any, name: str) -> str:
        if not self.request.retries:
            try:
                raise self.retry(countdown=0)
            finally:
                time.sleep(0.002)  # about the time until the retry is delivered
        effects.add(name)
        return "done"

    @task("on_store_error_raise", on_store_error="raise")
    def on_store_error_raise(name: str) -> str:
        effects.add(name)
        return "done"

    @task("impatient", settle_patience=0.3, lease=1.0)
    def impatient(name: str) -> str:
        effects.add(name)
        Gate(folder / f"gate-{name}").wait(60)
        return "done"

    @task("on_store_error_run", on_store_error="run")
    def on_store_error_run(name: str) -> str:
        effects.add(name)
        return "done"


def from_environment() -> Celery | None:
    return make(**json.loads(os.environ[ENV])) if ENV in os.environ else None


app = from_environment()
