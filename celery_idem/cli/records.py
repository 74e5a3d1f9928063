"""The commands about single intents: list, show, resolve, forget, purge and stats."""

from __future__ import annotations

import getpass
import json
import shlex
import socket
import sys
from itertools import islice, pairwise
from typing import Any

import click

from celery_idem.cli.reading import Reading, within_option
from celery_idem.cli.screen import Screen, command, yes_option
from celery_idem.core.model import Happened, NotHappened
from celery_idem.engine.entries import FILTERS, WAITING, Entry, tallied
from celery_idem.integration import recovering
from celery_idem.operate.operators import COMPARE, Oldest, Operator, duration

NOTHING = 1
"""Exit status of a listing without an entry, as of any answer that is no."""

ATTEMPT = {"task_id": "task", "place": "on", "claimed_at": "claimed", "ended_at": "ended", "result": "result"}
"""What ``show`` calls the facts about one attempt."""

LINES = 50
"""Entries that ``list`` prints by default: about a screen."""


def user_and_host() -> str:
    """Return the operator's name for the record."""
    try:
        return f"{getpass.getuser()}@{socket.gethostname()}"
    except (KeyError, OSError):  # a container whose user has no name
        return f"unknown@{socket.gethostname()}"


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
@click.option("--task", help="Only those of this task.")
@click.option(
    "--older-than",
    type=click.FloatRange(min=0.0),
    default=0.0,
    metavar="SECONDS",
    help="Only those unchanged for that long.",
)
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=None,
    help=f"At most that many. Default: {LINES}, with --json all.",
)
@within_option
def list_(
    screen: Screen,
    operator: Operator,
    state: str | None,
    suspect: bool,
    task: str | None,
    older_than: float,
    limit: int | None,
    within: float | None,
) -> None:
    """List intents, the longest unchanged first. Exit status 1 if there is none.

    With --json: one line per intent, in no order.
    """
    found = Reading(
        lambda tick: operator.list(state, task, older_than, tick, suspect), within, quiet=screen.as_json
    )
    if screen.as_json:
        number = 0
        for number, entry in enumerate(islice(found, limit), 1):  # noqa: B007  # counted where there are none
            screen.json(operator.describe(entry))
        found.end()
        raise SystemExit(0 if number else NOTHING)
    oldest = Oldest(LINES if limit is None else limit)
    for entry in found:
        oldest.add(entry)
    entries, total = oldest.entries(), oldest.total
    for entry in entries:
        _print_line(screen, entry)
    if total > len(entries):
        screen.line(f"… and {total - len(entries)} more. --limit shows more, --json all.")
    if not total:
        screen.line("No such intents." if not found.stopped else "No such intents among those read.")
        if task and task not in operator.tasks():
            screen.line(operator.no_task(task))
    elif any(entry.state in WAITING for entry in entries):
        screen.line(
            "Next: `idem show KEY` prints what is known; `idem reconcile` asks the destinations about all of them."
        )
    elif suspect:
        screen.line("Next: `idem show KEY` prints both attempts, and what to compare.")
    found.end()
    raise SystemExit(0 if total else NOTHING)


def _print_line(screen: Screen, entry: Entry) -> None:
    reason = f"  {entry.record.reason}" if entry.record.reason else ""
    if entry.suspicions:
        reason += "  MAY HAVE HAPPENED TWICE"
    screen.state(entry.state, f"{duration(entry.age):>7}  {entry.key}{reason}")


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
    for label, value in _facts(form):
        screen.line(f"  {label:<12} {value}")
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
    facts = []
    for name, label in labels.items():
        value = form[name]
        if value not in (None, "", 0, 0.0, []):
            facts.append((label, ", ".join(value) if isinstance(value, list) else value))
    return facts


def advice(entry: Entry) -> str:
    """Return what an operator can do about an intent in this state."""
    key = entry.key
    if entry.state in WAITING:
        this = f"{as_typed()} resolve '{key}' --fence {entry.record.fence}"
        return (
            "It is not known whether it took effect. Check the destination, then record what you saw:\n"
            f"  {this} --happened RESULT --evidence '…'    every caller gets RESULT (JSON)\n"
            f"  {this} --not-happened --evidence '…'       the next delivery runs it"
        )
    if entry.state == "running":
        return "A worker is running it and renews the lease: nothing to do. If it dies, the state becomes lapsed."
    if entry.state == "scheduled":
        return "It waits for its own retry. Nothing to do."
    if entry.state == "released":
        return "It did not take effect. The next delivery runs it."
    return f"Its outcome is known and replayed to every caller. `{as_typed()} forget '{key}'` lets it happen again."


@command("resolve")
@click.argument("key")
@click.option(
    "--happened", metavar="JSON", help="It took effect; callers receive this value, for example '\"inv_7\"'."
)
@click.option(
    "--not-happened", is_flag=True, help="It did not take effect, and no request for it is in flight."
)
@click.option("--by", default=user_and_host, show_default="user@host", help="Your name, for the record.")
@click.option("--evidence", help="What you saw, and where. The command asks for it.")
@click.option(
    "--fence",
    type=int,
    help="The fence that `idem show` printed. Refused if it was claimed again since.  [default: the current one]",
)
@yes_option
def resolve(
    screen: Screen,
    operator: Operator,
    key: str,
    happened: str | None,
    not_happened: bool,
    by: str,
    evidence: str | None,
    fence: int | None,
    yes: bool,
) -> None:
    """Settle an intent in doubt by what you saw at the destination.

    The record keeps who decided, when, what, and the evidence.
    """
    if (happened is None) == (not not_happened):
        raise click.UsageError("Give one of --happened JSON and --not-happened.")
    if evidence is None:
        evidence = screen.ask("What did you see, and where", "--evidence")
    if not evidence.strip():
        raise click.UsageError("Write what you saw: --evidence 'invoice inv_7 is in the billing system'.")
    answer: Happened | NotHappened = NotHappened()
    if happened is not None:
        try:
            answer = Happened(json.loads(happened))
        except ValueError:
            raise click.UsageError(
                f"--happened takes JSON, and {happened} is not. Text needs its own quotes: "
                f"--happened '\"{happened}\"'. For no value give null."
            ) from None
    entry = operator.find(key)
    if isinstance(answer, Happened):
        screen.confirm(
            f"{entry.key} is {entry.state}. It will be settled as SUCCEEDED, every caller receives {happened}, and it "
            "does not run again. A settled outcome cannot be changed. Go on?",
            yes,
        )
    else:
        screen.confirm(
            f"{entry.key} is {entry.state}. It will be released: the next delivery RUNS it. If it did take effect, "
            "that is a second time. Go on?",
            yes,
        )
    # A worker may claim it while the operator reads the question.
    seen = entry.record.fence if fence is None else fence
    settled = operator.resolve(entry.key, answer, by, evidence, seen)
    if screen.as_json:
        screen.json(operator.describe(settled))
        return
    screen.state(settled.state, settled.key)
    if isinstance(answer, NotHappened):
        screen.line(
            "It is not sent again by itself: the caller repeats the call, or the broker redelivers it."
        )


@command("forget")
@click.argument("key")
@click.option("--steps", is_flag=True, help="Forget its finished steps too: they RUN AGAIN.")
@yes_option
def forget(screen: Screen, operator: Operator, key: str, steps: bool, yes: bool) -> None:
    """Delete an intent in any state: the next call with this key RUNS.

    Finished steps of an unfinished action stay done; --steps forgets them too.
    """
    entry = operator.find(key)
    finished = ", ".join(repr(step.name) for step in entry.record.steps)
    running = " A WORKER IS RUNNING IT NOW, and a second one could start." if entry.state == "running" else ""
    loss = "Its record, and every proof that it ran, is deleted, and the next call RUNS."
    if finished and steps:
        loss += f" Its finished steps run AGAIN: {finished}."
    elif finished:
        loss = (
            f"The next call RUNS without its finished steps: {finished}. They stay done, and must_match is kept. "
            "(--steps forgets all.)"
        )
    screen.confirm(f"{entry.key} is {entry.state}. {loss}{running} Go on?", yes)
    forgotten = operator.forget(entry.key, steps)
    if screen.as_json:
        screen.json({"key": entry.key, "forgotten": forgotten})
    else:
        screen.line(f"Forgotten: {entry.key}" if forgotten else "There was no record any more.")


@command("purge")
@yes_option
def purge(screen: Screen, operator: Operator, yes: bool) -> None:
    """Delete expired outcomes. Redis does that itself."""
    screen.confirm(
        "Outcomes older than their result_ttl will be deleted. Intents that run, wait or are in doubt stay. Go on?",
        yes,
    )
    purged = operator.purge()
    if screen.as_json:
        screen.json({"purged": purged})
    else:
        screen.line(f"{purged} expired records deleted.")


@command("reindex")
def reindex(screen: Screen, operator: Operator) -> None:
    """Rebuild the index of what is open from the records.

    It is rebuilt by itself where it is missing. Reads every record.
    """
    found = operator.reindex()
    if screen.as_json:
        screen.json({"open": found})
    else:
        screen.line(f"The index is complete. It has {found} open intents.")


@command("recover")
@click.option("--dry-run", is_flag=True, help="Publish nothing; print what would be published.")
def recover(screen: Screen, operator: Operator, dry_run: bool) -> None:
    """Publish the calls of overdue intents again.

    Each worker does that by itself. The delivery decides what becomes of the intent.
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
