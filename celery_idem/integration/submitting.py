"""``submit``: accepts a call in its record and publishes it, or returns what is known of its intent.

One round trip accepts a new call, or returns the record that is there. Accepted means that the action will happen: if
the broker does not take the message, or loses it, recovery publishes it from the record.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from functools import cached_property, partial
from numbers import Real
from typing import TYPE_CHECKING, Any

from celery.utils import uuid

from celery_idem.core import calls, keys, protocol
from celery_idem.core.errors import ConfigurationError, StoreError
from celery_idem.core.model import (
    ACCEPTED_AT,
    KEY,
    MESSAGE,
    MICROSECONDS,
    NO_FINGERPRINT,
    PART_OF,
    PUBLISHED,
    Accepted,
    Busy,
    Request,
    State,
)
from celery_idem.engine import events, owners
from celery_idem.engine.entries import Entry
from celery_idem.engine.ledger import Ledger
from celery_idem.integration import messages, publishing, templates
from celery_idem.integration.awaiting import in_thread, warn_on_loop
from celery_idem.integration.guarded import GuardedTask
from celery_idem.integration.looking import PLAIN_POLICY, Look, from_celery, from_record
from celery_idem.integration.messages import accepted_at
from celery_idem.integration.publishing import in_scope
from celery_idem.integration.receipts import Code, Receipt

if TYPE_CHECKING:
    from celery import Celery

OPTIONS = frozenset({
    "add_to_parent", "argsrepr", "compression", "connection", "countdown", "delivery_mode", "eta", "exchange",
    "expires", "headers", "ignore_result", "kwargsrepr", "link", "link_error", "priority", "producer", "queue",
    "reply_to", "retry", "retry_policy", "routing_key", "serializer", "shadow", "soft_time_limit", "task_id",
    "time_limit",
})  # fmt: skip
"""Options of ``apply_async`` that ``submit`` takes. ``task.submit`` takes them beside the task's own arguments."""


def options_among(given: dict[str, Any], signature: inspect.Signature) -> dict[str, Any]:
    """Remove the options of ``apply_async`` from named arguments, and return them.

    A name that the task itself takes is an argument.
    """
    names = signature.parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in names):
        return {}
    own = {p.name for p in names if p.kind is not p.POSITIONAL_ONLY}
    return {name: given.pop(name) for name in (OPTIONS - own) & given.keys()}


ACCEPTED_FOR = 30.0
"""Seconds after its ETA at which recovery publishes an accepted call that no worker has claimed. Most queues are
faster. With a slower one, this costs one more message."""


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

    An application that does not have the task (an orchestrator without task classes) cannot derive the key,
    because it does not know the signature. It publishes every call, and the worker decides. Such a receipt has no
    ``key`` and takes its answer from Celery's result. Every success is ``executed``, because a replay has the same
    result.

    Args:
        args: a list or tuple.
        kwargs: a mapping.
        options: of ``apply_async`` (``countdown``, ``eta``, ``queue``, ``priority``, …): those in ``OPTIONS``.

    Raises:
        ConfigurationError: the application has the task, and it declares no intent.
        TypeError, IntentError, kombu.exceptions.OperationalError: as ``IdempotentTask.submit``.
    """
    warn_on_loop("submit()", "await asubmit()")
    keys.check_call(name, args, kwargs)
    unknown = ", ".join(sorted(options.keys() - OPTIONS))
    if unknown:  # Celery would take it, and a misspelt occurrence would be another action
        raise TypeError(
            f"{name}: submit() has no option {unknown}. It has scope, occurrence, idempotency_key, "
            f"{', '.join(sorted(OPTIONS))}."
        )
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
    headers = {**(options.pop("headers", None) or {}), **own, PUBLISHED: publishing.first_due(app, options)}
    result = app.send_task(name, args=args, kwargs=kwargs, headers=headers, **options)
    return accepted("", result.id, Look(app, None, NO_FINGERPRINT, PLAIN_POLICY, published=True))


async def asubmit(
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
    """``submit`` that does not block the event loop that it runs on; see ``IdempotentTask.asubmit``."""
    own = {"scope": scope, "occurrence": occurrence, "idempotency_key": idempotency_key}
    return await in_thread("submit", partial(submit, app, name, args, kwargs, **own, **options))


def submit_task(
    task: GuardedTask,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    scope: str | None,
    occurrence: str | None,
    idempotency_key: str | None,
    options: Mapping[str, Any],
) -> Receipt:
    """Accept a call that is made in this process, and publish it; or return what is known of its intent."""
    scope = in_scope(task.guard.settings.scope, scope)
    labels = {"scope": scope, "occurrence": occurrence, "idempotency_key": idempotency_key}
    return submit_call(Submission(task, args, kwargs, labels, options))


def submit_call(call: Submission) -> Receipt:
    """Accept a call in its record and publish it, or return what is known of its intent."""
    guard, key = call.task.guard, call.key
    ledger = guard.ledger
    if guard.settings.shadow:
        # There may be a record from a time when the guard was on. It must not answer this call.
        call.publish()
        return accepted(key, call.task_id, call.mine._replace(ledger=None))
    try:
        decision, entry = ledger.accept(key, call.request, call.wait)
        if entry.record.state is State.ACCEPTED and entry.record.owner != call.request.owner:
            queued = Receipt("in_progress", key, entry.record.task_id)
            ended = from_celery(queued, call.mine, entry)
            if ended is not None and ended.status == "not_run":
                # The accepted call was revoked, and no worker has received its message since.
                ledger.revoked(key, entry.record.task_id, call.request.policy)
                decision, entry = ledger.accept(key, call.request, call.wait)
    except StoreError as error:
        return without_store(call, error)
    if decision is not None and not isinstance(decision, Accepted):
        return call.told(entry)
    return call.sent(entry if decision is not None else None)


class Submission:
    """One call that is about to be accepted.

    Args:
        seconds: time until recovery publishes it; None: ``ACCEPTED_FOR``.

    Attributes:
        own: its scope, occurrence and caller's key, by these names. ``idem_scope`` is not asked here, because the call
            may have been made in another process, where it returns another scope.
        options: options of ``apply_async``.
        key: key of its intent.
        like: the first call with the same options; the call itself, if it has options of its own.
        call: the packed call, for the record.
        wait: microseconds until recovery publishes it, unless a worker has claimed it.

    Raises:
        TypeError, IntentError: as ``IdempotentTask.submit``.
    """

    def __init__(
        self,
        task: GuardedTask,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        own: Mapping[str, Any],
        options: Mapping[str, Any],
        seconds: float | None = None,
        like: Submission | None = None,
    ) -> None:
        guard, app = task.guard, task.app
        declaration, ledger, policy = guard.declaration, guard.ledger, guard.options.policy
        own = {name: keys.label(name, value) for name, value in own.items()}
        arguments = declaration.bind(args, kwargs)
        self.key = declaration.key(
            ledger.namespace, arguments, own["scope"], own["occurrence"], own["idempotency_key"]
        )
        fingerprint = declaration.fingerprint(arguments, own["idempotency_key"])
        self.task, self.args, self.kwargs, self.own = task, tuple(args), dict(kwargs), own
        self.task_id = str(options.get("task_id") or uuid())
        self.options = {**options, "task_id": self.task_id}
        due = publishing.due_at(app, options)
        expires = options.get("expires", task.expires)
        if expires is not None and isinstance(expires, Real):  # the second is slow
            expires = app.now() + timedelta(seconds=float(expires))
        self.like = like or self
        self._kept: Mapping[str, Any] | None = (
            messages.kept_options(task, options, args, kwargs) if like is None else like._kept
        )
        own = {**own, "eta": _written(due), "expires": _written(expires)}
        self.call = messages.of_submission(task, self.key, args, kwargs, self.task_id, self._kept, own)
        digest = keys.scope_digest(ledger.namespace, self.own["scope"])
        self.request = Request(owners.mint(), self.task_id, fingerprint, policy, scope=digest, call=self.call)
        # Not a default value, so that tests can shorten it.
        wait = ACCEPTED_FOR if seconds is None else seconds
        wait += 0.0 if due is None else max(0.0, (due - app.now()).total_seconds())
        self.wait = int(wait * MICROSECONDS)

    @property
    def source(self) -> Look:
        """Where the receipt looks for answers, if this call published nothing."""
        return self._look(published=False)

    @property
    def mine(self) -> Look:
        """The same, if this call was accepted."""
        return self._look(published=True)

    def _look(self, published: bool) -> Look:
        guard, request = self.task.guard, self.request
        secret = bool(guard.declaration.secret)
        return Look(self.task.app, guard.ledger, request.fingerprint, request.policy, published, secret)

    @cached_property
    def recovers(self) -> bool:
        """Whether recovery can publish the call."""
        if not self.task.guard.settings.recover or calls.missing(self.call) is not None:
            return False
        if not (self.task.guard.declaration.secret or self.options.keys() & {"link", "link_error"}):
            return True  # nothing in it can be hidden
        call, _ = messages.call_in(self.task.app, self.key, self.call)
        return call is not None and call.publishable

    def as_accepted(self) -> None:
        """Replace the arguments by those in the record, because the author may have changed the objects since."""
        call, _ = messages.call_in(self.task.app, self.key, self.call)
        if call is not None and not call.hidden:
            self.args, self.kwargs, _ = messages.arguments(self.task.app, call)

    def told(self, entry: Entry) -> Receipt:
        """Return the receipt of what the record says."""
        known = from_record(entry, self.key, "", self.source)
        assert known is not None
        outcome = entry.record.outcome
        events.emit("told", self.key, status=known.status, **(outcome.traced if outcome is not None else {}))
        return known

    def publish(self, entry: Entry | None = None, **more: Any) -> str:
        """Publish the call, and return its task id.

        Args:
            entry: the record in which it is accepted; None if it is not.
        """
        app = self.task.app
        recovers = entry is not None and not app.conf.task_always_eager and self.recovers
        given = {name: value for name, value in self.options.items() if name != "task_id"}
        if entry is not None and recovers and not more and templates.fits(self.task, given):
            headers = self.headers(entry)

            def publish_alone(producer: Any, **_: Any) -> None:
                template = templates.Template(self.task, given, producer, single=True)
                template.publish(self.task_id, self.args, self.kwargs, headers)

            messages.in_time(app, publish_alone)
            return self.task_id
        options = {**self.options, **more, "headers": self._given(entry), messages.DECIDED: True}

        def publish(**more: Any) -> Any:
            return self.task.apply_async(self.args, self.kwargs, **self.own, **{**more, **options})

        if recovers:
            return str(messages.in_time(app, publish, options.pop("producer", None)).id)
        return str(publish().id)

    def _given(self, entry: Entry | None) -> dict[str, Any]:
        headers = {**(self.options.get("headers") or {}), MESSAGE: self.task_id}
        if entry is not None and protocol.untouched(entry.record):
            seal = self.task.guard.ledger.codec.seal
            headers[ACCEPTED_AT] = accepted_at(self.request.owner, entry.stamp, seal)
        return headers

    def headers(self, entry: Entry) -> dict[str, Any]:
        """Return the headers that ``apply_async`` would make in ``publish``.

        The caller's own headers must not name an intent (see ``templates.fits``).
        """
        return {
            **self._given(entry),
            **{keys.LABELS[name]: value for name, value in self.own.items() if value is not None},
            PUBLISHED: publishing.first_due(self.task.app, self.options),
            KEY: self.key,
        }

    def sent(self, entry: Entry | None, **more: Any) -> Receipt:
        """Publish the call, and return its receipt. If the broker does not take it, recovery publishes it later.

        Args:
            entry: as for ``publish``.

        Raises:
            Exception: of ``apply_async``, if recovery cannot publish the call.
        """
        ledger, key = self.task.guard.ledger, self.key
        try:
            self.publish(entry, **more)
        except Exception as error:
            if entry is None or not (self.recovers and messages.of_the_broker(self.task.app, error)):
                _withdraw(ledger, key, self.request.owner)
                raise
            events.emit("broker_error", key, task_id=self.task_id, error=type(error).__name__)
            look_again(ledger, key, self.request.owner, 0.0)
            return accepted(key, self.task_id, self.mine, "not_sent")
        return accepted(key, self.task_id, self.mine)


KEEPS_ITS_ID = frozenset(
    {"link", "link_error", "chain", "chord", "group_id", "root_id", "reply_to", "retries"}
)
"""Options of a call whose task id others know: it is part of a canvas, or a retry."""


def accept_published(
    task: GuardedTask, args: Any, kwargs: Any, options: Mapping[str, Any], its_own_id: bool
) -> str | None:
    """Accept a call of ``apply_async`` and publish it, if it is new (``accept_on_publish``).

    Args:
        options: with the headers that say which intent it is.
        its_own_id: the caller needs this call's own task id.

    Returns:
        Id of the task that will have the result: this call, or the same action that is under way. None: publish the
        call as usual; a worker then returns the stored answer, or decides.
    """
    given = options["headers"]
    if PART_OF in given or any(options.get(name) for name in KEEPS_ITS_ID):
        return None
    own = {name: given.get(header) for name, header in keys.LABELS.items()}
    headers = {name: value for name, value in given.items() if name not in keys.MADE}
    call = Submission(task, args or (), kwargs or {}, own, {**options, "headers": headers})
    try:
        decision, entry = task.guard.ledger.accept(call.key, call.request, call.wait)
    except StoreError as error:  # a worker decides, as without the setting
        events.emit("store_error", call.key, error=str(error), while_="submitting", then="published")
        return None
    if isinstance(decision, Accepted):
        return call.sent(entry).task_id
    if isinstance(decision, Busy) and not its_own_id:
        return call.told(entry).task_id
    return None


def without_store(call: Submission, error: StoreError, may_run: bool = True) -> Receipt:
    """Handle a call whose record cannot be written, as ``on_store_error`` says.

    Args:
        may_run: the call may be published without a record. Not in a transaction, which may roll back.
    """
    key, guard = call.key, call.task.guard
    policy = guard.options.on_store_error
    if policy == "run" and not may_run:
        policy = "retry"
    known = stored_answer(call)
    then = "told" if known is not None else "published" if policy == "run" else "refused"
    events.emit("store_error", key, error=str(error), while_="submitting", then=then)
    if known is not None:
        events.emit("told", key, status=known.status)
        return known
    if policy == "raise":
        raise StoreError(f"{error} {key} was not accepted. Call again unchanged.", key) from error
    if policy == "run":
        return accepted(key, call.publish(), call.mine)
    why = f"{type(error).__name__}: {error}"
    return Receipt("not_run", key, reason=why, code="store_error", _source=call.source)


def stored_answer(call: Submission) -> Receipt | None:
    """Return what the store knows of a call that it cannot accept. It may take no writes, or not this one."""
    try:
        entry = call.task.guard.ledger.look(call.key)
    except StoreError:
        return None
    return None if entry is None else from_record(entry, call.key, "", call.source)


def _written(time: Any) -> Any:
    return time.isoformat() if isinstance(time, datetime) else time


def _withdraw(ledger: Ledger, key: str, owner: bytes) -> None:
    try:
        ledger.withdraw(key, owner)
    except StoreError as error:  # harmless: recovery cannot publish this record
        events.emit("unsettled", key, task_id="", error=str(error))


def look_again(ledger: Ledger, key: str, owner: bytes, seconds: float) -> None:
    """Set when recovery looks at an accepted call; 0: at once."""
    try:
        ledger.sent(key, owner, int(seconds * MICROSECONDS))
    except StoreError as error:  # the earlier time stays
        events.emit("store_error", key, error=str(error), while_="submitting")


def accepted(key: str, task_id: str, source: Look, code: Code = "") -> Receipt:
    """Return the receipt of an accepted call."""
    return Receipt("accepted", key, task_id, code=code, retry_after=1.0, _source=source)
