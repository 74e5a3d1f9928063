"""Runs a failed action again, with the arguments of its call."""

from __future__ import annotations

from typing import NamedTuple

from celery_idem.core.errors import IdempotencyError, StoreError
from celery_idem.core.model import State
from celery_idem.core.sealing import check
from celery_idem.engine.entries import Entry
from celery_idem.integration import messages
from celery_idem.integration.publishing import HIDDEN
from celery_idem.integration.submitting import Submission, submit_call
from celery_idem.integration.task import IdempotentTask
from celery_idem.operate.operators import Arguments, Operator


class Labels(NamedTuple):
    """What identifies a call beside its arguments."""

    scope: str | None = None
    occurrence: str | None = None
    idempotency_key: str | None = None


class Retried(NamedTuple):
    """What became of one intent.

    Attributes:
        task_id: id of the published message; "" if none was published, and with ``dry_run``.
        why: why nothing was published, for people; "" if it was, or would be.
        later: the broker did not take the message. The call is accepted, and recovery publishes it.
    """

    task_id: str = ""
    why: str = ""
    later: bool = False


def retry(
    operator: Operator,
    entry: Entry,
    given: Arguments | None = None,
    labels: Labels | None = None,
    dry_run: bool = False,
    by: str = "",
) -> Retried:
    """Let an intent that failed or was released run again, and publish its call.

    Args:
        given: arguments of the call, if the operator knows them. Otherwise they come from the record, which holds the
            call while the intent is open, or from the result backend (``result_extended``).
        labels: the call's scope, occurrence and own key. The record has only digests of them.
        dry_run: publish nothing.
        by: who decides.
    """
    task = operator.task_of(entry.key)
    if task is None:
        return Retried(why=f"this application has no task {entry.task}")
    if entry.record.state not in (State.FAILED, State.RELEASED):
        return Retried(why=_REFUSED.get(entry.state, f"it is {entry.state}"))
    call, _ = messages.call_in(operator.app, entry.key, entry.record.call)
    of_record = entry.record.state is State.RELEASED and call is not None and call.publishable
    if given is None and call is not None and of_record:
        if not dry_run:
            try:
                messages.publish(operator.app, entry.key, call)
            except Exception as error:  # of any driver, router or serializer; go on with other intents
                broker = messages.of_the_broker(operator.app, error)
                what = "the broker did not take it" if broker else "no message can be made of it"
                return Retried(why=f"{what} ({type(error).__name__}), and it stays as it is")
        return Retried("" if dry_run else call.task_id)
    known, why = (given, "") if given is not None else operator.arguments_of(entry)
    if known is None:
        if entry.record.outcome is not None:
            why = "the record of a failure has none"
        return Retried(
            why=f"its arguments are not known: {why}. Give them (--arguments FILE), or set "
            "result_extended=True, so that the result backend keeps those of future calls"
        )
    labels = labels or Labels()
    why = _of_another(task, entry, known, labels)
    try:  # before the failure is forgotten
        check(task.guard.ledger.codec.seal, entry.record, entry.key)
    except StoreError as error:
        why = why or str(error).removesuffix(".")
    if why or dry_run:
        return Retried(why=why)
    operator.forget(entry.key, by=by)
    try:
        receipt = submit_call(Submission(task, known.args, known.kwargs, labels._asdict(), {}))
    except Exception as error:  # of any driver, router or serializer: recovery could not publish it either
        what = f"its failure is forgotten, and its call was not published ({type(error).__name__})"
        return Retried(why=f"{what}. Make the call again")
    if receipt.status == "not_run":
        return Retried(why="its failure is forgotten, and the call did not get in. Make the call again")
    if receipt.status != "accepted":
        return Retried(why=f"another call came first: {receipt.status}")
    return Retried(receipt.task_id, later=receipt.code == "not_sent")


_REFUSED = {
    "succeeded": "it succeeded, and a retry would do it twice. `idem forget` lets it happen again",
    "cancelled": "it was cancelled. `idem forget` lets it happen again",
    "in_doubt": "it is in doubt. `idem resolve` first",
    "lapsed": "it is in doubt. `idem resolve` first",
}


def _of_another(task: IdempotentTask, entry: Entry, known: Arguments, labels: Labels) -> str:
    """Return why these arguments are not those of the intent; "" if they are."""
    declaration = task.guard.declaration
    try:
        bound = declaration.bind(*known)
        key = declaration.key(task.guard.ledger.namespace, bound, *labels)
    except (TypeError, IdempotencyError) as error:
        return "its arguments do not fit" if declaration.secret else f"its arguments do not fit: {error}"
    if any(bound.get(name) == HIDDEN for name in declaration.secret):
        return "its secret values are not known. Give them (--arguments FILE)"
    if key != entry.key:
        return (
            "its arguments make another key. If the call had a scope, an occurrence or a key of its caller's, give "
            "--scope, --occurrence or --idempotency-key"
        )
    return ""
