"""``IdempotentTask``: the guard around a Celery task's body.

The guard is the task's ``__call__``, because that sees every attempt. The tracer calls ``__call__`` if a class
overrides it. Autoretry and pydantic wrap ``run``, which is inside. A value that ``__call__`` returns is an ordinary
success, with its state, links, chain and chord. ``placing`` puts the guard into each task.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from celery import Task
from celery._state import _task_stack
from celery.app.task import Context
from celery.canvas import Signature
from celery.exceptions import Ignore, Retry
from celery.states import SUCCESS
from celery.utils import uuid
from celery.utils.imports import symbol_by_name

from celery_idem.core import keys
from celery_idem.core.errors import ConfigurationError, IdempotencyError, StoreError
from celery_idem.core.model import CALLER_KEY, KEY, MESSAGE, NO_FINGERPRINT, PUBLISHED, SCOPE, Answer, Request
from celery_idem.engine import events, owners
from celery_idem.engine.claim import Claim, Hold
from celery_idem.integration import (
    answers,
    declaring,
    messages,
    placing,
    publishing,
    republishing,
    retrying,
)
from celery_idem.integration.delivery import EAGER, HELD, PROPAGATES, Delivery, Guard, Replaced, as_headers
from celery_idem.integration.guarded import guarded_task
from celery_idem.integration.options import declares
from celery_idem.integration.publishing import LOOPS
from celery_idem.integration.transactions import warn_if_open

if TYPE_CHECKING:
    from celery import Celery
    from celery.result import AsyncResult, EagerResult

    from celery_idem.integration.many import Call
    from celery_idem.integration.receipts import Receipt

# The methods that submit import what they need: ``submitting``, ``many``, ``outbox``, ``awaiting``. That, and what it
# uses, is a tenth of the package's import, and most programs never submit.

_OF_APPLY = ("link", "link_error", "task_id", "retries", "throw", "logfile", "loglevel", "headers")
"""The parameters of Celery's ``apply`` after ``args`` and ``kwargs``."""

WORKER_STEPS = ("celery_idem.operate.doctor.at_start:AtStart", "celery_idem.telemetry.celery_events:AtStart")
"""Steps that a worker with a guarded task runs when it starts. They are given by name, because they are in packages
above this one, and only workers load them."""

UNKEYED = "0" * 32
"""Digest of a call without a key."""


class IdempotentTask(Task):  # type: ignore[misc,unused-ignore]  # Celery's Task is untyped before 5.7
    """A task whose action happens once per intent, however often it is called.

    Use it as ``base=`` of a task, or as ``task_cls=`` of an application. With ``task_cls=``, tasks without an intent,
    and Celery's own tasks, stay ordinary tasks. The options of a declaration, which may also be in
    ``task_annotations``:

    Attributes:
        intent: parameter names that say what the action is; or a function from the arguments to a dictionary; or
            ``ALL_ARGUMENTS``.
        must_match: parameters that must be equal whenever the intent comes back.
        secret: parameters whose values are never shown in a log, page, audit or event, including Celery's own. (A
            message that ``send_task`` publishes by name is made by Celery alone, and may show them.) If one is part of
            the intent or of ``must_match``, the store has an unkeyed digest of it. A reader of the store could guess a
            short value.
        describe: a sentence for people who decide about the action: a format string such as ``"invoice {invoice_id} of
            customer {customer_id}"``, or a function from the arguments (a dictionary) to text. It sees ``(secret)``
            instead of secret values.
        signature: the parameters as callers give them, without ``self``: a function or an ``inspect.Signature``. Needed
            if a decorator hides them. (On the task itself ``signature`` remains Celery's method.)
        intent_version: change it when the same fields begin to mean another action.
        aliases: other names of the task, the oldest first. Its keys have the first one, and messages with any of them
            reach it.
        reconcile: a function ``(task, *args, **kwargs)``, or a method. It asks the destination after a crash, and
            returns ``Happened(result)``, ``NotHappened()`` or ``Unknown(reason)``.
        no_effect_errors: exceptions that prove that nothing happened, so that the intent may be tried again.
        ambiguous_errors: exceptions after which the effect is unknown, such as a timeout while waiting for the answer.
            The intent is in doubt, or the destination is asked.

    *Ignore and Reject* say that nothing happened: the intent is released, and the next call RUNS. Never raise them
    after an effect. There is one exception: a body may write its final state (``update_state`` with ``SUCCESS`` or
    ``FAILURE``) and then raise ``Ignore``. That state is then the outcome, and duplicates get its ``meta``.

    Every setting is an option too. Beside the intent it has its short name (``lease=``, ``on_crash=``, …); in a base
    class or a mixin it has its full name (``idem_lease``, ``idem_on_crash``, …).

    *Eager and direct calls* (``task.apply()``, ``task_always_eager``, ``task(…)``, ``chunks`` and ``starmap``) are
    guarded too. They have no message to send back. So they wait in place for another execution, at most 30 seconds, and
    then raise ``InProgress``. ``task.run(…)`` is the body alone, without any guard. A body that calls its own task with
    its own intent runs on, because it holds the claim.
    """

    intent: Any = None
    must_match: Any = ()
    secret: Any = ()
    describe: Any = None
    intent_version: int | str = 1
    aliases: Any = ()
    reconcile: Any = None
    no_effect_errors: tuple[type[BaseException], ...] = ()
    ambiguous_errors: tuple[type[BaseException], ...] = ()

    idem_declaration: ClassVar[keys.Declaration | None] = None
    """The checked declaration; None for an ordinary task."""

    _guard_made: ClassVar[Guard | None] = None

    _bound_early = False

    # --- declaration ------------------------------------------------------------------

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Bind a decorated task before Celery registers it, so that no other thread can find it unbound."""
        task = super().__new__(cls)
        if "_decorated" in vars(cls):
            cls.bind(cls.app)
            cls._bound_early = True
        return task

    @classmethod
    def bind(cls, app: Celery) -> Any:
        """As Celery's, with a check of the declaration. Celery calls it when the task is registered.

        This is not in ``on_bound``, because authors override that without calling ours.

        Raises:
            ConfigurationError: the declaration or a setting is wrong.
        """
        if vars(cls).get("_bound_early"):
            cls._bound_early = False
            # Celery has registered the task, so its other names can follow.
            if cls.idem_declaration is not None:
                declaring.register_names(cls, app, cls.idem_declaration.names)
            return app
        in_code = declares(cls)
        bound = super().bind(app)
        declaration = declaring.declaration_of(cls, app, _asked(cls, app), in_code)
        if declaration is not None:
            declaring.register_names(cls, app, declaration.names)
            cls._guard_made, cls.idem_declaration = None, declaration
            placing.put_on(cls, IdempotentTask._call_guarded)
            if declaration.secret:
                publishing.hide(declaration)
            app.steps["worker"].update(WORKER_STEPS)
        elif cls.idem_declaration is not None:  # it was bound before with an intent, or a base has one
            cls._guard_made = cls.idem_declaration = None
            placing.take_off(cls)
        return bound

    def start_strategy(self, app: Celery, consumer: Any, **kwargs: Any) -> Any:
        """As Celery's. In a worker, the request of a guarded task gets our class as a base."""
        if self.idem_declaration is not None:
            self.Request = symbol_by_name("celery_idem.integration.deaths:request_class")(self)
        return super().start_strategy(app, consumer, **kwargs)

    @property
    def backend(self) -> Any:
        """As Celery's. A guarded task gets the application's backend in a form that skips results already written."""
        backend = Task.backend.fget(self)
        if self.idem_declaration is None or self._backend is not None:
            return backend
        return vars(backend).get(answers.TWIN) or answers.aware(backend)

    @backend.setter
    def backend(self, backend: Any) -> None:
        self._backend = backend

    @property
    def guard(self) -> Guard:
        """What the task's executions share. Made at first use.

        Raises:
            ConfigurationError: a setting is wrong.
        """
        cls = type(self)
        guard = cls._guard_made
        if guard is None:  # in a local variable, because another thread may bind the task again
            guard = cls._guard_made = Guard(self, self._declared("a guard"))
        return guard

    def intent_key(
        self, *args: Any, scope: str | None = None, occurrence: str | None = None, **kwargs: Any
    ) -> str:
        """Return the idempotency key of a call. Asks no store.

        Raises:
            TypeError: the call does not fit the task's signature.
            IntentError: an argument cannot be part of a key.
        """
        declaration = self._declared("intent_key")
        self._refuse_clash("intent_key", "scope", "occurrence")
        scope = publishing.in_scope(self.guard.settings.scope, scope)
        return declaration.key(self.guard.ledger.namespace, declaration.bind(args, kwargs), scope, occurrence)

    def submit(
        self,
        *args: Any,
        scope: str | None = None,
        occurrence: str | None = None,
        idempotency_key: str | None = None,
        **kwargs: Any,
    ) -> Receipt:
        """Accept a new call in its record and publish it. Return a receipt with the intent's status.

        An accepted call will run, even if the broker does not take its message, or loses it.

        This is for agents and orchestrators. What is already known of the intent (done, in progress, in doubt, other
        values) is in the receipt, and never an exception.

        Args:
            kwargs: the task's named arguments, and options of ``apply_async`` (``countdown``, ``eta``, ``expires``,
                ``queue``, ``priority``, ``headers``, …). If the task has a parameter of that name, it is an argument,
                and a task with ``**kwargs`` takes every name. ``celery_idem.submit`` takes both separately.
            scope: tenant or conversation that the action belongs to.
            occurrence: which of several intended repetitions this is.
            idempotency_key: the caller's own key, see ``apply_async``.

        Raises:
            TypeError: the call does not fit the task's signature.
            IntentError: an argument cannot be part of a key.
            StoreError: with ``on_store_error="raise"``, the store did not answer. Otherwise that is a receipt
                ``not_run``.
            kombu.exceptions.OperationalError: the broker did not take the message, and recovery could not publish it
                later (the record does not hold the whole call, or ``recover=False``). The call is not accepted.
        """
        from celery_idem.integration.awaiting import warn_on_loop
        from celery_idem.integration.submitting import submit_task

        options = self._options_of("submit", kwargs)
        warn_on_loop(f"submit() of {self.name}", "await task.asubmit()")
        return submit_task(self, args, kwargs, scope, occurrence, idempotency_key, options)

    async def asubmit(
        self,
        *args: Any,
        scope: str | None = None,
        occurrence: str | None = None,
        idempotency_key: str | None = None,
        **kwargs: Any,
    ) -> Receipt:
        """As ``submit``, without blocking the event loop. For asyncio.

        If it is cancelled while it waits for a thread, it has done nothing. If it is cancelled later, the submit goes
        on in its thread: the call is accepted and published once. Call again unchanged to get its receipt.
        """
        from celery_idem.integration.awaiting import in_thread

        own = {"scope": scope, "occurrence": occurrence, "idempotency_key": idempotency_key}
        return await in_thread("submit", partial(self.submit, *args, **own, **kwargs))

    def submit_many(
        self, calls: Iterable[Call], *, scope: str | None = None, **options: Any
    ) -> list[Receipt]:
        """Submit many calls, with one write per hundred. Return their receipts in order.

        ::

            charge.submit_many([{"order": 7, "cents": 100}, (8, 250), charge.s(9, cents=1).set(occurrence="2")])

        If a call is wrong, its receipt says so, and the other calls go on. Of two calls that are the same action, the
        second is a duplicate.

        Args:
            calls: each is a mapping of named arguments, a tuple of positional ones, or a signature
                (``task.s(…)``, with ``scope``, ``occurrence``, ``idempotency_key`` and options of ``apply_async`` in
                ``set(…)``).
            scope: as for ``submit``, for all calls without a scope.
            options: options of ``apply_async`` for all calls.
        """
        from celery_idem.integration.many import submit_calls

        self._declared("submit_many")
        return submit_calls(self, calls, scope, options)

    def submit_in(
        self,
        connection: Any,
        /,
        *args: Any,
        scope: str | None = None,
        occurrence: str | None = None,
        idempotency_key: str | None = None,
        **kwargs: Any,
    ) -> Receipt:
        """Submit in your own transaction: the call is accepted if that transaction commits, and only then.

        ::

            with Session(engine) as session, session.begin():
                session.add(Order(number=7))
                receipt = ship.submit_in(session, 7)

        The record is written in the transaction, in the table that ``idem_store`` names. After a rollback there is no
        record and no message. After a commit the call is published at once, with SQLAlchemy and Django. With a
        driver's own connection, or if the process dies after the commit, recovery publishes it within about three
        seconds. Use the receipt's ``wait`` after the commit.

        Args:
            connection: as for ``settle_in``.

        Raises:
            ConfigurationError: another database, no transaction, or a call that recovery could not publish.
            StoreError: as ``submit``. Errors of the connection are its driver's.
            TypeError, IntentError: as ``submit``.
        """
        from celery_idem.integration import outbox

        own = {"scope": scope, "occurrence": occurrence, "idempotency_key": idempotency_key}
        options = self._options_of("submit_in", kwargs)
        return outbox.submit_in(self, connection, args, kwargs, own, options)

    def submit_on_commit(
        self,
        connection: Any,
        /,
        *args: Any,
        scope: str | None = None,
        occurrence: str | None = None,
        idempotency_key: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Submit after your transaction commits, and not if it rolls back. For a store in another database.

        If the store does not answer after the commit, the call is lost, and an error in the log says so. If the process
        dies between the commit and the submit, it is lost without a trace. ``submit_in`` does not lose calls.

        Args:
            connection: a SQLAlchemy session, or Django's ``connection``.

        Raises:
            ConfigurationError: another kind of connection.
            TypeError, IntentError: as ``submit``.
        """
        from celery_idem.integration import outbox

        own = {"scope": scope, "occurrence": occurrence, "idempotency_key": idempotency_key}
        options = self._options_of("submit_on_commit", kwargs)
        outbox.submit_on_commit(self, connection, args, kwargs, own, options)

    def _options_of(self, method: str, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Remove the options of ``apply_async`` from a submit's named arguments, and return them."""
        from celery_idem.integration.submitting import options_among

        self._refuse_clash(method, *keys.LABELS)
        return options_among(kwargs, self._declared(method).signature)

    def _refuse_clash(self, method: str, *names: str) -> None:
        for name in self._declared(method).signature.parameters:
            if name in names:
                raise ConfigurationError(
                    f"{self.name} has a parameter called {name!r} of its own, so {method}() cannot tell which is "
                    "meant. Rename the parameter."
                )

    def _declared(self, what: str) -> keys.Declaration:
        if self.idem_declaration is None:
            raise ConfigurationError(
                f"{self.name} declares no intent, so {what} means nothing for it. Add intent=(…) to the task."
            )
        return self.idem_declaration

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
            scope: tenant or conversation that the action belongs to; None: the scope of ``idem_scope``.
            occurrence: which of several intended repetitions this is.
            idempotency_key: the caller's own key. It is then the identity, and every argument must match.

        Each of the three is text, an int (its digits) or an Enum (its value), and not empty.

        Raises:
            IntentError: an argument cannot be part of a key.
        """
        same = options.get(retrying.SAME_INTENT)
        given = {"scope": scope, "occurrence": occurrence, "idempotency_key": idempotency_key}
        if self.idem_declaration is not None:
            decided = options.pop(messages.DECIDED, False) or same or bool(more)
            its_own_id = options.get("task_id") is not None
            task_id = (more[0] if more else options.get("task_id")) or uuid()
            if more:
                more = (task_id, *more[1:])
            else:
                options["task_id"] = task_id
            if idempotency_key is not None and "group_id" in options:
                options = self._in_a_group(options, given)
            options = self._with_key(args, kwargs, options, given, task_id)
            options["headers"][MESSAGE] = task_id
            if not same:
                warn_if_open(self.name)
            if not decided and self._accepts:
                from celery_idem.integration.submitting import accept_published

                standing = accept_published(self, args, kwargs, options, its_own_id)
                if standing is not None:
                    return self.AsyncResult(standing)
            if same and hasattr(self.request_stack.top, "idem_claim") and not self.app.conf.task_always_eager:
                return self._continue(args, kwargs, more, options)
        else:
            options = self._without_key(options, given)
        return super().apply_async(args, kwargs, *more, **options)

    @property
    def _accepts(self) -> bool:
        settings = self.guard.settings
        return settings.accept_on_publish and not settings.shadow and not self.app.conf.task_always_eager

    def _continue(self, args: Any, kwargs: Any, more: Any, options: dict[str, Any]) -> AsyncResult:
        """Publish a message that continues an intent, and keep its call for the record of the body that runs here."""
        producer = (more[1] if len(more) > 1 else None) or options.pop("producer", None)
        with self.app.producer_or_acquire(producer) as real:
            recorder = messages.Recorder(real, self)
            if len(more) > 1:
                more = (more[0], recorder, *more[2:])
            else:
                options["producer"] = recorder
            result = super().apply_async(args, kwargs, *more, **options)
        retrying.note_published(self.request_stack.top, options, recorder.call)
        return result

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
        given = {"scope": scope, "occurrence": occurrence, "idempotency_key": idempotency_key}
        if self.idem_declaration is not None:
            options.update(zip(_OF_APPLY, more, strict=False))  # headers and throw may be given by position
            more = more[len(_OF_APPLY) :]
            if idempotency_key is not None and "group_id" in options:
                options = self._in_a_group(options, given)
            # With task_always_eager, apply_async has made these headers for the same call.
            options = self._with_key(args, kwargs, options, given, options.get("task_id"))
            options["headers"].pop(MESSAGE, None)
            throw = options.get("throw")
            if self.app.conf.task_eager_propagates if throw is None else throw:
                options["headers"][PROPAGATES] = True
            task_id = options["task_id"] = options.get("task_id") or uuid()
            EAGER.add(task_id)
            try:
                return super().apply(args, kwargs, *more, **options)
            finally:
                EAGER.discard(task_id)
        return super().apply(args, kwargs, *more, **self._without_key(options, given))

    def map(self, it: Any) -> Signature:
        """As Celery's."""
        return (
            super().map(it) if self.idem_declaration is None else publishing.Map(self.s(), it, app=self.app)
        )

    def starmap(self, it: Any) -> Signature:
        """As Celery's."""
        if self.idem_declaration is None:
            return super().starmap(it)
        return publishing.StarMap(self.s(), self._checked(it), app=self.app)

    def chunks(self, it: Any, n: int) -> Signature:
        """As Celery's."""
        if self.idem_declaration is None:
            return super().chunks(it, n)
        return publishing.Chunks(self.s(), self._checked(it), n, app=self.app)

    def _checked(self, calls: Any) -> list[Any]:
        checked = list(calls)
        for args in checked:
            keys.check_call(self.name, args, None)
        return checked

    def signature(self, args: Any = None, *more: Any, **options: Any) -> Signature:
        """As Celery's, with a check of ``args``: Celery makes a tuple of anything, also of a dictionary's keys."""
        if self.idem_declaration is not None:
            keys.check_call(self.name, args, more[0] if more else options.get("kwargs"))
        return super().signature(args, *more, **options)

    subtask = signature

    def signature_from_request(
        self, request: Any = None, args: Any = None, kwargs: Any = None, queue: Any = None, **options: Any
    ) -> Signature:
        """As Celery's. A message that is published from it is the same intent, whatever its arguments."""
        maybe_apart = options.pop(retrying.MAYBE_APART, None)
        signature = super().signature_from_request(request, args, kwargs, queue, **options)
        if self.idem_declaration is None:
            return signature
        request = self.request if request is None else request
        if maybe_apart:
            given = args is not None or kwargs is not None
            retrying.shape_retry(self, request, signature, given, *maybe_apart)
        else:
            retrying.continue_intent(self, request, signature)
        republishing.restore(signature.options, request, self.ignore_result, options)
        return signature

    def update_state(self, task_id: Any = None, state: Any = None, meta: Any = None, **kwargs: Any) -> None:
        """As Celery's. If a body writes SUCCESS or FAILURE and then raises ``Ignore``, that state is its outcome."""
        super().update_state(task_id, state, meta, **kwargs)
        held = next(self._held(), None)
        if held is not None and task_id in (None, held.request.id):
            held.request.idem_said = (state, meta)
            if state == SUCCESS:
                setattr(held.request, answers.DONE, True)

    subtask_from_request = signature_from_request

    def retry(
        self,
        args: Any = None,
        kwargs: Any = None,
        exc: Any = None,
        throw: bool = True,
        *more: Any,
        **options: Any,
    ) -> Any:
        """As Celery's: the same intent comes back, whatever its arguments.

        A published retry counts, even if the body swallows ``Retry``, or asks for ``throw=False``. With
        ``throw=False``, or after another retry, arguments may make another intent. They are then published as a
        separate call with its own task id, and this body goes on.

        Raises:
            ConfigurationError: a second retry of the same intent with other arguments, or a retry after the outcome was
                recorded.
        """
        claim = getattr(self.request, "idem_claim", None)
        if claim is None:
            return super().retry(args, kwargs, exc, throw, *more, **options)
        if claim.ended and self.guard.has_outcome(claim.key):
            events.diagnose(
                logging.ERROR,
                "%s: a retry was asked for after the body had ended; none was published",
                claim.key,
            )
            raise ConfigurationError(
                f"{claim.key}: a retry was asked for after the body had ended and its outcome was recorded (in "
                "on_failure, after_return, a signal): it would only replay that. Nothing was published. Catch the "
                "error in the body and `raise self.retry(exc=error)` there, or use autoretry_for.",
                claim.key,
            )
        cause = exc if isinstance(exc, BaseException) else sys.exc_info()[1]
        retries = retrying.retries_of(claim)
        if not self.guard.settings.shadow and (not throw or retries.signal is not None):
            options[retrying.MAYBE_APART] = (cause,)
        try:
            signal = super().retry(args, kwargs, exc, False, *more, **options)
        except retrying.AlreadyComing:
            first = retries.signal
            signal = Retry(exc=cause, when=first.when, is_eager=first.is_eager, sig=first.sig)
        except BaseException as error:
            shown = self._without_arguments(error, exc)
            retries.refused = shown, cause
            if shown is not error:
                raise shown from None
            raise
        retrying.note_retry(claim, signal, cause)
        if throw:
            raise signal
        return signal

    def _without_arguments(self, error: BaseException, given: Any) -> BaseException:
        """Return Celery's error after the last retry, without the arguments of a task with secrets.

        Celery's own error shows every argument, and it is stored.
        """
        if error is given or not isinstance(error, self.MaxRetriesExceededError):
            return error
        if self.idem_declaration is None or not self.idem_declaration.secret:
            return error  # type: ignore[no-any-return]
        hidden: BaseException = self.MaxRetriesExceededError(f"Can't retry {self.name}[{self.request.id}]")
        return hidden

    def replace(self, sig: Signature) -> Any:
        """As Celery's. The replacement has the same scope and occurrence.

        Under a caller's own key, each call of the replacement is a part of this action, identified by its own intent.

        If the replacement is guarded, this intent is released: another delivery finds the replacement's record. If not,
        it must be published only once. So this intent is done, and its result is the replacement's.
        """
        if self.idem_declaration is None:
            return super().replace(sig)
        given = {**_of_another_message(self.request.headers or {}), MESSAGE: ""}
        guarded = True
        for leaf in _leaves(sig):
            own = dict(leaf.options.get("headers") or {})
            if CALLER_KEY in own:  # the leaf has its own key, so it does not get that of this message
                leaf.options.setdefault("idempotency_key", own.pop(CALLER_KEY))
            leaf.options["headers"] = {**given, **own}
            guarded = guarded and guarded_task(self.app, leaf.task) is not None
        if guarded:
            return super().replace(sig)
        try:
            return super().replace(sig)
        except Ignore as error:
            raise Replaced(*error.args) from None

    @staticmethod
    def _in_a_group(options: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        """Return the options of a call in a group. Its caller's key may be that of the whole group."""
        given["idempotency_key"], part_of = publishing.of_a_group(given["idempotency_key"])
        return {**options, "headers": {**(options.get("headers") or {}), **part_of}}

    def _with_key(
        self, args: Any, kwargs: Any, options: dict[str, Any], given: Mapping[str, Any], message: str | None
    ) -> dict[str, Any]:
        """Return the options of a call with headers that say which intent it is.

        Args:
            given: scope, occurrence and caller's key of the call.
            message: id of the message that will have the headers; None: not known yet.
        """
        declaration = self._declared("a key")
        keys.check_call(self.name, args, kwargs)
        if not self.guard.settings.shadow:  # shadow mode refuses no call
            publishing.check_labels(self.name, options)
        # A copy, because beat gives the same object at every tick.
        headers = dict(options.get("headers") or {})
        if "argsrepr" in options or "kwargsrepr" in options:
            headers[messages.SHOWN] = True
        if declaration.secret:
            options = {**publishing.shown(declaration, args or (), kwargs or {}), **options}
        same = options.pop(retrying.SAME_INTENT, False)
        if not (same and KEY in headers):
            try:
                arguments = declaration.bind(args, kwargs)
            except TypeError:
                if self.typing:
                    raise
                arguments = None
            headers = self._identified(headers, given, message, same)
            if not same:
                headers[PUBLISHED] = publishing.first_due(self.app, options)
            if arguments is not None:
                try:
                    headers[KEY] = keys.key_of(declaration, self.guard.ledger.namespace, arguments, headers)
                except Exception:
                    if not self.guard.settings.shadow:  # shadow mode refuses no call
                        raise
        options["headers"] = headers
        return options

    def _identified(
        self, headers: Mapping[str, Any], given: Mapping[str, Any], message: str | None, same: bool = False
    ) -> dict[str, Any]:
        """Return the headers of a call with its identity, without a key.

        Args:
            same: the call continues an intent, so ``idem_scope`` is not asked.
        """
        own = keys.identity(headers, message)
        own.update(keys.labelled(given))
        if SCOPE not in own and MESSAGE not in headers and not same:
            scope = publishing.in_scope(self.guard.settings.scope)
            if scope is not None:
                own[SCOPE] = scope
        return {**{name: value for name, value in headers.items() if name not in keys.MADE}, **own}

    def _without_key(self, options: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options of an unguarded task's call, which has no identity.

        Celery's loops keep theirs, for the calls that they make.
        """
        own = keys.labelled(given)
        if own and self.name not in LOOPS:
            self._declared(
                f"{', '.join(name for name, value in given.items() if value is not None)} of a call"
            )
        return {**options, "headers": {**(options.get("headers") or {}), **own}} if own else options

    # --- running ----------------------------------------------------------------------

    def _call_guarded(self, *args: Any, **kwargs: Any) -> Any:
        """The ``__call__`` of a task that declares an intent."""
        stack = self.request_stack.stack  # read once, because it is looked up by thread
        request = stack[-1] if stack else None
        if request is None or request.called_directly or hasattr(request, "idem_claim"):
            return self._call_directly(request, args, kwargs)
        return self._run_guarded(request, args, kwargs)

    def _call_directly(self, above: Context | None, args: Any, kwargs: Any) -> Any:
        """Run a plain Python call, with its own request, so that the body finds one."""
        # No such call: a wrapper of __call__ calls the one that it wraps.
        if getattr(above, "idem_opened", False):
            return self.run(*args, **kwargs)
        options = _of_signature()
        given = {name: options.get(name) for name in keys.LABELS}
        headers: Mapping[str, Any] = options.get("headers") or {}
        outer = _task_stack.top
        caller = next(self._held(), None)
        if caller is not None and keys.labelled(given) == {} and keys.IDENTITY.isdisjoint(headers):
            # The task's own body calls. With the same identity and arguments, it holds the claim and runs on.
            known = caller.request.headers or {}
            headers = {name: value for name, value in known.items() if name in keys.IDENTITY}
        else:
            if outer is not None and outer.name in LOOPS:
                loop = outer.request
                known = {**as_headers(loop), **(loop.headers or {}), **keys.labelled(given)}
                given = {}
                headers = {**_of_another_message(known), **headers}
                if MESSAGE in known or not (loop.is_eager or loop.called_directly):
                    headers[MESSAGE] = (
                        ""  # the loop was called in another process: do not ask idem_scope here
                    )
            headers = self._identified(headers, given, None)
        _task_stack.push(self)
        self.push_request(args=args, kwargs=kwargs, headers=headers)
        try:
            return self._run_guarded(self.request_stack.stack[-1], args, kwargs)
        finally:
            self.pop_request()
            _task_stack.pop()

    def _run_guarded(self, request: Context, args: Any, kwargs: Any) -> Any:
        guard = self._guard_made or self.guard
        given = request.args
        if given is not None and not isinstance(given, (list, tuple)):  # not from Celery
            keys.check_call(self.name, given, None)
        if self.typing:  # a call that does not fit must not claim; a class-based task has no __header__
            getattr(self, "__header__", guard.declaration.signature.bind)(*args, **kwargs)
        try:
            if guard.unusable:
                guard.check_serializer()
            key, fingerprint = guard.identify(request, args, kwargs)
        except Exception as error:
            if not guard.settings.shadow:
                raise
            return self._run_unkeyed(guard, request, args, kwargs, error)
        if HELD.get() is not None and self._holds(key):
            return self.run(*args, **kwargs)
        return guard.runner.run(Delivery(guard, self, request, args, kwargs, key, fingerprint))

    def _came_past(self, request: Context, args: Any, kwargs: Any) -> Any:
        """Send a delivery through the guard that has reached ``run`` without a claim.

        Another ``__call__`` has replaced the guard and did not call it.
        """
        if hasattr(self, "_orig_run"):
            raise ConfigurationError(
                f"{self.name} was about to run past its guard: something replaced its __call__ after it was declared, "
                "or calls run() itself. Nothing was run. autoretry_for stands before the guard then, and would take "
                "each error for the outcome. Put that __call__ into a base class, or have it call the one it replaces."
            )
        return self._run_guarded(request, args, kwargs)

    def _held(self) -> Iterator[Delivery]:
        """Return this task's executions around the running code, the innermost first."""
        held = HELD.get()
        while held is not None:
            if held.task is self:
                yield held
            held = held.outer

    def _run_unkeyed(self, guard: Guard, request: Context, args: Any, kwargs: Any, error: Exception) -> Any:
        """Run a call in shadow mode that has no key. A guard would refuse it."""
        key = f"{self.name}:{UNKEYED}"
        events.emit("shadow", key, task_id=request.id, would="refuse", why=type(error).__name__)
        asked = Request(owners.mint(), str(request.id or ""), NO_FINGERPRINT, guard.options.policy)
        delivery = Delivery(guard, self, request, args, kwargs, key, NO_FINGERPRINT)
        return delivery.body(guard.ledger.unwritten(key, asked))

    def _holds(self, key: str) -> bool:
        """Whether a body around the running code holds the claim of this key."""
        return any(held.claim.key == key and not held.claim.ended for held in self._held())

    # --- for bodies -------------------------------------------------------------------

    @property
    def claim(self) -> Claim:
        """This execution's hold on its intent.

        Raises:
            IdempotencyError: no guarded execution is under way.
        """
        return Claim(self._hold)

    @property
    def _hold(self) -> Hold:
        held = next(self._held(), None)
        if held is not None:
            return held.claim
        raise IdempotencyError(
            f"{self.name} is not running under a claim, so there is no self.claim. It is there while the task runs: by "
            "a worker, by apply(), or called directly; not in task.run(). In a thread of your own it is there when the "
            "thread runs in a copy of the body's context: asyncio.to_thread, or contextvars.copy_context().run."
        )

    @property
    def _open_hold(self) -> Hold:
        """The hold of a body that has not ended."""
        claim = self._hold
        if claim.ended:
            raise IdempotencyError(
                f"The body of {claim.key} has ended, so nothing more can begin in its name. Wait for your threads and "
                "coroutines (join, await) before the body returns.",
                claim.key,
            )
        return claim

    def step(
        self,
        name: str,
        fn: Callable[..., Any],
        *args: Any,
        reconcile: Callable[..., Answer] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run ``fn(*args, **kwargs)`` once per intent and keep its result in the record.

        An attempt after a crash gets the kept results, and continues at the first missing step. A crash inside a step
        leaves that step in doubt.

        Args:
            name: unique within the body.
            reconcile: a function of the step's ``(*args, **kwargs)``. It asks the destination whether the step
                happened, and returns ``Happened``, ``NotHappened`` or ``Unknown``.

        Raises:
            OutcomeUnknown: the step is in doubt.
            LeaseLost: another execution took the intent over; nothing was started.
            ConfigurationError: the name is taken, a step is open, or the result of ``fn`` cannot be stored.
        """
        return self.guard.step(
            self._open_hold,
            name,
            lambda: fn(*args, **kwargs),
            reconcile and self._later(reconcile, args, kwargs),
        )

    def _later(self, ask: Callable[..., Answer], args: Any, kwargs: Any) -> Callable[[], Answer]:
        """Return a step's question for the runner's side thread, with this thread's ``self.request`` and claim."""
        requests = list(self.request_stack.stack)
        context = copy_context()

        def call() -> Answer:
            for request in requests:
                self.request_stack.push(request)
            try:
                return context.run(ask, *args, **kwargs)
            finally:
                for _ in requests:
                    self.request_stack.pop()

        return call

    @contextmanager
    def settle_in(self, connection: Any) -> Iterator[Settlement]:
        """Commit the outcome in your own transaction, together with the rows that you write: exactly once.

        ::

            with engine.begin() as connection, self.settle_in(connection) as outcome:
                connection.execute(insert(invoices).values(…))
                outcome.result = {"id": 7}

        The outcome is written at the end of the block, and counts once you commit. The body's own result is then
        ignored: every caller gets ``outcome.result``. If all effects of a task are in such a transaction, declare
        ``on_crash="transaction"``: a crash then leaves no doubt.

        Args:
            connection: a SQLAlchemy session or connection, a psycopg connection, or Django's ``connection``, to the
                database that ``idem_store`` names.

        Raises:
            LeaseLost: another execution took the intent over. The transaction must roll back, as it does when this
                error leaves it.
            ConfigurationError: another database, or no transaction.
        """
        ledger, claim = self.guard.ledger, self._open_hold
        if self.guard.settings.shadow:  # there is no record to write
            yield Settlement()
            return
        if not claim.guarded:
            raise StoreError(
                f"{claim.key} runs without a store (on_store_error='run'), so its outcome cannot be committed."
            )
        inside = ledger.store.inside(connection)
        settlement = Settlement()
        yield settlement
        owed = next(self._held()).owed()
        claim.settle_within(inside, *ledger.encode(settlement.result, claim.key), owed)


def _asked(cls: type[Any], app: Celery) -> bool:
    """Whether a task's author chose this class. Otherwise it is the application's ``task_cls`` for all tasks."""
    own = vars(cls).get("_app")
    if any(vars(one).get("Task") is cls for one in (app, own) if one is not None):
        return False
    return cls is IdempotentTask or any(_asked(base, app) for base in cls.__bases__)


class Settlement:
    """The value of a ``settle_in`` block. Set ``result`` to what every caller will get."""

    def __init__(self) -> None:
        self.result: Any = None


def _of_another_message(headers: Mapping[str, Any]) -> dict[str, str]:
    """Return the identity that a call gets from the message whose body makes it."""
    return keys.identity({**headers, MESSAGE: ""}, None)


_SIGNATURE_CALLS = Signature.__call__.__code__

_BETWEEN = frozenset({"__call__", "_call_guarded", "xmap", "xstarmap", "<listcomp>"})
"""Names of functions between the call of a signature and the call of its task, also in a loop."""


def _of_signature() -> Mapping[str, Any]:
    """Return the options of the signature that is called directly, which Celery does not pass on.

    That is ``signature()``, or an errback ``(request, exc, traceback)``, which Celery calls in the worker.
    """
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_name in _BETWEEN:
        if frame.f_code is _SIGNATURE_CALLS:
            options: Mapping[str, Any] = frame.f_locals["self"].options
            return options
        frame = frame.f_back  # type: ignore[assignment]
    return {}


def _leaves(signature: Signature) -> Iterator[Signature]:
    """Return the single calls in a canvas."""
    parts = [*(getattr(signature, "tasks", None) or ()), *filter(None, [getattr(signature, "body", None)])]
    if not parts:
        yield signature
    for part in parts:
        yield from _leaves(part)
