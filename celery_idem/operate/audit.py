"""Find keys that do not mean what their author thinks, from digests in live records.

*Drift* (the key is too narrow): calls of one task, close in time, that agree in everything but one
or two parameters of the intent. If they are retries of one action, that parameter is minted anew
each time and the guard does nothing. *Spread* (the key may be too wide): replays that brought
another value of a free argument than the call that ran. If that argument says what the action is,
the second action silently never happened.

Digests tell that values differ and nothing about them, so both are suspicions: the author decides.
Memory is bounded: a task's first ``MAX_CALLS`` records are looked at.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from typing import NamedTuple

from celery_idem.core import digests
from celery_idem.core.keys import LABELS, Declaration
from celery_idem.core.model import MICROSECONDS
from celery_idem.engine.entries import Entry
from celery_idem.integration.task import IdempotentTask
from celery_idem.operate.doctor.configuration import FREE_TEXT, minted_anew
from celery_idem.operate.doctor.snapshot import annotated

MAX_CALLS = 50_000
"""Records of one task that are compared: some 20 MB, and enough for any statistic."""

WITHIN = 300.0
"""Seconds between calls that may be retries of one another: five minutes cover an agent that
re-plans and a client that backs off; two meant actions that agree in all but one value are rare in it."""

LEAST = 3
"""Calls that must be alike before anything is said: two are a coincidence."""


class Suspicion(NamedTuple):
    """Something in the records that an author should look at.

    Attributes:
        kind: ``drift`` or ``spread``.
        parameters: their names.
        calls: how many records show it.
        of: how many were compared.
        likely: the names say so too; otherwise it may well be what is meant.
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
        """What it means, and what to do."""
        names = ", ".join(map(repr, self.parameters))
        if self.kind == "drift":
            return (
                f"{self.calls} of {self.of} calls of {self.task} agree with another one in everything but {names}, "
                "within minutes. If those are retries, each of them ran: take it out of intent=."
            )
        return (
            f"In {self.calls} of {self.of} intents of {self.task} a replayed call had another {names} than the one "
            "that ran. If it says what the action is, a second action did not happen: put it into intent=, or into "
            "must_match= to have such calls refused."
        )


@dataclass
class _Calls:
    """What is kept of one task's records while they are read."""

    number: int = 0
    kept: list[tuple[int, str, dict[bytes, bytes]]] = field(default_factory=list)
    varied: Counter[bytes] = field(default_factory=Counter)
    spread_at: dict[bytes, str] = field(default_factory=dict)


def audit(
    entries: Iterable[Entry], tasks: Mapping[str, IdempotentTask], within: float = WITHIN
) -> list[Suspicion]:
    """Every suspicion, the likely ones first.

    Args:
        within: seconds between calls that may be retries of one another.
    """
    calls: dict[str, _Calls] = defaultdict(_Calls)
    for entry in entries:
        if entry.record.digests and entry.task in tasks:
            _read(calls[entry.task], entry)
    found: list[Suspicion] = []
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
    """One parameter first; two at once only where no single one explains it."""
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
                continue  # the whole intent differs: other actions, as far as anybody can see
            if size == 1:
                explained.update(alike)
            yield Suspicion(
                "drift", task, parameters, len(alike), calls.number, likely, tuple(sorted(alike)[:3])
            )


def _alike(
    kept: list[tuple[int, str, dict[bytes, bytes]]], tags: tuple[bytes, ...], within: int, without: set[str]
) -> set[str]:
    """Keys of calls that agree in all but ``tags`` with another one that came close to it, each
    with a value of its own."""
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
            # Each of the tags differs: what stays the same does not vary.
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
    """Names by tag: of the parameters, and of scope, occurrence and the caller's key."""
    names = {digests.tag_of(name): name for name in declaration.signature.parameters}
    for field_name in declaration.fields or ():  # of **kwargs, which the signature does not name
        names[digests.tag_of(field_name)] = field_name
    for label in LABELS:
        names[digests.label_tag(label)] = label
    return names


def _identity(declaration: Declaration, names: dict[bytes, str]) -> set[bytes]:
    """Tags of what is in the key; all parameters where a function computes it."""
    labels = {digests.label_tag(label) for label in LABELS}
    if declaration.fields is None:
        return set(names)
    return {digests.tag_of(name) for name in declaration.fields} | labels


def _volatile(declaration: Declaration, name: str) -> bool:
    """Does the declaration say that its values are minted anew?"""
    annotation = getattr(declaration.signature.parameters.get(name), "annotation", "")
    return minted_anew(name, annotated(annotation))
