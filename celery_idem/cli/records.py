"""The commands about records: list, show, forget, purge and stats."""

from __future__ import annotations

import math
import shlex
import sys
from itertools import pairwise
from typing import Any

import click

from celery_idem.cli.deciding import by_option
from celery_idem.cli.reading import LINES, Reading, filters, within_option
from celery_idem.cli.screen import Screen, command, printable, yes_option
from celery_idem.core.errors import IdempotencyError, StoreError
from celery_idem.engine.entries import FILTERS, GROUPS, OPEN, WAITING, Entry, tallied
from celery_idem.integration import recovering
from celery_idem.operate.bulk import in_threads
from celery_idem.operate.operators import COMPARE, Action, Oldest, Operator, Which, duration

NOTHING = 1
"""Exit status of a list without an entry."""

FORGETTABLE = ("failed", "succeeded", "released")
"""States in which many intents can be forgotten at once. In doubt or under way, each one needs its KEY, so that the
operator looks at each."""

ATTEMPT = {"task_id": "task", "place": "on", "claimed_at": "claimed", "ended_at": "ended", "result": "result"}
"""Words of ``show`` for the facts about one attempt."""


def as_typed() -> str:
    """Return the beginning of a command to copy, with the application of this command line.

    The rest of the command line is left out: a broker's address (``-b``) may hold a password.
    """
    given = "proj"
    for word, following in pairwise(sys.argv):
        if word == "idem":
            break
        if word in ("-A", "--app"):
            given = following
        elif word.startswith("--app="):
            given = word.removeprefix("--app=")
    return f"celery -A {shlex.quote(given)} idem"


@command("list")
@click.option(
    "--state",
    type=click.Choice(FILTERS),
    help="Only those in this state. waiting: all that wait for a person.",
)
@click.option("--suspect", is_flag=True, help="Only those whose effect may have happened twice.")
@filters
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=None,
    help=f"At most that many on a page. Default: {LINES}, with --json all.",
)
@click.option(
    "--page", type=click.IntRange(min=1), default=1, help="The page to print.  [default: the first]"
)
@within_option
def list_(
    screen: Screen,
    operator: Operator,
    which: Which,
    suspect: bool,
    limit: int | None,
    page: int,
    within: float | None,
) -> None:
    """List intents, the longest unchanged first. Exit status 1 if there is none.

    With --json: one line per intent, in no order if there is no --limit and the state is not an open one.
    """
    which = which._replace(suspect=suspect)
    found = Reading(lambda tick: operator.select(which, tick), within, quiet=screen.as_json)
    every = screen.as_json and limit is None and page == 1
    if every and not (suspect or which.state in (*OPEN, *GROUPS)):  # there may be more than fit into memory
        number = 0
        for number, entry in enumerate(found, 1):  # noqa: B007  # its number is needed after the loop
            screen.json(operator.describe(entry))
        found.end()
        raise SystemExit(0 if number else NOTHING)
    lines = LINES if limit is None else limit
    oldest = Oldest(math.inf if every else lines * page)
    for entry in found:
        oldest.add(entry)
    entries, total = oldest.entries()[lines * (page - 1) :], oldest.total
    for entry in entries:
        if screen.as_json:
            screen.json(operator.describe(entry))
        else:
            _print_line(screen, entry, operator.action(entry))
    if screen.as_json:
        found.end()
        raise SystemExit(0 if total else NOTHING)
    if total > len(entries):
        screen.line(
            f"Page {page} of {-(-total // lines):,}, {total:,} intents. --page and --limit show others, --json all."
        )
    if not total:
        screen.line("No such intents." if not found.stopped else "No such intents among those read.")
        if which.task and which.task not in operator.tasks():
            screen.line(operator.no_task(which.task))
    elif any(entry.state in WAITING for entry in entries):
        screen.line(
            "Next: `idem show KEY` prints what is known; `idem reconcile` asks the destinations about all of them; "
            "`idem resolve --from FILE` takes many decisions."
        )
    elif suspect:
        screen.line("Next: `idem show KEY` prints both attempts, and what to compare.")
    found.end()
    raise SystemExit(0 if total else NOTHING)


def _print_line(screen: Screen, entry: Entry, action: Action) -> None:
    attempt = f"[{action.attempt}]" if entry.record.outcome is None and action.attempt else ""
    doubled = "MAY HAVE HAPPENED TWICE" if entry.suspicions else ""
    words = filter(None, (entry.key, action.line, entry.record.reason, doubled, attempt))
    screen.state(entry.state, f"{duration(entry.age):>7}  {'  '.join(words)}")


@command("show")
@click.argument("key")
def show(screen: Screen, operator: Operator, key: str) -> None:
    """Print everything known about one intent. KEY may be the beginning of a key."""
    entry = operator.find(key)
    form = operator.describe(entry)
    if screen.as_json:
        screen.json(form)
        return
    screen.line(entry.key, "bold")
    screen.state(entry.state, f"for {duration(entry.age)}, since {form['changed_at']}")
    if form["action"]:
        screen.line(f"  {form['action']}")
    for name, text in form["arguments"].items():
        screen.line(f"    {name} = {text}")
    for label, value in _facts(form):
        screen.line(f"  {label:<13} {value}")
    for note in form["notes"]:
        evidence = f" ({note['evidence']})" if note["evidence"] else ""
        screen.line(f"  {note['at']}  {note['by']}: {note['what']}{evidence}")
    for suspicion in form["suspicions"]:
        screen.line(
            "It may have happened TWICE: an execution ended after its intent had been taken over.", "bold red"
        )
        for name, attempt in suspicion.items():
            facts = [f"{ATTEMPT[fact]} {value}" for fact, value in attempt.items() if value]
            screen.line(f"  {name:<6} {', '.join(facts)}")
        screen.line(f"  {COMPARE}")
    screen.line(advice(entry))


def _facts(form: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return the labels and values that are not empty."""
    labels = {
        "arguments_unknown": "arguments",
        "not_published": "not published",
        "place": "where",
        "began_at": "began",
        "renewed_at": "last heard of",
        "reason": "why",
        "task_id": "task id",
        "attempts": "attempts",
        "crashes": "crashes",
        "fence": "fence",
        "owner": "owner",
        "lease_left": "lease left, s",
        "open_steps": "open steps",
        "steps": "steps done",
        "result": "result",
    }
    given = ((label, form[name]) for name, label in labels.items() if form[name])
    return [(label, ", ".join(value) if isinstance(value, list) else value) for label, value in given]


def advice(entry: Entry) -> str:
    """Return what an operator can do about an intent in this state."""
    key = entry.key
    if entry.state in WAITING:
        this = f"{as_typed()} resolve '{key}' --fence {entry.record.fence}"
        return (
            "It is not known whether it took effect. Check the destination, then record what you saw:\n"
            f"  {this} --happened RESULT --evidence '…'    every caller gets RESULT (JSON)\n"
            f"  {this} --not-happened --evidence '…'       the next delivery runs it; with --run at once, if its call "
            "is kept"
        )
    return _ADVICE[entry.state].format(idem=as_typed(), key=key)


_ADVICE = {
    "running": "A worker is running it and renews the lease: nothing to do. If it dies, the state becomes lapsed. "
    "`{idem} cancel '{key}'` asks it to stop.",
    "accepted": "It has not begun: no worker has claimed it. Is there a worker for its queue? `{idem} recover` "
    "publishes what is overdue, as every worker does. `{idem} cancel '{key}'` cancels it.",
    "scheduled": "It waits for its own retry. Nothing to do. `{idem} cancel '{key}'` cancels it.",
    "released": "It did not take effect. The next delivery runs it. `{idem} cancel '{key}'` cancels it.",
    "failed": "It failed, and every caller receives this error. After a fix `{idem} retry '{key}'` runs it again.",
    "cancelled": "It was cancelled, and its callers receive the error Cancelled. `{idem} forget '{key}'` takes that "
    "back.",
    "succeeded": "Its outcome is known and replayed to every caller. `{idem} forget '{key}'` lets it happen again.",
}


@command("forget")
@click.argument("keys", metavar="[KEY]...", nargs=-1)
@click.option(
    "--state", type=click.Choice(FORGETTABLE), help="Without KEY: all in this state that match the filters."
)
@filters
@click.option("--steps", is_flag=True, help="Forget finished steps too: they RUN AGAIN.")
@by_option
@yes_option
def forget(
    screen: Screen, operator: Operator, keys: tuple[str, ...], which: Which, steps: bool, by: str, yes: bool
) -> None:
    """Delete intents: the next call with the same key RUNS.

    With KEY in any state; with --state all of them, such as: --task shop.send --state failed --since 2h. Finished steps
    of an unfinished action stay done; --steps forgets them too.
    """
    if bool(keys) == (which != Which()):
        raise click.UsageError("Give a KEY, several, or --state with filters, and not both.")
    if keys:
        looked_at = {entry.key: entry for entry in map(operator.find, keys)}
        fences = [(key, entry.record.fence) for key, entry in looked_at.items()]
        losses = [f"{key} is {entry.state}. {_loss(entry, steps)}" for key, entry in looked_at.items()]
        screen.confirm("\n".join([*losses, "Go on?"]), yes)
    elif which.state is None:
        raise click.UsageError("Without KEY give a --state.")
    else:
        found = Reading(lambda tick: operator.select(which, tick), None, screen.as_json)
        fences = [(entry.key, entry.record.fence) for entry in found]
        if found.stopped:
            raise click.ClickException("Stopped. Nothing was changed.")
        screen.confirm_number(
            f"The records of {len(fences):,} intents, and every proof that they ran, will be deleted, and the next "
            f"call of each RUNS.{' Their finished steps run AGAIN.' if steps else ''}",
            len(fences),
            yes,
        )

    def one(seen: tuple[str, int]) -> tuple[str, bool | IdempotencyError]:
        key, fence = seen
        try:
            return key, operator.forget(key, steps, fence, by)
        except StoreError:
            raise
        except IdempotencyError as error:
            return key, error

    refused = []
    forgotten = 0
    for key, done in in_threads(one, fences):
        if isinstance(done, IdempotencyError):
            refused.append(str(done))
        elif screen.as_json or keys:
            said = f"Forgotten: {key}" if done else "There was no record any more."
            screen.answer({"key": key, "forgotten": done}, said)
        forgotten += done is True
    if not keys and not screen.as_json:
        screen.line(f"{forgotten:,} intents forgotten.")
    if refused:
        raise click.ClickException(printable("\n".join(refused)))


def _loss(entry: Entry, steps: bool) -> str:
    """Return what forgetting one intent costs."""
    finished = ", ".join(repr(step.name) for step in entry.record.steps)
    loss = "Its record, and every proof that it ran, is deleted, and the next call RUNS."
    if finished and steps:
        loss += f" Its finished steps run AGAIN: {finished}."
    elif finished:
        loss = (
            f"The next call RUNS without its finished steps: {finished}. They stay done, and must_match is kept. "
            "(--steps forgets all.)"
        )
    running = " A WORKER IS RUNNING IT NOW, and a second one could start." if entry.state == "running" else ""
    return f"{loss}{running}"


@command("purge")
@yes_option
def purge(screen: Screen, operator: Operator, yes: bool) -> None:
    """Delete expired outcomes. Redis does that itself."""
    screen.confirm(
        "Outcomes older than their result_ttl will be deleted. Intents that run, wait or are in doubt stay. Go on?",
        yes,
    )
    purged = operator.purge()
    screen.answer({"purged": purged}, f"{purged} expired records deleted.")


@command("reindex")
def reindex(screen: Screen, operator: Operator) -> None:
    """Rebuild the index of what is open from the records.

    Reads every record. A missing index is rebuilt without this command.
    """
    found = operator.reindex()
    screen.answer({"open": found}, f"The index is complete. It has {found} open intents.")


@command("recover")
@click.option("--dry-run", is_flag=True, help="Publish nothing; print what would be published.")
def recover(screen: Screen, operator: Operator, dry_run: bool) -> None:
    """Publish the calls of overdue intents again.

    Every worker does the same. The delivery decides what becomes of the intent.
    """
    published = 0
    for found in recovering.recover(operator.app, dry_run):
        published += found.published
        if screen.as_json:
            form = {"key": found.entry.key, "state": found.entry.state}
            screen.json({**form, "published": found.published, "why": found.why})
        else:
            why = f"  not published: {found.why}" if found.why else ""
            screen.state(found.entry.state, f"{duration(found.entry.age):>7}  {found.entry.key}{why}")
    if not screen.as_json:
        screen.line(f"{published} calls {'would be ' if dry_run else ''}published again.")


@command("stats")
@click.option(
    "--open", "is_open", is_flag=True, help="Only what is open: from the index, without reading the rest."
)
@within_option
def stats(screen: Screen, operator: Operator, is_open: bool, within: float | None) -> None:
    """Count intents by task and state."""
    reading = Reading(lambda tick: operator.list("open" if is_open else None, tick=tick), within)
    tallies = sorted(tallied(reading).items())
    if screen.as_json:
        screen.json(
            [
                {"task": task, "state": state, "intents": tally.intents, "oldest": round(tally.oldest, 3)}
                for (task, state), tally in tallies
            ]
        )
        reading.end()
        return
    for (task, state), tally in tallies:
        screen.state(state, f"{tally.intents:>9}  oldest {duration(tally.oldest):>7}  {task}")
    waiting = sum(tally.intents for (_, state), tally in tallies if state in WAITING)
    screen.line(f"{sum(t.intents for _, t in tallies)} intents, {waiting} of them wait for a decision.")
    reading.end()
