"""Finds keys that are too narrow or too wide, from digests in records, and judges the records of shadow mode.

*Drift* (the key may be too narrow): calls of one task, close in time, that agree in all but one or two parameters of
the intent. If they are retries of one action, that parameter changes with each retry and the guard does nothing.
*Spread* (the key may be too wide): replays that had another value of a free argument than the call that ran. If that
argument says what the action is, the second action did not happen.

Digests only show that values differ, so both are suspicions that the author has to judge. Memory is bounded: only the
first ``MAX_CALLS`` records of a task are compared.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from typing import Literal, NamedTuple

from celery_idem.core import digests
from celery_idem.core.keys import LABELS, Declaration
from celery_idem.core.model import MICROSECONDS, Would
from celery_idem.engine.entries import Entry
from celery_idem.integration.task import IdempotentTask
from celery_idem.operate.doctor.configuration import FREE_TEXT, minted_anew
from celery_idem.operate.doctor.snapshot import annotated

MAX_CALLS = 50_000
"""Records of one task that are compared: about 20 MB, and enough for the statistics."""

WITHIN = 300.0
"""Seconds between calls that may be retries of one another. Five minutes cover an agent that plans again and a client
that backs off; two intended actions that agree in all but one value are rare in that time."""

LEAST = 3
"""Calls that must be alike to be reported: two may be a coincidence."""

ENOUGH = 100
"""Calls of a task needed for a verdict: fewer would not show duplicates rarer than 1 %."""


class Suspicion(NamedTuple):
    """Something in the records that an author should check.

    Attributes:
        kind: ``drift``, ``spread``, or ``double``: effects that may have happened twice.
        parameters: names of the parameters.
        calls: number of records that show it.
        of: number of records that were compared.
        likely: the parameter names support it; otherwise it may be intended.
        example: keys that show it.
    """

    kind: str
    task: str
    parameters: tuple[str, ...]
    calls: int
    of: int
    likely: bool
    example: tuple[str, ...]

    @property
    def says(self) -> str:
        """A message with the meaning and what to do."""
        names = ", ".join(map(repr, self.parameters))
        if self.kind == "double":
            return (
                f"{self.calls} of {self.of} intents of {self.task} may have taken effect twice: an execution ended "
                "after its intent had been taken over. `idem list --suspect` lists them."
            )
        if self.kind == "drift":
            return (
                f"{self.calls} of {self.of} calls of {self.task} agree with another call, minutes apart, in all but "
                f"{names}. If they are retries, each of them ran: remove it from intent=."
            )
        return (
            f"In {self.calls} of {self.of} intents of {self.task} a replayed call had another {names} than the call "
            "that ran. If it says what the action is, a second action did not happen: add it to intent=, or to "
            "must_match= to refuse such calls."
        )


@dataclass
class _Calls:
    """The data kept about one task's records."""

    number: int = 0
    kept: list[tuple[int, str, dict[bytes, bytes]]] = field(default_factory=list)
    varied: Counter[bytes] = field(default_factory=Counter)
    spread_at: dict[bytes, str] = field(default_factory=dict)


def audit(
    entries: Iterable[Entry], tasks: Mapping[str, IdempotentTask], within: float = WITHIN
) -> list[Suspicion]:
    """Return all suspicions, the likely ones first.

    Args:
        within: seconds between calls that may be retries of one another.
    """
    calls: dict[str, _Calls] = defaultdict(_Calls)
    intents: Counter[str] = Counter()
    doubles: dict[str, list[str]] = defaultdict(list)
    for entry in entries:
        intents[entry.task] += 1
        if entry.suspicions:
            doubles[entry.task].append(entry.key)
        if entry.record.digests and entry.task in tasks:
            _read(calls[entry.task], entry)
    found = [
        Suspicion("double", task, (), len(found), intents[task], True, tuple(found[:3]))
        for task, found in doubles.items()
    ]
    for name, seen in calls.items():
        declaration = tasks[name].guard.declaration
        found += _drift(name, seen, declaration, int(within * MICROSECONDS))
        found += _spread(name, seen, declaration)
    return sorted(found, key=lambda s: (not s.likely, -s.calls / s.of))


def _read(calls: _Calls, entry: Entry) -> None:
    calls.number += 1
    packed = entry.record.digests
    for tag in digests.varied(packed):
        calls.varied[tag] += 1
        calls.spread_at.setdefault(tag, entry.key)
    if len(calls.kept) < MAX_CALLS:
        # The fence of a first attempt is the time of its claim.
        calls.kept.append((entry.record.fence, entry.key, digests.entries(packed)))


# --- drift ---------------------------------------------------------------------------


def _drift(task: str, calls: _Calls, declaration: Declaration, within: int) -> Iterator[Suspicion]:
    """Look at single parameters, then at pairs for calls that no single one explains."""
    names = _names(declaration)
    identity = _identity(declaration, names)
    own = set(declaration.fields or declaration.signature.parameters)
    explained: set[str] = set()
    for size in (1, 2):
        for tags in combinations(sorted(identity), size):
            alike = _alike(calls.kept, tags, within, explained)
            if len(alike) < LEAST:
                continue
            parameters = tuple(names[tag] for tag in tags)
            likely = all(_volatile(declaration, name) for name in parameters)
            if not likely and not own - set(parameters):
                continue  # the whole intent differs: presumably other actions
            if size == 1:
                explained.update(alike)
            yield Suspicion(
                "drift", task, parameters, len(alike), calls.number, likely, tuple(sorted(alike)[:3])
            )


def _alike(
    kept: list[tuple[int, str, dict[bytes, bytes]]], tags: tuple[bytes, ...], within: int, without: set[str]
) -> set[str]:
    """Return keys of calls that differ from another call close in time in all of ``tags`` and in nothing else."""
    groups: dict[tuple[tuple[bytes, bytes], ...], list[tuple[int, str, tuple[bytes | None, ...]]]] = (
        defaultdict(list)
    )
    for at, key, values in kept:
        if key not in without and any(tag in values for tag in tags):
            rest = tuple(sorted(item for item in values.items() if item[0] not in tags))
            groups[rest].append((at, key, tuple(values.get(tag) for tag in tags)))
    alike: set[str] = set()
    for members in groups.values():
        members.sort(key=lambda member: member[0])
        for (at, key, value), (next_at, next_key, next_value) in pairwise(members):
            # Every tag has to differ.
            if next_at - at <= within and all(a != b for a, b in zip(value, next_value, strict=True)):
                alike.update((key, next_key))
    return alike


# --- spread --------------------------------------------------------------------------


def _spread(task: str, calls: _Calls, declaration: Declaration) -> Iterator[Suspicion]:
    names = _names(declaration)
    for tag, number in calls.varied.items():
        name = names.get(tag)
        if name is None or name in declaration.must_match:
            continue
        text = FREE_TEXT.search(name) is not None or _volatile(declaration, name)
        yield Suspicion("spread", task, (name,), number, calls.number, not text, (calls.spread_at[tag],))


# --- names ---------------------------------------------------------------------------


def _names(declaration: Declaration) -> dict[bytes, str]:
    """Return names by tag: of parameters, scope, occurrence and the caller's key."""
    names = {digests.tag_of(name): name for name in declaration.signature.parameters}
    for field_name in declaration.fields or ():  # a field from **kwargs is not in the signature
        names[digests.tag_of(field_name)] = field_name
    for label in LABELS:
        names[digests.label_tag(label)] = label
    return names


def _identity(declaration: Declaration, names: dict[bytes, str]) -> set[bytes]:
    """Return the tags of what is in the key: all parameters if a function computes the intent."""
    labels = {digests.label_tag(label) for label in LABELS}
    if declaration.fields is None:
        return set(names)
    return {digests.tag_of(name) for name in declaration.fields} | labels


def _volatile(declaration: Declaration, name: str) -> bool:
    """Tell whether a parameter's name or annotation says that each call has a new value."""
    annotation = getattr(declaration.signature.parameters.get(name), "annotation", "")
    return minted_anew(name, annotated(annotation))


# --- shadow mode --------------------------------------------------------------------


@dataclass
class Readiness:
    """The shadow records of one task.

    Attributes:
        calls: number of deliveries.
        intents: number of different intents.
        would: number of calls that a guard would have answered instead of running them, and how.
            A lower bound: a record keeps its latest 32.
        differs: parameters that did not match, and how often.
        suspicions: the audit of the shadow records.
    """

    task: str
    calls: int = 0
    intents: int = 0
    would: Counter[Would] = field(default_factory=Counter)
    differs: Counter[str] = field(default_factory=Counter)
    suspicions: list[Suspicion] = field(default_factory=list)

    @property
    def verdict(self) -> Literal["ready", "look", "wait"]:
        """``ready``: turn shadow mode off. ``look``: the intent may be wrong. ``wait``: too few calls."""
        if self.would[Would.MISMATCH] or any(s.likely for s in self.suspicions):
            return "look"
        return "ready" if self.calls >= ENOUGH else "wait"

    @property
    def why(self) -> str:
        """The reason for the verdict, in one sentence."""
        if self.would[Would.MISMATCH]:
            names = ", ".join(name for name, _ in self.differs.most_common())
            return (
                f"{self.would[Would.MISMATCH]} calls would have been refused, because {names} had another value: add "
                "it to intent= if that makes it another action, or remove it from must_match=."
            )
        for suspicion in self.suspicions:
            if suspicion.likely:
                return suspicion.says
        if self.calls < ENOUGH:
            return f"only {self.calls} calls so far; a verdict needs {ENOUGH}."
        collapsed = self.would[Would.REPLAY] + self.would[Would.BUSY]
        return f"{collapsed} of {self.calls} calls were duplicates and ran; none would have been refused."


def readiness(entries: Iterable[Entry], tasks: Mapping[str, IdempotentTask]) -> list[Readiness]:
    """Return the readiness of each task with shadow records: can its guard be turned on?"""
    known: dict[str, Readiness] = {}
    by_task: dict[str, list[Entry]] = {}
    for entry in entries:
        task = known.setdefault(entry.task, Readiness(entry.task))
        task.intents += 1
        task.calls += entry.record.attempts
        for note in entry.record.notes:
            if note.would is not None:
                task.calls += 1
                task.would[note.would] += 1
                task.differs.update(note.differs)
        by_task.setdefault(entry.task, []).append(entry)
    for name, task in known.items():
        task.suspicions = audit(by_task[name], tasks)
    return sorted(known.values(), key=lambda task: task.task)
