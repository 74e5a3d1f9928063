"""An execution's hold on one intent: the only object that writes the record it holds.

``Hold`` is the engine's. ``Claim`` is what a body sees of it, as ``self.claim``.

A hold is in one of three phases. While it is *held*, a thread renews its lease, and writes the record anew where the
store has lost it. While it is *ending*, the write of its end is under way or done, and nothing renews it. In between it
is *pending*: its end may or may not be written, because a transaction of the author's is to commit it, or because the
store did not answer and is tried again. Renewals go on then, but only replace what the hold wrote itself. The phase
changes under the hold's lock, and a lost record is written anew under the same lock: no renewal brings back a hold that
has ended.
"""

from __future__ import annotations

import threading
from enum import Enum
from functools import partial
from typing import Any, NoReturn

from celery_idem.core import keys, protocol
from celery_idem.core.errors import IdempotencyError, LeaseLost, StoreError
from celery_idem.core.model import (
    MICROSECONDS,
    Acquired,
    Decision,
    Done,
    Fingerprint,
    Outcome,
    Policy,
    Record,
    Refused,
    Request,
    State,
    StepDone,
    StepOpen,
    StepsFull,
    Stored,
)
from celery_idem.core.record import pack
from celery_idem.engine import clock, events
from celery_idem.engine.compare_and_set import Decide, Replace, change
from celery_idem.stores.base import Announcement, Change, Reply, Store, elsewhere

PAUSES = (0.05, 0.1, 0.2, 0.4, 0.8, 1.0)
"""Seconds between tries to write to a store that does not answer; the last one repeats."""


class Claim:
    """What a body sees of its hold on the intent. It reads, and changes nothing."""

    __slots__ = ("_hold",)

    def __init__(self, hold: Hold) -> None:
        self._hold = hold

    @property
    def key(self) -> str:
        """The idempotency key."""
        return self._hold.key

    @property
    def fence(self) -> int:
        """Grows with every new owner of the intent: let the destination refuse a smaller one.

        0 while no store stands behind the claim.
        """
        return self._hold.fence

    @property
    def attempt(self) -> int:
        """Which execution of this intent this is; 1 for the first."""
        return self._hold.attempt

    @property
    def task_id(self) -> str:
        """Celery's id of this execution's task."""
        return self._hold.task_id

    @property
    def lost(self) -> bool:
        """True once this execution must not start another effect.

        Another worker took over, the lease could not be renewed in time, or the body has ended (a thread
        that it did not wait for sees that).
        """
        return self._hold.lost

    @property
    def cancelled(self) -> bool:
        """True once this execution knows that a person asked it to stop (``idem cancel``): a third of a lease later at
        most, or at its next step.

        A body that had no effect yet stops with ``raise Ignore``: then the action is cancelled, and its callers are
        told. However else it ends, that counts, as ever.
        """
        return self._hold.cancelled

    def downstream_key(self, name: str) -> str:
        """A key for one call this body makes, such as ``"charge"``: the same in every
        attempt, ASCII, and short enough for an ``Idempotency-Key`` header."""
        return keys.downstream_key(self._hold.key, name)

    def __repr__(self) -> str:
        return f"<Claim {self.key} fence={self.fence} attempt={self.attempt}>"


class Retries:
    """What a body has published to be run later, and what it got instead. Celery's ``Retry`` is a signal here.

    Attributes:
        signal: of the message that continues this intent; None while there is none.
        causes: the errors because of which it was asked for.
        apart: signals of messages that are intents of their own.
        refused: what ``retry`` raised instead of publishing, and because of which error.
        call: what was published, for the record; empty where that is not known.
    """

    __slots__ = ("apart", "call", "causes", "refused", "signal")

    def __init__(self) -> None:
        self.signal: Any = None  # any: this module knows nothing of Celery
        self.causes: list[BaseException] = []
        self.apart: list[Any] = []
        self.refused: tuple[BaseException, BaseException | None] | None = None
        self.call = b""


class Phase(Enum):
    """How far a hold has come (see the module)."""

    HELD = "held"
    PENDING = "pending"
    ENDING = "ending"


HELD, PENDING, ENDING = Phase  # looked up once: before Python 3.12 an enum finds its members slowly


class Hold:
    """The owner token, what this execution last wrote, the write under way, and until when it trusts its lease.

    Attributes:
        key: of the intent.
        store: where the record is.
        owner: the token that this execution writes under.
        policy: the author's choices.
        ended: the body has ended. A thread that it left behind may still have the claim.
        retries: what the body has published to be run later; None: nothing.
        promised: the outcome that a transaction of the author's is to commit, and its value as callers get it.
        steps_begun: names of the steps that this execution began.
        step_running: name of the step whose function runs now.
        step_unrecorded: the store did not answer when a step was to begin or to end.
        announced: the last write of the record wrote and published a second value as well.
    """

    # What few executions change.
    ended = False
    retries: Retries | None = None
    promised: tuple[Outcome, Any] | None = None
    steps_begun: frozenset[str] = frozenset()
    step_running = ""
    step_unrecorded = False
    announced = False
    _phase = HELD
    _taken_over = False
    _offered: tuple[Record, float]

    def __init__(
        self,
        store: Store,
        name: str,
        key: str,
        request: Request,
        stored: Stored | None,
        record: Record,
        written_at: float,
    ) -> None:
        self.store = store
        self.key = key
        self._name = name  # of the record in the store
        self._request = request
        self.owner = request.owner
        self.policy: Policy = request.policy
        # What stood in the store when this hold last wrote. Both parts change together, because
        # the renewing thread reads them while the body's thread writes them.
        self._seen = (stored, record)
        # Not later than that write, by this process' clock: the lease counts from there.
        self._written_at = written_at
        self._lock = threading.Lock()

    # --- what is known ----------------------------------------------------------------

    @property
    def fingerprint(self) -> Fingerprint:
        return self._request.fingerprint

    @property
    def guarded(self) -> bool:
        """False when the body runs without a store."""
        return self._seen[0] is not None

    @property
    def record(self) -> Record:
        """As this hold last wrote it."""
        return self._seen[1]

    @property
    def written(self) -> Stored | None:
        """What this hold last wrote, as the store has it."""
        return self._seen[0]

    @property
    def written_at(self) -> float:
        """When, by this process' clock; never later than it was."""
        return self._written_at

    @property
    def trusted_until(self) -> float:
        """Until when, by this process' clock, no other worker takes over."""
        return self._written_at + protocol.trusted_for(self.policy.lease) / MICROSECONDS

    @property
    def taken_over(self) -> bool:
        """Another execution has the intent now."""
        return self._taken_over

    @property
    def fence(self) -> int:
        return self._seen[1].fence

    @property
    def attempt(self) -> int:
        return self._seen[1].attempts

    @property
    def task_id(self) -> str:
        return self._seen[1].task_id

    @property
    def lost(self) -> bool:
        """See ``Claim.lost``."""
        return self._taken_over or self.ended or clock.elapsed() > self.trusted_until

    @property
    def cancelled(self) -> bool:
        """See ``Claim.cancelled``."""
        return protocol.stopping(self._seen[1])

    def __repr__(self) -> str:
        return f"<Hold {self.key} {self._phase.value} fence={self.fence}>"

    # --- the ends of a hold -----------------------------------------------------------

    def settle(self, outcome: Outcome, patience: float, also: Announcement | None = None) -> Done | Refused:
        """Write how the body ended; ``Refused`` when another execution took over, which the record says then.

        Args:
            patience: seconds to keep trying while the store does not answer.
            also: what to write and publish in the same step. ``announced`` says whether that was done.

        Raises:
            StoreError: it did not answer for that long. The record stays as it is.
        """
        held = self._seen[1]
        if events.spans:
            outcome = outcome._replace(trace=events.spans[-1]())
        return self._end(
            lambda record, stamp, now: protocol.settle(
                self._known(record, stamp), held, outcome, True, stamp, now
            ),
            patience,
            also,
        )

    def schedule(self, delay: float, patience: float, task_id: str = "", call: bytes = b"") -> Done | Refused:
        """Keep the intent for the retry's task id ("": this one) for ``delay`` seconds, until it comes.

        Args:
            call: the retry's; empty: as this one's.
        """
        wait = int(delay * MICROSECONDS)
        return self._end(
            lambda record, stamp, now: protocol.schedule(
                self._known(record, stamp), self.owner, wait, task_id, call
            ),
            patience,
        )

    def doubt(self, reason: str, patience: float, retry: float = 0.0) -> Done | Refused:
        """The body ended in a way that leaves the effect unknown.

        Args:
            retry: seconds until its retry comes, which is on its way; 0: there is none.
        """
        held = self._seen[1]
        wait = int(retry * MICROSECONDS)
        return self._end(
            lambda record, stamp, now: protocol.doubt(
                self._known(record, stamp), self.owner, reason, held, stamp, now, wait
            ),
            patience,
        )

    def exit(self, reason: str, patience: float) -> Done | Refused:
        """The process was told to exit while the body ran."""
        held = self._seen[1]
        return self._end(
            lambda record, stamp, now: protocol.exit(
                self._known(record, stamp), self.owner, self.policy, reason, held, stamp, now
            ),
            patience,
        )

    def release(self, patience: float) -> Done | Refused:
        """Nothing happened: any caller may claim the intent again. A record that is not there stays so."""

        def decide(record: Record | None, stamp: int, now: int) -> tuple[Done | Refused, Record | None]:
            if record is None:
                return Refused(None), None
            return protocol.release(self._known(record, stamp), self.owner)

        return self._end(decide, patience)

    def settle_within(self, inside: Store, outcome: Outcome, value: Any) -> None:
        """Write the outcome in a transaction of the author's own (``Store.inside``), to be committed by the author.

        Args:
            value: what every caller will get.

        Raises:
            LeaseLost: another execution took over: the transaction must roll back.
            ConfigurationError: the record is not in that database.
        """
        held = self._seen[1]
        if events.spans:
            outcome = outcome._replace(trace=events.spans[-1]())

        def settle(record: Record | None, stamp: int, now: int) -> tuple[Done | Refused, Record | None]:
            return (Refused(None), None) if record is None else protocol.settle(record, held, outcome)

        self._enter(PENDING)
        stored, record = self._seen
        assert stored is not None
        done, _, _ = change(
            inside, self._name, self.key, settle, self.policy, Reply(False, stored, 0), record
        )
        if isinstance(done, Done):
            self.promised = (outcome, value)
        elif done.record is None:
            raise elsewhere(self.store.url)
        elif done.record.owner == held.owner:
            raise IdempotencyError(
                f"{self.key} has its outcome already: an execution settles once. Use one settle_in.", self.key
            )
        else:
            self._lose()

    def committed(self, patience: float) -> Done | Refused:
        """After ``settle_within``: what became of it. See ``protocol.committed``.

        Raises:
            StoreError: the store did not answer for ``patience`` seconds.
        """
        assert self.promised is not None
        held, outcome = self._seen[1], self.promised[0]
        self._enter(ENDING)
        done: Done | Refused = self._write(
            lambda record, stamp, now: protocol.committed(record, held, outcome, self.policy),
            patience,
            look=True,
        )
        return done

    # --- on the way -------------------------------------------------------------------

    def conclude(self, answer: Outcome | None, reason: str) -> tuple[Decision, Hold | None]:
        """Write what the destination answered to the question that this hold asks.

        Args:
            answer: the outcome, where the effect happened; None where it did not, or where that is unknown.
            reason: why it is unknown.

        Returns:
            The decision, and with ``Acquired`` the hold under which the body may run.
        """
        held = self._seen[1]

        def decide(record: Record | None, stamp: int, now: int) -> tuple[Decision, Record | None]:
            # The first guess is what this hold wrote itself: then the store has not told the time.
            return protocol.conclude(record or held, now or stamp, self._request, answer, reason)

        decision: Decision = self._write(decide)
        if not isinstance(decision, Acquired):
            return decision, None
        return decision, Hold(self.store, self._name, self.key, self._request, *self._seen, self._written_at)

    def begin_step(self, name: str) -> Done | StepDone | StepOpen | StepsFull:
        """May this step run? ``Done``: yes, and the record says that it began.

        Raises:
            LeaseLost: another execution took over.
            StoreError: the store did not answer.
        """
        begun, self.steps_begun = self.steps_begun, self.steps_begun | {name}
        decision: Done | StepDone | StepOpen | StepsFull = self._step(
            lambda record, stamp, now: protocol.begin_step(
                self._known(record, stamp), self.owner, name, self.policy, begun
            )
        )
        return decision

    def end_step(self, name: str, payload: bytes | None, patience: float) -> None:
        """Close a step: with its encoded result, or with None when it had no effect.

        Raises:
            LeaseLost: another execution took over.
            StoreError: the store did not answer for ``patience`` seconds.
        """
        self._step(
            lambda record, stamp, now: protocol.end_step(
                self._known(record, stamp), self.owner, name, payload, self.policy.lease
            ),
            patience,
        )

    def renew(self) -> None:
        """Renew the lease of this hold alone."""
        change = self.renewal()
        if change is not None:
            self.renewed(self.store.replace_many([change])[0])

    def renewal(self) -> Change | None:
        """The write that renews the lease: the record as it was last written. None: there is nothing to renew.

        Renewals of many holds go to the store together; each hold takes its own reply, with ``renewed``.
        """
        stored, record = self._seen
        if stored is None or self._taken_over or self._phase is ENDING:
            return None
        self._offered = record, clock.elapsed()
        ttl, due = protocol.ttl(record, self.policy), protocol.due(record, self.policy)
        return Change(self._name, stored, pack(record), ttl, due)

    def renewed(self, reply: Reply) -> None:
        """Take the store's reply to ``renewal``.

        Raises:
            StoreError: the store holds no record there, or did not answer when it was looked at again.
        """
        record, before = self._offered
        if reply.done:
            with self._lock:
                self._take(record, reply, before)
            return
        with self._lock:  # an ending that begins meanwhile waits: it must not be undone
            if self._phase is ENDING:
                return
            decision, reply, before = change(
                self.store, self._name, self.key, self._renew, self.policy, reply, None, before
            )
            if isinstance(decision, Done):
                self._take(decision.record, reply, before)
            elif isinstance(decision, Refused) and not self._holds(decision.record) and not self._taken_over:
                self._taken_over = True
                events.emit("lease_lost", self.key, task_id=self.task_id, fence=self.fence)

    def _renew(
        self, record: Record | None, stamp: int, now: int
    ) -> tuple[Done | Refused | None, Record | None]:
        """Of a hold whose renewal met another record: the body itself wrote meanwhile (a step), another
        execution took over, or the store has lost what was written to it lately."""
        known = self._known(record, stamp)
        is_lost = known is not record
        if is_lost and (self._phase is not HELD or known.state is not State.RUNNING):
            return None, None
        decision, new = protocol.renew(known, self.owner, self.policy.lease)
        # Another's mark, or a lease that was taken for over: answer with a sign of life, now.
        if is_lost or known.noticed is not None or new is not known:
            return decision, new
        # Its own newer write moved the deadline already, also where the reply to it got lost and the
        # body's thread does not know it. The next look renews that one.
        return decision, None

    # --- inside -----------------------------------------------------------------------

    def _holds(self, record: Record | None) -> bool:
        return record is not None and record.owner == self.owner

    def _known(self, record: Record | None, stamp: int) -> Record:
        """What stands in the store; what this hold wrote there last, where the store has lost that."""
        stored, held = self._seen
        return protocol.restored(record, held, stored is not None and stamp < stored.stamp)

    def _enter(self, phase: Phase) -> None:
        """Change the phase. A renewal that writes the record anew meanwhile is waited for: what it wrote
        is then there to be ended."""
        with self._lock:
            self._phase = phase

    def _end(self, decide: Decide, patience: float, also: Announcement | None = None) -> Done | Refused:
        with self._lock:
            self._phase = ENDING
        replace = None if also is None else partial(self._replace_and_announce, also)
        ended: Done | Refused = self._write(decide, patience, replace=replace)
        return ended

    def _replace_and_announce(
        self, also: Announcement, name: str, old: Stored, value: bytes, ttl: int | None, due: int | None
    ) -> Reply:
        reply, self.announced = self.store.announce(Change(name, old, value, ttl, due), also)
        return reply

    def _step(self, decide: Decide, patience: float = 0.0) -> Any:
        try:
            decision = self._write(decide, patience)
        except StoreError:
            self.step_unrecorded = True
            raise
        if isinstance(decision, Refused):
            self._lose()
        return decision

    def _lose(self) -> NoReturn:
        self._taken_over = True
        raise lease_lost(self.key)

    def _write(
        self, decide: Decide, patience: float = 0.0, look: bool = False, replace: Replace | None = None
    ) -> Any:
        """Write the record that this hold has, and try again while the store does not answer.

        Args:
            look: begin by reading: what this hold wrote last is not what stands there.
        """
        began = clock.elapsed()
        tries = 0
        while True:
            stored, record = self._seen
            # What this hold wrote last is the best guess at what stands there, and it saves the read.
            guess = None if look or stored is None else Reply(False, stored, 0)
            try:
                decision, reply, before = change(
                    self.store, self._name, self.key, decide, self.policy, guess, record, replace=replace
                )
            except StoreError as error:
                ending = self._phase is ENDING
                if ending:
                    self._enter(PENDING)
                pause = PAUSES[min(tries, len(PAUSES) - 1)]
                tries += 1
                if clock.elapsed() + pause > began + patience:
                    raise
                if tries == 1:
                    events.emit(
                        "store_error", self.key, task_id=self.task_id, error=str(error), while_="settling"
                    )
                threading.Event().wait(pause)
                if ending:
                    self._enter(ENDING)
                continue
            if isinstance(decision, (Done, Acquired)):
                with self._lock:
                    self._take(decision.record, reply, before)
            return decision

    def _take(self, record: Record, reply: Reply, before: float) -> None:
        """Remember what stands in the store, and trust the lease as long as that write allows.

        The renewing thread may be slow to note its write while the body's thread has made the
        next one. Going back to the older would make every later renewal fail.

        Args:
            before: the worker's time before the call that ``reply`` answers.
        """
        if reply.stored is None or not reply.now:  # nothing was asked: no news
            return
        seen = self._seen[0]
        if seen is None or reply.stored.stamp >= seen.stamp:
            self._seen = (reply.stored, record)
            self._written_at = before if reply.done else before - age(reply)


def age(reply: Reply) -> float:
    """Seconds since what stands there was written: more than none where the reply to that write got lost."""
    assert reply.stored is not None
    return max(0, reply.now - reply.stored.stamp) / MICROSECONDS


def lease_lost(key: str) -> LeaseLost:
    """The error of a body that must stop."""
    return LeaseLost(
        f"Another execution took {key} over, so this one stopped. What it did before that stays done: if "
        "that was an effect, look for a second one.",
        key,
    )


def doubt_message(key: str, reason: str) -> str:
    """The message to a caller of an intent in doubt."""
    return (
        f"{key} is in doubt: {reason}. The effect may or may not have happened; nothing was run now. Look at the "
        f"destination, then say what you found: "
        f"celery -A proj idem resolve {key!r} --happened RESULT or --not-happened."
    )
