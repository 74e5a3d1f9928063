"""What a task class declares, read off the class: its signature, its intent, its options."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterator
from types import FunctionType
from typing import TYPE_CHECKING, Any

from celery import Task
from celery.utils.imports import symbol_by_name

from celery_idem import keys
from celery_idem.errors import ConfigurationError
from celery_idem.settings import NAMES, Settings, checked, of_app

if TYPE_CHECKING:
    from celery import Celery

OWN_OPTIONS = (
    "intent",
    "must_match",
    "secret",
    "intent_version",
    "reconcile",
    "no_effect_errors",
    "ambiguous_errors",
)
OPTIONS = OWN_OPTIONS + NAMES

_CELERYS_OWN = frozenset(dir(Task))
"""Names that every Celery task has. Looked up by ``dir``, because ``hasattr(Task, "app")`` would bind
the root class to the current app, and Celery annotates no task below a class that is bound."""

_ALIKE = 0.85
"""How alike a task's attribute and one of our options must be to be taken for a slip of the pen."""

_ALIKE_INTENT = 0.8
"""The same where the value names the task's parameters, which says as much: two letters exchanged are one slip."""


def declaration_of(cls: type[Any], app: Celery, asked: bool) -> keys.Declaration | None:
    """The checked declaration of a task class; None for an ordinary task.

    Args:
        asked: its author chose the guarded class, so there has to be an intent.

    Raises:
        ConfigurationError: it is wrong, or missing where the task asked to be guarded.
    """
    try:
        return _declaration_of(cls, app, asked)
    except ConfigurationError:
        app._tasks.pop(cls.name, None)  # Celery registered it already; a wrong one must not run unguarded
        raise


def _declaration_of(cls: type[Any], app: Celery, asked: bool) -> keys.Declaration | None:
    intent = inspect.getattr_static(cls, "intent", None)
    if isinstance(intent, staticmethod):
        intent = intent.__func__
    if intent is None and not asked:  # through task_cls=: its author asked for nothing
        _check_no_intent(cls)
        return None
    _check_spelling(cls)
    if intent is None:
        raise ConfigurationError(
            f"{cls.name} is declared with {cls.__mro__[1].__name__} but without an intent. Say which parameters make "
            "two calls the same "
            "action: intent=(…). Parameters: " + (", ".join(_signature(cls).parameters) or "none") + "."
        )
    if isinstance(intent, str) and ":" in intent:  # from a configuration file: a function by its path
        intent = symbol_by_name(intent)
    settings_of(cls, app)
    return keys.declare(
        task=cls.name,
        signature=_signature(cls),
        intent=intent,
        must_match=cls.must_match,
        secret=cls.secret,
        version=cls.intent_version,
        models=_models(cls),
    )


def settings_of(cls: type[Any], app: Celery) -> Settings:
    """The application's settings with this task's own options.

    Raises:
        ConfigurationError: a name or a value is wrong.
    """
    own = {name: getattr(cls, name) for name in NAMES if hasattr(cls, name)}
    return checked(of_app(app.conf), own, where=cls.name or cls.__name__)


def _signature(cls: type[Any]) -> inspect.Signature:
    """Of the body, without ``self``."""
    run = inspect.getattr_static(cls, "run")
    if isinstance(run, staticmethod):
        return inspect.signature(run.__func__)
    signature = inspect.signature(run)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def _models(cls: type[Any]) -> dict[str, Any]:
    """Parameters annotated with a pydantic model: a dictionary given for one is read as the model,
    because that is what the body will get, defaults included."""
    run = inspect.getattr_static(cls, "run")
    fun = inspect.unwrap(run.__func__ if isinstance(run, staticmethod) else run)
    try:
        hints = typing.get_type_hints(fun) if isinstance(fun, FunctionType) else {}
    except Exception:  # an annotation that cannot be evaluated is somebody else's business
        return {}
    models = {}
    for name, hint in hints.items():
        for option in (hint, *typing.get_args(hint)):
            if (
                isinstance(option, type)
                and hasattr(option, "model_validate")
                and hasattr(option, "model_dump")
            ):
                models[name] = option
    models.pop("return", None)
    return models


def _check_spelling(cls: type[Any]) -> None:
    """An attribute that looks like one of our options and is none would be silently ignored."""
    for name in _strange(cls):
        import difflib  # only a suspect needs it

        near = difflib.get_close_matches(name.removeprefix("idem_"), OPTIONS, n=1, cutoff=_ALIKE)
        if near:
            raise ConfigurationError(f"{cls.name}: there is no option {name}=. Did you mean {near[0]}=?")


def _check_no_intent(cls: type[Any]) -> None:
    """The attributes of an ordinary task are its author's own, unless one says what an intent would say:
    a slip of the pen would leave that task without a guard, and nobody would know."""
    for name in _strange(cls):
        value = getattr(cls, name)
        if not (isinstance(value, (tuple, list)) and value and all(isinstance(one, str) for one in value)):
            continue
        import difflib

        likeness = difflib.SequenceMatcher(None, "intent", name.removeprefix("idem_")).ratio()
        if likeness > _ALIKE_INTENT and set(value) <= set(_signature(cls).parameters):
            raise ConfigurationError(f"{cls.name}: there is no option {name}=. Did you mean intent=?")


def _strange(cls: type[Any]) -> Iterator[str]:
    """Names of a class's own attributes that neither we nor Celery know."""
    for name in vars(cls):
        if name.startswith("_") or name in OPTIONS or name in _CELERYS_OWN:
            continue
        if not callable(getattr(cls, name, None)):
            yield name
