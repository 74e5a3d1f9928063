"""The application of ``test_owed.py``: tasks whose process stops at a point around Celery's answer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import sqlalchemy
from celery import Celery, current_task
from celery.backends.base import Backend

from celery_idem import Happened, IdempotentTask
from celery_idem.core import protocol
from celery_idem.integration import owing
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
    idem_lease=float(os.environ.get("OWED_LEASE", "1")),
    task_default_queue=os.environ.get("OWED_QUEUE", "owing"),
    broker_connection_retry_on_startup=True,
)


def stop(intent: str) -> None:
    """Wait until this process is killed."""
    (FOLDER / f"stopped-{intent}").touch()
    Gate(FOLDER / "never").wait(120)


def at(point: str) -> None:
    """Stop if the call of this task says so, the first time."""
    kwargs = current_task.request.kwargs
    if kwargs.get("at") == point and not (FOLDER / f"stopped-{kwargs['intent']}").exists():
        stop(kwargs["intent"])


def stopping(place: Any, name: str, point: str) -> None:
    real = getattr(place, name)

    def stops_first(*args: Any, **kwargs: Any) -> Any:
        at(point)
        return real(*args, **kwargs)

    setattr(place, name, stops_first)


for name in ("owe_result", "owe_more", "owe_replay"):
    stopping(owing, name, "settled")
for name in ("answered", "_over"):
    stopping(owing, name, "answered")
stopping(Backend, "_call_task_errbacks", "failure stored")


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


class Slow(IdempotentTask):
    """An author's base class, which takes long after the result is stored."""

    def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
        Gate(FOLDER / f"gate-{kwargs['intent']}").wait(120)


app.task(base=Slow, bind=True, name="slow", intent=("intent",), ignore_result=True)(act)


@app.task(name="follow")
def follow(intent: str) -> str:
    """What comes after an action. It has no guard, so each of its messages counts."""
    EFFECTS.add(intent)
    return intent
