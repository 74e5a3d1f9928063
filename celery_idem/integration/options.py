"""Reads a task's options from the places where they may be written.

An attribute that a class had before it used this package must not become a setting because of its name. So a setting's
short name counts only beside the intent. Everywhere else a setting needs its name from ``app.conf`` (docs/adr/0032).
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from celery import Task
from celery.utils.functional import firstmethod

from celery_idem.core.errors import ConfigurationError
from celery_idem.integration.settings import NAMES, PREFIX, hint, not_allowed

if TYPE_CHECKING:
    from celery import Celery

WORDS = (
    "intent", "must_match", "secret", "describe", "signature", "intent_version", "aliases", "reconcile",
    "no_effect_errors", "ambiguous_errors",
)  # fmt: skip
"""Options of a declaration, which are inherited from bases and mixins. A class rarely has such an attribute by chance,
and hardly ever with a value that fits."""

OPTIONS = WORDS + NAMES

OWN = "idem_declaration"
"""The one attribute of ``IdempotentTask`` whose name begins like a setting."""

KEPT = "_idem_options"
"""The attribute of a guarded task's class with its ``Options``."""

_CELERYS_OWN = frozenset(dir(Task)).union(name for name, _ in Task.from_config)
"""Names that every Celery task has; ``bind`` sets those of ``from_config``. From ``dir``, because ``hasattr(Task,
"app")`` would bind the root class to the current app, and Celery annotates no task below a bound class."""

_ALIKE = 0.85
"""Similarity (1: equal) from which a task's attribute counts as a misspelt option."""


class ConfigurationWarning(UserWarning):
    """A declaration may not mean what it says. Nothing is refused."""


class Stray(NamedTuple):
    """An attribute with a setting's short name in a class without an intent. It is not read."""

    owner: type[Any]
    name: str

    @property
    def where(self) -> str:
        return f"{self.owner.__module__}.{self.owner.__qualname__}.{self.name}"


class Options(NamedTuple):
    """Options of a guarded task, beside its intent.

    Attributes:
        given: its own settings, checked.
        strays: attributes that may be meant as settings.
        in_code: its own class declares the intent, and not the configuration.
        describe: a format string or a function; None for none.
    """

    given: Mapping[str, Any] = {}
    strays: tuple[Stray, ...] = ()
    in_code: bool = False
    describe: Any = None


def declares(cls: type[Any]) -> bool:
    """Whether a class, or the decorator that made it, has an intent. Call it before Celery annotates the class."""
    kept = vars(cls).get(KEPT)
    return kept.in_code if kept is not None else vars(cls).get("intent") is not None


def read(cls: type[Any], app: Celery, asked: bool, in_code: bool) -> Options:
    """Return the options of a guarded task. Warns once of short names in the author's own shared bases.

    Args:
        asked: its author chose a guarded base class.
        in_code: the result of ``declares`` before Celery annotated the class.

    Raises:
        ConfigurationError: a name or a value is wrong, or a setting is given twice in one place.
    """
    task = cls.name or cls.__name__
    every = firstmethod("annotate_any")(app.annotations) or {}
    named = firstmethod("annotate")(app.annotations, cls) or {}
    annotated = {*every, *named} & set(vars(cls))
    given: dict[str, Any] = {}
    strays: list[Stray] = []
    for owner in reversed(cls.__mro__):
        names = set(vars(owner)) - (annotated if owner is cls else set())
        short = (in_code or (asked and "_decorated" in names)) if owner is cls else declares(owner)
        _take(given, task, owner, names, short)
        if short:
            check_spelling(task, strange(owner, names))
        else:
            strays += [Stray(owner, name) for name in NAMES if name in names and _may_be_meant(owner, name)]
    _check_every(every)
    for place in (every, named):  # of Celery's two writes into the class, "*" is the later one
        _take(given, task, cls, annotated & set(place), True, place)
    check_spelling(task, strange(cls, annotated))
    found = Options(given, tuple(one for one in strays if one.name not in given), in_code)
    for stray in found.strays:
        if KEPT not in vars(cls) and _of_the_authors(stray.owner, app):
            warnings.warn(
                f"{stray.where} is not read as a setting, because {stray.owner.__name__} does not declare an intent. "
                f"Write {PREFIX}{stray.name} if it is meant as one.",
                ConfigurationWarning,
                stacklevel=2,
            )
    return found


def _check_every(every: Mapping[str, Any]) -> None:
    """Refuse an intent, and settings by their short names, in the annotations of ``"*"``, which is every task.

    Celery has already put these values into each class, over those beside the intent. So they cannot be ignored.

    Raises:
        ConfigurationError: there is such a name.
    """
    if "intent" in every:
        raise ConfigurationError(
            'task_annotations["*"]: an intent there would replace that of each task, and guard those of Celery itself. '
            "Write it under the name of each task."
        )
    for name in NAMES:
        if name in every:
            raise ConfigurationError(
                f'task_annotations["*"]: write {PREFIX}{name} for {name}, or set app.conf.{PREFIX}{name}. If it is an '
                "attribute of your own, move it to a base class: there it is left alone."
            )


def _take(
    given: dict[str, Any],
    task: str,
    owner: type[Any],
    names: set[str],
    short: bool,
    values: Mapping[str, Any] | None = None,
) -> None:
    """Add the settings of one place. The outermost base comes first.

    Args:
        values: where the values are; None: in the class.
    """
    for full in sorted(name for name in names if name.startswith(PREFIX) and name != OWN):
        name = full.removeprefix(PREFIX)
        if name not in NAMES:
            raise ConfigurationError(f"{task}: there is no setting {full}.{hint(name, WORDS)}")
        if short and name in names:
            raise ConfigurationError(f"{task}: {name} and {full} are given in one place. Keep one of them.")
        given[name] = _checked(task, owner, name, full, values)
    for name in NAMES if short else ():
        if name in names:
            given[name] = _checked(task, owner, name, name, values)


def _checked(task: str, owner: type[Any], name: str, written: str, values: Mapping[str, Any] | None) -> Any:
    if name == "seal_keys":  # commands and other tasks read the same records
        raise ConfigurationError(f"{task}: seal_keys is no option of a task. Set app.conf.{PREFIX}{name}.")
    value = getattr(owner, written) if values is None else values[written]
    why = not_allowed(name, value)
    if why:
        own = (
            ""
            if written != name
            else f" If it is an attribute of your own, rename it, or move it to a base class: there only "
            f"{PREFIX}{name} is a setting."
        )
        raise ConfigurationError(f"{task}: {written} {why}.{own}")
    return value


def _may_be_meant(owner: type[Any], name: str) -> bool:
    """Whether an attribute may be meant as a setting: no method or property, except a function that fits ``scope``."""
    value = vars(owner)[name]
    if inspect.isroutine(value) or isinstance(value, (staticmethod, classmethod, property)):
        return not not_allowed(name, getattr(owner, name))
    return True


def _of_the_authors(owner: type[Any], app: Celery) -> bool:
    """Whether an author derived a class from ours for some tasks: Celery did not make it, and not every task has it."""
    every = vars(app).get("Task")
    return (
        hasattr(owner, OWN)
        and "_decorated" not in vars(owner)
        and not (isinstance(every, type) and issubclass(every, owner))
    )


def check_spelling(task: str, names: Iterable[str]) -> None:
    """Refuse an attribute that looks like a misspelt option, which would be ignored."""
    for name in names:
        import difflib

        near = difflib.get_close_matches(name, OPTIONS, n=1, cutoff=_ALIKE)
        if near:
            raise ConfigurationError(f"{task}: there is no option {name}=. Did you mean {near[0]}=?")


def strange(cls: type[Any], names: Iterable[str] | None = None) -> Iterator[str]:
    """Return names among a class's own attributes, or among ``names``, that neither we nor Celery know."""
    for name in vars(cls) if names is None else names:
        if name.startswith(("_", PREFIX)) or name in OPTIONS or name in _CELERYS_OWN:
            continue
        if not callable(getattr(cls, name, None)):
            yield name
