"""An execution's hold on one intent: the only object that writes the record it holds.

``Hold`` is for the engine. ``Claim`` is the view of it that a body has as ``self.claim``.

A hold is in one of three phases. While it is *held*, a thread renews its lease, and restores the record if the store
has lost it. While it is *ending*, the write of its end is under way or done, and nothing renews it. In between it may
be *pending*: its end may or may not be written. Either the author's transaction will commit it, or the store did not
answer and is tried again. Renewals then go on, but replace only what the hold wrote itself. The phase changes under the
hold's lock, and a lost record is restored under the same lock. So no renewal can restore a hold that has ended.
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
from celery_idem.stores.base import KEEP, Announcement, Change, Mark, Reply, Store, elsewhere

PAUSES = (0.05, 0.1, 0.2, 0.4, 0.8, 1.0)
"""Seconds between tries to write to a store that does not answer; the last one repeats."""


class Claim:
    """A body's view of its hold on the intent. It cannot change anything."""

    __slots__ = ("_hold",)

    def __init__(self, hold: Hold) -> None:
        self._hold = hold

    @property
    def key(self) -> str:
        """The idempotency key."""
        return self._hold.key

    @property
    def fence(self) -> int:
        """A number that grows with every new owner of the intent. The destination can refuse a smaller one.

        0 if the body runs without a store.
        """
        return self._hold.fence

    @property
    def attempt(self) -> int:
        """Number of this execution of the intent; 1 for the first."""
        return self._hold.attempt

    @property
    def task_id(self) -> str:
        """Celery's id of this execution's task."""
        return self._hold.task_id

    @property
    def lost(self) -> bool:
        """True once this execution must not start another effect.

        Another worker took over, or the lease could not be renewed in time, or the body has ended (and a thread that it
        left behind asks).
        """
        return self._hold.lost

    @property
    def cancelled(self) -> bool:
        """True once this execution knows that a person asked it to stop (``idem cancel``).

        It learns that at its next step, or after a third of a lease. A body without an effect so far should ``raise
        Ignore``: then the action is cancelled, and its callers receive the error ``Cancelled``. Any other end of the
        body counts as usual.
        """
        return self._hold.cancelled

    def downstream_key(self, name: str) -> str:
        """Return a key for one call that the body makes, such as ``"charge"``.

        It is the same in every attempt, ASCII, and short enough for an ``Idempotency-Key`` header.
        """
        return keys.downstream_key(self._hold.key, name)

    def __repr__(self) -> str:
        return f"<Claim {self.key} fence={self.fence} attempt={self.attempt}>"


class Retries:
    """The retries that a body has published. A signal is a ``Retry`` of Celery.

    Attributes:
        signal: signal of the message that continues this intent; None: there is none.
        causes: the errors that caused this retry.
        apart: signals of retries that are other intents.
        refused: the error that ``retry`` raised instead of publishing, and the error that caused the retry.
        call: the packed call of the retry, for the record; empty if it is not known.
    """

    __slots__ = ("apart", "call", "causes", "refused", "signal")

    def __init__(self) -> None:
        self.signal: Any = None  # Any, because this module knows nothing of Celery
        self.causes: list[BaseException] = []
        self.apart: list[Any] = []
        self.refused: tuple[BaseException, BaseException | None] | None = None
        self.call = b""


class Phase(Enum):
    """How far a hold has come (see the module)."""

    HELD = "held"
    PENDING = "pending"
    ENDING = "ending"


HELD, PENDING, ENDING = Phase  # before Python 3.12, looking up a member of an enum is slow


class Hold:
    """An execution's hold: its owner token, what it last wrote, and how long it trusts its lease.

    Attributes:
        key: key of the intent.
        store: store of the record.
        owner: the token with which this execution writes.
        policy: the author's choices.
        ended: the body has ended. A thread that it left behind may still have the claim.
        retries: the retries that the body has published; None: none.
        promised: the outcome that the author's transaction will commit, and the value that callers get.
        steps_begun: names of the steps that this execution began.
        step_running: name of the step whose function runs now.
        step_unrecorded: the store did not answer when a step began or ended.
        announced: the last write of the record also wrote and published a second value.
        owed: the intent is settled, and its answer is owed: renewals keep recovery from it.
    """

    # Class attributes, because few executions change them.
    ended = False
    retries: Retries | None = None
    promised: tuple[Outcome, Any] | None = None
    steps_begun: frozenset[str] = frozenset()
    step_running = ""
    step_unrecorded = False
    announced = False
    owed = False
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
        # What was in the store after this hold's last write. Both parts change together, because the renewing thread
        # reads them while the body's thread writes them.
        self._seen = (stored, record)
        # By this process' clock, and not later than that write. The lease counts from here.
        self._written_at = written_at
        self._lock = threading.Lock()

    # --- what is known ----------------------------------------------------------------

    @property
    def fingerprint(self) -> Fingerprint:
        return self._request.fingerprint

    @property
    def guarded(self) -> bool:
        """False if the body runs without a store."""
        return self._seen[0] is not None

    @property
    def record(self) -> Record:
        """The record as this hold last wrote it."""
        return self._seen[1]

    @property
    def written(self) -> Stored | None:
        """The value of this hold's last write."""
        return self._seen[0]

    @property
    def written_at(self) -> float:
        """Time of that write, by this process' clock, and never too late."""
        return self._written_at

    @property
    def trusted_until(self) -> float:
        """Time by this process' clock until which no other worker takes over."""
        return self._written_at + protocol.trusted_for(self.policy.lease) / MICROSECONDS

    @property
    def taken_over(self) -> bool:
        """Whether another execution has the intent now."""
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

    def settle(
        self, outcome: Outcome, patience: float, also: Announcement | None = None, owed: bytes | None = None
    ) -> Done | Refused:
        """Write how the body ended. ``Refused``: another execution took over, and the record has a note of this end.

        Args:
            patience: seconds to keep trying while the store does not answer.
            also: what to write and publish in the same step. ``announced`` says whether that was done.
            owed: see ``protocol.settle``.

        Raises:
            StoreError: the store did not answer for that long. The record stays as it is.
        """
        held = self._seen[1]
        if events.spans:
            outcome = outcome._replace(trace=events.spans[-1]())
        if owed is not None and not protocol.outlives(outcome, self.policy):
            owed = None
        return self._end(
            lambda record, stamp, now: protocol.settle(
                self._known(record, stamp), held, outcome, True, stamp, now, owed
            ),
            patience,
            also,
        )

    @property
    def owes(self) -> bool:
        """Whether the record says that the answer is owed."""
        record = self._seen[1]
        return record.outcome is not None and record.recovery is not None

    def told(self) -> None:
        """Write that the caller of the settled intent has its answer."""
        self.owed = False
        self._write(lambda record, stamp, now: (None, None if record is None else protocol.told(record)))

    @property
    def closing(self) -> Mark:
        """What takes the settled record out of the index, once its caller has the answer."""
        stored = self._seen[0]
        return Mark(self._name, 0 if stored is None else stored.stamp, None)

    def schedule(self, delay: float, patience: float, task_id: str = "", call: bytes = b"") -> Done | Refused:
        """Keep the intent for its retry, for ``delay`` seconds.

        Args:
            task_id: task id of the retry; "": the same one.
            call: call of the retry; empty: the same one.
        """
        wait = int(delay * MICROSECONDS)
        return self._end(
            lambda record, stamp, now: protocol.schedule(
                self._known(record, stamp), self.owner, wait, task_id, call
            ),
            patience,
        )

    def doubt(self, reason: str, patience: float, retry: float = 0.0) -> Done | Refused:
        """Write that the body ended, and that its effect is unknown.

        Args:
            retry: seconds until its published retry comes; 0: there is no retry.
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
        """Write that the process had to exit while the body ran."""
        held = self._seen[1]
        return self._end(
            lambda record, stamp, now: protocol.exit(
                self._known(record, stamp), self.owner, self.policy, reason, held, stamp, now
            ),
            patience,
        )

    def release(self, patience: float, owed: bytes | None = None) -> Done | Refused:
        """Write that nothing happened, so that any caller may claim the intent again. An absent record stays absent.

        Args:
            owed: see ``protocol.release``.
        """

        def decide(record: Record | None, stamp: int, now: int) -> tuple[Done | Refused, Record | None]:
            if record is None:
                return Refused(None), None
            return protocol.release(self._known(record, stamp), self.owner, owed)

        return self._end(decide, patience)

    def settle_within(self, inside: Store, outcome: Outcome, value: Any, owed: bytes | None = None) -> None:
        """Write the outcome in the author's own transaction (``Store.inside``). The author commits it.

        Args:
            value: what every caller will get.
            owed: as for ``settle``.

        Raises:
            LeaseLost: another execution took over, so the transaction must roll back.
            ConfigurationError: the record is not in that database.
        """
        held = self._seen[1]
        if events.spans:
            outcome = outcome._replace(trace=events.spans[-1]())

        def settle(record: Record | None, stamp: int, now: int) -> tuple[Done | Refused, Record | None]:
            if record is None:
                return Refused(None), None
            kept = owed if protocol.outlives(outcome, self.policy) else None
            return protocol.settle(record, held, outcome, owed=kept)

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
        """Find out whether ``settle_within`` was committed. See ``protocol.committed``.

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

    # --- questions and steps ----------------------------------------------------------

    def conclude(
        self, answer: Outcome | None, reason: str, owed: bytes | None = None
    ) -> tuple[Decision, Hold | None]:
        """Write the destination's answer to this hold's question.

        Args:
            answer: the outcome, if the effect happened; None if it did not, or if that is unknown.
            reason: why it is unknown; "" otherwise.
            owed: as for ``settle``.

        Returns:
            The decision, and with ``Acquired`` the hold under which the body may run.
        """
        held = self._seen[1]

        def decide(record: Record | None, stamp: int, now: int) -> tuple[Decision, Record | None]:
            # The first time, the record is this hold's own guess, and the store has not told the time (now is 0).
            return protocol.conclude(record or held, now or stamp, self._request, answer, reason, owed)

        decision: Decision = self._write(decide)
        if not isinstance(decision, Acquired):
            return decision, None
        return decision, Hold(self.store, self._name, self.key, self._request, *self._seen, self._written_at)

    def begin_step(self, name: str) -> Done | StepDone | StepOpen | StepsFull:
        """Begin a step. ``Done``: it may run, and the record says that it began.

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
        """Close a step with its encoded result, or with None if it had no effect.

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
        """Return the write that renews the lease: the record as it was last written. None: there is nothing to renew.

        Many holds are renewed in one call of the store. Each hold then takes its own reply, with ``renewed``.
        """
        stored, record = self._seen
        if stored is None or self._taken_over or (self._phase is ENDING and not self.owed):
            return None
        self._offered = record, clock.elapsed()
        ttl = KEEP if self.owed else protocol.ttl(record, self.policy)
        return Change(self._name, stored, pack(record), ttl, protocol.due(record, self.policy))

    def renewed(self, reply: Reply) -> None:
        """Take the store's reply to ``renewal``.

        Raises:
            StoreError: the stored value is no record, or the store did not answer when it was read again.
        """
        record, before = self._offered
        if reply.done:
            with self._lock:
                self._take(record, reply, before)
            return
        with self._lock:  # an end that begins meanwhile waits, so that this write cannot undo it
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
        """Decide on a renewal that found another record in the store.

        The body itself has written (a step), or another execution took over, or the store has lost its latest writes.
        """
        known = self._known(record, stamp)
        is_lost = known is not record
        if is_lost and (self._phase is not HELD or known.state is not State.RUNNING):
            return None, None
        decision, new = protocol.renew(known, self.owner, self.policy.lease)
        # Another process made a mark, or took this hold for dead: write now, as a sign of life.
        if is_lost or known.noticed is not None or new is not known:
            return decision, new
        # The hold's own newer write has moved the deadline (its reply may be lost). The next look renews it.
        return decision, None

    # --- internals --------------------------------------------------------------------

    def _holds(self, record: Record | None) -> bool:
        return record is not None and record.owner == self.owner

    def _known(self, record: Record | None, stamp: int) -> Record:
        """Return the stored record, or this hold's last one if the store has lost that."""
        stored, held = self._seen
        return protocol.restored(record, held, stored is not None and stamp < stored.stamp)

    def _enter(self, phase: Phase) -> None:
        """Change the phase. This waits for a renewal that is restoring the record, so that its write is not missed."""
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
        """Write this hold's record, and try again while the store does not answer.

        Args:
            look: read first, because the stored record is not this hold's last write.
        """
        began = clock.elapsed()
        tries = 0
        while True:
            stored, record = self._seen
            # This hold's last write is the best guess of the stored record. It saves the read.
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
        """Remember the stored record, and trust the lease as long as that write allows.

        An older write is ignored. The renewing thread may be late with its write, after the body's thread has made the
        next one. With the older write as a guess, every later renewal would fail.

        Args:
            before: the worker's time before the call that ``reply`` answers.
        """
        if reply.stored is None or not reply.now:  # the store was not asked
            return
        seen = self._seen[0]
        if seen is None or reply.stored.stamp >= seen.stamp:
            self._seen = (reply.stored, record)
            self._written_at = before if reply.done else before - age(reply)


def age(reply: Reply) -> float:
    """Return the seconds since the stored value was written: more than 0 if the reply to that write was lost."""
    assert reply.stored is not None
    return max(0, reply.now - reply.stored.stamp) / MICROSECONDS


def lease_lost(key: str) -> LeaseLost:
    """Return the error of a body that must stop."""
    return LeaseLost(
        f"Another execution took {key} over, so this one stopped. What it did before that stays done: if "
        "that was an effect, look for a second one.",
        key,
    )


def doubt_message(key: str, reason: str) -> str:
    """Return the message for a caller of an intent in doubt."""
    return (
        f"{key} is in doubt: {reason}. The effect may or may not have happened; nothing was run now. Look at the "
        f"destination, then say what you found: "
        f"celery -A proj idem resolve {key!r} --happened RESULT or --not-happened."
    )
