"""The parts of a guarded task that the modules below ``task`` use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from celery_idem.core.keys import Declaration
from celery_idem.core.model import Fingerprint, Raised
from celery_idem.engine.ledger import Ledger
from celery_idem.engine.runner import Options
from celery_idem.integration.settings import Settings


class Guarding(Protocol):
    """What all executions of one task share. ``delivery.Guard`` implements it."""

    @property
    def declaration(self) -> Declaration: ...
    @property
    def settings(self) -> Settings: ...
    @property
    def ledger(self) -> Ledger: ...
    @property
    def options(self) -> Options: ...
    @property
    def broker(self) -> str: ...
    def identify(self, request: Any, args: Any, kwargs: Any) -> tuple[str, Fingerprint]: ...
    def kind_of(self, error: BaseException) -> Raised: ...


class GuardedTask(Protocol):
    """A task that declares an intent. ``task.IdempotentTask`` implements it. Celery's own attributes are untyped."""

    idem_declaration: Any
    name: Any
    app: Any
    acks_late: Any
    serializer: Any
    expires: Any
    ignore_result: Any
    store_errors_even_if_ignored: Any
    _backend: Any  # the task's own; None: the application's
    no_effect_errors: tuple[type[BaseException], ...]
    ambiguous_errors: tuple[type[BaseException], ...]

    @property
    def guard(self) -> Guarding: ...
    @property
    def backend(self) -> Any: ...
    @property
    def request_stack(self) -> Any: ...
    def _get_exec_options(self) -> Any: ...
    def run(self, *args: Any, **kwargs: Any) -> Any: ...
    def apply_async(self, args: Any = None, kwargs: Any = None, *more: Any, **options: Any) -> Any: ...
    def signature_from_request(
        self, request: Any = None, args: Any = None, kwargs: Any = None, queue: Any = None, **options: Any
    ) -> Any: ...


def guarded_task(app: Any, name: str | None) -> GuardedTask | None:
    """Return the task of that name if it declares an intent; None for any other, and for none."""
    task: GuardedTask | None = app.tasks.get(name)
    return None if getattr(task, "idem_declaration", None) is None else task


def guarded_tasks(app: Any) -> Iterator[GuardedTask]:
    """Return the tasks of an application that declare an intent."""
    return (task for name in list(app.tasks) if (task := guarded_task(app, name)) is not None)
