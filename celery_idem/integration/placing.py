"""Puts the guard into the class of each task that declares an intent, and into no other.

A task class finds ``__call__`` along its bases, and the first one wins: a framework's (Flask's documented
pattern opens its application context there and calls ``self.run``), a mixin's, or ours. So the guard is no base
class's method: it is put into the class of the task itself when that is bound. What its bases would have called runs
inside, around the body; a class without an intent is not touched.

``run`` gets a net. A delivery that arrives there without a claim has bypassed the guard, because ``__call__`` was
replaced later, or a tracer calls ``run``. The net sends it through the guard.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any

from celery import Task

KEPT = "_idem_kept"
"""The class attribute with what ours replaced, by name. Looked up in the class's own namespace only."""

_GUARD = "_idem_guard"
"""The class attribute with the guard itself."""

ANSWER = "idem_answer"
"""Attribute of a request whose error is an answer: its class."""

_CELERYS = frozenset({"celery.app.task", "celery.app.trace"})
"""Modules that ``Task.__call__`` is from; the second is the worker's. A library may replace it with its own."""

_NOTHING: Any = object()

_PLACED = ("__call__", "run", "throws")
"""What is put into a guarded task's class."""


def put_on(cls: type[Any], guard: Callable[..., Any]) -> None:
    """Make ``guard`` the ``__call__`` of a task class, and put the net under its ``run``."""
    if KEPT in vars(cls):  # bound again
        return
    kept = {name: vars(cls).get(name, _NOTHING) for name in _PLACED}
    net = _net(beneath(cls, "run"))
    setattr(cls, KEPT, kept)
    setattr(cls, _GUARD, guard)
    setattr(cls, "__call__", guard)  # noqa: B010  # mypy takes an assignment for a mistake
    cls.run = net
    cls.throws = _Throws(beneath(cls, "throws"))


def take_off(cls: type[Any]) -> None:
    """Undo ``put_on``: the class is bound again, where it declares no intent, or one of its bases was."""
    for name, was in vars(cls).get(KEPT, {}).items():
        if was is _NOTHING:
            delattr(cls, name)
        else:
            setattr(cls, name, was)
    if KEPT in vars(cls):
        delattr(cls, KEPT)
        delattr(cls, _GUARD)
    if any(KEPT in vars(base) for base in cls.__mro__):  # a base of it is a guarded task, and stays guarded
        for name in _PLACED:
            setattr(cls, name, beneath(cls, name))


class _Throws:
    """``throws`` of a guarded task: the author's, and of a call that is answered with an error, that error's class.

    An answer is no failure of this execution: Celery logs it in one line at INFO, and Sentry's integration, which
    looks at ``throws`` too, sends nothing.
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
    """Whether Celery receives what the guard returns: no code was put around it since."""
    own = vars(cls)
    return _GUARD in own and own["__call__"] is own[_GUARD]


def around(task: Task) -> Callable[..., Any] | None:
    """What the task's bases would have called in place of ``run``; None where that is Celery's own."""
    call = beneath(type(task), "__call__")
    if call is vars(Task)["__call__"] and call.__module__ in _CELERYS:
        return None
    bound: Callable[..., Any] = call.__get__(task, type(task))
    return bound


def body(task: Task) -> tuple[Any, Callable[..., Any]]:
    """The net of a task's class, and what is under it."""
    cls = type(task)
    return vars(cls).get("run"), _bound(beneath(cls, "run"), task)


def beneath(cls: type[Any], name: str) -> Any:
    """What a class has under a name, ours left out."""
    for base in cls.__mro__:
        own = vars(base)
        own_one = own.get(KEPT, own).get(name, _NOTHING)
        if own_one is not _NOTHING:
            return own_one
    raise AttributeError(name)  # cannot happen: Task has both


def _bound(found: Any, task: Task) -> Callable[..., Any]:
    bound: Callable[..., Any] = found.__get__(task, type(task)) if hasattr(found, "__get__") else found
    return bound


def _net(found: Any) -> Callable[..., Any]:
    """``run`` for all callers but the guard, which calls the body directly."""
    function = found.__func__ if isinstance(found, staticmethod) else found

    @functools.wraps(function)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        stack = self.request_stack.stack
        if not stack:  # task.run(…): the body alone
            return _bound(found, self)(*args, **kwargs)
        request = stack[-1]
        if self.idem_declaration is None:  # an ordinary task whose base this is
            return _bound(found, self)(*args, **kwargs)
        if not request.called_directly and not hasattr(request, "idem_claim"):
            return self._came_past(request, args, kwargs)
        inside = _opened(stack)
        above = stack[inside:]
        del stack[inside:]
        try:
            return _bound(found, self)(*args, **kwargs)
        finally:
            stack.extend(above)

    if function is not found:  # a signature reader drops the first parameter, and this one has none to drop
        with contextlib.suppress(TypeError, ValueError):  # a callable that has none
            signature = inspect.signature(function)
            myself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
            signature = signature.replace(parameters=[myself, *signature.parameters.values()])
            setattr(run, "__signature__", signature)  # noqa: B010  # mypy knows only functools' attributes
    return run


def _opened(stack: list[Any]) -> int:
    """How many requests to keep for the body: up to the one whose ``__call__`` is under way. Marks it as begun.

    Celery's ``Task.__call__``, which a base's ``super().__call__`` ends in, puts a copy of it on top. What the
    body publishes, or does to its chain, would be lost with the copy.
    """
    keep = len(stack)
    while keep and getattr(stack[keep - 1], "idem_opened", False):
        keep -= 1
        stack[keep].idem_opened = False
    return min(keep + 1, len(stack))
