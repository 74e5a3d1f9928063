"""The caller's door: look an intent up, publish only what is new, and say where it stands.

Callers here are models and orchestrators that retry whatever looks like an error. So
everything the ledger knows already is a value: a ``Receipt`` with a status and one
sentence that says what to do next.

===========  ====================================================================
status       meaning
===========  ====================================================================
accepted     published by this call, and not done yet
executed     done, by the delivery that this call published
replayed     done, by another one; this call did nothing
in_progress  somebody else's delivery holds it
conflict     the same intent is known with other values; ``differs`` names them
in_doubt     it may have happened; nobody here can know
failed       the body failed, or nothing was done: ``next`` says which
===========  ====================================================================
"""

from __future__ import annotations

import base64
import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, datetime
from datetime import time as clock_time
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from kombu.utils.imports import symbol_by_name

from celery_idem.core import keys, protocol
from celery_idem.core.errors import (
    ConfigurationError,
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
from celery_idem.integration.wiring import ledger_of

if TYPE_CHECKING:
    from celery import Celery

    from celery_idem.integration.task import IdempotentTask

Status = Literal["accepted", "executed", "replayed", "in_progress", "conflict", "in_doubt", "failed"]

PENDING: tuple[Status, ...] = ("accepted", "in_progress")
"""Statuses that may still change without anybody's doing."""

FIRST_LOOK = 0.02
"""Seconds until ``wait`` looks again first: the shortest way through a broker and a worker."""

LOOK_GROWTH = 1.5
"""Growth per look: the answer is seen at most half as long after the end as the body ran."""

LONGEST_LOOK = 1.0
"""Seconds between looks at most: one small read a second is nothing to a store, and a
person or a model does not notice a second after a minute."""

ASK_AGAIN = 5.0
"""Seconds in ``retry_after`` at most. A lease says when a dead worker is decided, not when a
living one is done, and asking costs one read."""

# What a model is told. Each sentence says whether it may call again.
RUNNING = "Accepted and running. Do NOT call again, also not with reworded arguments."
DONE = "Done. Report it as done."
DONE_EARLIER = "Already done earlier; nothing was done now. Report it as done."
CONFLICT = (
    "Key already used with different {differs}. If this is a different action, give it another occurrence; "
    "otherwise stop."
)
MAY_HAVE_HAPPENED = "It may have happened. Do not retry; a person must resolve it."
WORKER_GONE = "Nobody is working on it any more. Call again once, unchanged: that decides what happened."
FINAL_FAILURE = "It was tried and failed; calling again unchanged gives this same answer. Report the failure."
UNSURE_FAILURE = (
    "It failed. Safe to call again unchanged, once: it is tried again where nothing was done, else this answer stays. "
    "Then report the failure."
)
NOTHING_DONE = "Nothing was done. Safe to call again unchanged."
PARTLY_DONE = "Only its finished steps are done. Safe to call again unchanged: it goes on after them."
NOT_RUN_NOW = "The store did not answer, so nothing was run now. Safe to call again unchanged."
CALL_AGAIN = (NOTHING_DONE, PARTLY_DONE, NOT_RUN_NOW)
NO_RESULT = " Its result was not kept."


class _Source(NamedTuple):
    """Where a receipt looks again. Not part of its value."""

    app: Celery | None
    ledger: Ledger | None
    fingerprint: Fingerprint
    policy: Policy
    published: bool
    secret: bool = False  # what the body says of an error may quote a secret argument of another caller


@dataclass(frozen=True)
class Receipt:
    """Where one intent stands, as one caller may know it.

    Attributes:
        status: see the table above.
        key: the idempotency key; "" while it is not known here, because the task was
            submitted by name and only its worker knows its signature.
        task_id: Celery's id of the delivery that this call published, else of the
            execution that stands in the record; "" where there is none.
        result: the value, when done and kept.
        reason: why there is no result: the error of a body that failed (of a task with
            secret parameters its class only), what makes it
            doubtful, why the value was not kept; "" otherwise.
        differs: names of parameters whose values differ from the first call's; never values.
        retry_after: seconds after which asking again makes sense; None when it does not.
        next: one sentence that tells a model, or a person, what to do.
    """

    status: Status
    key: str
    task_id: str = ""
    result: Any = None
    reason: str = ""
    differs: tuple[str, ...] = ()
    retry_after: float | None = None
    next: str = ""
    _source: _Source | None = field(default=None, repr=False, compare=False)

    @property
    def done(self) -> bool:
        """The action is done, now or earlier."""
        return self.status in ("executed", "replayed")

    @property
    def final(self) -> bool:
        """The answer stays the same however often the call is repeated."""
        return self.done or (self.status == "failed" and self.next == FINAL_FAILURE)

    def wait(self, timeout: float = 30.0) -> Receipt:
        """Wait until the answer is known.

        Args:
            timeout: seconds. 30 by default: the default lease, after which a dead worker is decided.

        Returns:
            A new receipt: still ``accepted`` or ``in_progress`` when the time was not enough.
        """
        receipt = self
        deadline = time.monotonic() + timeout
        pause = FIRST_LOOK
        while receipt.status in PENDING and self._source is not None:
            receipt = self._look(self._source)
            left = deadline - time.monotonic()
            if receipt.status not in PENDING or left <= 0:
                break
            threading.Event().wait(min(pause, left))
            pause = min(pause * LOOK_GROWTH, LONGEST_LOOK)
        return receipt

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON values, always with the same fields in the same order."""
        return {
            "status": self.status,
            "key": self.key,
            "task_id": self.task_id,
            "result": plain(self.result),
            "reason": self.reason,
            "differs": list(self.differs),
            "retry_after": self.retry_after,
            "next": self.next,
        }

    def _look(self, source: _Source) -> Receipt:
        """One look at the record, and at Celery's result where the record cannot tell."""
        entry = None
        if source.ledger is not None:
            try:
                entry = source.ledger.get(self.key)
            except StoreError as error:
                events.emit("store_error", self.key, error=str(error), while_="waiting")
            if entry is not None:
                known = _told(entry, self.key, self.task_id, source)
                if known is not None:
                    return known
        result = _celery_result(self, source, entry)
        if result is not None:
            return result
        return self if entry is None else _undecided(entry, self)


def in_scope(setting: Any, given: Any = None) -> str | None:
    """The scope of a call that is made here and now, in normal form.

    Args:
        setting: ``idem_scope``, or the task's own.
        given: what the call says; it goes before.

    Raises:
        IntentError: it cannot be a scope.
    """
    if given is None and setting is not None:
        given = symbol_by_name(setting)()
    return keys.label("scope", given)


PUBLISHED_FOR = 30.0
"""Seconds for which a repeat of something published and not yet claimed is not published again: most queues are
quicker, and one whose message got lost is published again after so long."""

PUBLISHED_MAX = 10_000
"""Intents remembered at once, about 5 MB. The oldest is forgotten first: its repeat is one more message."""


class Published:
    """What this process has published and no worker has claimed: no record says so yet."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[str, Fingerprint], tuple[float, int, str]] = OrderedDict()

    def first(self, key: str, fingerprint: Fingerprint, fence: int, ended: Callable[[str], bool]) -> bool:
        """Is the caller the first to publish this intent? Then it is remembered.

        Args:
            fence: of its record, 0 without one. Another one since: the message was claimed.
            ended: whether the message with this task id came to an end, as Celery knows it.
        """
        now = time.monotonic()
        call = (key, fingerprint)
        with self._lock:
            until, seen, task_id = self._known.get(call, (0.0, fence, ""))
        if until > now and seen == fence and not (task_id and ended(task_id)):
            return False
        with self._lock:
            if self._known.get(call, (0.0,))[0] > until:  # another thread was faster
                return False
            self._known[call] = (now + PUBLISHED_FOR, fence, "")
            self._known.move_to_end(call)
            while len(self._known) > PUBLISHED_MAX:
                self._known.popitem(last=False)
        return True

    def done(self, key: str, fingerprint: Fingerprint, task_id: str | None) -> None:
        """It was published under this task id; None: it was not."""
        call = (key, fingerprint)
        with self._lock:
            known = self._known.pop(call, None)
            if known is not None and task_id is not None:
                self._known[call] = (*known[:2], task_id)


def submit(
    app: Celery,
    name: str,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    scope: str | None = None,
    occurrence: str | None = None,
    idempotency_key: str | None = None,
    **options: Any,
) -> Receipt:
    """``IdempotentTask.submit`` by the task's name.

    An application that does not have the task (an orchestrator without task classes)
    cannot derive the key: it does not know the signature. Then everything that the
    worker needs to derive it is published, every time, and the worker decides. Such a
    receipt has no ``key``, learns its answer from Celery's result, and calls every
    success ``executed``, because a replay looks the same from there.

    Args:
        options: more options of ``apply_async``, such as ``queue``.

    Raises:
        ConfigurationError: the task is known here, and has no intent.
        TypeError, IntentError, kombu.exceptions.OperationalError: as ``IdempotentTask.submit``.
    """
    keys.check_call(name, args, kwargs)
    task = app.tasks.get(name)
    if task is not None:
        if getattr(task, "idem_declaration", None) is None:
            raise ConfigurationError(
                f"{name} declares no intent, so submit() means nothing for it. Declare it with "
                "base=IdempotentTask and intent=(…)."
            )
        return submit_task(task, args or (), kwargs or {}, scope, occurrence, idempotency_key, options)
    scope = in_scope(app.conf.get("idem_scope"), scope)
    own = keys.labelled({"scope": scope, "occurrence": occurrence, "idempotency_key": idempotency_key})
    headers = {**(options.pop("headers", None) or {}), **own}
    result = app.send_task(name, args=args, kwargs=kwargs, headers=headers, **options)
    return _accepted("", result.id, _Source(app, None, NO_FINGERPRINT, _PLAIN_POLICY, published=True))


def submit_task(
    task: IdempotentTask,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    scope: str | None,
    occurrence: str | None,
    idempotency_key: str | None,
    options: Mapping[str, Any],
    published: Published | None = None,
) -> Receipt:
    """What ``IdempotentTask.submit`` does. One look for what is known already.

    Args:
        published: what the caller's process has published before.
    """
    guard = task.guard
    ledger = guard.ledger
    scope = in_scope(guard.settings.scope, scope)
    arguments = guard.declaration.bind(args, kwargs)
    key = guard.declaration.key(ledger.namespace, arguments, scope, occurrence, idempotency_key)
    fingerprint = guard.declaration.fingerprint(arguments, idempotency_key)
    secret = bool(guard.declaration.secret)
    shadow = guard.settings.shadow  # then a record is of a time with the guard, and no answer to this call
    known_by = None if shadow else ledger
    source = _Source(task.app, known_by, fingerprint, guard.options.policy, published=False, secret=secret)
    try:
        entry = None if shadow else ledger.look(key)
    except StoreError as error:
        # The worker looks again before it runs anything, so a store that is down here stops nothing.
        events.emit("store_error", key, error=str(error), while_="submitting", then="published")
        entry = None
    if entry is not None:
        known = _told(entry, key, "", source)
        if known is not None:
            events.emit("told", key, status=known.status)
            return known
    mine = source._replace(published=True)
    if published is not None:

        def ended(task_id: str) -> bool:
            return _celery_result(Receipt("in_progress", key, task_id), mine, entry) is not None

        if not published.first(key, fingerprint, entry.record.fence if entry is not None else 0, ended):
            events.emit("told", key, status="in_progress")
            return Receipt("in_progress", key, retry_after=1.0, next=RUNNING, _source=source)
    task_id = None
    try:
        task_id = task.apply_async(
            tuple(args),
            dict(kwargs),
            scope=scope,
            occurrence=occurrence,
            idempotency_key=idempotency_key,
            **options,
        ).id
    finally:
        if published is not None:
            published.done(key, fingerprint, task_id)
    return _accepted(key, task_id, mine)


def look_up(app: Celery, key: str, scope: str | None = None) -> Receipt | None:
    """Where the intent with this key stands; None when nothing is stored under it for this scope.

    Args:
        scope: the caller's; None: that of ``idem_scope``. Whoever knows the arguments of a call can
            compute its key, so a key proves nothing: the record of another scope is as good as none.

    Of a failure an application that does not have the task is told the error's class only: which
    parameters are secret stands in the task.

    Raises:
        StoreError: the store did not answer.
    """
    task = app.tasks.get(keys.task_of(key) or key)
    guarded = getattr(task, "idem_declaration", None) is not None
    ledger = task.guard.ledger if guarded else ledger_of(app)
    policy = task.guard.options.policy if guarded else _PLAIN_POLICY
    scope = in_scope(task.guard.settings.scope if guarded else app.conf.get("idem_scope"), scope)
    entry = ledger.get(key)
    if entry is None or entry.record.scope != keys.scope_digest(ledger.namespace, scope):
        return None
    secret = not guarded or bool(task.guard.declaration.secret)  # without the task nobody here can tell
    source = _Source(app, ledger, NO_FINGERPRINT, policy, published=False, secret=secret)
    known = _told(entry, key, "", source)
    return known if known is not None else _undecided(entry, Receipt("in_progress", key, _source=source))


_PLAIN_POLICY = Policy(lease=0, result_ttl=0, failure_ttl=1 << 62)
"""For looking only: what is lapsed counts as lapsed, what has failed as failed, and nobody asks."""


def _accepted(key: str, task_id: str, source: _Source) -> Receipt:
    return Receipt("accepted", key, task_id, retry_after=1.0, next=RUNNING, _source=source)


def _told(entry: Entry, key: str, task_id: str, source: _Source) -> Receipt | None:
    """What the record says by itself; None where a delivery has something to do first.

    Args:
        task_id: of the delivery that the caller published; "" for none.
    """
    decision = entry.standing(source.fingerprint, source.policy)
    task_id = task_id or entry.record.task_id
    mine = source.published and entry.record.task_id == task_id
    status: Status
    if isinstance(decision, Replay):
        outcome = decision.outcome
        elsewhere = protocol.replacement(outcome)
        if elsewhere:
            return _replaced(Receipt("in_progress", key, task_id, _source=source), elsewhere, source)
        assert source.ledger is not None
        result, why = _outcome(outcome, key, source.ledger, source.secret)
        if not outcome.succeeded:
            return Receipt("failed", key, task_id, None, why, next=FINAL_FAILURE, _source=source)
        status, text = ("executed", DONE) if mine else ("replayed", DONE_EARLIER)
        return Receipt(
            status, key, task_id, result, why, next=text + (NO_RESULT if why else ""), _source=source
        )
    if isinstance(decision, Mismatch):
        return _conflict(Receipt("conflict", key, task_id, _source=source), decision.differs)
    if isinstance(decision, InDoubt):
        reason = decision.reason
        return Receipt("in_doubt", key, task_id, None, reason, next=MAY_HAVE_HAPPENED, _source=source)
    if isinstance(decision, Busy):
        status = "accepted" if mine else "in_progress"
        again = round(min(ASK_AGAIN, decision.retry_after / MICROSECONDS), 3)
        return Receipt(status, key, task_id, retry_after=again, next=RUNNING, _source=source)
    return None


def _outcome(outcome: Outcome, key: str, ledger: Ledger, secret: bool) -> tuple[Any, str]:
    """The value, and why there is none: the body's error, or that it was not kept or cannot be read."""
    if outcome.payload is None:
        return None, outcome.missing
    try:
        if outcome.succeeded:
            return ledger.codec.decode(outcome.payload, key), ""
        return None, _words(ledger.codec.decode_error(outcome.payload, key), secret)
    except StoreError as error:  # written with a serializer that is not accepted here: done all the same
        return None, str(error)


def _replaced(receipt: Receipt, task_id: str, source: _Source) -> Receipt:
    """Of a body that handed its action over to another task, whose result is Celery's."""
    mine = source.published and task_id == receipt.task_id  # a replacement goes by the same id
    result = _celery_result(replace(receipt, task_id=task_id), source._replace(published=True), None)
    if result is None:
        return replace(receipt, status="in_progress", retry_after=ASK_AGAIN, next=RUNNING)
    if result.status == "executed" and not mine:
        return replace(result, status="replayed", next=DONE_EARLIER)
    if result.next == UNSURE_FAILURE:  # that task is not run again: its failure is the answer
        return replace(result, next=FINAL_FAILURE)
    return result


def _undecided(entry: Entry, receipt: Receipt) -> Receipt:
    """Of a record that waits for a delivery, as it stands."""
    state = entry.record.state
    receipt = replace(receipt, task_id=receipt.task_id or entry.record.task_id, retry_after=None)
    if receipt._source is not None and receipt._source.published and state is not State.IN_DOUBT:
        return receipt  # that delivery is under way
    if state is State.RELEASED:
        return _released(receipt, entry)
    if state is State.FAILED:  # long enough ago, with finished steps: the next delivery goes on after them
        return replace(receipt, status="failed", next=PARTLY_DONE)
    reasons = {State.IN_DOUBT: entry.record.reason, State.SCHEDULED: "its retry is overdue"}
    return replace(receipt, status="in_doubt", reason=reasons.get(state, protocol.CRASHED), next=WORKER_GONE)


def _released(receipt: Receipt, entry: Entry) -> Receipt:
    return replace(receipt, status="failed", next=PARTLY_DONE if entry.record.steps else NOTHING_DONE)


def _conflict(receipt: Receipt, differs: Sequence[str]) -> Receipt:
    text = CONFLICT.format(differs=", ".join(differs) or "arguments")
    return replace(receipt, status="conflict", differs=tuple(differs), next=text)


def _celery_result(receipt: Receipt, source: _Source, entry: Entry | None) -> Receipt | None:
    """What Celery's result backend knows of the delivery that this call published."""
    if not source.published or source.app is None:
        return None
    try:
        result = source.app.AsyncResult(receipt.task_id)
        state, value = result.state, result.result
    except Exception as error:  # no backend, or any error of any driver: it cannot tell
        events.diagnose(logging.DEBUG, "the result of %s cannot be read: %s", receipt.task_id, error)
        return None
    receipt = replace(receipt, retry_after=None)
    if state == "SUCCESS":
        return replace(receipt, status="executed", result=value, next=DONE)
    released = entry is not None and entry.record.state is State.RELEASED
    if state == "REVOKED":
        if entry is not None and not released:
            return None  # it had begun: the record speaks
        # Only where records can be seen is it known that it had not begun.
        never = NOTHING_DONE if source.ledger is not None else UNSURE_FAILURE
        revoked = replace(receipt, status="failed", reason="revoked", next=never)
        return revoked if entry is None else _released(revoked, entry)
    if state != "FAILURE":
        return None
    receipt = replace(receipt, reason=_words(value, source.secret))
    if isinstance(value, IdempotencyError) and value.key and not receipt.key:
        receipt = replace(receipt, key=value.key)
    if isinstance(value, FingerprintMismatch):
        return _conflict(receipt, value.differs)
    if isinstance(value, ResultUnavailable):
        return replace(receipt, status="replayed", reason=value.reason, next=DONE_EARLIER + NO_RESULT)
    if isinstance(value, InProgress):
        return replace(receipt, status="in_progress", retry_after=value.retry_after, next=RUNNING)
    if isinstance(value, (OutcomeUnknown, LeaseLost)):
        return replace(receipt, status="in_doubt", next=MAY_HAVE_HAPPENED)
    if entry is not None and released:
        return _released(receipt, entry)
    if isinstance(value, StoreError):
        return replace(receipt, status="failed", next=NOT_RUN_NOW)
    # No record says so: the body may not have run. Celery itself reports a failure where its connection to the result
    # backend breaks before a task begins, or after it ended. Only where failures are not kept there is nothing to ask.
    forgotten = source.ledger is not None and entry is None and source.policy.failure_ttl == 0
    return replace(receipt, status="failed", next=FINAL_FAILURE if forgotten else UNSURE_FAILURE)


def _words(error: object, secret: bool) -> str:
    return type(error).__name__ if secret else f"{type(error).__name__}: {error}"


def plain(value: Any) -> Any:
    """A value as plain JSON: what JSON has no form for becomes text."""
    if isinstance(value, Enum):
        return plain(value.value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((plain(item) for item in value), key=str)
    if isinstance(value, (bytes, bytearray)):
        return base64.b64encode(bytes(value)).decode()
    if isinstance(value, (datetime, date, clock_time)):
        return value.isoformat()
    return str(value)
