"""Shadow mode: runs everything, and notes what would have been collapsed or refused.

The same protocol runs over separate records (``Ledger.shadow``), so that no shadow record can be replayed. Bodies run
as if there were no guard: without a claim and without steps, whatever was decided, and even if the store does not
answer.
"""

from __future__ import annotations

import time
from typing import Any

from celery_idem.core import protocol
from celery_idem.core.model import (
    Acquired,
    Ask,
    Busy,
    InDoubt,
    Mismatch,
    Outcome,
    Raised,
    Replay,
    Request,
    State,
    Would,
)
from celery_idem.engine import events, owners
from celery_idem.engine.claim import Hold
from celery_idem.engine.lease import RENEWER
from celery_idem.engine.ledger import Ledger
from celery_idem.engine.runner import Job, Runner

_WOULD: dict[type[Any], Would] = {
    Replay: Would.REPLAY,
    Busy: Would.BUSY,
    Mismatch: Would.MISMATCH,
    InDoubt: Would.IN_DOUBT,
    Ask: Would.IN_DOUBT,
}

QUIET = 30.0
"""Seconds without shadow work after the store did not answer. Shadow mode must not slow tasks down, and each call to a
store that hangs takes its timeout."""

NO_RESULT = "shadow mode keeps no results"


class ShadowRunner(Runner):
    """Runs every job, and keeps shadow records."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__(ledger)
        self._shadow = ledger.shadow()
        self._quiet_until = 0.0

    def run(self, job: Job) -> Any:
        """Run the body, and return its value."""
        # A question to the destination has a cost, and recovery leaves shadow records alone.
        policy = job.options.policy._replace(asks=False, indexed=False)
        request = Request(owners.mint(), job.task_id, job.fingerprint, policy, (), job.digests, job.scope)
        shadow = self._claim(job, request)
        hold = self._shadow.unwritten(job.key, request)
        try:
            value = job.body(hold)
        except BaseException as error:
            self._end(job, shadow, protocol.ENDINGS[job.kind_of(error)], error)
            raise
        else:
            again = hold.retries.signal if hold.retries is not None else None
            self._end(job, shadow, State.SCHEDULED if again else State.SUCCEEDED, again)
            return value
        finally:
            if shadow is not None:
                RENEWER.unwatch(shadow)

    def _claim(self, job: Job, request: Request) -> Hold | None:
        """Claim the shadow record, and return its hold. Without one, note why, and return None."""
        if time.monotonic() < self._quiet_until:
            return None
        hold = None
        try:
            decision, hold = self._shadow.claim(job.key, request)
            if isinstance(decision, Acquired):
                assert hold is not None
                RENEWER.watch(hold)
                return hold
            would = _WOULD[type(decision)]
            reason = decision.reason if isinstance(decision, InDoubt) else ""
            differs = decision.differs if isinstance(decision, Mismatch) else ()
            events.emit(
                "shadow",
                job.key,
                task_id=job.task_id,
                would=would.name.lower(),
                why=reason or ", ".join(differs),
            )
            self._shadow.note_shadow(job.key, would, reason, differs, request)
        except Exception as error:  # of a store, or no thread for the lease
            if hold is not None:
                RENEWER.unwatch(hold)
            self._be_quiet(job, error)
        return None

    def _end(self, job: Job, shadow: Hold | None, ending: State, error: BaseException | None) -> None:
        if shadow is None:
            return
        try:
            if ending is State.SCHEDULED:
                assert error is not None
                shadow.schedule(job.retry_delay(error), 0.0)
            elif ending is State.RELEASED:
                shadow.release(0.0)
            elif ending is State.IN_DOUBT:
                shadow.doubt(type(error).__name__, 0.0)
            else:
                shadow.settle(Outcome(ending is State.SUCCEEDED, None, NO_RESULT), 0.0)
        except Exception as silence:
            self._be_quiet(job, silence)

    def _be_quiet(self, job: Job, error: Exception) -> None:
        """Stop shadow work for a while after an error, which must not reach the body."""
        # It may interrupt at any point, and is no error of the shadow.
        if job.kind_of(error) is Raised.TIME_LIMIT:
            raise error
        self._quiet_until = time.monotonic() + QUIET
        events.emit(
            "store_error", job.key, task_id=job.task_id, error=str(error), while_="shadowing", then="run"
        )
