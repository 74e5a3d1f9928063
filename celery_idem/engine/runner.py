"""Claim, body, settle: the policy of one execution. Knows nothing of Celery.

What it needs of the world outside comes in a ``Job``: the body, how to read its
exceptions, and how to wait. ``celery_idem.integration.task`` makes jobs of Celery's requests.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, NamedTuple, TypeGuard, TypeVar

from celery_idem.core import protocol
from celery_idem.core.errors import (
    Cancelled,
    FingerprintMismatch,
    LeaseLost,
    OutcomeUnknown,
    ResultUnavailable,
    StoreError,
)
from celery_idem.core.model import (
    MICROSECONDS,
    Acquired,
    Answer,
    Ask,
    Busy,
    Decision,
    Done,
    Fingerprint,
    Happened,
    InDoubt,
    Mismatch,
    NotHappened,
    Outcome,
    Policy,
    Raised,
    Refused,
    Replay,
    Request,
    State,
    Stored,
    Unknown,
)
from celery_idem.engine import events, owners
from celery_idem.engine.bounded import Bounded, TooLateError
from celery_idem.engine.claim import Hold, doubt_message, lease_lost
from celery_idem.engine.lease import RENEWER
from celery_idem.engine.ledger import Ledger
from celery_idem.stores.base import Announcement

T = TypeVar("T")

EXIT_PATIENCE = 0.0
"""Seconds to keep trying to write "in doubt" when the process must exit: Celery
kills it 0.1 s later, and a record left RUNNING says the same once its lease lapses."""

MAX_CARRIED = 16
"""Owners a message carries along after lost replies. Beyond it the oldest is dropped:
should that claim have been applied after all, the intent ends in doubt, not twice."""


MAX_HANGING = 4
"""Questions of one task that may hang past ``ask_timeout`` in a process. Each is a thread for as long as the
destination hangs; when four of them get no answer, another would not either, and is not asked."""

BUSY = "in progress"
"""What a waiting duplicate says, for people."""

SIGNALS = (
    Raised.RETRY, Raised.DOUBTFUL_RETRY, Raised.REPLACED, Raised.IGNORE, Raised.SAID_DONE, Raised.SAID_FAILED,
    Raised.REJECT,
)  # fmt: skip
"""What a body raises to tell Celery something, and not because something went wrong."""


class Why(Enum):
    """Why a delivery comes back later."""

    BUSY = "another execution holds the intent"
    STORE = "the store did not answer before the body"
    GUARD = "the guard itself failed before the body"
    STEP = "the store did not answer when a step was recorded"


class Options(NamedTuple):
    """The author's choices the runner needs.

    Attributes:
        policy: those that the protocol needs as well.
        on_store_error: what a store that does not answer before the body means.
        patience: seconds to keep trying to write an outcome.
        ask_timeout: seconds a destination may take to answer.
        no_effect_errors: exceptions that prove that nothing happened.
    """

    policy: Policy
    on_store_error: Literal["retry", "raise", "run"] = "retry"
    patience: float = 30.0
    ask_timeout: float = 10.0
    no_effect_errors: tuple[type[BaseException], ...] = ()


@dataclass
class Job(ABC):
    """One execution of one intent."""

    key: str
    task_id: str
    fingerprint: Fingerprint
    options: Options
    carried: tuple[bytes, ...] = ()
    digests: bytes = b""
    scope: bytes = b""
    call: bytes = b""
    place: str = ""
    accepted: Stored | None = None
    starting: Announcement | None = None
    """What to write and publish together with the claim."""

    due = 0.0
    """When the call was due, of a message that may have been here before: seconds since 1970; 0: it was not, or that is
    not known."""

    waited = 0
    entered = False
    """Set by ``body`` just before the author's code: until then, nothing ran."""

    @abstractmethod
    def body(self, hold: Hold) -> Any:
        """Run the author's code."""

    @abstractmethod
    def kind_of(self, error: BaseException) -> Raised:
        """What kind of exception left the body."""

    def causes_of(self, error: BaseException) -> tuple[BaseException, ...]:
        """The errors that say what happened: of a retry, those because of which it was asked for."""
        return (error,)

    def returned(self, value: Any) -> None:
        """The body published something to be run later, and returned. Raises where that is what counts."""

    def raised(self, error: BaseException) -> BaseException:
        """The same of a body that raised: what counts as its error."""
        return error

    def successor(self, error: BaseException) -> str:
        """Id of the task that the action was handed over to."""
        return self.task_id

    def retry_task_id(self) -> str:
        """Id of the message that continues the intent."""
        return self.task_id

    def retry_call(self) -> bytes:
        """Its call, for the record; empty: as this one's."""
        return b""

    def orphaned(self, call: bytes) -> None:
        """A dead execution's caller would wait for ever: publish its call, as a duplicate."""

    @abstractmethod
    def retry_delay(self, error: BaseException) -> float:
        """Seconds until the retry that the body asked for, and a grace."""

    @abstractmethod
    def ask(self, hold: Hold) -> Answer:
        """Ask the destination. May raise: that is no answer."""

    @abstractmethod
    def follow(self, task_id: str) -> tuple[bool, Any]:
        """(True, value) of the task that this action was handed over to; (False, None): not known yet.

        Raises what that task raised, ``ResultUnavailable``, or to leave.
        """

    def said(self) -> Any:
        """The value, or the error, of a final state that the body has written itself."""
        raise NotImplementedError

    @property
    def ignores_result(self) -> bool:
        """Nobody looks at the value."""
        return False

    def announcement(self, value: Any) -> Announcement | None:
        """What to write and publish together with the outcome, whose value the body returned."""
        return None

    def announced(self) -> None:
        """It was written and published."""

    def shown(self) -> str:
        """Which action it is, for people. It never raises."""
        return ""

    def replaying(self, own: bool) -> None:
        """What follows is the answer of an earlier execution; ``own``: of one with the same task id."""

    def answer(self, error: T) -> T:
        """Return an error that is an answer to this call: an event has said why, and nothing failed now."""
        return error

    @property
    def waits_long(self) -> bool:
        """The wait that begins is worth a line in the log: of all waits of one message, one is."""
        return True

    @abstractmethod
    def come_back(
        self, seconds: float, carried: tuple[bytes, ...], why: Why, says: str, busy: Busy | None = None
    ) -> None:
        """Wait: return when it is time to try again here, or raise to leave.

        Args:
            seconds: after which it certainly is time; 0: unknown.
            carried: owners to take along.
            says: more about it, for people.
            busy: what the other execution does, with ``Why.BUSY``.
        """


class Runner:
    """Runs jobs against one ledger."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._asking = Bounded("celery_idem reconcile", MAX_HANGING)

    def run(self, job: Job) -> Any:
        """The value of the intent: of the body, run now and for the first time, or of the
        execution that ran it before.

        Raises:
            OutcomeUnknown: in doubt.
            FingerprintMismatch: the intent is known with other values.
            ResultUnavailable: done before, but its value was not stored.
            LeaseLost: another execution took over while the body ran.
            StoreError: the store did not answer, and the options say to raise.
            BaseException: whatever the body raised, now or when it ran, and whatever
                ``Job.come_back`` raises to leave.
        """
        carried = job.carried
        ran = False
        while True:
            age = max(0, int((time.time() - job.due) * MICROSECONDS)) if job.due else 0
            request = Request(
                owners.mint(),
                job.task_id,
                job.fingerprint,
                job.options.policy,
                carried,
                job.digests,
                job.scope,
                job.call,
                job.place,
                job.accepted,
                age,
            )
            try:
                decision, hold = self.ledger.claim(job.key, request, job.starting)
                if isinstance(decision, (Acquired, Ask, InDoubt)) and decision.orphan:
                    job.orphaned(decision.orphan)
                if isinstance(decision, Ask):
                    assert hold is not None
                    decision, hold = self._ask(job, hold, decision.first)
            except StoreError as error:
                carried = (*carried, request.owner)[-MAX_CARRIED:]
                self._store_is_down(job, error, carried)
                if job.options.on_store_error == "run":
                    return self._unguarded(job, request)
                continue
            except BaseException as error:
                carried = self._not_begun(job, request, error)
                continue
            if isinstance(decision, Acquired):
                assert hold is not None
                try:
                    done, value = self._execute(job, hold)
                except _NotBegunError as failed:
                    carried = self._not_begun(job, request, failed.error)
                    continue
                if done:
                    return value
                ran = True
                job.entered = False
            elif isinstance(decision, Busy):
                if self._lapse(job, decision):
                    continue
                events.emit("waiting", job.key, task_id=job.task_id, repeats=not job.waits_long)
                job.come_back(decision.retry_after / MICROSECONDS, carried, Why.BUSY, BUSY, decision)
            elif isinstance(decision, Replay) and decision.outcome.replaced_by:
                known, value = job.follow(decision.outcome.replaced_by)
                if known:
                    events.emit("replayed", job.key, task_id=job.task_id, succeeded=True)
                    return value
                job.come_back(0.0, carried, Why.BUSY, BUSY, Busy(0, own=ran))
            else:
                return self._answer(job, decision)

    def inquire(self, job: Job) -> Decision:
        """Decide a doubtful intent without running it: ask the destination, as a delivery would.

        Returns:
            ``Replay``: it happened, and that is recorded. ``Acquired``: it did not, and the intent is
            released, so the next delivery runs it. ``InDoubt``: the destination could not tell.
            ``Busy``: another execution works on it, or asks.

        Raises:
            StoreError: the store did not answer.
        """
        policy = job.options.policy
        # Not under the job's own task id: that id may take a retry that is still to come.
        decision, hold = self.ledger.claim(job.key, Request(owners.mint(), "", job.fingerprint, policy))
        if isinstance(decision, Ask):
            assert hold is not None
            decision, hold = self._ask(job, hold)
        if isinstance(decision, Acquired):
            assert hold is not None
            hold.release(job.options.patience)
            events.emit(
                "released", job.key, task_id=job.task_id, why="the destination says it did not happen"
            )
        return decision

    # --- without running --------------------------------------------------------------

    def _answer(self, job: Job, decision: Decision) -> Any:
        if isinstance(decision, Replay):
            outcome = decision.outcome
            events.emit(
                "replayed", job.key, task_id=job.task_id, succeeded=outcome.succeeded, **outcome.traced
            )
            return self._replayed(job, decision)
        if isinstance(decision, Mismatch):
            events.emit("mismatch", job.key, task_id=job.task_id, differs=decision.differs)
            raise job.answer(mismatch(job.key, decision.differs))
        assert isinstance(decision, InDoubt)
        if decision.first:
            self._in_doubt(job, decision.reason)
        else:
            events.emit("still_in_doubt", job.key, task_id=job.task_id, reason=decision.reason)
        raise job.answer(in_doubt(job.key, decision.reason))

    def _in_doubt(self, job: Job, reason: str, cause: BaseException | None = None) -> None:
        events.emit("in_doubt", job.key, cause=cause, task_id=job.task_id, reason=reason, action=job.shown())

    def _replayed(self, job: Job, replay: Replay) -> Any:
        """The stored value, or the stored exception raised."""
        key, codec, outcome = job.key, self.ledger.codec, replay.outcome
        what, why = "was not stored", outcome.missing
        job.replaying(replay.own)
        if outcome.cancelled:
            raise job.answer(cancelled(key, outcome))
        if outcome.succeeded and outcome.payload is not None:
            try:
                return codec.decode(outcome.payload, key)
            except StoreError as unread:  # the store has answered, and the action is done
                what, why = "cannot be read here", str(unread)
        if outcome.succeeded and job.ignores_result:
            return None
        if outcome.payload is None or outcome.succeeded:
            raise job.answer(
                ResultUnavailable(
                    f"{key} is done and will not be done again, but its result {what}: {why.removesuffix('.')}.",
                    key,
                    why,
                )
            )
        error = codec.decode_error(outcome.payload, key)
        if sys.version_info >= (3, 11):  # else its traceback in the worker's log looks like a new failure
            note = (
                f"Nothing was run now: this is how {key} ended earlier. After a bug that is mended, "
                f"`celery -A proj idem forget '{key}'` lets it run again."
            )
            with contextlib.suppress(Exception):  # not add_note, which runs code of the class, or fails
                own = object.__getattribute__(error, "__dict__")
                own["__notes__"] = [*own.get("__notes__", ()), note]
        raise job.answer(error)

    def _lapse(self, job: Job, busy: Busy) -> bool:
        """The holder was a process of this very worker and is dead: no need to wait for its lease.

        Its parent says so too, but Celery may have this message run again first.
        """
        if not owners.known_dead(busy.holder):
            return False
        try:
            self.ledger.lapse(job.key, busy.holder)
        except StoreError:
            return False  # its lease will lapse
        events.emit("lapsed", job.key, task_id=job.task_id)
        return True

    def _store_is_down(self, job: Job, error: StoreError, carried: tuple[bytes, ...]) -> None:
        """Rule 7, before the body. Returns when the caller should go on."""
        policy = job.options.on_store_error
        if policy == "run" and error.key:
            policy = (
                "raise"  # it answered: with something under this key that is no record, which is never a run
            )
        events.emit(
            "store_error", job.key, task_id=job.task_id, error=str(error), while_="claiming", then=policy
        )
        if policy == "raise":
            raise StoreError(f"{error} Nothing was run for {job.key}.", job.key) from error
        if policy == "retry":
            job.come_back(0.0, carried, Why.STORE, str(error))

    def _unguarded(self, job: Job, request: Request) -> Any:
        """The author's explicit way to fail open: run without a claim, record it if that works."""
        events.emit("unguarded", job.key, task_id=job.task_id)
        hold = self.ledger.unwritten(job.key, request)
        value = job.body(hold)
        if hold.retries is not None:
            job.returned(value)
        try:
            hold.settle(self.ledger.outcome_of(value, job.key), EXIT_PATIENCE)
        except Exception as error:
            events.emit("unsettled", job.key, task_id=job.task_id, error=str(error))
        return value

    def _release(self, job: Job, request: Request) -> None:
        """The body did not run, neither under this owner nor under those of earlier lost replies."""
        try:
            for owner in (request.owner, *request.carried):
                self.ledger.unwritten(job.key, request._replace(owner=owner)).release(EXIT_PATIENCE)
        except StoreError as error:
            events.emit("unsettled", job.key, task_id=job.task_id, error=str(error))

    def _not_begun(self, job: Job, request: Request, error: BaseException) -> tuple[bytes, ...]:
        """Whatever failed before the body, a time limit, an order to exit, or something of ours: nothing ran.

        Returns the owners to carry along, when it is time to try again here.
        """
        self._release(job, request)
        if not isinstance(error, Exception) or job.kind_of(error) is Raised.TIME_LIMIT:
            raise error
        why = f"The guard failed before the body ({type(error).__name__}: {error})."
        events.diagnose(logging.ERROR, "%s: %s Nothing was run.", job.key, why, error=error)
        if job.options.on_store_error == "raise":
            raise StoreError(
                f"{why} Nothing was run for {job.key}. Call again unchanged.", job.key
            ) from error
        carried = (*request.carried, request.owner)[-MAX_CARRIED:]  # should it not have been released
        job.come_back(0.0, carried, Why.GUARD, why)
        return carried

    def _ask(self, job: Job, hold: Hold, first: bool = False) -> tuple[Decision, Hold | None]:
        """Rule 3: the destination is asked under a lease, and gets a bounded time to answer.

        Args:
            first: see ``Ask``.
        """
        try:
            RENEWER.watch(hold)
            answer = self.bounded(lambda: job.ask(hold), job.options.ask_timeout)
        finally:
            RENEWER.unwatch(hold)
        events.emit("asked", job.key, task_id=job.task_id, answer=type(answer).__name__)
        outcome = self.ledger.outcome_of(answer.result, job.key) if isinstance(answer, Happened) else None
        unknown = answer.reason or "the destination could not tell" if isinstance(answer, Unknown) else ""
        decision, running = hold.conclude(outcome, unknown)
        return (decision._replace(first=first) if isinstance(decision, InDoubt) else decision), running

    def bounded(self, ask: Callable[[], Answer], timeout: float) -> Answer:
        """Ask on a side thread, so that a destination that hangs cannot hold this one for ever."""

        def asked() -> Answer:
            try:
                answer: object = ask()
            except BaseException as error:
                events.diagnose(logging.WARNING, "reconcile failed", error=error)
                return Unknown(f"asking the destination failed: {type(error).__name__}")
            if isinstance(answer, (Happened, NotHappened, Unknown)):
                return answer
            return Unknown(
                f"reconcile returned {type(answer).__name__}, not Happened, NotHappened or Unknown"
            )

        try:
            return self._asking.call(asked, timeout)
        except TooLateError as late:
            return Unknown(f"the destination did not answer: {late}")

    # --- running ----------------------------------------------------------------------

    def _execute(self, job: Job, hold: Hold) -> tuple[bool, Any]:
        """(True, value) when there is one; (False, None): claim again."""
        try:
            try:
                RENEWER.watch(hold)
                value = job.body(hold)
                if hold.retries is not None:
                    job.returned(value)
            except BaseException as error:
                if not job.entered:
                    raise _NotBegunError(error) from error
                if hold.retries is not None:
                    error = job.raised(error)
                if self._committed(job, hold, error):
                    return True, self._promised(job, hold)
                self._ended_by(job, hold, error)
                return False, None
            if hold.promised is not None:
                return self._transacted(job, hold)
            patience = job.options.patience
            return True, _whatever_comes(
                lambda p, last: self._settle_value(job, hold, value, p, last), patience
            )
        finally:
            RENEWER.unwatch(hold)

    def _settle_value(
        self, job: Job, hold: Hold, value: Any, patience: float, last: bool, returned: bool = True
    ) -> Any:
        try:
            outcome, shown = self.ledger.encode(value, job.key)
        except BaseException as error:
            if not last:
                raise
            # Not an order to exit, which comes once: code of the value's own.
            outcome, shown = Outcome(True, None, f"encoding it raised {type(error).__name__}"), value
        self._settle(job, hold, outcome, patience, job.announcement(shown) if returned else None)
        return shown

    # --- in a transaction of the author's own (rule 9) ------------------------------------

    def _transacted(self, job: Job, hold: Hold) -> tuple[bool, Any]:
        """The body returned after ``settle_in``: the outcome is in, if its transaction committed.

        Where the store does not answer, that is unknown: the transaction may even be open still, and
        be what the store waits for. The next claim finds out: it replays, or runs.
        """
        committed = self._committed(job, hold, None)
        if committed is None:
            return False, None
        if not committed:
            error = StoreError(
                f"settle_in wrote the outcome of {job.key}, but its transaction was rolled back, or is not "
                "committed yet: commit it before the body returns. Nothing was recorded.",
                job.key,
            )
            self._ended_by(job, hold, error)
            return False, None
        return True, self._promised(job, hold)

    def _committed(self, job: Job, hold: Hold, error: BaseException | None) -> bool | None:
        """Whether a transaction has settled the intent, None where the store does not say;
        raises where the error counts all the same.

        What a body raises after its outcome is committed cannot change that outcome. It is
        logged, and every caller gets the value; only Celery's own signals go on.
        """
        if hold.promised is None or (isinstance(error, LeaseLost) and error.key == job.key):
            return False
        exits = error is not None and job.kind_of(error) is Raised.EXIT
        try:
            done = hold.committed(EXIT_PATIENCE if exits else job.options.patience)
        except StoreError as silence:
            events.emit("unsettled", job.key, task_id=job.task_id, error=str(silence))
            if error is not None:
                raise error from None  # settled or not, the record knows: a redelivery replays or runs
            return None
        if isinstance(done, Refused):
            raise lease_lost(job.key)
        if done.record.outcome is None:
            return False
        events.emit("settled", job.key, task_id=job.task_id, succeeded=True)
        if error is not None:
            if exits or job.kind_of(error) in SIGNALS:
                raise error
            events.emit("late_error", job.key, cause=error, task_id=job.task_id, error=type(error).__name__)
        return True

    def _promised(self, job: Job, hold: Hold) -> Any:
        assert hold.promised is not None
        return hold.promised[1]

    def _settle_error(self, job: Job, hold: Hold, error: BaseException, patience: float) -> None:
        self._settle(job, hold, Outcome(False, self.ledger.codec.encode_error(error, job.key)), patience)

    def _settle(
        self, job: Job, hold: Hold, outcome: Outcome, patience: float, also: Announcement | None = None
    ) -> None:
        try:
            done = hold.settle(outcome, patience, also)
        except StoreError as error:
            # Rule 7, after the body: this caller gets the truth, which is known here. The
            # record stays RUNNING, lapses, and is in doubt for every other caller.
            events.emit("unsettled", job.key, task_id=job.task_id, error=str(error))
            return
        if isinstance(done, Refused):
            raise self._alarm(job, hold, done)
        if hold.announced:
            job.announced()
        events.emit("settled", job.key, task_id=job.task_id, succeeded=outcome.succeeded)

    def _alarm(self, job: Job, hold: Hold, refused: Refused) -> LeaseLost:
        """Rule 4: another execution took over while this body ran to its end. Its effect may be a second one."""
        record = refused.record
        events.emit(
            "stale_settle",
            job.key,
            task_id=job.task_id,
            fence=hold.fence,
            current_fence=record.fence if record else 0,
        )
        return LeaseLost(
            f"This execution of {job.key} finished after another one had taken the intent over, so its outcome was "
            f"not recorded and the effect may have happened twice. Compare the destination with `celery -A proj "
            f"idem show {job.key!r}`. A longer idem_lease, or passing self.claim.fence to a destination that "
            "checks it, prevents this.",
            job.key,
        )

    def _ended_by(self, job: Job, hold: Hold, error: BaseException) -> None:
        """Rule 5: what an exception of the body means. Raises, unless the intent may be claimed again now."""
        causes = job.causes_of(error)
        own = tuple(cause for cause in causes if getattr(cause, "key", None) == job.key)
        if any(isinstance(cause, LeaseLost) for cause in own):
            raise error
        kind = job.kind_of(error)
        if hold.step_unrecorded and any(isinstance(cause, StoreError) for cause in causes):
            self._step_is_unrecorded(job, kind, error)
        ending = protocol.ending(kind, job.options.policy)
        in_step = next((cause for cause in own if isinstance(cause, OutcomeUnknown)), None)
        if in_step is not None:  # it has said so in the record already
            self._in_doubt(job, in_step.reason, error)
            raise job.answer(error)
        patience = EXIT_PATIENCE if kind is Raised.EXIT else job.options.patience
        if kind is Raised.REPLACED:
            successor = job.successor(error)
            self._settle(job, hold, Outcome(True, None, replaced_by=successor), patience)
            if successor == job.task_id:
                raise error
            return
        if kind is Raised.SAID_DONE:
            _whatever_comes(
                lambda p, last: self._settle_value(job, hold, job.said(), p, last, False), patience
            )
            raise error
        if kind is Raised.SAID_FAILED:
            failure = job.said()
            _whatever_comes(lambda p, last: self._settle_error(job, hold, failure, p), patience)
            raise error
        if ending is State.FAILED:
            _whatever_comes(lambda p, last: self._settle_error(job, hold, error, p), patience)
            raise error
        reason = f"the body was interrupted by {', '.join(type(cause).__name__ for cause in causes)}"
        done: Done | Refused | None = None
        try:
            if ending is State.SCHEDULED:
                delay = job.retry_delay(error)
                done = hold.schedule(delay, patience, job.retry_task_id(), job.retry_call())
                if not _is_cancelled(done):
                    events.emit("scheduled", job.key, task_id=job.task_id)
            elif ending is State.RELEASED:
                done = hold.release(patience)
                if not _is_cancelled(done):
                    events.emit("released", job.key, task_id=job.task_id, why=type(error).__name__)
            elif kind is Raised.EXIT:
                done = hold.exit(reason, patience)
                if overtaken(done, hold):
                    self._alarm(job, hold, done)
                events.emit("exited", job.key, task_id=job.task_id, reason=reason)
            else:
                retry = job.retry_delay(error) if kind is Raised.DOUBTFUL_RETRY else 0.0
                done = hold.doubt(reason, patience, retry)
                if overtaken(done, hold):
                    late = self._alarm(job, hold, done)
                    raise error if kind is Raised.DOUBTFUL_RETRY else late  # a retry comes as a duplicate
                self._in_doubt(job, reason, error)
        except StoreError as silence:
            events.emit("unsettled", job.key, task_id=job.task_id, error=str(silence))
        if done is not None and _is_cancelled(done):
            events.emit("settled", job.key, task_id=job.task_id, succeeded=False)
            if ending is State.RELEASED:  # a retry that is on its way is told
                raise cancelled(job.key, done.record.outcome) from error
        if ending is not State.IN_DOUBT or kind in (Raised.EXIT, Raised.DOUBTFUL_RETRY):
            raise error  # the retry that is on its way asks the destination, or says that it is in doubt
        if job.options.policy.asks:
            return  # claim again: that asks the destination
        raise job.answer(in_doubt(job.key, reason)) from error

    def _step_is_unrecorded(self, job: Job, kind: Raised, error: BaseException) -> None:
        """The store went away around a step. Its record says how far the body came, so a body
        that may resume does, once the lease has lapsed; any other is in doubt."""
        if job.options.policy.on_crash == "resume":
            events.emit("unsettled", job.key, task_id=job.task_id, error=str(error))
            if kind is Raised.DOUBTFUL_RETRY:
                raise error  # its own message comes back
            job.come_back(job.options.policy.lease / MICROSECONDS, (), Why.STEP, str(error))


class _NotBegunError(Exception):
    """Between the claim and the author's code; ``error`` says what."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(error)
        self.error = error


def overtaken(done: Done | Refused, hold: Hold) -> TypeGuard[Refused]:
    """Whether another execution, or a person, had the intent when this one's end was to be written."""
    return isinstance(done, Refused) and done.record is not None and done.record.owner != hold.owner


def _whatever_comes(settle: Callable[[float, bool], T], patience: float) -> T:
    """A soft time limit, or the order to exit, fires wherever it likes, here around our own
    write. The body is done and its outcome known: keep that first. Writing it twice is harmless."""
    try:
        return settle(patience, False)
    except LeaseLost:
        raise
    except BaseException as interrupt:
        shown = settle(EXIT_PATIENCE, True)
        if isinstance(interrupt, Exception):
            return shown
        raise


def _is_cancelled(done: Done | Refused) -> TypeGuard[Done]:
    """The body was asked to stop, and what it did is an end."""
    return isinstance(done, Done) and done.record.state is State.CANCELLED


def cancelled(key: str, outcome: Outcome | None) -> Cancelled:
    reason = outcome.missing if outcome is not None else ""
    return Cancelled(
        f"{key} was {reason}. It will not run. `celery -A proj idem forget '{key}'` lets it happen after all.",
        key,
        reason,
    )


def in_doubt(key: str, reason: str) -> OutcomeUnknown:
    return OutcomeUnknown(doubt_message(key, reason), key, reason)


def mismatch(key: str, differs: tuple[str, ...]) -> FingerprintMismatch:
    return FingerprintMismatch(
        f"{key} is known already, with another value of {', '.join(differs)}. Nothing was run. If this is a different "
        "action, give it another occurrence (or another value in its intent); if not, repeat it unchanged.",
        key,
        differs,
    )
