"""Turns exceptions into plain data, and back without running code of their classes."""

from __future__ import annotations

import builtins
import contextlib
import sys
from collections.abc import Iterator
from functools import lru_cache
from types import GetSetDescriptorType, MemberDescriptorType
from typing import Any

from celery_idem.core.json_values import to_json

_SPECIAL = frozenset(
    {
        # Raised by a replay, these would stop the worker, reject or requeue the message for ever, count as a retry, a
        # revocation or a time limit, or end a generator. Named, because the core does not import Celery. Classes that
        # are not Exceptions (SystemExit) are special as well.
        ("builtins", "MemoryError"),
        ("builtins", "StopIteration"),
        ("builtins", "StopAsyncIteration"),
        ("celery.exceptions", "TaskPredicate"),  # Ignore, Reject, Retry
        ("billiard.exceptions", "SoftTimeLimitExceeded"),
        ("billiard.exceptions", "TimeLimitExceeded"),
        ("billiard.exceptions", "WorkerLostError"),
        ("billiard.exceptions", "Terminated"),
        ("billiard.exceptions", "RestartFreqExceeded"),
        ("billiard.exceptions", "CoroStop"),
    }
)
"""Classes that a replay must not raise, nor their subclasses. It raises a stand-in of the same name."""

_STAND_IN_MODULE = "celery_idem.replayed"
"""Module name of a stand-in for a special class. With the real module name, Celery's result backend would rebuild the
special class for its caller."""

_GROUP: tuple[type[BaseException], ...] = tuple(
    filter(None, [getattr(builtins, "BaseExceptionGroup", None)])  # since 3.11
)
_MEMBERS = (MemberDescriptorType, GetSetDescriptorType)
_HEAP_TYPE = 1 << 9
"""Py_TPFLAGS_HEAPTYPE: set for classes written in Python."""


def named(error: BaseException) -> dict[str, Any]:
    cls = type(error)
    return {"module": str(cls.__module__), "type": cls.__qualname__}


def form_of(error: BaseException) -> dict[str, Any]:
    """Return an exception as plain values. A value that JSON cannot hold becomes None, or its text."""
    text = text_of(error)
    form: dict[str, Any] = {**named(error), "text": text}
    if isinstance(error, _GROUP):
        form["group"] = [form_of(one) for one in error.exceptions]  # type: ignore[attr-defined,unused-ignore]
        form["args"] = [str(error.args[0])]
    else:
        form["args"] = list(error.args) if _fits(error.args) else [text]
    kept = {name: value if _fits(value) else None for name, value in _attributes(error)}
    if kept:
        form["attributes"] = kept
        form["tuples"] = [name for name, value in kept.items() if isinstance(value, tuple)]
    return form


def _fits(value: Any) -> bool:
    try:
        to_json(value)
    except Exception:  # for example a response or a connection
        return False
    return True


def _attributes(error: BaseException) -> Iterator[tuple[str, Any]]:
    """Return the attributes in its dictionary, in slots and in C members, such as ``errno``."""
    for cls in type(error).__mro__:
        if cls is BaseException or cls in _GROUP:
            break
        for name, member in vars(cls).items():
            if isinstance(member, _MEMBERS) and not name.startswith("__"):
                with contextlib.suppress(Exception):
                    value = member.__get__(error)
                    if value is not None:
                        yield name, value
    for name, value in vars(error).items():
        if name not in _OWN_ATTRIBUTES:
            yield name, value


_OWN_ATTRIBUTES = ("idem_replayed", "_idem_form")


class _StandIn(Exception):
    """Stands for a class that is not loaded or must not be raised, with its name, text and attributes."""


def rebuilt(form: dict[str, Any]) -> Exception:
    """Return an exception from the values of ``form_of``. Runs only the interpreter's own constructors."""
    module, name, text, args = str(form["module"]), str(form["type"]), str(form["text"]), list(form["args"])
    if "group" in form:
        args.append([rebuilt(one) for one in form["group"]])
    found: Any = _class_of(module, name)
    if found is not None and not _special(found):
        exc: Exception | None = _blank(found, args, form)
        if exc is not None and text_of(exc) == text:
            return exc
        # Its __str__ needs more than was kept: use a subclass that returns the stored text.
        if _plain(found):
            exc = _blank(_worded(found, found.__module__, name), args, form) or exc
        if exc is not None:
            return exc
    special = found is not None and _special(found)
    stand_in: Exception | None = _blank(
        _worded(_StandIn, _STAND_IN_MODULE if special else module, name), args, form
    )
    assert stand_in is not None
    return stand_in


def _class_of(module: str, name: str) -> type[BaseException] | None:
    """Return the exception class of that name, if its module is imported.

    Does not use ``getattr``, which may run code of the module or class.
    """
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        try:
            found = object.__getattribute__(found, "__dict__").get(part)
        except AttributeError:
            return None
    return found if isinstance(found, type) and issubclass(found, BaseException) else None


def _special(cls: type[BaseException]) -> bool:
    return not issubclass(cls, Exception) or any(
        (base.__module__, base.__name__) in _SPECIAL for base in cls.__mro__
    )


def _plain(cls: type[BaseException]) -> bool:
    """Tell whether making a subclass runs no code of the author's."""
    return type(cls) is type and not any("__init_subclass__" in vars(base) for base in cls.__mro__[:-1])


def _blank(cls: type[BaseException], args: list[Any], form: dict[str, Any]) -> Any:
    """Return an instance, made by its first built-in base class, or None if that fails."""
    builtin: Any = next(base for base in cls.__mro__ if not base.__flags__ & _HEAP_TYPE)
    attributes, tuples = form.get("attributes") or {}, form.get("tuples") or ()
    try:
        exc = builtin.__new__(cls, *args)
        BaseException.args.__set__(exc, tuple(args))  # type: ignore[attr-defined]
        members = {n: m for base in cls.__mro__ for n, m in vars(base).items() if isinstance(m, _MEMBERS)}
        own = object.__getattribute__(exc, "__dict__")
        for name, value in attributes.items():
            if name == "__notes__" and not (
                isinstance(value, list) and all(isinstance(n, str) for n in value)
            ):
                continue
            value = tuple(value) if name in tuples and isinstance(value, list) else value
            if name in members:
                with contextlib.suppress(Exception):  # read-only
                    members[name].__set__(exc, value)
            else:
                own[name] = value
        own.update(idem_replayed=True)
        if getattr(cls, "_idem_worded", False):
            own.update(_idem_form=form)
    except Exception:  # the class cannot be made so
        return None
    return exc


@lru_cache(maxsize=256)  # replays of an intent need the same class
def _worded(cls: Any, module: str, name: str) -> type[BaseException]:
    """Return a subclass whose instances print the stored text and are pickled as their form."""
    body = {
        "__module__": module,
        "__qualname__": name,
        "__str__": lambda self: str(self._idem_form["text"]),
        "__reduce__": lambda self: (rebuilt, (self._idem_form,)),
        "_idem_worded": True,
    }
    return type(name.rpartition(".")[2], (cls,), body)


def text_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # a failing __str__ must not prevent recording the outcome
        return f"a {type(error).__name__} whose text cannot be read"
