"""The commands ``resolve`` (one intent, several, or thousands from a file), ``cancel`` and ``decisions``."""

from __future__ import annotations

import getpass
import socket
from collections import Counter
from heapq import nlargest
from itertools import islice
from typing import BinaryIO

import click

from celery_idem.cli.reading import LINES, NOT_ALL, Progress, Reading, filters, within_option
from celery_idem.cli.screen import SHOWN, Screen, command, printable, summary, yes_option
from celery_idem.core.errors import StoreError
from celery_idem.core.model import Happened, NotHappened
from celery_idem.operate.bulk import Decided, Decision, Line, decide_all, read_decisions, strict_json
from celery_idem.operate.operators import Operator, Which, iso

SAMPLES = 20
"""Lines of a file that are printed with their result. The others are counted; ``--json`` prints all."""

WORDS = {
    "settled": "settled",
    "already": "settled so before",
    "refused": "refused",
    "not_possible": "not possible",
    "not_published": "decided and not published",
    "invalid": "not understood",
}

NOT_SENT = (
    "It is not published again: the caller repeats the call, or the broker redelivers it (or give --run)."
)


def user_and_host() -> str:
    """Return the operator's name for the record."""
    try:
        return f"{getpass.getuser()}@{socket.gethostname()}"
    except (KeyError, OSError):  # a container whose user has no name
        return f"unknown@{socket.gethostname()}"


by_option = click.option(
    "--by", default=user_and_host, show_default="user@host", help="Your name, for the record and the log."
)
fence_option = click.option(
    "--fence",
    type=int,
    help="The fence that `idem show` printed. Refused if it was claimed again since.  [default: the current one]",
)


@command("resolve")
@click.argument("keys", metavar="[KEY]...", nargs=-1)
@click.option(
    "--happened", metavar="JSON", help="It took effect; callers receive this value, for example '\"inv_7\"'."
)
@click.option(
    "--not-happened", is_flag=True, help="It did not take effect, and no request for it is in flight."
)
@click.option("--run", is_flag=True, help="With --not-happened: publish it again at once, from its record.")
@by_option
@click.option("--evidence", help="What you saw, and where. The command asks for it.")
@fence_option
@click.option(
    "--from",
    "file",
    type=click.File("rb"),
    help='Decisions as JSON lines, such as {"key": …, "happened": RESULT, "evidence": …} or {"key": …, '
    '"not_happened": true}; "-" for standard input. "by", "evidence", "fence" and "run" (publish it again at once) '
    "are optional.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be decided, and change nothing.")
@yes_option
def resolve(
    screen: Screen,
    operator: Operator,
    keys: tuple[str, ...],
    happened: str | None,
    not_happened: bool,
    run: bool,
    by: str,
    evidence: str | None,
    fence: int | None,
    file: BinaryIO | None,
    dry_run: bool,
    yes: bool,
) -> None:
    """Settle intents in doubt by what you saw at the destination.

    The record keeps who decided, when, what, and the evidence. KEY may be the beginning of a key. In a file, keys are
    whole. A line that fails does not stop the others; exit status 1 says that some failed.
    """
    if file is not None:
        if keys or happened is not None or not_happened or run or fence is not None:
            raise click.UsageError(
                "With --from the file says which intents, and what: leave out KEY, --happened, --not-happened, --run "
                "and --fence."
            )
        _by_file(screen, operator, list(read_decisions(file, by, evidence or "")), dry_run, yes)
        return
    if not keys:
        raise click.UsageError("Give a KEY, several, or --from FILE.")
    if fence is not None and len(keys) > 1:
        raise click.UsageError("--fence is about one KEY.")
    if (happened is None) == (not not_happened):
        raise click.UsageError("Give one of --happened JSON and --not-happened.")
    if run and not not_happened:
        raise click.UsageError("--run goes with --not-happened.")
    if evidence is None:
        evidence = screen.ask("What did you see, and where", "--evidence")
    if not evidence.strip():
        raise click.UsageError("Write what you saw: --evidence 'invoice inv_7 is in the billing system'.")
    answer: Happened | NotHappened = NotHappened()
    if happened is not None:
        try:
            answer = Happened(strict_json(happened))
        except ValueError as error:
            shown = happened[:SHOWN]
            raise click.UsageError(
                f"--happened takes JSON, and {shown} is not ({error}). Text needs its own quotes: "
                f"--happened '\"{shown}\"'. For no value give null."
            ) from None
    entries = [operator.find(key) for key in dict.fromkeys(keys)]
    which = (
        f"{entries[0].key} is {entries[0].state}. It"
        if len(entries) == 1
        else f"{len(entries)} intents: each"
    )
    if isinstance(answer, Happened):
        what = (
            f"{which} will be settled as SUCCEEDED, every caller receives {happened}, and it does not run again. A "
            "settled outcome cannot be changed. Go on?"
        )
    else:
        what = (
            f"{which} will be released: {'it RUNS at once' if run else 'the next delivery RUNS it'}. If it did take "
            "effect, that is a second time. Go on?"
        )
    if not dry_run:
        screen.confirm(what, yes)
    # A worker may claim an intent while the operator reads the question. So use the fences that were read before it.
    decisions = [
        Decision(entry.key, answer, by, evidence, run, fence=entry.record.fence if fence is None else fence)
        for entry in {entry.key: entry for entry in entries}.values()
    ]
    lines = [Line(number, decision) for number, decision in enumerate(decisions, 1)]
    refused = []
    for _, decided in decide_all(operator, lines, dry_run):
        if decided.entry is None or not decided.stands:
            refused.append(decided)
        elif screen.as_json:
            screen.json(operator.describe(decided.entry))
        else:
            screen.state(decided.entry.state, decided.key)
            if decided.why:
                screen.line(f"{decided.why[0].upper()}{decided.why[1:]}.")
    if not screen.as_json and dry_run:
        screen.line("Nothing was changed.")
    elif not screen.as_json and isinstance(answer, NotHappened) and not run and len(refused) < len(lines):
        screen.line(NOT_SENT)
    if refused:
        raise click.ClickException(printable("\n".join(decided.why for decided in refused)))


def _by_file(screen: Screen, operator: Operator, lines: list[Line], dry_run: bool, yes: bool) -> None:
    answers = Counter(type(line.decision.answer) for line in lines if line.decision is not None)
    if not dry_run:
        screen.confirm(
            f"{answers[Happened]:,} intents will be settled as SUCCEEDED, each with its line's result, and "
            f"{answers[NotHappened]:,} will be released: the next delivery RUNS those. Settled outcomes cannot be "
            f"changed. {sum(line.decision is None for line in lines):,} lines are not understood and decide nothing. "
            "Go on?",
            yes,
        )
    counts: Counter[str] = Counter()
    progress = Progress(f"{{}} of {len(lines):,} decided; Ctrl-C stops here", screen.as_json)
    stopped, told = False, 0
    try:
        for number, decided in decide_all(operator, lines, dry_run):
            progress.tick()
            counts[decided.verdict] += 1
            told += bool(decided.why)
            _report(screen, number, decided, told)
    except StoreError as error:
        progress.end()
        raise StoreError(f"{error} {_summary(counts, dry_run)} Run it again to go on.") from error
    except KeyboardInterrupt:
        stopped = True
    progress.end()
    if screen.as_json:
        screen.json({"summary": {verdict: counts[verdict] for verdict in WORDS}, "dry_run": dry_run})
    else:
        if told > SAMPLES:
            screen.line(f"… and {told - SAMPLES:,} more such lines: --json prints all.")
        screen.line(_summary(counts, dry_run))
    if stopped:
        click.echo("Stopped. Run it again to go on: what is decided by then is not decided twice.", err=True)
        raise SystemExit(NOT_ALL)
    if sum(counts.values()) > counts["settled"] + counts["already"]:
        raise SystemExit(1)


def _report(screen: Screen, number: int, decided: Decided, told: int) -> None:
    state = "" if decided.entry is None else decided.entry.state
    if screen.as_json:
        verdict, key, why, _ = decided
        screen.json({"line": number, "key": key, "verdict": verdict, "state": state, "why": why})
    elif decided.why and told <= SAMPLES:
        screen.line(f"line {number}: {WORDS[decided.verdict]}: {decided.why}")


def _summary(counts: Counter[str], dry_run: bool) -> str:
    words = {verdict: word for verdict, word in WORDS.items() if counts[verdict]}
    return summary(words, counts, dry_run) if words else "The file has no lines."


@command("cancel")
@click.argument("key")
@by_option
@click.option("--evidence", default="", help="Why, for the record and for its callers.")
@fence_option
@yes_option
def cancel(
    screen: Screen, operator: Operator, key: str, by: str, evidence: str, fence: int | None, yes: bool
) -> None:
    """Cancel an action: what has not begun will not run, and what runs is asked to stop.

    Callers of a cancelled action receive the error Cancelled. A body that runs sees self.claim.cancelled; only its end
    tells whether it took effect before that. What is in doubt cannot be cancelled: resolve it.
    """
    entry = operator.find(key)
    screen.confirm(
        f"{entry.key} is {entry.state}. {operator.action(entry).line}\nIts callers will receive the error Cancelled. "
        "If a worker runs it now, that worker is asked to stop. Go on?",
        yes,
    )
    seen = entry.record.fence if fence is None else fence
    now = operator.cancel(entry.key, by, evidence, seen)
    if screen.as_json:
        screen.json(operator.describe(now))
        return
    screen.state(now.state, now.key)
    if now.record.outcome is not None:
        screen.line(f"It will not run: {now.record.outcome.missing}.")
        return
    lease = now.record.lease / 1e6
    screen.line(
        f"It runs on {now.record.place or 'a worker'}. If that is alive, it reads within {lease:g} s that it should "
        "stop. Whether it stops, and whether it took effect before that, is not known yet: see `idem show` later."
    )


@command("decisions")
@filters
@click.option("--by", help="Only those of this person.")
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=None,
    help=f"At most that many. Default: {LINES}, with --json all.",
)
@within_option
def decisions(
    screen: Screen, operator: Operator, which: Which, by: str | None, limit: int | None, within: float | None
) -> None:
    """List who decided what, the latest first: people, and the destinations that were asked.

    Decisions are read from the records, so a decision is deleted with its record. With --json: one line per decision,
    in no order.
    """
    found = Reading(lambda tick: operator.select(which, tick), within, quiet=screen.as_json)
    wanted = (
        decision
        for entry in found
        for decision in operator.decisions(entry)
        if decision.at >= which.since and by in (None, decision.by)
    )
    if screen.as_json:
        for decision in islice(wanted, limit):
            screen.json({**decision._asdict(), "at": iso(decision.at)})
        found.end()
        return
    shown = nlargest(limit or LINES, wanted)
    for decision in shown:
        words = filter(None, (decision.key, decision.action, decision.evidence))
        screen.line(f"{iso(decision.at)}  {decision.by}: {decision.what}  {'  '.join(words)}")
    if not shown:
        screen.line("No decisions.")
    found.end()
