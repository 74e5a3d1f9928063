"""A journal of what happened in the worker processes, independent of records and answers.

One JSON line per event is appended to the file named by `IDEM_DEMO_WITNESS`. Without that variable nothing is
written. Plain Celery and celery_idem keep the same journal, so both are measured in the same way.

Events: `ready` (a worker or caller can take work), `start` and `end` (one delivery of one message, reported by
Celery's signals around the task), `call` (a task is about to call the billing service).
"""

from __future__ import annotations

import json
import os
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from celery import signals

_here = threading.local()  # `.delivery`: the current delivery of this thread


def note(event: str, **fields: Any) -> None:
    """Append one event. It is one `write` with O_APPEND, so it does not mix with events of other processes."""
    path = os.environ.get("IDEM_DEMO_WITNESS")
    if not path:
        return
    line = json.dumps(
        {"event": event, "pid": os.getpid(), "delivery": getattr(_here, "delivery", None), **fields}
    )
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, line.encode() + b"\n")
    finally:
        os.close(descriptor)


def watch_worker() -> None:
    """Record every delivery in this process and its children."""
    # weak=False: the receivers are local functions and would be collected at once.
    signals.worker_ready.connect(_ready, weak=False)
    signals.task_prerun.connect(_start, weak=False)
    signals.task_postrun.connect(_end, weak=False)


def _ready(sender: Any = None, **_: Any) -> None:
    note("ready", who=str(sender))


def _start(task_id: str, task: Any, args: Any, kwargs: dict[str, Any], **_: Any) -> None:
    _here.delivery = uuid.uuid4().hex
    # The example's tasks take (customer_id, invoice_id, …) or (order_id, …), the latter by keyword only.
    invoice_id = kwargs.get("invoice_id") or kwargs.get("order_id") or args[1]
    note("start", task=task.name, task_id=task_id, invoice_id=invoice_id)


def _end(retval: Any, state: str | None, **_: Any) -> None:
    note("end", state=state, error=type(retval).__name__ if isinstance(retval, BaseException) else None)
    _here.delivery = None


@dataclass
class Delivery:
    """One delivery of one message in the journal."""

    task_id: str
    invoice_id: str
    state: str | None = None  # None: still running, or killed
    error: str | None = None
    writes: list[str] = field(default_factory=list)  # paths POSTed to the billing service


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Return the events, oldest first, without an unfinished last line."""
    if not path.exists():
        return
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)


def deliveries(path: Path) -> list[Delivery]:
    """Return the events grouped by delivery."""
    found: dict[str, Delivery] = {}
    for event in read(path):
        name = event["delivery"]
        if event["event"] == "start":
            found[name] = Delivery(event["task_id"], event["invoice_id"])
        elif event["event"] == "call" and event["method"] == "POST" and name in found:
            found[name].writes.append(event["path"])
        elif event["event"] == "end" and name in found:
            found[name].state, found[name].error = event["state"], event["error"]
    return list(found.values())
