"""Adapts Celery requests to jobs of the runner.

``Guard`` is what all executions of one task share. ``Delivery`` is one execution: its body, what its exceptions mean,
and how it waits (for a moment in its worker slot, then by going back to the broker).
"""

from __future__ import annotations

import builtins
import contextlib
import inspect
import logging
import random
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from copy import deepcopy
from datetime import datetime, timezone
from typing import Any, TypeVar

from celery.app.task import Context
from celery.exceptions import Ignore, Reject, Retry, SoftTimeLimitExceeded, TaskError
from celery.states import FAILURE, PROPAGATE_STATES, STARTED, SUCCESS
from celery.utils.imports import symbol_by_name
from celery.utils.time import maybe_iso8601

from celery_idem.core import calls, keys
from celery_idem.core.digests import Digester
from celery_idem.core.errors import (
    ConfigurationError,
    InProgress,
    LeaseLost,
    OutcomeUnknown,
    ResultUnavailable,
    StoreError,
)
from celery_idem.core.model import (
    ACCEPTED_AT,
    CALLER_KEY,
    FINGERPRINT,
    KEY,
    MESSAGE,
    NO_FINGERPRINT,
    PUBLISHED,
    Answer,
    Busy,
    Fingerprint,
    Raised,
)
from celery_idem.engine import events
from celery_idem.engine.claim import Hold, Retries
from celery_idem.engine.ledger import Ledger
from celery_idem.engine.runner import Job, Options, Runner, Why
from celery_idem.engine.steps import run_step
from celery_idem.integration import answers, declaring, messages, owing, placing, republishing
from celery_idem.integration.answers import DONE, STARTING
from celery_idem.integration.guarded import GuardedTask
from celery_idem.integration.messages import CARRIED
from celery_idem.integration.settings import LONGEST
from celery_idem.integration.wiring import is_backends, ledger_of
from celery_idem.stores.base import Announcement

T = TypeVar("T")

WAITS = "idem-waits"
"""Header of a message that was published again: how many times it has come back."""

PROPAGATES = "idem-propagates"
"""Header of an eager call whose errors reach its caller. Celery raises its ``Retry`` there, and does not run it."""

EAGER: set[str] = set()
"""Ids of the eager calls under way in this process. No worker received them, so monitors must not take their events for
events of a message. Not a context variable, because events may come from another thread, such as the one that renews
leases."""

FIRST_WAIT = 0.05
"""Seconds that a duplicate first waits in its worker slot. Most bodies that are nearly done end within this time."""

SLOT_WAITS = 2
"""Number of waits in the slot before the message goes back to the broker. The second is twice as long as the first.
Together they take 0.15 s of a slot, about the cost of publishing and receiving the message again."""

BACKOFF = (0.5, 1.5, 60.0)
"""Seconds until a duplicate first comes back, growth per round, and the longest time. With this growth, the time from
the body's end to the duplicate's answer is at most half the body's run time. The longest time bounds that too, and a
day-long body's duplicate sends one message a minute."""

MAX_FOLLOWS = 30
"""How many times a duplicate comes back for the result of the task that replaced its body: about 25 minutes. Celery
cannot tell a task that waits from one whose result has expired."""

INLINE_LIMIT = 30.0
"""Seconds that an eager or direct call, or a copy on a fanout exchange of Redis, waits for another execution. This is
the default lease, after which a dead execution is decided."""

BROKER_PATIENCE = 300.0
"""Seconds that a delivery waits in its slot while the broker does not take its message: longer than a restart or a
failover. A warm shutdown without a broker takes at most as long."""


DOUBTFUL = {Raised.AMBIGUOUS, Raised.TIME_LIMIT, Raised.EXIT}
"""Kinds of errors after which it is unknown whether the effect happened."""

_GROUP: Any = getattr(builtins, "ExceptionGroup", ())  # since Python 3.11


class Guard:
    """What the executions of one task share.

    Attributes:
        ask: asks the destination; None without a ``reconcile``.
        answers: the result backend, if the store is its database, so that the write of an outcome can contain the
            result.
        kind: what the result backend does with answers.
        broker: the broker of the task's messages (see ``calls.Call``).
        unusable: why results could not be read again, when this guard was made; "" if they can.
    """

    def __init__(self, task: GuardedTask, declaration: keys.Declaration) -> None:
        self.declaration = declaration
        self.settings = settings = declaring.settings_of(type(task), task.app)
        self.ledger = ledger = ledger_of(task.app, settings)
        self.runner = _shadow_runner(ledger) if settings.shadow else Runner(ledger)
        self.ask = _ask_of(task)
        self.options = Options(
            policy=settings.policy(asks=self.ask is not None),
            on_store_error=settings.on_store_error,
            patience=settings.settle_patience,
            ask_timeout=settings.reconcile_timeout,
            no_effect_errors=tuple(task.no_effect_errors),
        )
        self.ambiguous = (*task.ambiguous_errors, OutcomeUnknown, InProgress, StoreError, LeaseLost)
        self.digester = (
            Digester(declaration, ledger.namespace, settings.audit_key) if settings.audit else None
        )
        self.around = placing.around(task)
        self.net, self.body = placing.body(task)
        shared = ledger.store.announces and is_backends(ledger.store, task.app)
        self.answers = answers.answering(task) if shared else None
        self.kind = answers.kind_of(task)
        self.broker = messages.broker_of(task.app)
        self.unusable = ledger.codec.unusable()

    def check_serializer(self) -> None:
        """Check before a body runs. Raises ``ConfigurationError``: its result could not be read again."""
        # Asked again, because the serializer may have been registered since.
        why = self.ledger.codec.unusable()
        if why:
            raise ConfigurationError(
                f"{self.declaration.task}: {why}. Nothing was run. Register it (kombu.serialization.register) where "
                "the application is made, and list it in accept_content or result_accept_content."
            )

    def identify(self, request: Context, args: Any, kwargs: Any) -> tuple[str, Fingerprint]:
        """Return the key and fingerprint of a delivery, from its headers or from its arguments."""
        headers = request.headers or {}
        declaration = self.declaration
        key = headers.get(KEY)
        if (
            isinstance(key, str)
            and keys.task_of(key) == declaration.task
            and headers.get(MESSAGE, request.id) == request.id
        ):
            caller_key = headers.get(CALLER_KEY)
            if caller_key is None and not declaration.must_match:
                return key, NO_FINGERPRINT
            arguments = declaration.bind(args, kwargs)
            if FINGERPRINT in headers:
                return key, declaration.continued(headers[FINGERPRINT], arguments, caller_key)
            return key, declaration.fingerprint(arguments, caller_key)
        own = keys.identity({**as_headers(request), **headers}, request.id)
        arguments = declaration.bind(args, kwargs)
        key, caller_key = keys.key_of(declaration, self.ledger.namespace, arguments, own), own.get(CALLER_KEY)
        # A message that continues this delivery has the same intent, even if its arguments differ.
        others = {name: value for name, value in headers.items() if name not in keys.MADE}
        due = _due_by(headers, request.id) or int(time.time())  # it was due now at the latest
        request.headers = {**others, **own, KEY: key, MESSAGE: request.id or "", PUBLISHED: due}
        return key, declaration.fingerprint(arguments, caller_key)

    def has_outcome(self, key: str) -> bool:
        """Whether an intent is known to have an outcome."""
        try:
            entry = None if self.settings.shadow else self.ledger.get(key)
        except StoreError:
            return False
        return entry is not None and entry.record.state.settled

    def kind_of(self, error: BaseException) -> Raised:
        """Return what an error says about the effect, by the task's declaration."""
        if isinstance(error, Ignore):
            return Raised.REPLACED if isinstance(error, Replaced) else Raised.IGNORE
        if isinstance(error, Reject):
            return Raised.REJECT
        if isinstance(error, Retry):  # before the declared classes: Exception itself may be among them
            return Raised.RETRY
        if isinstance(error, self.options.no_effect_errors):
            return Raised.NO_EFFECT
        if isinstance(error, self.ambiguous):
            return Raised.AMBIGUOUS
        if isinstance(error, SoftTimeLimitExceeded):
            return Raised.TIME_LIMIT
        if not isinstance(error, Exception):
            # CancelledError ends a coroutine, and is no order to exit. Most processes never load asyncio.
            cancelled = getattr(sys.modules.get("asyncio"), "CancelledError", ())
            return Raised.AMBIGUOUS if isinstance(error, cancelled) else Raised.EXIT
        # One member in doubt is enough for a doubt; "no effect" needs all members.
        if isinstance(error, _GROUP):
            kinds = {self.kind_of(member) for member in error.exceptions}
            return next(iter(kinds & DOUBTFUL or (kinds if kinds == {Raised.NO_EFFECT} else {Raised.ERROR})))
        return Raised.ERROR

    def step(self, claim: Hold, name: str, run: Callable[[], Any], ask: Callable[[], Answer] | None) -> Any:
        if not claim.guarded:
            return run()
        options = self.options
        bounded = None if ask is None else (lambda: self.runner.bounded(ask, options.ask_timeout))

        def no_effect(error: BaseException) -> bool:
            causes = [error]
            if isinstance(error, Retry):
                causes = [error.exc] if error.exc else claim.retries.causes if claim.retries else []
            return bool(causes) and all(self.kind_of(cause) is Raised.NO_EFFECT for cause in causes)

        return run_step(claim, self.ledger.codec, name, run, bounded, options.patience, no_effect)


def _shadow_runner(ledger: Ledger) -> Runner:
    from celery_idem.engine.shadow import ShadowRunner  # imported late: only shadow mode needs it

    return ShadowRunner(ledger)


def _ask_of(task: GuardedTask) -> Callable[..., Answer] | None:
    """Return ``reconcile`` as a function of the delivery's arguments; None if the task has none."""
    given = inspect.getattr_static(type(task), "reconcile", None)
    if isinstance(given, str):
        given = symbol_by_name(given)
    if given is None:
        return None
    if isinstance(given, (staticmethod, classmethod)):
        given = given.__func__
    if not callable(given):
        raise ConfigurationError(
            f"{task.name}: reconcile= must be a function (task, *args, **kwargs), or a method."
        )
    return lambda *args, **kwargs: given(task, *args, **kwargs)


def as_headers(request: Context) -> dict[str, Any]:
    """Return the identity that a process without this package gave as options, as headers.

    Celery turns options that it does not know into message properties, and some transports (Redis) keep those. A
    process with this package writes headers itself.
    """
    if MESSAGE in (request.headers or {}):
        return {}
    given = getattr(request, "properties", None) or {}
    return {header: given[name] for name, header in keys.LABELS.items() if given.get(name) is not None}


HELD: ContextVar[Delivery | None] = ContextVar("celery_idem_held", default=None)
"""The innermost guarded body that runs here. A context variable, unlike Celery's request stack, is also seen by
coroutines, threads and greenlets that run in a copy of the body's context."""


_SAID = {SUCCESS: Raised.SAID_DONE, FAILURE: Raised.SAID_FAILED}
"""Celery's final states, which a body may write with ``update_state`` before it raises ``Ignore``."""


class Waiting(Ignore):  # type: ignore[misc]
    """The message was published again and comes back. An ``Ignore``, so that Celery reports nothing."""


_IGNORED = events.LeaveOut("celery.app.trace")
"""Leaves out Celery's log line "ignored" for each ``Waiting``. The event ``waiting`` is logged once instead."""


class Replaced(Ignore):  # type: ignore[misc]
    """The body replaced its task by one that has no guard."""


class Delivery(Job):
    """One Celery request, as a job for the runner."""

    claim: Hold
    outer: Delivery | None
    """The guarded body from which this one was called."""

    began = 0.0
    """When it began to wait in place, by this process' clock; 0: it does not wait."""

    pauses = 0
    """How many times it waited in place."""

    starts = False
    """Its state is STARTED when the body begins (``task_track_started``)."""

    received: tuple[Any, Any] | None = None
    """A copy of the arguments as received: a body may change its own, and ``reconcile`` and a next run need them."""

    def __init__(
        self,
        guard: Guard,
        task: GuardedTask,
        request: Context,
        args: Any,
        kwargs: Any,
        key: str,
        fingerprint: Fingerprint,
    ) -> None:
        self.guard = guard
        self.task = task
        self.request = request
        self.args = args
        self.kwargs = kwargs
        headers = request.headers or {}
        carried: tuple[bytes, ...] = ()
        again: Any = True
        if CARRIED in headers:
            carried = _unhex(headers[CARRIED])
        else:
            again = (request.delivery_info or {}).get("redelivered")
        super().__init__(key, str(request.id or ""), fingerprint, guard.options, carried)
        labels = None
        if not keys.IDENTITY.isdisjoint(headers):
            given = {name: keys.label(name, headers.get(header)) for name, header in keys.LABELS.items()}
            labels = {name: value for name, value in given.items() if value is not None}
            self.scope = keys.scope_digest(guard.ledger.namespace, labels.get("scope"))
        if guard.digester is not None:
            try:
                self.digests = guard.digester.of(args, kwargs, labels)
            except Exception as error:  # digests decide nothing, so their errors must not stop a delivery
                events.diagnose(logging.ERROR, "%s: no digests of its arguments are kept", key, error=error)
        if STARTING in request.__dict__:
            self.starts = True
            if not again and not request.retries:
                meta = request.__dict__[STARTING]
                self.starting = answers.announcement(guard.answers, request, meta, STARTED)
        if not guard.settings.shadow:
            self.call = messages.of_delivery(task.app, guard, request, args, kwargs, key)
            self.place = messages.place(request)
            if ACCEPTED_AT in headers and headers.get(MESSAGE) == request.id:
                self.accepted = messages.accepted_in(headers[ACCEPTED_AT], guard.ledger.codec.seal)
                again = True  # an accepted call has a record, so without one it may have ended before
            if again:
                self.due = _due_by(headers, request.id)

    def orphaned(self, call: bytes) -> None:
        messages.answer(self.task.app, self.key, call)

    def shown(self) -> str:
        from celery_idem.integration import describing  # imported late: only a doubt is described

        describe = declaring.options_of(type(self.task)).describe
        headers = self.request.headers or {}
        return describing.said(self.guard.declaration, describe, self.args, self.kwargs, headers).line

    def said(self) -> Any:
        state, meta = self.request.idem_said
        if state == SUCCESS or isinstance(meta, BaseException):
            return meta
        if isinstance(meta, dict) and "exc_type" in meta:  # Celery's form of an error
            try:
                return self.task.backend.exception_to_python(meta)
            except Exception:  # it only looks like it
                return TaskError(str(meta))
        return TaskError(*(() if meta is None else (meta,)))

    @property
    def ignores_result(self) -> bool:
        """Whether the value goes nowhere: to no result backend, link, chain, chord or direct caller."""
        request = self.request
        if request.called_directly or request.callbacks or request.chain or request.chord:
            return False
        return not self._stored

    def announcement(self, value: Any) -> Announcement | None:
        backend = self.guard.answers
        if backend is None or self.in_place or self.task.ignore_result or self.task._backend is not None:
            return None
        # A call in a body has the request of the message, but is not its answer. Code around the guard may return
        # another value.
        if self.outer is not None or not placing.is_outermost(type(self.task)):
            return None
        # The body wrote its state itself, and Celery keeps that one.
        if DONE in vars(self.request):
            return None
        return answers.announcement(backend, self.request, value)

    def announced(self) -> None:
        vars(self.request)[answers.ANSWERED] = True

    def owed(self, also: Announcement | None = None) -> bytes | None:
        request, guard = self.request, self.guard
        if also is not None and request.chord is None:
            return None
        # A call in a body has the request of the message, but is not its answer. Late, the message itself comes again.
        if self.outer is not None or self.in_place or self.task.acks_late or not guard.settings.recover:
            return None
        kind = guard.kind
        stored = kind.stores and self._stored
        if not (request.callbacks or request.errbacks or request.chain or request.chord):
            if kind.tells or not stored:
                return b"" if stored else None
        elif request.chord and not kind.repeats:
            return None
        return self.call if self.call and calls.missing(self.call) is None else b"" if stored else None

    def owing(self, hold: Hold) -> None:
        (owing.owe_more if hold.record.call else owing.owe_result)(self.task_id, hold)

    @property
    def _stored(self) -> bool:
        """Whether Celery stores the result. As its get_actual_ignore_result, which 5.4 does not have."""
        given = vars(self.request).get("ignore_result")  # it goes before the class
        return not (self.task.ignore_result if given is None else given)

    def replaying(self, own: bool, owed: bool = False) -> None:
        self.request.idem_replayed = True
        if owed:
            owing.owe_replay(self.task_id, self.guard.ledger, self.key, self.options.policy)
        if not own and not (self.request.delivery_info or {}).get("redelivered"):
            vars(self.request)[answers.FIRST] = True

    def answer(self, error: T) -> T:
        vars(self.request)[placing.ANSWER] = type(error)
        return error

    @property
    def waits_long(self) -> bool:
        return not self._waits and (self.pauses == 0 if self.in_place else self.waited == SLOT_WAITS)

    @property
    def in_place(self) -> bool:
        """There is no message to send back."""
        return bool(self.request.is_eager or self.request.called_directly)

    def _as_received(self) -> None:
        """Restore the arguments as received, and forget the state that an earlier run wrote."""
        if self.received is None:
            with contextlib.suppress(Exception):  # arguments of a direct call may not be copyable
                self.received = deepcopy((self.args, self.kwargs))
            return
        self.args, self.kwargs = self.request.args, self.request.kwargs = deepcopy(self.received)
        vars(self.request).pop("idem_said", None)

    def body(self, hold: Hold) -> Any:
        self.request.idem_claim = self.claim = hold
        self.outer = HELD.get()
        HELD.set(self)
        guard = self.guard
        if guard.ask is not None:  # without a question, the body runs once in this delivery
            self._as_received()
        try:
            if self.starts:
                self._start(hold)
            if guard.around is not None:
                self.request.idem_opened = self.entered = True
                return guard.around(*self.args, **self.kwargs)
            run = self.task.run  # looked up, because autoretry and tests may have replaced it
            if getattr(run, "__func__", None) is guard.net:  # the guard calls, so the net is not needed
                run = guard.body
            self.entered = True
            return run(*self.args, **self.kwargs)
        finally:
            if guard.around is not None:
                self.request.idem_opened = False
            HELD.set(self.outer)  # not reset(), which raises in another context
            hold.ended = True

    def _start(self, hold: Hold) -> None:
        """Write the state STARTED, unless the claim has written it."""
        written, hold.announced = hold.announced, False
        if not written:
            meta = vars(self.request)[STARTING]
            self.task.backend.store_result(self.task_id, meta, STARTED, request=self.request)

    def ask(self, hold: Hold) -> Answer:
        """Call ``reconcile`` in the runner's side thread, with this request for ``task.request`` and ``task.claim``."""
        self.request.idem_claim = self.claim = hold
        ask = self.guard.ask
        assert ask is not None
        self._as_received()
        self.outer = HELD.get()
        HELD.set(self)
        self.task.request_stack.push(self.request)
        try:
            return ask(*self.args, **self.kwargs)
        finally:
            self.task.request_stack.pop()
            HELD.set(self.outer)

    def follow(self, task_id: str) -> tuple[bool, Any]:
        if task_id == self.task_id:  # the replacement has this task id, and will give the answer
            raise Ignore(f"{self.key}: replaced")
        try:
            result = self.task.app.AsyncResult(task_id)
            state, value = result.state, result.result
        except Exception as error:  # no result backend, or any error of any driver
            raise self.answer(self._unavailable(task_id, str(error))) from error
        if state == "SUCCESS":
            return True, value
        if state in PROPAGATE_STATES:
            self.replaying(own=True)
            raise self.answer(
                value if isinstance(value, BaseException) else self._unavailable(task_id, state)
            )
        if self._waits >= MAX_FOLLOWS:
            raise self.answer(self._unavailable(task_id, state))
        return False, None

    def _unavailable(self, task_id: str, why: str) -> ResultUnavailable:
        reason = f"it was replaced by task {task_id}, whose result is not here ({why})"
        return ResultUnavailable(
            f"{self.key} is done and will not be done again; {reason}.", self.key, reason
        )

    # --- the end of the body ------------------------------------------------------------

    @property
    def _retries(self) -> Retries:
        claim: Hold | None = getattr(self.request, "idem_claim", None)
        return (claim and claim.retries) or Retries()

    @property
    def _propagates(self) -> bool:
        return bool(self.request.is_eager) and PROPAGATES in (self.request.headers or {})

    def causes_of(self, error: BaseException) -> tuple[BaseException, ...]:
        retries = self._retries
        if isinstance(error, (Retry, Ignore, Reject)) and retries.signal is not None:
            hand_made = (error.exc,) if isinstance(error, Retry) and error is not retries.signal else ()
            return tuple(cause for cause in (*retries.causes, *hand_made) if cause is not None) or (error,)
        if retries.refused is not None and error is retries.refused[0]:
            return (retries.refused[1] or error,)
        return ((error.exc or error) if isinstance(error, Retry) else error,)

    def kind_of(self, error: BaseException) -> Raised:
        retries = self._retries
        kinds = [self.guard.kind_of(cause) for cause in self.causes_of(error)]
        doubt = next((kind for kind in kinds if kind in DOUBTFUL), None)
        if isinstance(error, Replaced):
            return Raised.REPLACED
        coming = retries.signal is not None and not self._propagates
        if coming and isinstance(error, (Retry, Ignore, Reject)):
            return Raised.RETRY if doubt is None else Raised.DOUBTFUL_RETRY
        if doubt is not None:
            return doubt
        if isinstance(error, Retry):
            if any(error is signal for signal in retries.apart):
                return Raised.REPLACED
            if retries.signal is None and not self.request.called_directly:
                events.diagnose(logging.WARNING, "%s: Retry was raised, but no retry was published", self.key)
            return Raised.IGNORE  # only the caller can try again
        if self.request.called_directly and retries.refused is not None and error is retries.refused[0]:
            return Raised.IGNORE
        kind = self.guard.kind_of(error)
        if kind is Raised.IGNORE:
            return _SAID.get(getattr(self.request, "idem_said", ("",))[0], kind)
        return kind

    def returned(self, value: Any) -> None:
        retries = self._retries
        if retries.signal is not None:
            raise retries.signal
        if any(value is signal for signal in retries.apart):
            raise value

    def raised(self, error: BaseException) -> BaseException:
        retries = self._retries
        first: Any = retries.signal
        if first is None or isinstance(error, (Retry, Replaced)) or not isinstance(error, Exception):
            return error
        # A worker needs it for the message; in place there is no message.
        if isinstance(error, (Ignore, Reject)):
            counts: BaseException = first if self.in_place else error
            return counts
        again: BaseException = Retry(exc=error, when=first.when, is_eager=first.is_eager, sig=first.sig)
        again.__cause__ = error
        retries.signal = again
        retries.causes.append(error)
        return again

    def successor(self, error: BaseException) -> str:
        apart = {id(signal): signal.sig for signal in self._retries.apart}
        if id(error) not in apart or self.in_place:  # in place Celery runs it here, and has the result
            return self.task_id
        return str(apart[id(error)].options["task_id"])

    def retry_task_id(self) -> str:
        sig = getattr(self._retries.signal, "sig", None)
        return str(sig.options.get("task_id") or self.task_id) if sig is not None else self.task_id

    def retry_call(self) -> bytes:
        return self._retries.call

    def retry_delay(self, error: BaseException) -> float:
        """Return the seconds until the retry's ETA, and one lease more for its way through the queue."""
        when = getattr(self._retries.signal or error, "when", None)
        if isinstance(when, str):
            when = maybe_iso8601(when)
        if isinstance(when, datetime):
            aware = when if when.tzinfo is not None else when.replace(tzinfo=timezone.utc)
            seconds = (aware - datetime.now(timezone.utc)).total_seconds()
        else:
            seconds = float(when or 0)
        return max(0.0, seconds) + self.guard.settings.lease

    # --- waiting --------------------------------------------------------------------------

    def come_back(
        self, seconds: float, carried: tuple[bytes, ...], why: Why, says: str, busy: Busy | None = None
    ) -> None:
        """Try again later: wait in place for a moment, or publish the message again.

        The message id, chord, chain, links, headers, serializer and queue stay. Celery counts no retry, writes no state
        and sends no ``task-retried``, because to Celery this delivery is ignored.
        """
        if busy is not None and self.guard.settings.on_duplicate == "raise" and not self._continues(busy):
            raise self.answer(self._in_progress(seconds))
        if self.in_place:
            self._wait_in_place(seconds, says, busy)
            return
        waits = self._waits
        if busy is not None and waits == 0 and self.waited < SLOT_WAITS:
            self.waited += 1
            threading.Event().wait(FIRST_WAIT * self.waited)
            return
        route = republishing.to_its_queue(self.task.app, self.request)
        if route is None:  # a fanout, where the message would reach every worker again
            self._wait_in_place(seconds, says, busy)
            return
        delay = max(backoff(waits, seconds), self._shortest_delay())
        if self.received is not None:
            self._as_received()
        signature = self.task.signature_from_request(
            self.request, countdown=delay, retries=self.request.retries
        )
        signature.options.update(route)
        signature.options["headers"] |= {
            KEY: self.key,
            FINGERPRINT: self.fingerprint.packed.hex(),
            WAITS: waits + 1,
            CARRIED: [owner.hex() for owner in carried],
        }
        try:
            signature.apply_async()
        except Exception as error:  # of any driver, or of a serializer
            self._stay(seconds, says, busy, error)
            return
        _IGNORED.next(self.task_id)
        raise Waiting(f"{self.key}: {says}")

    def _continues(self, busy: Busy) -> bool:
        """Whether this is a redelivery or the intent's own retry, and no duplicate."""
        return busy.own or FINGERPRINT in (self.request.headers or {})

    def _shortest_delay(self) -> float:
        """Return seconds. For quorum queues, Celery delays in RabbitMQ, with whole seconds and at least one."""
        driver = self.task.app.connection_for_write().transport.driver_type
        return 1.0 if driver == republishing.AMQP else 0.0

    @property
    def _waits(self) -> int:
        """How many times this message has come back."""
        waits = (self.request.headers or {}).get(WAITS, 0)
        return waits if isinstance(waits, int) and waits >= 0 else 0

    def _wait_in_place(self, seconds: float, says: str, busy: Busy | None) -> None:
        """Wait here, up to ``INLINE_LIMIT``, because there is no message that could be published again."""
        if self._waited_for() > INLINE_LIMIT:
            if not self.in_place and self._is_a_copy():
                raise Waiting(f"{self.key}: its other delivery answers")
            raise self._not_run(seconds, says, busy)
        self._pause(seconds)

    def _stay(self, seconds: float, says: str, busy: Busy | None, error: Exception) -> None:
        """Wait here, up to ``BROKER_PATIENCE``, because the broker did not take the message, and look again meanwhile.

        The answer may be known before the broker is back. A worker without a broker receives no messages, so its slot
        is not needed.
        """
        if not self.began:
            events.emit("broker_error", self.key, task_id=self.task_id, error=type(error).__name__)
            events.diagnose(logging.DEBUG, "%s could not be published again", self.key, error=error)
        try:
            if self._waited_for() <= BROKER_PATIENCE:
                self._pause(seconds)
                return
        except SoftTimeLimitExceeded:
            events.diagnose(logging.WARNING, "%s: a soft time limit ended the waiting", self.key)
        if self.task.acks_late:  # the broker still has the message
            raise Reject(f"{self.key}: {says}", requeue=True) from error
        raise self._not_run(seconds, says, busy) from error

    def _waited_for(self) -> float:
        now = time.monotonic()
        if not self.began:
            self.began = now
        return now - self.began

    def _pause(self, seconds: float) -> None:
        pauses = self.pauses
        self.pauses += 1
        threading.Event().wait(min(backoff(pauses, seconds), FIRST_WAIT * 2 ** min(pauses, 5), 1.0))

    def _is_a_copy(self) -> bool:
        """Whether another delivery of the same message, with the same task id, holds the intent and will answer."""
        try:
            entry = self.guard.ledger.get(self.key)
        except StoreError:
            return False
        return entry is not None and entry.record.task_id == self.task_id

    def _not_run(self, seconds: float, says: str, busy: Busy | None) -> Exception:
        if busy is not None:
            return self.answer(self._in_progress(seconds))
        return StoreError(f"{says} Nothing was run for {self.key}.", self.key)

    def _in_progress(self, seconds: float) -> InProgress:
        return InProgress(
            f"{self.key} is being worked on right now. Nothing was started. Ask again in {seconds:.1f} s.",
            self.key,
            round(seconds, 3),
        )


def backoff(waits: int, at_most: float) -> float:
    """Return the seconds until a duplicate comes back.

    Args:
        waits: how many times it has come back.
        at_most: seconds after which the holder must have renewed its lease. A dead one is decided then, so a duplicate
            does not wait longer. 0: not known.
    """
    first, growth, longest = BACKOFF
    delay = min(longest, first * growth ** min(waits, 50))
    if at_most > 0:
        delay = min(delay, at_most + FIRST_WAIT)
    return delay * random.uniform(0.9, 1.1)  # noqa: S311  # so that a hundred duplicates do not come back at once


def _due_by(headers: Mapping[str, Any], message: str | None) -> float:
    """Return when a call was due, in seconds since 1970, by its producer's clock; 0: not known."""
    due = headers.get(PUBLISHED)
    if headers.get(MESSAGE) != message or not isinstance(due, (int, float)) or not 0 < due < LONGEST:
        return 0.0
    return due


def _unhex(carried: Any) -> tuple[bytes, ...]:
    """Return the owners in a message header, without malformed ones."""
    owners = []
    for text in carried if isinstance(carried, (list, tuple)) else ():
        try:
            owners.append(bytes.fromhex(text))
        except (TypeError, ValueError):
            continue
    return tuple(owners)
