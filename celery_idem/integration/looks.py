"""A thread in a worker's main process that looks at the stores periodically.

The process must not fork during a look. A new pool process would inherit locked locks of a driver, without the thread
that releases them.
"""

from __future__ import annotations

import logging
import os
import random
import threading
from collections.abc import Callable
from typing import Any

from celery_idem.core.errors import IdempotencyError
from celery_idem.engine import events

FORK_WAITS = 0.5
"""Longest time that a fork waits for a look, in seconds: a database that hangs must not stop the worker."""


class _Forks:
    """Delays forks of pool processes while ``held_off`` is held."""

    def __init__(self) -> None:
        self.held_off = threading.Lock()
        self._forking = threading.local()  # two threads may fork at once
        os.register_at_fork(before=self._before, after_in_parent=self._after, after_in_child=self._in_child)

    def _before(self) -> None:
        self._forking.holds = self.held_off.acquire(timeout=FORK_WAITS)

    def _after(self) -> None:
        if self._forking.holds:
            self.held_off.release()

    def _in_child(self) -> None:
        self.held_off = threading.Lock()


FORKS = _Forks()


class Looks:
    """A thread that calls ``look`` periodically.

    Args:
        name: names the thread, and what failed in the log.
        look: receives an event that is set when the thread should end.
        first: longest time until the first look, in seconds. The time is random, so that a hundred workers which start
            together do not look at once.
        every: seconds between looks, plus or minus a tenth.
    """

    def __init__(
        self, name: str, look: Callable[[threading.Event], object], first: float, every: float
    ) -> None:
        self._name = name
        self._look = look
        self._first = first
        self._every = every
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._loop, name=f"celery_idem {name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the look under way, and do not wait for it."""
        self._ended.set()

    def _loop(self) -> None:
        pause = random.uniform(0.0, self._first)  # noqa: S311  # only spreads the workers
        while not self._ended.wait(pause):
            try:
                self._look(self._ended)
            except IdempotencyError as error:
                events.diagnose(logging.WARNING, "%s failed; trying again: %s", self._name, error)
            except Exception as error:
                events.diagnose(logging.ERROR, "%s failed; trying again", self._name, error=error)
            pause = self._every * random.uniform(0.9, 1.1)  # noqa: S311


class Beside:
    """One thread beside each worker of this process. ``begin`` and ``end`` are receivers of Celery's signals.

    Args:
        make: returns the thread for an application; None if that needs none.
    """

    def __init__(self, make: Callable[[Any], Looks | None]) -> None:
        self._make = make
        self._running: dict[int, Looks] = {}  # by application

    def begin(self, sender: Any = None, **_: Any) -> None:
        """``worker_ready``: by now the pool's processes are forked, so they do not inherit the thread."""
        app = sender.app
        thread = None if id(app) in self._running else self._make(app)
        if thread is not None:
            self._running[id(app)] = thread
            thread.start()

    def end(self, sender: Any = None, **_: Any) -> None:
        """``worker_shutdown``."""
        thread = self._running.pop(id(sender.app), None)
        if thread is not None:
            thread.stop()
