"""The world of the explorer: deliveries of one intent on the real runner, ledger, protocol and memory store.

`tests.proof.search.explore` runs every interleaving. Each delivery runs in a greenlet. It stops before every store
primitive, its body, its effect and its question to the destination. Processes that submit or recover the intent do
the same. At each stop a scheduler makes one of these choices:

- One actor continues, or it crashes.
- A primitive never reaches the store, or the store applies it later. In both cases the reply is an error.
- The broker loses a message.
- The store's clock is set back, or the clock runs past the lease or past the retention of an outcome.

`explore` tries every choice at every stop, depth first. Greenlets cannot be copied, so it runs the whole world again
for another choice.

Two schedules that lead to the same state have the same futures, so the second is cut off there. The state is exact:
the store, the clock, the destination, the writes under way, the faults left, what the invariants remember, and for
each greenlet everything it has received. A greenlet has no other input, so this determines where it is.

Assumptions of the model:

- A body starts no effect once `claim.lost` is true. The check and the effect are one step. Without this check, or a
  destination that compares fences, a process that sleeps between the two has the effect in spite of any lock.
- A destination that answers "did not happen" has nothing under way, for the same reason.
- An operator looks at the destination and at the record in one step. An unhurried operator writes the answer later,
  and names the attempt that it is about.
- No worker sleeps during a claim or a recovery for as long as the retention of an outcome.
- The exception of a soft time limit comes at a stop: before a primitive reaches the store, after it was applied, or
  while it is under way.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, NamedTuple

from greenlet import GreenletExit, getcurrent, greenlet

from celery_idem.core.errors import (
    FingerprintMismatch,
    IdempotencyError,
    LeaseLost,
    OutcomeUnknown,
    StoreError,
)
from celery_idem.core.model import (
    NO_OWNER,
    Accepted,
    Answer,
    Busy,
    Fingerprint,
    Happened,
    NotHappened,
    OnCrash,
    Policy,
    Publish,
    Raised,
    Record,
    Request,
    State,
    Stored,
    Tell,
    Unknown,
)
from celery_idem.core.record import pack, unpack
from celery_idem.engine import clock, events, owners
from celery_idem.engine import ledger as ledger_module
from celery_idem.engine import runner as runner_module
from celery_idem.engine.claim import Hold
from celery_idem.engine.entries import Entry
from celery_idem.engine.ledger import Ledger
from celery_idem.engine.runner import Job, Options, Runner, Why
from celery_idem.engine.steps import run_step
from celery_idem.stores.base import Announcement, Reply
from celery_idem.stores.memory import MemoryStore
from tests.proof import standing
from tests.proof.standing import Outlook, Standing, due_in, part
from tests.proof.transaction import Inside, Lock, LostCommit

KEY = "shop.charge:0123456789abcdef0123456789abcdef"
STORED = f"idem:{KEY}"
LEASE = 1_000_000
AGES = 1_000 * LEASE
"""Retention of outcomes, in microseconds: longer than the clock runs in a schedule, except in `World.expire`."""

START = 1_000_000_000
BACK = 5 * LEASE
"""Microseconds by which the store's clock is set back: more than a small adjustment."""

ACCEPTED_FOR = 2 * LEASE
"""Microseconds until recovery publishes an accepted call."""

STEPS_AT_MOST = 400
"""A schedule with more steps than this is a livelock: the longest correct one has about ninety steps."""


class Violation(AssertionError):
    """An invariant does not hold. The message says which."""


class Declined(Exception):
    """An error of the body that is an outcome."""


class NoEffect(Exception):
    """An error of the body that proves that no effect happened."""


def _is_no_effect(error: BaseException) -> bool:
    return isinstance(error, NoEffect)


class Ambiguous(Exception):
    """An error of the body after which it is unknown whether the effect happened."""


class Again(Exception):
    """The body asks for a retry."""


class SoftLimit(Exception):
    """A soft time limit, which may interrupt the process at any stop."""


class Exit(BaseException):
    """Stands in for SystemExit: the process exits."""


ENDINGS = {
    Declined: State.FAILED,
    LostCommit: State.FAILED,
    NoEffect: State.RELEASED,
    Ambiguous: State.IN_DOUBT,
    SoftLimit: State.IN_DOUBT,
    Again: State.SCHEDULED,
}
"""Rule 5, written independently of the protocol: the state after each error if its owner still holds the intent."""


class Left(Exception):
    """A delivery published its message again and ended."""


@dataclass(frozen=True)
class Scenario:
    """What may happen in one world, and how often.

    Attributes:
        actors: deliveries of the intent. Each has a separate message.
        same_message: the deliveries are copies of one message.
        endings: how a body may end, besides returning a value.
        odd: number of bodies that may end in one of these ways.
        crashes: processes that die. Their message is delivered again.
        down: primitives that never reach the store.
        late: primitives whose reply is an error and which the store applies at any later time.
        lapses: how often the clock jumps by ``jump`` leases.
        reconcile: the destination is asked. It answers the truth, or that it does not know.
        operators: people who look at the destination and resolve the intent, once each, at any time.
        unhurried: the operators write their decision some time after they looked.
        inquirers: people who let the destination be asked, without a delivery.
        renewals: renewals of each claim, by a separate thread.
        steps: the body has two steps, each with an effect.
        order: the second execution runs the steps in another order.
        copies: number of re-published messages that arrive twice.
        mismatch: the last delivery has the same intent and another value.
        parent: the worker's main process reports that a child died.
        same_worker: a delivery can see that the process of a claim is dead.
        soft: soft time limits, at most one for each delivery, at any stop.
        rollbacks: commits that fail (``on_crash="transaction"``).
        patience: seconds for which the worker tries to write an outcome.
        hops: how often a message may be published again before it waits for the end of the schedule.
        links: more than a result comes after the outcome, so that recovery has to publish the call.
        recoverers: processes that run recovery, once each. With them records hold their calls, and at the end
            of the schedule recovery runs until nothing is overdue.
        submitters: callers that have their call accepted before they publish it.
        early: a message is acknowledged before its task runs, so the message of a dead process is not redelivered.
        losses: messages that the broker loses.
        unsent: publications that the broker does not take.
        revocations: messages that Celery drops because their task was revoked.
        backs: how often the store's clock is set back by ``BACK``.
        expiries: how often an outcome expires. Then the broker delivers the first message again.
    """

    name: str
    actors: int = 2
    same_message: bool = False
    on_crash: OnCrash = "in_doubt"
    max_attempts: int = 3
    endings: tuple[str, ...] = ()
    odd: int = 0
    crashes: int = 0
    down: int = 0
    late: int = 0
    lapses: int = 1
    jump: float = 1.1
    reconcile: str = ""
    operators: int = 0
    unhurried: bool = False
    inquirers: int = 0
    renewals: int = 0
    steps: bool = False
    order: bool = False
    copies: int = 0
    mismatch: bool = False
    parent: bool = False
    same_worker: bool = False
    soft: int = 0
    rollbacks: int = 0
    patience: float = 1.0
    hops: int = 2
    recoverers: int = 0
    links: bool = False
    submitters: int = 0
    early: bool = False
    losses: int = 0
    unsent: int = 0
    revocations: int = 0
    backs: int = 0
    expiries: int = 0


class Message(NamedTuple):
    """A message in the broker. ``lineage`` names it independently of the order of events."""

    lineage: tuple[int, ...]
    task_id: str
    value: str
    carried: tuple[bytes, ...] = ()
    waits_for: tuple[Any, int] | None = None
    accepted: Stored | None = None
    again: bool = False
    published: int = START

    @property
    def call(self) -> bytes:
        """The call that the record keeps, so that the message can be published again."""
        return f"{self.task_id}|{self.value}".encode()


class Point(NamedTuple):
    """A stop of a greenlet: what it does next, and the choices there."""

    kind: str
    options: tuple[str, ...] = ("go",)


@dataclass
class Actor:
    """A greenlet and everything that it received."""

    name: tuple[Any, ...]
    script: Callable[[Actor], None]
    message: Message | None = None
    let: greenlet | None = None
    at: Point | None = None
    told: int = 0
    pauses: int = 0
    minted: list[bytes] = field(default_factory=list)
    claim: Hold | None = None
    watched: Hold | None = None
    answer: Any = None
    atomic: bool = False
    dead: bool = False
    done: bool = False
    unsettled: bool = False
    refused: bool = False
    limited: bool = False
    ending: State | None = None
    parent: Actor | None = None
    knows_dead: bytes = b""

    @property
    def hold(self) -> tuple[Any, ...]:
        """What this greenlet has received through its claim from the renewing thread, which is another greenlet."""
        claim = self.watched
        return (
            (claim.trusted_until, claim.taken_over, claim.written, claim.record) if claim is not None else ()
        )

    @property
    def carried(self) -> tuple[bytes, ...]:
        return self.message.carried if self.message else ()


class Shared:
    """An attribute of the world that all actors share. The world notes each use.

    Args:
        place: index in `Standing.shared`. Index 0 is what the store holds.
    """

    def __init__(self, place: int) -> None:
        self.bit = 1 << place

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = f"_{name}"

    def __get__(self, world: World, owner: type) -> Any:
        world.used |= self.bit
        return world.__dict__[self.name]

    def __set__(self, world: World, value: Any) -> None:
        world.used |= self.bit
        world.__dict__[self.name] = value


class Clock:
    """The time: in microseconds for the store, whose clock may be set back, and in seconds for the worker."""

    def __init__(self) -> None:
        self.now = START
        self.behind = 0

    def __call__(self) -> int:
        return self.now - self.behind

    def monotonic(self) -> float:
        return self.now / 1e6


class _Threading:
    """Stands in for ``threading``. Waiting takes no time, because the number of faults is limited anyway."""

    class Event:
        def wait(self, timeout: float) -> None:
            pass

    class Lock:
        def __enter__(self) -> None:
            pass

        def __exit__(self, *_: object) -> None:
            pass


class Watching(MemoryStore):
    """The memory store with a stop before each primitive. The invariants are checked after each write."""

    def __init__(self, world: World) -> None:
        super().__init__(world.clock)
        self.world = world

    def create(self, key: str, value: bytes, ttl: int | None = None, due: int | None = None) -> Reply:
        return self.world.primitive(
            "create", (value, ttl), lambda: super(Watching, self).create(key, value, ttl, due)
        )

    def read(self, key: str) -> Reply:
        return self.world.primitive("read", (), lambda: super(Watching, self).read(key))

    def replace(
        self, key: str, old: Stored, value: bytes, ttl: int | None = None, due: int | None = None
    ) -> Reply:
        return self.world.primitive(
            "replace", (old, value, ttl), lambda: super(Watching, self).replace(key, old, value, ttl, due)
        )

    def held(self) -> Stored | None:
        """Return the stored value, without a stop."""
        self.world.used |= 1
        return self._held(STORED, self.world.clock())


class ModelRunner(Runner):
    """A runner that asks the destination on this thread: the scheduler controls no other."""

    @staticmethod
    def bounded(ask: Callable[[], Answer], timeout: float) -> Answer:
        return ask()


class ModelJob(Job):
    """The job of one delivery."""

    def __init__(self, world: World, actor: Actor, message: Message) -> None:
        super().__init__(
            KEY,
            message.task_id,
            _fingerprint(message),
            world.options,
            message.carried,
        )
        self.world = world
        self.actor = actor
        self.accepted = message.accepted
        if message.again or message.accepted is not None:
            self.due = message.published / 1e6
        if world.scenario.recoverers:
            self.call = message.call
        self.told: Callable[[], object] | None = None

    def owed(self, also: Announcement | None = None) -> bytes | None:
        if not (self.world.scenario.recoverers and self.world.scenario.early):
            return None
        return self.call if self.world.scenario.links else b""

    def owing(self, hold: Hold) -> None:
        self.told = hold.told if hold.record.call else partial(hold.store.mark, [hold.closing])

    def replaying(self, own: bool, owed: bool = False) -> None:
        if owed:
            self.told = partial(self.world.ledger.told, KEY, self.world.options.policy)

    def orphaned(self, call: bytes) -> None:
        self.world.publish(call, (*self.actor.name, 3))

    def body(self, hold: Hold) -> Any:
        self.entered = True
        return self.world.body(self.actor, hold)

    def kind_of(self, error: BaseException) -> Raised:
        kinds: dict[type[BaseException], Raised] = {
            Again: Raised.RETRY,
            NoEffect: Raised.NO_EFFECT,
            Ambiguous: Raised.AMBIGUOUS,
            StoreError: Raised.AMBIGUOUS,
            OutcomeUnknown: Raised.AMBIGUOUS,
            LeaseLost: Raised.AMBIGUOUS,
            SoftLimit: Raised.TIME_LIMIT,
            Exit: Raised.EXIT,
            GreenletExit: Raised.EXIT,
        }
        return kinds.get(type(error), Raised.ERROR)

    def retry_delay(self, error: BaseException) -> float:
        return LEASE / 1e6

    def ask(self, hold: Hold) -> Answer:
        self.world.pause(Point("ask"))
        answer = self.world.truth() if self.world.scenario.reconcile == "truth" else Unknown("no idea")
        self.world.tell(self.actor, repr(answer))
        self.actor.answer = answer
        return answer

    def follow(self, task_id: str) -> tuple[bool, Any]:
        raise AssertionError("nothing is handed over here")

    def come_back(
        self, seconds: float, carried: tuple[bytes, ...], why: Why, says: str, busy: Busy | None = None
    ) -> None:
        self.world.publish_again(self.actor, carried, why is Why.BUSY)
        raise Left


class World:
    """One run of one scenario."""

    since = Shared(1)
    begun = Shared(2)
    told = Shared(2)
    published = Shared(3)
    revoked = Shared(4)
    left = Shared(5)
    ghosts = Shared(6)
    effects = Shared(7)
    answers = Shared(8)
    bodies = Shared(9)
    highest_fence = Shared(10)
    excused = Shared(11)
    expired = Shared(12)
    lock = Shared(13)
    dead_owners = Shared(14)

    def __init__(self, scenario: Scenario) -> None:
        self.used = 0
        self.scenario = scenario
        self.clock = Clock()
        self.store = Watching(self)
        self.ledger = Ledger(self.store)
        self.runner = ModelRunner(self.ledger)
        self.options = Options(
            policy=Policy(
                lease=LEASE,
                result_ttl=AGES,
                failure_ttl=AGES,
                on_crash=scenario.on_crash,
                asks=bool(scenario.reconcile),
                max_attempts=scenario.max_attempts,
            ),
            patience=scenario.patience,
            no_effect_errors=(NoEffect,),
        )
        self.hub = getcurrent()
        self.left = {name: getattr(scenario, name) for name in BUDGET}
        self.actors: list[Actor] = []
        self.graveyard: list[greenlet] = []
        self.ghosts: list[tuple[Any, Actor, Callable[[], Reply]]] = []
        self.effects: list[tuple[str, str]] = []
        self.answers: set[Any] = set()
        self.bodies: dict[bytes, str] = {}
        self.highest_fence = 0
        self.since = START  # true time of the last write, independent of the store's clock
        self.begun: set[str] = set()  # task ids of executions: their callers must receive an answer
        self.told: set[str] = set()  # task ids whose callers received one
        self.published: set[Any] = set()  # by recovery
        self.revoked = False
        self.recoverers = scenario.recoverers
        self.lock: Lock | None = None
        self.dead_owners: set[bytes] = set()
        self.asked_to_stop = False
        self.excused = False
        self.expired = False
        self.closing = False
        self.violation = ""
        self.replaying = False  # the invariants were checked in an earlier run
        self.looked = False  # the last choice read the state of all actors
        self.steps = 0
        self.trace: list[tuple[Any, ...]] = []
        for n in range(scenario.actors):
            number = 0 if scenario.same_message else n
            value = "2" if scenario.mismatch and n == scenario.actors - 1 else "1"
            self.deliver(Message((n,), f"task-{number}", value))
        for n in range(scenario.operators):
            self.begin(Actor(("operator", n), self.operate))
        for n in range(scenario.inquirers):
            self.begin(Actor(("inquirer", n), self.inquire))
        for n in range(scenario.submitters):
            self.begin(Actor(("submitter", n), self.submit))
        for n in range(scenario.recoverers):
            self.begin(Actor(("recoverer", n), self.recover))

    # --- the scheduler's side ---------------------------------------------------------

    def begin(self, actor: Actor) -> None:
        """Add an actor. `start_new` runs its greenlet to the first stop, where it has done nothing yet."""
        actor.let = greenlet(lambda _: self._script(actor), parent=self.hub)
        actor.let.actor = actor
        self.actors.append(actor)

    def _script(self, actor: Actor) -> None:
        actor.script(actor)
        actor.done = True

    def start_new(self) -> None:
        for actor in list(self.actors):
            if actor.at is None and not actor.done and not actor.dead:
                self.resume(actor, None)

    def resume(self, actor: Actor, choice: str | None) -> None:
        assert actor.let is not None
        actor.at = None
        self.tell(actor, choice)
        actor.let.switch(choice)
        if self.violation:
            raise Violation(self.violation)
        if actor.done and actor in self.actors:
            self.actors.remove(actor)

    def tell(self, actor: Actor, what: Any) -> None:
        """Remember what a greenlet receives. Its past is a number; equal pasts have equal numbers."""
        actor.told = PASTS.setdefault((actor.told, what, self.clock.now), len(PASTS))

    def broken(self, what: str) -> None:
        """Raise a violation, and remember it, because the code under test may catch the exception."""
        self.violation = self.violation or what
        raise Violation(what)

    def named(self, choice: tuple[Any, str]) -> tuple[Any, str]:
        name, what = choice
        return next((a for a in self.actors if a.name == name), None), what

    def do(self, choice: tuple[Any, str]) -> None:
        actor, what = choice
        self.looked = False
        self.used = 0
        self.steps += 1
        self.trace.append((what, actor.name, actor.at.kind) if actor else (what,))
        if self.steps > STEPS_AT_MOST:
            self.broken("livelock")
        if what == "lapse":
            self.left["lapses"] -= 1
            self.clock.now += int(LEASE * self.scenario.jump)
        elif what == "back":
            self.left["backs"] -= 1
            self.clock.behind += BACK
        elif what == "expire":
            self.expire()
        elif what in ("lose", "revoke"):
            self.left["losses" if what == "lose" else "revocations"] -= 1
            self.drop(actor, what == "revoke")
        elif what.startswith("ghost"):
            self.looked = True  # at the state of its sender
            _, ghost, call = self.ghosts.pop(int(what.split()[1]))
            self.apply(ghost, call)
        elif what == "crash":
            self.left["crashes"] -= 1
            self.crash(actor)
        else:
            if what.startswith("soft"):
                self.left["soft"] -= 1
                self.limit(actor, what)
            if what in ("down", "late", "soft late"):
                self.left[what.split()[-1]] -= 1
            elif what == "rollback":
                self.left["rollbacks"] -= 1
            elif what == "unsent":
                self.left["unsent"] -= 1
            elif what in self.scenario.endings:
                self.left["odd"] -= 1
            self.resume(actor, what)
        self.start_new()

    def state(self) -> Standing:
        """Return the state of this run."""
        return Standing(
            frozenset(map(part, self.actors)),
            (
                self.store._held(STORED, self.clock()),
                self._since,
                frozenset(self._begun - self._told),
                frozenset(self._published),
                self._revoked,
                tuple(self._left.values()),
                tuple(what for what, _, _ in self._ghosts),
                tuple(self._effects),
                frozenset(self._answers),
                tuple(sorted(self._bodies.items())),
                self._highest_fence,
                self._excused,
                self._expired,
                self._lock,
                frozenset(self._dead_owners),
            ),
            self.clock.now,
            self.clock.behind,
        )

    def expire(self) -> None:
        """Let an outcome expire, and deliver the first message again."""
        self.looked = True
        self.left["expiries"] -= 1
        self.expired = self.excused = True
        self.clock.now += AGES + LEASE
        for actor in [a for a in self.actors if a.message and a.pauses == 1]:
            self.kill(actor)  # the message had not arrived; it arrives now
            self.deliver(actor.message)
        if self.scenario.actors:
            self.deliver(Message((0, 3), "task-0", "1", again=True))

    def crash(self, actor: Actor) -> None:
        """Let a process die at its stop."""
        self.kill(actor)
        if self.lock is not None and self.lock.holder == actor.name and not self.lock.sent:
            self.lock = None
        self.died(actor)

    def died(self, actor: Actor) -> None:
        """Redeliver the message of a dead process. Its worker may report the death."""
        self.excused = True
        if self.scenario.same_worker:
            self.dead_owners.update(actor.minted)
        if actor.message is None:
            return
        if not self.scenario.early:
            again = (*actor.message.lineage, 0)
            self.deliver(actor.message._replace(lineage=again, waits_for=None, again=True))
        if self.scenario.parent and actor.minted:
            prefix = actor.minted[0][:7]
            self.begin(Actor(("parent", actor.name), self.report_death, knows_dead=prefix, parent=actor))

    def drop(self, actor: Actor, revoked: bool) -> None:
        """Drop a message: the broker loses it, or Celery drops it and calls the ledger."""
        message = actor.message
        assert message is not None
        self.excused = self.excused or bool(
            message.carried
        )  # only this message proved that its claim never ran
        self.kill(actor)
        record = self.record()
        if record is None or record.task_id != message.task_id or record.state not in HOLDS_CALL:
            self.told.add(message.task_id)  # a duplicate: recovery does not publish it
        if revoked:
            self.revoked = True
            self.told.add(message.task_id)
            self.begin(Actor(("revoker", actor.name), self.revoke, knows_dead=message.task_id.encode()))

    def kill(self, actor: Actor) -> None:
        for child in [a for a in self.actors if a.parent is actor and a.name[0] == "renewer"]:
            self.kill(child)
        actor.dead = True
        self.actors.remove(actor)
        if actor.let is not None:
            self.graveyard.append(actor.let)

    def bury(self) -> None:
        """Free the greenlets. Each ends at its next call of `pause`."""
        for actor in list(self.actors):
            actor.dead = True
            if actor.let is not None:
                self.graveyard.append(actor.let)
        for let in self.graveyard:
            with contextlib.suppress(BaseException):
                let.throw(GreenletExit)

    # --- the greenlets' side ----------------------------------------------------------

    def current(self) -> Actor:
        actor: Actor = getcurrent().actor  # type: ignore[attr-defined]
        return actor

    def pause(self, point: Point) -> str:
        actor = self.current()
        if actor.dead:
            raise GreenletExit
        if actor.atomic:
            actor.atomic = False
            return "go"
        actor.at = point
        actor.pauses += 1
        choice: str = self.hub.switch()
        if actor.dead:
            raise GreenletExit
        if choice == "soft":
            raise self.soft_limit()
        return choice

    def pause_at(self, kind: str) -> str:
        return self.pause(Point(kind))

    def soft_limit(self) -> Exception:
        return SoftLimit("too long")

    def limit(self, actor: Actor, what: str) -> None:
        """Note that a soft time limit comes, and whether the intent may then be in doubt.

        If the body has ended, its outcome must be stored. If it has not begun, nothing must be left. Only if the limit
        interrupts the body, it is unknown how the body ended.
        """
        actor.limited = True
        over = actor.claim is not None and self.bodies[actor.claim.owner] == "over"
        known = over and actor.ending in (State.SUCCEEDED, State.FAILED)
        if what == "soft late" or (actor.claim is not None and not known):
            self.excused = True

    def primitive(self, kind: str, arguments: Any, call: Callable[[], Reply]) -> Reply:
        actor = self.current()
        if actor.watched is not None or actor.parent is not None:
            self.tell(actor, arguments)  # made from the claim, which the other thread may now change
        choice = self.pause(Point(kind))
        if choice in ("late", "soft late"):
            self.ghosts.append(((kind, arguments), actor, call))
        if choice in ("down", "late"):
            raise StoreError("the store did not answer")
        if choice == "soft late":
            raise self.soft_limit()
        reply = self.apply(actor, call)
        if choice == "soft after":
            raise self.soft_limit()
        self.tell(actor, reply)
        return reply

    def apply(self, actor: Actor, call: Callable[[], Reply]) -> Reply:
        before = self.store.held()
        reply = call()
        if reply.done and self.store.held() is not before:
            self.note(reply.stored)
            if not self.replaying:
                self.written(actor, before, reply.stored)
            self.since = self.clock.now
        return reply

    def note(self, after: Stored | None) -> None:
        """Remember which callers must receive an answer after a write."""
        assert after is not None
        new = unpack(after.value, after.stamp, KEY)
        if new.state in (State.RUNNING, State.SCHEDULED):
            self.begun.add(new.task_id)
        if new.recovery is None:
            self.published.clear()

    def deliver(self, message: Message) -> None:
        self.begin(Actor(message.lineage, self.execute, message))

    def publish_again(self, actor: Actor, carried: tuple[bytes, ...], busy: bool) -> None:
        message = actor.message
        assert message is not None
        waits_for = (self.store.held(), self.clock.now) if busy else None
        message = message._replace(carried=carried, waits_for=waits_for, again=True)
        self.deliver(message._replace(lineage=(*message.lineage, 1)))
        if self.left["copies"] and carried:
            self.left["copies"] -= 1
            self.deliver(message._replace(lineage=(*message.lineage, 2)))

    def execute(self, actor: Actor) -> None:
        """Run a delivery from its arrival to its answer."""
        message = actor.message
        assert message is not None
        job = ModelJob(self, actor, message)
        try:
            self.ended(actor, job, message)
        except Left:
            return
        except Again:
            self.publish_again(actor, (), False)
            return
        except Exit:
            self.died(actor)
            return
        if self.scenario.recoverers and self.scenario.early:
            self.pause(Point("answer"))  # the worker may die before it answers
        self.told.add(message.task_id)
        if job.told is not None:
            with contextlib.suppress(StoreError):
                job.told()

    def ended(self, actor: Actor, job: ModelJob, message: Message) -> None:
        """Run a delivery until its caller receives an answer. If it ends in another way, that is raised."""
        try:
            value = self.runner.run(job)
        except (NoEffect, Ambiguous, SoftLimit):
            pass  # the caller may call again, as the other deliveries and the last one do
        except FingerprintMismatch:
            if message.value == "1" and not self.scenario.mismatch:
                self.broken("a mismatch with equal values")
        except Declined as error:
            if not actor.unsettled:  # if the error could not be stored, a later run may succeed
                self.answered(actor, ("raised", str(error)))
        except LostCommit:
            if not actor.unsettled:
                self.answered(actor, ("raised", "LostCommit"))
        except LeaseLost:
            self.check_refusal(actor)
            self.excused = True
        except OutcomeUnknown:
            if self.closing and not self.excused and not self.asked_to_stop:
                self.broken("in doubt for ever without a crash or an ambiguous end")
        else:
            self.answered(actor, ("returned", value))

    def answered(self, actor: Actor, answer: Any) -> None:
        assert actor.message is not None
        if answer[0] == "returned" and not self.effects:
            self.broken("an answer, without an effect")
        self.answers.add((actor.message.value, *_frozen(answer)))
        if len(self.answers) > 1:
            self.broken(f"different answers: {self.answers}")

    def check_refusal(self, actor: Actor) -> None:
        """Rule 4: the outcome of an owner without a successor must be accepted."""
        record = self.record()
        if record is None or actor.claim is None or record.owner != actor.claim.owner:
            return
        if record.state.settled and self.scenario.on_crash == "transaction":
            self.broken("an execution whose transaction settled the intent received LeaseLost")
        if actor.refused and not record.state.settled:
            self.broken("the rightful owner was refused")

    def body(self, actor: Actor, claim: Hold) -> Any:
        """Run the author's body. It ends as the scheduler chooses."""
        self.began(actor, claim)
        try:
            how = self.pause(Point("body"))
            value = self.act(actor, claim, how)
            actor.ending = State.SUCCEEDED
        except Exit:
            raise  # like a crash: it did not report an outcome
        except BaseException as error:
            actor.ending = self.ending(error)
            self.excused = self.excused or isinstance(error, Ambiguous)
            self.over(claim)
            raise
        self.over(claim)
        return value

    def ending(self, error: BaseException) -> State | None:
        """Return the state that rule 5 demands. By rule 9, a transaction that did not commit had no effect."""
        state = ENDINGS.get(type(error))  # type: ignore[call-overload]
        in_transaction = self.scenario.on_crash == "transaction"
        return State.RELEASED if in_transaction and state is State.IN_DOUBT else state

    def act(self, actor: Actor, claim: Hold, how: str) -> Any:
        number = len(self.bodies)
        if how == "no_effect":
            raise NoEffect
        if how == "error":
            raise Declined(f"declined {number}")
        if how == "ambiguous_before":
            raise Ambiguous
        if how == "retry":
            raise Again
        if how == "exit_before":
            raise Exit
        if self.scenario.on_crash == "transaction":
            return self.in_transaction(actor, claim, how)
        if self.scenario.steps:
            return self.in_steps(actor, claim, how)
        value = self.effect(actor, claim, "charge")
        if how == "error_after":
            raise Declined(f"declined after {value}")
        if how == "ambiguous_after":
            raise Ambiguous
        if how == "exit_after":
            raise Exit
        return value

    def in_transaction(self, actor: Actor, claim: Hold, how: str) -> str:
        """Run the body as `with engine.begin() as connection, self.settle_in(connection): …` does.

        It does not check ``claim.lost``.
        """
        receipt = f"charge {len(self.effects) + 1}"

        def insert() -> None:
            self.effects.append(("charge", receipt))
            if len(self.effects) > 1:
                self.broken(f"{len(self.effects)} rows")

        inside = Inside(self, actor, insert)
        try:
            claim.settle_within(inside, *self.ledger.encode(receipt, KEY))
            inside.commit()
        except BaseException:
            inside.rollback()
            raise
        if how == "error_after":
            raise Declined(f"declined after {receipt}")
        if how == "ambiguous_after":
            raise Ambiguous
        if how == "exit_after":
            raise Exit
        return "ignored"

    def in_steps(self, actor: Actor, claim: Hold, how: str) -> list[str]:
        names = ["charge", "mail"]
        if self.scenario.order and claim.attempt > 1:
            names.reverse()
        values = {}
        for name in names:

            def run(name: str = name) -> str:
                self.pause(Point("effect"))
                if how == "no_effect_in_step" and name == "mail":
                    raise NoEffect
                value = self.effect(actor, claim, name)
                if how == "exit_in_step":
                    raise Exit
                return value

            values[name] = run_step(
                claim, self.ledger.codec, name, run, None, self.options.patience, _is_no_effect
            )
        return [values["charge"], values["mail"]]

    def effect(self, actor: Actor, claim: Hold, part: str) -> str:
        """Have the effect at the destination, unless the claim is lost."""
        if claim.lost:
            raise LeaseLost("too late to begin", KEY)
        known = [receipt for name, receipt in self.effects if name == part]
        if self.scenario.on_crash == "rerun" and known:  # a destination that is idempotent
            return known[0]
        receipt = f"{part} {len(known) + 1}"
        self.effects.append((part, receipt))
        if known:
            self.broken(f"{len(known) + 1} effects of {part}")
        return receipt

    def truth(self) -> Answer:
        """Return the true answer of the destination: whether there is an effect."""
        return Happened(self.effects[0][1]) if self.effects else NotHappened()

    def operate(self, actor: Actor) -> None:
        """An operator looks at the destination and the record, and resolves the intent."""
        self.pause(Point("operator"))
        answer = self.truth()
        assert isinstance(answer, (Happened, NotHappened))
        fence = None
        if self.scenario.unhurried:
            record = self.doubtful()
            if record is None:
                return  # operators see only what is in doubt or lapsed
            fence = record.fence
        self.tell(actor, (repr(answer), fence))
        actor.answer = answer
        actor.atomic = not self.scenario.unhurried
        with contextlib.suppress(IdempotencyError):
            self.ledger.resolve(KEY, answer, by="somebody", keep=AGES / 1e6, fence=fence)

    def doubtful(self) -> Record | None:
        """Return the record if it is in doubt or lapsed."""
        stored, record = self.store.held(), self.record()
        if stored is None or record is None:
            return None
        entry = Entry(KEY, record, stored.stamp, self.clock.now)
        return record if entry.state in ("in_doubt", "lapsed") else None

    def inquire(self, actor: Actor) -> None:
        """An operator lets the destination be asked about an intent in doubt."""
        self.pause(Point("inquirer"))
        record = self.doubtful()
        self.tell(actor, record)
        if record is None:
            return
        job = ModelJob(self, actor, Message((), record.task_id, "1"))
        job.fingerprint = Fingerprint()
        with contextlib.suppress(StoreError):
            self.runner.inquire(job)

    def report_death(self, actor: Actor) -> None:
        """The worker's main process reports that a child died."""
        assert actor.parent is not None
        assert actor.parent.message is not None
        with contextlib.suppress(StoreError):
            self.ledger.died(KEY, actor.knows_dead, actor.parent.message.task_id, self.options.policy, 0)

    def publish(self, call: bytes, lineage: tuple[int, ...]) -> None:
        """Publish the call of a record."""
        task_id, value = call.decode().split("|")
        self.deliver(Message(lineage, task_id, value, again=True, published=self.clock.now))

    def submit(self, actor: Actor) -> None:
        """Accept a call, then publish it, as `submit` does."""
        number = actor.name[1]
        self.pause(Point("submitter"))
        message = Message((60 + number,), f"task-submitted-{number}", "1", published=self.clock.now)
        request = Request(
            self.mint(), message.task_id, _fingerprint(message), self.options.policy, call=message.call
        )
        try:
            decision, entry = self.ledger.accept(KEY, request, ACCEPTED_FOR)
        except StoreError:
            return
        if decision is not None and not isinstance(decision, Accepted):
            return
        if self.pause(Point("publish")) == "unsent":
            if decision is not None:
                with contextlib.suppress(StoreError):
                    self.ledger.sent(KEY, request.owner, 0)
            return
        written = Stored(request.owner, entry.stamp) if decision is not None else None
        self.deliver(message._replace(accepted=written))

    def due_in(self) -> int | None:
        """Return the microseconds until the record is overdue for recovery, or None."""
        return due_in(self.store.held(), self.clock())

    def recover(self, actor: Actor) -> None:
        """Recover an overdue record, as the recovering thread of a worker's main process does."""
        self.pause(Point("look"))
        taken = None
        with contextlib.suppress(StoreError):
            taken = self.ledger.recover(KEY, lambda record: bool(record.call), self.options.policy)
        if taken is None:
            return
        if self.pause(Point("publish")) == "unsent":
            if isinstance(taken, Publish):  # else the result backend is down: the answer is written later
                with contextlib.suppress(StoreError):
                    self.ledger.not_published(KEY, taken)
            return
        record = taken.record
        if isinstance(taken, Tell):
            self.told.add(record.task_id)
            with contextlib.suppress(StoreError):
                self.ledger.answered(KEY, taken, self.options.policy)
            return
        which = (record.task_id, record.fence, record.recovery)
        if which in self.published:
            self.broken("recovery published the same call twice at once")
        self.published.add(which)
        self.publish(record.call, (70 + actor.name[1],))

    def revoke(self, actor: Actor) -> None:
        """A worker received a message whose task is revoked."""
        self.pause(Point("revoker"))
        with contextlib.suppress(StoreError):
            self.ledger.revoked(KEY, actor.knows_dead.decode(), self.options.policy)

    def watch(self, claim: Hold) -> None:
        actor = self.current()
        if self.scenario.renewals and not self.closing:
            actor.watched = claim

            def renew(me: Actor) -> None:
                for _ in range(self.scenario.renewals):
                    self.pause(Point("renewal"))  # the worker's clock is read when it begins
                    with contextlib.suppress(StoreError):
                        claim.renew()

            self.begin(Actor(("renewer", actor.name), renew, parent=actor, minted=actor.minted))

    def unwatch(self, claim: Hold) -> None:
        actor = self.current()
        for child in [a for a in self.actors if a.parent is actor and a.name[0] == "renewer"]:
            self.kill(child)

    def mint(self) -> bytes:
        """Return a unique owner, the same in every run with the same past. Its first seven bytes name the process."""
        actor = self.current()
        first = {"inquirer": 200, "submitter": 201}.get(actor.name[0])
        numbers = actor.name if first is None else (first, actor.name[1])  # else the lineage
        place = bytes([*(n + 1 for n in numbers), *bytes(9)])[:9]
        owner = b"!" + place + bytes(1) + bytes([len(actor.minted) + 1])
        actor.minted.append(owner)
        return owner

    # --- invariants -------------------------------------------------------------------

    def record(self) -> Record | None:
        stored = self.store.held()
        return None if stored is None else unpack(stored.value, stored.stamp, KEY)

    def began(self, actor: Actor, claim: Hold) -> None:
        """Check that no other execution trusts its lease when a body begins, and that the fence has grown."""
        silent = sum(state == "running" for state in self.bodies.values())
        if silent >= self.scenario.max_attempts:
            self.broken(f"a body runs after {silent} that did not report an outcome")
        self.looked = True
        actor.claim = claim
        actor.ending = None
        if claim.fence <= self.highest_fence:
            self.broken(f"fence {claim.fence} after {self.highest_fence}")
        self.highest_fence = claim.fence
        self.bodies[claim.owner] = "running"
        for other in self.actors:
            if other is not actor and other.claim is not None and other.message is not None:
                running = self.bodies.get(other.claim.owner) == "running"
                if running and not other.claim.lost and not claim.lost:
                    self.broken("two bodies run, and both trust their lease")

    def over(self, claim: Hold) -> None:
        self.bodies[claim.owner] = "over"

    def written(self, who: Actor, before: Stored | None, after: Stored | None) -> None:
        """Check the rules that a single write can break. They are written independently of the protocol."""
        assert after is not None
        new = unpack(after.value, after.stamp, KEY)
        expires = self.store._values[STORED][1]
        if not (new.state.settled or new.state is State.RELEASED) and expires is not None:
            self.broken(f"{new.state.name} expires: evidence would be lost")
        if before is None:
            return
        old = unpack(before.value, before.stamp, KEY)
        live = (
            bool(old.lease) and self.clock.now < self.since + old.lease
        )  # lease 0: the claim was ended explicitly, so the clock does not matter
        mine = old.owner in who.minted
        taken = new.owner not in (old.owner, NO_OWNER)
        carried = old.owner in who.carried
        asked = old.asking in who.minted and old.asking != b""
        person = who.name[0] == "operator"
        parent = who.name[0] == "parent" and old.owner.startswith(who.knows_dead)
        ends_the_dead = old.owner in self.dead_owners and new == old._replace(lease=0)
        ended = who.ending if who.claim is not None and old.owner == who.claim.owner else None
        first = old.state is State.RUNNING
        late_commit = self.scenario.on_crash == "transaction" and new.state is State.SUCCEEDED
        if late_commit:
            ended = None
        if ended and first and new.owner in (old.owner, NO_OWNER) and new.state not in (old.state, ended):
            self.broken(f"a body's end that means {ended.name} made it {new.state.name}")
        if old.outcome is not None and (new.outcome != old.outcome or new.state is not old.state):
            self.broken("a settled outcome changed")
        if new.fingerprint != old.fingerprint:
            self.broken("an intent took another value")
        if new.fence < old.fence or (taken and new.fence <= old.fence):
            self.broken(f"fence {old.fence} -> {new.fence}")
        if not new.state.settled and not set(old.steps) <= set(new.steps):
            self.broken("a finished step was lost")
        left = new.lease if old.state is State.SCHEDULED else old.lease
        noted = left <= old.lease and new == old._replace(notes=new.notes, lease=left) and bool(new.notes)
        noted = noted and new.notes[-1].late is not None and who.claim is not None and not mine
        stepped = new == old._replace(notes=new.notes, noticed=new.noticed) and new.noticed is not None
        noted = noted or (stepped and self.clock.behind > 0)
        if old.state is State.RUNNING and live and not (mine or carried or parent or ends_the_dead or noted):
            self.broken("a live claim was overwritten")
        its_task = who.message is not None and who.message.task_id == old.task_id
        revoked = who.name[0] == "revoker" and who.knows_dead == old.task_id.encode()
        revoked = revoked and old.state in (State.ACCEPTED, State.SCHEDULED)
        if old.state is State.SCHEDULED and live and not (its_task or noted or revoked):
            self.broken("a retry that is not due was overwritten")
        if who.name[0] == "submitter" and old.state not in (State.RELEASED, State.ACCEPTED):
            self.broken(f"a call was accepted over {old.state.name}")
        if who.name[0] == "recoverer" and new.lease and not noted:
            self.broken("recovery gave a lease to what it took")
        if old.state is State.IN_DOUBT and old.asking and live and new.asking not in (old.asking, b""):
            self.broken("two workers ask")
        knows = asked or (who.name[0] == "parent" and old.asking.startswith(who.knows_dead))
        ended_it = new.state is State.IN_DOUBT and (new.asking != old.asking or new.lease < old.lease)
        if live and old.asking and ended_it and not (knows or old.asking in self.dead_owners):
            self.broken("a question was ended by a process that did not ask it")
        if taken and carried and old.owner in self.bodies:
            self.broken("a claim was taken up again although its body had begun")
        if taken and new.state is State.RUNNING and not carried:
            self.taken_over(who, old, asked)
        in_transaction = self.scenario.on_crash == "transaction"
        if in_transaction and new.state is State.IN_DOUBT and new.crashes < self.scenario.max_attempts:
            self.broken("in doubt, although its effects are all in a transaction")
        told = mine or person or isinstance(who.answer, Happened)
        if new.state.settled and old.outcome is None and not told:
            self.broken("a stale owner's outcome was recorded")
        set_free = new.state in (State.RELEASED, State.SCHEDULED) and old.state is not new.state
        never_ran = carried and old.owner not in self.bodies
        if set_free and not (mine or person or never_ran or revoked):
            self.broken(f"{new.state.name} by a process that is not the owner")
        if new.state is State.IN_DOUBT and old.state is State.RUNNING and live and not (mine or parent):
            self.broken("a live claim was put in doubt")

    def taken_over(self, who: Actor, old: Record, asked: bool) -> None:
        scenario = self.scenario
        if old.state is State.IN_DOUBT and not (asked and isinstance(who.answer, NotHappened)):
            self.broken("an intent in doubt was run without an answer")
        if old.state is State.RUNNING:
            if scenario.on_crash == "in_doubt" or scenario.reconcile:
                self.broken("an intent in doubt was run")
            if old.crashes + 1 >= scenario.max_attempts:
                self.broken("more attempts than max_attempts")

    def close(self) -> None:
        """Let everything under way end without more faults, then call once more and check the end."""
        self.closing = True
        self.left = dict.fromkeys(self.left, 0)
        while self.ghosts:
            waiting = self.lock is not None and self.ghosts[0][0][0] == "replace"
            self.do((None, f"ghost {int(waiting)}"))
        for actor in [a for a in self.actors if a.at is not None and a.at.kind == "look"]:
            self.kill(actor)
        self.drain()
        if self.scenario.recoverers:
            self.recover_all()
        if self.expired:
            return  # a new call may rightly run again
        self.clock.now += 3 * LEASE
        for number, value in enumerate(("1", "2") if self.scenario.mismatch else ("1",)):
            self.deliver(Message((99, number), "task-last", value))
            self.drain()
        self.judge()

    def recover_all(self) -> None:
        """Recover until nothing is overdue. Then every intent must have ended, and every caller must have an answer.

        No caller calls again.
        """
        while (wait := self.due_in()) is not None:
            self.clock.now += wait
            self.begin(Actor(("recoverer", self.recoverers), self.recover))
            self.recoverers += 1
            before = self.store.held()
            self.drain()
            if self.store.held() is before:  # the clock was set back: the record is not overdue yet
                self.clock.now += LEASE
        record = self.record()
        if record is None or self.revoked:
            return
        if record.state in HOLDS_CALL or record.asking:
            self.broken(f"recovery left it {record.state.name}")
        if self.begun - self.told:
            self.broken(f"left without an answer: {self.begun - self.told}")

    def drain(self) -> None:
        self.start_new()
        while self.actors:
            clock = (self.clock.now, self.clock.behind)
            parts = [part(actor) for actor in self.actors]
            ready = Outlook(self.scenario, parts, self.store.held(), clock, self.lock, True).first_to_go()
            if ready is not None:
                self.do(self.named((ready.name, "go")))
            else:
                self.steps += 1
                if self.steps > STEPS_AT_MOST:
                    self.broken("a message waits for ever")
                self.clock.now += LEASE

    def judge(self) -> None:
        record = self.record()
        if record is None:
            self.broken("the intent is lost")
        if record.state in (State.RUNNING, State.SCHEDULED):
            self.broken(f"the last caller left it {record.state.name}")
        if record.state is State.SUCCEEDED and not self.effects:
            self.broken("done, without an effect")
        if record.state is State.RELEASED and self.effects and not self.scenario.steps:
            self.broken("released, with an effect")
        if record.state is State.FAILED and self.effects and self.scenario.on_crash == "transaction":
            self.broken("failed, with its rows committed")


def _frozen(answer: tuple[str, Any]) -> tuple[Any, ...]:
    return tuple(tuple(part) if isinstance(part, list) else part for part in answer)


def _fingerprint(message: Message) -> Fingerprint:
    return Fingerprint(("cents",), b"cent" + message.value.encode().ljust(8))


BUDGET = (
    *(
        "odd",
        "crashes",
        "down",
        "late",
        "lapses",
        "copies",
        "soft",
        "rollbacks",
        "losses",
        "unsent",
        "revocations",
    ),
    *("backs", "expiries"),
)
"""The fields of `Scenario` that say how often something may happen."""

LEFT = (5, 6, 13)
"""Indexes in `Standing.shared` of what is left of the budget, of the writes under way, and of the lock."""

HOLDS_CALL = (State.RUNNING, State.SCHEDULED, State.ACCEPTED)
"""The states in which recovery publishes the call."""

PASTS: dict[tuple[Any, ...], int] = {}
"""Numbers of the pasts of greenlets. Equal numbers mean equal pasts."""


class Watcher:
    """Stands in for the renewing thread."""

    world: World

    def watch(self, hold: Hold) -> None:
        self.world.watch(hold)

    def unwatch(self, hold: Hold) -> None:
        self.world.unwatch(hold)


@contextlib.contextmanager
def modelled() -> Iterator[Callable[[World], None]]:
    """Replace clock, threads, owners and the renewing thread of the package by those of a world.

    Yields a function that sets the world.
    """
    watcher = Watcher()
    now: list[World] = []

    def enter(world: World) -> None:
        now[:] = [world]
        watcher.world = world

    def heard(event: events.Event) -> None:
        actor = getattr(getcurrent(), "actor", None)
        if actor is None or actor.dead:
            return
        if event.kind == "unsettled":
            actor.unsettled = True
            now[0].excused = True
        if event.kind == "stale_settle":
            actor.refused = True

    class Time:
        @staticmethod
        def monotonic() -> float:
            return now[0].clock.monotonic()

        time = monotonic

    def elapsed() -> float:
        return now[0].clock.monotonic()

    # In every module of the package: a rule that read the real time would not be tested here.
    ours = [module for name, module in sys.modules.items() if name.startswith("celery_idem.")]
    saved: list[tuple[Any, str, Any]] = [
        (module, name, standard)
        for module in ours
        for name, standard in (("time", time), ("threading", threading))
        if getattr(module, name, None) is standard
    ]
    saved += [(runner_module, "RENEWER", runner_module.RENEWER), (owners, "mint", owners.mint)]
    saved += [(ledger_module, "randrange", ledger_module.randrange)]
    saved += [(owners, "known_dead", owners.known_dead), (clock, "elapsed", clock.elapsed)]
    log = logging.getLogger("celery_idem")
    level = log.level
    deaf = events.listen(heard, here=True)
    for module, name, _ in saved:
        setattr(module, name, {"time": Time, "threading": _Threading}.get(name))
    cached = {"pack": lru_cache(100_000)(pack), "unpack": lru_cache(100_000)(unpack)}
    packing = [
        (module, name, standard)
        for module in (*ours, sys.modules[__name__], standing)
        for name, standard in (("pack", pack), ("unpack", unpack))
        if getattr(module, name, None) is standard
    ]
    for module, name, _ in packing:
        setattr(module, name, cached[name])
    saved += packing
    clock.elapsed = elapsed
    runner_module.RENEWER = watcher  # type: ignore[assignment]

    def mint() -> bytes:
        return now[0].mint()

    def known_dead(owner: bytes) -> bool:
        return owner in now[0].dead_owners

    def randrange(_: int) -> int:
        number: int = getcurrent().actor.name[1]  # type: ignore[attr-defined]
        return number

    owners.mint, owners.known_dead = mint, known_dead
    ledger_module.randrange = randrange
    log.setLevel(logging.CRITICAL + 1)
    PASTS.clear()
    try:
        yield enter
    finally:
        for module, name, standard in saved:
            setattr(module, name, standard)
        log.setLevel(level)
        deaf()
