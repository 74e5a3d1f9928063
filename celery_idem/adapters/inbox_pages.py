"""The data of the inbox' pages, and the templates (``templates/``) that render them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import heappush, heappushpop
from typing import Any, Generic, NamedTuple, TypeVar

from jinja2 import Environment, PackageLoader, StrictUndefined

from celery_idem.core import keys
from celery_idem.core.errors import StoreError
from celery_idem.core.model import NO_OWNER, Record
from celery_idem.engine.entries import WAITING, Entry, Tally, count
from celery_idem.operate.bulk import in_threads
from celery_idem.operate.operators import (
    COMPARE,
    Action,
    Oldest,
    Operator,
    Resolved,
    Which,
    duration,
    iso,
)

T = TypeVar("T")

PAGE = 50
"""Intents, or decisions, on a page: about two screens."""

KEPT = 20_000
"""Waiting intents that are kept for filters and pages: the oldest ones, about 10 MB."""

DECISIONS = 1_000
"""Number of latest decisions on the page of decisions. The command line lists all."""

HOURS = 24
"""Hours in the chart: a day shows what happened during the night."""

STRIDE = 5_000
"""Records after which an unfinished result is published: about a tenth of a second."""

SHOWN = 4000
"""Characters of a result that are shown: a screen or two."""

AGES = {"600": "10 minutes", "3600": "an hour", "86400": "a day"}
"""Choices of an age in the filter, in seconds."""

LISTED = 20
"""Intents that are named when they were refused in a decision about many."""

_templates = Environment(
    loader=PackageLoader("celery_idem.adapters"),
    autoescape=True,  # texts from a record, a person or a request are never markup
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_templates.filters.update(iso=iso, duration=duration, words=lambda state: state.replace("_", " "))
_templates.globals.update(
    waiting=WAITING, compare=COMPARE, shown=SHOWN, ages=AGES, kept=DECISIONS, listed=LISTED
)


def render(template: str, **values: Any) -> str:
    """Return a page as HTML."""
    return _templates.get_template(template).render(values)


# --- waiting intents -------------------------------------------------------------------


@dataclass
class Seen:
    """What a reading of the records has found so far.

    Attributes:
        records: number of records read.
        whole: all records were read.
        newer: number of records that the next reading has read; None if none is under way.
        read_at: time of the reading in seconds since the epoch, by the store's clock; 0 if nothing was found.
    """

    records: int = 0
    whole: bool = False
    newer: int | None = None
    read_at: float = 0.0


@dataclass
class Waiting(Seen):
    """The intents that wait for a decision.

    Attributes:
        entries: the oldest ``KEPT`` of them, the oldest first (see ``slim``).
        total: number of all of them.
    """

    entries: list[Entry] = field(default_factory=list)
    total: int = 0

    def without(self, keys: Collection[str]) -> Waiting:
        """Return the same without some intents, which were decided since."""
        left = [entry for entry in self.entries if entry.key not in keys]
        return replace(self, entries=left, total=self.total - len(self.entries) + len(left))


def look_waiting(operator: Operator) -> Iterator[Waiting]:
    """Read the intents that wait for a decision. Yield what is known after every ``STRIDE`` records, and at the end."""
    seen = Waiting()
    oldest = Oldest(KEPT)

    def tick() -> None:
        seen.records += 1

    said = 0
    for entry in operator.select(Which("waiting"), tick):
        oldest.add(slim(entry))
        seen.read_at = max(seen.read_at, entry.now)
        if seen.records - said >= STRIDE:
            said = seen.records
            yield replace(seen, entries=oldest.entries(), total=oldest.total)
    yield replace(seen, entries=oldest.entries(), total=oldest.total, whole=True)


def actions_of(operator: Operator, entries: Sequence[Entry]) -> dict[str, Action]:
    """Return which action each intent of a page is, by key. Reads the records again, because lists keep no calls."""

    def one(entry: Entry) -> tuple[str, Action]:
        try:
            there = operator.ledger_of(entry.key).get(entry.key)
        except StoreError:
            there = None
        return entry.key, operator.action(there or entry)

    return dict(in_threads(one, entries))


def slim(entry: Entry) -> Entry:
    """Return an entry with only the fields of the record that lists and filters need: none of them is large."""
    record = entry.record
    slim = Record(
        record.state,
        fence=record.fence,
        lease=record.lease,
        reason=record.reason,
        noticed=record.noticed,
        scope=record.scope,
        place=record.place,
    )
    return entry.of(slim)


def which_of(form: Mapping[str, str]) -> Which:
    """Return the filter that a form, or the query of an address, asks for."""
    return Which(
        "waiting",
        form.get("task") or None,
        keys.label("scope", form.get("scope") or None),
        older_than=float(form.get("older_than", "")) if form.get("older_than") in AGES else 0.0,
        reason=form.get("reason", ""),
    )


def filtered(which: Which) -> bool:
    """Whether a filter may leave out an intent that waits."""
    return which != Which("waiting")


@dataclass(frozen=True)
class Sheet(Generic[T]):
    """One page of a list."""

    rows: Sequence[T]
    page: int
    pages: int


def sheet(rows: Sequence[T], form: Mapping[str, str]) -> Sheet[T]:
    """Return the page that a form, or the query of an address, asks for."""
    pages = max(1, -(-len(rows) // PAGE))
    asked = form.get("page", "")
    page = min(int(asked), pages) if asked.isdecimal() and len(asked) < 9 else 1
    return Sheet(rows[PAGE * (max(1, page) - 1) :][:PAGE], max(1, page), pages)


# --- figures and decisions -------------------------------------------------------------


class Bar(NamedTuple):
    """Intents in one state that last changed in one hour, as a rectangle in the chart, which is 100 units high."""

    state: str
    intents: int
    ago: int
    x: int
    y: float
    height: float


@dataclass
class Overview(Seen):
    """All records, read once.

    Attributes:
        tallies: counts by (task, state).
        hours: for each of the last 24 hours, the oldest first: number of intents that last changed in it, by state.
        decisions: the latest decisions, the latest first.
        suspect: intents whose effect may have happened twice, the oldest first.
    """

    tallies: dict[tuple[str, str], Tally] = field(default_factory=dict)
    hours: list[Counter[str]] = field(default_factory=lambda: [Counter() for _ in range(HOURS)])
    decisions: list[Resolved] = field(default_factory=list)
    suspect: list[Entry] = field(default_factory=list)

    def bars(self) -> Iterator[Bar]:
        """Return the bars of the chart: for each hour, one above the other by state."""
        most = max((sum(hour.values()) for hour in self.hours), default=0) or 1
        for n, hour in enumerate(self.hours):
            bottom = 100.0
            for state, intents in sorted(hour.items()):
                height = 96.0 * intents / most
                bottom -= height
                yield Bar(state, intents, HOURS - 1 - n, n * 10 + 1, bottom, height)


def look(operator: Operator) -> Iterator[Overview]:
    """Read every record once, in bounded memory. Yield what is known after every ``STRIDE``, and at the end."""
    seen = Overview()
    decisions: list[Resolved] = []  # a heap, with the oldest decision first
    suspect = Oldest(PAGE)

    def so_far() -> Overview:
        return replace(
            seen,
            tallies=dict(seen.tallies),
            hours=list(map(Counter, seen.hours)),
            decisions=sorted(decisions, reverse=True),
            suspect=suspect.entries(),
        )

    for entry in operator.list():
        state = entry.state
        count(seen.tallies, entry)
        seen.records += 1
        seen.read_at = max(seen.read_at, entry.now)
        hour = int(entry.age // 3600)
        if hour < HOURS:
            seen.hours[HOURS - 1 - hour][state] += 1
        for decision in operator.decisions(entry):
            if len(decisions) < DECISIONS:
                heappush(decisions, decision)
            else:
                heappushpop(decisions, decision)
        if entry.suspicions:
            suspect.add(slim(entry))
        if seen.records % STRIDE == 0:
            yield so_far()
    seen.whole = True
    yield so_far()


# --- one intent ------------------------------------------------------------------------


class Moment(NamedTuple):
    """One line of an intent's timeline. ``at`` is in seconds since the epoch; 0: not known."""

    at: float
    who: str
    what: str
    more: str


def timeline(entry: Entry) -> list[Moment]:
    """Return what is known of an intent, in order.

    Without notes, this is only when it was claimed, and when it got into its present state.
    """
    record = entry.record
    owner = "" if record.owner == NO_OWNER else record.owner.hex()
    moments = [Moment(note.at / 1e6, note.by, note.what, note.evidence) for note in record.notes]
    # A fence is the store's time of its claim.
    moments.append(Moment(record.fence / 1e6, owner, "claimed", f"attempt {record.attempts}"))
    moments.append(Moment(entry.changed_at, "", entry.state.replace("_", " "), record.reason))
    moments.sort(key=lambda moment: moment.at)
    steps = [Moment(0.0, "", "step done", step.name) for step in record.steps]
    steps += [Moment(0.0, "", "step begun, never ended", name) for name in record.open_steps]
    return [*moments[:-1], *steps, moments[-1]]
