"""``submit_in`` and ``submit_on_commit``: a call that belongs to a transaction of the author's database."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from celery_idem.core.errors import ConfigurationError, StoreError
from celery_idem.core.model import MICROSECONDS, Accepted, State
from celery_idem.engine import events
from celery_idem.integration import transactions
from celery_idem.integration.guarded import GuardedTask
from celery_idem.integration.looking import undecided
from celery_idem.integration.publishing import in_scope
from celery_idem.integration.receipts import Receipt
from celery_idem.integration.submitting import (
    ACCEPTED_FOR,
    Submission,
    accepted,
    look_again,
    submit_call,
    without_store,
)

FIRST = 1.0
"""Seconds until recovery publishes a call that was accepted in a transaction. Most commits are faster, and the process
then publishes the call itself. If it died before that, or the connection has no hook, the caller waits this long, and
for recovery's next look."""


def submit_in(
    task: GuardedTask,
    connection: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    own: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Receipt:
    """See ``IdempotentTask.submit_in``."""
    guard, ledger = task.guard, task.guard.ledger
    if not ledger.store.transactional:
        raise ConfigurationError(
            f"{task.name}: submit_in writes the record in your transaction, and the records are in {ledger.store.url}. "
            "Point idem_store at your database (postgresql://… or sqlite:///…), or use "
            "task.submit_on_commit(connection, …), which does not survive a crash right after the commit."
        )
    own = {**own, "scope": in_scope(guard.settings.scope, own["scope"])}
    call = Submission(task, args, kwargs, own, options, FIRST)
    if guard.settings.shadow or not call.recovers:
        why = (
            "in shadow mode there is no record"
            if guard.settings.shadow
            else (
                "recovery must be able to publish the call from its record, which holds secret values only with "
                "idem_seal_keys, and nothing larger than max_call_bytes or with keep_call=False; and recover=False "
                "turns it off"
            )
        )
        raise ConfigurationError(f"{task.name}: submit_in does not work here: {why}.")
    try:
        decision, entry = ledger.inside(connection).accept(call.key, call.request, call.wait)
    except StoreError as error:  # errors of the author's own connection are the author's
        return without_store(call, error, may_run=False)
    if decision is None:
        return undecided(entry, Receipt("in_progress", call.key, _source=call.source), call.source)
    if not isinstance(decision, Accepted):
        return call.told(entry)
    transactions.after(connection, lambda: _publish_committed(call))
    return accepted(call.key, call.task_id, call.mine)


def _publish_committed(call: Submission) -> None:
    """Publish a call after the author's transaction, if that has committed its record. It never raises."""
    ledger, key, owner = call.task.guard.ledger, call.key, call.request.owner
    try:
        entry = ledger.get(key)
        if entry is None or entry.record.owner != owner or entry.record.state is not State.ACCEPTED:
            return
        if entry.record.recovery is None:  # otherwise recovery was faster
            call.as_accepted()
            call.publish(entry)
            look_again(ledger, key, owner, ACCEPTED_FOR + call.wait / MICROSECONDS)
    except Exception as error:  # of a store, or of any broker's driver
        events.emit("broker_error", key, task_id=call.task_id, error=type(error).__name__)


def submit_on_commit(
    task: GuardedTask,
    connection: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    own: Mapping[str, Any],
    options: Mapping[str, Any],
) -> None:
    """See ``IdempotentTask.submit_on_commit``."""
    own = {**own, "scope": in_scope(task.guard.settings.scope, own["scope"])}
    key = Submission(task, args, kwargs, own, options).key  # an error of the call is raised before the commit

    def submit() -> None:
        try:
            receipt = submit_call(Submission(task, args, kwargs, own, options))
            if receipt.status != "not_run":
                return
            error: object = receipt.reason
        except Exception as raised:  # of a store, or of any broker's driver
            error = raised
        events.diagnose(
            logging.ERROR, "%s: its transaction is committed, and the call is not accepted: %s", key, error
        )

    if not transactions.on_commit(connection, submit):
        raise ConfigurationError(
            f"{task.name}: submit_on_commit takes a SQLAlchemy session, or Django's connection. With any other "
            "connection, call submit() after the commit."
        )
