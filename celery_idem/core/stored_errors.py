"""Exceptions as plain data, and back without running code of their classes."""

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
        # Raised by a replay, these would stop the worker's main process, reject or requeue the message for ever, count
        # as a retry, a revocation or a time limit, or end a generator. By name, because nothing here imports Celery.
        # What is no Exception (SystemExit and kin) is special as well.
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
"""Classes that a replay may not raise, and their subclasses: a stand-in of the same name is raised instead."""

_STAND_IN_MODULE = "celery_idem.replayed"
"""Module of a stand-in for a special class. There is none of that name: with the class' own module, Celery's
result backend would give its caller the special class after all."""

_GROUP: tuple[type[BaseException], ...] = tuple(
    filter(None, [getattr(builtins, "BaseExceptionGroup", None)])  # since 3.11
)
_MEMBERS = (MemberDescriptorType, GetSetDescriptorType)
_HEAP_TYPE = 1 << 9
"""Py_TPFLAGS_HEAPTYPE: a class that is not built into the interpreter or an extension."""


def named(error: BaseException) -> dict[str, Any]:
    cls = type(error)
    return {"module": str(cls.__module__), "type": cls.__qualname__}


def form_of(error: BaseException) -> dict[str, Any]:
    """An exception as plain values. What JSON does not take is empty, or its text."""
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
    except Exception:  # a response, a connection, anything with code of its own
        return False
    return True


def _attributes(error: BaseException) -> Iterator[tuple[str, Any]]:
    """Those in its dictionary, and those beside it: ``errno`` of an OSError, slots."""
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
    """Of a class that is not here or must not be raised: its name, text and attributes, and nothing it does."""


def rebuilt(form: dict[str, Any]) -> Exception:
    """An exception from the plain values of ``form_of``. Runs no constructor but the interpreter's own."""
    module, name, text, args = str(form["module"]), str(form["type"]), str(form["text"]), list(form["args"])
    if "group" in form:
        args.append([rebuilt(one) for one in form["group"]])
    found: Any = _class_of(module, name)
    if found is not None and not _special(found):
        exc: Exception | None = _blank(found, args, form)
        if exc is not None and text_of(exc) == text:
            return exc
        # Its text needs more than was kept: a subclass that knows it.
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
    """The exception class of that name, where its module is imported here; else None.

    Looked up without ``getattr``, with which a module may import more and a class may run code.
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
    """A subclass of it can be made without running code of its author's."""
    return type(cls) is type and not any("__init_subclass__" in vars(base) for base in cls.__mro__[:-1])


def _blank(cls: type[BaseException], args: list[Any], form: dict[str, Any]) -> Any:
    """An instance with these arguments and attributes, made by the first built-in class below; None: it cannot be."""
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
    except Exception:  # a class that cannot be made in this way
        return None
    return exc


@lru_cache(maxsize=256)  # every replay of one intent needs the same
def _worded(cls: Any, module: str, name: str) -> type[BaseException]:
    """A subclass whose instances say the text in their form, and go through pickle as it."""
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
    except Exception:  # an author's __str__ that fails must not cost the record of how the body ended
        return f"a {type(error).__name__} that cannot say what happened"
