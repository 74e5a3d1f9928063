"""The command ``retry``: runs failed intents again."""

from __future__ import annotations

from typing import Any, BinaryIO

import click

from celery_idem.cli.deciding import by_option
from celery_idem.cli.reading import Time, arguments_option
from celery_idem.cli.screen import Screen, command, yes_option
from celery_idem.core.errors import IdempotencyError
from celery_idem.core.keys import label
from celery_idem.operate.operators import Operator, read_arguments
from celery_idem.operate.retrying import Labels, Retried
from celery_idem.operate.retrying import retry as run_again


@command("retry")
@click.argument("keys", metavar="[KEY]...", nargs=-1)
@click.option("--task", help="Without KEY: all failed intents of this task.")
@click.option(
    "--since", type=Time(), default=0.0, help="Only what failed since: 2026-11-28T14:03, or 2h, 1d."
)
@arguments_option("the record", "the result backend")
@click.option("--scope", help="Scope of the calls.")
@click.option("--occurrence", help="Occurrence of the calls.")
@click.option("--idempotency-key", help="The caller's own key.")
@click.option("--dry-run", is_flag=True, help="Say what would be published.")
@by_option
@yes_option
def retry(
    screen: Screen,
    operator: Operator,
    keys: tuple[str, ...],
    task: str | None,
    since: float,
    arguments: BinaryIO | None,
    dry_run: bool,
    by: str,
    yes: bool,
    **labels: Any,
) -> None:
    """Run failed intents again: forget each failure and publish the same call.

    KEY may be the beginning of a key. Finished steps stay done.
    """
    if bool(keys) == bool(task):
        raise click.UsageError("Give KEY, or several, or --task, and not both.")
    if task and task not in operator.tasks():
        raise IdempotencyError(operator.no_task(task))
    given = {} if arguments is None else read_arguments(arguments)
    said = Labels(*(label(name, labels[name]) for name in Labels._fields))
    found = map(operator.find, keys) if keys else operator.list("failed", task)
    entries = sorted((e for e in found if e.changed_at >= since), key=lambda entry: entry.changed_at)
    if not dry_run and entries:
        screen.confirm(
            f"{len(entries)} intents that failed: each failure is forgotten and its call published, so it RUNS. Go on?",
            yes,
        )
    left = later = 0
    for entry in entries:
        done = run_again(operator, entry, given.get(entry.key), said, dry_run, by)
        left += bool(done.why)
        later += done.later
        _print(screen, entry.key, done)
    if not screen.as_json:
        what = "would be published" if dry_run else "published"
        screen.line(f"{len(entries) - left - later} {what}, {left} not.")
        if later:
            screen.line(
                f"{later} accepted, and not published: a worker does it when the broker is back, or `idem recover`."
            )
    if left:
        raise SystemExit(1)


def _print(screen: Screen, key: str, done: Retried) -> None:
    said = f"{'accepted' if done.later else 'published':<13}  {key}" + (
        f"  task {done.task_id}" if done.task_id else ""
    )
    said = f"not published  {key}: {done.why}." if done.why else said
    screen.answer({"key": key, "task_id": done.task_id, "why": done.why, "later": done.later}, said)
