"""Runs one execution: claim, body, settle. Knows nothing of Celery.

A ``Job`` has what is specific to Celery: the body, the meaning of its exceptions, and how to wait.
``celery_idem.integration.delivery`` makes jobs from Celery's requests.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
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
from celery_idem.core.results import Codec
from celery_idem.engine import events, owners
from celery_idem.engine.bounded import Bounded, TooLateError
from celery_idem.engine.claim import Hold, doubt_message, lease_lost
from celery_idem.engine.lease import RENEWER
from celery_idem.engine.ledger import Ledger
from celery_idem.stores.base import Announcement

T = TypeVar("T")

EXIT_PATIENCE = 0.0
"""Seconds to keep trying to write "in doubt" when the process must exit. Celery kills it 0.1 s later, and a record that
is left RUNNING means the same once its lease lapses."""

MAX_CARRIED = 16
"""Owners that a message carries after lost replies. If there are more, the oldest is dropped. If its claim was applied
after all, the intent ends in doubt, and does not run twice."""


MAX_HANGING = 4
"""Questions of one task that may hang past ``ask_timeout`` in a process. Each takes a thread while the destination
hangs. When four of them have no answer, another one would not get one either, and is not asked."""

BUSY = "in progress"
"""Why a duplicate waits, for people."""

SIGNALS = (
    Raised.RETRY, Raised.DOUBTFUL_RETRY, Raised.REPLACED, Raised.IGNORE, Raised.SAID_DONE, Raised.SAID_FAILED,
    Raised.REJECT,
)  # fmt: skip
"""Exceptions that tell Celery something. No error has happened."""


class Why(Enum):
    """Why a delivery comes back later."""

    BUSY = "another execution holds the intent"
    STORE = "the store did not answer before the body"
    GUARD = "the guard itself failed before the body"
    STEP = "the store did not answer when a step was recorded"


class Options(NamedTuple):
    """The author's choices that the runner needs.

    Attributes:
        policy: the choices that the protocol needs.
        on_store_error: what to do if the store does not answer before the body.
        patience: seconds to keep trying to write an outcome.
        ask_timeout: seconds that a destination may take to answer.
        no_effect_errors: exceptions that prove that nothing happened.
    """

    policy: Policy
    on_store_error: Literal["retry", "raise", "run"] = "retry"
    patience: float = 30.0
    ask_timeout: float = 10.0
    no_effect_errors: tuple[type[BaseException], ...] = ()


class Job(ABC):
    """One execution of one intent."""

    digests: bytes = b""
    scope: bytes = b""
    call: bytes = b""
    place: str = ""
    accepted: Stored | None = None
    starting: Announcement | None = None
    """What to write and publish together with the claim."""

    due = 0.0
    """When the call was due, in seconds since 1970, if its message may have been delivered before; 0: it was not, or
    that is not known."""

    waited = 0
    entered = False
    """Set by ``body`` just before the author's code. Until then, nothing ran."""

    def __init__(
        self,
        key: str,
        task_id: str,
        fingerprint: Fingerprint,
        options: Options,
        carried: tuple[bytes, ...] = (),
    ) -> None:
        self.key = key
        self.task_id = task_id
        self.fingerprint = fingerprint
        self.options = options
        self.carried = carried

    @abstractmethod
    def body(self, hold: Hold) -> Any:
        """Run the author's code."""

    @abstractmethod
    def kind_of(self, error: BaseException) -> Raised:
        """Return the kind of an exception that left the body."""

    def causes_of(self, error: BaseException) -> tuple[BaseException, ...]:
        """Return the errors that say what happened: for a retry, the errors that caused it."""
        return (error,)

    def returned(self, value: Any) -> None:
        """Handle the return of a body that has published a retry. Raises the retry if it counts, and not the value."""

    def raised(self, error: BaseException) -> BaseException:
        """Return the error that counts, of a body that has published a retry and raised."""
        return error

    def successor(self, error: BaseException) -> str:
        """Return the id of the task that replaced this one."""
        return self.task_id

    def retry_task_id(self) -> str:
        """Return the task id of the retry."""
        return self.task_id

    def retry_call(self) -> bytes:
        """Return the packed call of the retry, for the record; empty: the same as this one's."""
        return b""

    def orphaned(self, call: bytes) -> None:
        """Publish the call of a dead execution, as a duplicate, because its caller may still wait."""

    @abstractmethod
    def retry_delay(self, error: BaseException) -> float:
        """Return the seconds until the body's retry, and a grace."""

    @abstractmethod
    def ask(self, hold: Hold) -> Answer:
        """Ask the destination. An exception counts as no answer."""

    @abstractmethod
    def follow(self, task_id: str) -> tuple[bool, Any]:
        """Return (True, value) of the task that replaced this one; (False, None): not known yet.

        Raises:
            BaseException: the error of that task, ``ResultUnavailable``, or what makes this execution end.
        """

    def said(self) -> Any:
        """Return the value, or the error, of a final state that the body has written itself."""
        raise NotImplementedError

    @property
    def ignores_result(self) -> bool:
        """Whether the value goes nowhere."""
        return False

    def announcement(self, value: Any) -> Announcement | None:
        """Return what to write and publish together with the outcome of this value."""
        return None

    def announced(self) -> None:
        """Note that the announcement was written and published."""

    def owed(self, also: Announcement | None = None) -> bytes | None:
        """Return what recovery needs if this process dies after the outcome is written, and before the caller has it.

        Args:
            also: what is written together with the outcome.

        Returns:
            See ``protocol.settle``. None: recovery is not needed.
        """
        return None

    def owing(self, hold: Hold) -> None:
        """Note that the answer is owed, by a record that this hold has settled, until the caller has it."""

    def shown(self) -> str:
        """Return which action it is, for people. It never raises."""
        return ""

    def replaying(self, own: bool, owed: bool = False) -> None:
        """Note that the answer is that of an earlier execution.

        Args:
            own: of one with the same task id.
            owed: the record says that the answer is owed.
        """

    def answer(self, error: T) -> T:
        """Return an error that answers this call. Nothing has failed now, and an event has said why."""
        return error

    @property
    def waits_long(self) -> bool:
        """Whether to log the wait that begins. Only one wait of a message is logged."""
        return True

    @abstractmethod
    def come_back(
        self, seconds: float, carried: tuple[bytes, ...], why: Why, says: str, busy: Busy | None = None
    ) -> None:
        """Wait. Return when it is time to try again, or raise to end this execution.

        Args:
            seconds: the longest time that makes sense; 0: unknown.
            carried: owners that the message must carry.
            says: more about the reason, for people.
            busy: with ``Why.BUSY``: what the other execution does.
        """


class Runner:
    """Runs jobs against one ledger."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._asking = Bounded("celery_idem reconcile", MAX_HANGING)

    def run(self, job: Job) -> Any:
        """Return the value of the intent, from its body, or from an earlier execution.

        Raises:
            OutcomeUnknown: the intent is in doubt.
            FingerprintMismatch: the intent is known with other values.
            ResultUnavailable: it was done before, and its value was not stored.
            LeaseLost: another execution took over while the body ran.
            StoreError: the store did not answer, and the options say to raise.
            BaseException: the error of the body, now or earlier, or of ``Job.come_back``.
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
        """Ask the destination about an intent in doubt, as a delivery would, and do not run the body.

        Returns:
            ``Replay``: it happened, and that is recorded. ``Acquired``: it did not happen, and the intent is released,
            so that the next delivery runs it. ``InDoubt``: the destination could not tell. ``Busy``: another execution
            holds it, or asks.

        Raises:
            StoreError: the store did not answer.
        """
        policy = job.options.policy
        # Without a task id: with the job's own one, the claim could take over a pending retry.
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

    # --- answers without running ------------------------------------------------------

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
        """Return the stored value, or raise the stored exception."""
        job.replaying(replay.own, replay.owed)
        value, error = answer_of(self.ledger.codec, job.key, replay.outcome, job.ignores_result)
        if error is not None:
            raise job.answer(error)
        return value

    def _lapse(self, job: Job, busy: Busy) -> bool:
        """End the hold of a dead process of this worker, instead of waiting for its lease. Return whether it did.

        The worker's main process does the same, but Celery may run this message before that.
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
        """Act on a store that does not answer before the body (rule 7). Return if the caller should go on."""
        policy = job.options.on_store_error
        if policy == "run" and error.key:  # the store has answered, with a value that is no record
            policy = "raise"
        events.emit(
            "store_error", job.key, task_id=job.task_id, error=str(error), while_="claiming", then=policy
        )
        if policy == "raise":
            raise StoreError(f"{error} Nothing was run for {job.key}.", job.key) from error
        if policy == "retry":
            job.come_back(0.0, carried, Why.STORE, str(error))

    def _unguarded(self, job: Job, request: Request) -> Any:
        """Run without a claim, as the author chose (``on_store_error="run"``), and record the outcome if possible."""
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
        """Release the claims of a body that did not run: under this owner, and under those whose replies were lost."""
        try:
            for owner in (request.owner, *request.carried):
                self.ledger.unwritten(job.key, request._replace(owner=owner)).release(EXIT_PATIENCE)
        except StoreError as error:
            events.emit("unsettled", job.key, task_id=job.task_id, error=str(error))

    def _not_begun(self, job: Job, request: Request, error: BaseException) -> tuple[bytes, ...]:
        """Act on an error before the body: a time limit, an order to exit, or an error of ours. Nothing ran.

        Return the owners to carry, when it is time to try again.
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
        carried = (*request.carried, request.owner)[-MAX_CARRIED:]  # the release may have failed
        job.come_back(0.0, carried, Why.GUARD, why)
        return carried

    def _ask(self, job: Job, hold: Hold, first: bool = False) -> tuple[Decision, Hold | None]:
        """Ask the destination under a lease, within a bounded time (rule 3). ``first``: see ``Ask``."""
        try:
            RENEWER.watch(hold)
            answer = self.bounded(lambda: job.ask(hold), job.options.ask_timeout)
        finally:
            RENEWER.unwatch(hold)
        events.emit("asked", job.key, task_id=job.task_id, answer=type(answer).__name__)
        outcome = self.ledger.outcome_of(answer.result, job.key) if isinstance(answer, Happened) else None
        unknown = answer.reason or "the destination could not tell" if isinstance(answer, Unknown) else ""
        decision, running = hold.conclude(outcome, unknown, job.owed() if outcome is not None else None)
        return (decision._replace(first=first) if isinstance(decision, InDoubt) else decision), running

    def bounded(self, ask: Callable[[], Answer], timeout: float) -> Answer:
        """Ask in a side thread, so that a destination that hangs cannot block this thread for ever."""

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
        """Run the body. Return (True, value), or (False, None): claim again."""
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
            return True, _despite_interruption(
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
            # The value's own code has failed twice. An interruption would have come only once.
            outcome, shown = Outcome(True, None, f"encoding it raised {type(error).__name__}"), value
        if returned:
            also = job.announcement(shown)
            self._settle(job, hold, outcome, patience, also, job.owed(also))
        else:
            self._settle(job, hold, outcome, patience)
        return shown

    # --- in the author's own transaction (rule 9) -----------------------------------------

    def _transacted(self, job: Job, hold: Hold) -> tuple[bool, Any]:
        """Find the outcome of a body that returned after ``settle_in``. It is recorded if the transaction committed.

        If the store does not answer, this is unknown. The transaction may even be open, and block the store. Then the
        next claim finds out, and replays or runs.
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
        """Return whether a transaction has settled the intent; None if the store does not answer.

        An error of the body after the commit cannot change the outcome. It is logged, and every caller gets the value.
        Only an order to exit, and the exceptions in ``SIGNALS``, are raised again.
        """
        if hold.promised is None or (isinstance(error, LeaseLost) and error.key == job.key):
            return False
        exits = error is not None and job.kind_of(error) is Raised.EXIT
        try:
            done = hold.committed(EXIT_PATIENCE if exits else job.options.patience)
        except StoreError as silence:
            events.emit("unsettled", job.key, task_id=job.task_id, error=str(silence))
            if error is not None:
                raise error from None  # a redelivery reads the record, and replays or runs
            return None
        if isinstance(done, Refused):
            raise lease_lost(job.key)
        if done.record.outcome is None:
            return False
        events.emit("settled", job.key, task_id=job.task_id, succeeded=True)
        if hold.owes:
            job.owing(hold)
        if error is not None:
            if exits or job.kind_of(error) in SIGNALS:
                raise error
            events.emit("late_error", job.key, cause=error, task_id=job.task_id, error=type(error).__name__)
        return True

    def _promised(self, job: Job, hold: Hold) -> Any:
        assert hold.promised is not None
        return hold.promised[1]

    def _settle_error(
        self, job: Job, hold: Hold, error: BaseException, patience: float, owed: bytes | None = None
    ) -> None:
        outcome = Outcome(False, self.ledger.codec.encode_error(error, job.key))
        self._settle(job, hold, outcome, patience, None, owed)

    def _settle(
        self,
        job: Job,
        hold: Hold,
        outcome: Outcome,
        patience: float,
        also: Announcement | None = None,
        owed: bytes | None = None,
    ) -> None:
        try:
            done = hold.settle(outcome, patience, also, owed)
        except StoreError as error:
            # Rule 7, after the body: this caller gets the outcome, which is known here. The record stays RUNNING and
            # lapses, and the intent is in doubt for every other caller.
            events.emit("unsettled", job.key, task_id=job.task_id, error=str(error))
            return
        if isinstance(done, Refused):
            raise self._alarm(job, hold, done)
        if hold.announced:
            job.announced()
        if done.record.recovery is not None:
            job.owing(hold)
        events.emit("settled", job.key, task_id=job.task_id, succeeded=outcome.succeeded)

    def _alarm(self, job: Job, hold: Hold, refused: Refused) -> LeaseLost:
        """Emit the alarm that another execution took over while this body ran: there may be two effects (rule 4)."""
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
        """Act on an exception of the body (rule 5). Raises, unless the intent should be claimed again now."""
        causes = job.causes_of(error)
        own = tuple(cause for cause in causes if getattr(cause, "key", None) == job.key)
        if any(isinstance(cause, LeaseLost) for cause in own):
            raise error
        kind = job.kind_of(error)
        if hold.step_unrecorded and any(isinstance(cause, StoreError) for cause in causes):
            self._step_is_unrecorded(job, kind, error)
        ending = protocol.ending(kind, job.options.policy)
        in_step = next((cause for cause in own if isinstance(cause, OutcomeUnknown)), None)
        if in_step is not None:  # the step has written the doubt already
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
            _despite_interruption(
                lambda p, last: self._settle_value(job, hold, job.said(), p, last, False), patience
            )
            raise error
        if kind is Raised.SAID_FAILED:
            failure = job.said()
            _despite_interruption(lambda p, last: self._settle_error(job, hold, failure, p), patience)
            raise error
        if ending is State.FAILED:
            owed = job.owed()
            _despite_interruption(lambda p, last: self._settle_error(job, hold, error, p, owed), patience)
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
                done = hold.release(patience, job.owed())
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
                    raise error if kind is Raised.DOUBTFUL_RETRY else late  # the retry then is a duplicate
                self._in_doubt(job, reason, error)
        except StoreError as silence:
            events.emit("unsettled", job.key, task_id=job.task_id, error=str(silence))
        if done is not None and _is_cancelled(done):
            events.emit("settled", job.key, task_id=job.task_id, succeeded=False)
            if hold.owes:
                job.owing(hold)
            if ending is State.RELEASED:  # otherwise the published retry gets this answer
                raise cancelled(job.key, done.record.outcome) from error
        if ending is not State.IN_DOUBT or kind in (Raised.EXIT, Raised.DOUBTFUL_RETRY):
            raise error  # the published retry asks the destination, or reports the doubt
        if job.options.policy.asks:
            return  # the next claim asks the destination
        raise job.answer(in_doubt(job.key, reason)) from error

    def _step_is_unrecorded(self, job: Job, kind: Raised, error: BaseException) -> None:
        """Come back after the lease, if the store did not answer at a step, and the body may resume.

        The record says how far the body came. A body that may not resume is in doubt.
        """
        if job.options.policy.on_crash == "resume":
            events.emit("unsettled", job.key, task_id=job.task_id, error=str(error))
            if kind is Raised.DOUBTFUL_RETRY:
                raise error  # the published retry comes back
            job.come_back(job.options.policy.lease / MICROSECONDS, (), Why.STEP, str(error))


class _NotBegunError(Exception):
    """An error between the claim and the author's code."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(error)
        self.error = error


def overtaken(done: Done | Refused, hold: Hold) -> TypeGuard[Refused]:
    """Whether this execution's end was refused because another execution, or a person, had taken the intent over."""
    return isinstance(done, Refused) and done.record is not None and done.record.owner != hold.owner


def _despite_interruption(settle: Callable[[float, bool], T], patience: float) -> T:
    """Settle, although a soft time limit or SystemExit may interrupt this at any point.

    The body is done and its outcome known, so the outcome is written first. Writing it twice is harmless.
    """
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
    """Whether the body was asked to stop, and its end counts as cancelled."""
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


def answer_of(
    codec: Codec, key: str, outcome: Outcome, ignored: bool = False
) -> tuple[Any, Exception | None]:
    """Return what an outcome means for a caller: its value, and the exception to raise instead (None: none).

    Args:
        ignored: the value goes nowhere, so it does not matter whether it can be read.
    """
    what, why = "was not stored", outcome.missing
    if outcome.cancelled:
        return None, cancelled(key, outcome)
    if outcome.succeeded and outcome.payload is not None:
        try:
            return codec.decode(outcome.payload, key), None
        except StoreError as unread:  # the action is done
            what, why = "cannot be read here", str(unread)
    if outcome.succeeded and ignored:
        return None, None
    if outcome.payload is None or outcome.succeeded:
        return None, ResultUnavailable(
            f"{key} is done and will not be done again, but its result {what}: {why.removesuffix('.')}.",
            key,
            why,
        )
    error = codec.decode_error(outcome.payload, key)
    if sys.version_info >= (3, 11):  # without the note, its traceback in the log looks like a new failure
        note = (
            f"Nothing was run now: this is how {key} ended earlier. After a bug that is mended, "
            f"`celery -A proj idem forget '{key}'` lets it run again."
        )
        with contextlib.suppress(Exception):  # not add_note, which may run the class's own code, or fail
            own = object.__getattribute__(error, "__dict__")
            own["__notes__"] = [*own.get("__notes__", ()), note]
    return None, error
