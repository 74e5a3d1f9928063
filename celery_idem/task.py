"""``IdempotentTask``: the guard around a Celery task's body.

The guard stands in ``__call__``, which is the one place that sees every attempt: the
tracer calls it when a class overrides it, autoretry and pydantic wrap what is inside
(``run``), and a value it returns is an ordinary success, with its state, links, chain
and chord.
"""

from __future__ import annotations

import inspect
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, ClassVar

from celery import Task
from celery._state import _task_stack
from celery.app.task import Context
from celery.exceptions import Ignore, Reject, Retry, SoftTimeLimitExceeded
from celery.states import PROPAGATE_STATES
from celery.utils.imports import symbol_by_name

from celery_idem import declaring, keys, receipts
from celery_idem.errors import (
    ConfigurationError,
    IdempotencyError,
    InProgress,
    LeaseLost,
    OutcomeUnknown,
    ResultUnavailable,
    StoreError,
)
from celery_idem.intent import CALLER_KEY, KEY, OCCURRENCE, SCOPE, Answer, Fingerprint, Raised
from celery_idem.ledger import Claim, Ledger
from celery_idem.receipts import Receipt
from celery_idem.runner import Job, Options, Runner
from celery_idem.settings import Settings, ledger_of

if TYPE_CHECKING:
    from celery import Celery
    from celery.canvas import Signature
    from celery.result import AsyncResult, EagerResult

# Message headers between one delivery of a message and the next.
CARRIED = "idem-carried"
WAITS = "idem-waits"

FIRST_WAIT = 0.05
"""Seconds a duplicate first waits inside its worker slot: most bodies that are nearly done end in it."""

SLOT_WAITS = 2
"""Waits inside the slot, the second twice as long, before the message goes back to the
broker: 0.15 s of a slot, about what publishing and receiving it again would cost."""

BACKOFF = (0.5, 1.5, 60.0)
"""Seconds until a duplicate comes back first, growth per round, and the most. With a growth
of half it learns the result at most half as long after the end as the body ran; sixty
seconds bound that, and bound a day-long body's duplicate to a message a minute."""

MAX_FOLLOWS = 30
"""How often a duplicate comes back for the result of the task that replaced its body: about 25
minutes. Celery cannot tell a task that waits from one whose result has expired."""

INLINE_LIMIT = 30.0
"""Seconds an eager or direct call waits for another execution: the default lease, after
which a dead one is decided."""


class IdempotentTask(Task):  # type: ignore[misc,unused-ignore]  # Celery's Task is untyped before 5.7
    """A task whose action happens once per intent, however often it is called.

    Use it as ``base=`` of a task, or as ``task_cls=`` of an application: then tasks
    without an intent, Celery's own among them, stay ordinary tasks. Options, each also
    possible in ``task_annotations``:

    Attributes:
        intent: parameter names that say what the action is; or a function from the
            arguments to a dictionary; or ``ALL_ARGUMENTS``.
        must_match: parameters that must be equal whenever the intent comes back.
        secret: parameters whose values never leave the process, not even as digests
            that could be guessed.
        intent_version: change it when the same fields begin to mean another action.
        reconcile: ``(task, *args, **kwargs)``, or a method: asks the destination after a
            crash and returns ``Happened(result)``, ``NotHappened()`` or ``Unknown(reason)``.
        no_effect_errors: exceptions that prove that nothing happened: the intent may be tried again.
        ambiguous_errors: exceptions after which nobody knows (a timeout while waiting for
            the answer): in doubt, or a question to the destination.

    and every setting of ``celery_idem.settings.Settings`` by its name (``lease``, ``on_crash``, …).

    *Eager and direct calls* (``task.apply()``, ``task_always_eager``, ``task(…)``,
    ``chunks`` and ``starmap``) are guarded too. There is no message to send back, so they
    wait in place for another execution, at most 30 seconds, and then raise
    ``InProgress``. ``task.run(…)`` is the body alone, without any guard. A body that
    calls its own task with its own intent simply runs on: it holds the claim already.
    """

    Request = "celery_idem.worker:IdempotentRequest"

    intent: Any = None
    must_match: Any = ()
    secret: Any = ()
    intent_version: int | str = 1
    reconcile: Any = None
    no_effect_errors: tuple[type[BaseException], ...] = ()
    ambiguous_errors: tuple[type[BaseException], ...] = ()

    declaration: ClassVar[keys.Declaration | None] = None
    """The checked declaration; None for an ordinary task."""

    _guard_made: ClassVar[Guard | None] = None

    # --- declaration ------------------------------------------------------------------

    @classmethod
    def on_bound(cls, app: Celery) -> None:
        """Check the declaration. Called by Celery when the task is registered.

        Raises:
            ConfigurationError: the declaration or a setting is wrong.
        """
        super().on_bound(app)
        cls._guard_made = None
        cls.declaration = declaring.declaration_of(cls, app)
        if cls.declaration is None:  # an ordinary task: as if this class were not there
            setattr(cls, "__call__", Task.__call__)  # noqa: B010  # mypy takes an assignment for a mistake
            cls.Request = Task.Request

    @property
    def guard(self) -> Guard:
        """Everything needed to run this task's intents; made at first use.

        Raises:
            ConfigurationError: a setting is wrong.
        """
        cls = type(self)
        if cls._guard_made is None:
            cls._guard_made = Guard.of(self)
        return cls._guard_made

    def intent_key(
        self, *args: Any, scope: str | None = None, occurrence: str | None = None, **kwargs: Any
    ) -> str:
        """The idempotency key of a call. Pure: asks no store.

        Raises:
            TypeError: the call does not fit the task's signature.
            IntentError: an argument cannot be part of a key.
        """
        declaration = self._declared("intent_key")
        self._refuse_clash("intent_key", "scope", "occurrence")
        return declaration.key(self.guard.ledger.namespace, declaration.bind(args, kwargs), scope, occurrence)

    def submit(
        self,
        *args: Any,
        scope: str | None = None,
        occurrence: str | None = None,
        idempotency_key: str | None = None,
        **kwargs: Any,
    ) -> Receipt:
        """Look the intent up, publish it only when it is new, and say where it stands.

        The door for agents and orchestrators: whatever stands there already (done, in
        progress, in doubt, known with other values) is a value of the receipt and never
        an exception. Further options of ``apply_async`` go through ``celery_idem.submit``.

        Args:
            scope: tenant or conversation that the action belongs to.
            occurrence: which of several meant repetitions this is.
            idempotency_key: the caller's own key, see ``apply_async``.

        Raises:
            TypeError: the call does not fit the task's signature.
            IntentError: an argument cannot be part of a key.
            kombu.exceptions.OperationalError: the broker did not take it; nothing is left behind.
        """
        self._declared("submit")
        self._refuse_clash("submit", "scope", "occurrence", "idempotency_key")
        return receipts.submit_task(self, args, kwargs, scope, occurrence, idempotency_key, {})

    def _refuse_clash(self, method: str, *names: str) -> None:
        clash = set(names) & set(self._declared(method).signature.parameters)
        if clash:
            raise ConfigurationError(
                f"{self.name} has a parameter called {clash.pop()!r} of its own, so {method}() cannot tell which is "
                "meant. Rename the parameter."
            )

    def _declared(self, what: str) -> keys.Declaration:
        if self.declaration is None:
            raise ConfigurationError(
                f"{self.name} declares no intent, so {what} means nothing for it. Add intent=(…) to the task."
            )
        return self.declaration

    # --- publishing -------------------------------------------------------------------

    def apply_async(
        self,
        args: Any = None,
        kwargs: Any = None,
        *more: Any,
        scope: str | None = None,
        occurrence: str | None = None,
        idempotency_key: str | None = None,
        **options: Any,
    ) -> AsyncResult:
        """As Celery's, with three more options.

        Args:
            scope: tenant or conversation that the action belongs to.
            occurrence: which of several meant repetitions this is.
            idempotency_key: the caller's own key; then it is the identity, and every
                argument must match.

        Raises:
            IntentError: an argument cannot be part of a key.
        """
        options = self._with_key(args, kwargs, options, scope, occurrence, idempotency_key)
        return super().apply_async(args, kwargs, *more, **options)

    def apply(
        self,
        args: Any = None,
        kwargs: Any = None,
        *more: Any,
        scope: str | None = None,
        occurrence: str | None = None,
        idempotency_key: str | None = None,
        **options: Any,
    ) -> EagerResult:
        """As Celery's, with the options of ``apply_async``."""
        options = self._with_key(args, kwargs, options, scope, occurrence, idempotency_key)
        return super().apply(args, kwargs, *more, **options)

    def signature_from_request(self, *args: Any, **kwargs: Any) -> Signature:
        """As Celery's. What is published from it is the same intent, whatever its arguments."""
        signature = super().signature_from_request(*args, **kwargs)
        if self.declaration is not None:
            signature.options["idem_same_intent"] = True
        return signature

    def replace(self, sig: Signature) -> Any:
        """As Celery's. The replacement belongs to the same scope and occurrence, and to the same caller's key.

        Where it is guarded itself, this intent is released: another delivery finds the
        replacement's record. Any other must be published only once, so this intent is
        done, and its result is that of the task that took its place.
        """
        if self.declaration is None:
            return super().replace(sig)
        known = self.request.headers or {}
        given = {name: known[name] for name in (SCOPE, OCCURRENCE, CALLER_KEY) if name in known}
        guarded = True
        for leaf in _leaves(sig):
            leaf.options["headers"] = {**given, **(leaf.options.get("headers") or {})}
            guarded = guarded and getattr(self.app.tasks.get(leaf.task), "declaration", None) is not None
        if guarded:
            return super().replace(sig)
        try:
            return super().replace(sig)
        except Ignore as error:
            raise _Replaced(*error.args) from None

    def _with_key(
        self,
        args: Any,
        kwargs: Any,
        options: dict[str, Any],
        scope: str | None,
        occurrence: str | None,
        idempotency_key: str | None,
    ) -> dict[str, Any]:
        given = {SCOPE: scope, OCCURRENCE: occurrence, CALLER_KEY: idempotency_key}
        given = {name: value for name, value in given.items() if value is not None}
        if self.declaration is None:
            if given:
                self._declared(f"{', '.join(given)} of a call")
            return options
        same = options.pop("idem_same_intent", False)
        headers = dict(options.get("headers") or {})  # a copy: beat hands the same one at every tick
        headers.update(given)
        if not (same and KEY in headers):
            headers.pop(KEY, None)
            try:
                arguments = self.declaration.bind(args, kwargs)
            except TypeError:
                if self.typing:
                    raise
            else:
                headers[KEY] = self.declaration.key(
                    self.guard.ledger.namespace,
                    arguments,
                    headers.get(SCOPE),
                    headers.get(OCCURRENCE),
                    headers.get(CALLER_KEY),
                )
        options["headers"] = headers
        return options

    # --- running ----------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        request = self.request_stack.top
        if request is None or request.called_directly or hasattr(request, "idem_claim"):
            return self._call_directly(request, args, kwargs)
        return self._run_guarded(request, args, kwargs)

    def _call_directly(self, caller: Context | None, args: Any, kwargs: Any) -> Any:
        """A plain Python call: a request of its own, so that the body finds what it expects."""
        headers = None
        if caller is not None and hasattr(
            caller, "idem_claim"
        ):  # its own body calls: same scope, same occurrence
            known = caller.headers or {}
            headers = {name: known[name] for name in (SCOPE, OCCURRENCE, CALLER_KEY) if name in known}
        _task_stack.push(self)
        self.push_request(args=args, kwargs=kwargs, headers=headers)
        try:
            return self._run_guarded(self.request_stack.top, args, kwargs)
        finally:
            self.pop_request()
            _task_stack.pop()

    def _run_guarded(self, request: Context, args: Any, kwargs: Any) -> Any:
        guard = self.guard
        if self.typing:
            self.__header__(*args, **kwargs)  # a call that does not fit claims nothing
        key, fingerprint = guard.identify(request, args, kwargs)
        if len(self.request_stack) > 1 and self._holds(key):
            return self.run(*args, **kwargs)
        return guard.runner.run(Delivery(guard, self, request, args, kwargs, key, fingerprint))

    def _holds(self, key: str) -> bool:
        """An outer execution of this thread has the claim already."""
        outer = (getattr(request, "idem_claim", None) for request in self.request_stack.stack)
        return any(claim is not None and claim.key == key for claim in outer)

    # --- what a body has --------------------------------------------------------------

    @property
    def claim(self) -> Claim:
        """This execution's hold on its intent.

        Raises:
            IdempotencyError: no guarded execution is under way.
        """
        for request in reversed(self.request_stack.stack if self.request_stack is not None else ()):
            claim = getattr(request, "idem_claim", None)
            if claim is not None:
                assert isinstance(claim, Claim)
                return claim
        raise IdempotencyError(
            f"{self.name} is not running under a claim, so there is no self.claim. It is there while the "
            "task runs: by a worker, by apply(), or called directly; not in task.run()."
        )

    def step(
        self,
        name: str,
        fn: Callable[..., Any],
        *args: Any,
        reconcile: Callable[..., Answer] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run ``fn(*args, **kwargs)`` once per intent and keep its result in the record.

        An attempt after a crash gets the kept result and goes on at the first step that
        is missing. A crash inside a step leaves that step in doubt.

        Args:
            name: unique within the body.
            reconcile: ``(*args, **kwargs)`` of the step: asks the destination whether the
                step happened, and returns ``Happened``, ``NotHappened`` or ``Unknown``.

        Raises:
            OutcomeUnknown: the step is in doubt.
            LeaseLost: somebody took the intent over; nothing was started.
            ConfigurationError: the name is taken, a step is open, or the result of
                ``fn`` cannot be stored.
        """
        return self.guard.step(
            self.claim, name, lambda: fn(*args, **kwargs), reconcile and _later(reconcile, args, kwargs)
        )


def _later(call: Callable[..., Answer], args: Any, kwargs: Any) -> Callable[[], Answer]:
    return lambda: call(*args, **kwargs)


@dataclass(frozen=True)
class Guard:
    """What one task's executions share: its declaration, settings and ledger."""

    declaration: keys.Declaration
    settings: Settings
    ledger: Ledger
    runner: Runner
    options: Options
    ambiguous: tuple[type[BaseException], ...]
    ask: Callable[..., Answer] | None

    @classmethod
    def of(cls, task: IdempotentTask) -> Guard:
        declaration = task._declared("a guard")
        settings = declaring.settings_of(type(task), task.app)
        ask = _ask_of(task)
        ledger = ledger_of(task.app, settings)
        return cls(
            declaration=declaration,
            settings=settings,
            ledger=ledger,
            runner=Runner(ledger),
            options=Options(
                policy=settings.policy(asks=ask is not None),
                on_store_error=settings.on_store_error,
                patience=settings.settle_patience,
                ask_timeout=settings.reconcile_timeout,
                no_effect_errors=tuple(task.no_effect_errors),
            ),
            ambiguous=(*task.ambiguous_errors, OutcomeUnknown, InProgress, StoreError, LeaseLost),
            ask=ask,
        )

    def identify(self, request: Context, args: Any, kwargs: Any) -> tuple[str, Fingerprint]:
        """Key and fingerprint of a delivery: from its headers, else from its arguments."""
        headers = request.headers or {}
        caller_key = headers.get(CALLER_KEY)
        sent = headers.get(KEY)
        key = sent if isinstance(sent, str) and keys.task_of(sent) == self.declaration.task else None
        if key is not None and caller_key is None and not self.declaration.must_match:
            return key, Fingerprint()
        arguments = self.declaration.bind(args, kwargs)
        if key is None:
            key = self.declaration.key(
                self.ledger.namespace, arguments, headers.get(SCOPE), headers.get(OCCURRENCE), caller_key
            )
        return key, self.declaration.fingerprint(arguments, caller_key)

    def step(self, claim: Claim, name: str, run: Callable[[], Any], ask: Callable[[], Answer] | None) -> Any:
        if not claim.guarded:
            return run()
        options = self.options
        bounded = None if ask is None else (lambda: self.runner.bounded(ask, options.ask_timeout))
        return self.ledger.step(claim, name, run, bounded, options.patience, options.no_effect_errors)


def _ask_of(task: IdempotentTask) -> Callable[..., Answer] | None:
    """``reconcile`` as a call that gets the delivery's arguments."""
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


class _Replaced(Ignore):  # type: ignore[misc]
    """The body handed its action over to a task that has no guard of its own."""


def _leaves(signature: Signature) -> Iterator[Signature]:
    """The simple signatures in a canvas."""
    parts = [*(getattr(signature, "tasks", None) or ()), *filter(None, [getattr(signature, "body", None)])]
    if not parts:
        yield signature
    for part in parts:
        yield from _leaves(part)


class Delivery(Job):
    """One request of Celery's as a job for the runner."""

    def __init__(
        self,
        guard: Guard,
        task: IdempotentTask,
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
        super().__init__(
            key=key,
            task_id=request.id or "",
            fingerprint=fingerprint,
            options=guard.options,
            carried=_unhex(headers.get(CARRIED)),
        )
        self.in_place = request.is_eager or request.called_directly
        self.began = 0.0

    def body(self, claim: Claim) -> Any:
        self.request.idem_claim = claim
        return self.task.run(*self.args, **self.kwargs)

    def ask(self, claim: Claim) -> Answer:
        """On the runner's side thread: it gets this request, so that ``task.request`` and ``task.claim`` work."""
        self.request.idem_claim = claim
        ask = self.guard.ask
        assert ask is not None
        self.task.request_stack.push(self.request)
        try:
            return ask(*self.args, **self.kwargs)
        finally:
            self.task.request_stack.pop()

    def follow(self, task_id: str) -> tuple[bool, Any]:
        if task_id == self.task_id:  # the replacement goes by this very id, and will give the answer
            raise Ignore(f"{self.key}: replaced")
        try:
            result = self.task.app.AsyncResult(task_id)
            state, value = result.state, result.result
        except Exception as error:  # no result backend, or any error of any driver
            raise self._unavailable(task_id, str(error)) from error
        if state == "SUCCESS":
            return True, value
        if state in PROPAGATE_STATES:
            raise value if isinstance(value, BaseException) else self._unavailable(task_id, state)
        if self._waits >= MAX_FOLLOWS:
            raise self._unavailable(task_id, state)
        return False, None

    def _unavailable(self, task_id: str, why: str) -> ResultUnavailable:
        reason = f"it was replaced by task {task_id}, whose result is not here ({why})"
        return ResultUnavailable(
            f"{self.key} is done and will not be done again; {reason}.", self.key, reason
        )

    def kind_of(self, error: BaseException) -> Raised:
        if isinstance(error, Retry):
            return Raised.IGNORE if self.request.called_directly else Raised.RETRY
        if isinstance(error, _Replaced):
            return Raised.REPLACED
        if isinstance(error, Ignore):
            return Raised.IGNORE
        if isinstance(error, Reject):
            return Raised.REJECT
        if isinstance(error, self.options.no_effect_errors):
            return Raised.NO_EFFECT
        if isinstance(error, self.guard.ambiguous):
            return Raised.AMBIGUOUS
        if isinstance(error, SoftTimeLimitExceeded):
            return Raised.TIME_LIMIT
        return Raised.ERROR if isinstance(error, Exception) else Raised.EXIT

    def retry_delay(self, error: BaseException) -> float:
        """Until the retry's ETA, and one lease more for its way through the queue."""
        when = getattr(error, "when", None)
        if isinstance(when, datetime):
            aware = when if when.tzinfo is not None else when.replace(tzinfo=timezone.utc)
            seconds = (aware - datetime.now(timezone.utc)).total_seconds()
        else:
            seconds = float(when or 0)
        return max(0.0, seconds) + self.guard.settings.lease

    def come_back(self, seconds: float, carried: tuple[bytes, ...], why: str) -> None:
        """Try again later: in place for a moment, then by a message that is published anew.

        This is what Celery's own ``retry`` does, less the counting: message id, chord, chain,
        links and headers stay, and no retry is used up.
        """
        busy = why == "in progress"
        if busy and self.guard.settings.on_duplicate == "raise":
            raise self._in_progress(seconds)
        if self.in_place:
            self._wait_in_place(seconds, why)
            return
        waits = self._waits
        if busy and waits == 0 and self.waited < SLOT_WAITS:
            self.waited += 1
            threading.Event().wait(FIRST_WAIT * self.waited)
            return
        delay = backoff(waits, seconds)
        signature = self.task.signature_from_request(
            self.request, countdown=delay, retries=self.request.retries
        )
        signature.options["headers"] = {
            **(signature.options.get("headers") or {}),
            KEY: self.key,
            WAITS: waits + 1,
            CARRIED: [owner.hex() for owner in carried],
        }
        signature.apply_async()
        raise Retry(f"{self.key}: {why}", when=delay, sig=signature)

    @property
    def _waits(self) -> int:
        """How often this message has come back already."""
        waits = (self.request.headers or {}).get(WAITS, 0)
        return waits if isinstance(waits, int) and waits >= 0 else 0

    def _wait_in_place(self, seconds: float, why: str) -> None:
        now = time.monotonic()
        if not self.began:
            self.began = now
        if now - self.began > INLINE_LIMIT:
            if why == "in progress":
                raise self._in_progress(seconds)
            raise StoreError(f"{why} Nothing was run for {self.key}.", self.key)
        threading.Event().wait(min(backoff(self.waited, seconds), FIRST_WAIT * 2**self.waited, 1.0))
        self.waited += 1

    def _in_progress(self, seconds: float) -> InProgress:
        return InProgress(
            f"{self.key} is being worked on right now. Nothing was started. Ask again in {seconds:.1f} s.",
            self.key,
            round(seconds, 3),
        )


def backoff(waits: int, at_most: float) -> float:
    """Seconds until a duplicate comes back.

    Args:
        waits: how often it came back already.
        at_most: seconds after which the holder must have renewed: a dead one is decided
            then, so nobody waits longer; 0 when that is not known.
    """
    first, growth, longest = BACKOFF
    delay = min(longest, first * growth ** min(waits, 50))
    if at_most > 0:
        delay = min(delay, at_most + FIRST_WAIT)
    return delay * random.uniform(0.9, 1.1)  # noqa: S311  # so that a hundred do not come back at once


def _unhex(carried: Any) -> tuple[bytes, ...]:
    """Owners from a message header; nonsense in it is no owner."""
    owners = []
    for text in carried if isinstance(carried, (list, tuple)) else ():
        try:
            owners.append(bytes.fromhex(text))
        except (TypeError, ValueError):
            continue
    return tuple(owners)
