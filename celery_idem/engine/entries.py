"""Records as people and programs read them: one intent, and counts of many."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from celery_idem.core import keys, protocol
from celery_idem.core.model import (
    MICROSECONDS,
    Decision,
    Fingerprint,
    Note,
    Policy,
    Publish,
    Record,
    State,
    Tell,
)

STATES = (*(state.name.lower() for state in State), "lapsed")
"""Names of all states an entry can be in."""

WAITING = ("in_doubt", "lapsed")
"""States that wait for a person. ``lapsed`` becomes ``in_doubt`` at the next delivery, which may never come."""

OPEN = ("accepted", "running", "scheduled", "lapsed", "in_doubt")
"""States in the index of what is open: a worker or a person has to look at the intent at some time."""

GROUPS = {"waiting": WAITING, "open": OPEN}
"""Groups of states, as alerts, lists, the inbox and exit statuses use them."""

FILTERS = (*STATES, *GROUPS)
"""Names by which a list can be filtered."""


def states(name: str) -> tuple[str, ...]:
    """Return the states of a filter."""
    return GROUPS.get(name, (name,))


class Entry:
    """One intent as it was read from the store, for people and programs.

    Attributes:
        key: the idempotency key.
        record: everything that is known.
        changed_at: the store's time of the last write, in seconds since the epoch.
        now: the store's time when it was read, in seconds.
    """

    __slots__ = ("_now", "_stamp", "key", "record")

    def __init__(self, key: str, record: Record, stamp: int, now: int) -> None:
        self.key = key
        self.record = record
        self._stamp = stamp
        self._now = now

    @property
    def stamp(self) -> int:
        """The store's time of the last write, in microseconds."""
        return self._stamp

    @property
    def changed_at(self) -> float:
        return self._stamp / MICROSECONDS

    @property
    def now(self) -> float:
        return self._now / MICROSECONDS

    @property
    def task(self) -> str:
        """Name of the task."""
        return keys.task_of(self.key) or self.key

    @property
    def state(self) -> str:
        """Name of the state, in lower case; ``lapsed`` for RUNNING after the end of its lease."""
        if protocol.lapsed(self.record, self._stamp, self._now):
            return "lapsed"
        return self.record.state.name.lower()

    @property
    def suspicions(self) -> tuple[Note, ...]:
        """Notes of effects that may have happened twice."""
        return tuple(note for note in self.record.notes if note.late is not None)

    @property
    def age(self) -> float:
        """Seconds since the last write."""
        return max(0.0, self.now - self.changed_at)

    @property
    def retry_after(self) -> float:
        """Seconds until its holder must have renewed; 0 or less if it has no holder."""
        return protocol.left(self.record, self._stamp, self._now) / MICROSECONDS

    def standing(self, fingerprint: Fingerprint, policy: Policy) -> Decision | None:
        """Return what a claim would decide; None if it would act (see ``protocol.standing``)."""
        return protocol.standing(self.record, self._stamp, self._now, fingerprint, policy)

    def overdue(self, publishable: bool, policy: Policy, elsewhere: bool) -> Publish | Tell | None:
        """Return what recovery would do; None: nothing (see ``protocol.recover``)."""
        return protocol.recover(self.record, self._stamp, self._now, publishable, policy, 0, elsewhere)[0]

    def of(self, record: Record) -> Entry:
        """Return the same intent at the same time, with another record."""
        return Entry(self.key, record, self._stamp, self._now)

    def __repr__(self) -> str:
        return f"<Entry {self.key} {self.state}>"


class Tally(NamedTuple):
    """The intents of one task in one state.

    Attributes:
        intents: their number.
        oldest: seconds since the oldest one's last write; in doubt: since its execution began.
    """

    intents: int
    oldest: float


def count(tallies: dict[tuple[str, str], Tally], entry: Entry) -> None:
    """Add an entry to counts by (task, state)."""
    place = (entry.task, entry.state)
    before = tallies.get(place, Tally(0, 0.0))
    age = entry.age
    if entry.record.state is State.IN_DOUBT and entry.record.fence:
        # Each question to the destination is a write. By its last write, a doubt that is asked about often would stay
        # young, and cause no alarm.
        age = max(age, entry.now - entry.record.fence / MICROSECONDS)
    tallies[place] = Tally(before.intents + 1, max(before.oldest, age))


def tallied(entries: Iterable[Entry]) -> dict[tuple[str, str], Tally]:
    """Return counts by (task, state), in bounded memory."""
    tallies: dict[tuple[str, str], Tally] = {}
    for entry in entries:
        count(tallies, entry)
    return tallies
