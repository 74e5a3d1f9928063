"""Compares the declarations of this release with those of the last one: what does a change do to existing intents?

A declaration is kept as JSON: what a key is derived from, and which calls fit the task. ``kept`` has those of the
workers that started last. ``idem doctor --save FILE`` writes them to a file.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from celery_idem.core import keys
from celery_idem.core.errors import ConfigurationError, IntentError
from celery_idem.engine.ledger import Ledger
from celery_idem.integration.task import IdempotentTask
from celery_idem.operate.doctor import kept
from celery_idem.operate.doctor.kept import Json
from celery_idem.operate.doctor.snapshot import Finding, Severity, note
from celery_idem.operate.operators import Operator, duration

NAME = "declared"

DIGITS = 12
"""Hex digits of a digest that only shows whether something has changed."""


class Counts(NamedTuple):
    """Numbers of a task's intents in the store.

    Attributes:
        open: intents that have not ended.
        remembered: intents that have ended, and are replayed until they expire.
    """

    open: int = 0
    remembered: int = 0


# --- as JSON ----------------------------------------------------------------------------


def of_tasks(tasks: Mapping[str, IdempotentTask]) -> dict[str, Json]:
    """Return the declarations of guarded tasks, by the name in their keys."""
    return {task.guard.declaration.task: _declared(task) for task in tasks.values()}


def _declared(task: IdempotentTask) -> Json:
    guard = task.guard
    declaration, settings = guard.declaration, guard.settings
    parameters = declaration.signature.parameters
    fields = declaration.fields
    if fields is None and declaration.compute is None:  # ALL_ARGUMENTS
        fields = tuple(parameters)
    return {
        "app": str(task.app.main),
        "name": task.name,
        "namespace": guard.ledger.namespace,
        "version": str(declaration.version),
        "intent": None if fields is None else sorted(fields),
        "computed": "" if declaration.compute is None else _source(declaration.compute),
        "scope": "" if settings.scope is None else _path(settings.scope),
        "must_match": list(declaration.must_match),
        "required": [n for n, p in parameters.items() if p.default is p.empty and p.kind not in _VARIABLE],
        "defaults": {
            name: "" if name in declaration.secret else _digest(parameter.default)
            for name, parameter in parameters.items()
            if parameter.default is not parameter.empty
        },
        "positional": [n for n, p in parameters.items() if p.kind in _POSITIONAL],
        "open_ended": [p.kind.name for p in parameters.values() if p.kind in _VARIABLE],
        "keep": max(settings.result_ttl, settings.failure_ttl or 0.0),
    }


_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _path(function: Callable[..., Any] | str) -> str:
    if isinstance(function, str):
        return function
    return (
        f"{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', type(function).__name__)}"
    )


def _source(function: Callable[..., Any]) -> str:
    """Return a function's path and a digest of its source, which only shows whether it was edited."""
    try:
        text = inspect.getsource(function)
    except (OSError, TypeError):
        text = ""
    return f"{_path(function)} {hashlib.sha256(text.encode()).hexdigest()[:DIGITS]}"


def _digest(value: Any) -> str:
    try:
        form = json.dumps(keys.canonical(value), sort_keys=True)
    except IntentError:
        return "?"
    return hashlib.sha256(form.encode()).hexdigest()[:DIGITS]


# --- keeping ----------------------------------------------------------------------------


def keep(ledger: Ledger, tasks: Mapping[str, IdempotentTask]) -> None:
    """Note the declarations of a ledger's tasks in its store.

    Workers may have different tasks, so declarations of other tasks stay until all outcomes of those have expired.

    Raises:
        StoreError: the store did not answer, or refused.
    """
    place = ledger.store, ledger.namespace
    own = of_tasks(
        {n: t for n, t in tasks.items() if (t.guard.ledger.store, t.guard.ledger.namespace) == place}
    )

    def change(was: Json, now: float) -> Json:
        there = {name: one for name, one in was.items() if one["at"] + one["keep"] > now}
        return {**there, **{name: {**one, "at": now} for name, one in own.items()}}

    kept.write(ledger, NAME, change)


def of_stores(operator: Operator) -> dict[str, Json]:
    """Return the declarations that are kept in the stores of an application.

    Raises:
        ConfigurationError: there are none.
        StoreError: a store did not answer.
    """
    found = {name: one for ledger in operator.ledgers() for name, one in kept.read(ledger, NAME).items()}
    if not found:
        namespaces = ", ".join(sorted({ledger.namespace for ledger in operator.ledgers()}))
        raise ConfigurationError(
            f"No declarations are kept in the store (namespace {namespaces}): workers note them when they start. Start "
            "one of the last release, or write a file with the last release's code: `idem doctor --save FILE`."
        )
    return found


def read_file(path: str) -> dict[str, Json]:
    """Return the declarations in a file of ``idem doctor --save``.

    Raises:
        ConfigurationError: it cannot be read.
    """
    try:
        found = json.loads(Path(path).read_text("utf-8"))
        if not isinstance(found, dict) or any("intent" not in one for one in found.values()):
            raise ValueError("it has another form")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ConfigurationError(f"{path} is no file of `idem doctor --save`: {error}") from None
    return found


def write_file(path: str, operator: Operator) -> None:
    """Write the declarations of an application to a file. Raises ``ConfigurationError``: it cannot be written."""
    try:
        text = json.dumps(of_tasks(operator.tasks()), indent=2, sort_keys=True)
        Path(path).write_text(f"{text}\n", "utf-8")
    except OSError as error:
        raise ConfigurationError(f"The declarations cannot be written to {path}: {error.strerror}.") from None


# --- comparing --------------------------------------------------------------------------


def changes(operator: Operator, before: Mapping[str, Json]) -> list[Finding]:
    """Return what the changes since ``before`` do. Reads the records only if something has changed.

    Raises:
        StoreError: a store did not answer.
    """
    after = of_tasks(operator.tasks())
    own = {name: one for name, one in before.items() if name in after or one["app"] == str(operator.app.main)}
    changed = {name: one for name, one in own.items() if name not in after or _differ(one, after[name])}
    return list(compare(own, after, _count(operator, changed), operator.app.tasks))


def _differ(old: Json, new: Json) -> bool:
    return any(old.get(word) != new[word] for word in new if word not in ("keep", "app", "name"))


def _count(operator: Operator, changed: Mapping[str, Json]) -> dict[str, Counts]:
    """Count the intents of tasks in the namespaces that they had."""
    found = dict.fromkeys(changed, Counts())
    for store in {id(ledger.store): ledger.store for ledger in operator.ledgers()}.values():
        for namespace in {one["namespace"] for one in changed.values()}:
            for entry in Ledger(store, namespace).list():
                if entry.task in found and changed[entry.task]["namespace"] == namespace:
                    was = found[entry.task]
                    ended = entry.record.state.settled
                    found[entry.task] = Counts(was.open + (not ended), was.remembered + ended)
    return found


def compare(
    before: Mapping[str, Json],
    after: Mapping[str, Json],
    counts: Mapping[str, Counts],
    names: Container[str] = (),
) -> Iterator[Finding]:
    """Return what each change does: which calls run again, and which do not fit any more. Pure.

    Args:
        counts: numbers of intents, of each task that has changed.
        names: names of all tasks of this release, guarded or not.
    """
    added = {name: after[name] for name in set(after) - set(before)}
    for name, old in sorted(before.items()):
        there = counts.get(name, Counts())
        new = after.get(name)
        if new is None:
            yield _missing(name, old, added, there, old["name"] in names)
        else:
            yield from _key_changes(name, old, new, there)
            yield from _call_changes(name, old, new, there)


def _missing(name: str, old: Json, added: Mapping[str, Json], there: Counts, named: bool) -> Finding:
    same = [n for n, one in added.items() if one["name"] == old["name"]]
    if named and not same:
        return Finding(
            "error" if sum(there) else "warning",
            "guard-removed",
            old["name"],
            "The task of that name has no intent any more, or is another one. What comes under it runs as often as it "
            f"comes: {there.remembered} remembered intents are not found, and {there.open} that are open stay so.",
            "Keep its intent. Else deploy when nothing of it is open, and no earlier call or message comes again.",
        )
    alike = same or [n for n, one in added.items() if _shape(one) == _shape(old)]
    if alike:
        return Finding(
            "error" if sum(there) else "warning",
            "renamed",
            added[alike[0]]["name"],
            f"It was {name} before, so all its keys change: {_what_is_there(there)}",
            f'Give it aliases=("{name}",): its keys stay as they are, and messages under that name reach it.',
        )
    return Finding(
        "error" if there.open else "note",
        "removed",
        name,
        f"This release does not have the task. {there.open} of its intents are open; a worker refuses their messages, "
        "so they stay open.",
        f'If it has another name now, give that task aliases=("{name}",). Else deploy when nothing of it is open: '
        f"`idem list --task {name}`.",
    )


def _shape(one: Json) -> Any:
    return one["intent"], one["computed"], one["required"], sorted(one["defaults"])


def _key_changes(name: str, old: Json, new: Json, there: Counts) -> Iterator[Finding]:
    reasons = list(_reasons(old, new))
    if not reasons:
        return
    meant = old["version"] != new["version"]
    severity: Severity = "note" if not sum(there) else "warning" if meant else "error"
    yield Finding(
        severity,
        "intent-changed",
        new["name"],
        f"{'; '.join(reasons)}. So its keys change: {_what_is_there(there)}{_elsewhere(old, new)}",
        "intent_version says that this is meant. Deploy when nothing is open."
        if meant
        else "Keep what the key is made of. Or say that it is meant, with another intent_version, and deploy when "
        f"nothing is open and no earlier call comes again (outcomes are remembered for {duration(old['keep'])}).",
    )


def _elsewhere(old: Json, new: Json) -> str:
    if old["namespace"] == new["namespace"]:
        return ""
    return " But they look for it in the other namespace, and run again too."


def _what_is_there(there: Counts) -> str:
    return (
        f"{there.open} open and {there.remembered} remembered intents are not found by a call that is made again "
        "after the deployment, and it runs. Messages that are under way bring their key with them."
        if sum(there)
        else "nothing of it is in the store."
    )


def _reasons(old: Json, new: Json) -> Iterator[str]:
    for word in ("namespace", "version", "scope"):
        if old[word] != new[word]:
            yield f"{_WORDS[word]} was {old[word] or 'none'} and is {new[word] or 'none'}"
    was, now = old["intent"], new["intent"]
    if was != now:
        yield f"the intent was {_fields(old)} and is {_fields(new)}{_effect(was, now)}"
    elif was is None and old["computed"] != new["computed"]:
        yield f"the function of its intent was edited ({new['computed'].partition(' ')[0]}); `idem key` shows keys"
    for field in sorted(set(was or ()) & set(now or ())):
        default = old["defaults"].get(field)
        if default is not None and new["defaults"].get(field, default) != default:
            yield f"the default of {field!r} has changed, so calls that leave it out are other actions"


_WORDS = {"namespace": "idem_namespace", "version": "intent_version", "scope": "idem_scope"}


def _fields(one: Json) -> str:
    if one["intent"] is None:
        return f"computed by {one['computed'].partition(' ')[0]}"
    return f"({', '.join(one['intent'])})"


def _effect(was: list[str] | None, now: list[str] | None) -> str:
    if was is None or now is None:
        return ""
    gone, added = set(was) - set(now), set(now) - set(was)
    if gone and not added:
        return f": calls that differ in {', '.join(sorted(gone))} alone become one action, which runs once"
    if added and not gone:
        return f": calls that differ in {', '.join(sorted(added))} alone become several actions"
    return ""


def _call_changes(name: str, old: Json, new: Json, there: Counts) -> Iterator[Finding]:
    before, after = {*old["required"], *old["defaults"]}, {*new["required"], *new["defaults"]}
    gone = sorted(before - after) if "VAR_KEYWORD" not in new["open_ended"] else []
    wanted = sorted(set(new["required"]) - before)
    named = [n for n in old["positional"] if n in after and n not in new["positional"]]
    what = [f"{n!r} is no parameter any more" for n in gone] + [f"{n!r} has to be given" for n in wanted]
    what += [f"{n!r} has to be given by name" for n in named]
    if what:
        yield Finding(
            "error" if there.open else "warning",
            "calls-do-not-fit",
            new["name"],
            f"{' and '.join(what)}. Messages of the last release do not fit, and {there.open} of its intents are open: "
            "they fail with a TypeError, and their body does not run.",
            "Keep the parameter, with a default, until the last such message is done, and remove it in the release "
            "after that."
            if gone
            else "Give it a default."
            if wanted
            else "Leave it where it is.",
        )
    moved = [
        n
        for at, n in enumerate(old["positional"])
        if n in new["positional"][:at] + new["positional"][at + 1 :]
    ]
    if moved:
        yield Finding(
            "error",
            "parameters-moved",
            new["name"],
            f"{', '.join(map(repr, moved))}: another position than before. A message of the last release, or a caller, "
            f"that gives them by position gives other values, and no error ({there.open} of its intents are open).",
            "Keep the order of the parameters, and add new ones at the end.",
        )
    if old["must_match"] != new["must_match"]:
        yield note(
            "must-match-changed",
            new["name"],
            f"must_match was ({', '.join(old['must_match'])}) and is ({', '.join(new['must_match'])}). A parameter is "
            "compared where the record knows it too.",
            "Nothing has to change.",
        )
