"""Where a run of the explorer stands: everything the future depends on, and what there is to choose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from celery_idem.core import protocol
from celery_idem.core.model import Stored
from celery_idem.core.record import unpack

if TYPE_CHECKING:
    from tests.proof.explorer import Actor, Message, Point, Scenario

MORTAL = ("inquirer", "submitter", "recoverer")
"""Who may die, besides deliveries."""

PLURALS = {"rollback": "rollbacks", "late": "late"}
"""What a commit may come to, and what it uses up."""

Choice = tuple[Any, str]
"""The name of an actor, None where it is nobody's; and what happens."""


class Part(NamedTuple):
    """One actor: what it was told determines where it stands, but for what comes from the renewing thread of its claim.

    Attributes:
        hold: what that thread has told this one through its claim.
        claimed: its body has begun.
        parent: the name of the actor whose claim it renews, or whose death it reports.
    """

    name: tuple[Any, ...]
    told: int
    message: Message | None
    hold: tuple[Any, ...]
    at: Point | None
    pauses: int
    limited: bool
    claimed: bool
    parent: tuple[Any, ...] | None

    @property
    def kind(self) -> tuple[Any, ...] | None:
        """Those of one kind differ in their names alone, until they begin. None: like no other."""
        if self.message is not None:
            first = len(self.message.lineage) == 1
            return (self.told, self.message._replace(lineage=(), task_id="")) if first else None
        return (self.told, self.name[0]) if self.name[0] in ("operator", "inquirer", "submitter") else None


def part(actor: Actor) -> Part:
    return Part(
        actor.name,
        actor.told,
        actor.message,
        actor.hold,
        actor.at,
        actor.pauses,
        actor.limited,
        actor.claim is not None,
        None if actor.parent is None else actor.parent.name,
    )


class Standing(NamedTuple):
    """Everything the future depends on: of each actor, what they share (see `explorer.Shared`), and both clocks."""

    actors: frozenset[Part]
    shared: tuple[Any, ...]
    now: int
    behind: int

    def near(self, name: tuple[Any, ...]) -> frozenset[Part]:
        """An actor, and those whose claim is its own: no other actor matters for what it does next."""
        (mine,) = (one for one in self.actors if one.name == name)
        return frozenset(
            one for one in self.actors if one is mine or one.parent == name or mine.parent == one.name
        )


class Outlook:
    """What there is to choose."""

    def __init__(
        self,
        scenario: Scenario,
        actors: Sequence[Part],
        held: Stored | None,
        clock: tuple[int, int],
        lock: Any,
        closing: bool = False,
    ) -> None:
        self.scenario = scenario
        self.actors = actors
        self.held = held
        self.now, self.behind = clock
        self.lock = lock
        self.closing = closing

    def choices(self, left: Mapping[str, int], ghosts: Sequence[Any]) -> list[Choice]:
        """All there are, always in the same order."""
        choices: list[Choice] = []
        for number, actor in enumerate(self.actors):
            if not self._has_a_twin(number):
                choices += [(actor.name, what) for what in self._of(actor, left)]
        for number, ghost in enumerate(ghosts):
            if self.lock is None or ghost[0] != "replace":
                choices.append((None, f"ghost {number}"))
        if left["lapses"] and self.actors:
            choices.append((None, "lapse"))
        if left["backs"] and self.actors:
            choices.append((None, "back"))
        if left["expiries"] and not any(map(self._amid, self.actors)):
            choices.append((None, "expire"))
        return choices

    def _of(self, actor: Part, left: Mapping[str, int]) -> list[str]:
        point = actor.at
        if point is None:
            return []
        choices: list[str] = []
        if actor.message is not None and actor.pauses == 1:
            choices += [what for what, of in (("lose", "losses"), ("revoke", "revocations")) if left[of]]
        if not self._may_go(actor):
            return choices
        if not self._waits_for_the_lock(actor):
            choices += point.options
        if point.kind == "body" and left["odd"]:
            choices += self.scenario.endings
        if point.kind in ("create", "replace", "read", "lock") and actor.name[0] != "operator":
            if left["down"]:
                choices.append("down")
            if left["late"] and point.kind in ("create", "replace"):
                choices.append("late")
        if point.kind == "commit":
            choices += [what for what in ("rollback", "late") if left[PLURALS[what]]]
        if left["soft"] and actor.message is not None and not actor.limited:
            choices += self._limits(actor, left)
        if point.kind == "publish" and left["unsent"]:
            choices.append("unsent")
        mortal = actor.message is not None or actor.name[0] in MORTAL
        if left["crashes"] and mortal and actor.pauses > 1:
            choices.append("crash")
        return choices

    def first_to_go(self) -> Part | None:
        """At the end of a schedule, where nothing else is left to choose."""
        return next(
            (
                actor
                for actor in self.actors
                if actor.at is not None and self._may_go(actor) and not self._waits_for_the_lock(actor)
            ),
            None,
        )

    def _has_a_twin(self, number: int) -> bool:
        """Another that has not begun either stands before it: which of the two begins makes no difference."""
        actor = self.actors[number]
        return actor.pauses == 1 and any(
            other.pauses == 1 and other.kind is not None and other.kind == actor.kind
            for other in self.actors[:number]
        )

    @staticmethod
    def _amid(actor: Part) -> bool:
        """In the middle of a claim, or about to publish what recovery took: that takes no time, as results are kept."""
        return actor.pauses > 1 and not actor.claimed and actor.name[0] != "submitter"

    def _waits_for_the_lock(self, actor: Part) -> bool:
        """A transaction has rewritten the record, and has not ended: nobody else writes it."""
        assert actor.at is not None
        writes = actor.at.kind in ("replace", "lock")
        return writes and self.lock is not None and (self.lock.sent or self.lock.holder != actor.name)

    def _limits(self, actor: Part, left: Mapping[str, int]) -> list[str]:
        """When a soft time limit may come here."""
        assert actor.at is not None
        kind = actor.at.kind
        choices = ["soft"] if actor.pauses > 1 else []  # before it did anything, it is no delivery
        if kind in ("create", "replace", "commit") and not self._waits_for_the_lock(actor):
            choices.append("soft after")
        if kind in ("create", "replace") and left["late"]:
            choices.append("soft late")
        return choices

    def _may_go(self, actor: Part) -> bool:
        """A message that met a busy intent, or has come back too often, waits."""
        if actor.at is not None and actor.at.kind == "look":
            return due_in(self.held, self.now - self.behind) == 0
        message = actor.message
        if message is None or actor.pauses > 1:
            return True
        if len(message.lineage) - 1 > self.scenario.hops and not self.closing:
            return False
        return message.waits_for is None or message.waits_for != (self.held, self.now)


def due_in(stored: Stored | None, now: int) -> int | None:
    """Microseconds until recovery has to look at the record; None: never."""
    due = None if stored is None else protocol.due(unpack(stored.value, stored.stamp, ""))
    if stored is None or due is None or due >= protocol.NEVER:
        return None
    return max(0, stored.stamp + due - now)
