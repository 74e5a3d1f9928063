"""Reads what a task class declares: its intent, its parameters, pydantic models among them, and its options."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import FunctionType
from typing import TYPE_CHECKING, Any

from celery.app import base
from celery.utils.imports import symbol_by_name

from celery_idem.core import keys
from celery_idem.core.errors import ConfigurationError
from celery_idem.core.pydantic_models import Reader
from celery_idem.core.signatures import Called, Opaque, called
from celery_idem.integration import options, placing
from celery_idem.integration.settings import Settings, of_app

if TYPE_CHECKING:
    from celery import Celery

_ALIKE_INTENT = 0.8
"""Similarity (1: equal) from which an attribute of an ordinary task counts as a misspelt ``intent``, if its value names
the task's parameters. Two exchanged letters are above it."""


def declaration_of(cls: type[Any], app: Celery, asked: bool, in_code: bool) -> keys.Declaration | None:
    """Return the checked declaration of a task class; None for an ordinary task.

    Args:
        asked: its author chose the guarded class, so there has to be an intent.
        in_code: see ``options.read``.

    Raises:
        ConfigurationError: the declaration is wrong, or ``asked`` without an intent.
    """
    try:
        return _declaration_of(cls, app, asked, in_code)
    except ConfigurationError:
        app._tasks.pop(cls.name, None)  # Celery has registered the task, and it must not run unguarded
        raise


def _declaration_of(cls: type[Any], app: Celery, asked: bool, in_code: bool) -> keys.Declaration | None:
    intent = inspect.getattr_static(cls, "intent", None)
    if isinstance(intent, staticmethod):
        intent = intent.__func__
    if intent is None and not asked:  # the class is the application's task_cls=
        _check_no_intent(cls)
        return None
    _take_signature(cls)
    if intent is None:
        options.check_spelling(cls.name, options.strange(cls))
        raise ConfigurationError(
            f"{cls.name} is declared with {cls.__mro__[1].__name__} but without an intent. Say which parameters make "
            "two calls the same action: intent=(…). Parameters: "
            f"{', '.join(called_of(cls).signature.parameters) or 'none'}."
        )
    if isinstance(intent, str) and ":" in intent:  # from a configuration file: a function by its path
        intent = symbol_by_name(intent)
    setattr(cls, options.KEPT, options.read(cls, app, asked, in_code))
    settings_of(cls, app)
    known = called_of(cls)
    _check_foreign_secret(cls, known)
    declaration = keys.declare(
        task=cls.name,
        signature=known.signature,
        intent=intent,
        must_match=cls.must_match,
        secret=cls.secret,
        version=cls.intent_version,
        readers=_readers(cls, known),
        renamed=known.renamed,
        aliases=vars(cls).get("aliases", ()),  # not inherited, because a name belongs to one task
    )
    describe = _describe(cls)
    if describe is not None:
        from celery_idem.integration import describing  # imported late: few tasks have describe=

        described = describing.checked(cls.name, describe, declaration)
        setattr(cls, options.KEPT, options_of(cls)._replace(describe=described))
    return declaration


def _describe(cls: type[Any]) -> Any:
    """Return ``describe=``. A method of that name is the author's own, and no option."""
    given = inspect.getattr_static(cls, "describe", None)
    given = given.__func__ if isinstance(given, staticmethod) else given
    return None if _is_method(given, "describe") else given


def register_names(cls: type[Any], app: Celery, names: tuple[str, ...]) -> None:
    """Register a task under its other names too, for messages that were sent before it was renamed.

    Raises:
        ConfigurationError: another task has that name.
    """
    tasks = app._tasks
    for other in names[1:]:
        if other in tasks and type(tasks[other]).name != cls.name:
            tasks.pop(cls.name, None)
            raise ConfigurationError(
                f"{cls.name}: aliases= names {other}, and there is another task of that name. Remove that one: its "
                "messages and its intents are meant to become this task's."
            )
    if cls.name in tasks and not tasks.keys() >= set(names):
        task = tasks.pop(cls.name)
        # Its own name last, because a worker's log shows the last one.
        tasks.update(dict.fromkeys((*names[1:], cls.name), task))


def settings_of(cls: type[Any], app: Celery) -> Settings:
    """Return the application's settings with this task's own options.

    Raises:
        ConfigurationError: a setting of the application is wrong.
    """
    return of_app(app.conf).but(**options_of(cls).given)


def options_of(cls: type[Any]) -> options.Options:
    """Return the options of a guarded task."""
    kept: options.Options = getattr(cls, options.KEPT)
    return kept


def _check_foreign_secret(cls: type[Any], known: Called) -> None:
    """Refuse an attribute ``secret`` of a foreign base that names no parameters.

    The error does not show it, because it may be a password.
    """
    owner = next(one for one in cls.__mro__ if "secret" in vars(one))
    if hasattr(owner, options.OWN):
        return
    try:
        keys.declare(cls.name, known.signature, keys.ALL_ARGUMENTS, secret=cls.secret, renamed=known.renamed)
    except ConfigurationError:
        raise ConfigurationError(
            f"{cls.name}: the attribute `secret` of {owner.__qualname__} does not name parameters to hide. If it is "
            "something else, write secret=() beside the intent, or rename it."
        ) from None


def called_of(cls: type[Any]) -> Called:
    """Return the parameters that callers of a task give, without ``self``: of ``signature=``, or else of its body.

    Raises:
        ConfigurationError: they cannot be known.
    """
    given = getattr(cls, "_signature_given", None)
    if given is not None:
        return given if isinstance(given, Called) else Called(given, {}, {})
    run = placing.beneath(cls, "run")
    fun = run.__func__ if isinstance(run, (staticmethod, classmethod)) else run
    bound = isinstance(run, classmethod) or (
        hasattr(type(run), "__get__") and not isinstance(run, staticmethod)
    )
    try:
        inner = _pydantic(fun)
        known = called(fun) if inner is None else _as_celery_binds(inner)
        return known.without_first() if bound else known
    except Opaque as why:
        raise ConfigurationError(
            f"{cls.name}: its decorators hide which parameters its callers give: {why}. Say it: "
            "signature= a function (or an inspect.Signature) with these parameters, without self. Else one action "
            "could be taken for another."
        ) from None


def _take_signature(cls: type[Any]) -> None:
    """Move the option ``signature=`` to ``_signature_given``: Celery has a method of that name."""
    named = [vars(c)["signature"] for c in cls.__mro__ if "signature" in vars(c)]
    given = named[0]
    if _is_method(given, "signature"):
        return
    cls.signature = next(one for one in named if _is_method(one, "signature"))
    if isinstance(given, str):
        given = symbol_by_name(given)
    given = given.__func__ if isinstance(given, staticmethod) else given
    if not isinstance(given, inspect.Signature):
        try:
            given = called(given)
        except (Opaque, TypeError) as why:
            raise ConfigurationError(
                f"{cls.name}: signature= must be a function with the parameters that callers give, or an "
                f"inspect.Signature ({why})."
            ) from None
    cls._signature_given = given


def _is_method(given: Any, name: str) -> bool:
    """Whether ``given`` is a method of that name (Celery's, or an override), and not a function given as an option."""
    return (
        isinstance(given, FunctionType)
        and given.__name__ == name
        and given.__code__.co_varnames[: given.__code__.co_argcount][:1] == ("self",)
    )


# --- Celery's own wrapper for pydantic=True ---------------------------------------------


def _pydantic(fun: Any) -> dict[str, Any] | None:
    """Return the variables of Celery's pydantic wrapper (since Celery 5.5); None for any other function."""
    maker = getattr(base, "pydantic_wrapper", None)
    code = getattr(fun, "__code__", None)
    if maker is None or code is None or not any(code is each for each in maker.__code__.co_consts):
        return None
    known: dict[str, Any] = {}
    for cell_of in (fun, inspect.getclosurevars(fun).nonlocals.get("validate_argument")):  # 5.7 moved some
        known.update(inspect.getclosurevars(cell_of).nonlocals if cell_of is not None else {})
    return known


def _as_celery_binds(wrapper: Mapping[str, Any]) -> Called:
    """Return the parameters of a body with ``pydantic=True``.

    Celery binds a call to the signature of the innermost function, and passes the arguments on by position. So the
    function that it calls must have that signature.
    """
    inner = called(wrapper["task_fun"])
    bound: inspect.Signature = wrapper["task_signature"]
    takes = [
        p
        for p in inner.signature.parameters.values()
        if p.name in bound.parameters or p.kind is not p.KEYWORD_ONLY or p.default is p.empty
    ]
    if [(p.name, p.kind) for p in takes] != [(p.name, p.kind) for p in bound.parameters.values()]:
        raise Opaque("pydantic=True passes arguments on by the parameters of the innermost function")
    return inner._replace(signature=inner.signature.replace(parameters=takes))


def _readers(cls: type[Any], known: Called) -> dict[str, Reader]:
    """Return readers of the parameters that Celery turns into models with ``pydantic=True``.

    Their annotations are ``Model`` or ``Optional[Model]``.
    """
    run = placing.beneath(cls, "run")
    wrapper = _pydantic(run.__func__ if isinstance(run, staticmethod) else run)
    if wrapper is None:
        return {}
    from celery.utils.annotations import annotation_issubclass, get_optional_arg

    hints = wrapper.get("type_hints") or {}
    context = {**wrapper["context"], "celery_app": wrapper["app"], "celery_task_name": wrapper["task_name"]}
    readers = {}
    for name, parameter in wrapper["task_signature"].parameters.items():
        hint = hints.get(name, parameter.annotation)
        inner = get_optional_arg(hint)
        if name in known.signature.parameters and annotation_issubclass(inner or hint, wrapper["BaseModel"]):
            readers[name] = Reader(inner or hint, inner is not None, wrapper["strict"], context)
    return readers


def _check_no_intent(cls: type[Any]) -> None:
    """Refuse a misspelt ``intent``, which would leave a task unguarded without notice.

    All other attributes of an ordinary task are the author's own.
    """
    for name in options.strange(cls):
        value = getattr(cls, name)
        if not (isinstance(value, (tuple, list)) and value and all(isinstance(one, str) for one in value)):
            continue
        import difflib

        likeness = difflib.SequenceMatcher(None, "intent", name).ratio()
        if likeness <= _ALIKE_INTENT:
            continue
        try:
            parameters = called_of(cls).signature.parameters
        except ConfigurationError:  # the parameters of an ordinary task need not be known
            continue
        if set(value) <= set(parameters):
            raise ConfigurationError(f"{cls.name}: there is no option {name}=. Did you mean intent=?")
