"""Ends the claim of a dead pool process, in the worker's main process, before its lease lapses.

A pool process that dies reports nothing, and its claim would hold until the lease lapses. The main process sees it die,
and ends the claim at once. Then there are two cases:

* Celery delivers the message again. That delivery finds a decided record.
* Celery does not (early acknowledgement; late without ``task_reject_on_worker_lost``; a time limit; a cold shutdown).
  Then the main process publishes the message again, and its delivery replays, asks, resumes or runs. Or it gives the
  caller ``OutcomeUnknown`` instead of Celery's own error, which does not say whether to try again.

Nothing here may block the main process. The store gets ``PATIENCE`` to answer. Every error is logged, and Celery then
handles the death as usual.
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
"""Header: how many times this message was published again after a death."""

PATIENCE = 1.0
"""Seconds that the store gets to answer. Celery's own call to the result backend, just after, may take as long."""

GRACE = 0.1
"""Seconds between SIGTERM and SIGKILL at the hard time limit, as in billiard."""

KILL_TIMEOUT = 1.0
"""Seconds to wait for a process to exit after SIGKILL. It takes longer only while it hangs in the kernel."""

REAP_EVERY = 0.25
"""Seconds between looks for dead processes. Celery looks when a process closes its pipes. The process may not have
ended by then, and Celery's next look is 5 s later. One look costs a system call per process."""

EXIT_IS_A_DEATH = hasattr(Request, "_worker_lost_info")
"""Whether Celery treats a process that exits as lost (since 5.7). Before, it acknowledged the message, as after any
error."""

_DEATHS_NOTED = Bounded("celery_idem death", 16)
"""Threads for calls to the store, each of which the main process waits for up to ``PATIENCE``. When sixteen are busy,
the store hangs, and waiting for it again would only block the worker."""

_RECEIVED = events.LeaveOut("celery.worker.strategy")
"""Leaves out Celery's log line "received" when a waiting message comes back."""

_DEATHS = (WorkerLostError, TimeLimitExceeded, Terminated, SystemExit, KeyboardInterrupt)


class IdempotentRequest(Request):  # type: ignore[misc]
    """Celery's request of an idempotent task, in the worker's main process."""

    _idem_decided = False

    def __init__(self, message: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(message, *args, **kwargs)
        # The pool process publishes the message again with its serializer, and keeps its body in the record.
        self._request_dict["properties"] = {
            **self._request_dict["properties"],
            # Celery has decoded a message of its first protocol, and then keeps no content type.
            "content_type": self._content_type or message.content_type,
            BODY: self._body,
            ENCODING: self._content_encoding,
        }
        if WAITS in self._request_dict:
            _RECEIVED.next(self.id)

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> None:
        """Celery's hook for an error in a pool process (``return_ok``), and for its death."""
        error = _unwrapped(exc_info)
        if return_ok or not isinstance(error, _DEATHS):
            super().on_failure(exc_info, send_failed_event, return_ok)
            return
        self._idem_decided = self._decided(error)
        if not self._idem_decided:
            super().on_failure(exc_info, send_failed_event, return_ok)

    def on_timeout(self, soft: bool, timeout: float) -> None:
        """Celery's hook for time limits. For a hard limit it comes after ``on_failure``; under gevent, without it."""
        if not soft and not self._idem_decided and self._in_process():
            self._idem_decided = self._decided(TimeLimitExceeded(timeout))
        if soft or not self._idem_decided:
            super().on_timeout(soft, timeout)

    def _announce_revoked(self, *args: Any) -> None:
        """Celery's hook for a message that is dropped, because its task was revoked or has expired.

        The record is changed first, because the caller may call again as soon as Celery tells it.
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
        _DEATHS_NOTED.call(lambda: guard.ledger.revoked(key, str(self.id), guard.options.policy), PATIENCE)

    # --- the decision -----------------------------------------------------------------

    def _in_process(self) -> bool:
        """Whether the pool has no processes. Then the body has ended, and has written the record itself."""
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
        """End the hold of the dead process. Return True if Celery has nothing left to do."""
        # Process 0: no process has accepted the message. No owner has that id, so no hold is ended.
        process = 0 if self._in_process() else self.worker_pid or 0
        if process and isinstance(error, TimeLimitExceeded) and not _ended(process):
            return False  # it lives and may still act, so it keeps its lease
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
                verdict: Verdict | None = guard.ledger.died(key, prefix, str(self.id), policy, again)[0]
            except Exception as error:
                events.diagnose(logging.WARNING, "the death of a process could not be recorded: %s", error)
                return protocol.died_unseen(policy)
            return verdict

        try:
            verdict = _DEATHS_NOTED.call(died, PATIENCE)
        except TooLateError:  # a later write needs the dead process' owner in the record, so it is harmless
            verdict = protocol.died_unseen(policy)
        redelivered = self._celery_delivers_again(error)
        events.emit(
            "died",
            key,
            task_id=str(self.id),
            process=self.worker_pid,
            why=type(error).__name__,
            then=type(verdict).__name__,
            redelivered=redelivered,
        )
        if isinstance(verdict, InDoubt):
            describe = declaring.options_of(type(self.task)).describe
            said = describing.said(guard.declaration, describe, self.args, self.kwargs, context.headers or {})
            events.emit("in_doubt", key, task_id=str(self.id), reason=verdict.reason, action=said.line)
        if redelivered or self._already_revoked or verdict is None:
            return False
        return self._carry_out(verdict, key, again)

    def _celery_delivers_again(self, error: BaseException) -> bool:
        """Whether the broker still has the message, and Celery returns it to its queue."""
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
        """Publish the same message, with its id, chord, chain, links, headers and number of retries."""
        context = self._context
        signature = self.task.signature_from_request(context, retries=context.retries)
        signature.options.update(republishing.to_its_queue(self.task.app, context) or {})
        signature.options["headers"][DEATHS] = again
        signature.options["headers"].setdefault(CARRIED, [])
        # On a new connection. Pool processes that were forked since share those in the application's pool, and if one
        # of them closes its copy, the socket is shut down for all.
        with self.task.app.connection_for_write() as connection:
            signature.apply_async(connection=connection, retry=False)

    def _tell(self, error: OutcomeUnknown) -> None:
        """Report the failure as Celery would, with our error instead of Celery's."""
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
    """The request of a task with secret parameters.

    Celery's logs, events and answers to ``inspect`` do not show them, whichever process has published the message.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        try:
            shown = publishing.shown(self.task.idem_declaration, self.args, self.kwargs)
        except Exception:  # the arguments do not fit the task; the worker will report it
            shown = dict.fromkeys(("argsrepr", "kwargsrepr"), publishing.HIDDEN)
        self._argsrepr, self._kwargsrepr = shown["argsrepr"], shown["kwargsrepr"]
        self.request_dict.update(shown)  # for the pool process, whose log shows them too

    def info(self, safe: bool = False) -> Any:
        return super().info(safe=True)


def request_class(task: Any) -> type[IdempotentRequest]:
    """Return the request class of a guarded task: ours, with the author's own class on top if there is one.

    Raises:
        ConfigurationError: the author's own class does not derive from Celery's.
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
    """Look for dead processes often, if the worker has an event loop. Blocking transports, such as SQS, have none."""
    if getattr(sender, "hub", None) is not None:
        sender.hub.call_repeatedly(REAP_EVERY, sender.pool.maintain_pool)


signals.worker_ready.connect(_look_often)
for name, beside in (("purging", purging.BESIDE), ("recovering", recovering.BESIDE)):
    # With an id of its own: before 5.7, Celery takes the methods of two objects of one class for one receiver.
    signals.worker_ready.connect(beside.begin, dispatch_uid=f"celery_idem {name} begins")
    signals.worker_shutdown.connect(beside.end, dispatch_uid=f"celery_idem {name} ends")


def _unwrapped(exc_info: Any) -> BaseException:
    error = exc_info.exception
    found: BaseException = error.exc if isinstance(error, ExceptionWithTraceback) else error
    return found


def _count(headers: Any) -> int:
    count = (headers or {}).get(DEATHS, 0)
    return count if isinstance(count, int) and count >= 0 else 0


def _ended(pid: int) -> bool:
    """End a pool process that is past its hard time limit. Return False if it did not exit.

    billiard does the same a moment later. We must do it before that, because nothing may be decided while the process
    can still act.
    """
    if not hasattr(os, "waitid"):  # macOS before Python 3.13
        return False
    for number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, KILL_TIMEOUT)):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return True
        if _exited(pid, patience):
            return True
    return False


def _exited(pid: int, patience: float) -> bool:
    """Wait until a process has exited, and leave it to billiard to reap it. Return False if it did not."""
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
