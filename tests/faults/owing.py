"""The application of ``test_owed.py``: tasks whose process stops at a point around Celery's answer."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

from celery import Celery

from celery_idem import IdempotentTask
from celery_idem.core import protocol
from celery_idem.integration import delivery, placing
from tests.support.effects import Effects, Gate

FOLDER = Path(os.environ.get("OWED_FOLDER", "."))
EFFECTS = Effects(FOLDER / "effects.jsonl")

protocol.PUBLISHED_WAIT, protocol.JITTER = (
    2_000_000,
    1 << 16,
)  # microseconds; the default is too long for a test

app = Celery(
    "owing",
    broker=os.environ.get("OWED_BROKER", "memory://"),
    backend=os.environ.get("OWED_BACKEND"),
    set_as_current=False,
)
app.conf.update(
    idem_store=os.environ.get("OWED_STORE", "memory://owing"),
    idem_lease=1.0,
    task_default_queue=os.environ.get("OWED_QUEUE", "owing"),
    broker_connection_retry_on_startup=True,
)


def stop(intent: str) -> None:
    """Wait until this process is killed."""
    (FOLDER / f"stopped-{intent}").touch()
    Gate(FOLDER / "never").wait(120)


_owing = delivery.Delivery.owing


def owing(self: delivery.Delivery, hold: Any) -> None:
    _owing(self, hold)
    at, intent = self.kwargs.get("at"), self.kwargs["intent"]
    if at == "settled":
        stop(intent)
    elif at == "answered":
        placing.owe(self.task_id, partial(stop, intent))


delivery.Delivery.owing = owing  # type: ignore[method-assign]


def act(self: IdempotentTask, intent: str, at: str = "", fails: bool = False) -> str:
    EFFECTS.add(intent)
    if fails:
        raise ValueError(f"refused: {intent}")
    return f"done: {intent}"


app.task(base=IdempotentTask, bind=True, name="early", intent=("intent",))(act)
app.task(base=IdempotentTask, bind=True, name="quiet", intent=("intent",), ignore_result=True)(act)


class Reports(IdempotentTask):
    """An author's base class, with a hook that does not call ours."""

    def after_return(
        self, status: Any, retval: Any, task_id: Any, args: Any, kwargs: Any, einfo: Any
    ) -> None:
        EFFECTS.add(f"{kwargs['intent']} is {status}")


app.task(base=Reports, bind=True, name="reported", intent=("intent",))(act)


@app.task(name="follow")
def follow(intent: str) -> str:
    """What comes after an action. It has no guard, so each of its messages counts."""
    EFFECTS.add(intent)
    return intent
