"""The task class of the unguarded run: plain Celery with stand-ins for what the task bodies use.

Plain Celery has no identity of an action. As a reference for the billing service it only has the task id, which is new
for every dispatch. Steps are not recorded and simply run.
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
