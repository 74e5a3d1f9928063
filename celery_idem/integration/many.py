"""``submit_many``: many calls over one broker connection, with one write per hundred calls."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from itertools import islice
from typing import TYPE_CHECKING, Any

from celery.canvas import Signature

from celery_idem.core import keys
from celery_idem.core.errors import ConfigurationError, IntentError, StoreError
from celery_idem.core.model import Accepted
from celery_idem.engine import events
from celery_idem.engine.entries import Entry
from celery_idem.integration import messages, templates
from celery_idem.integration.awaiting import warn_on_loop
from celery_idem.integration.guarded import GuardedTask, guarded_task
from celery_idem.integration.publishing import in_scope
from celery_idem.integration.receipts import Receipt
from celery_idem.integration.submitting import OPTIONS, Submission, accepted, look_again, stored_answer

if TYPE_CHECKING:
    from celery import Celery

BATCH = 100
"""Calls per write. At one kilobyte each this is a tenth of a megabyte, so other users of the store do not wait long."""

Call = Mapping[str, Any] | tuple[Any, ...] | list[Any]
"""One call: ``task.s(…)``, or its named arguments, or its positional arguments."""


def submit_many(
    app: Celery, name: str, calls: Iterable[Call], *, scope: str | None = None, **options: Any
) -> list[Receipt]:
    """``IdempotentTask.submit_many`` by the task's name, in an application that has the task.

    Raises:
        ConfigurationError: the application does not have the task, or the task declares no intent.
        TypeError: an option is unknown.
    """
    task = guarded_task(app, name)
    if task is None:
        raise ConfigurationError(
            f"{name} is not a task with an intent in this application, so its keys are not known here. Import its "
            "module, or use submit() for each call."
        )
    return submit_calls(task, calls, scope, options)


def submit_calls(
    task: GuardedTask, calls: Iterable[Call], scope: str | None, options: Mapping[str, Any]
) -> list[Receipt]:
    """Accept and publish many calls, and return their receipts in order. A refused call has a receipt too."""
    warn_on_loop(f"submit_many() of {task.name}", "await asyncio.to_thread(task.submit_many, …)")
    _check_options(task, options)
    waiting, receipts = iter(calls), []
    with nullcontext() if task.app.conf.task_always_eager else task.app.producer_or_acquire() as producer:
        batches = _Batches(task, scope, options, producer)
        while batch := list(islice(waiting, BATCH)):
            receipts += batches.submit(batch)
    return receipts


class _Batches:
    """Submits the batches of one ``submit_many``.

    Attributes:
        template: makes the messages of calls without own options; None: Celery makes each message.
        like: the first call without options of its own.
        broken: the broker did not take a message, so the next accepted calls are left to recovery.
    """

    def __init__(
        self, task: GuardedTask, scope: str | None, options: Mapping[str, Any], producer: Any
    ) -> None:
        self.task = task
        self.scope = scope
        self.options = options
        self.producer = producer
        fit = producer is not None and templates.fits(task, options)
        self.template = templates.Template(task, options, producer) if fit else None
        self.broken = False
        self.like: Submission | None = None

    def submit(self, batch: list[Call]) -> list[Receipt]:
        made = [self._read(call) for call in batch]
        found = self._accept([call for call in made if isinstance(call, Submission)])
        known = [one if isinstance(one, Receipt) else self._decided(one, next(found)) for one in made]
        sent = self._together(
            (call, entry)
            for call, entry in zip(made, known, strict=True)
            if isinstance(call, Submission) and isinstance(entry, Entry)
        )
        receipts = []
        for call, one in zip(made, known, strict=True):
            if isinstance(call, Receipt):
                receipts.append(call)
            elif isinstance(one, Receipt):
                receipts.append(one)
            elif call.key in sent:
                receipts.append(accepted(call.key, call.task_id, call.mine))
            else:
                receipts.append(self._sent(call, one))
        return receipts

    def _read(self, call: Call) -> Submission | Receipt:
        try:
            args, kwargs, given = _parts(self.task, call)
            own = {"scope": self.scope, "occurrence": None, "idempotency_key": None}
            if given:
                own.update((name, given.pop(name)) for name in keys.LABELS.keys() & given.keys())
                _check_options(self.task, given)
            own["scope"] = in_scope(self.task.guard.settings.scope, own["scope"])
            if given or self.template is None:
                return Submission(self.task, args, kwargs, own, {**self.options, **given})
            made = Submission(self.task, args, kwargs, own, self.options, like=self.like)
            self.like = made.like
            return made
        except (TypeError, IntentError) as error:
            return Receipt("failed", "", reason=str(error), code="invalid")

    def _accept(self, made: list[Submission]) -> Iterator[Any]:
        """Accept calls. Return for each the decision and the record, None in shadow mode, or an error."""
        if not made:
            return iter(())
        if self.task.guard.settings.shadow:
            return iter([None] * len(made))
        try:
            asked = [(call.key, call.request, 0 if self.broken else call.wait) for call in made]
            return iter(self.task.guard.ledger.accept_many(asked))
        except StoreError as error:
            return iter([error] * len(made))

    def _decided(self, call: Submission, found: Any) -> Receipt | Entry | None:
        """Return the receipt of a call that is not published. For others, return their accepted record, if any."""
        if isinstance(found, StoreError):
            runs = self.task.guard.options.on_store_error == "run"
            # Only if the error is about this key. Otherwise each call would wait for the store once more.
            known = stored_answer(call) if found.key else None
            then = "told" if known is not None else "published" if runs else "refused"
            events.emit("store_error", call.key, error=str(found), while_="submitting", then=then)
            if known is not None:
                return known
            if not runs:
                return Receipt(
                    "not_run", call.key, reason=str(found), code="store_error", _source=call.source
                )
            found = None
        if found is None:
            return None
        decision, entry = found
        if decision is None:
            return None
        return entry if isinstance(decision, Accepted) else call.told(entry)

    def _together(self, ready: Iterator[tuple[Submission, Entry]]) -> set[str]:
        """Publish calls by the template, and return the keys of those that the broker took.

        The caller publishes the others one by one, so that each gets its own receipt. A message may then be sent twice,
        which is an ordinary duplicate.
        """
        taken: set[str] = set()
        if self.template is None or self.broken:
            return taken
        try:
            with self.template.together():
                for call, entry in ready:
                    if call.like is self.like:
                        try:
                            self.template.publish(call.task_id, call.args, call.kwargs, call.headers(entry))
                        except Exception as error:
                            if messages.of_the_broker(self.task.app, error):
                                self.producer.connection.collect()
                                break
                            continue
                        taken.add(call.key)
        except Exception as error:  # of any driver: what the broker took is unknown
            events.diagnose(logging.WARNING, "%s: publishing again, one by one", self.task.name, error=error)
            return set()
        return taken

    def _sent(self, call: Submission, entry: Entry | None) -> Receipt:
        if self.broken and entry is not None and call.recovers:
            if entry.record.lease:
                look_again(self.task.guard.ledger, call.key, call.request.owner, 0.0)
            return accepted(call.key, call.task_id, call.mine, "not_sent")
        own = {} if {"producer", "connection"} & call.options.keys() else {"producer": self.producer}
        try:
            receipt = call.sent(entry, **own)
        except Exception as error:  # of any driver; the other calls go on
            events.diagnose(logging.ERROR, "%s could not be published", call.key, error=error)
            return Receipt("not_run", call.key, reason=type(error).__name__, code="not_sent")
        self.broken = self.broken or receipt.code == "not_sent"
        return receipt


def _parts(task: GuardedTask, call: Call) -> tuple[Any, Any, dict[str, Any]]:
    """Return positional arguments, named arguments, and options."""
    if isinstance(call, Signature):
        if call.get("subtask_type") or call["task"] != task.name:
            raise TypeError(f"{task.name}: submit_many() got a signature of {call['task']}.")
        return call.args, call.kwargs, dict(call.options)
    args, kwargs = ((), call) if isinstance(call, Mapping) else (call, {})
    keys.check_call(task.name, args, kwargs)
    return args, kwargs, {}


def _check_options(task: GuardedTask, options: Mapping[str, Any]) -> None:
    unknown = ", ".join(sorted(options.keys() - OPTIONS))
    if unknown:
        raise TypeError(
            f"{task.name}: submit_many() has no option {unknown}. It has scope, {', '.join(sorted(OPTIONS))}."
        )
