"""Looks an intent up: makes a ``Receipt`` from its record, or from Celery's result if the record cannot tell."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from celery_idem.core import keys, protocol
from celery_idem.core.errors import (
    Cancelled,
    FingerprintMismatch,
    IdempotencyError,
    InProgress,
    LeaseLost,
    OutcomeUnknown,
    ResultUnavailable,
    StoreError,
)
from celery_idem.core.model import (
    MICROSECONDS,
    NO_FINGERPRINT,
    Busy,
    Fingerprint,
    InDoubt,
    Mismatch,
    Outcome,
    Policy,
    Replay,
    State,
)
from celery_idem.engine import events
from celery_idem.engine.entries import Entry
from celery_idem.engine.ledger import Ledger
from celery_idem.integration.announcements import Announcements, announcements_of
from celery_idem.integration.guarded import guarded_task
from celery_idem.integration.publishing import in_scope
from celery_idem.integration.receipts import Code, Receipt, Status
from celery_idem.integration.wiring import ledger_of

if TYPE_CHECKING:
    from celery import Celery

ASK_AGAIN = 5.0
"""The longest ``retry_after``, in seconds. A lease says when a dead worker is decided, and not when a living one is
done. Asking again costs one read."""


class Look(NamedTuple):
    """Where a receipt looks again, and for which call.

    Attributes:
        published: the caller has published the delivery whose task id the receipt has.
        secret: the body's error may quote a secret argument of another caller.
    """

    app: Celery | None
    ledger: Ledger | None
    fingerprint: Fingerprint
    policy: Policy
    published: bool
    secret: bool = False

    def look(self, receipt: Receipt) -> Receipt:
        """Look once at the record, and at Celery's result if the record cannot tell."""
        entry = None
        if self.ledger is not None:
            try:
                entry = self.ledger.get(receipt.key)
            except StoreError as error:
                events.emit("store_error", receipt.key, error=str(error), while_="waiting")
        known = None if entry is None else from_record(entry, receipt.key, receipt.task_id, self)
        # Before it has begun, Celery may have ended it (revoked).
        begun = entry is None or entry.record.state is not State.ACCEPTED
        if known is not None and (begun or not self.published):
            return known
        result = from_celery(receipt, self, entry)
        if result is not None:
            return result
        return known or (receipt if entry is None else undecided(entry, receipt, self))

    def announcements(self, receipt: Receipt) -> Announcements | None:
        """Return the application's announcements; None if no result is published for this task."""
        if self.app is None:
            return None
        task = self.app.tasks.get(keys.task_of(receipt.key))
        return None if getattr(task, "ignore_result", False) else announcements_of(self.app)


def look_up(app: Celery, key: str, scope: str | None = None) -> Receipt | None:
    """Return a receipt of what is known of a key; None if nothing is stored for it in this scope.

    In an application that does not have the task, the receipt has only the class of an error. It does not know which
    parameters are secret.

    Args:
        scope: scope of the caller; None: the one of ``idem_scope``. Anyone who knows the arguments can compute a key,
            so the key is no permission: for the record of another scope the answer is None.

    Raises:
        StoreError: the store did not answer.
    """
    task = guarded_task(app, keys.task_of(key) or key)
    guard = None if task is None else task.guard
    ledger = ledger_of(app) if guard is None else guard.ledger
    policy = PLAIN_POLICY if guard is None else guard.options.policy
    scope = in_scope(app.conf.get("idem_scope") if guard is None else guard.settings.scope, scope)
    entry = ledger.get(key)
    if entry is None or entry.record.scope != keys.scope_digest(ledger.namespace, scope):
        return None
    secret = guard is None or bool(guard.declaration.secret)  # without the task, it may have secrets
    source = Look(app, ledger, NO_FINGERPRINT, policy, published=False, secret=secret)
    known = from_record(entry, key, "", source)
    return (
        known if known is not None else undecided(entry, Receipt("in_progress", key, _source=source), source)
    )


PLAIN_POLICY = Policy(lease=0, result_ttl=0, failure_ttl=1 << 62)
"""Only for looking: a failure stays a failure, and no destination is asked."""


def from_record(entry: Entry, key: str, task_id: str, source: Look) -> Receipt | None:
    """Return the receipt of a record that has an answer; None if a delivery must act first.

    Args:
        task_id: task id of the delivery that the caller published; "" for none.
    """
    decision = entry.standing(source.fingerprint, source.policy)
    task_id = task_id or entry.record.task_id
    mine = source.published and entry.record.task_id == task_id
    status: Status
    code: Code
    if isinstance(decision, Replay):
        outcome = decision.outcome
        elsewhere = outcome.replaced_by
        if elsewhere:
            return _replaced(Receipt("in_progress", key, task_id, _source=source), elsewhere, source)
        assert source.ledger is not None
        result, why = _outcome(outcome, key, source.ledger, source.secret)
        if not outcome.succeeded:
            said: Code = "cancelled" if outcome.cancelled else ""
            return Receipt("failed", key, task_id, None, why, said, _source=source)
        status = "executed" if mine else "replayed"
        code = "not_kept" if why else ""
        return Receipt(status, key, task_id, result, why, code, _source=source)
    if isinstance(decision, Mismatch):
        return Receipt("conflict", key, task_id, differs=tuple(decision.differs), _source=source)
    if isinstance(decision, InDoubt):
        return Receipt("in_doubt", key, task_id, None, decision.reason, _source=source)
    if isinstance(decision, Busy):
        status = "accepted" if mine else "in_progress"
        again = round(min(ASK_AGAIN, decision.retry_after / MICROSECONDS), 3)
        not_sent = mine and entry.record.state is State.ACCEPTED and not entry.record.lease
        code = "not_sent" if not_sent else ""
        return Receipt(status, key, task_id, code=code, retry_after=again, _source=source)
    return None


def _outcome(outcome: Outcome, key: str, ledger: Ledger, secret: bool) -> tuple[Any, str]:
    """Return the value, and why there is none: the body's error, or that it was not kept or cannot be read."""
    if outcome.payload is None:
        return None, outcome.missing
    try:
        if outcome.succeeded:
            return ledger.codec.decode(outcome.payload, key), ""
        return None, _words(ledger.codec.decode_error(outcome.payload, key), secret)
    except StoreError as error:  # it is done, and its serializer is not accepted here
        return None, str(error)


def _replaced(receipt: Receipt, task_id: str, source: Look) -> Receipt:
    """Return the receipt of a replaced body. Its result is in Celery's result backend, under the other task's id."""
    mine = source.published and task_id == receipt.task_id  # a replacement may have the same id
    result = from_celery(replace(receipt, task_id=task_id), source._replace(published=True), None)
    if result is None:
        return replace(receipt, status="in_progress", retry_after=ASK_AGAIN)
    if result.status == "executed" and not mine:
        return replace(result, status="replayed")
    if result.code == "unsure":  # the replacement is not run again, so its failure is the answer
        return replace(result, code="")
    return result


def undecided(entry: Entry, receipt: Receipt, source: Look) -> Receipt:
    """Return the receipt of a record that waits for a delivery."""
    state = entry.record.state
    receipt = replace(receipt, task_id=receipt.task_id or entry.record.task_id, retry_after=None)
    if source.published and state is not State.IN_DOUBT:
        return receipt  # that delivery is under way
    if state is State.RELEASED:
        return _released(receipt, entry)
    # With finished steps and after failure_ttl: the next delivery continues after them.
    if state is State.FAILED:
        return replace(receipt, status="not_run", code="partly_done")
    reasons = {State.IN_DOUBT: entry.record.reason, State.SCHEDULED: "its retry is overdue"}
    return replace(receipt, status="in_doubt", code="undecided", reason=reasons.get(state, protocol.CRASHED))


def _released(receipt: Receipt, entry: Entry) -> Receipt:
    return replace(receipt, status="not_run", code="partly_done" if entry.record.steps else "")


def from_celery(receipt: Receipt, source: Look, entry: Entry | None) -> Receipt | None:
    """Return the receipt of Celery's result for the delivery that this call published; None if there is no result."""
    if not source.published or source.app is None:
        return None
    try:
        result = source.app.AsyncResult(receipt.task_id)
        state, value = result.state, result.result
    except Exception as error:  # no backend, or any error of any driver
        events.diagnose(logging.DEBUG, "the result of %s cannot be read: %s", receipt.task_id, error)
        return None
    receipt = replace(receipt, retry_after=None)
    if state == "SUCCESS":
        return replace(receipt, status="executed", result=value)
    standing = None if entry is None else entry.record.state
    released = standing is State.RELEASED
    if state == "REVOKED":
        if entry is not None and not (released or standing is State.ACCEPTED):
            return None  # it had begun, so the record decides
        receipt = replace(receipt, reason="revoked")
        if entry is not None:
            return _released(receipt, entry)
        # Without a ledger, it is unknown whether it had begun.
        return (
            replace(receipt, status="failed", code="unsure")
            if source.ledger is None
            else replace(receipt, status="not_run")
        )
    if state != "FAILURE":
        return None
    receipt = replace(receipt, reason=_words(value, source.secret))
    if isinstance(value, IdempotencyError) and value.key and not receipt.key:
        receipt = replace(receipt, key=value.key)
    if isinstance(value, FingerprintMismatch):
        return replace(receipt, status="conflict", differs=tuple(value.differs))
    if isinstance(value, ResultUnavailable):
        return replace(receipt, status="replayed", reason=value.reason, code="not_kept")
    if isinstance(value, Cancelled):
        return replace(receipt, status="failed", reason=value.reason, code="cancelled")
    if isinstance(value, InProgress):
        return replace(receipt, status="in_progress", retry_after=value.retry_after)
    if isinstance(value, (OutcomeUnknown, LeaseLost)):
        return replace(receipt, status="in_doubt")
    if entry is not None and released:
        return _released(receipt, entry)
    if isinstance(value, StoreError):
        return replace(receipt, status="not_run", code="store_error")
    # No record says that the body failed, so it may not have run: Celery also reports a failure when its connection to
    # the result backend breaks before or after a body. If failures are not kept, no record can be expected.
    forgotten = source.ledger is not None and entry is None and source.policy.failure_ttl == 0
    return replace(receipt, status="failed", code="" if forgotten else "unsure")


def _words(error: object, secret: bool) -> str:
    return type(error).__name__ if secret else f"{type(error).__name__}: {error}"
