"""Puts the guard into the class of each task that declares an intent.

Python looks for ``__call__`` along a task's bases, and the first one found wins: that of a framework, of a mixin, or
ours. (Flask's documented pattern opens its application context in ``__call__`` and calls ``self.run``.) So the guard is
no method of a base class. It is put into the task's own class when that is bound. A ``__call__`` of the bases then runs
inside the guard, around the body. A class without an intent is not changed.

``after_return`` is wrapped, because Celery calls it when a task's caller has its answer. ``run`` is wrapped too, in the
net. A delivery that calls ``run`` without a claim has bypassed the guard: ``__call__`` was replaced later, or a tracer
calls ``run``. The net sends it through the guard.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any

from celery import Task

from celery_idem.integration import owing

KEPT = "_idem_kept"
"""The class attribute with the methods that ours replaced, by name. It counts in the class's own namespace only."""

_GUARD = "_idem_guard"
"""The class attribute with the guard itself."""

ANSWER = "idem_answer"
"""Attribute of a request that is answered with an error: the error's class."""

_CELERYS = frozenset({"celery.app.task", "celery.app.trace"})
"""Modules of Celery's own ``Task.__call__``; a worker uses the second. Another library may have replaced it."""

_NOTHING: Any = object()

_PLACED = ("__call__", "run", "throws", "after_return")
"""Attributes that are put into a guarded task's class."""


def put_on(cls: type[Any], guard: Callable[..., Any]) -> None:
    """Make ``guard`` the ``__call__`` of a task class, and the net its ``run``."""
    if KEPT in vars(cls):  # it was bound before
        return
    kept = {name: vars(cls).get(name, _NOTHING) for name in _PLACED}
    net = _net(beneath(cls, "run"))
    setattr(cls, KEPT, kept)
    setattr(cls, _GUARD, guard)
    setattr(cls, "__call__", guard)  # noqa: B010  # mypy takes an assignment for a mistake
    cls.run = net
    cls.throws = _Throws(beneath(cls, "throws"))
    cls.after_return = _after_return(beneath(cls, "after_return"))


def take_off(cls: type[Any]) -> None:
    """Undo ``put_on`` for a class that is bound again without an intent, and hide the guard of its bases."""
    for name, was in vars(cls).get(KEPT, {}).items():
        if was is _NOTHING:
            delattr(cls, name)
        else:
            setattr(cls, name, was)
    if KEPT in vars(cls):
        delattr(cls, KEPT)
        delattr(cls, _GUARD)
    if any(KEPT in vars(base) for base in cls.__mro__):  # a base is a guarded task, and stays guarded
        for name in _PLACED:
            setattr(cls, name, beneath(cls, name))


class _Throws:
    """``throws`` of a guarded task: the author's own, and the error's class while a call is answered with an error.

    An answer is no failure of this execution. So Celery logs it in one line at INFO, and Sentry's integration, which
    also reads ``throws``, sends nothing.
    """

    def __init__(self, own: Any) -> None:
        self._own = own

    def __get__(self, task: Any, cls: type[Any]) -> Any:
        stack = None if task is None else task.request_stack.stack
        answer = getattr(stack[-1], ANSWER, None) if stack else None
        if answer is None:
            return self._own
        own = self._own or ()
        return (*own, answer) if isinstance(own, tuple) else (own, answer)


def is_outermost(cls: type[Any]) -> bool:
    """Whether Celery calls the guard directly: no other code was put around it since."""
    own = vars(cls)
    return _GUARD in own and own["__call__"] is own[_GUARD]


def around(task: Task) -> Callable[..., Any] | None:
    """Return the ``__call__`` of the task's bases, which calls ``run``; None if it is Celery's own."""
    call = beneath(type(task), "__call__")
    if call is vars(Task)["__call__"] and call.__module__ in _CELERYS:
        return None
    bound: Callable[..., Any] = call.__get__(task, type(task))
    return bound


def body(task: Task) -> tuple[Any, Callable[..., Any]]:
    """Return the net of a task's class, and the author's ``run`` below it."""
    cls = type(task)
    return vars(cls).get("run"), _bound(beneath(cls, "run"), task)


def beneath(cls: type[Any], name: str) -> Any:
    """Return an attribute of a class as it was before ``put_on``."""
    for base in cls.__mro__:
        own = vars(base)
        found = own.get(KEPT, own).get(name, _NOTHING)
        if found is not _NOTHING:
            return found
    raise AttributeError(name)  # cannot happen: Task has all of them


def _bound(found: Any, task: Task) -> Callable[..., Any]:
    bound: Callable[..., Any] = found.__get__(task, type(task)) if hasattr(found, "__get__") else found
    return bound


def _net(found: Any) -> Callable[..., Any]:
    """Return the ``run`` for all callers but the guard, which calls the body directly."""
    function = found.__func__ if isinstance(found, staticmethod) else found

    @functools.wraps(function)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        stack = self.request_stack.stack
        if not stack or self.idem_declaration is None:  # task.run(…), or an unguarded task with this base
            return _bound(found, self)(*args, **kwargs)
        request = stack[-1]
        if not request.called_directly and not hasattr(request, "idem_claim"):
            return self._came_past(request, args, kwargs)
        inside = _opened(stack)
        above = stack[inside:]
        del stack[inside:]
        try:
            return _bound(found, self)(*args, **kwargs)
        finally:
            stack.extend(above)

    # Celery drops the first parameter of a signature, and a staticmethod has no self.
    if function is not found:
        with contextlib.suppress(TypeError, ValueError):  # a callable without a signature
            signature = inspect.signature(function)
            myself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
            signature = signature.replace(parameters=[myself, *signature.parameters.values()])
            setattr(run, "__signature__", signature)  # noqa: B010  # mypy knows only functools' attributes
    return run


def _after_return(found: Any) -> Callable[..., None]:
    """Return the ``after_return`` of a guarded task. Celery calls it when a task's caller has its answer."""
    own = None if found is Task.after_return else found

    def after_return(
        self: Any, status: Any, retval: Any, task_id: Any, args: Any, kwargs: Any, einfo: Any
    ) -> None:
        if task_id in owing.RESULTS:
            owing.answered(task_id)
        if own is not None:
            _bound(own, self)(status, retval, task_id, args, kwargs, einfo)

    return after_return


def _opened(stack: list[Any]) -> int:
    """Return how many requests the body should see: up to the one whose ``__call__`` runs. Marks it as begun.

    A base's ``super().__call__`` ends in Celery's ``Task.__call__``, which puts a copy of the request on top. What the
    body publishes, or does to its chain, would be lost with the copy.
    """
    keep = len(stack)
    while keep and getattr(stack[keep - 1], "idem_opened", False):
        keep -= 1
        stack[keep].idem_opened = False
    return min(keep + 1, len(stack))
