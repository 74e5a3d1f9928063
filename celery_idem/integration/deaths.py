"""The worker's main process: what it knows of a child's death before any lease lapses.

A pool process that dies says nothing: its claim would stand until the lease lapses. But
its parent sees it die, so it ends the claim at once. Then

* where Celery delivers the message again, that delivery finds a decided record;
* where Celery would not (early acknowledgement; late without ``task_reject_on_worker_lost``;
  a time limit; a cold shutdown), the parent publishes the message anew, for whoever gets
  it to replay, ask, resume or run, or gives the caller ``OutcomeUnknown`` in place of
  Celery's own error, which would not say whether to try again.

Nothing here may hold up the main process: the store gets ``PATIENCE`` to answer, and
whatever goes wrong is logged and leaves Celery's own handling in force.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from typing import Any

from billiard.einfo import ExceptionInfo, ExceptionWithTraceback
from celery import signals
from celery.exceptions import Terminated, TimeLimitExceeded, WorkerLostError
from celery.utils.imports import symbol_by_name
from celery.utils.saferepr import saferepr
from celery.worker.request import Request
from celery.worker.state import task_ready

from celery_idem.core import protocol
from celery_idem.core.errors import ConfigurationError, OutcomeUnknown
from celery_idem.core.model import Again, Coming, InDoubt, Verdict
from celery_idem.engine import events, owners
from celery_idem.engine.bounded import Bounded, TooLateError
from celery_idem.engine.claim import doubt_message
from celery_idem.integration import declaring, describing, publishing, purging, recovering, republishing
from celery_idem.integration.delivery import WAITS
from celery_idem.integration.messages import BODY, CARRIED, ENCODING

DEATHS = "idem-deaths"
"""Header: how often this message was published anew after a death."""

PATIENCE = 1.0
"""Seconds the store gets to answer. Celery's own call to the result backend, just after, may take as long."""

GRACE = 0.1
"""Seconds between SIGTERM and SIGKILL at the hard time limit: what billiard gives."""

LAST_BREATH = 1.0
"""Seconds a killed process gets to be gone: it takes longer only while it hangs in the kernel."""

REAP_EVERY = 0.25
"""Seconds between looks for dead processes. Celery looks when a process closes its pipes, but then
the kernel may not have finished with it, and Celery's next look is 5 s later. One look costs a
system call for each process."""

EXIT_IS_A_DEATH = hasattr(Request, "_worker_lost_info")
"""Since 5.7 Celery takes a process that exits for lost. Before, it acknowledges the message, as after any error."""

_DEATHS_NOTED = Bounded("celery_idem death", 16)
"""Each takes ``PATIENCE`` of the main process before it is left alone. After sixteen the store hangs, and waiting
for it once more would only hold up the worker."""

_RECEIVED = events.LeaveOut("celery.worker.strategy")
"""Celery logs "received" for each message: of one that waits and comes back, the first time is enough."""

_DEATHS = (WorkerLostError, TimeLimitExceeded, Terminated, SystemExit, KeyboardInterrupt)


class IdempotentRequest(Request):  # type: ignore[misc]
    """Celery's request of an idempotent task, in the worker's main process."""

    _idem_decided = False

    def __init__(self, message: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(message, *args, **kwargs)
        # The child that publishes the message again must know its serializer, and keeps its body in the record.
        self._request_dict["properties"] = {
            **self._request_dict["properties"],
            "content_type": self._content_type,
            BODY: self._body,
            ENCODING: self._content_encoding,
        }
        if WAITS in self._request_dict:
            _RECEIVED.next(self.id)

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> None:
        """Celery's hook for what a child raised (``return_ok``), and for its death."""
        error = _unwrapped(exc_info)
        if return_ok or not isinstance(error, _DEATHS):
            super().on_failure(exc_info, send_failed_event, return_ok)
            return
        self._idem_decided = self._decided(error)
        if not self._idem_decided:
            super().on_failure(exc_info, send_failed_event, return_ok)

    def on_timeout(self, soft: bool, timeout: float) -> None:
        """Celery's hook for time limits: for the hard one it comes after ``on_failure``, and alone under gevent."""
        if not soft and not self._idem_decided and self._in_process():
            self._idem_decided = self._decided(TimeLimitExceeded(timeout))
        if soft or not self._idem_decided:
            super().on_timeout(soft, timeout)

    def _announce_revoked(self, *args: Any) -> None:
        """Celery's hook for a message whose task was revoked, or has expired: it is not published again.

        The record says so before the caller is told, who may call again at once.
        """
        if not self.task.guard.settings.shadow:
            try:
                self._withdraw()
            except Exception as failure:
                events.diagnose(
                    logging.WARNING,
                    "%s: it was revoked, which its record does not know: %s",
                    self.id,
                    failure,
                )
        super()._announce_revoked(*args)

    def _withdraw(self) -> None:
        guard = self.task.guard
        key, _ = guard.identify(self._context, self.args, self.kwargs)
        _DEATHS_NOTED.call(lambda: guard.ledger.revoked(key, self.id, guard.options.policy), PATIENCE)

    # --- the decision -----------------------------------------------------------------

    def _in_process(self) -> bool:
        """A pool without processes: the body has ended, and told the record so itself."""
        return bool(self.worker_pid == os.getpid())

    def _decided(self, error: BaseException) -> bool:
        try:
            return self._decide(error)
        except Exception as failure:
            events.diagnose(
                logging.ERROR, "%s: deciding on the death of its process failed", self.id, error=failure
            )
            return False

    def _decide(self, error: BaseException) -> bool:
        """End what the dead process held. True when the caller is taken care of, here or by a message."""
        # None: no process has accepted it. No owner has process id 0, so nothing is taken for held.
        process = 0 if self._in_process() else self.worker_pid or 0
        if process and isinstance(error, TimeLimitExceeded) and not _ended(process):
            return False  # it lives, and may still act: its lease protects it
        guard = self.task.guard
        if guard.settings.shadow:
            return False
        context = self._context
        key, _ = guard.identify(context, self.args, self.kwargs)
        again = _count(context.headers)
        prefix = owners.prefix(process)
        policy = guard.options.policy

        def died() -> Verdict | None:
            try:
                verdict: Verdict | None = guard.ledger.died(key, prefix, self.id, policy, again)[0]
            except Exception as error:
                events.diagnose(logging.WARNING, "the death of a process could not be recorded: %s", error)
                return protocol.died_unseen(policy)
            return verdict

        try:
            verdict = _DEATHS_NOTED.call(died, PATIENCE)
        except TooLateError:  # what it writes later is harmless: it is guarded by the dead process' owner
            verdict = protocol.died_unseen(policy)
        redelivered = self._celery_delivers_again(error)
        events.emit(
            "died",
            key,
            task_id=self.id,
            process=self.worker_pid,
            why=type(error).__name__,
            then=type(verdict).__name__,
            redelivered=redelivered,
        )
        if isinstance(verdict, InDoubt):
            describe = declaring.options_of(type(self.task)).describe
            said = describing.said(guard.declaration, describe, self.args, self.kwargs, context.headers or {})
            events.emit("in_doubt", key, task_id=self.id, reason=verdict.reason, action=said.line)
        if redelivered or self._already_revoked or verdict is None:
            return False
        return self._carry_out(verdict, key, again)

    def _celery_delivers_again(self, error: BaseException) -> bool:
        """The message is still the broker's, and goes back to the queue."""
        if not self.task.acks_late or isinstance(error, TimeLimitExceeded):
            return False
        if isinstance(error, (SystemExit, KeyboardInterrupt)) and not EXIT_IS_A_DEATH:
            return False
        return bool(self._already_cancelled or self.task.reject_on_worker_lost)

    def _carry_out(self, verdict: Verdict, key: str, again: int) -> bool:
        if isinstance(verdict, Again):
            try:
                self._publish_again(again + 1)
            except Exception as error:
                if not self.task.acks_late:
                    raise
                events.diagnose(
                    logging.WARNING,
                    "%s could not be published again; back to its queue",
                    self.id,
                    error=error,
                )
                task_ready(self)
                self.reject(requeue=True)
                return True
        task_ready(self)
        if isinstance(verdict, InDoubt):
            self._tell(OutcomeUnknown(doubt_message(key, verdict.reason), key, verdict.reason))
        else:
            assert isinstance(verdict, (Again, Coming))
            self.acknowledge()
            self.send_event("task-retried", exception=type(verdict).__name__, traceback="")
        return True

    def _publish_again(self, again: int) -> None:
        """The same message: id, chord, chain, links and headers stay, and no retry is used up."""
        context = self._context
        signature = self.task.signature_from_request(context, retries=context.retries)
        signature.options.update(republishing.to_its_queue(self.task.app, context) or {})
        signature.options["headers"][DEATHS] = again
        signature.options["headers"].setdefault(CARRIED, [])
        # On a connection of its own: those in the application's pool are shared with the children
        # forked since, and a child that drops its copy shuts the socket down for all of them.
        with self.task.app.connection_for_write() as connection:
            signature.apply_async(connection=connection, retry=False)

    def _tell(self, error: OutcomeUnknown) -> None:
        """The failure that Celery would have reported, with what is known here in place of its error."""
        try:
            raise error
        except OutcomeUnknown:
            info = ExceptionInfo()
        if self.task.acks_late and not self.task.acks_on_failure_or_timeout:
            self.reject(requeue=False)
        else:
            self.acknowledge()
        self.task.backend.mark_as_failure(
            self.id, error, request=self._context, store_result=self.store_errors
        )
        signals.task_failure.send(
            sender=self.task,
            task_id=self.id,
            exception=error,
            args=self.args,
            kwargs=self.kwargs,
            traceback=info.traceback,
            einfo=info,
        )
        self.send_event("task-failed", exception=saferepr(error), traceback=info.traceback)


class SecretRequest(IdempotentRequest):
    """That of a task with secret parameters: what Celery logs, sends as events and answers to ``inspect``
    shows none of them, whoever published the message."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        try:
            shown = publishing.shown(self.task.idem_declaration, self.args, self.kwargs)
        except Exception:  # no call of this task: the worker will say so
            shown = dict.fromkeys(("argsrepr", "kwargsrepr"), publishing.HIDDEN)
        self._argsrepr, self._kwargsrepr = shown["argsrepr"], shown["kwargsrepr"]
        self.request_dict.update(shown)  # for the child, whose log has them too

    def info(self, safe: bool = False) -> Any:
        return super().info(safe=True)


def request_class(task: Any) -> type[IdempotentRequest]:
    """The request of a guarded task: ours, below the author's own where there is one.

    Raises:
        ConfigurationError: the author's own is none of Celery's.
    """
    own = symbol_by_name(task.Request)
    if not (isinstance(own, type) and issubclass(own, Request)):
        raise ConfigurationError(
            f"{task.name}: Request = {own!r} is no subclass of celery.worker.request.Request, so nothing would see "
            "the death of its processes. Derive it from celery_idem.integration.deaths.IdempotentRequest."
        )
    ours = SecretRequest if task.idem_declaration.secret else IdempotentRequest
    if issubclass(own, ours):
        return own
    return ours if own in (Request, IdempotentRequest) else type(own.__name__, (own, ours), {})


def _look_often(sender: Any = None, **_: Any) -> None:
    """Where the worker runs an event loop (not so with transports that block, such as SQS)."""
    if getattr(sender, "hub", None) is not None:
        sender.hub.call_repeatedly(REAP_EVERY, sender.pool.maintain_pool)


signals.worker_ready.connect(_look_often)
for looks in (purging, recovering):
    signals.worker_ready.connect(looks.begin)
    signals.worker_shutdown.connect(looks.end)


def _unwrapped(exc_info: Any) -> BaseException:
    error = exc_info.exception
    found: BaseException = error.exc if isinstance(error, ExceptionWithTraceback) else error
    return found


def _count(headers: Any) -> int:
    count = (headers or {}).get(DEATHS, 0)
    return count if isinstance(count, int) and count >= 0 else 0


def _ended(pid: int) -> bool:
    """End a process of the pool that is past its hard time limit; False when it would not go.

    billiard does the same a moment later. Here it comes first, because nothing may be
    decided while the process can still act.
    """
    if not hasattr(os, "waitid"):  # macOS before Python 3.13
        return False
    for number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, LAST_BREATH)):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return True
        if _gone(pid, patience):
            return True
    return False


def _gone(pid: int, patience: float) -> bool:
    """Wait until a child has exited, and leave it to billiard to reap it."""
    deadline = time.monotonic() + patience
    while True:
        try:
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                return True
        except ChildProcessError:
            return True  # reaped already
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)  # a twentieth of the shorter patience
