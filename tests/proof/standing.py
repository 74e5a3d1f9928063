"""The state of a run of the explorer ("standing"): everything the future depends on, and the possible choices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from celery_idem.core import protocol
from celery_idem.core.model import Stored
from celery_idem.core.record import unpack

if TYPE_CHECKING:
    from tests.proof.explorer import Actor, Message, Point, Scenario

MORTAL = ("inquirer", "submitter", "recoverer")
"""The kinds of actors that may die, besides deliveries."""

PLURALS = {"rollback": "rollbacks", "late": "late"}
"""The choices at a commit, and the budget that each uses."""

Choice = tuple[Any, str]
"""The name of an actor, or None if the choice concerns no actor, and what happens."""


class Part(NamedTuple):
    """The state of one actor. What it received determines its position, together with `hold`.

    Attributes:
        told: number of what it received (see `explorer.PASTS`).
        hold: what the renewing thread of its claim has written into the claim.
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
        """A value that is equal for actors that differ only in their names until they begin, else None."""
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
    """Everything the future depends on: each actor, what actors share (see `explorer.Shared`), and both clocks."""

    actors: frozenset[Part]
    shared: tuple[Any, ...]
    now: int
    behind: int

    def near(self, name: tuple[Any, ...]) -> frozenset[Part]:
        """Return an actor and those that share its claim. No other actor matters for what it does next."""
        (mine,) = (one for one in self.actors if one.name == name)
        return frozenset(
            one for one in self.actors if one is mine or one.parent == name or mine.parent == one.name
        )


class Outlook:
    """The possible choices in a state."""

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
        """Return all choices, always in the same order."""
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
        """Return the first actor that may continue. Used at the end of a schedule, where there are no choices."""
        return next(
            (
                actor
                for actor in self.actors
                if actor.at is not None and self._may_go(actor) and not self._waits_for_the_lock(actor)
            ),
            None,
        )

    def _has_a_twin(self, number: int) -> bool:
        """Return whether an earlier actor is of the same kind, and neither has begun: either may begin first."""
        actor = self.actors[number]
        return actor.pauses == 1 and any(
            other.pauses == 1 and other.kind is not None and other.kind == actor.kind
            for other in self.actors[:number]
        )

    @staticmethod
    def _amid(actor: Part) -> bool:
        """Return whether an actor is in the middle of a claim, or about to publish what recovery took.

        Meanwhile no outcome expires: this takes much less time than the retention of outcomes.
        """
        return actor.pauses > 1 and not actor.claimed and actor.name[0] != "submitter"

    def _waits_for_the_lock(self, actor: Part) -> bool:
        """Return whether an actor has to wait because the transaction of another has written the record."""
        assert actor.at is not None
        writes = actor.at.kind in ("replace", "lock")
        return writes and self.lock is not None and (self.lock.sent or self.lock.holder != actor.name)

    def _limits(self, actor: Part, left: Mapping[str, int]) -> list[str]:
        """Return the choices for a soft time limit at this stop."""
        assert actor.at is not None
        kind = actor.at.kind
        choices = ["soft"] if actor.pauses > 1 else []  # at its first stop the delivery has not begun
        if kind in ("create", "replace", "commit") and not self._waits_for_the_lock(actor):
            choices.append("soft after")
        if kind in ("create", "replace") and left["late"]:
            choices.append("soft late")
        return choices

    def _may_go(self, actor: Part) -> bool:
        """Return whether an actor may continue. A message waits if its intent was busy or it came back too often."""
        if actor.at is not None and actor.at.kind == "look":
            return due_in(self.held, self.now - self.behind) == 0
        message = actor.message
        if message is None or actor.pauses > 1:
            return True
        if len(message.lineage) - 1 > self.scenario.hops and not self.closing:
            return False
        return message.waits_for is None or message.waits_for != (self.held, self.now)


def due_in(stored: Stored | None, now: int) -> int | None:
    """Return the microseconds until the record is overdue for recovery, or None if it never is."""
    due = None if stored is None else protocol.due(unpack(stored.value, stored.stamp, ""))
    if stored is None or due is None or due >= protocol.NEVER:
        return None
    return max(0, stored.stamp + due - now)
