"""Message headers: the identity of the intent, and representations of arguments without secrets.

Celery turns options that it does not know into message properties: ``scope=`` of a signature whose task this process
does not have, of ``send_task``, of a beat entry. It drops such options of signatures inside a message, when a process
without those tasks publishes them. So just before a message is published, such options are written into the headers of
the message, and of every signature in it. Headers arrive wherever Celery's own headers do.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator, Mapping, MutableMapping
from datetime import datetime, timedelta, timezone
from itertools import zip_longest
from types import FrameType
from typing import TYPE_CHECKING, Any

from celery import signals
from celery._state import _task_stack
from celery.canvas import Signature, _chain, chunks, group, xmap, xstarmap
from celery.utils.time import maybe_iso8601, maybe_make_aware
from kombu.utils.imports import symbol_by_name

from celery_idem.core import keys
from celery_idem.core.errors import IntentError
from celery_idem.core.model import CALLER_KEY, MESSAGE, PART_OF, PUBLISHED, SCOPE
from celery_idem.engine import events
from celery_idem.integration.guarded import guarded_task

if TYPE_CHECKING:
    from celery import Celery

HIDDEN = "(secret)"
"""Replaces a secret value."""

LOOPS = frozenset({"celery.map", "celery.starmap", "celery.chunks"})
"""Celery's own tasks that call another task for each of their items."""

_BEGIN = frozenset(name[:2] for name in keys.LABELS)
"""Beginnings of labels. No option of Celery begins with them."""

_ALIKE = 0.8
"""Similarity (1: equal) from which an option counts as a misspelt label, such as "scop" or "occurence"."""

_secrets: dict[str, keys.Declaration] = {}
"""Declarations with secret parameters, by the task's name. If several applications in one process have different tasks
of one name, the last one counts. A value may then be hidden without need."""


def hide(declaration: keys.Declaration) -> None:
    """Hide the secrets of this task in every message that this process publishes."""
    _secrets.update(dict.fromkeys(declaration.names, declaration))


def has_secrets(app: Celery, name: str) -> bool:
    """Whether this process knows that a task has secret parameters."""
    task = guarded_task(app, name)
    return name in _secrets or (task is not None and bool(task.idem_declaration.secret))


def without_secrets(declaration: keys.Declaration, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Return the arguments of a call, with ``HIDDEN`` for secret values."""
    names, rest = [], ""
    for name, parameter in declaration.signature.parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            rest = name
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(name)
    hidden = declaration.secret
    given = zip_longest(names[: len(args)], args, fillvalue=rest)
    positional = tuple(HIDDEN if name in hidden else value for name, value in given)
    return positional, {name: HIDDEN if name in hidden else value for name, value in kwargs.items()}


def shown(
    declaration: keys.Declaration, args: Any, kwargs: Any, amqp: Any = None, levels: int = 3
) -> dict[str, str]:
    """Return the texts of the arguments for Celery's log, events and monitors, without secret values.

    Args:
        amqp: the application's, which has the maximum lengths; None: those of Celery.
        levels: depth, ``task_repr_maxlevels``. 3 is Celery's default, in releases without that setting too.
    """
    from celery.app.amqp import AMQP  # here it is loaded already; not every process needs it
    from celery.utils.saferepr import saferepr

    if declaration.secret:
        args, kwargs = without_secrets(declaration, args, kwargs)
    sizes = amqp or AMQP
    return {
        "argsrepr": saferepr(args, sizes.argsrepr_maxsize, levels),
        "kwargsrepr": saferepr(kwargs, sizes.kwargsrepr_maxsize, levels) if kwargs else "{}",
    }


def in_scope(setting: Any, given: Any = None) -> str | None:
    """Return the scope of a call that is made now, in normal form.

    Args:
        setting: ``idem_scope``, or the task's own.
        given: scope of the call, which takes precedence.

    Raises:
        IntentError: the value cannot be a scope.
    """
    if given is None and setting is not None:
        given = symbol_by_name(setting)()
    return keys.label("scope", given)


def check_labels(task: str, options: Mapping[str, Any]) -> None:
    """Refuse a misspelt ``occurrence``. Celery takes any option, and the call would be another action.

    Raises:
        TypeError: an option's name is nearly that of a label.
    """
    for name in options:
        if name[:2] in _BEGIN:
            import difflib  # only a mistake needs it

            near = difflib.get_close_matches(name, keys.LABELS, n=1, cutoff=_ALIKE)
            if near:
                raise TypeError(f"{task}: there is no option {name}=. Did you mean {near[0]}=?")


def first_due(app: Celery, options: Mapping[str, Any]) -> int:
    """Return when a call is first due, in seconds since 1970, by this machine's clock."""
    if options.get("countdown") or options.get("eta"):
        with contextlib.suppress(TypeError, ValueError, OverflowError):  # Celery reports it
            at = due_at(app, options)
            if at is not None:
                return int(at.timestamp())
    return int(time.time())


def due_at(app: Celery, options: Mapping[str, Any]) -> datetime | None:
    """Return when a call is due: its ETA, or its countdown from now; None: at once."""
    eta = options.get("eta")
    if options.get("countdown"):
        now: datetime = app.now()
        return now + timedelta(seconds=float(options["countdown"]))
    if isinstance(eta, str):
        eta = maybe_iso8601(eta)
    aware: datetime | None = maybe_make_aware(eta, app.timezone) if eta else None
    return aware


# --- just before a message is published ------------------------------------------------


def carry(
    sender: Any = None,
    body: Any = None,
    headers: MutableMapping[str, Any] | None = None,
    properties: MutableMapping[str, Any] | None = None,
    **_: Any,
) -> None:
    """Celery's signal: these are the very headers and properties that are published."""
    if headers is None or properties is None or not isinstance(body, tuple):
        return  # protocol 1 has no headers for this
    args, kwargs, embedded = body
    made = headers.get(MESSAGE) == headers["id"]  # our apply_async has made these headers
    if sender in _secrets and not made:
        headers.update(shown(_secrets[sender], args, kwargs))
    elif sender in LOOPS:
        _of_the_loop(kwargs.get("task"), headers)
    elif sender == "celery.chord_unlock":
        # Without native chords, this task has the chord's body: a clone of the author's, or a dictionary in a retry.
        if len(args) > 1 and isinstance(args[1], Signature):
            args[1].update(_identified(args[1]))
        if _secrets:  # a call deep inside may have some, and a person does not need these arguments
            headers["argsrepr"] = headers["kwargsrepr"] = HIDDEN
    if embedded.get("chain") and not (
        keys.LABELS.keys().isdisjoint(properties) and keys.IDENTITY.isdisjoint(headers)
    ):
        own = _of_the_chain()
        if own:
            embedded["chain"] = _belonging(embedded["chain"], own)
    if not made and not (_OURS.isdisjoint(headers) and keys.LABELS.keys().isdisjoint(properties)):
        copied = headers.get(MESSAGE, headers["id"]) != headers["id"]
        if PUBLISHED not in headers or copied:
            headers[PUBLISHED] = _seconds_at(headers.get("eta"))
        said = dict(properties)
        if headers.get("group") and KEY_OPTION in said:
            said[KEY_OPTION], part_of = of_a_group(said[KEY_OPTION])
            headers.update(part_of)
        _settle(headers, said, headers["id"])
        properties.update((name, said[name]) for name in keys.LABELS if said.get(name) is not None)
    for name in ("callbacks", "errbacks", "chain", "chord"):
        if embedded.get(name):
            embedded[name] = _inside(embedded[name])


signals.before_task_publish.connect(carry)

_OURS = frozenset((MESSAGE, PUBLISHED))
"""Headers of a message of a guarded task, also from a process that does not have the task."""


def _seconds_at(eta: str | None) -> int:
    """Return an ETA, or now if there is none, in seconds since 1970."""
    due = None
    with contextlib.suppress(ValueError):  # the worker reports it
        due = maybe_iso8601(eta)
    if due is not None and due.tzinfo is None:
        due = due.replace(tzinfo=timezone.utc)  # as Celery's worker reads it
    return int(time.time() if due is None else due.timestamp())


# Celery gives the options of a group to each of its calls, and those of a chain to its first call. It calls none of our
# code in between, and neither a call nor a message tells whose option it was. So the next two functions read that from
# the frame of the canvas that runs. The alternatives are worse: to replace methods of Celery's canvas classes for the
# whole process, or to have our own canvas classes that every author must import.
_CHAIN_RUNS = _chain.run.__code__


def _of_the_chain() -> dict[str, str]:
    """Return the identity that the options of a whole chain give to its later calls. Celery gives it only to the first.

    Under a caller's own key, each later call is a part of that action.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _CHAIN_RUNS:
        frame = frame.f_back
    if frame is None:
        return {}
    options = frame.f_locals["options"]
    own = {header: options[name] for name, header in keys.LABELS.items() if options.get(name) is not None}
    own |= dict(_said(options))  # what has no normal form stays as it is, and the worker refuses it
    if CALLER_KEY in own:
        own[PART_OF] = own.pop(CALLER_KEY)
    return own


_GROUP_RUNS = frozenset((group._apply_tasks.__code__, group.apply.__code__))

KEY_OPTION = "idempotency_key"


def of_a_group(given: Any) -> tuple[Any, dict[str, Any]]:
    """Decide what a caller's key means for a call in a group. Return the call's own key, and the header of a part.

    Celery gives the options of a group to each of its calls. Under one key, all calls would be one action. So each is a
    part of that action instead, identified by its own intent, as with ``replace``.
    """
    frame: FrameType | None = sys._getframe(1)
    call = None
    while frame is not None and frame.f_code not in _GROUP_RUNS:
        # Where a group runs in place its comprehension has a frame of its own.
        call = frame.f_locals.get("sig", call)
        frame = frame.f_back
    if frame is None or frame.f_locals["options"].get(KEY_OPTION) != given:
        return given, {}
    call = frame.f_locals.get("sig", call)
    own = call.options.get(KEY_OPTION) if isinstance(call, Signature) else None
    return (own, {}) if own not in (None, given) else (None, {PART_OF: given})


def _belonging(given: Any, own: Mapping[str, str]) -> Any:
    """Return copies of signatures with the identity ``own``, where they have none themselves."""
    if not isinstance(given, Mapping):
        return [_belonging(part, own) if isinstance(part, Mapping) else part for part in given]
    kwargs = given.get("kwargs") or {}
    if given["task"] not in LOOPS:
        inner = {
            name: _belonging(kwargs[name], own) for name in _PARTS.get(given["task"], ()) if kwargs.get(name)
        }
        if inner:
            return {**given, "kwargs": {**kwargs, **inner}}
    options = given.get("options") or {}
    headers = {**own, **(options.get("headers") or {}), **dict(_said(options))}
    if CALLER_KEY in headers:
        headers.pop(PART_OF, None)
    changed = {**given, "options": {**options, "headers": headers}}
    return Signature(changed, app=given.app) if isinstance(given, Signature) else changed


def _of_the_loop(inner: Any, headers: MutableMapping[str, Any]) -> None:
    """Give the identity of a loop over calls of another task to all of them."""
    if not isinstance(inner, Mapping):
        return
    if inner.get("task") in _secrets:
        headers["argsrepr"] = headers["kwargsrepr"] = HIDDEN
    found = (_identified(inner).get("options") or {}).get("headers") or {}
    outer = _task_stack.top
    if outer is not None and outer.name == "celery.chunks":  # it publishes loops without its own options
        found = {**found, **(outer.request.headers or {}), MESSAGE: ""}
    for name in found.keys() & {MESSAGE, *keys.IDENTITY}:
        headers.setdefault(name, found[name])


class _Loop(Signature):  # type: ignore[misc]
    """A loop that keeps its own options. Celery's loops drop them, in some releases all of them."""

    def apply_async(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        if self.kwargs["task"].get("task") in _secrets:
            options = {"argsrepr": HIDDEN, "kwargsrepr": HIDDEN, **options}
        return super().apply_async(args, kwargs, **self._kept(options))

    def apply(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        return super().apply(args, kwargs, **self._kept(options))

    def _kept(self, options: dict[str, Any]) -> dict[str, Any]:
        """Return the options, with the identity in headers: no other option reaches a loop that runs in place."""
        kept = {name: self.options[name] for name in (*keys.LABELS, "headers") if name in self.options}
        kept |= options
        own = keys.labelled(kept)
        return {**kept, "headers": {**(kept.get("headers") or {}), **own}} if own else kept


class Map(_Loop, xmap):  # type: ignore[misc]
    """``task.map``."""


class StarMap(_Loop, xstarmap):  # type: ignore[misc]
    """``task.starmap``."""


class Chunks(_Loop, chunks):  # type: ignore[misc]
    """``task.chunks``."""


def _settle(headers: MutableMapping[str, Any], options: MutableMapping[str, Any], message: str) -> None:
    """Write the identity in options into headers, and make the headers this message's own.

    A value without a normal form stays, and the worker refuses it, because a receiver of a signal cannot.
    """
    try:
        own = keys.identity(headers, message)
    except IntentError:
        return
    if headers.get(MESSAGE, message) != message:
        for name in keys.MADE:
            headers.pop(name, None)
    headers.update(own)
    headers[MESSAGE] = message
    for name, header in keys.LABELS.items():
        value = options.get(name)
        if value is None:
            continue
        headers[header] = value
        with contextlib.suppress(IntentError):
            headers[header] = keys.label(name, value)
            if not isinstance(value, (str, int)):  # an Enum is no property for most transports
                options[name] = headers[header]


# --- signatures in a message ------------------------------------------------------------


def _inside(given: Any) -> Any:
    """Return a signature, or a list of them, with the identity of each in its headers. Copies what it changes."""
    if isinstance(given, Mapping):
        return _identified(given)
    return [_identified(part) if isinstance(part, Mapping) else part for part in given]


def _identified(part: Mapping[str, Any]) -> Mapping[str, Any]:
    options = part.get("options") or {}
    changed: dict[str, Any] = {}
    own = dict(_said(options))
    for name, header in keys.LABELS.items():
        if header in own and not isinstance(options[name], (str, int)):  # most serializers take no Enum
            changed[name] = own[header]
    if isinstance(part, Signature):  # built in this process; one from a message is a plain dictionary
        own = {**_ambient(part, {**(options.get("headers") or {}), **own}), **own}
    if own:
        changed["headers"] = {**(options.get("headers") or {}), **own}
    for name in ("link", "link_error", "chord"):
        if options.get(name):
            changed[name] = _inside(options[name])
    kwargs = part.get("kwargs") or {}
    inner = {
        name: _inside(kwargs[name])
        for name in _PARTS.get(part["task"], ())
        if isinstance(kwargs.get(name), (Mapping, list, tuple))
    }
    if not changed and not inner:
        return part
    return {**part, "options": {**options, **changed}, "kwargs": {**kwargs, **inner}}


_PARTS = {
    "celery.chain": ("tasks",),
    "celery.group": ("tasks",),
    "celery.chord": ("header", "body"),
    **dict.fromkeys(LOOPS, ("task",)),
}
"""Arguments of a canvas that are signatures, by its task's name."""


def _said(options: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, header in keys.LABELS.items():
        with contextlib.suppress(IntentError):
            value = keys.label(name, options.get(name))
            if value is not None:
                yield header, value


def _ambient(part: Signature, headers: Mapping[str, Any]) -> dict[str, str]:
    """Return the scope of a call without one, which is made in this process and published by another one."""
    if SCOPE in headers or MESSAGE in headers or part.get("subtask_type"):
        return {}
    app = part.app
    task = app.tasks.get(part["task"])
    if task is None:
        setting = app.conf.get("idem_scope")
    elif getattr(task, "idem_declaration", None) is None:
        return {}
    else:
        setting = task.guard.settings.scope
    if setting is None:
        return {}
    try:
        scope = in_scope(setting)
    except Exception as error:  # a receiver of a signal cannot refuse; the worker refuses an empty scope
        events.diagnose(
            logging.ERROR, "idem_scope failed for %s, so that call will be refused", part["task"], error=error
        )
        scope = ""
    return {MESSAGE: ""} if scope is None else {SCOPE: scope}
