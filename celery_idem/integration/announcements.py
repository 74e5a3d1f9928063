"""Wakes waiting callers when Celery's result backend publishes the result of a task.

Only Redis publishes results. Celery has a consumer for them, which belongs to the thread that waits in
``AsyncResult.get``. A second thread would read from the same socket, and Celery before 5.7 does not guard that.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from celery_idem.engine import events

if TYPE_CHECKING:
    from celery import Celery

Wake = Callable[[], None]

TICK = 0.05
"""Longest time until a new subscription is sent, in seconds. Only the thread uses its connection, so it has to stop
reading before it can subscribe. Twenty short reads a second are cheap, and happen only while a caller waits."""

IDLE = 10.0
"""Seconds without a waiting caller until the thread ends and its connection is closed."""

AGAIN = 1.0
"""Seconds until the next try if the server does not answer. Meanwhile the callers look without being woken."""


class Announcements:
    """The waiting callers of one application in one process. One thread and one connection serve all of them.

    A wake is a hint to look. It comes when the subscription begins, when a lost connection is back, and when anything
    is published for the task. Callers must also look periodically without a wake.
    """

    def __init__(self, app: Celery) -> None:
        self._app = weakref.ref(app)
        self.pid = os.getpid()
        self._lock = threading.Lock()
        self._waiting: dict[str, set[Wake]] = {}
        self._changed: set[str] = set()
        self._thread: threading.Thread | None = None
        self._silent = False  # this result backend publishes nothing

    def add(self, task_id: str, wake: Wake) -> None:
        """Call ``wake`` from the thread when there may be news of the task. ``wake`` must not block."""
        with self._lock:
            if self._silent:
                return
            self._waiting.setdefault(task_id, set()).add(wake)
            self._changed.add(task_id)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="celery_idem announcements", daemon=True
                )
                self._thread.start()

    def remove(self, task_id: str, wake: Wake) -> None:
        """Undo ``add``."""
        with self._lock:
            wakes = self._waiting.get(task_id, set())
            wakes.discard(wake)
            if not wakes and self._waiting.pop(task_id, None) is not None:
                self._changed.add(task_id)

    def _run(self) -> None:
        backend = self._backend()
        pubsub: Any = None
        channels: dict[bytes, str] = {}
        until = time.monotonic() + IDLE
        while True:
            now = time.monotonic()
            with self._lock:
                until = now + IDLE if self._waiting else until
                if backend is None or now > until:
                    self._thread = None
                    self._silent = backend is None
                    self._waiting.clear()
                    break
                changed, self._changed = self._changed, set()
                if pubsub is None:
                    changed = set(self._waiting)
                new = [task_id for task_id in changed if task_id in self._waiting]
            try:
                if pubsub is None:
                    pubsub = backend.client.pubsub()
                    channels.clear()
                by_channel = {_bytes(backend.get_key_for_task(task_id)): task_id for task_id in changed}
                old = [channel for channel, task_id in by_channel.items() if task_id not in new]
                channels.update(by_channel)
                if new:
                    pubsub.subscribe(*(by_channel.keys() - set(old)))
                if old:
                    pubsub.unsubscribe(*old)
                for channel in old:
                    channels.pop(channel, None)
                message = pubsub.get_message(timeout=TICK)
                if message is not None and message["type"] in ("message", "subscribe"):
                    self._tell(channels.get(_bytes(message["channel"]), ""))
            except Exception as error:  # of the driver, a credential provider, the server's access list
                events.diagnose(logging.DEBUG, "announcements of results cannot be read: %s", error)
                _close(pubsub)
                pubsub = None
                time.sleep(AGAIN)
        _close(pubsub)

    def _tell(self, task_id: str) -> None:
        with self._lock:
            wakes = tuple(self._waiting.get(task_id, ()))
        for wake in wakes:
            wake()

    def _backend(self) -> Any:
        """Return this thread's own result backend; None if it does not publish."""
        from celery.backends.redis import RedisBackend

        app = self._app()
        try:
            backend = app.backend if app is not None else None
        except Exception as error:  # there is none, or its settings are wrong; the callers find that out
            events.diagnose(logging.DEBUG, "announcements of results cannot be read: %s", error)
            return None
        return backend if isinstance(backend, RedisBackend) else None


def _bytes(channel: str | bytes) -> bytes:
    return channel.encode() if isinstance(channel, str) else channel


def _close(pubsub: Any) -> None:
    if pubsub is not None:
        try:
            pubsub.close()
        except Exception as error:  # its connection is dead already
            events.diagnose(logging.DEBUG, "a connection cannot be closed: %s", error)


_known: weakref.WeakKeyDictionary[Any, Announcements] = weakref.WeakKeyDictionary()


def announcements_of(app: Celery) -> Announcements:
    """Return the announcements of an application in this process."""
    known = _known.get(app)
    if known is None or known.pid != os.getpid():  # a fork has no threads of its parent
        known = _known[app] = Announcements(app)
    return known
