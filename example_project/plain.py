"""The task class of the unguarded run: Celery as it comes, with stand-ins for what the bodies in `tasks` use.

Plain Celery has no identity for an action. The best it can offer the billing service as a reference is the
task id, and every re-dispatch has a new one. Nothing is remembered, so a step simply runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celery import Task


class PlainClaim:
    def __init__(self, task_id: str) -> None:
        self.key = task_id

    def downstream_key(self, name: str) -> str:
        return f"{self.key}-{name}"


class PlainTask(Task):  # type: ignore[misc]  # Celery's classes have no types before 5.7
    abstract = True

    @property
    def claim(self) -> PlainClaim:
        return PlainClaim(self.request.id)

    def step(self, name: str, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)
