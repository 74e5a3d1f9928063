"""The command ``reconcile``: asks the destinations about intents in doubt."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import BinaryIO

import click

from celery_idem.cli.reading import Progress, arguments_option, filters
from celery_idem.cli.screen import Screen, command, summary, yes_option
from celery_idem.core.errors import StoreError
from celery_idem.operate.operators import Operator, Which, read_arguments

WORDS = {
    "happened": "happened",
    "not_happened": "did not happen",
    "unknown": "still unknown",
    "skipped": "not asked",
}


@command("reconcile")
@filters
@click.option("--limit", type=click.IntRange(min=1), default=None, help="Ask about at most that many.")
@arguments_option("the result backend")
@click.option(
    "--without-arguments",
    is_flag=True,
    help="Call reconcile without arguments if they are unknown. Only for a reconcile that uses nothing but "
    "task.claim.key: one that uses its arguments would find nothing and answer that nothing happened.",
)
@click.option("--dry-run", is_flag=True, help="Ask the destinations and change nothing.")
@yes_option
def reconcile(
    screen: Screen,
    operator: Operator,
    which: Which,
    limit: int | None,
    arguments: BinaryIO | None,
    without_arguments: bool,
    dry_run: bool,
    yes: bool,
) -> None:
    """Ask the destination about every intent in doubt, and settle what it knows.

    Each intent is settled as soon as it is answered. It may be stopped and run again: a new run continues with
    what is still in doubt. Asking counts as a change: --older-than 10m leaves out what was asked in the last ten
    minutes.
    """
    known = {} if arguments is None else read_arguments(arguments)
    if not dry_run:
        screen.confirm(
            "Every intent in doubt whose task has reconcile= is asked about. What happened is settled with the "
            "destination's result. What did not happen is released, and its next delivery RUNS. "
            "(--dry-run only asks.) Go on?",
            yes,
        )
    counts: Counter[str] = Counter()
    not_asked: Counter[str] = Counter()
    progress = Progress("{} asked about; Ctrl-C stops here", screen.as_json)
    try:
        for entry in islice(operator.select(which._replace(state="waiting")), limit):
            try:
                asked = operator.ask(
                    entry, known.get(entry.key), without_arguments=without_arguments, dry_run=dry_run
                )
            except StoreError as error:
                raise StoreError(
                    f"{error} {summary(WORDS, counts, dry_run)} Run it again to go on."
                ) from error
            counts[asked.verdict] += 1
            progress.tick()
            if screen.as_json:
                screen.json({"key": entry.key, "verdict": asked.verdict, "why": asked.why})
            elif asked.verdict == "skipped":
                not_asked[asked.why] += 1
            else:
                progress.end()
                screen.line(f"{progress.count:>6}  {WORDS[asked.verdict]:<14}  {entry.key}  {asked.why}")
    except KeyboardInterrupt:
        raise click.ClickException(
            f"Stopped. {summary(WORDS, counts, dry_run)} Run it again to go on."
        ) from None
    finally:
        progress.end()
    if screen.as_json:
        screen.json({"summary": {verdict: counts[verdict] for verdict in WORDS}, "dry_run": dry_run})
    else:
        for why, number in not_asked.most_common():
            screen.line(f"{number:>6,}  {WORDS['skipped']}: {why}")
        screen.line(summary(WORDS, counts, dry_run))
        if counts["unknown"] or counts["skipped"]:
            screen.line(
                "Decide the rest yourself: `idem list --state waiting`, then `idem resolve`; many with --from FILE."
            )
    if counts["unknown"] or counts["skipped"]:
        raise SystemExit(1)
