"""``submit``: looks an intent up and publishes only what is new."""

from __future__ import annotations

import inspect
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from celery_idem.core import keys
from celery_idem.core.errors import ConfigurationError, StoreError
from celery_idem.core.model import NO_FINGERPRINT, Fingerprint
from celery_idem.engine import events
from celery_idem.integration.guarded import GuardedTask
from celery_idem.integration.looking import PLAIN_POLICY, Look, from_celery, from_record
from celery_idem.integration.publishing import in_scope
from celery_idem.integration.receipts import Receipt

if TYPE_CHECKING:
    from celery import Celery

OPTIONS = frozenset({
    "add_to_parent", "argsrepr", "compression", "connection", "countdown", "delivery_mode", "eta", "exchange",
    "expires", "headers", "ignore_result", "kwargsrepr", "link", "link_error", "priority", "producer", "queue",
    "reply_to", "retry", "retry_policy", "routing_key", "serializer", "shadow", "soft_time_limit", "task_id",
    "time_limit",
})  # fmt: skip
"""Options of ``apply_async`` that ``task.submit`` takes beside the task's own arguments."""


def options_among(given: dict[str, Any], signature: inspect.Signature) -> dict[str, Any]:
    """Take the options of ``apply_async`` out of named arguments. What the task itself takes is the task's."""
    names = signature.parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in names):
        return {}
    own = {p.name for p in names if p.kind is not p.POSITIONAL_ONLY}
    return {name: given.pop(name) for name in (OPTIONS - own) & given.keys()}


PUBLISHED_FOR = 30.0
"""Seconds for which a repeat of something published and not yet claimed is not published again: most queues are
quicker, and one whose message got lost is published again after so long."""

PUBLISHED_MAX = 10_000
"""Intents remembered at once, about 5 MB. The oldest is forgotten first: its repeat is one more message."""


class Published:
    """What this process has published and no worker has claimed: the store has no record of it yet."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[str, Fingerprint], tuple[float, int, str]] = OrderedDict()

    def first(self, key: str, fingerprint: Fingerprint, fence: int, ended: Callable[[str], bool]) -> bool:
        """Return whether the caller is the first to publish this intent, and remember it.

        Args:
            fence: of its record, 0 without one. A different one means that the message was claimed.
            ended: whether Celery has a final state for a task id.
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
        """Note the task id it was published under. None: publishing failed, so forget it."""
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

    An application that does not have the task (an orchestrator without task classes) cannot derive the key,
    because it does not know the signature. It publishes every call, and the worker decides. Such a receipt has no
    ``key`` and takes its answer from Celery's result. Every success is ``executed``: a replay looks the same there.

    Args:
        args: a list or tuple.
        kwargs: a mapping.
        options: options of ``apply_async`` (``countdown``, ``eta``, ``queue``, ``priority``, …).

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
    return _accepted("", result.id, Look(app, None, NO_FINGERPRINT, PLAIN_POLICY, published=True))


def submit_task(
    task: GuardedTask,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    scope: str | None,
    occurrence: str | None,
    idempotency_key: str | None,
    options: Mapping[str, Any],
    published: Published | None = None,
) -> Receipt:
    """Look the intent up once; publish it if nothing is known.

    Args:
        published: what this process has published before; None: do not remember.
    """
    guard = task.guard
    ledger = guard.ledger
    scope = in_scope(guard.settings.scope, scope)
    arguments = guard.declaration.bind(args, kwargs)
    key = guard.declaration.key(ledger.namespace, arguments, scope, occurrence, idempotency_key)
    fingerprint = guard.declaration.fingerprint(arguments, idempotency_key)
    secret = bool(guard.declaration.secret)
    shadow = (
        guard.settings.shadow
    )  # a record was then written while the guard was on, and does not answer this call
    known_by = None if shadow else ledger
    source = Look(task.app, known_by, fingerprint, guard.options.policy, published=False, secret=secret)
    try:
        entry = None if shadow else ledger.look(key)
    except StoreError as error:
        # The worker looks again before it runs anything, so a store that is down here stops nothing.
        events.emit("store_error", key, error=str(error), while_="submitting", then="published")
        entry = None
    if entry is not None:
        known = from_record(entry, key, "", source)
        if known is not None:
            events.emit("told", key, status=known.status)
            return known
    mine = source._replace(published=True)
    if published is not None:

        def ended(task_id: str) -> bool:
            return from_celery(Receipt("in_progress", key, task_id), mine, entry) is not None

        if not published.first(key, fingerprint, entry.record.fence if entry is not None else 0, ended):
            events.emit("told", key, status="in_progress")
            return Receipt("in_progress", key, retry_after=1.0, _source=source)
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


def _accepted(key: str, task_id: str, source: Look) -> Receipt:
    return Receipt("accepted", key, task_id, retry_after=1.0, _source=source)
