"""The command ``reseal``: seals every record with the newest key."""

from __future__ import annotations

from collections import Counter

import click

from celery_idem.cli.reading import Reading, within_option
from celery_idem.cli.screen import Screen, command, summary, yes_option
from celery_idem.core.errors import StoreError
from celery_idem.operate.operators import Operator

WORDS = {
    "resealed": "sealed with the newest key",
    "current": "were so before",
    "running": "run now",
    "locked": "sealed with a key that is not here",
}


@command("reseal")
@click.option("--dry-run", is_flag=True, help="Count what would be sealed again, and change nothing.")
@click.option(
    "--lost",
    is_flag=True,
    help="Give up for ever the values that are sealed with keys which idem_seal_keys does not have. An action that is "
    "done stays done, without its result.",
)
@within_option
@yes_option
def reseal(
    screen: Screen, operator: Operator, dry_run: bool, lost: bool, within: float | None, yes: bool
) -> None:
    """Seal every record with the first of idem_seal_keys, while workers run.

    Run it after keys were changed, or set for the first time. It may be stopped and run again.
    """
    if lost and not dry_run:
        screen.confirm(
            "Calls, results and errors that are sealed with keys which idem_seal_keys does not have will be given up, "
            "for ever. Nothing runs again because of it. Go on?",
            yes,
        )
    reading = Reading(lambda tick: operator.list(tick=tick), within, quiet=screen.as_json)
    counts = Counter(dict.fromkeys(WORDS, 0))
    try:
        for entry in reading:
            counts[operator.reseal(entry, dry_run, lost)] += 1
    except StoreError as error:
        raise StoreError(f"{error} {summary(WORDS, counts, dry_run)} Run it again to go on.") from error
    if screen.as_json:
        screen.json({**counts, "dry_run": dry_run})
    else:
        screen.line(summary(WORDS, counts, dry_run))
        if counts["running"]:
            screen.line("Run it again when those that run have ended.")
        if counts["locked"]:
            screen.line("Add the missing keys to idem_seal_keys. If they are lost: --lost.")
    reading.end()
    if counts["running"] or counts["locked"]:
        raise SystemExit(1)
