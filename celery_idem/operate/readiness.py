"""What shadow records say about each task: is its guard ready to be switched on?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from celery_idem.engine.entries import Entry
from celery_idem.engine.shadow import WOULD
from celery_idem.integration.task import IdempotentTask
from celery_idem.operate.audit import Suspicion, audit

ENOUGH = 100
"""Calls of a task before anything is said about it: rarer duplicates than 1 % would not be seen."""


@dataclass
class Readiness:
    """One task in shadow mode.

    Attributes:
        calls: deliveries that were seen.
        intents: different actions among them.
        would: how many calls a guard would have answered with ``replay``, ``busy``, ``mismatch``
            or ``in_doubt`` instead of running them. At least: a record keeps its latest 32.
        differs: parameters that made calls mismatch, and how often.
        suspicions: what an audit of the shadow records says.
    """

    task: str
    calls: int = 0
    intents: int = 0
    would: Counter[str] = field(default_factory=Counter)
    differs: Counter[str] = field(default_factory=Counter)
    suspicions: list[Suspicion] = field(default_factory=list)

    @property
    def verdict(self) -> Literal["ready", "look", "wait"]:
        """``ready``: switch shadow off. ``look``: the intent may be wrong. ``wait``: too few calls."""
        if self.would["mismatch"] or any(s.likely for s in self.suspicions):
            return "look"
        return "ready" if self.calls >= ENOUGH else "wait"

    @property
    def why(self) -> str:
        """One sentence."""
        if self.would["mismatch"]:
            names = ", ".join(name for name, _ in self.differs.most_common())
            return (
                f"{self.would['mismatch']} calls would have been refused, because {names} had another value: add it to "
                "intent= if that makes another action, or take it out of must_match=."
            )
        for suspicion in self.suspicions:
            if suspicion.likely:
                return suspicion.says
        if self.calls < ENOUGH:
            return f"only {self.calls} calls so far; {ENOUGH} say something."
        collapsed = self.would["replay"] + self.would["busy"]
        return f"{collapsed} of {self.calls} calls were duplicates and ran; none would have been refused."


def readiness(entries: Iterable[Entry], tasks: Mapping[str, IdempotentTask]) -> list[Readiness]:
    """What shadow records say, task by task."""
    known: dict[str, Readiness] = {}
    by_task: dict[str, list[Entry]] = {}
    for entry in entries:
        task = known.setdefault(entry.task, Readiness(entry.task))
        task.intents += 1
        task.calls += entry.record.attempts
        for note in entry.record.notes:
            if note.what in WOULD.values():
                task.calls += 1
                task.would[note.what] += 1
                if note.what == "mismatch":
                    task.differs.update(note.evidence.split(", "))
        by_task.setdefault(entry.task, []).append(entry)
    for name, task in known.items():
        task.suspicions = audit(by_task[name], tasks)
    return sorted(known.values(), key=lambda task: task.task)
