"""What the inbox shows: the figures of its pages, and the templates (``templates/``) that render them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from celery_idem.core.model import NO_OWNER
from celery_idem.engine.entries import WAITING, Entry, Tally, count
from celery_idem.operate.operators import COMPARE, Oldest, Operator, duration, iso

LISTED = 200
"""Intents in the list, the oldest first: more than an operator settles before the page is read again."""

HOURS = 24
"""Hours in the chart: a day shows what happened during the night."""

STRIDE = 5_000
"""Records between two looks at an unfinished reading: about a tenth of a second."""

SHOWN = 4000
"""Characters of a result that are shown: a screen or two."""

_templates = Environment(
    loader=PackageLoader("celery_idem.adapters"),
    autoescape=True,  # what comes from a record, a person or a request is text, never markup
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_templates.filters.update(iso=iso, duration=duration, words=lambda state: state.replace("_", " "))
_templates.globals.update(waiting=WAITING, compare=COMPARE, shown=SHOWN)


def render(template: str, **values: Any) -> str:
    """A page as HTML."""
    return _templates.get_template(template).render(values)


# --- the overview ----------------------------------------------------------------------


class Bar(NamedTuple):
    """The intents in one state that last changed in one hour, as a rectangle of the chart; 100 units are its height."""

    state: str
    intents: int
    ago: int
    x: int
    y: float
    height: float


@dataclass
class Overview:
    """All records, read once; or as many as were read until now.

    Attributes:
        tallies: by (task, state).
        hours: for each of the last 24 hours, the oldest first: how many intents last changed in it, by state.
        doubtful: those that wait for a decision, the oldest first.
        waiting: how many there are of them in all.
        suspect: those whose effect may have happened twice, the oldest first.
        records: how many were read.
        whole: these are all.
        newer: how many the next reading, which is under way, has read; None when there is none.
        read_at: when, in seconds since the epoch of the store's clock; 0 for an empty store.
    """

    tallies: dict[tuple[str, str], Tally] = field(default_factory=dict)
    hours: list[Counter[str]] = field(default_factory=lambda: [Counter() for _ in range(HOURS)])
    doubtful: list[Entry] = field(default_factory=list)
    waiting: int = 0
    suspect: list[Entry] = field(default_factory=list)
    records: int = 0
    whole: bool = False
    newer: int | None = None
    read_at: float = 0.0

    def without(self, keys: Collection[str]) -> Overview:
        """The same, less intents that were decided since."""
        left = [entry for entry in self.doubtful if entry.key not in keys]
        return replace(self, doubtful=left, waiting=self.waiting - len(self.doubtful) + len(left))

    def bars(self) -> Iterator[Bar]:
        """The chart: a bar for each hour, stacked by state."""
        most = max((sum(hour.values()) for hour in self.hours), default=0) or 1
        for n, hour in enumerate(self.hours):
            bottom = 100.0
            for state, intents in sorted(hour.items()):
                height = 96.0 * intents / most
                bottom -= height
                yield Bar(state, intents, HOURS - 1 - n, n * 10 + 1, bottom, height)


def look(operator: Operator) -> Iterator[Overview]:
    """Read every record once, in bounded memory: what is known after each ``STRIDE`` of them, and at the end."""
    seen = Overview()
    oldest, suspect = Oldest(LISTED), Oldest(LISTED)

    def so_far() -> Overview:
        return replace(
            seen,
            tallies=dict(seen.tallies),
            hours=list(map(Counter, seen.hours)),
            doubtful=oldest.entries(),
            waiting=oldest.total,
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
        if state in WAITING:
            oldest.add(entry)
        if entry.suspicions:
            suspect.add(entry)
        if seen.records % STRIDE == 0:
            yield so_far()
    seen.whole = True
    yield so_far()


# --- one intent ------------------------------------------------------------------------


class Moment(NamedTuple):
    """One line of an intent's timeline; ``at`` in seconds since the epoch, 0 where it is not known."""

    at: float
    who: str
    what: str
    more: str


def timeline(entry: Entry) -> list[Moment]:
    """What is known of an intent, in order. A record that was never contested says little: when it
    was claimed, and when it got where it is."""
    record = entry.record
    owner = "" if record.owner == NO_OWNER else record.owner.hex()
    moments = [Moment(note.at / 1e6, note.by, note.what, note.evidence) for note in record.notes]
    # A fence is the store's time of the claim that it was made for.
    moments.append(Moment(record.fence / 1e6, owner, "claimed", f"attempt {record.attempts}"))
    moments.append(Moment(entry.changed_at, "", entry.state.replace("_", " "), record.reason))
    moments.sort(key=lambda moment: moment.at)
    steps = [Moment(0.0, "", "step done", step.name) for step in record.steps]
    steps += [Moment(0.0, "", "step begun, never ended", name) for name in record.open_steps]
    return [*moments[:-1], *steps, moments[-1]]
