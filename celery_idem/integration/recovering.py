"""Recovery: publishes open intents that are past their deadline again, from their records.

A thread in each worker's main process looks for them. ``protocol.recover`` says what is overdue. One process takes it
with a compare-and-set and publishes it, and the delivery decides what becomes of the action, as any other delivery. The
caller gets the answer, because the message has the same task id.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from celery.app.task import Context
from celery.states import READY_STATES

from celery_idem.core.calls import Call
from celery_idem.core.errors import StoreError
from celery_idem.core.model import Outcome, Publish, Record, Tell
from celery_idem.engine import events, runner
from celery_idem.engine.entries import Entry
from celery_idem.engine.ledger import Ledger
from celery_idem.integration import answers, messages
from celery_idem.integration.guarded import GuardedTask, guarded_task, guarded_tasks
from celery_idem.integration.looks import FORKS, Beside, Looks

if TYPE_CHECKING:
    from celery import Celery

FIRST = 1.0
"""Longest time until the first look, in seconds: after the death of a host, its callers wait for new workers."""

EVERY = 1.5
"""Seconds between looks. A look is one read of the index. At this rate, the caller of a dead worker has the answer five
seconds after the lease, at the latest."""

PAUSE = 0.005
"""Seconds between two publications. So each worker publishes at most 200 a second, and a backlog from an outage does
not delay new calls."""

BROKER_PAUSE = 2.0
"""Seconds until the next try after the broker did not take a call. Doubled each time, up to ``LONGEST_PAUSE``."""

LONGEST_PAUSE = 30.0


class Found(NamedTuple):
    """One overdue intent.

    Attributes:
        published: its call was published again (with ``dry_run``: it would be).
        why: why not, for people; "" if it was.
    """

    entry: Entry
    published: bool
    why: str = ""


def ledgers_of(app: Celery) -> list[Ledger]:
    """Return the ledgers of an application's guarded tasks, each store and namespace once."""
    found: dict[tuple[int, str], Ledger] = {}
    for task in guarded_tasks(app):
        if not task.guard.settings.shadow:
            ledger = task.guard.ledger
            found[id(ledger.store), ledger.namespace] = ledger
    return list(found.values())


def recover(app: Celery, dry_run: bool = False, ended: threading.Event | None = None) -> Iterator[Found]:
    """Publish what is overdue again, oldest first.

    Args:
        dry_run: publish nothing.
        ended: stop when it is set.

    Raises:
        StoreError: a store does not answer.
        messages.BrokerError: the broker does not take a message.
    """
    ended = ended or threading.Event()
    for ledger in ledgers_of(app):
        for entry in ledger.overdue():
            with FORKS.held_off:
                found = _recover(app, ledger, entry, dry_run)
            if found is not None:
                yield found
            if ended.wait(PAUSE if found is not None and found.published and not dry_run else 0.0):
                return


def _recover(app: Celery, ledger: Ledger, entry: Entry, dry_run: bool) -> Found | None:
    task = guarded_task(app, entry.task)
    if task is None:
        return Found(entry, False, "no task of this application has that name")
    guard = task.guard
    call: Call | None = None

    def publishable(record: Record) -> bool:
        nonlocal call
        call, _ = messages.call_in(app, entry.key, record.call)
        return bool(guard.settings.recover and call is not None and call.publishable)

    def elsewhere(record: Record) -> bool:
        return call is not None and call.broker not in ("", guard.broker)

    if dry_run:
        can = publishable(entry.record)
        then = entry.overdue(can, guard.options.policy, elsewhere(entry.record))
        told = TOLD if entry.record.outcome is None else ANSWERED
        why = (
            told
            if isinstance(then, Tell)
            else why_not(app, entry.key, entry.record, guard.settings.recover) or ITS_OWN_FIRST
        )
        return Found(entry, isinstance(then, Publish), "" if isinstance(then, Publish) else why)
    try:
        taken = ledger.recover(entry.key, publishable, guard.options.policy, elsewhere)
    except StoreError as error:
        if not error.key:
            raise
        # Sealed with a key that this process does not have; go on with others.
        return Found(entry, False, str(error))
    if isinstance(taken, Tell):
        try:
            _tell(app, task, entry.key, taken, call)
        except Exception as error:  # of any result backend; recovery tries again later
            why = f"its caller could not be told ({type(error).__name__}: {error})"
            events.diagnose(logging.WARNING, "recovery: %s: %s", entry.key, why)
            return Found(entry, False, why)
        ledger.answered(entry.key, taken, guard.options.policy)
        return Found(entry, False, TOLD if taken.record.outcome is None else ANSWERED)
    if taken is None or call is None:
        why = why_not(app, entry.key, entry.record, guard.settings.recover)
        return Found(entry, False, why) if why else None
    outcome = taken.record.outcome
    if outcome is not None and _has_answer(app, task, entry.key, call, outcome):
        ledger.answered(entry.key, taken, guard.options.policy)
        return Found(entry, False, ANSWERED)
    if messages.expired(app, call):  # some brokers drop such a message, and then no worker tells the caller
        ledger.revoked(entry.key, call.task_id, guard.options.policy)
        if not task.ignore_result:
            task.backend.mark_as_revoked(call.task_id, "expired")
        return Found(entry, False, "it expired before a worker began it")
    try:
        messages.publish(app, entry.key, call)
    except Exception as error:  # of any driver, router or serializer
        # The next try then comes as late as after a publication.
        if messages.of_its_place(error) or not messages.of_the_broker(app, error):
            why = f"no message can be made of its call ({type(error).__name__}: {error})"
            events.diagnose(logging.WARNING, "recovery: %s: %s", entry.key, why)
            return Found(entry, False, why)
        ledger.not_published(entry.key, taken)
        events.emit("broker_error", entry.key, task_id=call.task_id, error=type(error).__name__)
        raise messages.BrokerError(f"the broker did not take {entry.key} ({type(error).__name__})") from error
    tries = taken.record.recovery.tries if taken.record.recovery else 0
    events.emit("recovered", entry.key, task_id=call.task_id, tries=tries, state=entry.state)
    return Found(entry, True)


def _has_answer(app: Celery, task: GuardedTask, key: str, call: Call, outcome: Outcome) -> bool:
    """Whether the caller of a settled intent has its answer, though its worker did not live to say so."""
    try:
        request = messages.request_of(app, key, call)
        return answers.kind_of(task).has_answer(task.backend, request, outcome)
    except Exception as error:  # of any serializer, or of any result backend
        events.diagnose(logging.WARNING, "recovery: %s: is its caller answered? %s", key, error)
        return False


ITS_OWN_FIRST = "it came from another broker, whose workers come first"
TOLD = "it is in doubt, and its caller is told"
ANSWERED = "it is settled, and its caller gets the answer, if it has none"


def _tell(app: Celery, task: GuardedTask, key: str, taken: Tell, call: Call | None) -> None:
    """Tell the caller, and its chain, chord and errbacks, the outcome, or that the intent is in doubt.

    No delivery will. If Celery keeps no result, it is unknown whether they were told before. They are then told once,
    by ``taken.first``, so that no errback is called twice.
    """
    record = taken.record
    try:
        request = messages.request_of(app, key, call) if call is not None else Context(id=record.task_id)
    except Exception as error:  # of any serializer
        events.diagnose(logging.WARNING, "%s: only its own caller is told: %s", key, error)
        request = Context(id=record.task_id)
    stored = not request.ignore_result or bool(task.store_errors_even_if_ignored)
    try:
        if record.outcome is None:
            known = task.backend.get_state(record.task_id) in READY_STATES
        else:
            known = answers.is_answered(task.backend, record.task_id, record.outcome)
    except NotImplementedError:  # there is no result backend
        known = stored = False
    if known or not (stored or taken.first):
        return
    value: Any = None
    why: Exception | None = runner.in_doubt(key, record.reason)
    if record.outcome is not None:
        value, why = runner.answer_of(task.guard.ledger.codec, key, record.outcome)
    if why is None:
        task.backend.mark_as_done(record.task_id, value, request=request, store_result=stored)
    else:
        task.backend.mark_as_failure(record.task_id, why, request=request, store_result=stored)


def why_not(app: Celery, key: str, record: Record, recover: bool = True) -> str:
    """Return why a record's call cannot be published again, for people; "" if it can."""
    call, why = messages.call_in(app, key, record.call)
    if call is None:
        return why
    if call.hidden:
        return messages.NO_SECRETS
    if not call.publishable:
        return "it was called directly, without a message"
    return "" if recover else "its task says recover=False"


class Recoverer(Looks):
    """The recovering thread of a worker's main process."""

    def __init__(self, app: Celery) -> None:
        super().__init__("recovery", self._recover, FIRST, EVERY)
        self._app = app
        self._pause = BROKER_PAUSE

    def _recover(self, ended: threading.Event) -> None:
        try:
            for _ in recover(self._app, ended=ended):
                self._pause = BROKER_PAUSE
        except messages.BrokerError as error:
            events.diagnose(logging.WARNING, "recovery: %s; trying again in %g s", error, self._pause)
            ended.wait(self._pause)
            self._pause = min(2 * self._pause, LONGEST_PAUSE)


BESIDE = Beside(lambda app: Recoverer(app) if any(guarded_tasks(app)) else None)
