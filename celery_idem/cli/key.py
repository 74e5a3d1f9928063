"""The command ``key``: computes the key of a call, and compares two calls."""

from __future__ import annotations

import json
from typing import Any

import click

from celery_idem.cli.screen import SHOWN, Screen, command
from celery_idem.core import protocol
from celery_idem.core.errors import IdempotencyError
from celery_idem.core.keys import Declaration, label
from celery_idem.core.model import Fingerprint
from celery_idem.integration.publishing import HIDDEN
from celery_idem.operate.operators import Operator


@command("key")
@click.argument("task")
@click.argument("calls", nargs=-1, metavar="CALL [OTHER_CALL]")
@click.option("--scope", multiple=True, help="Scope of the call. Give it twice for two calls.")
@click.option("--occurrence", multiple=True, help="Occurrence of the call. Give it twice for two calls.")
def key(
    screen: Screen,
    operator: Operator,
    task: str,
    calls: tuple[str, ...],
    scope: tuple[str, ...],
    occurrence: tuple[str, ...],
) -> None:
    """Print a call's key and its canonical form, and how two calls differ.

    A CALL is JSON: an object of keyword arguments, or a list of positional arguments.
    """
    guarded = operator.tasks().get(task)
    if guarded is None:
        raise IdempotencyError(operator.no_task(task))
    if not 1 <= len(calls) <= 2:
        raise click.UsageError("Give one call, or two to compare.")
    if max(len(scope), len(occurrence)) > len(calls):
        raise click.UsageError(f"Give at most {len(calls)} of --scope and --occurrence: one for each call.")
    declaration, namespace = guarded.guard.declaration, guarded.guard.ledger.namespace
    forms: list[dict[str, Any]] = []
    wholes: list[dict[str, Any]] = []
    prints: list[Fingerprint] = []
    for n, call in enumerate(calls):
        args, kwargs = _call(call)
        labels = {
            "scope": label("scope", _nth(scope, n)),
            "occurrence": label("occurrence", _nth(occurrence, n)),
        }
        try:
            arguments = declaration.bind(args, kwargs)
        except TypeError as error:
            what = "This" if declaration.secret else call
            raise IdempotencyError(f"{what} does not fit the signature of {task}: {error}.") from None
        fields = {**{k: v for k, v in labels.items() if v is not None}, **declaration.intent(arguments)}
        made = declaration.key(namespace, arguments, labels["scope"], labels["occurrence"])
        forms.append({"key": made, "intent": _hidden(fields, declaration)})
        wholes.append(fields)
        prints.append(declaration.fingerprint(arguments))
    differs = None
    refused: tuple[str, ...] = ()
    if len(forms) == 2:
        names = dict.fromkeys((*wholes[0], *wholes[1]))
        differs = [name for name in names if wholes[0].get(name) != wholes[1].get(name)]
        refused = () if differs else protocol.differing(prints[0].packed, prints[1])
    if screen.as_json:
        same = differs is not None and not differs
        screen.json({"calls": forms, "same": same, "differs": differs or [], "refused": list(refused)})
        return
    for form in forms:
        screen.line(str(form["key"]), "bold")
        screen.line(f"  {json.dumps(form['intent'], ensure_ascii=False, sort_keys=True)}")
    if differs is not None:
        if differs:
            screen.line(f"Two different actions: they differ in {', '.join(differs)}.")
        elif refused:
            screen.line(
                f"The same action with another value of {', '.join(refused)}, which must match: "
                "the second call is refused (FingerprintMismatch)."
            )
        else:
            screen.line("The same action: the second call gets the first one's result.")


def _call(text: str) -> tuple[list[Any], dict[str, Any]]:
    try:
        form = json.loads(text)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deep" if isinstance(error, RecursionError) else error
        raise click.UsageError(f"A call is JSON, and {text[:SHOWN]} is not: {why}.") from None
    if isinstance(form, list):
        return form, {}
    if isinstance(form, dict):
        return [], form
    raise click.UsageError(
        f"A call is a JSON object of keyword arguments, or a list; {text[:SHOWN]} is neither."
    )


def _nth(values: tuple[str, ...], n: int) -> str | None:
    return values[n] if n < len(values) else None


def _hidden(fields: dict[str, Any], declaration: Declaration) -> dict[str, Any]:
    """Hide secret fields. A computed intent may have any names, so with secrets all of it is hidden."""
    secret = declaration.secret if declaration.compute is None or not declaration.secret else fields
    return {name: HIDDEN if name in secret else value for name, value in fields.items()}
