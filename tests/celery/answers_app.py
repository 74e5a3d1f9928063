"""A process that runs one task as a worker does and exits. The tests kill it before it has finished."""

from __future__ import annotations

import os
from typing import Any

from celery import Celery
from celery.app.trace import build_tracer

from celery_idem import IdempotentTask
from celery_idem.integration import answers


def shop(url: str, effects: str) -> Any:
    """Return the task of an application that needs no broker."""
    app = Celery("crash", broker="memory://", backend=url, set_as_current=False)

    @app.task(base=IdempotentTask, name="shop.pay", shared=False, intent=("order",))
    def pay(order: str) -> str:
        with open(effects, "a") as file:  # noqa: PTH123
            file.write(f"{order}\n")
        return f"paid {order}"

    return pay


def run(url: str, effects: str, order: str, apart: bool) -> None:
    """Run the task as a pool process runs a message that was acknowledged early.

    Args:
        apart: Celery writes the result itself, after the outcome.
    """
    if apart:
        answers.announcement = lambda *_: None  # type: ignore[assignment]
    pay = shop(url, effects)
    request = {
        "id": order,
        "task": pay.name,
        "args": (order,),
        "kwargs": {},
        "headers": {},
        "delivery_info": {},
    }
    build_tracer(pay.name, pay, app=pay.app)(order, (order,), {}, {**request, "called_directly": False})
    os._exit(0)
