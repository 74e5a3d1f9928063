"""Shadow mode: run everything, and note what would have been collapsed or refused.

The same protocol runs over records of its own (``Ledger.shadow``), so that nothing a shadow
wrote can ever be replayed. Bodies run as if there were no guard: without a claim that counts,
without steps, whatever was decided and whether or not the store answers.
"""

from __future__ import annotations

import time
from typing import Any

from celery_idem.core import protocol
from celery_idem.core.model import (
    Acquired,
    Ask,
    Busy,
    Decision,
    InDoubt,
    Mismatch,
    Outcome,
    Raised,
    Replay,
    Request,
    State,
)
from celery_idem.engine import events, owners
from celery_idem.engine.claim import Claim
from celery_idem.engine.lease import RENEWER
from celery_idem.engine.ledger import Ledger
from celery_idem.engine.runner import Job, Runner

WOULD: dict[type[Any], str] = {
    Replay: "replay",
    Busy: "busy",
    Mismatch: "mismatch",
    InDoubt: "in_doubt",
    Ask: "in_doubt",
}

QUIET = 30.0
"""Seconds without any shadow work after the store did not answer: a shadow must not slow anything
down, and a store that hangs costs its timeout at each call."""

NO_RESULT = "shadow mode keeps no results"


class ShadowRunner(Runner):
    """Runs every job, and keeps shadow records beside."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__(ledger)
        self._shadow = ledger.shadow()
        self._quiet_until = 0.0

    def run(self, job: Job) -> Any:
        """The value of the body, run now."""
        policy = job.options.policy._replace(asks=False)  # a question to the destination is not free
        request = Request(owners.mint(), job.task_id, job.fingerprint, policy, (), job.digests, job.scope)
        claim = self._claim(job, request)
        own = Claim.unguarded(job.key, request)
        try:
            value = job.body(own)
        except BaseException as error:
            self._end(job, claim, protocol.ENDINGS[job.kind_of(error)], error)
            raise
        else:
            again = own._retries.signal if own._retries is not None else None
            self._end(job, claim, State.SCHEDULED if again else State.SUCCEEDED, again)
            return value
        finally:
            if claim is not None:
                RENEWER.unwatch(claim, self._shadow)

    def _claim(self, job: Job, request: Request) -> Claim | None:
        """The shadow's claim; None when it did not get one, and then that is noted."""
        if time.monotonic() < self._quiet_until:
            return None
        claim = None
        try:
            decision, claim = self._shadow.claim(job.key, request)
            if isinstance(decision, Acquired):
                assert claim is not None
                RENEWER.watch(claim, self._shadow, request.policy.lease)
                return claim
            would, evidence = _would(decision)
            events.emit("shadow", job.key, task_id=job.task_id, would=would, why=evidence)
            self._shadow.note_shadow(job.key, would, evidence, request)
        except Exception as error:  # that of a store, or no thread for the lease
            if claim is not None:
                RENEWER.unwatch(claim, self._shadow)
            self._be_quiet(job, error)
        return None

    def _end(self, job: Job, claim: Claim | None, ending: State, error: BaseException | None) -> None:
        if claim is None:
            return
        try:
            if ending is State.SCHEDULED:
                assert error is not None
                self._shadow.schedule(claim, job.retry_delay(error), 0.0)
            elif ending is State.RELEASED:
                self._shadow.release(claim, 0.0)
            elif ending is State.IN_DOUBT:
                self._shadow.doubt(claim, type(error).__name__, 0.0)
            else:
                self._shadow.settle(claim, Outcome(ending is State.SUCCEEDED, None, NO_RESULT), 0.0)
        except Exception as silence:
            self._be_quiet(job, silence)

    def _be_quiet(self, job: Job, error: Exception) -> None:
        """Whatever goes wrong with the shadow's own work is no concern of the body."""
        if job.kind_of(error) is Raised.TIME_LIMIT:  # that is not the shadow's error: it fires anywhere
            raise error
        self._quiet_until = time.monotonic() + QUIET
        events.emit("store_error", job.key, error=str(error), while_="shadowing", then="run")


def _would(decision: Decision) -> tuple[str, str]:
    """What a guard would have done, and more about it."""
    if isinstance(decision, Mismatch):
        return "mismatch", ", ".join(decision.differs)
    return WOULD[type(decision)], decision.reason if isinstance(decision, InDoubt) else ""
