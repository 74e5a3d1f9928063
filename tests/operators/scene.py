"""An application whose actions end in doubt, wait for a retry, or can be cancelled."""

from __future__ import annotations

import os
from typing import Any

from celery import Celery
from celery.exceptions import Ignore

from celery_idem import IdempotentTask
from tests.support.effects import Effects
from tests.support.waiting import wait_for


def effects() -> Effects:
    return Effects(os.environ["IDEM_TEST_EFFECTS"])


class Unsure(Exception):
    """It is unknown whether the effect happened."""


def make(url: str, queue: str) -> Celery:
    """Return the application with this Redis as its broker, result backend and store."""
    app = Celery("scene", broker=url, backend=url, set_as_current=False)
    app.conf.update(idem_lease=3.0, idem_recover=False, task_default_queue=queue)
    guarded = {"base": IdempotentTask, "bind": True, "shared": False}

    @app.task(
        **guarded,
        name="scene.send_invoice",
        intent=("customer_id", "invoice_id"),
        describe="invoice {invoice_id} for customer {customer_id}, {cents} cents",
        ambiguous_errors=(Unsure,),
    )
    def send_invoice(self: Any, customer_id: str, invoice_id: int, cents: int = 500) -> str:
        if self.claim.attempt == 1:
            raise Unsure
        effects().add(customer_id)
        return f"inv-{customer_id}-{invoice_id}"

    @app.task(
        **guarded,
        name="scene.pay",
        intent=("customer_id",),
        secret=("card",),
        describe="pay for {customer_id} with {card}",
        ambiguous_errors=(Unsure,),
    )
    def pay(self: Any, customer_id: str, card: str = "s3cret-default", note: str = "") -> str:
        raise Unsure

    @app.task(**guarded, name="scene.later", intent=("what",), max_retries=3)
    def later(self: Any, what: str) -> str:
        if self.request.retries == 0:
            raise self.retry(countdown=3)
        effects().add(what)
        return what

    @app.task(**guarded, name="scene.long", intent=("what",))
    def long(self: Any, what: str, heeds: bool = True) -> str:
        """Run until an operator cancels the intent."""
        effects().add(f"begun {what}")
        wait_for(lambda: self.claim.cancelled, message="an operator to cancel it")
        if heeds:
            raise Ignore
        effects().add(what)
        return "done all the same"

    @app.task(shared=False, name="scene.after")
    def after(result: Any, label: str) -> str:
        effects().add(f"{label} {result}")
        return f"after {result}"

    return app


if "IDEM_TEST_REDIS" in os.environ:
    app = make(os.environ["IDEM_TEST_REDIS"], os.environ["IDEM_TEST_QUEUE"])
