"""The command ``retry``: runs again what failed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import TextIO

import click

from celery_idem.cli.screen import Screen, command, yes_option
from celery_idem.core.keys import label
from celery_idem.operate.operators import Operator, read_arguments
from celery_idem.operate.retrying import Labels, Retried
from celery_idem.operate.retrying import retry as run_again


@command("retry")
@click.argument("keys", metavar="KEY...", nargs=-1, required=True)
@click.option(
    "--arguments",
    type=click.File("r"),
    help='Arguments of the calls, as JSON lines {"key": …, "args": […], "kwargs": {…}}. Without it they are read '
    "from the record or from the result backend (with result_extended=True).",
)
@click.option("--scope", help="Scope of the calls.")
@click.option("--occurrence", help="Occurrence of the calls.")
@click.option("--idempotency-key", help="The caller's own key.")
@click.option("--dry-run", is_flag=True, help="Say what would be published.")
@yes_option
def retry(
    screen: Screen,
    operator: Operator,
    keys: tuple[str, ...],
    arguments: TextIO | None,
    scope: str | None,
    occurrence: str | None,
    idempotency_key: str | None,
    dry_run: bool,
    yes: bool,
) -> None:
    """Run failed intents again: forget each failure and publish the same call.

    KEY may be the beginning of a key. "-" reads keys from standard input, one a line, or the lines of `list --json`.
    Finished steps stay done.
    """
    given = {} if arguments is None else read_arguments(iter(arguments))
    labels = Labels(label("scope", scope), label("occurrence", occurrence), idempotency_key)
    entries = [operator.find(key) for key in (_read(sys.stdin) if keys == ("-",) else keys)]
    if not dry_run:
        screen.confirm(
            f"{len(entries)} intents that failed: the failure is forgotten and the call published, so it RUNS. Go on?",
            yes,
        )
    left = 0
    for entry in entries:
        done = run_again(operator, entry, given.get(entry.key), labels, dry_run)
        left += bool(done.why)
        _print(screen, entry.key, done)
    if not screen.as_json:
        what = "would be published" if dry_run else "published"
        screen.line(f"{len(entries) - left} {what}, {left} not.")
    if left:
        raise SystemExit(1)


def _print(screen: Screen, key: str, done: Retried) -> None:
    if screen.as_json:
        screen.json({"key": key, "task_id": done.task_id, "why": done.why})
    elif done.why:
        screen.line(f"not published  {key}: {done.why}.")
    else:
        screen.line(f"published      {key}" + (f"  task {done.task_id}" if done.task_id else ""))


def _read(lines: TextIO) -> Iterator[str]:
    for line in filter(None, map(str.strip, lines)):
        try:
            form = json.loads(line)
        except ValueError:
            form = None
        yield str(form["key"]) if isinstance(form, dict) and "key" in form else line
