"""What the inbox's first page is about: every record, read once and counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace

from celery_idem.engine.entries import Entry, Tally, count
from celery_idem.operate.operators import DOUBTFUL, Oldest, Operator

LISTED = 200
"""Intents in the list, the oldest first: more than anybody settles before the page is read again."""

HOURS = 24
"""Hours in the picture: a day shows the night that somebody slept through."""

STRIDE = 5_000
"""Records from one look at an unfinished reading to the next: a tenth of a second, about."""


@dataclass
class Overview:
    """All records, read once; or as many as were read until now.

    Attributes:
        tallies: by (task, state).
        hours: for each of the last 24 hours, the oldest first: how many intents last changed in it, by state.
        doubtful: those that wait for somebody, the oldest first.
        waiting: how many there are of them in all.
        records: how many were read.
        whole: these are all.
        newer: how many the next reading, which is under way, has read; None when there is none.
        read_at: when, in seconds since the epoch of the store's clock; 0 for an empty store.
    """

    tallies: dict[tuple[str, str], Tally] = field(default_factory=dict)
    hours: list[Counter[str]] = field(default_factory=lambda: [Counter() for _ in range(HOURS)])
    doubtful: list[Entry] = field(default_factory=list)
    waiting: int = 0
    records: int = 0
    whole: bool = False
    newer: int | None = None
    read_at: float = 0.0

    def without(self, keys: Collection[str]) -> Overview:
        """The same, less intents that were decided since."""
        left = [entry for entry in self.doubtful if entry.key not in keys]
        return replace(self, doubtful=left, waiting=self.waiting - len(self.doubtful) + len(left))


def look(operator: Operator) -> Iterator[Overview]:
    """Read every record once, in bounded memory: what is known after each ``STRIDE`` of them, and at the end."""
    seen = Overview()
    oldest = Oldest(LISTED)

    def so_far() -> Overview:
        return replace(
            seen,
            tallies=dict(seen.tallies),
            hours=list(map(Counter, seen.hours)),
            doubtful=oldest.entries(),
            waiting=oldest.total,
        )

    for entry in operator.list():
        state = entry.state
        count(seen.tallies, entry)
        seen.records += 1
        seen.read_at = max(seen.read_at, entry.now)
        hour = int(entry.age // 3600)
        if hour < HOURS:
            seen.hours[HOURS - 1 - hour][state] += 1
        if state in DOUBTFUL:
            oldest.add(entry)
        if seen.records % STRIDE == 0:
            yield so_far()
    seen.whole = True
    yield so_far()
