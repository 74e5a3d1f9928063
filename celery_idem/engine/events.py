"""Emits all events, to the log and to listeners. No other module of the package writes to a log.

Listeners get no argument values, except ``action`` of ``in_doubt``, which says which action it is. They run in a
separate thread. An exception of a listener is logged and dropped. A listener that blocks delays other listeners, and
delays a task for at most ``PATIENCE``. The package has some listeners: ``celery_idem.telemetry``.

The log record of an event has ``idem_event``, ``idem_key``, ``idem_task``, ``idem_task_id``, ``idem_details``, and
where it happened (``idem_worker``, ``idem_host``, ``idem_pid``), for formatters that write JSON. Other messages (a
check at start-up, a listener that fails) are diagnostics: free text on a separate logger, which no listener receives.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from logging import CRITICAL, DEBUG, ERROR, INFO, WARNING
from threading import Lock, Semaphore, Thread, current_thread
from typing import Any, NamedTuple

from celery_idem.core import keys

_logger = logging.getLogger("celery_idem")
_diagnostics = logging.getLogger("celery_idem.diagnostics")


class Kind:
    """One kind of event.

    Attributes:
        level: the level of its log record.
        fields: details of each event of this kind, and their types.
        optional: details that only some events have.
        says: what happened, for the log.
    """

    def __init__(
        self,
        level: int,
        fields: Mapping[str, type],
        optional: Mapping[str, type] | None = None,
        says: str = "",
    ) -> None:
        self.level = level
        self.fields = fields
        self.optional = optional or {}
        self.says = says


_TASK = {"task_id": str}
_TRACE = {"trace": str}

KINDS = {
    "settled": Kind(DEBUG, {**_TASK, "succeeded": bool}, says="the outcome is recorded"),
    "replayed": Kind(
        INFO, {**_TASK, "succeeded": bool}, _TRACE, says="a repeat received the stored outcome; nothing ran"
    ),
    "told": Kind(
        INFO, {"status": str}, _TRACE, says="submit answered from the record; nothing was published"
    ),
    "waiting": Kind(INFO, _TASK, says="another execution holds the intent; this repeat comes back later"),
    "scheduled": Kind(DEBUG, _TASK, says="the body asked for a retry"),
    "released": Kind(INFO, {**_TASK, "why": str}, says="nothing happened; the next delivery runs"),
    "mismatch": Kind(
        WARNING, {**_TASK, "differs": tuple}, says="the intent is known with other values; nothing ran"
    ),
    "in_doubt": Kind(
        ERROR, {**_TASK, "reason": str}, {"action": str}, says="it is not known whether the effect happened"
    ),
    "still_in_doubt": Kind(
        INFO, {**_TASK, "reason": str}, says="a repeat found the intent in doubt; nothing ran"
    ),
    "asked": Kind(WARNING, {**_TASK, "answer": str}, says="the destination was asked after a crash"),
    "lease_lost": Kind(
        ERROR, {**_TASK, "fence": int}, says="another execution took over, because the lease was not renewed"
    ),
    "clock_stepped": Kind(WARNING, {"by": float, "store": str}, says="the store's clock was set"),
    "stale_settle": Kind(
        CRITICAL,
        {**_TASK, "fence": int, "current_fence": int},
        says="finished after another execution had taken over; the effect may have happened twice",
    ),
    "store_error": Kind(
        WARNING,
        {"error": str, "while_": str},
        {**_TASK, "then": str, "leases": int},
        says="the store did not answer",
    ),
    "broker_error": Kind(WARNING, {**_TASK, "error": str}, says="the broker did not take a message"),
    "unguarded": Kind(WARNING, _TASK, says="the body runs without a guard"),
    "unsettled": Kind(ERROR, {**_TASK, "error": str}, says="the outcome could not be recorded"),
    "late_error": Kind(
        ERROR, {**_TASK, "error": str}, says="something failed after the outcome was recorded"
    ),
    "exited": Kind(ERROR, {**_TASK, "reason": str}, says="the process must exit while the body runs"),
    "died": Kind(
        ERROR,
        {**_TASK, "process": int, "why": str, "then": str, "redelivered": bool},
        says="a process of the pool died while it held the intent",
    ),
    "lapsed": Kind(WARNING, _TASK, says="a claim of a dead process was found"),
    "recovered": Kind(
        WARNING, {**_TASK, "tries": int, "state": str}, says="overdue; its call was published again"
    ),
    "resolved": Kind(WARNING, {"by": str, "what": str}, says="an operator settled it"),
    "forgotten": Kind(WARNING, {"by": str}, says="an operator removed the record; the next call runs"),
    "shadow": Kind(INFO, {**_TASK, "would": str, "why": str}, says="shadow mode; the call ran"),
}
"""Every kind of event. ``stale_settle`` is the alarm: an execution finished an effect after another one had taken the
intent over."""

LEVELS = {kind: said.level for kind, said in KINDS.items()}

_MESSAGES = {kind: f"{kind} %s: {said.says} [%s]" for kind, said in KINDS.items()}
"""The log's message format of each kind. They differ, because monitors such as Sentry group by it."""

worker: list[str] = []
"""Name of the worker that this process belongs to, as in Celery's own events; empty if there is none. The worker's
children inherit it."""

_HOST = socket.gethostname()


class Event(NamedTuple):
    """Something that happened to an intent.

    Attributes:
        kind: one of ``KINDS``.
        key: the idempotency key.
        details: the fields of its kind; an argument's value only in ``action``, and never a secret one.
    """

    kind: str
    key: str
    details: dict[str, Any]

    @property
    def task(self) -> str:
        """Name of the task; "" if the key is not known."""
        return keys.task_of(self.key) or ""


Listener = Callable[[Event], None]

spans: list[Callable[[], bytes]] = []
"""Functions that return the context of the current span, for ``Outcome.trace``. The last one is used. If the list is
empty, no context is kept."""

PATIENCE = 0.1
"""Seconds that a task waits for the listeners of an event. That is long for a listener that only counts or queues.
A task does not wait again until they have caught up."""

BACKLOG = 1000
"""Events that are kept for listeners that fell behind. Any further ones are dropped, which is logged once."""

_here: list[Listener] = []
_listeners: list[tuple[Listener, Callable[[Event], bool]]] = []


def listen(
    listener: Listener, *, wants: Callable[[Event], bool] = lambda event: True, here: bool = False
) -> Callable[[], None]:
    """Call ``listener`` for every event. Return a function that ends this.

    Args:
        wants: whether the listener wants an event. It must be quick.
        here: call the listener in the thread of the event. Only for one that cannot block, because the task waits.
    """
    if here:
        _here.append(listener)
        return lambda: _here.remove(listener)
    entry = (listener, wants)
    _listeners.append(entry)
    return lambda: _listeners.remove(entry)


def emit(
    kind: str, key: str, *, cause: BaseException | None = None, repeats: bool = False, **details: Any
) -> None:
    """Log an event and pass it to the listeners.

    Args:
        cause: the exception behind it; only its traceback is used, in the log.
        repeats: the log has this event already, so it is logged at DEBUG.
        details: the fields that ``KINDS`` names.
    """
    level = logging.DEBUG if repeats else LEVELS[kind]
    if _logger.isEnabledFor(level):
        place = _place()
        extra = {
            "idem_event": kind,
            "idem_key": key,
            "idem_task": keys.task_of(key) or "",
            "idem_task_id": details.get("task_id", ""),
            "idem_details": details,
            **{f"idem_{name}": value for name, value in place.items()},
        }
        shown = " ".join(_shown(name, value) for name, value in {**details, **place}.items() if value != "")
        with contextlib.suppress(Exception):  # of an application's own filter; handlers catch their errors
            _logger.log(level, _MESSAGES[kind], key, shown, extra=extra, exc_info=cause and _writable(cause))
    if _here or _listeners:
        event = Event(kind, key, details)
        for listener in _here:
            try:
                listener(event)
            except Exception as error:
                _failed(event, error)
        wanted = [listener for listener, wants in _listeners if wants(event)]
        if wanted:
            _dispatcher.dispatch(event, wanted)


def _writable(cause: BaseException) -> BaseException | None:
    """Return the exception, or None if its traceback has half of a surrogate pair: a file would lose the whole line."""
    try:
        "".join(traceback.format_exception(cause)).encode()
    except UnicodeEncodeError:
        return None
    return cause


def _shown(name: str, value: object) -> str:
    text = str(value)
    return f"{name.rstrip('_')}={text if text.isprintable() and ' ' not in text else repr(text)}"


def _place() -> dict[str, Any]:
    return {"worker": worker[0] if worker else "", "host": _HOST, "pid": os.getpid()}


def diagnose(level: int, text: str, *values: object, error: BaseException | None = None) -> None:
    """Log a message that is no event of an intent, on ``celery_idem.diagnostics``.

    Args:
        error: an exception whose traceback is logged.
    """
    with contextlib.suppress(Exception):  # of an application's own filter
        extra = {f"idem_{name}": value for name, value in _place().items()}
        _diagnostics.log(level, "celery_idem: " + text, *values, extra=extra, exc_info=error)


class LeaveOut(logging.Filter):
    """Leaves out single lines of another package's logger: the next one about a task.

    Args:
        logger: name of the logger. Its records have the task's id in ``data["id"]``, as Celery's do.
    """

    def __init__(self, logger: str) -> None:
        super().__init__()
        self._of = logging.getLogger(logger)
        self._next: set[str] = set()

    def next(self, task_id: str) -> None:
        """Leave out the next line about this task, unless events are logged at DEBUG."""
        if self._of.isEnabledFor(logging.INFO) and not _logger.isEnabledFor(logging.DEBUG):
            self._next.add(task_id)
            self._of.addFilter(self)  # logging adds it only once

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the line is written."""
        data = getattr(record, "data", None)
        task_id = data.get("id") if isinstance(data, dict) else None
        if task_id not in self._next:
            return True
        self._next.discard(task_id)
        return False


def _failed(event: Event, error: BaseException) -> None:
    diagnose(logging.ERROR, "a listener failed on %s %s", event.kind, event.key, error=error)


class _Dispatcher:
    """Calls listeners in a separate thread, one per process, so that no listener can fail or block a task."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start without a thread. A forked child does not have its parent's thread, and locks may be held there."""
        self._lock = Lock()
        self._queue: deque[tuple[Event, list[Listener], Lock]] = deque()
        self._queued = Semaphore(0)
        self._thread: Thread | None = None
        self._behind = False  # a listener took longer than PATIENCE, and has not caught up
        self._dropped = False

    def dispatch(self, event: Event, listeners: list[Listener]) -> None:
        """Queue an event for its listeners, and wait for them, at most ``PATIENCE``."""
        done = Lock()
        done.acquire()
        with self._lock:
            if self._thread is None:
                thread = Thread(target=self._run, name="celery_idem events", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # no more threads: then only the log has the event
                    return
                self._thread = thread
            full = len(self._queue) >= BACKLOG
            if not full:
                self._queue.append((event, listeners, done))
        if full:
            if not self._dropped:
                self._dropped = True
                diagnose(logging.ERROR, "listeners of events block: events are dropped until they return")
            return
        self._queued.release()
        if not self._behind and current_thread() is not self._thread and not done.acquire(timeout=PATIENCE):
            self._behind = True

    def _run(self) -> None:
        while True:
            self._queued.acquire()
            event, listeners, done = self._queue.popleft()
            for listener in listeners:
                try:
                    listener(event)
                except BaseException as error:  # also SystemExit, which would end this thread
                    _failed(event, error)
            done.release()
            if not self._queue:
                self._behind = self._dropped = False


_dispatcher = _Dispatcher()
os.register_at_fork(after_in_child=_dispatcher.reset)
