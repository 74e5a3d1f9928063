"""The doctor's visit when a worker starts: what can be seen in the configuration alone."""

from __future__ import annotations

from typing import Any

from celery import bootsteps

from celery_idem import events
from celery_idem.doctor import CHEAP, examine, gather
from celery_idem.errors import IdempotencyError
from celery_idem.telemetry import celery_events

POOLS = {"thread": "threads"}
"""Pools whose module has another name than ``--pool`` takes."""


class AtStart(bootsteps.StartStopStep):  # type: ignore[misc]
    """The cheap half, when a worker starts. Never stops it: what is wrong is logged."""

    def __init__(self, parent: Any, **_: Any) -> None:
        super().__init__(parent)
        if getattr(parent, "task_events", False):  # -E. Before the pool forks, so that its children send too.
            celery_events.install(parent.app)

    def start(self, parent: Any) -> None:
        try:
            module = str(getattr(parent.pool_cls, "__module__", "")).rpartition(".")[2]
            found = examine(gather(parent.app, ask=False, pool=POOLS.get(module, module)), CHEAP)
        except IdempotencyError as error:
            events.logger.error("celery_idem: %s", error)
            return
        for finding in found:
            if finding.severity != "note":
                log = events.logger.error if finding.severity == "error" else events.logger.warning
                log("%s: %s: %s -> %s", finding.code, finding.where, finding.wrong, finding.change)
