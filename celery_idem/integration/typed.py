"""A decorator that keeps the function's signature for type checkers.

``@app.task(base=IdempotentTask, …)`` does the same at run time, but a type checker sees a task that takes and
returns anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, overload

from celery_idem.integration.task import IdempotentTask

if TYPE_CHECKING:
    from typing import Concatenate, ParamSpec

    from celery import Celery
    from celery.canvas import Signature
    from celery.result import AsyncResult

    from celery_idem.core.keys import IntentSpec

    P = ParamSpec("P")
    R = TypeVar("R")

    class TypedTask(IdempotentTask, Generic[P, R]):
        """An ``IdempotentTask`` as a type checker sees it. It exists for type checkers only.

        ``submit``, ``asubmit`` and ``apply_async`` take the task's arguments beside their own options. No signature can
        express that, so they take anything.
        """

        def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...
        def run(self, *args: P.args, **kwargs: P.kwargs) -> R: ...
        def delay(self, *args: P.args, **kwargs: P.kwargs) -> AsyncResult: ...
        def si(self, *args: P.args, **kwargs: P.kwargs) -> Signature: ...


@overload
def idempotent_task(
    app: Celery,
    *,
    intent: IntentSpec,
    must_match: Iterable[str] | str = ...,
    bind: Literal[True],
    base: type[IdempotentTask] = ...,
    **options: Any,
) -> Callable[[Callable[Concatenate[Any, P], R]], TypedTask[P, R]]: ...


@overload
def idempotent_task(
    app: Celery,
    *,
    intent: IntentSpec,
    must_match: Iterable[str] | str = ...,
    bind: Literal[False] = ...,
    base: type[IdempotentTask] = ...,
    **options: Any,
) -> Callable[[Callable[P, R]], TypedTask[P, R]]: ...


def idempotent_task(
    app: Celery,
    *,
    intent: IntentSpec,
    must_match: Iterable[str] | str = (),
    bind: bool = False,
    base: type[IdempotentTask] = IdempotentTask,
    **options: Any,
) -> Any:
    """``app.task`` for an idempotent task, with its signature kept for type checkers.

    Args:
        intent: parameters that say what the action is, see ``IdempotentTask``.
        must_match: parameters that must be equal whenever the intent comes back.
        bind: the function's first parameter is the task.
        base: a subclass of ``IdempotentTask``.
        options: more of ``app.task``, or of ``IdempotentTask``.
    """
    return app.task(base=base, bind=bind, intent=intent, must_match=must_match, **options)
