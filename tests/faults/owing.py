"""The application of ``test_owed.py``: tasks whose process stops at a point around Celery's answer."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import sqlalchemy
from celery import Celery, current_task

from celery_idem import Happened, IdempotentTask
from celery_idem.core import protocol
from celery_idem.integration import placing
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


_owe = placing.owe


def owe(task_id: str, given: Any) -> None:
    """Stop when the outcome is settled, or when Celery has answered."""
    kwargs = current_task.request.kwargs
    at, intent = kwargs.get("at"), kwargs["intent"]
    if (FOLDER / f"stopped-{intent}").exists():  # only the first time
        at = None
    if at == "settled":
        stop(intent)
    _owe(task_id, partial(stop, intent) if at == "answered" else given)


placing.owe = owe


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


@app.task(base=IdempotentTask, bind=True, name="committed", intent=("intent",))
def committed(self: IdempotentTask, intent: str, at: str = "") -> None:
    engine = sqlalchemy.create_engine(app.conf.idem_store)
    with engine.begin() as connection, self.settle_in(connection) as outcome:
        EFFECTS.add(intent)
        outcome.result = f"done: {intent}"


def found(_task: Any, intent: str, at: str = "") -> Happened:
    return Happened(f"done: {intent}")


@app.task(
    base=IdempotentTask,
    bind=True,
    name="asked",
    intent=("intent",),
    ambiguous_errors=(OSError,),
    reconcile=found,
)
def asked(self: IdempotentTask, intent: str, at: str = "") -> None:
    EFFECTS.add(intent)
    raise OSError("the destination did not answer")


@app.task(name="follow")
def follow(intent: str) -> str:
    """What comes after an action. It has no guard, so each of its messages counts."""
    EFFECTS.add(intent)
    return intent
